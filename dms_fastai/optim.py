"""torch's optimisers as fastai wants them, without what fastai's wrapper costs a step or leaves out."""

from collections.abc import Iterable
from typing import Any

import torch
from fastai.optimizer import OptimWrapper
from timm.optim import Lookahead
from torch import nn

from .recipes import Lookahead as LookaheadTable
from .recipes import Optimizer

__all__ = ["GroupedOptimWrapper", "sgd"]

FASTAI_NAMES = {"lr": "lr", "mom": "momentum", "wd": "weight_decay"}


def sgd(params: Any, lr: float, settings: Optimizer, lookahead: LookaheadTable | None) -> "GroupedOptimWrapper":
    """torch's fused SGD, inside Lookahead where the recipe has one, as a fastai optimiser.

    Not fastai's own SGD: its weight decay is decoupled from the gradient, which with momentum is a tenth as strong.

    Args:
        params: Of a fastai splitter: parameters, or groups of them.
        lr: Learning rate of all groups.
        settings: Momentum and weight decay, and whether norms and biases decay.
        lookahead: Slow weights, where wanted.
    """
    groups = _groups(params)
    halves = [half for group in groups for half in _halves(group, settings.wd_bn_bias)]
    base = torch.optim.SGD(halves, lr=lr, momentum=settings.momentum, weight_decay=settings.weight_decay, fused=True)
    return GroupedOptimWrapper(
        base if lookahead is None else Lookahead(base, lookahead.alpha, lookahead.k), len(halves) // len(groups)
    )


class GroupedOptimWrapper(OptimWrapper):
    """`OptimWrapper` over an SGD in which each of fastai's groups may be two of torch's: what decays and what does not.

    Whatever is set or read by fastai's group, a slice of learning rates or `freeze_to`, takes both halves alike; only
    weight decay leaves the second half alone. Hyperparameters are read and set every batch, so both are kept cheap.
    """

    def __init__(self, opt: torch.optim.Optimizer, halves: int = 1):
        """
        Args:
            opt: A built optimiser with fastai's groups in order, the halves of one beside each other.
            halves: torch groups to each of fastai's, 1 or 2.
        """
        super().__init__(opt=opt)
        self.halves = halves

    def step(self, closure: Any = None) -> None:
        self.opt.step(closure)

    def zero_grad(self) -> None:
        self.opt.zero_grad()

    @property
    def hypers(self) -> list[dict[str, float]]:
        groups = self.opt.param_groups[:: self.halves]
        return [{name: group[key] for name, key in FASTAI_NAMES.items()} for group in groups]

    def set_hyper(self, k: str, v: Any) -> None:
        if not isinstance(v, float):
            super().set_hyper(k, v)  # slices and lists, one value a group
            return
        for group in self._set_in(k):
            group[FASTAI_NAMES[k]] = float(v)  # schedules compute NumPy's, which a checkpoint would not load

    def _set_hyper(self, k: str, v: Iterable[float]) -> None:
        values = [value for value in v for _ in range(1 if k == "wd" else self.halves)]
        for group, value in zip(self._set_in(k), values, strict=True):
            group[FASTAI_NAMES[k]] = float(value)

    def _set_in(self, k: str) -> list[dict[str, Any]]:
        return self.opt.param_groups[:: self.halves if k == "wd" else 1]

    @property
    def param_lists(self) -> list[list[nn.Parameter]]:
        groups, n = self.opt.param_groups, self.halves
        return [[p for group in groups[i : i + n] for p in group["params"]] for i in range(0, len(groups), n)]


def _groups(params: Any) -> list[list[nn.Parameter]]:
    params = list(params)
    return [params] if not params or isinstance(params[0], torch.Tensor) else [list(group) for group in params]


def _halves(group: list[nn.Parameter], wd_bn_bias: bool) -> list[dict[str, Any]]:
    """The group for torch; in two where norms and biases, all the parameters of one dimension, are not to decay."""
    if wd_bn_bias:
        return [{"params": group}]
    decayed, undecayed = ([p for p in group if (p.ndim > 1) == decays] for decays in (True, False))
    return [{"params": decayed}, {"params": undecayed, "weight_decay": 0.0}]
