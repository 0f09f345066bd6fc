"""Options that several commands have, what completes them in a shell, and what they ask for."""

import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from ..clock import seconds_of
from ..errors import UserError, no_model
from ..names import DATA_SETS, DEVICES, architectures, shipped, source_name
from ..recipes import all_keys, load_recipe, parse_setting, recipe_names
from ..run_folder import RunFolder
from ..runs.wanted import FOR_TEACHER, SEVERAL, Wanted
from ..schema import choices_of

TRUST = typer.Option(
    "--trust-pickle", help="Load a .pkl or .pt2, which may run code in it; only for files that you trust."
)
SPLITS = ("test", "val", "train")
KEYS = "keys"  # in place of a recipe, what `show` takes for a list of all keys


def beginning(words: Callable[[], Iterable[str]]) -> Callable[[str], list[str]]:
    """A function that completes a word in a shell: it gives those of `words` that begin with it."""
    return lambda incomplete: [word for word in words() if word.startswith(incomplete)]


recipe_words = beginning(lambda: [*recipe_names(), *SEVERAL])
schedule_words = beginning(lambda: choices_of("training.schedules:SCHEDULES"))
data_words, device_words, arch_words = (
    beginning(lambda: DATA_SETS),
    beginning(lambda: DEVICES),
    beginning(architectures),
)
key_words = beginning(lambda: [f"{key}=" for key in all_keys()])
split_words = beginning(lambda: SPLITS)
shown_words = beginning(lambda: [*recipe_names(), KEYS])
Settings = Annotated[
    list[str] | None, typer.Option("--set", help="table.key=value; may be repeated.", autocompletion=key_words)
]
# What `run` trains, and `plan` plans.
Recipes = Annotated[
    list[str],
    typer.Argument(
        help="baseline, se, mixup, kd, teacher, small, small/kd, ablation, fast, table1, ..., or a .toml",
        autocompletion=recipe_words,
    ),
]
DataSet = Annotated[
    str, typer.Option(help="A data set's name, a folder, an .npz file or an archive.", autocompletion=data_words)
]
Labels = Annotated[Path | None, typer.Option(help="A .csv table with the labels of the images in the folder --data.")]
Arch = Annotated[
    str | None, typer.Option(help="Any timm architecture, in place of the recipe's.", autocompletion=arch_words)
]
TeacherOf = Annotated[
    str | None, typer.Option(help="A recipe, a run's folder, a file, or timm:NAME.", autocompletion=recipe_words)
]
FineTuneTeacher = Annotated[
    bool, typer.Option("--fine-tune-teacher", help="Train the teacher timm:NAME on the data first.")
]
Epochs = Annotated[int | None, typer.Option(help="Epochs of every stage, in place of the recipe's.")]
Schedule = Annotated[
    str | None, typer.Option(help="cosine, one-cycle, sgdr ..., for every stage.", autocompletion=schedule_words)
]
Seed = Annotated[int | None, typer.Option(help="Seed of the weights, the batches and the augmentation; 0 by default.")]
Seeds = Annotated[str | None, typer.Option(help="Several seeds, each trained: 0,1,2.")]
From = Annotated[
    str | None, typer.Option("--from", help="Begin from weights: a finished run's folder, or a .safetensors or .pth.")
]
BudgetOf = Annotated[
    str | None, typer.Option(help="Choose batch size, epochs and networks that train in 90s, 20m or 2h.")
]
Compare = Annotated[bool, typer.Option("--compare", help="Train each student without its teacher, too.")]
Out = Annotated[Path | None, typer.Option(help="Folder of the runs, instead of artifacts/DATA.")]


def wanted_by(
    recipe: list[str],
    data: str,
    *,
    labels: Path | None = None,
    arch: str | None = None,
    teacher: str | None = None,
    fine_tune_teacher: bool = False,
    epochs: int | None = None,
    schedule: str | None = None,
    seed: int | None = None,
    seeds: str | None = None,
    set_: list[str] | None = None,
    from_: str | None = None,
    budget: str | None = None,
    compare: bool = False,
    out: Path | None = None,
    only: str | None = None,
) -> Wanted:
    """What the options of `run` ask for, of which other commands have some.

    Raises:
        UserError: One of the options cannot be read, or two say the same thing.
    """
    same = {"teacher": ("--teacher", teacher), "data.labels": ("--labels", labels)}
    refuse_twice(set_, same | dict.fromkeys(("budget", "budget.minutes"), ("--budget", budget)))
    data = os.path.expanduser(data)
    teacher = None if teacher is None else ",".join(map(os.path.expanduser, teacher.split(",")))
    settings = settings_of(set_) | labelled(labels)
    if from_ is not None:
        settings = _beginning(os.path.expanduser(from_), recipe, data, arch, settings) | settings
    return Wanted(
        recipes=tuple(map(os.path.expanduser, recipe)),
        data=data,
        seeds=_seeds(seed, seeds),
        out=None if out is None else home(out),
        arch=arch,
        teacher=teacher,
        fine_tune_teacher=fine_tune_teacher,
        epochs=epochs,
        schedule=schedule,
        settings=settings,
        budget=None if budget is None else seconds_of(budget, "budget") / 60,
        compare=compare,
        only=only,
    )


def refuse_twice(set_: list[str] | None, given: Mapping[str, tuple[str, object]]) -> None:
    """Raise a UserError if --set has a key that an option stands for: one of the two would have no effect.

    Args:
        set_: What the options --set say.
        given: For each such key, the option and its value; None where it is not given.
    """
    for key in settings_of(set_):
        option, value = given.get(key, ("", None))
        if value is not None:
            raise UserError(f"{option} and --set {key} say the same thing; leave one out")


def settings_of(texts: list[str] | None) -> dict[str, Any]:
    """What the options --set say."""
    return dict(parse_setting(text) for text in texts or [])


def _beginning(
    source: str, recipes: list[str], data: str, arch: str | None, settings: dict[str, Any]
) -> dict[str, Any]:
    """The settings that --from is short for: with the network of the weights, unless another is asked for."""
    from ..runs.start_from import settings_from

    if len(recipes) > 1 or recipes[0] in SEVERAL:
        raise UserError("--from is for one recipe; give the others commands of their own")
    if "model.weights" in settings:
        raise UserError("--from and --set model.weights say the same thing; leave one out")
    own = {key: value for key, value in settings.items() if not key.startswith(FOR_TEACHER)}
    found = settings_from(source, load_recipe(os.path.expanduser(recipes[0]), source_name(data), None, own))
    if arch is not None or "model.name" in settings:
        return {key: value for key, value in found.items() if key not in ("model.name", "model.args")}
    return found


def labelled(labels: Path | None) -> dict[str, str]:
    return {} if labels is None else {"data.labels": str(home(labels))}


def _seeds(seed: int | None, seeds: str | None) -> tuple[int, ...]:
    """The seeds that --seed and --seeds ask for; a UserError if both are given."""
    if seed is not None and seeds is not None:
        raise UserError(f"--seed {seed} and --seeds {seeds} both say what to train with; leave one out")
    return (seed or 0,) if seeds is None else parse_seeds(seeds)


def parse_seeds(text: str) -> tuple[int, ...]:
    """The seeds in a text such as 0,1,2.

    Raises:
        UserError: The text has another form, or a seed twice.
    """
    try:
        seeds = tuple(int(part) for part in text.split(","))
    except ValueError:
        raise UserError(f"seeds is {text!r}; write 0,1,2") from None
    if len(set(seeds)) < len(seeds):
        raise UserError(f"seeds is {text!r}; the same seed twice is the same run")
    return seeds


def home(path: Path) -> Path:
    """The path with ~ replaced by the home folder, which a shell does not do in --out=~/runs."""
    return Path(os.path.expanduser(path))


def check_model(source: Path) -> bool:
    """Whether a trained model is there; a UserError if nothing can be one by this name."""
    there = RunFolder(source).weights.is_file() or source.is_file() or shipped(str(source)) is not None
    if not there and not source.exists() and source.suffix not in (".safetensors", ".pkl"):
        raise no_model(source)
    return there
