"""The paper's loss functions, equations (i) to (iv), and the one loss that a Learner needs for all of them.

Names follow section 3.3: `lam` is MixUp's lambda, `alpha` and `T` are the weight and the temperature of knowledge
distillation. Logits have shape (B, C). Targets are class indices, shape (B,), or probabilities, shape (B, C).
All arithmetic is done in float32 or better, whatever the precision of the logits.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .errors import UserError

__all__ = ["DMSLoss", "cross_entropy", "kd_divergence", "kd_loss", "mixup_kd_loss", "mixup_loss"]

Reduction = Literal["mean", "sum", "none"]
KL = Literal["batchmean", "mean"]


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
        weight: Weight of each class, shape (C,). The mean over class indices is the weighted one, as torch has it.
        label_smoothing: How much of the target is spread over all classes, 0...1.
        reduction: "mean" and "sum" give a scalar, "none" gives shape (B,).
    """
    return F.cross_entropy(_wide(logits), y, weight=weight, label_smoothing=label_smoothing, reduction=reduction)


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
        logits: Of the mixed pictures lam * x_a + (1 - lam) * x_b, shape (B, C).
        y_a: Targets of the first pictures, (B,) or (B, C).
        y_b: Targets of their partners, like `y_a`.
        lam: Share of the first picture, 0...1: a number, a tensor without dimensions, or one a sample, shape (B,).
        weight, label_smoothing, reduction: As in `cross_entropy`.
    """
    loss_a, loss_b = (cross_entropy(logits, y, weight, label_smoothing, "none") for y in (y_a, y_b))
    return _reduce(lam * loss_a, y_a, weight, reduction) + _reduce((1 - lam) * loss_b, y_b, weight, reduction)


def kd_divergence(
    student_logits: Tensor,
    teacher_logits: Tensor,
    T: float,
    kl: KL = "batchmean",
    reduction: Reduction = "mean",
) -> Tensor:
    """The first term of equation (ii) without its weight: T^2 KL(softmax(Z_t / T) || softmax(Z_s / T)).

    T^2 keeps the gradient's size independent of the temperature (Hinton et al., 2015, section 2).

    Args:
        student_logits: Z_s, shape (B, C).
        teacher_logits: Z_t, shape (B, C).
        T: Temperature, above 0.
        kl: "batchmean" sums over the classes, as the divergence is defined; "mean" averages over them as well, which
            is what the authors' code does and gives 1/C of it.
        reduction: Over the batch; as in `cross_entropy`.
    """
    log_p_s = F.log_softmax(_wide(student_logits) / T, dim=1)
    log_p_t = F.log_softmax(_wide(teacher_logits) / T, dim=1)
    by_class = F.kl_div(log_p_s, log_p_t, reduction="none", log_target=True)
    by_sample = by_class.sum(1) if kl == "batchmean" else by_class.mean(1)
    return T**2 * _reduce(by_sample, None, None, reduction)


def kd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    y: Tensor,
    alpha: float,
    T: float,
    kl: KL = "batchmean",
    weight: Tensor | None = None,
    label_smoothing: float = 0.0,
    reduction: Reduction = "mean",
) -> Tensor:
    """Equation (ii): alpha T^2 KL(softmax(Z_t / T) || softmax(Z_s / T)) + (1 - alpha) cross_entropy(Z_s, y).

    The paper prints Loss(Z_s, softmax(Z_t)) as the second term of (ii) and the true labels in (iv), which is built
    from it. The true labels are what was run; `y=softmax(teacher_logits, 1)` gives the printed reading.

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
    kl: KL = "batchmean",
    weight: Tensor | None = None,
    label_smoothing: float = 0.0,
    reduction: Reduction = "mean",
) -> Tensor:
    """Equation (iv), the loss that DMSResNet is trained with: (ii) with (i) in place of its cross-entropy.

    Both networks see the same mixed pictures. Arguments as in `kd_loss` and `mixup_loss`.
    """
    divergence = kd_divergence(student_logits, teacher_logits, T, kl, reduction)
    hard = mixup_loss(student_logits, y_a, y_b, lam, weight, label_smoothing, reduction)
    return alpha * divergence + (1 - alpha) * hard


class DMSLoss(nn.Module):
    """One loss for every stage: equation (iii), (i), (ii) or (iv), by what the batch carries.

    `MixUp` adds `y_b` and `lam` to the targets and `TeacherDistill` adds `teacher_logits`; in validation a batch
    carries `y` alone. `activation` and `decodes` are what fastai's `get_preds`, `predict` and `show_results` use.
    """

    def __init__(
        self,
        alpha: float = 0.95,
        T: float = 6.0,
        kl: KL = "batchmean",
        weight: Tensor | None = None,
        label_smoothing: float = 0.0,
        reduction: Reduction = "mean",
    ):
        """
        Args:
            alpha: Weight of the teacher, 0...1; without a teacher it has no effect.
            T, kl: Temperature and reading of the divergence, as in `kd_divergence`.
            weight, label_smoothing, reduction: As in `cross_entropy`.

        Raises:
            UserError: `alpha` or `label_smoothing` outside 0...1, `T` not above 0, or an unknown `kl`.
        """
        super().__init__()
        if not 0 <= alpha <= 1:
            raise UserError(f"alpha is {alpha}; the teacher's weight must be between 0 and 1")
        if not T > 0:
            raise UserError(f"T is {T}; the temperature must be above 0")
        if kl not in ("batchmean", "mean"):
            raise UserError(f"kl is {kl!r}; it must be 'batchmean' or 'mean'")
        if not 0 <= label_smoothing <= 1:
            raise UserError(f"label_smoothing is {label_smoothing}; it must be between 0 and 1")
        self.alpha, self.T, self.kl = alpha, T, kl
        self.label_smoothing, self.reduction = label_smoothing, reduction
        self.register_buffer("weight", weight)

    def forward(
        self,
        pred: Tensor,
        y_a: Tensor,
        y_b: Tensor | None = None,
        lam: Tensor | float | None = None,
        teacher_logits: Tensor | None = None,
    ) -> Tensor:
        hard = {"weight": self.weight, "label_smoothing": self.label_smoothing, "reduction": self.reduction}
        soft = {"alpha": self.alpha, "T": self.T, "kl": self.kl}
        if teacher_logits is None:
            return cross_entropy(pred, y_a, **hard) if y_b is None else mixup_loss(pred, y_a, y_b, lam, **hard)
        if y_b is None:
            return kd_loss(pred, teacher_logits, y_a, **soft, **hard)
        return mixup_kd_loss(pred, teacher_logits, y_a, y_b, lam, **soft, **hard)

    def activation(self, pred: Tensor) -> Tensor:
        """Probabilities, shape (B, C), of logits."""
        return F.softmax(_wide(pred), dim=-1)

    def decodes(self, pred: Tensor) -> Tensor:
        """Class indices, shape (B,), of logits or probabilities."""
        return pred.argmax(dim=-1)

    def extra_repr(self) -> str:
        return f"alpha={self.alpha}, T={self.T}, kl={self.kl!r}, label_smoothing={self.label_smoothing}"


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
    return losses.sum() / weight[y].sum()
