"""torch's optimisers for fastai, in a wrapper that costs less than fastai's and can exempt weights from decay."""

from collections import defaultdict
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any

import timm.optim
import torch
from fastai.optimizer import OptimWrapper
from torch import nn

from ..errors import UserError, unknown
from ..settings import Count, Momentum, Names, NotNegative, Positive, Share, checked
from .muon import COEFFICIENTS, StackedMuon

__all__ = [
    "OPTIMIZERS",
    "SGD",
    "AdamW",
    "GroupedOptimWrapper",
    "Lookahead",
    "Muon",
    "optimizer",
    "parameters_called",
]

FASTAI_NAMES = {"lr": "lr", "mom": "momentum", "wd": "weight_decay"}


@checked
@dataclass(frozen=True)
class SGD:
    """torch's fused SGD with momentum and L2 weight decay.

    fastai's own SGD decouples weight decay from the gradient; with momentum 0.9, that decay is a tenth as strong.

    Attributes:
        lr: Highest learning rate.
        momentum: Momentum as in torch, without dampening.
        weight_decay: Factor with which the weights are added to their gradients.
        wd_bn_bias: Whether batch norms and biases decay, too, as in the paper.
        nesterov: Whether the step looks ahead along the momentum (Nesterov, 1983).
        no_decay: Parameters that do not decay, such as ["pos_embed"]: whole names, or the last parts of several.
    """

    lr: Positive = 0.1
    momentum: Momentum = 0.9
    weight_decay: NotNegative = 5e-4
    wd_bn_bias: bool = True
    nesterov: bool = False
    no_decay: Names = ()

    def over(self, groups: list[dict[str, Any]], lr: float) -> torch.optim.Optimizer:
        """torch's optimiser for these parameter groups.

        Raises:
            UserError: Nesterov's step without momentum.
        """
        if self.nesterov and not self.momentum:
            raise UserError("optimizer.nesterov needs a momentum, and optimizer.momentum is 0")
        return LateSGD(groups, lr, self.momentum, weight_decay=self.weight_decay, nesterov=self.nesterov, fused=True)


class LateSGD(torch.optim.SGD):
    """torch's SGD, whose fused step also takes weights that get their first gradient when others have had one."""

    def _init_group(self, group: dict[str, Any], params: list, grads: list, momentum_buffer_list: list) -> bool:
        sparse = super()._init_group(group, params, grads, momentum_buffer_list)
        if any(buffer is not None for buffer in momentum_buffer_list):
            late = [place for place, buffer in enumerate(momentum_buffer_list) if buffer is None]
            for place in late:
                momentum_buffer_list[place] = torch.zeros_like(params[place])  # without dampening, as if it were first
        return sparse


@checked
@dataclass(frozen=True)
class AdamW:
    """torch's fused AdamW, Adam with decoupled weight decay (Loshchilov and Hutter, 2019).

    Attributes:
        lr: Highest learning rate.
        momentum: beta1, under the name that it has in every optimiser here: a one-cycle schedule moves it.
        beta2: Share of the average of squared gradients that each step keeps.
        eps: Added to the root of that average.
        weight_decay: Share of lr by which each step shrinks what decays.
        wd_bn_bias: Whether norms and biases, the parameters with one dimension, decay, too.
        no_decay: Parameters that do not decay, such as ["pos_embed"]: whole names, or the last parts of several.
    """

    lr: Positive = 1e-3
    momentum: Momentum = 0.9
    beta2: Momentum = 0.999
    eps: Positive = 1e-8
    weight_decay: NotNegative = 0.01
    wd_bn_bias: bool = False
    no_decay: Names = ()

    def over(self, groups: list[dict[str, Any]], lr: float) -> torch.optim.Optimizer:
        """torch's optimiser for these parameter groups."""
        betas = (self.momentum, self.beta2)
        return torch.optim.AdamW(groups, lr, betas, self.eps, self.weight_decay, fused=True)


@checked
@dataclass(frozen=True)
class Muon:
    """timm's Muon: a matrix moves by its momentum, made orthogonal by a Newton-Schulz iteration (Jordan et al., 2024).

    A convolution is the matrix of its filters. Norms, biases and thin matrices get NAdam's step.

    Attributes:
        lr: Highest learning rate of the matrices.
        momentum: Nesterov's momentum of the matrices.
        weight_decay: Share of lr by which each step shrinks what decays.
        wd_bn_bias: Whether norms and biases decay, too.
        rest: Learning rate of the rest, as a multiple of `lr`.
        steps: Newton-Schulz iterations.
        no_decay: Parameters that do not decay, such as ["pos_embed"]: whole names, or the last parts of several.
    """

    lr: Positive = 0.05
    momentum: Momentum = 0.6
    weight_decay: NotNegative = 0.01
    wd_bn_bias: bool = False
    rest: Positive = 0.1
    steps: Count = 3
    no_decay: Names = ()

    def over(self, groups: list[dict[str, Any]], lr: float) -> torch.optim.Optimizer:
        """timm's optimiser for these parameter groups, whose matrices move in stacks on a GPU."""
        return StackedMuon(
            groups,
            lr,
            weight_decay=self.weight_decay,
            momentum=self.momentum,
            nesterov=True,
            ns_steps=self.steps,
            ns_coefficients=COEFFICIENTS,
            adjust_lr_fn="original",
            fallback_lr_scale=self.rest,
        )


@checked
@dataclass(frozen=True)
class Lookahead:
    """Slow weights that follow the weights of an optimiser, the fast ones (Zhang et al., 2019).

    As timm has it, they begin as the fast weights after `k` steps, and not as those before the first.

    Attributes:
        k: Steps from one move of the slow weights to the next.
        alpha: How far they move towards the fast weights, as a share of the way.
    """

    k: Count = 5
    alpha: Share = 0.5

    def around(self, fast: torch.optim.Optimizer) -> torch.optim.Optimizer:
        return timm.optim.Lookahead(fast, self.alpha, self.k)


OPTIMIZERS = {"sgd": SGD, "muon": Muon, "adamw": AdamW}


def optimizer(
    params: Any,
    lr: float | slice,
    settings: Any,
    lookahead: Lookahead | None = None,
    undecayed: Collection[nn.Parameter] = (),
) -> "GroupedOptimWrapper":
    """Build a fastai optimiser.

    Args:
        params: Parameters, or groups of them, as a fastai splitter gives them.
        lr: Learning rate of all groups, or a slice of rates from the first group to the last, as in fastai.
        settings: An instance of one of `OPTIMIZERS`: it has lr, momentum and wd_bn_bias, and `over`.
        lookahead: Adds slow weights, if given.
        undecayed: Parameters that do not decay, beside the norms and biases: those that `settings.no_decay` names.
    """
    groups = _groups(params)
    halves = [half for group in groups for half in _halves(group, settings.wd_bn_bias, undecayed)]
    made = settings.over(halves, lr.stop if isinstance(lr, slice) else lr)
    opt = GroupedOptimWrapper(made if lookahead is None else lookahead.around(made), len(halves) // len(groups))
    opt.set_hyper("lr", lr)
    return opt


def parameters_called(names: Iterable[str], model: nn.Module) -> list[nn.Parameter]:
    """The parameters of a model with these names. What is no whole name stands for all names that end in its parts.

    Raises:
        UserError: No name ends so.
    """
    whole, ends = dict(model.named_parameters()), defaultdict(list)
    for name, parameter in whole.items():
        parts = name.split(".")
        for start in range(len(parts)):
            ends[".".join(parts[start:])].append(parameter)
    for name in names:
        if name not in ends:
            raise unknown("parameter in optimizer.no_decay", name, ends)
    return [p for name in names for p in ([whole[name]] if name in whole else ends[name])]


class GroupedOptimWrapper(OptimWrapper):
    """`OptimWrapper` whose groups may each be two of torch's: parameters that decay, and parameters that do not.

    What fastai sets or reads for a group, such as a slice of learning rates or `freeze_to`, holds for both halves. Only
    weight decay skips the second half. Hyperparameters are set and read in every batch, so both are kept cheap.
    """

    def __init__(self, opt: torch.optim.Optimizer, halves: int = 1):
        """
        Args:
            opt: A built optimiser with fastai's groups in order, the two halves of a group next to each other.
            halves: How many of torch's groups make one of fastai's, 1 or 2.
        """
        super().__init__(opt=opt)
        self.halves = halves

    def step(self, closure: Any = None) -> None:
        self.opt.step(closure)

    def zero_grad(self) -> None:
        self.opt.zero_grad()

    @property
    def fast(self) -> torch.optim.Optimizer:
        """The optimiser inside Lookahead, which keeps its slow weights there, too; without Lookahead, the only one."""
        return getattr(self.opt, "_base_optimizer", self.opt)

    def clear_state(self) -> None:
        """Forget momenta and slow weights, as fastai does when it freezes or unfreezes."""
        self.fast.state = defaultdict(dict)

    def forget_slow_weights(self) -> None:
        """Have Lookahead, if it is there, begin anew, as at the start, and keep the momenta."""
        for state in self.fast.state.values():
            state.pop("lookahead_slow_buff", None)

    @property
    def hypers(self) -> list[dict[str, float]]:
        return [{name: _get(group, name) for name in FASTAI_NAMES} for group in self.opt.param_groups[:: self.halves]]

    def set_hyper(self, k: str, v: Any) -> None:
        if not isinstance(v, float):
            super().set_hyper(k, v)  # slices and lists, one value a group
            return
        for group in self._set_in(k):
            _set(group, k, v)

    def _set_hyper(self, k: str, v: Iterable[float]) -> None:
        values = [value for value in v for _ in range(1 if k == "wd" else self.halves)]
        for group, value in zip(self._set_in(k), values, strict=True):
            _set(group, k, value)

    def _set_in(self, k: str) -> list[dict[str, Any]]:
        return self.opt.param_groups[:: self.halves if k == "wd" else 1]

    @property
    def param_lists(self) -> list[list[nn.Parameter]]:
        groups, n = self.opt.param_groups, self.halves
        return [[p for group in groups[i : i + n] for p in group["params"]] for i in range(0, len(groups), n)]


def _get(group: dict[str, Any], name: str) -> float:
    """A hyperparameter under fastai's name; the momentum of Adam and its like is the first of two betas."""
    return group["betas"][0] if name == "mom" and "momentum" not in group else group[FASTAI_NAMES[name]]


def _set(group: dict[str, Any], name: str, value: float) -> None:
    value = float(value)  # schedules compute NumPy's, which a checkpoint would not load
    if name == "mom" and "momentum" not in group:
        group["betas"] = (value, *group["betas"][1:])
    else:
        group[FASTAI_NAMES[name]] = value


def _groups(params: Any) -> list[list[nn.Parameter]]:
    params = list(params)
    return [params] if not params or isinstance(params[0], torch.Tensor) else [list(group) for group in params]


def _halves(group: list[nn.Parameter], wd_bn_bias: bool, undecayed: Collection[nn.Parameter]) -> list[dict[str, Any]]:
    """The group for torch; in two halves if some parameters are not to decay.

    These are the `undecayed` and, without `wd_bn_bias`, norms and biases: the parameters with one dimension.
    """
    if wd_bn_bias and not undecayed:
        return [{"params": group}]
    named = {id(p) for p in undecayed}
    exempt = [id(p) in named or (p.ndim <= 1 and not wd_bn_bias) for p in group]
    decayed, rest = ([p for p, e in zip(group, exempt, strict=True) if e is half] for half in (False, True))
    return [{"params": decayed}, {"params": rest, "weight_decay": 0.0}]
