"""Sharpness-aware minimisation: the gradient of where the loss is worst nearby."""

import contextlib
from collections.abc import Iterator

import torch
from fastai.callback.core import Callback
from fastai.callback.training import GradientAccumulation
from torch import Tensor, nn

from ..errors import UserError
from ..losses import DMSLoss
from .distill import TeacherDistill
from .mixup import MixUp

__all__ = ["SAM"]


class SAM(Callback):
    """Step with the gradient at w + rho g / |g|, where g is the gradient at w (Foret et al., 2021, equation 3).

    A step costs a second forward and backward pass of the student, not of the teacher, whose logits are kept. Batch
    norms count the first pass alone in their statistics, and so do losses and metrics.
    """

    # Behind whatever else completes the targets (TeacherDistill, 5) and the loss.
    order, run_valid = 45, False
    targets: tuple[Tensor, ...] | None = None
    _stateattrs = ("targets",)

    def __init__(self, rho: float = 0.05):
        """
        Args:
            rho: Length of the step towards a worse loss, in the weights' units.

        Raises:
            UserError: `rho` is not above 0.
        """
        super().__init__()
        if not rho > 0:
            raise UserError(f"SAM's rho is {rho}; it must be above 0")
        self.rho = rho

    def before_train(self) -> None:
        rewriting = [cb for cb in self.learn.cbs if isinstance(cb, (MixUp, TeacherDistill))]
        if rewriting and not isinstance(self.learn.loss_func, DMSLoss):
            beside = type(rewriting[0]).__name__
            raise UserError(f"SAM beside {beside} needs loss_func=DMSLoss(): another loss cannot be asked twice")
        if any(isinstance(cb, GradientAccumulation) for cb in self.learn.cbs):
            raise UserError("SAM needs the gradient of a whole step; take a larger batch, not GradientAccumulation")
        scaler = getattr(self.learn, "scaler", None)
        if scaler is not None and scaler.is_enabled():
            raise UserError(
                "SAM needs gradients as they are, and to_fp16() scales them; leave it out, or take to_bf16()"
            )

    def after_pred(self) -> None:
        self.targets = self.learn.yb  # later, fastai and the others see the first alone

    def after_backward(self) -> None:
        learn = self.learn
        weights = [p for p in learn.model.parameters() if p.grad is not None]
        gradients = [p.grad for p in weights]
        norm = torch.stack(torch._foreach_norm(gradients)).norm()
        with torch.no_grad():
            uphill = torch._foreach_mul(gradients, self.rho / (norm + 1e-12))
            torch._foreach_add_(weights, uphill)
        learn.opt.zero_grad()
        with statistics_kept(learn.model), self.precision():
            pred = learn.model(*learn.xb)
        learn.loss_func(pred.float(), *self.targets).backward()
        with torch.no_grad():
            torch._foreach_sub_(weights, uphill)
        self.targets = None

    def precision(self) -> contextlib.AbstractContextManager:
        """That of the first pass: this package's callback's, fastai's, or float32."""
        learn = self.learn
        if hasattr(learn, "precision"):
            return learn.precision.context(learn.xb[0].device)
        return learn.mixed_precision.autocast if hasattr(learn, "mixed_precision") else contextlib.nullcontext()


@contextlib.contextmanager
def statistics_kept(model: nn.Module) -> Iterator[None]:
    """Batch norms normalise with their batch's statistics, and leave the running ones as they are."""
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 0.0
    try:
        yield
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
