"""A run's folder: the names of its files, and their contents."""

import csv
import dataclasses
import io
import json
import math
import reprlib
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from .errors import UserError, notice
from .files import FACTS, RECIPE, partials, whole
from .legacy import modern_facts
from .names import DATA_SETS, source_name, source_place
from .recipes import Recipe, load_recipe
from .settings import Rule, Share, convert

__all__ = ["EXPORTED", "SEARCH", "Compute", "Facts", "Figures", "Problem", "Run", "RunFolder", "find_runs", "own_data"]

EXPORTED = (".onnx", ".int8.onnx")  # by `edge`
SEARCH = "trials.log"  # beside the numbered folders of a search's trials

Row = dict[str, float]

MOST = 2**53  # no number of a run is larger
Number = Annotated[int, Rule(lambda v: 0 <= v <= MOST, "0 or more")]
Several = Annotated[int, Rule(lambda v: 1 <= v <= MOST, "at least 1")]
Seconds = Annotated[float, Rule(lambda v: 0 <= v <= MOST, "0 or more")]
Amount = Annotated[float, Rule(lambda v: 0 <= v <= MOST, "0 or more")]
Loss = Annotated[float, Rule(lambda v: abs(v) < 3.5e38, "a float32")]


@dataclass(frozen=True)
class Figures:
    """The results of an epoch. A loss may be NaN or infinite. Training accuracy is None if no image has a label."""

    epoch: Number
    train_loss: float
    valid_loss: float
    valid_accuracy: Share
    train_accuracy: Share | None = None


@dataclass(frozen=True)
class Compute:
    """The work of a training so far, in PFLOP; a multiply-accumulate is two.

    Attributes:
        student: Forward and backward passes of the network that is trained.
        teacher: Forward passes of its teacher.
        total: Both.
    """

    student: Amount
    teacher: Amount
    total: Amount


@dataclass(frozen=True)
class Facts:
    """The contents of a run's run.json.

    Attributes:
        status: "running", "interrupted" or "finished".
        recipe, title, model, seed, epochs: The recipe's name and title, and the model, seed and epochs that it was run
            with.
        parameters: Number of parameters of the model.
        macs: Its multiply-accumulates for one image.
        train_pflop: The work of its training so far.
        data, valid: The data set, and which split of it is validated on.
        place: What tells the data set from others of its name, as `source_place` gives it.
        begun_from: The weights that it began from: timm:NAME.TAG, a run's folder or a file; None: fresh ones.
        begun_digest: A hash of their file, if they are in one.
        mixup: Whether training accuracy is measured on mixed images.
        teacher, teacher_digest: The teacher, and a hash of its weights.
        training_images, unlabelled_images: Training images with and without a label.
        agreement: Whether what is called accuracy here is agreement: the share of images to which the network gives the
            same class as its teacher, for want of labels.
        data_digest: Hashes of the training and the validation images, and of those without labels, if there are any.
        device, threads, processes, versions, python, commit: What it ran on, and which code. `processes` is None where
            there was one.
        started, seconds: When it began, and how long it has trained so far.
        epochs_done, last, best: How far it has come. The last epoch is the result; the best one was chosen on the
            images that it is measured on.
        stopped_by: Why it was stopped, if it was; not written to the file.
    """

    status: Literal["running", "interrupted", "finished"]
    recipe: str
    title: str
    model: str
    parameters: Several
    data: str
    valid: str
    validation_images: Several
    seed: Number
    epochs: Number
    started: str
    epochs_done: Number
    seconds: Seconds
    training_images: Number | None = None
    unlabelled_images: Number | None = None
    agreement: bool = False
    classes: Number | None = None
    size: Number | None = None
    begun_from: str | None = None
    begun_digest: str | None = None
    mixup: bool = False
    teacher: str | None = None
    teacher_digest: str | None = None
    data_digest: list[str] | None = None
    macs: Number | None = None
    train_pflop: Compute | None = None
    place: str | None = None
    device: str | None = None
    threads: Number | None = None
    processes: Several | None = None
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
    def runs_inside(self) -> list[Path]:
        """Folders of finished runs in this one, if it is not itself one, but a recipe's or a data set's."""
        found = (file.parent for depth in (1, 2, 3) for file in self.path.glob("*/" * depth + self.weights.name))
        return sorted(found, key=lambda folder: (len(folder.parts), folder))

    @property
    def recipe_file(self) -> Path:
        """The whole recipe: enough to train it again."""
        return self.path / RECIPE

    @property
    def facts_file(self) -> Path:
        return self.path / FACTS

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
    def best(self) -> Path:
        """The model after its best epoch, if the run keeps it."""
        return self.path / "best.safetensors"

    @property
    def predictions(self) -> Path:
        return self.path / "predictions.npz"

    @property
    def checkpoints(self) -> Path:
        """A folder; it is removed once the run has finished."""
        return self.path / "checkpoint"

    @property
    def replaced(self) -> Path:
        """A folder with the finished run that was here before; it is removed once the new one has finished."""
        return self.path / "replaced"

    @property
    def profile(self) -> Path:
        return self.path / "profile"

    @property
    def tensorboard(self) -> Path:
        """A folder of TensorBoard's, if the run writes one."""
        return self.path / "tensorboard"

    @property
    def figures(self) -> Path:
        """What `edge` has measured, in the folder of its last run."""
        return self.path / "edge.json"

    def exported(self, ending: str) -> Path:
        """The file in a format that `edge` exports the model to."""
        return self.path / f"{self.path.parent.name}{ending}"

    def own_files(self) -> list[Path]:
        """The files and folders that a run leaves, with those that `edge` adds, as far as they are there."""
        named = [self.recipe_file, self.facts_file, self.metrics, self.curves, self.learner, self.weights, self.best]
        named += [self.predictions, self.checkpoints, self.profile, self.tensorboard, self.figures]
        return [path for path in (*named, *map(self.exported, EXPORTED)) if path.exists()]

    def partial_files(self) -> list[Path]:
        """What a killed process has left half written of this run's files."""
        own = (self.recipe_file, self.facts_file, self.metrics, self.learner)
        own += (self.weights, self.best, self.predictions)
        found = [left for file in own for left in partials(self.path, file.name)]
        return [*found, *partials(self.checkpoints, "*-*-*.pt")]

    @property
    def begun(self) -> bool:
        """Whether it holds a run with an epoch or a checkpoint to lose."""
        if not self.facts_file.is_file():
            return False
        return self.facts().epochs_done > 0 or any(self.checkpoints.glob("*.pt"))

    @property
    def lost(self) -> Path | None:
        """Weights or a checkpoint that are there without a run.json; None if there are none."""
        found = (self.weights, *self.checkpoints.glob("*.pt"))
        return None if self.facts_file.is_file() else next((path for path in found if path.is_file()), None)

    @property
    def missing(self) -> list[Path]:
        """What a finished run has lost, and can be made of its weights and epochs."""
        of_epochs = [self.curves] if self.metrics.is_file() else []
        return [path for path in (self.learner, self.predictions, *of_epochs) if not path.is_file()]

    @property
    def finished(self) -> bool:
        """Whether it holds a finished run with its weights."""
        try:
            return self.weights.is_file() and self.facts().finished
        except UserError:
            return False

    def trained_on(self, data: str | Path) -> bool:
        """Whether the run's data are `data`: they have the same name and place, as far as the run has noted one."""
        facts = self.facts()
        return facts.data == source_name(data) and facts.place in (None, source_place(data))

    def recipe(self) -> Recipe:
        """The run's recipe. Keys that an older file does not have get the defaults that the run was trained with.

        Raises:
            UserError: The file is missing or damaged.
        """
        try:
            return load_recipe(self.recipe_file)
        except UserError as error:
            if str(self.recipe_file) in error.message:
                raise
            raise UserError(f"{self.recipe_file}: {error.message}") from None
        except (OSError, RecursionError) as error:
            raise UserError(f"{self.recipe_file} is damaged: {error}") from None

    def facts(self) -> Facts:
        """What run.json says.

        Raises:
            UserError: There is none, or it is damaged.
        """
        if not self.facts_file.is_file():
            raise UserError(f"{self.path} holds no run: it has no {self.facts_file.name}")
        try:
            told = json.loads(self.facts_file.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
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
        text = json.dumps(told, indent=2, ensure_ascii=False) + "\n"
        with whole(self.facts_file) as partial:  # a name that is not UTF-8 gets JSON's escapes, which are Python's, too
            partial.write_text(text, encoding="utf-8", errors="backslashreplace")

    def rows(self) -> list[Row]:
        """The epochs: the rows of metrics.csv as numbers.

        Raises:
            UserError: The file is missing or damaged.
        """
        if not self.metrics.is_file():
            raise UserError(f"{self.metrics} is missing")
        try:
            rows = _numbers(self.metrics.read_bytes().decode())
        except (OSError, ValueError, csv.Error) as error:
            raise UserError(f"{self.metrics} is damaged: {error}") from None
        for epoch, row in enumerate(rows, start=1):
            if row.get("epoch") != epoch:
                raise UserError(f"{self.metrics} is damaged: its row {epoch} is not that of epoch {epoch}")
            _read(Figures, row | {"epoch": epoch}, self.metrics)
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

    The trials of a search are left out, with a notice, of a folder that holds other runs, too.

    Raises:
        UserError: A folder does not exist, or none of them holds a run.
    """
    folders = list(folders)
    for folder in folders:
        if not folder.is_dir():
            raise UserError(f"no such folder: {folder}")
    found = {path: folder for d in folders for path, folder in _without_trials(_run_folders(d)).items()}
    if not found:
        raise UserError(f"no runs in {', '.join(map(str, folders))}; `dms-fastai run kd` makes one")
    runs, problems = [], []
    for folder in found.values():
        try:
            runs.append(Run.read(folder))
        except UserError as error:
            problems.append(Problem(folder, error.message))
    return sorted(runs, key=lambda run: run.facts.started), problems


def _run_folders(folder: Path) -> dict[Path, Path]:
    """The folders of runs in a folder, by their resolved paths; none of a run that another one has replaced."""
    names, aside = (RunFolder(Path()).metrics.name, RunFolder(Path()).facts_file.name), RunFolder(Path()).replaced.name
    found = {f.resolve().parent: f.parent for name in names for f in sorted(folder.rglob(name))}
    return {path: each for path, each in found.items() if path.name != aside}


def _without_trials(found: Mapping[Path, Path]) -> Mapping[Path, Path]:
    """The folders of runs without the trials of searches among them, which a notice names; all, if nothing is left."""
    searches = {path: _search_of(folder) for path, folder in found.items()}
    left = {path: folder for path, folder in found.items() if searches[path] is None}
    if not left or len(left) == len(found):
        return found
    for search in dict.fromkeys(search for search in searches.values() if search is not None):
        trials = sum(other == search for other in searches.values())
        notice(f"{trials} trial{'s' * (trials > 1)} of a search left out; to show them: dms-fastai report {search}")
    return left


def _search_of(folder: Path) -> Path | None:
    """The folder of the search whose trial a run is, as far as its path names it; None if it is none."""
    above = zip(folder.parents, [folder, *folder.parents], strict=False)
    return next((search for search, trial in above if trial.name.isdigit() and (search / SEARCH).is_file()), None)


def own_data(source: Path, purpose: str) -> str:
    """The data set that a run was trained on, if it is one with a name.

    Args:
        source: The run's folder, or a file in it.
        purpose: What the images are for, for the error.

    Raises:
        UserError: There is no run, or its images have no name by which they are found.
    """
    folder = RunFolder(source if source.is_dir() else source.parent)
    facts = folder.facts() if source.exists() and folder.facts_file.is_file() else None
    if facts is None or facts.data not in DATA_SETS or facts.place is not None:  # a folder may be called as they are
        why = f"{source} does not say which" if facts is None else f"where {facts.data} lies is not known"
        raise UserError(f"no images to {purpose}: {why}; give --data a data set, a folder or a file")
    return facts.data


def _numbers(text: str) -> list[Row]:
    """The rows of a .csv of numbers; empty cells are left out."""
    if not text.endswith("\n"):
        raise ValueError("it has been cut short")
    names, *lines = csv.reader(io.StringIO(text, newline=""))
    return [{name: float(value) for name, value in zip(names, line, strict=True) if value} for line in lines if line]


def _read(cls: type, told: Mapping[str, Any], file: Path) -> Any:
    """The dataclass with a table's values; keys that it does not have are left out."""
    hints, values = typing.get_type_hints(cls, include_extras=True), {}
    for f in dataclasses.fields(cls):
        value = told.get(f.name)
        needed = f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
        if value is None and not needed:
            continue
        nested = next((kind for kind in (Figures, Compute) if hints[f.name] == kind | None), None)
        if nested is not None and isinstance(value, Mapping):
            values[f.name] = _read(nested, value, file)
            continue
        try:
            values[f.name] = _loss(value) if hints[f.name] is float else convert(value, hints[f.name], f.name)
            for part in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
                convert(part, str, f.name)
        except UserError:
            raise UserError(f"{file} is damaged: {f.name!r} is {reprlib.repr(value)}") from None
    return cls(**values)


def _loss(value: Any) -> float:
    """A loss, which may have been NaN or infinite."""
    if not isinstance(value, float) or math.isfinite(value):
        value = convert(value, Loss, "loss")
    return value
