"""A run's folder: the names of its files, and their contents."""

import csv
import dataclasses
import json
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .errors import UserError
from .files import partials, whole
from .legacy import modern_facts
from .recipes import Recipe, load_recipe
from .settings import convert

__all__ = ["Facts", "Figures", "Problem", "Run", "RunFolder", "find_runs"]

Row = dict[str, float]


@dataclass(frozen=True)
class Figures:
    """The results of an epoch."""

    epoch: int
    train_loss: float
    train_accuracy: float
    valid_loss: float
    valid_accuracy: float


@dataclass(frozen=True)
class Facts:
    """The contents of a run's run.json.

    Attributes:
        status: "running", "interrupted" or "finished".
        recipe, title, model, seed, epochs: The recipe's name and title, and the model, seed and epochs that it was run
            with.
        parameters: Number of parameters of the model.
        data, valid: The data set, and which split of it is validated on.
        mixup: Whether training accuracy is measured on mixed images.
        teacher, teacher_digest: The teacher, and a hash of its weights.
        data_digest: Hashes of the training and the validation images.
        device, threads, versions, python, commit: What it ran on, and which code.
        started, seconds: When it began, and how long it has trained so far.
        epochs_done, last, best: How far it has come. The last epoch is the result; the best one was chosen on the
            images that it is measured on.
        stopped_by: Why it was stopped, if it was; not written to the file.
    """

    status: str
    recipe: str
    title: str
    model: str
    parameters: int
    data: str
    valid: str
    validation_images: int
    seed: int
    epochs: int
    started: str
    epochs_done: int
    seconds: float
    training_images: int | None = None
    classes: int | None = None
    size: int | None = None
    mixup: bool = False
    teacher: str | None = None
    teacher_digest: str | None = None
    data_digest: list[str] | None = None
    device: str | None = None
    threads: int | None = None
    versions: dict[str, str] = field(default_factory=dict)
    python: str | None = None
    commit: str | None = None
    last: Figures | None = None
    best: Figures | None = None
    stopped_by: str | None = None

    @property
    def finished(self) -> bool:
        return self.status == "finished"


@dataclass(frozen=True)
class RunFolder:
    """The paths of a run's files."""

    path: Path

    @property
    def recipe_file(self) -> Path:
        """The whole recipe: enough to train it again."""
        return self.path / "recipe.toml"

    @property
    def facts_file(self) -> Path:
        return self.path / "run.json"

    @property
    def metrics(self) -> Path:
        """One row for each epoch."""
        return self.path / "metrics.csv"

    @property
    def curves(self) -> Path:
        return self.path / "curves.png"

    @property
    def learner(self) -> Path:
        """The Learner, for `fastai.learner.load_learner`."""
        return self.path / "learner.pkl"

    @property
    def weights(self) -> Path:
        """The model, in a file that runs no code."""
        return self.path / "model.safetensors"

    @property
    def predictions(self) -> Path:
        return self.path / "predictions.npz"

    @property
    def checkpoints(self) -> Path:
        """A folder; it is removed once the run has finished."""
        return self.path / "checkpoint"

    @property
    def profile(self) -> Path:
        return self.path / "profile"

    def partial_files(self) -> list[Path]:
        """What a killed process has left half written of this run's files."""
        own = (self.recipe_file, self.facts_file, self.metrics, self.learner, self.weights, self.predictions)
        found = [left for file in own for left in partials(self.path, file.name)]
        return [*found, *partials(self.checkpoints, "*-*-*.pt")]

    @property
    def begun(self) -> bool:
        """Whether it holds a run with an epoch or a checkpoint to lose."""
        if not self.facts_file.is_file():
            return False
        return self.facts().epochs_done > 0 or any(self.checkpoints.glob("*.pt"))

    @property
    def finished(self) -> bool:
        """Whether it holds a finished run with its weights."""
        try:
            return self.weights.is_file() and self.facts().finished
        except UserError:
            return False

    def recipe(self) -> Recipe:
        """The run's recipe. Keys that an older file does not have get the defaults that the run was trained with.

        Raises:
            UserError: The file is missing or damaged.
        """
        return load_recipe(self.recipe_file)

    def facts(self) -> Facts:
        """What run.json says.

        Raises:
            UserError: There is none, or it is damaged.
        """
        try:
            told = json.loads(self.facts_file.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise UserError(f"{self.path} holds no run: it has no {self.facts_file.name}") from None
        except (OSError, ValueError) as error:
            raise UserError(f"{self.facts_file} is damaged: {error}") from None
        if not isinstance(told, dict):
            raise UserError(f"{self.facts_file} is damaged: it is no table of facts")
        facts = _read(Facts, modern_facts(told), self.facts_file)
        for part in ("last", "best"):
            if getattr(facts, part) is None and (facts.finished or facts.epochs_done):
                raise UserError(f"{self.facts_file} is damaged: {part!r} is None")
        return facts

    def write_facts(self, facts: Facts) -> None:
        """Write run.json, whole or not at all."""
        told = {key: value for key, value in dataclasses.asdict(facts).items() if value is not None}
        told.pop("stopped_by", None)
        with whole(self.facts_file) as partial:
            partial.write_text(json.dumps(told, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

    def rows(self) -> list[Row]:
        """The epochs: the rows of metrics.csv as numbers.

        Raises:
            UserError: The file is missing or damaged.
        """
        try:
            with self.metrics.open(newline="", encoding="utf-8") as opened:
                rows = [{key: float(value) for key, value in row.items() if value} for row in csv.DictReader(opened)]
        except FileNotFoundError:
            raise UserError(f"{self.metrics} is missing") from None
        except (OSError, ValueError, TypeError, AttributeError, csv.Error) as error:
            raise UserError(f"{self.metrics} is damaged: {error}") from None
        needed = [f.name for f in dataclasses.fields(Figures)]
        if any(key not in row for row in rows for key in needed):
            raise UserError(f"{self.metrics} is damaged: a row lacks one of {', '.join(needed)}")
        return rows


@dataclass(frozen=True)
class Run:
    """A run's folder, and its run.json as it was when it was read."""

    folder: RunFolder
    facts: Facts

    @classmethod
    def read(cls, path: Path) -> "Run":
        """The run in a folder.

        Raises:
            UserError: There is none, or its run.json is damaged.
        """
        folder = RunFolder(path)
        return cls(folder, folder.facts())

    @property
    def finished(self) -> bool:
        return self.facts.finished

    @property
    def state(self) -> str:
        """How far the run has come, in words."""
        facts = self.facts
        return "" if self.finished else f"{facts.status}, epoch {facts.epochs_done}/{facts.epochs}"


@dataclass(frozen=True)
class Problem:
    """Something of a run that is missing or cannot be read."""

    folder: Path
    what: str


def find_runs(folders: Iterable[Path]) -> tuple[list[Run], list[Problem]]:
    """Every run in or below the folders, in the order in which they were begun, and what cannot be read.

    Raises:
        UserError: A folder does not exist, or none of them holds a run.
    """
    folders = list(folders)
    for folder in folders:
        if not folder.is_dir():
            raise UserError(f"no such folder: {folder}")
    names = (RunFolder(Path()).metrics.name, RunFolder(Path()).facts_file.name)
    found = {f.resolve().parent: f.parent for d in folders for name in names for f in sorted(d.rglob(name))}
    if not found:
        raise UserError(f"no runs in {', '.join(map(str, folders))}; `dms-fastai run kd` makes one")
    runs, problems = [], []
    for folder in found.values():
        try:
            runs.append(Run.read(folder))
        except UserError as error:
            problems.append(Problem(folder, error.message))
    return sorted(runs, key=lambda run: run.facts.started), problems


def _read(cls: type, told: Mapping[str, Any], file: Path) -> Any:
    """The dataclass with a table's values; keys that it does not have are left out."""
    hints, values = typing.get_type_hints(cls), {}
    for f in dataclasses.fields(cls):
        value = told.get(f.name)
        needed = f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
        if value is None and not needed:
            continue
        if f.type is float and isinstance(value, float):  # a loss that has been NaN, too
            values[f.name] = value
            continue
        if hints[f.name] == Figures | None and isinstance(value, Mapping):
            values[f.name] = _read(Figures, value, file)
            continue
        try:
            values[f.name] = convert(value, hints[f.name], f.name)
        except UserError:
            raise UserError(f"{file} is damaged: {f.name!r} is {value!r}") from None
    return cls(**values)
