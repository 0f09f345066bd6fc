"""Knowledge distillation: a teacher whose logits enter the loss."""

from typing import Any

import torch
from fastai.callback.core import Callback
from torch import Tensor, nn

from ..data.loader import statistics, unlabelled_images, vocabulary
from ..errors import UserError
from ..models.fold import fold_batch_norms
from ..trained import check_teacher, images_of, load_teacher, renormalize
from ..training.losses import Distillation, DMSLoss, Targets
from ..training.parts import order_of
from .bf16 import has_bf16

__all__ = ["TeacherDistill"]


class TeacherDistill(Callback):
    """Show each training batch, as mixed, to a frozen teacher, and pass the teacher's logits to the loss.

    With a `DMSLoss`, the logits are added to the targets, and the loss gives equation (ii) or (iv), with its own alpha
    and T. Any other loss becomes `alpha T^2 KL(teacher || student) + (1 - alpha) loss`. The teacher is in evaluation
    mode, has no gradients, plays no part in validation, and stays out of exported and pickled Learners.

    Of an image without a label, as `ImageLoaders.with_unlabelled` gives them, a `DMSLoss` is the teacher's part alone.
    """

    # The loss is complete before gradient accumulation (6) divides it; mixed precision is still on in after_pred.
    order, run_valid = order_of("distill"), False
    teacher = network = made_of = logits = None
    _stateattrs = ("teacher", "network", "made_of", "logits")

    def __init__(self, teacher: Any, **distillation: Any):
        """
        Args:
            teacher: Whatever `load_teacher` takes; for a .pkl that you trust, give `load_teacher(file, trust=True)`.
            distillation: alpha, T and divergence, as in `Distillation`. Not with a `DMSLoss`, which has its own.

        Raises:
            UserError: There is no such teacher, or a value is out of range.
        """
        super().__init__()
        self.given, self.distillation = sorted(distillation), Distillation(**distillation)
        self.teacher = load_teacher(teacher)

    def before_train(self) -> None:
        """Check that teacher and student fit, and put a faster copy of the teacher on the student's device."""
        if self.teacher is None:
            raise UserError(
                "this Learner was exported without its teacher; set learn.teacher_distill.teacher = load_teacher(...), "
                "or remove the callback: learn.remove_cb(TeacherDistill)"
            )
        if self.given and isinstance(self.learn.loss_func, DMSLoss):
            raise UserError(f"{', '.join(self.given)} given to TeacherDistill, but DMSLoss has its own; set it there")
        unlabelled = unlabelled_images(self.learn.dls)
        if isinstance(self.learn.loss_func, DMSLoss):
            self.learn.loss_func.partial = unlabelled > 0
        elif unlabelled:
            raise UserError(f"{unlabelled} training images have no label, for which the loss must be DMSLoss()")
        if self.network is not None and self.made_of is self.teacher:
            return
        dls = self.learn.dls
        images = images_of(dls)
        if images is not None:
            check_teacher(self.teacher, getattr(dls, "c", None), images, vocabulary(dls))
        device = next(self.learn.model.parameters()).device
        self.made_of = self.teacher
        self.network = fold_batch_norms(self.teacher.model).to(device, memory_format=torch.channels_last)
        self.affine = self._affine(device)
        if hasattr(self.learn, "bf16") and has_bf16(device):
            cast_weights(self.network, torch.bfloat16)

    def after_pred(self) -> None:
        """Run the teacher on the images that the student has just seen."""
        x = self.learn.xb[0]
        if self.affine is not None:
            scale, shift = self.affine
            x = x * scale + shift
        with torch.no_grad():
            self.logits = self.network(x)
        theirs, ours = self.logits.shape[1], self.learn.pred.shape[1]
        if theirs != ours:
            raise UserError(f"the teacher gives {theirs} logits an image, the student {ours}; they need the same")
        if isinstance(self.learn.loss_func, DMSLoss):
            y_a, y_b, lam = (*self.learn.yb, None, None)[:3]
            self.learn.yb = (y_a, y_b, lam, self.logits)

    def after_loss(self) -> None:
        if isinstance(self.learn.loss_func, DMSLoss):
            self.learn.yb = self.learn.yb[:1]
            return
        soft = self.distillation.soft(self.learn.pred, self.logits, Targets(self.learn.yb[0]))
        self.learn.loss_grad = self.distillation.total(self.learn.loss_grad, soft)
        self.learn.loss = self.learn.loss_grad.detach().clone()

    def after_cancel_batch(self) -> None:
        if isinstance(self.learn.loss_func, DMSLoss):
            self.learn.yb = self.learn.yb[:1]

    def after_fit(self) -> None:
        self.network = self.made_of = self.logits = None

    def _affine(self, device: torch.device) -> tuple[Tensor, Tensor] | None:
        """Scale and shift from the student's normalisation to the teacher's; None where they are the same."""
        theirs, ours = (self.teacher.mean, self.teacher.std), statistics(self.learn.dls)
        if theirs[0] is None or theirs == ours:
            return None
        return tuple(t.to(device) for t in renormalize(ours, theirs))


def cast_weights(network: nn.Module, dtype: torch.dtype) -> None:
    """Cast a frozen network's large weights once to the type that autocast would cast them to in every step."""
    for module in network.modules():
        if type(module) in (nn.Conv2d, nn.Linear):  # not their subclasses, which may compute with their weights
            module.to(dtype)
