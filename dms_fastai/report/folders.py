"""Run folders, read back: what each says of itself, and what is wrong with it."""

import csv
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import UserError

__all__ = ["METRICS", "RUN", "Problem", "Run", "find_runs", "read_rows", "read_run"]

RUN = "run.json"
METRICS = "metrics.csv"
NEEDED = {
    "title": str,
    "recipe": str,
    "model": str,
    "data": str,
    "valid": str,
    "status": str,
    "started": str,
    "seed": int,
    "parameters": int,
    "epochs": int,
    "epochs_done": int,
    "validation_pictures": int,
    "seconds": (int, float),
}
FIGURES = ("train_accuracy", "valid_accuracy")


@dataclass(frozen=True)
class Run:
    """A run's folder, as its run.json tells it."""

    folder: Path
    facts: dict[str, Any]

    @property
    def finished(self) -> bool:
        return self.facts.get("status") == "finished"

    @property
    def state(self) -> str:
        """How far the run has come, in words."""
        return (
            "" if self.finished else f"{self.facts['status']}, epoch {self.facts['epochs_done']}/{self.facts['epochs']}"
        )


@dataclass(frozen=True)
class Problem:
    """Something of a run that is missing or cannot be read."""

    folder: Path
    what: str


def read_run(folder: Path) -> Run:
    """The run in a folder.

    Raises:
        UserError: There is none, or its run.json is damaged.
    """
    try:
        facts = json.loads((folder / RUN).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{folder} holds no run: it has no {RUN}") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{folder / RUN} is damaged: {error}") from None
    if not isinstance(facts, dict):
        raise UserError(f"{folder / RUN} is damaged: it is no table of facts")
    return Run(folder, facts)


def find_runs(folders: Iterable[Path]) -> tuple[list[Run], list[Problem]]:
    """Every run in or below the folders, in the order in which they were begun, and those that cannot be read.

    Raises:
        UserError: A folder does not exist, or there is nothing of a run in any of them.
    """
    folders = list(folders)
    for folder in folders:
        if not folder.is_dir():
            raise UserError(f"no such folder: {folder}")
    found = {f.resolve().parent: f.parent for d in folders for name in (METRICS, RUN) for f in sorted(d.rglob(name))}
    if not found:
        raise UserError(f"no runs in {', '.join(map(str, folders))}; `dms-fastai run kd` makes one")
    runs, problems = [], []
    for folder in found.values():
        try:
            run = read_run(folder)
            _check(run)
        except UserError as error:
            problems.append(Problem(folder, error.message))
        else:
            runs.append(run)
    return sorted(runs, key=lambda run: run.facts["started"]), problems


def _check(run: Run) -> None:
    """Raise a UserError where run.json lacks what a report needs of it."""
    file = run.folder / RUN
    for key, kind in NEEDED.items():
        if not isinstance(run.facts.get(key), kind):
            raise UserError(f"{file} is damaged: {key!r} is {run.facts.get(key)!r}")
    for part in ("last", "best"):
        figures = run.facts.get(part)
        if figures is None and not run.finished and not run.facts["epochs_done"]:
            continue
        if not isinstance(figures, dict) or not all(isinstance(figures.get(key), float) for key in FIGURES):
            raise UserError(f"{file} is damaged: {part!r} is {figures!r}")


def read_rows(folder: Path) -> list[dict[str, float]]:
    """The epochs of a run: the rows of its metrics.csv as numbers.

    Raises:
        UserError: The file is missing or damaged.
    """
    file = folder / METRICS
    try:
        with file.open(newline="", encoding="utf-8") as opened:
            rows = [{key: float(value) for key, value in row.items() if value} for row in csv.DictReader(opened)]
    except FileNotFoundError:
        raise UserError(f"{file} is missing") from None
    except (OSError, ValueError, TypeError, AttributeError, csv.Error) as error:
        raise UserError(f"{file} is damaged: {error}") from None
    needed = ("epoch", "train_loss", "valid_loss", "train_accuracy", "valid_accuracy")
    if any(key not in row for row in rows for key in needed):
        raise UserError(f"{file} is damaged: a row lacks one of {', '.join(needed)}")
    return rows
