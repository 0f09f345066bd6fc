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

__all__ = [
    "DMSLoss",
    "cross_entropy",
    "dist_divergence",
    "dkd_divergence",
    "kd_divergence",
    "kd_loss",
    "mixup_kd_loss",
    "mixup_loss",
]

Reduction = Literal["mean", "sum", "none"]
KL = Literal["batchmean", "mean"]
Divergence = Literal["kl", "dkd", "dist"]


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


def dkd_divergence(
    student_logits: Tensor,
    teacher_logits: Tensor,
    y: Tensor,
    T: float,
    beta: float = 8.0,
    reduction: Reduction = "mean",
) -> Tensor:
    """Decoupled distillation: T^2 (TCKD + beta NCKD) (Zhao et al., 2022, equation 7, with their alpha of 1).

    TCKD is the divergence of "the true class or another", NCKD that among the other classes alone, which the ordinary
    one scales down by what the teacher leaves them.

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
    # Classes that cannot be chosen have a finite logit: -inf - -inf would be no number.
    others_s, others_t = (F.log_softmax(log_p.masked_fill(true, NEVER), dim=1) for log_p in (log_p_s, log_p_t))
    nckd = F.kl_div(others_s, others_t, reduction="none", log_target=True).sum(1)
    return T**2 * _reduce(tckd + beta * nckd, None, None, reduction)


def dist_divergence(student_logits: Tensor, teacher_logits: Tensor, T: float, reduction: Reduction = "mean") -> Tensor:
    """DIST: T^2 times 1 - Pearson's correlation, between the classes of a sample and between the samples of a class.

    Huang et al., 2022, equations 8 to 10, both relations with a weight of 1. It asks for the order of the teacher's
    probabilities and not for their values, which the student of a much larger network cannot match.

    Args:
        student_logits, teacher_logits, T: As in `kd_divergence`.
        reduction: As in `cross_entropy`; the relation between samples is one number, and is added to each.
    """
    p_s, p_t = (F.softmax(_wide(z) / T, dim=1) for z in (student_logits, teacher_logits))
    inter, intra = 1 - _pearson(p_s, p_t), 1 - _pearson(p_s.T, p_t.T).mean()
    return T**2 * _reduce(inter + intra, None, None, reduction)


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

    With another `divergence` than the paper's, (ii) and (iv) have it in place of T^2 KL.

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
        divergence: Divergence = "kl",
        beta: float = 8.0,
    ):
        """
        Args:
            alpha: Weight of the teacher, 0...1; without a teacher it has no effect.
            T, kl: Temperature and reading of the divergence, as in `kd_divergence`.
            divergence: "kl", the paper's; "dkd", `dkd_divergence`; or "dist", `dist_divergence`.
            beta: Of `dkd_divergence`; of mixed pictures it takes both labels by their shares.
            weight, label_smoothing, reduction: As in `cross_entropy`.

        Raises:
            UserError: `alpha` or `label_smoothing` outside 0...1, `T` not above 0, an unknown `kl` or `divergence`.
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
        if divergence not in ("kl", "dkd", "dist"):
            raise UserError(f"divergence is {divergence!r}; it must be 'kl', 'dkd' or 'dist'")
        self.alpha, self.T, self.kl = alpha, T, kl
        self.divergence, self.beta = divergence, beta
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
        options = {"weight": self.weight, "label_smoothing": self.label_smoothing, "reduction": self.reduction}
        hard = cross_entropy(pred, y_a, **options) if y_b is None else mixup_loss(pred, y_a, y_b, lam, **options)
        if teacher_logits is None:
            return hard
        return self.alpha * self.soft(pred, teacher_logits, y_a, y_b, lam) + (1 - self.alpha) * hard

    def soft(
        self,
        pred: Tensor,
        teacher_logits: Tensor,
        y_a: Tensor,
        y_b: Tensor | None = None,
        lam: Tensor | float | None = None,
    ) -> Tensor:
        """The divergence from the teacher, without its weight alpha."""
        if self.divergence == "kl":
            return kd_divergence(pred, teacher_logits, self.T, self.kl, self.reduction)
        if self.divergence == "dist":
            return dist_divergence(pred, teacher_logits, self.T, self.reduction)
        towards_a = dkd_divergence(pred, teacher_logits, y_a, self.T, self.beta, "none")
        if y_b is None:
            return _reduce(towards_a, None, None, self.reduction)
        towards_b = dkd_divergence(pred, teacher_logits, y_b, self.T, self.beta, "none")
        return _reduce(lam * towards_a + (1 - lam) * towards_b, None, None, self.reduction)

    def activation(self, pred: Tensor) -> Tensor:
        """Probabilities, shape (B, C), of logits."""
        return F.softmax(_wide(pred), dim=-1)

    def decodes(self, pred: Tensor) -> Tensor:
        """Class indices, shape (B,), of logits or probabilities."""
        return pred.argmax(dim=-1)

    def extra_repr(self) -> str:
        divergence = self.kl if self.divergence == "kl" else self.divergence
        return f"alpha={self.alpha}, T={self.T}, {divergence}, label_smoothing={self.label_smoothing}"


NEVER = -1e4  # a logit whose probability is 0 in float32


def _true_or_other(log_p: Tensor, y: Tensor, true: Tensor) -> Tensor:
    """Log-probabilities of the true class and of all others together, shape (B, 2)."""
    return torch.cat([log_p.gather(1, y[:, None]), log_p.masked_fill(true, NEVER).logsumexp(1, keepdim=True)], dim=1)


def _pearson(a: Tensor, b: Tensor) -> Tensor:
    """Correlation of the rows of two matrices."""
    return F.cosine_similarity(a - a.mean(1, keepdim=True), b - b.mean(1, keepdim=True), dim=1, eps=1e-8)


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
