"""Checkpoints: all that it takes to go on after an epoch as if nothing had happened."""

import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fastai.callback.core import Callback
from fastcore.foundation import L

from ..files import whole
from .recorder import Recorder

__all__ = ["Checkpoint"]

LAST = "last.pt"


class Checkpoint(Callback):
    """After every epoch, write model, optimiser, random states and history; `resume` puts them back before a fit."""

    order = 70  # after everything that belongs to the epoch

    def __init__(self, folder: Path):
        super().__init__()
        self.file = folder / LAST
        self.resumed: dict[str, Any] | None = None

    def resume(self, learn: Any) -> tuple[int, list[dict[str, Any]]]:
        """Put `learn` back to where the checkpoint left it: epochs done (0 without a checkpoint) and their rows.

        The recorder and the random states follow when the fit begins. The file holds tensors and plain values, and no
        code in it is run.
        """
        if not self.file.is_file():
            return 0, []
        state = torch.load(self.file, map_location="cpu", weights_only=True)
        learn.model.load_state_dict(state["model"])
        learn.model.to(learn.dls.device)  # before the optimiser, whose state goes where the parameters are
        learn.create_opt()
        learn.opt.load_state_dict(state["optimizer"])
        self.resumed = state
        return state["epochs"], state["rows"]

    def before_fit(self) -> None:
        if self.resumed is not None:
            set_recorder(self.learn.recorder, self.resumed["recorder"])
            set_random_states(self.resumed["random"])
            self.resumed = None

    def after_epoch(self) -> None:
        state = {
            "epochs": self.learn.epoch + 1,
            "model": self.learn.model.state_dict(),
            "optimizer": plain(self.learn.opt.state_dict()),
            "recorder": get_recorder(self.learn.recorder),
            "random": get_random_states(),
            "rows": self.learn.history.rows,
        }
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with whole(self.file) as partial:
            torch.save(state, partial)


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
