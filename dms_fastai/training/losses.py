"""`DMSLoss`, one loss for all stages, and a teacher's part in it; the mathematics is in `equations`."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import UserError, unknown
from ..settings import NotNegative, OneOf, Pixels, Positive, Share, checked
from .equations import (
    IGNORED,
    Reduction,
    cross_entropy,
    dist_divergence,
    dkd_divergence,
    kd_divergence,
    mixup_loss,
    reduced,
    standardized,
    widened,
)

__all__ = [
    "DIST",
    "DIVERGENCES",
    "DKD",
    "KL",
    "UNLABELLED",
    "DMSLoss",
    "Distillation",
    "Targets",
    "Teaching",
    "check_class_weights",
    "check_standardized",
]

UNLABELLED = IGNORED  # in place of the class of an image that has none; torch's cross-entropy ignores it


@dataclass(frozen=True)
class Targets:
    """The targets of a batch.

    Attributes:
        y_a: The classes, shape (B,), or probabilities, shape (B, C).
        y_b, lam: For mixed images: the partners' classes and the share of the first image, as in `mixup_loss`.
        partial: Whether a class may be `UNLABELLED`.
    """

    y_a: Tensor
    y_b: Tensor | None = None
    lam: Tensor | float | None = None
    partial: bool = False

    @property
    def sides(self) -> list[tuple[Tensor, Tensor | float]]:
        """The classes of the images that are mixed, each with its share."""
        return [(self.y_a, 1.0)] if self.y_b is None else [(self.y_a, self.lam), (self.y_b, 1 - self.lam)]


@checked
@dataclass(frozen=True)
class KL:
    """The paper's divergence, `kd_divergence`.

    Attributes:
        reduction: "batchmean" sums over the classes, as the divergence is defined. "mean" averages over the classes, as
            the authors' code does, which gives 1/C of that.
    """

    reduction: Literal["batchmean", "mean"] = "batchmean"

    def __call__(self, pred: Tensor, logits: Tensor, T: float, targets: Targets, reduction: Reduction) -> Tensor:
        return kd_divergence(pred, logits, T, self.reduction, reduction)


@checked
@dataclass(frozen=True)
class DKD:
    """Decoupled distillation, `dkd_divergence`. For mixed images, it weights both labels by their shares.

    An image without a label has no true class: it gets the ordinary divergence, `kd_divergence`.

    Attributes:
        beta: Weight of the classes other than the true one.
    """

    beta: NotNegative = 8.0

    def __call__(self, pred: Tensor, logits: Tensor, T: float, targets: Targets, reduction: Reduction) -> Tensor:
        if targets.y_a.is_floating_point():
            raise UserError("dkd needs a class for each image, and these targets are probabilities; take kl or dist")
        towards_a = self._towards(pred, logits, targets.y_a, T, targets.partial)
        if targets.y_b is None:
            return reduced(towards_a, None, None, reduction)
        towards_b = self._towards(pred, logits, targets.y_b, T, targets.partial)
        return reduced(targets.lam * towards_a + (1 - targets.lam) * towards_b, None, None, reduction)

    def _towards(self, pred: Tensor, logits: Tensor, y: Tensor, T: float, partial: bool) -> Tensor:
        if not partial:
            return dkd_divergence(pred, logits, y, T, self.beta, "none")
        decoupled = dkd_divergence(pred, logits, y.clamp(min=0), T, self.beta, "none")
        return torch.where(y == UNLABELLED, kd_divergence(pred, logits, T, reduction="none"), decoupled)


@dataclass(frozen=True)
class DIST:
    """Correlations in place of probabilities, `dist_divergence`."""

    def __call__(self, pred: Tensor, logits: Tensor, T: float, targets: Targets, reduction: Reduction) -> Tensor:
        return dist_divergence(pred, logits, T, reduction)


DIVERGENCES = {"kl": KL, "dkd": DKD, "dist": DIST}


@checked
@dataclass(frozen=True)
class Distillation:
    """A teacher's part in a loss: alpha times the divergence from its logits, plus 1 - alpha times the loss.

    Attributes:
        alpha: Weight of the teacher.
        T: Temperature of the divergence.
        divergence: One of `DIVERGENCES`, by its name or with its own settings, such as `DKD(beta=4)`.
        standardize: Whether the logits of each image, the teacher's and the student's, are brought to a mean of 0 and a
            standard deviation of 1 first, `standardized`.
        alpha_end, T_end: What alpha and T are at the end of the training, where they go in a straight line; None: they
            stay.

    Raises:
        UserError: A value out of range, or an unknown divergence.
    """

    alpha: Share = 0.95
    T: Positive = 6.0
    divergence: Annotated[Any, OneOf("DIVERGENCES")] = "kl"
    standardize: bool = False
    alpha_end: Share | None = None
    T_end: Positive | None = None

    def __post_init__(self) -> None:
        if isinstance(self.divergence, str):
            if self.divergence not in DIVERGENCES:
                raise unknown("divergence", self.divergence, DIVERGENCES)
            object.__setattr__(self, "divergence", DIVERGENCES[self.divergence]())
        elif isinstance(self.divergence, type) or not callable(self.divergence):
            raise UserError(f"divergence is {self.divergence!r}; give a name or an instance, DKD(beta=4)")

    @property
    def constant(self) -> bool:
        """Whether alpha and T stay what they are."""
        return self.alpha_end is None and self.T_end is None

    def at(self, progress: float) -> "Distillation":
        """The same at a progress of 0...1 of the training."""
        alpha, T = (
            start if end is None else (1 - progress) * start + progress * end
            for start, end in ((self.alpha, self.alpha_end), (self.T, self.T_end))
        )
        return replace(self, alpha=alpha, T=T, alpha_end=None, T_end=None)

    def soft(self, pred: Tensor, logits: Tensor, targets: Targets, reduction: Reduction = "mean") -> Tensor:
        """The divergence of the student's logits from the teacher's, both of shape (B, C), without its weight.

        Raises:
            UserError: As `check_standardized`.
        """
        check_standardized(self, pred.shape[1])
        if self.standardize:
            pred, logits = standardized(pred), standardized(logits)
        return self.divergence(pred, logits, self.T, targets, reduction)

    def total(self, hard: Tensor, soft: Tensor) -> Tensor:
        """The weighted sum of a loss and a divergence."""
        return self.alpha * soft + (1 - self.alpha) * hard


@checked
@dataclass(frozen=True)
class Teaching(Distillation):
    """A teacher's part in the training: in the loss, and which images it sees.

    Attributes:
        size: Height and width of the teacher's images; None: those that its weights were trained on.
    """

    size: Pixels | None = None


@checked
class DMSLoss(nn.Module):
    """One loss for every stage: equation (iii), (i), (ii) or (iv), depending on the targets of the batch.

    `MixUp` adds `y_b` and `lam` to the targets, and `TeacherDistill` adds `teacher_logits`. In validation, a batch has
    `y` alone. fastai's `get_preds`, `predict` and `show_results` use `activation` and `decodes`.

    An image without a label, `UNLABELLED`, has no cross-entropy, and the teacher has all of its weight, whatever alpha
    is. So it is with either side of a mixed image: `lam (alpha soft + (1 - alpha) hard) + (1 - lam) soft`, if only the
    first has a label.

    Attributes:
        distillation: How a teacher's logits enter the loss.
        progress: Of the training, 0...1, by which alpha and T go where they do; `TeacherDistill` sets it.
        partial: Whether some targets may be `UNLABELLED`; `TeacherDistill` sets it. To look for them in each batch
            would wait for a GPU.
        parts: The terms of the last loss with a teacher, "cross_entropy" and "distillation", without their weights; if
            `partial`, also "labelled", the share of the targets that are labels; the others count as 0 in
            "cross_entropy".
    """

    progress, partial = 0.0, False

    def __init__(
        self,
        *args: Any,
        weight: Tensor | Sequence[float] | None = None,
        label_smoothing: Share = 0.0,
        reduction: Reduction = "mean",
        **kwargs: Any,
    ):
        """
        Args:
            args, kwargs: alpha, T and the rest of `Distillation`.
            weight: Weight of each class, shape (C,): a tensor, an array or a list. It is kept in float32.
            reduction: As in `cross_entropy`.
            label_smoothing: Share of each target that is spread over all classes.

        Raises:
            UserError: A value out of range, weights that are none, or an unknown divergence.
        """
        super().__init__()
        self.distillation = Distillation(*args, **kwargs)
        self.label_smoothing, self.reduction = label_smoothing, reduction
        self.register_buffer("weight", None if weight is None else _class_weights(weight))
        self.parts: dict[str, Tensor] = {}

    def forward(
        self,
        pred: Tensor,
        y_a: Tensor,
        y_b: Tensor | None = None,
        lam: Tensor | float | None = None,
        teacher_logits: Tensor | None = None,
    ) -> Tensor:
        if teacher_logits is not None and self.partial:
            return self._partial(pred, Targets(y_a, y_b, lam, partial=True), teacher_logits)
        options = {"weight": self.weight, "label_smoothing": self.label_smoothing, "reduction": self.reduction}
        hard = cross_entropy(pred, y_a, **options) if y_b is None else mixup_loss(pred, y_a, y_b, lam, **options)
        if teacher_logits is None:
            return hard
        distillation = self.distillation if self.distillation.constant else self.distillation.at(self.progress)
        soft = distillation.soft(pred, teacher_logits, Targets(y_a, y_b, lam), self.reduction)
        self.parts = {"cross_entropy": hard.detach(), "distillation": soft.detach()}
        return distillation.total(hard, soft)

    def _partial(self, pred: Tensor, targets: Targets, teacher_logits: Tensor) -> Tensor:
        """The loss of a batch in which some targets, or all, are `UNLABELLED`."""
        labelled, hard = torch.zeros(()), torch.zeros(())
        for y, share in targets.sides:
            each = share * cross_entropy(pred, y, self.weight, self.label_smoothing, "none")  # 0 without a label
            hard = hard + _reduce_labelled(each, y, self.weight, self.reduction)
            labelled = labelled + share * (y != UNLABELLED)
        distillation = self.distillation if self.distillation.constant else self.distillation.at(self.progress)
        soft = distillation.soft(pred, teacher_logits, targets, "none")
        label_weight = 1 - distillation.alpha
        teacher_weight = 1 - label_weight * labelled
        self.parts = {
            "cross_entropy": hard.detach(),
            "distillation": soft.detach(),
            "labelled": labelled.detach().mean(),
        }
        return reduced(teacher_weight * soft, None, None, self.reduction) + label_weight * hard

    def activation(self, pred: Tensor) -> Tensor:
        """Probabilities, shape (B, C), of logits."""
        return F.softmax(widened(pred), dim=-1)

    def decodes(self, pred: Tensor) -> Tensor:
        """Class indices, shape (B,), of logits or probabilities."""
        return pred.argmax(dim=-1)

    def extra_repr(self) -> str:
        return f"{self.distillation}, label_smoothing={self.label_smoothing}"

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "parts": {}}  # tensors of a batch that is gone


def check_standardized(distillation: Any, classes: int) -> None:
    """Refuse to standardise the logits of two classes.

    Raises:
        UserError: It was asked for.
    """
    if distillation.standardize and classes == 2:
        raise UserError(
            "distill.standardize would make any two logits +1 and -1, from which a student of two classes learns "
            "nothing; leave it out"
        )


def check_class_weights(loss_func: Any, classes: int) -> None:
    """Convert the class weights of a loss, if it has any, to float32: of a `DMSLoss`, torch's loss or fastai's.

    What another loss calls its weight is its own affair.

    Raises:
        UserError: They are no weights, or those of another number of classes.
    """
    owner = getattr(loss_func, "func", loss_func)  # what fastai's losses wrap
    weighted = isinstance(owner, (DMSLoss, nn.modules.loss._WeightedLoss)) or type(owner).__module__ == "fastai.losses"
    weight = getattr(owner, "weight", None) if weighted else None
    if weight is None:
        return
    owner.weight = _class_weights(weight)
    if len(owner.weight) != classes:
        raise UserError(f"the loss has weights for {len(owner.weight)} classes and the data have {classes}")


def _class_weights(weight: Any) -> Tensor:
    """Weights of classes as a float32 tensor of shape (C,).

    Raises:
        UserError: They have another shape, are negative or no numbers, or all 0.
    """
    try:
        found = torch.as_tensor(weight).to(torch.float32)
    except (TypeError, ValueError, RuntimeError):
        raise UserError(f"weight is {weight!r}; give a number for each class") from None
    if found.ndim != 1 or not len(found):
        raise UserError(f"weight has shape {tuple(found.shape)}; give a number for each class")
    if not bool((found.isfinite() & (found >= 0)).all()) or not bool(found.any()):
        raise UserError(
            f"weight is {found.tolist()}; a class's weight must be a finite number, 0 or more, and one above"
        )
    return found


def _reduce_labelled(losses: Tensor, y: Tensor, weight: Tensor | None, reduction: Reduction) -> Tensor:
    """Reduce losses that are 0 where `y` is `UNLABELLED`: as `reduced`, but a mean is that of all images.

    Weights of classes are relative, as in torch: here to their mean over the images with a label.
    """
    if reduction == "mean" and weight is not None:
        labelled = y != UNLABELLED
        total = (weight.to(losses)[y.clamp(min=0)] * labelled).sum()
        losses = losses * (labelled.sum() / total.clamp(min=torch.finfo(total.dtype).tiny))
    return reduced(losses, None, None, reduction)
