"""The paper's loss functions, equations (i) to (iv), and the divergences of other papers.

Names follow section 3.3: `lam` is MixUp's lambda, `alpha` and `T` are the weight and the temperature of knowledge
distillation. Logits have shape (B, C). Targets are class indices, shape (B,), or probabilities, shape (B, C).
All arithmetic is done in float32 or better, whatever the precision of the logits.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = [
    "IGNORED",
    "Reduction",
    "cross_entropy",
    "dist_divergence",
    "dkd_divergence",
    "kd_divergence",
    "kd_loss",
    "mixup_kd_loss",
    "mixup_loss",
    "reduced",
    "standardized",
    "widened",
]

Reduction = Literal["mean", "sum", "none"]
IGNORED = -100  # torch's `ignore_index`
NEVER = -1e4  # a logit whose probability is 0 in float32
SMALLEST = 0.1  # deviation of logits by which a student's are divided at least: a head may begin with zeros


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
    logits = widened(logits)
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
    each = isinstance(lam, Tensor) and lam.ndim > 0
    inner = "none" if each else reduction
    loss_a, loss_b = (cross_entropy(logits, y, weight, label_smoothing, inner) for y in (y_a, y_b))
    if not each:
        return lam * loss_a + (1 - lam) * loss_b
    return reduced(lam * loss_a, y_a, weight, reduction) + reduced((1 - lam) * loss_b, y_b, weight, reduction)


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
    log_p_s = F.log_softmax(widened(student_logits) / T, dim=1)
    log_p_t = F.log_softmax(widened(teacher_logits) / T, dim=1)
    by_class = F.kl_div(log_p_s, log_p_t, reduction="none", log_target=True)
    by_sample = by_class.sum(1) if kl == "batchmean" else by_class.mean(1)
    return T**2 * reduced(by_sample, None, None, reduction)


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
    log_p_s, log_p_t = (F.log_softmax(widened(z) / T, dim=1) for z in (student_logits, teacher_logits))
    true = torch.zeros_like(log_p_s, dtype=torch.bool).scatter(1, y[:, None], True)
    binary_s, binary_t = (_true_or_other(log_p, y, true) for log_p in (log_p_s, log_p_t))
    tckd = F.kl_div(binary_s, binary_t, reduction="none", log_target=True).sum(1)
    # Masked classes have a finite logit: -inf - -inf would be NaN.
    others_s, others_t = (F.log_softmax(log_p.masked_fill(true, NEVER), dim=1) for log_p in (log_p_s, log_p_t))
    nckd = F.kl_div(others_s, others_t, reduction="none", log_target=True).sum(1)
    return T**2 * reduced(tckd + beta * nckd, None, None, reduction)


def dist_divergence(student_logits: Tensor, teacher_logits: Tensor, T: float, reduction: Reduction = "mean") -> Tensor:
    """DIST: T^2 times the sum of two terms 1 - r, with r Pearson's correlation of student and teacher.

    One term correlates the classes of each sample, the other the samples of each class (Huang et al., 2022, equations 8
    to 10, both with a weight of 1). The student has to match the teacher's probabilities only up to scale and shift; it
    cannot match the values of a much larger network.

    Where the student's logits are nearly equal, as from a head that begins with zeros, the correlation is smaller than
    Pearson's, and its gradient bounded.

    Args:
        student_logits, teacher_logits, T: As in `kd_divergence`.
        reduction: As in `cross_entropy`; the term over samples is one number, which is added to each sample's.
    """
    p_s, p_t = (F.softmax(widened(z) / T, dim=1) for z in (student_logits, teacher_logits))
    inter, intra = 1 - _pearson(p_s, p_t, SMALLEST / T), 1 - _pearson(p_s.T, p_t.T, SMALLEST / T).mean()
    return T**2 * reduced(inter + intra, None, None, reduction)


def standardized(logits: Tensor) -> Tensor:
    """Logits of shape (B, C), those of each image with a mean of 0 and a standard deviation of 1 (Sun et al., 2024).

    The student has to find the teacher's order and proportions of the classes, and not the size of its logits, which
    a small network may not reach. Logits whose deviation is below `SMALLEST` are divided by that.
    """
    logits = widened(logits)
    std, mean = torch.std_mean(logits, dim=1, correction=0, keepdim=True)
    return (logits - mean) / std.clamp(min=SMALLEST)


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


def widened(logits: Tensor) -> Tensor:
    """Logits in float32, or in their own precision if that is higher."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def reduced(losses: Tensor, y: Tensor | None, weight: Tensor | None, reduction: Reduction) -> Tensor:
    """Reduce losses of shape (B,), the way `torch.nn.functional.cross_entropy` does for the targets `y`, if any.

    Those that it ignores, whose loss is 0, do not count in the mean.
    """
    if reduction == "none":
        return losses
    if reduction == "sum":
        return losses.sum()
    if y is None or y.is_floating_point():
        return losses.mean()
    known = y != IGNORED
    return losses.sum() / (known if weight is None else weight.to(losses)[y.clamp(min=0)] * known).sum()


def _true_or_other(log_p: Tensor, y: Tensor, true: Tensor) -> Tensor:
    """Log-probabilities of the true class and of all others together, shape (B, 2)."""
    return torch.cat([log_p.gather(1, y[:, None]), log_p.masked_fill(true, NEVER).logsumexp(1, keepdim=True)], dim=1)


def _pearson(a: Tensor, b: Tensor, smallest: float) -> Tensor:
    """Correlation of the rows of two matrices; a deviation in `a` counts as at least `smallest` times the mean."""
    (a_off, a_mean), (b_off, _) = ((m - m.mean(1, keepdim=True), m.mean(1)) for m in (a, b))
    least = smallest * a_mean.detach() * a.shape[1] ** 0.5
    norms = torch.maximum(a_off.norm(dim=1), least) * b_off.norm(dim=1).clamp(min=1e-8)
    return (a_off * b_off).sum(1) / norms
