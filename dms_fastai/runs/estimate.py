"""What a training will take, from a few steps of it."""

import math
import time
from dataclasses import dataclass, replace

import torch
from fastai.callback.core import Callback, CancelFitException

from ..data import Sets
from ..files import amount
from ..learner import dms_learner
from ..models.macs import macs
from ..recipes import Recipe
from ..trained import Teacher
from ..training.parts import order_of
from .images import loaders_of
from .work import PASSES, share_of_whole

__all__ = ["Estimate", "estimate", "held"]

LEFT = 0.05  # of an epoch's time is left without the teacher, which may take nearly all of a step
WARM_UP, STEPS, SECONDS = 2, 10, 3.0  # steps before any is timed, and the most steps and seconds that are timed


@dataclass(frozen=True)
class Estimate:
    """What a stage is expected to take.

    Attributes:
        parameters: Of the network.
        macs: Multiply-accumulates of a forward pass of one image.
        steps: Steps of an epoch.
        step_seconds: Seconds of a training step, with the teacher that was given.
        epoch_seconds: Seconds of an epoch with its validation, with that teacher.
        teacher_seconds: Those of a training step that the teacher takes.
    """

    parameters: int
    macs: int
    steps: int
    step_seconds: float
    epoch_seconds: float
    teacher_seconds: float = 0.0

    @property
    def forward_seconds(self) -> float:
        """Seconds of a forward pass of a step's images, as of one that teaches another network."""
        return self.step_seconds / PASSES

    def seconds(self, epochs: int, views: int | None = None, later: float = 0.0) -> float:
        """Seconds of a training.

        Args:
            epochs: Its epochs.
            views: A teacher is asked in so many epochs alone, of `FixedViews`; None: in all.
            later: Seconds a step of a teacher that is not there yet, and was not given to `estimate`.
        """
        asked = epochs if views is None else min(views, epochs)
        return asked * self._asking(later) + (epochs - asked) * self._recalling(later)

    def epochs_in(self, seconds: float, views: int | None = None, later: float = 0.0) -> int:
        """The most epochs that take no more than so many seconds, but one at least; arguments as in `seconds`."""
        epochs = max(1, math.floor(seconds / self._asking(later)))
        if views is None or epochs < views:
            return epochs
        return views + max(0, math.floor((seconds - views * self._asking(later)) / self._recalling(later)))

    def _asking(self, later: float) -> float:
        """Seconds of an epoch in which a teacher is asked."""
        return self.epoch_seconds + self.steps * later

    def _recalling(self, later: float) -> float:
        """Seconds of an epoch in which what it has said is read."""
        return max(self.epoch_seconds - self.steps * self.teacher_seconds, LEFT * self._asking(later))


def estimate(recipe: Recipe, sets: Sets, device: torch.device, teacher: Teacher | None = None) -> Estimate:
    """Train a few steps of a recipe and throw them away. torch's random states stay as before.

    A teacher that is there takes part, and is asked in each step. Without one, the recipe is trained as if it did not
    distil. Where images grow, a step is timed with whole ones, and its student's time shared out by the work.
    """
    used, resize = sets, recipe.progressive_resize
    if teacher is None:
        recipe = recipe.without_teacher()
        used = replace(sets, unlabelled=None)
    recipe = replace(recipe, compile=None, early_stopping=None, fixed_views=None)  # nothing is validated, nothing kept
    recipe = replace(recipe, fine_tune=None)  # a step that trains all of the network
    if resize is not None:
        recipe = replace(recipe, progressive_resize=replace(resize, smallest=1.0, grow_at=0.0, full_at=0.0))
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices, device_type="cuda"):
        dls = loaders_of(recipe, used, device)
        steps = len(loaders_of(recipe, sets, device).with_unlabelled().train)
        clock, before, after = _Clock(device), _Stamp(device, -0.5), _Stamp(device, 0.5)
        cbs = [clock] if teacher is None else [clock, before, after]
        learn = dms_learner(dls, recipe, teacher=teacher, cbs=cbs)
        with learn.no_bar(), learn.no_logging():
            learn.fit(1 + (WARM_UP + STEPS) // max(1, len(learn.dls.train)))  # any schedule: it costs nothing
    whole = step = clock.seconds_a_step
    teaching = [end - start for start, end in zip(before.times, after.times, strict=True)][WARM_UP:]
    teacher_seconds = sum(teaching) / max(1, len(teaching))
    if resize is not None:
        share = share_of_whole(learn.model, resize.build(), sets.train.shape, steps, recipe.schedule.epochs)
        step = teacher_seconds + share * max(0.0, whole - teacher_seconds)
    validation = whole / PASSES * len(sets.valid) / learn.dls.train.bs
    return Estimate(
        parameters=sum(p.numel() for p in learn.model.parameters()),
        macs=macs(learn.model, sets.train.shape),
        steps=steps,
        step_seconds=step,
        epoch_seconds=steps * step + validation,
        teacher_seconds=teacher_seconds,
    )


def held(recipe: Recipe, sets: Sets, device: torch.device, at_least: int = 0) -> str:
    """What a larger view of the training images takes, in words; "" if there is none, or if it takes fewer bytes.

    Raises:
        UserError: They are to be on the device, and do not fit.
    """
    if sets.plain is None:
        return ""
    crops, side = recipe.augment.build(), sets.held_size
    where = sets.place(crops, device, recipe.data.where)
    needed = sets.held_bytes(crops, where)
    if needed < at_least:
        return ""
    there = "on the disk" if where == "disk" else "of memory"
    return f"training images are held at {side}x{side} pixels for the teacher, in {amount(needed)} {there}"


class _Stamp(Callback):
    """Notes the time, shortly before or after a teacher has seen the batch."""

    run_valid = False

    def __init__(self, device: torch.device, offset: float):
        self.order, self.device, self.times = order_of("distill") + offset, device, []

    def after_pred(self) -> None:
        self.times.append(_now(self.device))


class _Clock(Callback):
    """Times some training steps, and then ends the training."""

    order, run_valid = 90, False

    def __init__(self, device: torch.device):
        self.device, self.times = device, []

    def after_batch(self) -> None:
        self.times.append(_now(self.device))
        if len(self.times) > WARM_UP + STEPS or (
            len(self.times) > WARM_UP + 1 and self.times[-1] - self.times[WARM_UP] > SECONDS
        ):
            raise CancelFitException

    def before_validate(self) -> None:
        self.learn.dl = []  # its time is not asked for

    @property
    def seconds_a_step(self) -> float:
        timed = self.times[min(WARM_UP, len(self.times) - 2) :]
        return (timed[-1] - timed[0]) / max(1, len(timed) - 1)


def _now(device: torch.device) -> float:
    """The time when `device` has done what it was asked to."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter()
