"""`dms-fastai run --from RUN`, and `prune RUN`: the settings that they are short for, without torch."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ..errors import UserError, no_model
from ..names import shipped
from ..recipes import Recipe, flat
from ..run_folder import RunFolder

__all__ = ["called", "refuse_same_folder", "settings_from"]

AS_BEFORE = ("data", "augment")  # tables that a pruned network shares with the run that it is of


def settings_from(source: str, recipe: Recipe) -> dict[str, Any]:
    """What it takes to begin a recipe from trained weights: them, their network, and a folder and a title of its own.

    Args:
        source: As in `model.weights`: a finished run's folder, a file of weights or "timm".
        recipe: The recipe, which keeps its schedule. If it prunes, the weights are its teacher, too.

    Raises:
        UserError: There are no weights at `source`.
    """
    path = Path(source)
    if path.is_dir() and not RunFolder(path).weights.is_file():
        if inside := RunFolder(path).runs_inside:
            raise UserError(f"{path} is no run, but holds some; give {inside[0]}")
        raise UserError(f"{path} holds no finished run; give the folder of one, or a file of weights")
    if not path.exists() and source != "timm" and shipped(source) is None:
        raise no_model(source)
    facts = RunFolder(path if path.is_dir() else path.parent)
    name = facts.facts().recipe if path.exists() and facts.facts_file.is_file() else path.stem
    if recipe.prune is None:
        found = {"model.weights": source, "name": f"{recipe.name}-from", "title": f"{recipe.title}, from {name}"}
        if path.exists() and facts.recipe_file.is_file():
            model = facts.recipe().model
            found |= {"model.name": model.name} | ({"model.args": model.args} if model.args else {})
        return found
    return {
        **(_shared(facts.recipe()) if path.exists() and facts.recipe_file.is_file() else {}),
        "model.weights": source,
        "teacher": source,
        **called(name, recipe),
    }


def called(name: str, recipe: Recipe) -> dict[str, str]:
    """Name and title of a pruned run: `name` is that of the run that is pruned, and `recipe` prunes it."""
    kept, fresh = f"{100 * recipe.prune.macs:.3g}", recipe.prune.from_scratch
    what = "Half the MACs" if kept == "50" else f"{kept} % of the MACs"
    return {
        "name": f"{name}-macs{kept}" + ("-scratch" if fresh else ""),
        "title": f"{what} of {name}" + (", from scratch" if fresh else ""),
    }


def _shared(recipe: Recipe) -> Mapping[str, Any]:
    """Images and crops as in the run that is pruned. Where a table of labels lies, the run does not say."""
    table = recipe.to_table()
    found = flat({name: table[name] for name in AS_BEFORE})
    return {key: value for key, value in found.items() if key != "data.labels"}


def refuse_same_folder(source: str, folders: Iterable[Path]) -> None:
    """Raise a UserError if a run would be written over the one that it begins from."""
    path = Path(source)
    own = (path if path.is_dir() else path.parent).resolve()
    for folder in folders:
        if path.exists() and folder.resolve() == own:
            raise UserError(f"{folder} is the run to begin from, and would be written over; give --out another folder")
