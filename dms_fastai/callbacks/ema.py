"""The exponential moving average of the weights, validated and exported in their place."""

import copy
from typing import Any

import torch
from fastai.callback.core import Callback
from torch import Tensor, nn

from ..errors import UserError

__all__ = ["EMA"]


class EMA(Callback):
    """Average the weights over the steps, validate with the average, and leave it in the model when the fit has ended.

    Batch norms' statistics are averaged as the weights are that they belong to. The average stays in the Learner
    from validation to the end of the epoch: `SaveModelCallback` and the like save what has been validated.
    """

    order, run_valid = 8, True
    average: nn.Module | None = None
    raw: nn.Module | None = None
    saved: dict[str, Any] | None = None
    _stateattrs = ("average", "raw", "saved", "pairs")

    def __init__(self, decay: float = 0.999, every: int = 1):
        """
        Args:
            decay: Share of the average that a step leaves; in step n at most (1 + n) / (10 + n), so that the first
                weights are soon forgotten.
            every: Average only every so many steps, by decay to the power of `every`: as good, and less work.

        Raises:
            UserError: `decay` outside 0...1, or `every` below 1.
        """
        super().__init__()
        if not 0 < decay < 1:
            raise UserError(f"EMA's decay is {decay}; it must be between 0 and 1")
        if every < 1:
            raise UserError(f"EMA's every is {every}; it must be at least 1")
        self.decay, self.every, self.steps = decay, every, 0
        self.pairs: tuple[list[Tensor], list[Tensor]] | None = None

    def before_fit(self) -> None:
        self.put_back()  # where an exception ended the fit before
        model = self.learn.model
        self.average, self.steps = copy.deepcopy(model).eval().requires_grad_(False), 0
        if self.saved is not None:
            self.average.load_state_dict(self.saved["average"])
            self.steps, self.saved = self.saved["steps"], None
        ours, theirs = (list(m.state_dict().values()) for m in (self.average, model))
        floats = [index for index, value in enumerate(ours) if value.is_floating_point()]
        self.pairs = [ours[i] for i in floats], [theirs[i] for i in floats]

    def before_epoch(self) -> None:
        self.put_back()

    def after_step(self) -> None:
        self.steps += 1
        if self.steps % self.every:
            return
        decay = min(self.decay, (1 + self.steps) / (10 + self.steps)) ** self.every
        with torch.no_grad():
            torch._foreach_lerp_(*self.pairs, 1 - decay)

    def before_validate(self) -> None:
        if self.average is not None and self.raw is None:  # outside a fit the model is the average already
            self.raw, self.learn.model = self.learn.model, self.average

    def after_fit(self) -> None:
        self.put_back()
        if self.average is not None:  # None where another callback has called the fit off before it began
            self.learn.model.load_state_dict(self.average.state_dict())
        self.average = self.pairs = None

    def put_back(self) -> None:
        """Have the Learner train the weights that the optimiser knows."""
        if self.raw is not None:
            self.learn.model, self.raw = self.raw, None

    def state(self) -> dict[str, Any]:
        """What `restore` needs to go on with the average."""
        return {"average": self.average.state_dict(), "steps": self.steps}

    def restore(self, saved: dict[str, Any]) -> None:
        """Have the next fit go on with an average that was saved."""
        self.saved = saved
