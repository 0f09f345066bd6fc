"""Checkpoints: all that it takes to go on as if nothing had happened."""

import hashlib
import io
import random
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fastai.callback.core import Callback
from fastcore.foundation import L

from ..errors import UserError
from ..files import whole
from .recorder import Recorder

__all__ = ["Checkpoint", "Resumed"]

KEPT = 2  # the last one and the one before, should the last turn out to be damaged
SHARE = 0.02  # of a run's time that checkpoints after epochs may take


@dataclass(frozen=True)
class Resumed:
    """Where a checkpoint left a run.

    Attributes:
        epochs: Whole epochs done.
        steps: Training steps done of the one after.
        rows: Of the epochs' history.
        damaged: Newer checkpoints that could not be used.
    """

    epochs: int = 0
    steps: int = 0
    rows: list[dict[str, Any]] = field(default_factory=list)
    damaged: list[Path] = field(default_factory=list)


class Checkpoint(Callback):
    """Write model, optimiser, random states and history after epochs, and after steps on request.

    After every epoch, that is, whose checkpoint takes little beside what has been trained since the last one: where
    epochs take less than 50 times as long as a checkpoint, some go without. `resume` puts them back before a fit. A
    file's name ends in the hash of its content, so that a damaged one is known.
    """

    order = 70  # after everything that belongs to the step or epoch

    def __init__(self, folder: Path, every: int | None = None):
        """
        Args:
            folder: Of the checkpoints.
            every: Write one after so many steps of an epoch, too, and after every epoch whatever it costs.
        """
        super().__init__()
        self.folder, self.every = folder, every
        self.resumed: dict[str, Any] | None = None
        self.saved = (-1, -1)  # epochs and steps of the last one
        self.cost, self.written = 0.0, 0.0

    def resume(self, learn: Any) -> Resumed:
        """Put `learn` back to where the last sound checkpoint left it.

        Recorder, random states and the place in the epoch follow when the fit begins. The files hold tensors and plain
        values, and no code in them is run.

        Raises:
            UserError: There are checkpoints, and all are damaged, or the newest sound one is another recipe's.
        """
        damaged: list[Path] = []
        for file in reversed(self.files()):
            state = read(file)
            if state is None:
                damaged.append(file)
                continue
            if state["recipe"] != learn.recipe.to_table():
                raise UserError(f"{file} belongs to a run of another recipe; remove it, or begin again with --restart")
            learn.model.load_state_dict(state["model"])
            learn.model.to(learn.dls.device)  # before the optimiser, whose state goes where the parameters are
            learn.create_opt()
            learn.opt.load_state_dict(state["optimizer"])
            if state.get("ema") is not None:
                learn.ema.restore(state["ema"])
            self.resumed = state
            for unsound in damaged:
                unsound.rename(unsound.with_suffix(".damaged"))  # or they would be kept in place of sound ones
            return Resumed(state["epochs"], state["steps"], state["rows"], damaged)
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
        set_recorder(self.learn.recorder, self.resumed["recorder"])
        if self.resumed["steps"]:
            set_random_states(self.resumed["order_random"])
            self.learn.dls.train.resume_at(self.resumed["steps"], self._into_epoch)
        else:
            set_random_states(self.resumed["random"])
            self.resumed = None

    def before_train(self) -> None:
        self.order_random = get_random_states()  # the order of the batches is drawn next

    def _into_epoch(self) -> None:
        """The order of the batches is drawn, and the steps that are done are left out; now the rest is as it was."""
        learn, state = self.learn, self.resumed
        learn.pct_train, learn.train_iter = state["pct_train"], state["train_iter"]
        device = next(learn.model.parameters()).device
        for metric, (total, count) in zip(learn.metrics, state["metrics"], strict=True):
            metric.total, metric.count = torch.as_tensor(total).to(device), count
        learn.smooth_loss = learn.recorder.smooth_loss.value
        set_random_states(state["random"])
        self.resumed = None

    def after_batch(self) -> None:
        done = self.learn.iter + 1
        if self.every and self.learn.training and done % self.every == 0 and done < self.learn.n_iter:
            self.save_step()

    def after_train(self) -> None:
        self.check_finite()

    def after_epoch(self) -> None:
        if self.every or time.perf_counter() - self.written >= self.cost / SHARE:
            self.save_epoch()

    def save_epoch(self) -> None:
        """Write one at the end of an epoch, unless there is one."""
        if self.saved != (self.learn.epoch + 1, 0):
            self._save(self.learn.epoch + 1, 0, {})

    def save_step(self) -> None:
        """Write one in the middle of an epoch."""
        learn = self.learn
        inside = {
            "order_random": self.order_random,
            "pct_train": learn.pct_train,
            "train_iter": learn.train_iter,
            "metrics": [(metric.total, metric.count) for metric in learn.metrics],
        }
        self._save(learn.epoch, learn.iter + 1, inside)

    def check_finite(self) -> None:
        """Raise a UserError where the loss has come to be no number: what comes of it is not worth keeping."""
        loss = float(self.learn.smooth_loss)
        if not np.isfinite(loss):
            lr = self.learn.opt.hypers[-1]["lr"]
            smaller = self.learn.recipe.optimizer.lr / 10
            raise UserError(
                f"the loss is {loss} in epoch {self.learn.epoch + 1}, at a learning rate of {lr:.3g}; try "
                f"--set optimizer.lr={smaller:.3g} or --set optimizer.clip_value=0.1. The last good checkpoint is kept"
            )

    def _save(self, epochs: int, steps: int, inside: dict[str, Any]) -> None:
        self.check_finite()
        began, learn = time.perf_counter(), self.learn
        ema = getattr(learn, "ema", None)
        state = {
            "recipe": learn.recipe.to_table(),
            "epochs": epochs,
            "steps": steps,
            "model": (learn.model if ema is None or ema.raw is None else ema.raw).state_dict(),
            "optimizer": plain(learn.opt.state_dict()),
            "ema": None if ema is None else ema.state(),
            "recorder": get_recorder(learn.recorder),
            "random": get_random_states(),
            "rows": learn.history.rows,
            **inside,
        }
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
        self.saved, self.written = (epochs, steps), time.perf_counter()
        self.cost = self.written - began


def digest(content: Any) -> str:
    return hashlib.blake2b(content, digest_size=8).hexdigest()


def read(file: Path) -> dict[str, Any] | None:
    """The state in a checkpoint; None where its content is not what its name says."""
    content = file.read_bytes()
    if digest(content) != file.stem.rsplit("-", 1)[1]:
        return None
    return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)


def plain(value: Any) -> Any:
    """NumPy's scalars, which fastai's schedules put into the optimiser, as Python's: those load without code."""
    if isinstance(value, dict):
        return {key: plain(v) for key, v in value.items()}
    if isinstance(value, list):
        return [plain(v) for v in value]
    return value.item() if isinstance(value, np.generic) else value


def get_recorder(recorder: Recorder) -> dict[str, Any]:
    """What fastai's recorder has seen so far: every step's rate and loss, every epoch's values."""
    recorder.fetch()
    return {
        "lrs": plain(list(recorder.lrs)),
        "losses": torch.stack(recorder.losses),
        "iters": list(recorder.iters),
        "values": [plain(list(values)) for values in recorder.values],
        "smooth_loss": (recorder.smooth_loss.count, recorder.smooth_loss.val),
    }


def set_recorder(recorder: Recorder, state: dict[str, Any]) -> None:
    recorder.lrs, recorder.iters = list(state["lrs"]), list(state["iters"])
    recorder.losses = list(state["losses"])
    recorder.values = [L(values) for values in state["values"]]
    recorder.smooth_loss.count, recorder.smooth_loss.val = state["smooth_loss"]


def get_random_states() -> dict[str, Any]:
    """Of Python, NumPy, and torch on the CPU and every GPU, as plain values and tensors."""
    name, keys, *rest = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": [name, keys.tolist(), *rest],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_random_states(states: dict[str, Any]) -> None:
    random.setstate(states["python"])
    name, keys, *rest = states["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))
    torch.set_rng_state(states["torch"])
    for device, state in zip(range(torch.cuda.device_count()), states["cuda"], strict=False):
        torch.cuda.set_rng_state(state, device)
