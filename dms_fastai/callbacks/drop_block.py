"""DropBlock's rate, opposite to the learning rate."""

from collections.abc import Callable

import numpy as np
from fastai.callback.schedule import ParamScheduler
from fastai.learner import Learner

from ..errors import UserError
from ..models.dropblock import DropBlock
from ..settings import Share, checked
from ..training.parts import order_of
from .releasing import Releasing

__all__ = ["DropBlockSchedule", "highest_lr", "lr_schedules"]


@checked
class DropBlockSchedule(Releasing):
    """Raise the rate of the model's `DropBlock` modules as the learning rate falls (as HCGNet's authors do).

    The rate of a step is `highest * (1 - lr / highest lr of the fit)`: it begins anew with every cycle of the learning
    rate. Nothing but the learning rate goes into it, so that a resumed fit goes on with the same rates. Without a
    schedule of the learning rate it stays 0. After the fit, the modules have the rates that they had.
    """

    order, run_valid = order_of("drop_block"), False
    blocks: tuple[DropBlock, ...] = ()
    rates: tuple[float, ...] = ()
    _stateattrs = ("blocks", "rates")

    def __init__(self, highest: Share = 0.1):
        """
        Args:
            highest: The rate at a learning rate of 0.

        Raises:
            UserError: A value out of range.
        """
        super().__init__()
        self.highest = highest

    def before_train(self) -> None:
        if not self.blocks:
            self.blocks = tuple(module for module in self.learn.model.modules() if isinstance(module, DropBlock))
            self.rates = tuple(block.rate for block in self.blocks)
        if not self.blocks:
            raise UserError(
                f"{type(self.learn.model).__name__} has no DropBlock whose rate could be scheduled; take another "
                f"network, or leave [drop_block] out: --set drop_block=false"
            )
        self.highest_lr = highest_lr(self.learn)

    def before_batch(self) -> None:
        share = 1 - self.learn.opt.hypers[-1]["lr"] / self.highest_lr
        rate = self.highest * max(share, 0.0)  # the peak may lie between two of the rates that were looked at
        for block in self.blocks:
            block.rate = rate

    def release(self) -> None:
        """Give the modules their own rates back."""
        for block, rate in zip(self.blocks, self.rates, strict=True):
            block.rate = rate
        self.blocks = self.rates = ()


def highest_lr(learn: Learner) -> float:
    """The highest learning rate of a fit: of its schedule, or the constant one; of the last group."""
    rates = [np.ravel(schedule(pct))[-1] for schedule in lr_schedules(learn) for pct in np.linspace(0, 1, 1001)]
    return float(max(rates, default=learn.opt.hypers[-1]["lr"]))


def lr_schedules(learn: Learner) -> list[Callable[[float], float | np.ndarray]]:
    """The schedules of a fit's learning rate, by the share of training that is done; none where it is constant."""
    return [cb.scheds["lr"] for cb in learn.cbs if isinstance(cb, ParamScheduler) and "lr" in cb.scheds]
