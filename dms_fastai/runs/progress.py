"""A live line while a stage trains; without a terminal, a plain line for each epoch."""

import time

from fastai.callback.core import Callback
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from ..clock import clock
from ..terminal import printable
from .history import History

__all__ = ["RichProgress"]

REFRESH_SECONDS = 0.5  # reading the loss waits for the GPU, so it is read this often and not every batch


class RichProgress(Callback):
    """Show stage, epoch, loss, accuracy, images a second and the time left. Use it as a context manager round fit."""

    order = 60

    def __init__(self, title: str, history: History, console: Console):
        super().__init__()
        self.title, self.history, self.console, self.shown = printable(title), history, console, 0.0
        self.progress = Progress(
            TextColumn("{task.description}", style="bold", markup=False),
            TextColumn("epoch {task.fields[epoch]}/{task.fields[epochs]}"),
            BarColumn(bar_width=None),
            TextColumn("loss {task.fields[loss]}"),
            TextColumn("accuracy {task.fields[accuracy]}"),
            TextColumn("{task.fields[rate]}/s"),
            TimeRemainingColumn(compact=True, elapsed_when_finished=True),
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
        learn = self.learn
        self.task = self.progress.add_task(
            self.title,
            total=None,
            epoch=learn.first_epoch + 1,
            epochs=learn.n_epoch,
            loss="-",
            accuracy="-",
            rate="-",
        )

    def before_epoch(self) -> None:
        self.progress.update(self.task, epoch=self.learn.epoch + 1, refresh=True)

    def before_train(self) -> None:
        self.train_began, self.first = time.perf_counter(), self.learn.dls.train.first_batch

    def after_batch(self) -> None:
        now = time.perf_counter()
        if not self.console.is_terminal or not self.learn.training or now - self.shown < REFRESH_SECONDS:
            return
        self.shown = now
        steps, done = self.learn.n_iter, self.learn.iter + 1
        self.progress.update(
            self.task,
            total=self.learn.n_epoch * steps,
            completed=self.learn.epoch * steps + done,
            loss=f"{float(self.learn.smooth_loss):.3f}",
            rate=f"{(done - self.first) * self.learn.dls.train.bs / (now - self.train_began):,.0f}",
            refresh=True,
        )

    def after_epoch(self) -> None:
        row = self.history.rows[-1]
        accuracy, rate = f"{100 * row['valid_accuracy']:.2f} %", f"{row['images_per_second']:,.0f}"
        if self.console.is_terminal:
            self.progress.update(self.task, accuracy=accuracy, rate=rate, refresh=True)
            return
        epochs, left = self.learn.n_epoch, (self.learn.n_epoch - row["epoch"]) * row["seconds"]
        self.console.print(
            f"{self.title}: epoch {row['epoch']}/{epochs}, loss {row['train_loss']:.3f}, accuracy {accuracy}, "
            f"{rate} images/s, {clock(left)} left",
            soft_wrap=True,
            markup=False,
        )
