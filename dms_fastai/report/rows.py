"""The rows of the table of results, each for runs that differ only in their seed, and the ablation that they form."""

import json
import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import count
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..names import DATA_SETS, TIMM
from ..recipes import ALONE, ablation_of, defaults_of, flat, recipe_names
from ..run_folder import Facts, Problem, Run
from ..runs.lock import held
from ..runs.predictions import Predictions, read_predictions
from ..terminal import printable
from ..training.parts import PARTS
from .statistics import Estimate, binomial, over_seeds, paired_images

__all__ = ["Difference", "Row", "Section", "sections"]

IMAGENET = re.compile(r"(^|_)in\d+k(_|$)")  # in the tags of timm's weights: a1_in1k, in12k_ft_in1k_384
SEEDS = re.compile(r"seed\d+$")  # ends the folder of a teacher that each seed has of its own
ORDER = ("baseline", "se", "mixup", "teacher", "kd")  # of the paper's ablation; a teacher before its student
OPTIONAL = {part.table for part in PARTS if not part.always}
SPEED = ("compile", "data.where")  # settings of how fast a run trains, and not of what it learns


@dataclass(frozen=True)
class Row:
    """One recipe on one data set, with one seed or several. Its title, label and model are printable.

    Attributes:
        runs: The runs, ordered by seed.
        note: What tells the row from another row with the same title: a footnote.
        mark: The number of this footnote.
    """

    runs: list[Run]
    note: str = ""
    mark: int | None = None

    @property
    def title(self) -> str:
        return printable(self.first.title)

    @property
    def model(self) -> str:
        return printable(self.first.model)

    @property
    def label(self) -> str:
        return self.title if self.mark is None else f"{self.title} ({self.mark})"

    @property
    def first(self) -> Facts:
        return self.runs[0].facts

    @property
    def measured(self) -> list[Run]:
        """The runs that count: those that have come the furthest, by one epoch at least."""
        begun = [run for run in self.runs if run.facts.last]
        return [run for run in begun if _come(run) == max(map(_come, begun))]

    @property
    def seconds(self) -> float:
        """The time that the training took, a mean over the runs that count."""
        runs = self.measured or self.runs
        return sum(run.facts.seconds for run in runs) / len(runs)

    @property
    def train_pflop(self) -> float | None:
        """The work of the training and its teacher, a mean over the runs that count; None where it is not known."""
        found = [run.facts.train_pflop for run in self.measured or self.runs]
        return sum(work.total for work in found) / len(found) if all(found) else None

    @property
    def seeds(self) -> list[int]:
        return [run.facts.seed for run in self.runs]

    def mean(self, part: str, key: str) -> float | None:
        """The mean over the seeds of a figure of their "last" or "best" epochs."""
        values = [getattr(getattr(run.facts, part), key) for run in self.measured]
        return sum(values) / len(values) if values and None not in values else None

    @cached_property
    def accuracy(self) -> Estimate | None:
        """The headline: the accuracy of the last epoch on the validation images."""
        values = [run.facts.last.valid_accuracy for run in self.measured]
        if not values:
            return None
        return over_seeds(values) if len(values) > 1 else binomial(values[0], self.first.validation_images)

    @cached_property
    def recipe(self) -> dict[str, Any]:
        """The first run's recipe by dotted key."""
        return _recipe(self.runs[0])

    @cached_property
    def epochs(self) -> tuple[list[list[dict[str, float]]], list[Problem]]:
        """The rows of each run's metrics.csv, and the problems of files that cannot be read."""
        return _each(self.measured, _epochs)

    @cached_property
    def predictions(self) -> tuple[list[Predictions], list[Problem]]:
        """The finished runs' predictions, all in the same classes, and the problems of files that cannot be read.

        There are none without labels to compare them with.
        """
        vocab: list[str] = []

        def read(run: Run) -> Predictions:
            found = _predictions(run)
            if vocab and found.vocab.tolist() != vocab:
                raise UserError(f"{run.folder.predictions} has other classes than another seed's")
            vocab[:] = found.vocab.tolist()
            return found

        return _each([run for run in self.runs if run.finished and not run.facts.agreement], read)


@dataclass(frozen=True)
class Difference:
    """A row's accuracy in the last epoch, minus that of the row that it builds on, over the seeds of both."""

    row: Row
    base: Row
    estimate: Estimate | None


@dataclass(frozen=True)
class Section:
    """All rows of a data set. Runs whose validation images have no labels are in a section of their own.

    Attributes:
        data: Its name, printable.
        rows: In the order of the ablation.
        shipped: They came with the package, and stand behind the user's own.
    """

    data: str
    rows: list[Row]
    shipped: bool = False

    def worded(self, text: str) -> str:
        """A text about accuracy, as one about agreement where that is what was measured."""
        if not self.rows[0].first.agreement:
            return text
        return text.replace("accuracy", "agreement").replace("Accuracy", "Agreement")

    @property
    def headline(self) -> Row:
        """The row whose images are worth a closer look: the last one with predictions, or the last one.

        A student without its teacher, which another is compared with, is it only if there is none else.
        """
        found = [row for row in self.rows if row.predictions[0]] or self.rows
        return next((row for row in reversed(found) if not row.first.recipe.endswith(ALONE)), found[-1])

    @cached_property
    def differences(self) -> list[Difference]:
        """The difference of every row that builds on another one."""
        pairs = [(row, self._base(row)) for row in self.rows]
        return [Difference(row, base, difference(row, base)) for row, base in pairs if base is not None]

    def _base(self, row: Row) -> Row | None:
        """The row of the nearest recipe that this row's recipe extends, with the same network, images and epochs.

        Nearest is the same recipe without its teacher. Of several such rows, it is the one whose recipe differs least.
        A teacher has none: it is another network, and no step of the ablation.
        """
        name = row.first.recipe
        step = name in recipe_names() and "teacher" not in name.split("/")
        chain = ablation_of(name)[: None if row.first.teacher else -1] if step else []
        for earlier in reversed(chain):
            named = (earlier, f"{earlier}{ALONE}") if earlier == name else (earlier,)
            steps = [other for other in self.rows if other.first.recipe in named and _comparable(other, row)]
            if earlier == name:
                steps = [other for other in steps if other.first.teacher is None]
            if steps:
                return min(steps, key=lambda other: _distance(other, row))
        return None

    @property
    def problems(self) -> list[Problem]:
        unfinished = [run for row in self.rows for run in row.runs if not run.finished]
        return [*self.damages, *(Problem(run.folder.path, run.state) for run in unfinished)]

    @cached_property
    def damages(self) -> list[Problem]:
        """Files of the runs that are missing or damaged, whose plots and intervals are left out."""
        found = [problem for row in self.rows for problem in (*row.epochs[1], *row.predictions[1])]
        return found + _each([run for row in self.rows for run in row.runs], lambda run: run.folder.recipe())[1]


def sections(runs: Iterable[Run], shipped: Collection[Path] = ()) -> list[Section]:
    """The runs, grouped by data set and then by recipe; the data set with the newest run comes first.

    Args:
        runs: The runs.
        shipped: Folders whose runs come last, in sections of their own, unless there are no others.
    """
    own, theirs = [], []
    for run in runs:
        (theirs if run.folder.path.resolve() in shipped else own).append(run)
    if not own:
        return _by_data(theirs)
    return [*_by_data(own), *(replace(section, shipped=True) for section in _by_data(theirs))]


def _by_data(runs: Iterable[Run]) -> list[Section]:
    by_data: dict[tuple[str, str | None, bool], dict[str, list[Run]]] = {}
    runs = sorted(map(_as_it_is, runs), key=lambda run: run.facts.started, reverse=True)
    for run in runs:
        by_data.setdefault((*_data(run, runs), run.facts.agreement), {}).setdefault(_kind(run), []).append(run)
    places = {(name, place) for name, place, _ in by_data}
    names, found = [name for name, _ in places], []
    for (name, place, agreement), groups in by_data.items():
        title = name if place is None or names.count(name) == 1 else f"{name} ({place})"
        title += ", agreement with the teacher" if agreement else ""
        rows = _rows(each for group in groups.values() for each in _apart(group))
        found.append(Section(printable(title), _noted(rows)))
    return found


def _data(run: Run, runs: Iterable[Run]) -> tuple[str, str | None]:
    """The data set of a run: its name, and its place. Earlier versions did not say which place it is."""
    name, place = run.facts.data, run.facts.place
    if place is None and name not in DATA_SETS:
        place = next((other.facts.place for other in runs if other.facts.data == name and other.facts.place), None)
    return name, place


def _as_it_is(run: Run) -> Run:
    """The run; one that says that it is running has been killed, if no process holds its folder."""
    if run.facts.status == "running" and not held(run.folder.path):
        return replace(run, facts=replace(run.facts, status="interrupted"))
    return run


def difference(row: Row, base: Row) -> Estimate | None:
    """The difference over shared seeds; with one, over the images that both have classified; None without any."""
    ours, theirs = ({run.facts.seed: run for run in r.measured} for r in (row, base))
    shared = sorted(ours.keys() & theirs.keys())
    if len(shared) > 1:
        return over_seeds([_last(ours[seed]) - _last(theirs[seed]) for seed in shared])
    if not shared:
        return None
    try:
        a, b = (_predictions(runs[shared[0]]) for runs in (ours, theirs))
    except UserError:
        a = b = None
    if a is None or len(a.labels) != len(b.labels) or (a.labels != b.labels).any():
        mean = _last(ours[shared[0]]) - _last(theirs[shared[0]])
        return Estimate(mean, mean, mean, 1, None, "images")
    return paired_images(a.right, b.right)


def _comparable(row: Row, other: Row) -> bool:
    """Whether two rows share network, images, planned epochs, and a seed that has come equally far in both."""
    if _network(row) != _network(other):
        return False
    keys = ("epochs", "valid", "validation_images", "data_digest")
    done = [{(run.facts.seed, _come(run)) for run in r.measured} for r in (row, other)]
    return bool(done[0] & done[1]) and all(getattr(row.first, key) == getattr(other.first, key) for key in keys)


def _distance(row: Row, other: Row) -> int:
    """In how many keys two rows' recipes differ."""
    ours, theirs = (r.recipe | {"model.name": _network(r)} for r in (row, other))
    return sum(ours.get(key) != theirs.get(key) for key in ours.keys() | theirs.keys())


def _network(row: Row) -> str:
    """The row's architecture; a plain one is the network that squeeze-and-excitation is added to."""
    return str(row.first.model).removesuffix("_plain")


def _come(run: Run) -> int:
    """How many of its epochs a run has come; a finished one all, even if it has stopped early."""
    return run.facts.epochs if run.finished else run.facts.epochs_done


def _last(run: Run) -> float:
    return run.facts.last.valid_accuracy


def _each(runs: list[Run], read: Any) -> tuple[list[Any], list[Problem]]:
    found, problems = [], []
    for run in runs:
        try:
            found.append(read(run))
        except UserError as error:
            problems.append(Problem(run.folder.path, error.message))
    return found, problems


def _epochs(run: Run) -> list[dict[str, float]]:
    rows, done = run.folder.rows(), run.facts.epochs_done
    if len(rows) < done:
        raise UserError(f"{run.folder.metrics} is damaged: it has {len(rows)} of {done} epochs")
    return rows


def _predictions(run: Run) -> Predictions:
    found, images = read_predictions(run.folder.predictions), run.facts.validation_images
    if len(found.labels) != images:
        raise UserError(f"{run.folder.predictions} is another run's: it has {len(found.labels)} of {images} images")
    return found


def _recipe(run: Run) -> dict[str, Any]:
    """The run's recipe by dotted key; if it cannot be read, the folder that it shares with other seeds.

    The recipe is loaded, so that keys that an older file does not have get the defaults that it was trained with. It
    is without the settings of `SPEED`.
    """
    try:
        found = flat(run.folder.recipe().to_table())
        return {key: value for key, value in found.items() if not any(_in(key, part) for part in SPEED)}
    except UserError:
        return {"folder": str(run.folder.path.parent)}


def _kind(run: Run) -> str:
    """What runs of the same row have in common: everything except seed and machine."""
    facts = run.facts
    teacher = SEEDS.sub("seed", str(facts.teacher))
    keys = ("recipe", "title", "model", "epochs", "valid", "validation_images", "data_digest")
    known = [getattr(facts, key) for key in keys]
    return json.dumps([*known, teacher, _recipe(run)], sort_keys=True, default=str)


def _apart(runs: list[Run]) -> Iterable[list[Run]]:
    """Runs of a kind, by the files of their teacher and of the weights that they began from, which may share a name.

    Those that have not noted them are with the others, unless these differ.
    """
    by_files: dict[tuple[str | None, str | None], list[Run]] = {}
    for run in runs:
        of_each_seed = SEEDS.search(str(run.facts.teacher))
        files = run.facts.begun_digest, None if of_each_seed else run.facts.teacher_digest
        by_files.setdefault(files, []).append(run)
    return by_files.values() if sum(any(files) for files in by_files) > 1 else [runs]


def _rows(groups: Iterable[list[Run]]) -> list[Row]:
    """One row for each group. If a seed was run twice, in different folders, one row for each of these folders.

    A copy of a run, in a folder with another name, does not count as another seed: it has its own row.
    """
    rows = []
    for runs in groups:
        if len({run.facts.seed for run in runs}) == len(runs):
            rows.append(runs)
            continue
        roots: dict[Any, list[Run]] = {}
        for run in runs:
            folder = run.folder.path
            own = folder.name == f"seed{run.facts.seed}"
            roots.setdefault(folder.parent if own else folder, []).append(run)
        rows += roots.values()
    found = [Row(sorted(runs, key=lambda run: run.facts.seed)) for runs in rows]
    return sorted(found, key=lambda row: (_place(row.first.recipe), min(r.facts.started for r in row.runs)))


def _place(recipe: str) -> int:
    name = recipe.rsplit("/", 1)[-1]
    return ORDER.index(name) if name in ORDER else len(ORDER)


def _noted(rows: list[Row]) -> list[Row]:
    """The rows, with notes that tell those of the same title apart: by model, then by recipe, then by folder."""
    noted, marks = [], count(1)
    for row in rows:
        same, notes = [other for other in rows if other is not row and other.title == row.title], _beginning(row)
        for tell in (_model, _images, _changes, _folder):
            differ = [other for other in same if tell(other, [row]) != tell(row, [other])]
            notes += tell(row, differ)
            same = [other for other in same if other not in differ]
        noted.append(Row(row.runs, ", ".join(notes), next(marks) if notes else None))
    return noted


def _beginning(row: Row) -> list[str]:
    """Which weights the row's runs began from, if not from fresh ones."""
    source = row.first.begun_from or row.recipe.get("model.weights")
    if source is None:
        return []
    network = printable(source).removeprefix(TIMM)
    if IMAGENET.search(network.partition(".")[2]) and source.startswith(TIMM):
        return [f"pretrained on ImageNet: {network}"]
    return [f"begun from {printable(source)}"]


def _model(row: Row, others: list[Row]) -> list[str]:
    return [row.model] if others else []


def _images(row: Row, others: list[Row]) -> list[str]:
    """What was trained on, if it is not what one of the others was trained on."""
    ours = row.first
    if ours.training_images is None or all(other.first.data_digest == ours.data_digest for other in others):
        return []
    without = f" and {ours.unlabelled_images:,} without labels" if ours.unlabelled_images else ""
    return [f"{ours.training_images:,} training images of {ours.classes} classes{without}"]


def _changes(row: Row, others: list[Row]) -> list[str]:
    """The row's teacher, and the values in its recipe, that differ from those of one of the others.

    How a teacher's answers are used is no difference to a row that has no teacher. Of a part that another row does not
    have, there is its name, and what is not as usual in it.
    """
    ours, teacher = row.recipe, row.first.teacher
    found = []
    for key in (key for key in ours if key != "teacher"):
        table = key.partition(".")[0]
        compared = [other.recipe for other in others if other.first.teacher or table != "distill"]
        without = [recipe for recipe in compared if table in OPTIONAL and not any(_in(k, table) for k in recipe)]
        alike = [recipe for recipe in compared if recipe not in without]
        if without:
            found.append(table)
            alike.append(defaults_of(table))
        if key != table and any(ours[key] != recipe.get(key) for recipe in alike):
            found.append(_said(key, ours[key]))
    said = list(dict.fromkeys(found))
    taught = any(other.first.teacher != teacher for other in others)
    return [f"taught by {printable(teacher)}" if teacher else "without a teacher", *said] if taught else said


def _in(key: str, part: str) -> bool:
    """Whether a dotted key is `part` or in it."""
    return key == part or key.startswith(f"{part}.")


def _said(key: str, value: Any) -> str:
    """A setting in a few words: drop_rate 0.1, schedule one-cycle, bf16."""
    name = "recipe" if key == "name" else key.removesuffix(".name").rsplit(".", 1)[-1]
    return printable(name if value is True and "." not in key else f"{name} {value}")


def _folder(row: Row, others: list[Row]) -> list[str]:
    ours, *theirs = (r.runs[0].folder.path for r in (row, *others))
    return list(dict.fromkeys(printable(ours if ours.parent == folder.parent else ours.parent) for folder in theirs))
