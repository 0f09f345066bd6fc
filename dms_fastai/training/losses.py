"""The paper's loss functions, equations (i) to (iv), and `DMSLoss`, one loss for all of them.

Names follow section 3.3: `lam` is MixUp's lambda, `alpha` and `T` are the weight and the temperature of knowledge
distillation. Logits have shape (B, C). Targets are class indices, shape (B,), or probabilities, shape (B, C).
All arithmetic is done in float32 or better, whatever the precision of the logits.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import UserError, unknown
from ..settings import NotNegative, OneOf, Pixels, Positive, Share, checked

__all__ = [
    "DIST",
    "DIVERGENCES",
    "DKD",
    "KL",
    "UNLABELLED",
    "DMSLoss",
    "Distillation",
    "Teaching",
    "check_class_weights",
    "cross_entropy",
    "dist_divergence",
    "dkd_divergence",
    "kd_divergence",
    "kd_loss",
    "mixup_kd_loss",
    "mixup_loss",
    "standardized",
]

Reduction = Literal["mean", "sum", "none"]
UNLABELLED = -100  # in place of the class of an image that has none; torch's cross-entropy ignores it


def cross_entropy(
    logits: Tensor,
    y: Tensor,
    weight: Tensor | None = None,
    label_smoothing: float = 0.0,
    reduction: Reduction = "mean",
) -> Tensor:
    """Equation (iii): -sum_c y_c log softmax(logits)_c.

    Args:
        logits: Shape (B, C).
        y: Class indices (B,), or probabilities (B, C).
        weight: Weight of each class, shape (C,), in any precision. With class indices, the mean is the weighted one, as
            in torch.
        label_smoothing: Share of the target that is spread over all classes, 0...1.
        reduction: "mean" and "sum" give a scalar, "none" gives shape (B,).
    """
    logits = _wide(logits)
    if weight is not None:
        weight = weight.to(logits)
    return F.cross_entropy(logits, y, weight=weight, label_smoothing=label_smoothing, reduction=reduction)


def mixup_loss(
    logits: Tensor,
    y_a: Tensor,
    y_b: Tensor,
    lam: Tensor | float,
    weight: Tensor | None = None,
    label_smoothing: float = 0.0,
    reduction: Reduction = "mean",
) -> Tensor:
    """Equation (i): lam * cross_entropy(logits, y_a) + (1 - lam) * cross_entropy(logits, y_b).

    Args:
        logits: Logits of the mixed images lam * x_a + (1 - lam) * x_b, shape (B, C).
        y_a: Targets of the first images, (B,) or (B, C).
        y_b: Targets of their partners, like `y_a`.
        lam: Share of the first image, 0...1: a number, a scalar tensor, or one for each sample, shape (B,).
        weight, label_smoothing, reduction: As in `cross_entropy`.
    """
    loss_a, loss_b = (cross_entropy(logits, y, weight, label_smoothing, "none") for y in (y_a, y_b))
    return _reduce(lam * loss_a, y_a, weight, reduction) + _reduce((1 - lam) * loss_b, y_b, weight, reduction)


def kd_divergence(
    student_logits: Tensor,
    teacher_logits: Tensor,
    T: float,
    kl: str = "batchmean",
    reduction: Reduction = "mean",
) -> Tensor:
    """The first term of equation (ii) without its weight: T^2 KL(softmax(Z_t / T) || softmax(Z_s / T)).

    T^2 keeps the gradient's size independent of the temperature (Hinton et al., 2015, section 2).

    Args:
        student_logits: Z_s, shape (B, C).
        teacher_logits: Z_t, shape (B, C).
        T: Temperature, above 0.
        kl: "batchmean" sums over the classes, as the divergence is defined. "mean" averages over the classes, as the
            authors' code does, which gives 1/C of that.
        reduction: Reduction over the batch, as in `cross_entropy`.
    """
    log_p_s = F.log_softmax(_wide(student_logits) / T, dim=1)
    log_p_t = F.log_softmax(_wide(teacher_logits) / T, dim=1)
    by_class = F.kl_div(log_p_s, log_p_t, reduction="none", log_target=True)
    by_sample = by_class.sum(1) if kl == "batchmean" else by_class.mean(1)
    return T**2 * _reduce(by_sample, None, None, reduction)


def dkd_divergence(
    student_logits: Tensor,
    teacher_logits: Tensor,
    y: Tensor,
    T: float,
    beta: float = 8.0,
    reduction: Reduction = "mean",
) -> Tensor:
    """Decoupled distillation: T^2 (TCKD + beta NCKD) (Zhao et al., 2022, equation 7, with their alpha of 1).

    TCKD is the divergence of the two-way choice "the true class or another". NCKD is the divergence among the other
    classes alone; the ordinary divergence scales it down by the probability that the teacher leaves to them.

    Args:
        student_logits, teacher_logits, T: As in `kd_divergence`.
        y: The true classes, shape (B,).
        beta: Weight of the other classes.
        reduction: As in `cross_entropy`.
    """
    log_p_s, log_p_t = (F.log_softmax(_wide(z) / T, dim=1) for z in (student_logits, teacher_logits))
    true = torch.zeros_like(log_p_s, dtype=torch.bool).scatter(1, y[:, None], True)
    binary_s, binary_t = (_true_or_other(log_p, y, true) for log_p in (log_p_s, log_p_t))
    tckd = F.kl_div(binary_s, binary_t, reduction="none", log_target=True).sum(1)
    # Masked classes have a finite logit: -inf - -inf would be NaN.
    others_s, others_t = (F.log_softmax(log_p.masked_fill(true, NEVER), dim=1) for log_p in (log_p_s, log_p_t))
    nckd = F.kl_div(others_s, others_t, reduction="none", log_target=True).sum(1)
    return T**2 * _reduce(tckd + beta * nckd, None, None, reduction)


def dist_divergence(student_logits: Tensor, teacher_logits: Tensor, T: float, reduction: Reduction = "mean") -> Tensor:
    """DIST: T^2 times the sum of two terms 1 - r, with r Pearson's correlation of student and teacher.

    One term correlates the classes of each sample, the other the samples of each class (Huang et al., 2022, equations 8
    to 10, both with a weight of 1). The student has to match the teacher's probabilities only up to scale and shift; it
    cannot match the values of a much larger network.

    Args:
        student_logits, teacher_logits, T: As in `kd_divergence`.
        reduction: As in `cross_entropy`; the term over samples is one number, which is added to each sample's.
    """
    p_s, p_t = (F.softmax(_wide(z) / T, dim=1) for z in (student_logits, teacher_logits))
    inter, intra = 1 - _pearson(p_s, p_t), 1 - _pearson(p_s.T, p_t.T).mean()
    return T**2 * _reduce(inter + intra, None, None, reduction)


def standardized(logits: Tensor) -> Tensor:
    """Logits of shape (B, C), those of each image with a mean of 0 and a standard deviation of 1 (Sun et al., 2024).

    The student has to find the teacher's order and proportions of the classes, and not the size of its logits, which
    a small network may not reach.
    """
    logits = _wide(logits)
    std, mean = torch.std_mean(logits, dim=1, correction=0, keepdim=True)
    return (logits - mean) / (std + 1e-7)


def kd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    y: Tensor,
    alpha: float,
    T: float,
    kl: str = "batchmean",
    weight: Tensor | None = None,
    label_smoothing: float = 0.0,
    reduction: Reduction = "mean",
) -> Tensor:
    """Equation (ii): alpha T^2 KL(softmax(Z_t / T) || softmax(Z_s / T)) + (1 - alpha) cross_entropy(Z_s, y).

    The paper prints Loss(Z_s, softmax(Z_t)) as the second term of (ii), but has the true labels in (iv), which is built
    from (ii). The authors' code uses the true labels; `y=softmax(teacher_logits, 1)` gives the printed form.

    Args:
        student_logits: Z_s, shape (B, C).
        teacher_logits: Z_t, shape (B, C).
        y: Targets, (B,) or (B, C).
        alpha: Weight of the teacher, 0...1.
        T, kl: As in `kd_divergence`.
        weight, label_smoothing, reduction: As in `cross_entropy`.
    """
    divergence = kd_divergence(student_logits, teacher_logits, T, kl, reduction)
    return alpha * divergence + (1 - alpha) * cross_entropy(student_logits, y, weight, label_smoothing, reduction)


def mixup_kd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    y_a: Tensor,
    y_b: Tensor,
    lam: Tensor | float,
    alpha: float,
    T: float,
    kl: str = "batchmean",
    weight: Tensor | None = None,
    label_smoothing: float = 0.0,
    reduction: Reduction = "mean",
) -> Tensor:
    """Equation (iv), the loss that DMSResNet is trained with: (ii) with (i) in place of its cross-entropy.

    Both networks see the same mixed images. Arguments as in `kd_loss` and `mixup_loss`.
    """
    divergence = kd_divergence(student_logits, teacher_logits, T, kl, reduction)
    hard = mixup_loss(student_logits, y_a, y_b, lam, weight, label_smoothing, reduction)
    return alpha * divergence + (1 - alpha) * hard


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
        towards_a = self._towards(pred, logits, targets.y_a, T, targets.partial)
        if targets.y_b is None:
            return _reduce(towards_a, None, None, reduction)
        towards_b = self._towards(pred, logits, targets.y_b, T, targets.partial)
        return _reduce(targets.lam * towards_a + (1 - targets.lam) * towards_b, None, None, reduction)

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
        """The divergence of the student's logits from the teacher's, both of shape (B, C), without its weight."""
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
        alpha: Weight of the teacher.
        T: Temperature of the divergence.
        divergence: One of `DIVERGENCES`, by its name or with its own settings, such as `DKD(beta=4)`.
        standardize: Whether each image's logits, the teacher's and the student's, are `standardized` first.
        alpha_end: What alpha is at the end of the training, where it goes in a straight line; None: it stays.
        T_end: The same of T.
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
            `partial`, also "labelled", the share of the targets that are labels. The others count as 0 in the first.
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
        by_label = 1 - distillation.alpha
        self.parts = {
            "cross_entropy": hard.detach(),
            "distillation": soft.detach(),
            "labelled": labelled.detach().mean(),
        }
        return _reduce((1 - by_label * labelled) * soft, None, None, self.reduction) + by_label * hard

    def activation(self, pred: Tensor) -> Tensor:
        """Probabilities, shape (B, C), of logits."""
        return F.softmax(_wide(pred), dim=-1)

    def decodes(self, pred: Tensor) -> Tensor:
        """Class indices, shape (B,), of logits or probabilities."""
        return pred.argmax(dim=-1)

    def extra_repr(self) -> str:
        return f"{self.distillation}, label_smoothing={self.label_smoothing}"

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "parts": {}}  # tensors of a batch that is gone


def check_class_weights(loss_func: Any, classes: int) -> None:
    """Convert the class weights of a loss, if it has any, to float32: of a `DMSLoss`, torch's loss or fastai's.

    Raises:
        UserError: They are no weights, or those of another number of classes.
    """
    owner = getattr(loss_func, "func", loss_func)  # what fastai's losses wrap
    weight = getattr(owner, "weight", None)
    if weight is None:
        return
    owner.weight = _class_weights(weight)
    if len(owner.weight) != classes:
        raise UserError(f"the loss has weights for {len(owner.weight)} classes and the data have {classes}")


NEVER = -1e4  # a logit whose probability is 0 in float32


def _true_or_other(log_p: Tensor, y: Tensor, true: Tensor) -> Tensor:
    """Log-probabilities of the true class and of all others together, shape (B, 2)."""
    return torch.cat([log_p.gather(1, y[:, None]), log_p.masked_fill(true, NEVER).logsumexp(1, keepdim=True)], dim=1)


def _pearson(a: Tensor, b: Tensor) -> Tensor:
    """Correlation of the rows of two matrices."""
    return F.cosine_similarity(a - a.mean(1, keepdim=True), b - b.mean(1, keepdim=True), dim=1, eps=1e-8)


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


def _wide(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _reduce(losses: Tensor, y: Tensor | None, weight: Tensor | None, reduction: Reduction) -> Tensor:
    """Reduce losses of shape (B,), the way `torch.nn.functional.cross_entropy` does for the targets `y`."""
    if reduction == "none":
        return losses
    if reduction == "sum":
        return losses.sum()
    if weight is None or y.is_floating_point():
        return losses.mean()
    return losses.sum() / weight.to(losses)[y].sum()


def _reduce_labelled(losses: Tensor, y: Tensor, weight: Tensor | None, reduction: Reduction) -> Tensor:
    """Reduce losses that are 0 where `y` is `UNLABELLED`: as `_reduce`, but a mean is that of all images.

    Weights of classes are relative, as in torch: here to their mean over the images with a label.
    """
    if reduction == "mean" and weight is not None:
        labelled = y != UNLABELLED
        total = (weight.to(losses)[y.clamp(min=0)] * labelled).sum()
        losses = losses * (labelled.sum() / total.clamp(min=torch.finfo(total.dtype).tiny))
    return _reduce(losses, None, None, reduction)
