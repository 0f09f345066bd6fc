"""What runs came to: the ablation's table, and a run's curves."""

import csv
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table

from .callbacks.progress import clock
from .errors import UserError

__all__ = ["Run", "ablation_table", "find_runs", "plot_curves", "read_rows", "read_run"]

RUN = "run.json"
METRICS = "metrics.csv"


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


def read_run(folder: Path) -> Run:
    """The run in a folder.

    Raises:
        UserError: There is none, or its run.json is damaged.
    """
    try:
        return Run(folder, json.loads((folder / RUN).read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise UserError(f"{folder} holds no run: it has no {RUN}") from None
    except ValueError as error:
        raise UserError(f"{folder / RUN} is damaged: {error}") from None


def find_runs(folders: Iterable[Path]) -> list[Run]:
    """Every run in or below the folders, in the order in which they were begun.

    Raises:
        UserError: A folder does not exist, or there is no run at all.
    """
    folders = list(folders)
    for folder in folders:
        if not folder.is_dir():
            raise UserError(f"no such folder: {folder}")
    files = {file.resolve(): file for folder in folders for file in sorted(folder.rglob(RUN))}
    if not files:
        raise UserError(f"no runs in {', '.join(map(str, folders))}; `dms-fastai run kd` makes one")
    return sorted((read_run(file.parent) for file in files.values()), key=lambda run: run.facts["started"])


def read_rows(folder: Path) -> list[dict[str, float]]:
    """The epochs of a run: the rows of its metrics.csv as numbers."""
    with (folder / METRICS).open(newline="") as file:
        return [{key: float(value) for key, value in row.items() if value} for row in csv.DictReader(file)]


def ablation_table(runs: list[Run], title: str = "") -> Table:
    """The table that a run ends with: a row for each stage, the last epoch first."""
    chosen_on = "the test set" if runs[-1].facts["valid"] == "test" else "the validation pictures"
    caption = f"* the best epoch, chosen on {chosen_on}: to be compared with the paper's figures only."
    if any(run.facts.get("mixup") for run in runs):
        caption += "\n+ of mixed pictures, by the first picture's label alone, as the paper counts."
    table = Table(title=title, caption=caption, box=SIMPLE_HEAD, title_justify="left", caption_justify="left")
    table.padding, table.collapse_padding = (0, 1), True
    table.add_column("stage", no_wrap=True)
    for column in ("last\nepoch", "best*", "training", "parameters", "epochs", "time"):
        table.add_column(column, justify="right", no_wrap=True)
    for run in runs:
        facts = run.facts
        last, best = facts.get("last"), facts.get("best")
        mixed = "+" if facts.get("mixup") else " "
        table.add_row(
            "\n".join(filter(None, (escape(facts["title"]), f"[dim]{facts['model']}[/]", run.state))),
            f"[bold]{_percent(last['valid_accuracy'])}[/]" if last else "-",
            _percent(best["valid_accuracy"]) if best else "-",
            _percent(last["train_accuracy"]) + mixed if last else "-",
            f"{facts['parameters']:,}",
            f"{facts['epochs_done']}",
            clock(facts["seconds"]),
        )
    return table


def plot_curves(rows: list[dict[str, float]], title: str, file: Path) -> None:
    """Loss and accuracy by epoch, training and validation, as a .png."""
    epochs = [row["epoch"] for row in rows]
    marker = "o" if len(rows) < 3 else None
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    panels = (("loss", 1, "loss"), ("accuracy", 100, "accuracy, %"))
    for axes, (key, scale, label) in zip(figure.subplots(1, 2), panels, strict=True):
        for split, colour in (("train", "#8a8a8a"), ("valid", "#0b6e99")):
            values = [scale * row[f"{split}_{key}"] for row in rows]
            name = {"train": "training", "valid": "validation"}[split]
            axes.plot(epochs, values, label=name, color=colour, marker=marker)
        axes.set_xlabel("epoch")
        axes.set_ylabel(label)
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
    figure.suptitle(title)
    FigureCanvasAgg(figure).print_png(file)


def _percent(share: float) -> str:
    return f"{100 * share:.2f} %"
