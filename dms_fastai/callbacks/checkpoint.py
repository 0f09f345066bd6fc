"""Checkpoints: all that it takes to go on after an epoch as if nothing had happened."""

import os
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fastai.callback.core import Callback

__all__ = ["Checkpoint"]

LAST = "last.pt"


class Checkpoint(Callback):
    """After every epoch, write model, optimiser, random states and history; `resume` puts them back before a fit."""

    order = 70  # after everything that belongs to the epoch

    def __init__(self, folder: Path):
        super().__init__()
        self.file = folder / LAST
        self.random_states: dict[str, Any] | None = None

    def resume(self, learn: Any) -> tuple[int, list[dict[str, Any]]]:
        """Put `learn` back to where the checkpoint left it: epochs done (0 without a checkpoint) and their rows.

        Random states follow when the fit begins. Only tensors and plain values are read from the file, no code.
        """
        if not self.file.is_file():
            return 0, []
        state = torch.load(self.file, map_location="cpu", weights_only=True)
        learn.model.load_state_dict(state["model"])
        learn.model.to(learn.dls.device)  # before the optimiser, whose state goes where the parameters are
        learn.create_opt()
        learn.opt.load_state_dict(state["optimizer"])
        self.random_states = state["random"]
        return state["epochs"], state["rows"]

    def before_fit(self) -> None:
        if self.random_states is not None:
            set_random_states(self.random_states)
            self.random_states = None

    def after_epoch(self) -> None:
        state = {
            "epochs": self.learn.epoch + 1,
            "model": self.learn.model.state_dict(),
            "optimizer": self.learn.opt.state_dict(),
            "random": get_random_states(),
            "rows": self.learn.history.rows,
        }
        self.file.parent.mkdir(parents=True, exist_ok=True)
        partial = self.file.with_name(f"{self.file.name}.partial")
        with partial.open("wb") as opened:
            torch.save(state, opened)
            opened.flush()
            os.fsync(opened.fileno())
        partial.replace(self.file)


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
    if states["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(states["cuda"])
