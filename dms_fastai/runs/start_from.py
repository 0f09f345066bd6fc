"""`dms-fastai run --from RUN`: the settings that it is short for, without torch."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..errors import UserError, no_model
from ..names import shipped
from ..recipes import Recipe
from ..run_folder import RunFolder

__all__ = ["refuse_same_folder", "settings_from"]


def settings_from(source: str, recipe: Recipe) -> dict[str, Any]:
    """What it takes to begin a recipe from trained weights: the weights, and a folder and a title of its own.

    Args:
        source: As in `model.weights`: a finished run's folder, a file of weights or "timm".
        recipe: The recipe, which keeps its schedule.

    Raises:
        UserError: There are no weights at `source`.
    """
    path = Path(source)
    if path.is_dir() and not RunFolder(path).weights.is_file():
        raise UserError(f"{path} holds no finished run; give the folder of one, or a file of weights")
    if not path.exists() and source != "timm" and shipped(source) is None:
        raise no_model(source)
    facts = RunFolder(path if path.is_dir() else path.parent)
    name = facts.facts().recipe if path.exists() and facts.facts_file.is_file() else path.stem
    return {"model.weights": source, "name": f"{recipe.name}-from", "title": f"{recipe.title}, from {name}"}


def refuse_same_folder(source: str, folders: Iterable[Path]) -> None:
    """Raise a UserError if a run would be written over the one that it begins from."""
    path = Path(source)
    own = (path if path.is_dir() else path.parent).resolve()
    for folder in folders:
        if path.exists() and folder.resolve() == own:
            raise UserError(f"{folder} is the run to begin from, and would be written over; give --out another folder")
