"""Learning rate and momentum as functions of `pct`, the share of training that is done."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

from ..settings import Count, Fraction, checked

__all__ = ["SCHEDULES", "Cosine", "Linear", "OneCycle", "cosine", "cosine_annealing", "one_cycle", "triangle"]

Hypers = dict[str, Callable[[float], float]]


def cosine(start: float, end: float, pct: float) -> float:
    """The value at `pct` on half a cosine from `start` to `end`."""
    return start + (1 - math.cos(math.pi * pct)) * (end - start) / 2


def cosine_annealing(lr: float, steps: int | None, pct: float) -> float:
    """The paper's schedule: half a cosine from `lr` to 0; with `steps`, the value changes only that many times."""
    if steps is not None:
        pct = math.floor(pct * steps + 1e-6) / steps  # fastai's pct is a sum, which falls a little short
    return cosine(lr, 0.0, pct)


def one_cycle(start: float, middle: float, end: float, pct: float, pct_start: float = 0.25) -> float:
    """The schedule of `Learner.fit_one_cycle`: from `start` to `middle` in the share `pct_start`, then to `end`."""
    if pct < pct_start:
        return cosine(start, middle, pct / pct_start)
    return cosine(middle, end, (pct - pct_start) / (1 - pct_start))


def triangle(lr: float, warmup: float, pct: float) -> float:
    """From 0 to `lr` in the share `warmup` of training, then to 0, along two lines."""
    return lr * (pct / warmup if pct < warmup else (1 - pct) / (1 - warmup))


@checked
@dataclass(frozen=True)
class Cosine:
    """Half a cosine from the learning rate to 0 (Loshchilov and Hutter, 2017, without restarts).

    Attributes:
        epochs: Length of the training.
        step: Whether the learning rate changes with every "batch", or with every "epoch", as the authors' does.
    """

    epochs: Count = 200
    step: Literal["batch", "epoch"] = "batch"

    def hypers(self, lr: float, momentum: float) -> Hypers:
        """The scheduled hyperparameters: fastai's name of each, and its value as a function of `pct`."""
        return {"lr": partial(cosine_annealing, lr, self.epochs if self.step == "epoch" else None)}


@checked
@dataclass(frozen=True)
class OneCycle:
    """Up to the learning rate in a quarter of training, then down, like `Learner.fit_one_cycle` (Smith, 2018).

    The momentum moves the other way, by 0.05 to either side of the optimiser's momentum.

    Attributes:
        epochs: Length of the training.
    """

    epochs: Count = 200

    def hypers(self, lr: float, momentum: float) -> Hypers:
        """As in `Cosine`."""
        m = momentum
        swing = min(0.05, m, (1 - m) / 2)  # 0.95, 0.85, 0.95 round 0.9: fastai's own cycle
        return {
            "lr": partial(one_cycle, lr / 25, lr, lr / 1e5),
            "mom": partial(one_cycle, m + swing, m - swing, m + swing),
        }


@checked
@dataclass(frozen=True)
class Linear:
    """Up to the learning rate along a line, then down to 0 along another; the momentum stays.

    Attributes:
        epochs: Length of the training.
        warmup: Share of training in which the learning rate rises.
    """

    epochs: Count = 200
    warmup: Fraction = 0.2

    def hypers(self, lr: float, momentum: float) -> Hypers:
        """As in `Cosine`."""
        return {"lr": partial(triangle, lr, self.warmup)}


SCHEDULES = {"cosine": Cosine, "one-cycle": OneCycle, "linear": Linear}
