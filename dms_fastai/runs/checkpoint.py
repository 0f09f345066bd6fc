"""Checkpoints: everything that it takes to resume a run as if it had not stopped."""

import hashlib
import io
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fastai.callback.core import Callback

from .. import processes
from ..errors import UserError
from ..files import whole
from ..models.weights import all_finite
from ..random_states import get_random_states, set_random_states
from .guards import arithmetic
from .history import History

__all__ = ["Checkpoint", "DivergedError", "Resumed"]

KEPT = 2  # the last one and the one before it, in case the last is damaged
SHARE = 0.02  # of a run's time that checkpoints after epochs may take


class DivergedError(UserError):
    """The loss or a weight has become NaN or infinite."""


@dataclass(frozen=True)
class Resumed:
    """How far the run of a checkpoint had come.

    Attributes:
        epochs: Whole epochs done.
        steps: Training steps done in the epoch after these.
        damaged: Newer checkpoints that could not be used.
        arithmetic: What `guards.arithmetic` said when it was written; None in those of earlier versions.
    """

    epochs: int = 0
    steps: int = 0
    damaged: list[Path] = field(default_factory=list)
    arithmetic: dict[str, Any] | None = None


class Checkpoint(Callback):
    """Write checkpoints after epochs and, on request, after steps.

    A checkpoint holds model, optimiser, random states, history and what callbacks keep. If epochs take less than 50
    times as long as a checkpoint, some have none. `resume` restores the last checkpoint before a fit. A file's name
    ends in the hash of its content, so that damage is noticed.
    """

    order = 70  # after everything that belongs to the step or epoch

    def __init__(self, folder: Path, history: History, every: int | None = None):
        """
        Args:
            folder: Folder of the checkpoints.
            history: History of the epochs, which is part of a checkpoint.
            every: Write one after every so many steps, and after every epoch whatever it costs. None: after epochs.
        """
        super().__init__()
        self.folder, self.history, self.every = folder, history, every
        self.resumed: dict[str, Any] | None = None
        self.saved = (-1, -1)  # epochs and steps of the last one
        self.cost, self.written = 0.0, 0.0

    def resume(self, learn: Any) -> Resumed:
        """Restore `learn` from the last sound checkpoint.

        Recorder, random states and the place in the epoch are restored when the fit begins. The files hold tensors and
        plain values, and no code in them is run.

        Raises:
            UserError: All checkpoints are damaged, or the newest sound one belongs to another recipe.
        """
        damaged: list[Path] = []
        same = learn.recipe.without_folders().to_table()
        for file in reversed(self.files()):
            state = read(file)
            if state is None:
                damaged.append(file)
                continue
            if state["recipe"] not in (same, learn.recipe.to_table()):  # the latter: an older checkpoint
                raise UserError(f"{file} belongs to a run of another recipe; remove it, or begin again with --restart")
            try:
                restore(learn, state)
            except (KeyError, ValueError) as error:  # the latter is torch's, of an optimiser with other groups
                reason = f"it has no {error}" if isinstance(error, KeyError) else error
                raise UserError(f"{file} is of another version ({reason}); begin again with --restart") from None
            self.resumed, self.history.rows = state, state["rows"]
            for unsound in damaged:
                unsound.replace(unsound.with_suffix(".damaged"))  # otherwise they would be kept in place of sound ones
            return Resumed(state["epochs"], state["steps"], damaged, state.get("arithmetic"))
        if damaged:
            names = ", ".join(file.name for file in damaged)
            raise UserError(f"all checkpoints in {self.folder} are damaged ({names}); begin again with --restart")
        return Resumed()

    def files(self) -> list[Path]:
        """The checkpoints, oldest first."""
        return sorted(self.folder.glob("*-*-*.pt"))

    def before_fit(self) -> None:
        if self.resumed is None:
            return
        self.learn.recorder.restore(self.resumed["recorder"])
        if self.resumed["steps"]:
            set_random_states(self.resumed["order_random"])
            self.learn.dls.train.resume_at(self.resumed["steps"], self._into_epoch)
        else:
            set_random_states(self.resumed["random"])
            self.resumed = None

    def before_train(self) -> None:
        self.order_random = get_random_states()  # the order of the batches is drawn next
        self.network = self.learn.model  # the trained weights: to validate, EMA swaps in the average

    def _into_epoch(self) -> None:
        """Restore the rest, once the order of the batches is drawn and the finished steps are skipped."""
        learn, state = self.learn, self.resumed
        learn.pct_train, learn.train_iter = state["pct_train"], state["train_iter"]
        learn.recorder.restore_sums(state["recorder"], next(learn.model.parameters()).device)
        set_random_states(state["random"])
        self.resumed = None

    def after_batch(self) -> None:
        done = self.learn.iter + 1
        if self.every and self.learn.training and done % self.every == 0 and done < self.learn.n_iter:
            self.save_step()

    def after_train(self) -> None:
        self.check_finite()

    def after_validate(self) -> None:
        """Before the epoch is recorded: run.json and metrics.csv hold numbers."""
        loss = float(self.learn.recorder.loss.value)
        if not np.isfinite(loss):
            raise self.diverged(f"the validation loss is {loss}")

    def after_epoch(self) -> None:
        due = self.every is not None or time.perf_counter() - self.written >= self.cost / SHARE
        if processes.from_first(lambda: due):
            self.save_epoch()

    def save_epoch(self) -> None:
        """Write a checkpoint at the end of an epoch, unless there is one already."""
        if self.saved != (self.learn.epoch + 1, 0):
            self._save(self.learn.epoch + 1, 0, {})

    def save_step(self) -> None:
        """Write a checkpoint in the middle of an epoch."""
        learn = self.learn
        inside = {
            "order_random": self.order_random,
            "pct_train": learn.pct_train,
            "train_iter": learn.train_iter,
        }
        self._save(learn.epoch, learn.iter + 1, inside)

    def check_finite(self) -> None:
        """Raise a DivergedError if the loss or a weight is NaN or infinite, so that such a state is never kept.

        The loss is of the weights before the last step, so it does not tell what that step has done to them.
        """
        loss = float(self.learn.smooth_loss)
        if not np.isfinite(loss):
            raise self.diverged(f"the loss is {loss}")
        if not all_finite(self.network):
            raise self.diverged("weights are NaN or infinite")

    def diverged(self, what: str) -> DivergedError:
        """The error that says what is no number any more, and what may help."""
        learn = self.learn
        lr, smaller = learn.opt.hypers[-1]["lr"], learn.recipe.optimizer.lr / 10
        return DivergedError(
            f"{what} in epoch {learn.epoch + 1}, at a learning rate of {lr:.3g}; try "
            f"--set optimizer.lr={smaller:.3g} or --set clip.value=0.1. The last good checkpoint is kept"
        )

    def _save(self, epochs: int, steps: int, inside: dict[str, Any]) -> None:
        self.check_finite()
        began, learn = time.perf_counter(), self.learn
        state = {
            "recipe": learn.recipe.without_folders().to_table(),
            "epochs": epochs,
            "steps": steps,
            "model": self.network.state_dict(),
            "optimizer": plain(learn.opt.state_dict()),
            "callbacks": {callback.name: callback.state() for callback in keeping(learn)},
            "recorder": learn.recorder.state(),
            "random": get_random_states(),
            "rows": self.history.rows,
            "arithmetic": arithmetic(learn),
            **inside,
        }
        self.saved = (epochs, steps)
        if not processes.is_first():  # all have the same
            return
        buffer = io.BytesIO()
        torch.save(state, buffer)
        content = buffer.getbuffer()
        self.folder.mkdir(parents=True, exist_ok=True)
        file = self.folder / f"{epochs:05d}-{steps:07d}-{digest(content)}.pt"
        with whole(file) as partial:
            partial.write_bytes(content)
            if digest(partial.read_bytes()) != digest(content):
                raise OSError(f"{file} does not read back as it was written")
        for old in self.files()[:-KEPT]:
            old.unlink()
        self.written = time.perf_counter()
        self.cost = self.written - began


def digest(content: Any) -> str:
    return hashlib.blake2b(content, digest_size=8).hexdigest()


def read(file: Path) -> dict[str, Any] | None:
    """The state in a checkpoint; None if its content does not have the hash in its name."""
    content = file.read_bytes()
    if digest(content) != file.stem.rsplit("-", 1)[1]:
        return None
    return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)


def plain(value: Any) -> Any:
    """Turn NumPy's scalars, which fastai's schedules put into the optimiser, into Python's, which load without code."""
    if isinstance(value, dict):
        return {key: plain(v) for key, v in value.items()}
    if isinstance(value, list):
        return [plain(v) for v in value]
    return value.item() if isinstance(value, np.generic) else value


def restore(learn: Any, state: dict[str, Any]) -> None:
    """Put model, optimiser and what callbacks keep back to where a checkpoint left them."""
    learn.model.load_state_dict(state["model"])
    learn.model.to(learn.dls.device)  # before the optimiser, whose state goes where the parameters are
    learn.create_opt()
    learn.opt.load_state_dict(state["optimizer"])
    for callback in keeping(learn):
        callback.restore(state["callbacks"][callback.name])


def keeping(learn: Any) -> list[Any]:
    """The recipe's callbacks with something to keep from step to step: `state` gives it, `restore` takes it."""
    return [cb for cb in learn.cbs if hasattr(type(cb), "restore") and cb is not learn.recorder]
