"""The exponential moving average of the weights, validated and exported in their place."""

import copy
from typing import Any

import torch
from torch import Tensor, nn

from ..settings import Count, Fraction, checked
from ..training.parts import order_of
from .releasing import Releasing
from .twins import refuse_twin

__all__ = ["EMA"]


@checked
class EMA(Releasing):
    """Average the weights over the steps, validate with the average, and leave it in the model when the fit has ended.

    The statistics of batch norms are averaged like the weights. The average stays in the Learner from validation to the
    end of the epoch, so that `SaveModelCallback` and the like save what has been validated. If an exception ends the
    fit, the model keeps the weights of the last step, and not their average.
    """

    order, run_valid = order_of("ema"), True
    average: nn.Module | None = None
    raw: nn.Module | None = None
    saved: dict[str, Any] | None = None
    _stateattrs = ("average", "raw", "saved", "pairs", "counters")

    def __init__(self, decay: Fraction = 0.999, every: Count = 1):
        """
        Args:
            decay: Share of the average that each step keeps; in step n at most (1 + n) / (10 + n), so that the first
                weights are soon forgotten.
            every: Average only every so many steps, and before validation and at the end, with decay to the power of
                the steps since: as good, and less work.

        Raises:
            UserError: A value out of range.
        """
        super().__init__()
        self.decay, self.every, self.steps, self.since = decay, every, 0, 0
        self.pairs: tuple[list[Tensor], list[Tensor]] | None = None
        self.counters: list[tuple[Tensor, Tensor]] | None = None

    def before_fit(self) -> None:
        super().before_fit()
        refuse_twin(self)
        if self.saved is not None:  # maybe after the last epoch
            self.begin()

    def before_train(self) -> None:
        if self.average is None:  # not before_fit, which fastai also sends before it validates or predicts
            self.begin()

    def begin(self) -> None:
        """Begin to average, or go on with what was saved."""
        model = self.learn.model
        self.average, self.steps, self.since = copy.deepcopy(model).eval().requires_grad_(False), 0, 0
        if self.saved is not None:
            self.average.load_state_dict(self.saved["average"])
            self.steps, self.since, self.saved = self.saved["steps"], self.saved["since"], None
        ours, theirs = (list(m.state_dict().values()) for m in (self.average, model))
        places = {value.data_ptr(): index for index, value in enumerate(ours) if value.is_floating_point()}
        floats = sorted(places.values())  # of weights that are shared, once
        self.pairs = [ours[i] for i in floats], [theirs[i] for i in floats]
        self.counters = [pair for pair in zip(ours, theirs, strict=True) if not pair[0].is_floating_point()]

    def before_epoch(self) -> None:
        self.put_back()

    def after_step(self) -> None:
        self.steps, self.since = self.steps + 1, self.since + 1
        for ours, theirs in self.counters:  # batches are counted, not averaged
            ours.copy_(theirs)
        if self.since == self.every:
            self.catch_up()

    def catch_up(self) -> None:
        """Average the weights as they are now, for all steps since the last time."""
        if not self.since:
            return
        decay = min(self.decay, (1 + self.steps) / (10 + self.steps)) ** self.since
        with torch.no_grad():
            torch._foreach_lerp_(*self.pairs, 1 - decay)
        self.since = 0

    def before_validate(self) -> None:
        if self.average is not None and self.raw is None:  # outside a fit the model is the average already
            self.catch_up()
            self.raw, self.learn.model = self.learn.model, self.average

    def after_fit(self) -> None:
        self.put_back()
        if self.average is not None:  # None outside a fit, or if another callback cancelled it before it began
            self.catch_up()
            self.learn.model.load_state_dict(self.average.state_dict())
            if hasattr(self.learn.opt, "forget_slow_weights"):  # Lookahead's, of before the average
                self.learn.opt.forget_slow_weights()
        self.release()

    def release(self) -> None:
        """Give the average up."""
        self.put_back()
        self.average = self.pairs = self.counters = None

    def put_back(self) -> None:
        """Put the weights that the optimiser trains back into the Learner."""
        if self.raw is not None:
            self.learn.model, self.raw = self.raw, None

    def state(self) -> dict[str, Any]:
        """What `restore` needs to resume the average."""
        return {"average": self.average.state_dict(), "steps": self.steps, "since": self.since}

    def restore(self, saved: dict[str, Any]) -> None:
        """Have the next fit resume with a saved average."""
        self.saved = saved
