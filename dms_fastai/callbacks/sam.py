"""Sharpness-aware minimisation: the gradient at the nearby point where the loss is worst."""

import contextlib
from collections.abc import Iterator

import torch
from fastai.callback.core import Callback
from fastai.callback.training import GradientAccumulation
from torch import Tensor, nn

from ..errors import UserError
from ..settings import Positive, checked
from ..training.losses import DMSLoss
from ..training.parts import order_of
from .distill import TeacherDistill
from .mixup import MixUp
from .twins import refuse_twin

__all__ = ["SAM"]


@checked
class SAM(Callback):
    """Step with the gradient at w + rho g / |g|, where g is the gradient at w (Foret et al., 2021, equation 3).

    Each step costs a second forward and backward pass of the student. The teacher's logits are kept from the first
    pass. Batch norms' running statistics, losses and metrics come from the first pass alone.
    """

    order, run_valid = order_of("sam"), False
    targets: tuple[Tensor, ...] | None = None
    _stateattrs = ("targets",)

    def __init__(self, rho: Positive = 0.05):
        """
        Args:
            rho: Length of the step towards a worse loss, in the weights' units.

        Raises:
            UserError: A value out of range.
        """
        super().__init__()
        self.rho = rho

    def before_train(self) -> None:
        refuse_twin(self)
        rewriting = [cb for cb in self.learn.cbs if isinstance(cb, (MixUp, TeacherDistill))]
        if rewriting and not isinstance(self.learn.loss_func, DMSLoss):
            beside = type(rewriting[0]).__name__
            raise UserError(f"SAM beside {beside} needs loss_func=DMSLoss(): its second pass needs all the targets")
        if any(isinstance(cb, GradientAccumulation) for cb in self.learn.cbs):
            raise UserError("SAM needs the gradient of a whole step; take a larger batch, not GradientAccumulation")
        scaler = getattr(self.learn, "scaler", None)
        if scaler is not None and scaler.is_enabled():
            raise UserError(
                "SAM needs unscaled gradients, and to_fp16() scales them; leave to_fp16() out, or take to_bf16()"
            )

    def after_pred(self) -> None:
        self.targets = self.learn.yb  # after the loss, only the first target is left

    def after_backward(self) -> None:
        learn = self.learn
        weights = [p for p in learn.model.parameters() if p.grad is not None]
        gradients = [p.grad for p in weights]
        norm = torch.stack(torch._foreach_norm(gradients)).norm()
        with torch.no_grad():
            uphill = torch._foreach_mul(gradients, self.rho / (norm + 1e-12))
            torch._foreach_add_(weights, uphill)
        learn.opt.zero_grad()
        try:
            with statistics_kept(learn.model), self.precision():
                pred = learn.model(*learn.xb)
            learn.loss_func(pred.float(), *self.targets).backward()
        finally:  # an exception leaves no weights uphill, either
            with torch.no_grad():
                torch._foreach_sub_(weights, uphill)
        self.targets = None

    def precision(self) -> contextlib.AbstractContextManager:
        """The precision of the first pass: that of this package's callback, of fastai's, or float32."""
        learn = self.learn
        if hasattr(learn, "bf16"):
            return learn.bf16.context(learn.xb[0].device)
        stock = getattr(learn, "mixed_precision", None)  # torch's replicas have one that is None
        return contextlib.nullcontext() if stock is None else stock.autocast


@contextlib.contextmanager
def statistics_kept(model: nn.Module) -> Iterator[None]:
    """Have batch and instance norms use the batch's statistics without updating the running ones."""
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._NormBase)]
    momenta = [norm.momentum for norm in norms]
    counters = [norm.num_batches_tracked for norm in norms if norm.num_batches_tracked is not None]
    counted = [counter.clone() for counter in counters]
    for norm in norms:
        norm.momentum = 0.0
    try:
        yield
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
        for counter, before in zip(counters, counted, strict=True):
            counter.copy_(before)
