"""What a training will take, from a few steps of it."""

import time
from dataclasses import dataclass, replace

import torch
from fastai.callback.core import Callback, CancelFitException

from ..data import Sets
from ..learner import dms_learner
from ..models.macs import macs
from ..recipes import Recipe
from ..trained import Teacher

__all__ = ["Estimate", "estimate"]

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
    """

    parameters: int
    macs: int
    steps: int
    step_seconds: float
    epoch_seconds: float


def estimate(recipe: Recipe, sets: Sets, device: torch.device, teacher: Teacher | None = None) -> Estimate:
    """Train a few steps of a recipe and throw them away. torch's random states stay as before.

    A teacher that is there takes part. Without one, the recipe is trained as if it did not distil.
    """
    used = sets
    if teacher is None:
        recipe, used = replace(recipe, teacher=None, distill=None), replace(sets, unlabelled=None)
    recipe = replace(recipe, compile=None, early_stopping=None)  # nothing is validated
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices, device_type="cuda"):
        loading = {"crops": recipe.augment.build(), "device": device, "balance": recipe.data.balance}
        dls = used.loaders(recipe.data.batch_size, **loading)
        steps = len(sets.loaders(recipe.data.batch_size, **loading).with_unlabelled().train)
        clock = _Clock(device)
        learn = dms_learner(dls, recipe, teacher=teacher, cbs=clock)
        with learn.no_bar(), learn.no_logging():
            learn.fit(1 + (WARM_UP + STEPS) // max(1, len(learn.dls.train)))  # any schedule: it costs nothing
    step = clock.seconds_a_step
    validation = step / 3 * len(sets.valid) / learn.dls.train.bs  # a forward pass is a third of a step
    return Estimate(
        parameters=sum(p.numel() for p in learn.model.parameters()),
        macs=macs(learn.model, sets.train.images.shape[1:]),
        steps=steps,
        step_seconds=step,
        epoch_seconds=steps * step + validation,
    )


class _Clock(Callback):
    """Times some training steps, and then ends the training."""

    order, run_valid = 90, False

    def __init__(self, device: torch.device):
        self.device, self.times = device, []

    def after_batch(self) -> None:
        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)
        self.times.append(time.perf_counter())
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
