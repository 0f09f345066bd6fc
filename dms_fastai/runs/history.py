"""The history of a run: a row for each epoch, in a .csv file."""

import csv
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fastai.callback.core import Callback

from .. import processes
from ..files import whole

__all__ = ["History", "write_rows"]


class History(Callback):
    """Keep a row for each finished epoch, and write them all to a .csv file as soon as there is a new one.

    A row has the epoch (from 1), the learning rate of its last batch, what the recorder recorded, the seconds of
    training and validation together, and the training images a second. In a resumed epoch, the last two count only
    what was left of it.
    """

    order = 55  # after the recorder (50)

    def __init__(self, file: Path, then: Callable[[], Any] = lambda: None):
        """
        Args:
            file: The .csv file.
            then: Called when a row has been written.
        """
        super().__init__()
        self.file, self.then = file, then
        self.rows: list[dict[str, Any]] = []  # of the epochs so far, those of an earlier, unfinished run first

    def before_epoch(self) -> None:
        self.epoch_began = time.perf_counter()
        loader = self.learn.dls.train
        self.images = (len(loader) - loader.first_batch) * loader.bs

    def after_train(self) -> None:
        self.train_seconds = time.perf_counter() - self.epoch_began
        self.last_lr = self.learn.recorder.lrs[-1]

    def after_epoch(self) -> None:
        recorder = self.learn.recorder
        recorded = dict(zip(recorder.metric_names[1:], recorder.values[-1], strict=False))
        self.rows.append(
            {
                "epoch": self.learn.epoch + 1,
                "lr": self.last_lr,
                **recorded,
                "seconds": round(time.perf_counter() - self.epoch_began, 3),
                "images_per_second": round(self.images / self.train_seconds, 1),
            }
        )
        if processes.is_first():
            write_rows(self.rows, self.file, durable=False)  # a checkpoint holds them, too
        self.then()


def write_rows(rows: list[dict[str, Any]], file: Path, durable: bool) -> None:
    """Rows as .csv, whole or not at all; `durable` as in `whole`."""
    with whole(file, durable) as partial, partial.open("w", newline="", encoding="utf-8") as opened:
        writer = csv.DictWriter(opened, fieldnames=list(rows[0]) if rows else ["epoch"])
        writer.writeheader()
        writer.writerows(rows)
