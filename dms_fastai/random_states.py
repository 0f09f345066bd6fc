"""The random states of all libraries that draw numbers: kept, set, and seeded together."""

import random
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch

from . import processes

__all__ = ["get_random_states", "seed_everything", "set_random_states"]


def get_random_states() -> dict[str, Any]:
    """The random states of Python, NumPy, and torch on the CPU and every GPU, as plain values and tensors."""
    name, keys, *rest = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": [name, keys.tolist(), *rest],
        "torch": torch.get_rng_state(),
        "cuda": [torch.cuda.get_rng_state(gpu) for gpu in _gpus()],
        "mps": torch.mps.get_rng_state() if torch.backends.mps.is_available() else None,
    }


def set_random_states(states: dict[str, Any]) -> None:
    random.setstate(states["python"])
    name, keys, *rest = states["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))
    torch.set_rng_state(states["torch"])
    for gpu, state in zip(_gpus(), states["cuda"], strict=False):
        torch.cuda.set_rng_state(state, gpu)
    if states.get("mps") is not None and torch.backends.mps.is_available():
        torch.mps.set_rng_state(states["mps"])


def _gpus() -> Iterable[int]:
    """The GPUs that draw numbers: of several processes, each has its own, in the same state as the others'."""
    if not torch.cuda.is_available():
        return ()
    return range(torch.cuda.device_count()) if processes.count() == 1 else [torch.cuda.current_device()]


def seed_everything(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
