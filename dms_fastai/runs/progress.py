"""What is seen while a stage trains: in a terminal, a line for each epoch above a bar; in a file, the lines alone."""

import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fastai.callback.core import Callback
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from ..clock import clock
from ..terminal import printable
from .history import History

if TYPE_CHECKING:
    from .plan import Stage

__all__ = ["NOTHING", "Ahead", "RichProgress", "ahead"]

REFRESH_SECONDS = 0.5  # reading the loss waits for the GPU, so it is read this often and not every batch
COLUMNS = {  # of the lines in a terminal: the key of a row, and its name
    "train_loss": "train loss",
    "train_cross_entropy": "cross-entropy",
    "train_distillation": "distillation",
    "train_features": "features",
    "valid_loss": "valid loss",
    "valid_accuracy": "accuracy",
    "seconds": "time",
}


@dataclass(frozen=True)
class Ahead:
    """What a command trains after a stage.

    Attributes:
        seconds: Of the stages whose time is known.
        unknown: The number of the others.
    """

    seconds: float = 0.0
    unknown: int = 0


NOTHING = Ahead()


def ahead(stages: "Iterable[Stage]", done: "Iterable[Stage]", restart: bool = False) -> Ahead:
    """What is ahead: `stages` that have not finished, or all. Each takes as long as its recipe did in one of `done`."""
    known = {stage.recipe.name: stage.folder.facts().seconds for stage in done}
    names = [stage.recipe.name for stage in stages if restart or not stage.folder.finished]
    return Ahead(sum(known.get(name, 0.0) for name in names), sum(name not in known for name in names))


class RichProgress(Callback):
    """Show losses, accuracy, images a second and the time left. Use it as a context manager round fit."""

    order = 60  # after the history (55)

    def __init__(self, title: str, history: History, console: Console, ahead: Ahead = NOTHING):
        """
        Args:
            title: Of the stage.
            history: Whose last row is shown after each epoch.
            console: Where to show it.
            ahead: What is trained after this stage.
        """
        super().__init__()
        self.title, self.history, self.console, self.shown = printable(title), history, console, 0.0
        self.ahead, self.head = ahead, ""
        self.progress = Progress(
            TextColumn("epoch {task.fields[epoch]}/{task.fields[epochs]}"),
            BarColumn(bar_width=None),
            TextColumn("train loss {task.fields[loss]}"),
            TextColumn("{task.fields[rate]} images/s"),
            TextColumn("{task.fields[left]}"),
            console=console,
            transient=True,
            auto_refresh=False,  # its thread would take a tenth of the time that Python has
            disable=not console.is_terminal,
        )

    def __enter__(self) -> "RichProgress":
        self.progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.progress.stop()

    def before_fit(self) -> None:
        if self.console.is_terminal:
            self.say(self.title, style="bold")
        fields = {"epochs": self.learn.n_epoch, "loss": "-", "rate": "-", "left": ""}
        self.task = self.progress.add_task("", total=None, epoch=self.learn.first_epoch + 1, **fields)

    def before_epoch(self) -> None:
        self.progress.update(self.task, epoch=self.learn.epoch + 1, completed=0, refresh=True)

    def before_train(self) -> None:
        self.train_began, self.first = time.perf_counter(), self.learn.dls.train.first_batch

    def after_batch(self) -> None:
        now = time.perf_counter()
        if not self.console.is_terminal or not self.learn.training or now - self.shown < REFRESH_SECONDS:
            return
        self.shown = now
        steps, done, passed = self.learn.n_iter, self.learn.iter + 1, now - self.train_began
        each = passed / (done - self.first)
        rows = self.history.rows
        epoch = rows[-1]["seconds"] if rows and self.learn.epoch > self.learn.first_epoch else each * steps
        left = (steps - done) * each + (self.learn.n_epoch - self.learn.epoch - 1) * epoch
        self.progress.update(
            self.task,
            total=steps,
            completed=done,
            loss=f"{float(self.learn.smooth_loss):.3f}",
            rate=f"{self.learn.dls.train.bs / each:,.0f}",
            left=self.left(left),
            refresh=True,
        )

    def after_epoch(self) -> None:
        row = self.history.rows[-1]
        there = {key: name for key, name in COLUMNS.items() if row.get(key) is not None}
        told = {name: _told(key, row[key]) for key, name in (there | {"valid_accuracy": self.measure}).items()}
        if self.console.is_terminal:
            head = "  ".join(["epoch", *told])
            if head != self.head:
                self.say(head, style="dim")
            self.head = head
            cells = [f"{row['epoch']:>5}", *(value.rjust(len(name)) for name, value in told.items())]
            self.say("  ".join(cells))
            return
        del told["time"]
        figures = ", ".join(f"{name} {value}" for name, value in told.items())
        left = self.left((self.learn.n_epoch - row["epoch"]) * row["seconds"])
        rate = f"{row['images_per_second']:,.0f} images/s"
        self.say(f"{self.title}: epoch {row['epoch']}/{self.learn.n_epoch}, {figures}, {rate}, {left}")

    def after_fit(self) -> None:
        rows = self.history.rows
        if len(rows) == self.learn.n_epoch:
            share, seconds = _told("valid_accuracy", rows[-1]["valid_accuracy"]), sum(r["seconds"] for r in rows)
            epochs = f"{len(rows)} epoch{'s' if len(rows) > 1 else ''}"
            self.say(f"{self.title}: {epochs}, {self.measure} {share}, {clock(seconds)}")

    @property
    def measure(self) -> str:
        """What stands in the place of accuracy."""
        return "agreement" if self.learn.dls.valid_ds.by_teacher else "accuracy"

    def left(self, seconds: float) -> str:
        """The time left, in words: of the stage, and of what is ahead."""
        known = f", in all {clock(seconds + self.ahead.seconds)}" if self.ahead.seconds else ""
        unknown = self.ahead.unknown
        more = f" + {unknown} stage{'s' if unknown > 1 else ''}" if unknown else ""
        return f"{clock(seconds)} left{known}{more}"

    def say(self, line: str, style: str | None = None) -> None:
        self.console.print(line, style=style, soft_wrap=True, markup=False, highlight=False)


def _told(key: str, value: float) -> str:
    """A figure of a row as text."""
    if key == "seconds":
        return clock(value)
    return f"{100 * value:.2f} %" if key.endswith("accuracy") else f"{value:.3f}"
