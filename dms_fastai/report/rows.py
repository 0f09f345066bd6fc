"""Runs that differ in their seed alone, as one row of a table, and the rows as the ablation that they are."""

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from ..errors import UserError
from ..recipes import ablation_of, flat, load_recipe, recipe_names
from .folders import Problem, Run, read_rows
from .predictions import Predictions, read_predictions
from .statistics import Estimate, binomial, over_seeds, paired_pictures

__all__ = ["Difference", "Row", "Section", "sections"]

RECIPE = "recipe.toml"
ORDER = ("baseline", "se", "mixup", "teacher", "kd")  # of the paper's ablation; a teacher before its student


@dataclass(frozen=True)
class Row:
    """One recipe on one data set, with one seed or several.

    Attributes:
        runs: By seed.
        note: What tells it from another row of the same title.
    """

    runs: list[Run]
    note: str = ""

    @property
    def title(self) -> str:
        return self.first["title"]

    @property
    def label(self) -> str:
        return f"{self.title} ({self.note})" if self.note else self.title

    @property
    def first(self) -> Mapping[str, Any]:
        return self.runs[0].facts

    @property
    def measured(self) -> list[Run]:
        """The runs that count: of those with at least an epoch, those that have come furthest."""
        begun = [run for run in self.runs if run.facts.get("last")]
        return [run for run in begun if run.facts["epochs_done"] == max(r.facts["epochs_done"] for r in begun)]

    @property
    def seeds(self) -> list[int]:
        return [run.facts["seed"] for run in self.runs]

    def mean(self, part: str, key: str) -> float | None:
        """Of "last" or "best" epochs' figures over the seeds."""
        values = [run.facts[part][key] for run in self.measured]
        return sum(values) / len(values) if values else None

    @cached_property
    def accuracy(self) -> Estimate | None:
        """Of the last epoch on the validation pictures: the headline."""
        values = [run.facts["last"]["valid_accuracy"] for run in self.measured]
        if not values:
            return None
        return over_seeds(values) if len(values) > 1 else binomial(values[0], self.first["validation_pictures"])

    @cached_property
    def epochs(self) -> tuple[list[list[dict[str, float]]], list[Problem]]:
        """The rows of each run's metrics.csv, and what cannot be read of them."""
        return _each(self.measured, read_rows)

    @cached_property
    def predictions(self) -> tuple[list[Predictions], list[Problem]]:
        """Of the finished runs, and what cannot be read of them."""
        return _each([run for run in self.runs if run.finished], read_predictions)


@dataclass(frozen=True)
class Difference:
    """A row's last-epoch accuracy less that of the row that it builds on, over the seeds that both have."""

    row: Row
    base: Row
    estimate: Estimate | None


@dataclass(frozen=True)
class Section:
    """All rows of a data set."""

    data: str
    rows: list[Row]

    @property
    def headline(self) -> Row:
        """The row whose pictures are worth a closer look: the last one with predictions, or the last one."""
        return next((row for row in reversed(self.rows) if row.predictions[0]), self.rows[-1])

    @cached_property
    def differences(self) -> list[Difference]:
        """Of every row that builds on another."""
        pairs = [(row, self._base(row)) for row in self.rows]
        return [Difference(row, base, difference(row, base)) for row, base in pairs if base is not None]

    def _base(self, row: Row) -> Row | None:
        """The nearest recipe that the row's extends, run with the same network on the same pictures for as many epochs.

        Where there are several rows of it, the one that differs least. A teacher is another network, and no step of the
        ablation.
        """
        name = row.first["recipe"]
        step = name in recipe_names() and not name.endswith("teacher")
        chain = ablation_of(name)[:-1] if step else []
        for earlier in reversed(chain):
            steps = [other for other in self.rows if other.first["recipe"] == earlier and _comparable(other, row)]
            if steps:
                return min(steps, key=lambda other: _distance(other, row))
        return None

    @property
    def problems(self) -> list[Problem]:
        found = [problem for row in self.rows for problem in (*row.epochs[1], *row.predictions[1])]
        return [*found, *(Problem(run.folder, run.state) for row in self.rows for run in row.runs if not run.finished)]


def sections(runs: Iterable[Run]) -> list[Section]:
    """The runs by data set, and in it by recipe."""
    by_data: dict[str, dict[str, list[Run]]] = {}
    for run in runs:
        by_data.setdefault(run.facts["data"], {}).setdefault(_kind(run), []).append(run)
    return [Section(data, _noted(_rows(groups.values()))) for data, groups in sorted(by_data.items())]


def difference(row: Row, base: Row) -> Estimate | None:
    """Over shared seeds; with one, over the pictures that both have classified; None where neither can be had."""
    ours, theirs = ({run.facts["seed"]: run for run in r.measured} for r in (row, base))
    shared = sorted(ours.keys() & theirs.keys())
    if len(shared) > 1:
        return over_seeds([_last(ours[seed]) - _last(theirs[seed]) for seed in shared])
    if not shared:
        return None
    try:
        a, b = (read_predictions(runs[shared[0]].folder) for runs in (ours, theirs))
    except UserError:
        a = b = None
    if a is None or len(a.labels) != len(b.labels) or (a.labels != b.labels).any():
        mean = _last(ours[shared[0]]) - _last(theirs[shared[0]])
        return Estimate(mean, mean, mean, 1, None, "pictures")
    return paired_pictures(a.right, b.right)


def _comparable(row: Row, other: Row) -> bool:
    """Whether two rows share network, pictures, epochs, both as planned and as far as they have come, and a seed."""
    if _network(row) != _network(other):
        return False
    keys = ("epochs", "valid", "validation_pictures", "data_digest")
    done = [{(run.facts["seed"], run.facts["epochs_done"]) for run in r.measured} for r in (row, other)]
    return bool(done[0] & done[1]) and all(row.first.get(key) == other.first.get(key) for key in keys)


def _distance(row: Row, other: Row) -> int:
    """In how many keys two rows' recipes differ."""
    ours, theirs = (_recipe(r.runs[0]) | {"model.name": _network(r)} for r in (row, other))
    return sum(ours.get(key) != theirs.get(key) for key in ours.keys() | theirs.keys())


def _network(row: Row) -> str:
    """The row's architecture; a plain one is the network that squeeze-and-excitation is added to."""
    return str(row.first["model"]).removesuffix("_plain")


def _last(run: Run) -> float:
    return run.facts["last"]["valid_accuracy"]


def _each(runs: list[Run], read: Any) -> tuple[list[Any], list[Problem]]:
    found, problems = [], []
    for run in runs:
        try:
            found.append(read(run.folder))
        except UserError as error:
            problems.append(Problem(run.folder, error.message))
    return found, problems


def _recipe(run: Run) -> dict[str, Any]:
    """The run's recipe, flat; where it cannot be read, its folder, which other seeds share.

    Loaded, so that what an older file does not say yet has the default that it was trained with.
    """
    try:
        return flat(load_recipe(run.folder / RECIPE).to_table())
    except UserError:
        return {"folder": str(run.folder.parent)}


def _kind(run: Run) -> str:
    """What runs of the same row have in common: all but seed and machine."""
    facts = run.facts
    teacher = re.sub(r"seed\d+$", "seed", str(facts.get("teacher")))
    keys = ("recipe", "title", "model", "epochs", "valid", "validation_pictures", "data_digest")
    known = [facts.get(key) for key in keys]
    return json.dumps([*known, teacher, _recipe(run)], sort_keys=True, default=str)


def _rows(groups: Iterable[list[Run]]) -> list[Row]:
    """A row a group; where a seed was run twice, in different folders, a row for each of these.

    A copy of a run, in a folder of another name, is another seed of nothing and has a row of its own.
    """
    rows = []
    for runs in groups:
        if len({run.facts["seed"] for run in runs}) == len(runs):
            rows.append(runs)
            continue
        roots: dict[Any, list[Run]] = {}
        for run in runs:
            own = run.folder.name == f"seed{run.facts['seed']}"
            roots.setdefault(run.folder.parent if own else run.folder, []).append(run)
        rows += roots.values()
    found = [Row(sorted(runs, key=lambda run: run.facts["seed"])) for runs in rows]
    return sorted(found, key=lambda row: (_place(row.first["recipe"]), min(r.facts["started"] for r in row.runs)))


def _place(recipe: str) -> int:
    name = recipe.rsplit("/", 1)[-1]
    return ORDER.index(name) if name in ORDER else len(ORDER)


def _noted(rows: list[Row]) -> list[Row]:
    """The rows, those of the same title told apart by model, then by what their recipes differ in, then by folder."""
    noted = []
    for row in rows:
        same, notes = [other for other in rows if other is not row and other.title == row.title], []
        for tell in (_model, _changes, _folder):
            differ = [other for other in same if tell(other, [row]) != tell(row, [other])]
            notes += tell(row, differ)
            same = [other for other in same if other not in differ]
        noted.append(Row(row.runs, ", ".join(notes)))
    return noted


def _model(row: Row, others: list[Row]) -> list[str]:
    return [row.first["model"]] if others else []


def _changes(row: Row, others: list[Row]) -> list[str]:
    """Where the row's recipe has other values than one of the others."""
    ours, *theirs = (_recipe(r.runs[0]) for r in (row, *others))
    differ = [key for key in ours if any(ours[key] != recipe.get(key) for recipe in theirs)]
    return [f"{key.rsplit('.', 1)[-1]} {ours[key]}" for key in differ]


def _folder(row: Row, others: list[Row]) -> list[str]:
    ours, *theirs = (r.runs[0].folder for r in (row, *others))
    return list(dict.fromkeys(str(ours if ours.parent == folder.parent else ours.parent) for folder in theirs))
