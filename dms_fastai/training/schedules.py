"""Learning rate and momentum as functions of `pct`, the share of training that is done."""

import math
from bisect import bisect
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import Literal

from ..errors import UserError, either
from ..settings import Count, Counts, Fraction, Milestones, NotNegative, Positive, Steps, checked

__all__ = [
    "SCHEDULES",
    "SGDR",
    "Cosine",
    "FlatCosine",
    "Linear",
    "OneCycle",
    "Step",
    "WarmupCosine",
    "cosine",
    "cosine_annealing",
    "one_cycle",
    "triangle",
]

Hypers = dict[str, Callable[[float], float]]
ROUNDED = 1e-6  # by which pct times the epochs may miss a whole number: fastai's pct is a sum over the batches


def epochs_done(epochs: int, step: str, pct: float) -> float:
    """How many of `epochs` are done at `pct`; with the step "epoch", only complete ones count."""
    done = pct * epochs
    complete = math.floor(done + ROUNDED)
    return complete if step == "epoch" or abs(done - complete) < ROUNDED else done


def cosine(start: float, end: float, pct: float) -> float:
    """The value at `pct` on half a cosine from `start` to `end`."""
    return start + (1 - math.cos(math.pi * pct)) * (end - start) / 2


def cosine_annealing(lr: float, steps: int | None, pct: float) -> float:
    """The paper's schedule: half a cosine from `lr` to 0; with `steps`, the value changes only that many times."""
    if steps is not None:
        pct = epochs_done(steps, "epoch", pct) / steps
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


@checked
@dataclass(frozen=True)
class WarmupCosine:
    """timm's cosine: along a line up to the learning rate, down half a cosine, and on at its last value.

    As in timm, the line takes the place of the cosine's first epochs; the two do not quite meet.

    Attributes:
        epochs: Length of the training, with warm-up and cool-down.
        warmup_epochs: Epochs along the line.
        warmup_lr: Learning rate where the line begins.
        lr_min: Learning rate at which the cosine ends.
        cooldown_epochs: Epochs at lr_min, after the cosine.
        step: Whether the learning rate changes with every "batch", or with every "epoch".
    """

    epochs: Count = 200
    warmup_epochs: Count = 5
    warmup_lr: NotNegative = 1e-5
    lr_min: NotNegative = 0.0
    cooldown_epochs: Steps = 0
    step: Literal["batch", "epoch"] = "batch"

    def __post_init__(self) -> None:
        if self.warmup_epochs + self.cooldown_epochs >= self.epochs:
            raise UserError(
                f"schedule.warmup_epochs is {self.warmup_epochs} and schedule.cooldown_epochs is "
                f"{self.cooldown_epochs}, which leaves nothing of {self.epochs} epochs to the cosine; set them lower, "
                f"or schedule.epochs higher"
            )

    def hypers(self, lr: float, momentum: float) -> Hypers:
        """As in `Cosine`.

        Raises:
            UserError: The line or the cosine would begin below its end.
        """
        lowest = float(lr.min() if hasattr(lr, "min") else lr)  # of several groups of parameters
        for name in ("warmup_lr", "lr_min"):
            if getattr(self, name) > lowest:
                raise UserError(
                    f"schedule.{name} is {getattr(self, name)}, above the learning rate, {lowest}; set it lower"
                )
        return {"lr": partial(self.rate, lr)}

    def rate(self, lr: float, pct: float) -> float:
        """The learning rate at `pct`."""
        done = epochs_done(self.epochs, self.step, pct)
        if done < self.warmup_epochs:
            return self.warmup_lr + (lr - self.warmup_lr) * done / self.warmup_epochs
        return cosine(lr, self.lr_min, min(done / (self.epochs - self.cooldown_epochs), 1.0))


@checked
@dataclass(frozen=True)
class SGDR:
    """Half a cosine from the learning rate to 0, again and again (Loshchilov and Hutter, 2017).

    Attributes:
        epochs: Length of the training: any at which a cycle ends.
        cycles: Length of each cycle in epochs, such as [10, 20, 40]. After the last the first comes again.
        step: Whether the learning rate changes with every "batch", or with every "epoch".
    """

    epochs: Count = 200
    cycles: Counts = (10,)
    step: Literal["batch", "epoch"] = "batch"

    def __post_init__(self) -> None:
        ends = list(accumulate(self.cycles))
        rounds, rest = divmod(self.epochs, ends[-1])
        if rest and rest not in ends:
            totals = either(str(rounds * ends[-1] + end) for end in ends)
            raise UserError(
                f"schedule.epochs is {self.epochs}, in the middle of a cycle; with schedule.cycles "
                f"{list(self.cycles)}, one ends after {totals} epochs"
            )

    def hypers(self, lr: float, momentum: float) -> Hypers:
        """As in `Cosine`."""
        return {"lr": partial(self.rate, lr)}

    def rate(self, lr: float, pct: float) -> float:
        """The learning rate at `pct`; training ends with a cycle, and not with a restart."""
        if pct >= 1:
            return cosine(lr, 0.0, 1.0)
        ends = list(accumulate(self.cycles))
        done = epochs_done(self.epochs, self.step, pct) % ends[-1]
        cycle = bisect(ends, done)
        start = ends[cycle] - self.cycles[cycle]
        return cosine(lr, 0.0, (done - start) / self.cycles[cycle])


@checked
@dataclass(frozen=True)
class FlatCosine:
    """The learning rate, then half a cosine to almost 0, like `Learner.fit_flat_cos`.

    Attributes:
        epochs: Length of the training.
        flat: Share of training before the cosine.
    """

    epochs: Count = 200
    flat: Fraction = 0.75

    def hypers(self, lr: float, momentum: float) -> Hypers:
        """As in `Cosine`."""
        return {"lr": partial(one_cycle, lr, lr, lr / 1e5, pct_start=self.flat)}


@checked
@dataclass(frozen=True)
class Step:
    """The learning rate, multiplied by a factor at each milestone, like torch's `MultiStepLR`.

    Attributes:
        epochs: Length of the training.
        milestones: When the learning rate changes, in epochs, such as [100, 150], or in shares of the training.
        gamma: Factor of the learning rate at each milestone.
    """

    epochs: Count = 200
    milestones: Milestones = (0.5, 0.75)
    gamma: Positive = 0.1

    def __post_init__(self) -> None:
        if self.milestones and self.milestones[-1] >= self.epochs:
            raise UserError(
                f"schedule.milestones is {list(self.milestones)}, which a training of {self.epochs} epochs does not "
                f"reach; shares of the training, such as [0.5, 0.75], fit any number of epochs"
            )

    def hypers(self, lr: float, momentum: float) -> Hypers:
        """As in `Cosine`."""
        return {"lr": partial(self.rate, lr)}

    def rate(self, lr: float, pct: float) -> float:
        """The learning rate at `pct`."""
        milestones = [m if m >= 1 else m * self.epochs for m in self.milestones]
        return lr * self.gamma ** bisect(milestones, pct * self.epochs + ROUNDED)


SCHEDULES = {
    "cosine": Cosine,
    "one-cycle": OneCycle,
    "linear": Linear,
    "warmup-cosine": WarmupCosine,
    "sgdr": SGDR,
    "flat-cosine": FlatCosine,
    "step": Step,
}
