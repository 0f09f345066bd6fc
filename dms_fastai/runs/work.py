"""The work of a training, which does not depend on the machine: PFLOP, counted from the networks and the images."""

from collections import Counter
from dataclasses import dataclass

from torch import nn

from ..callbacks.progressive_resize import ProgressiveResize
from ..learner import DMSLearner
from ..models.macs import macs
from ..run_folder import Compute

__all__ = ["Work", "share_of_whole"]

FLOP = 2  # of a multiply-accumulate
PASSES = 3  # forward, backward to the activations, and to the weights

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Work:
    """The work of a training, epoch by epoch.

    Attributes:
        macs: Multiply-accumulates of the trained network for one image of the data's size; None if they cannot be
            counted.
        student: Those of each epoch, a step's mean for one image, at the sizes that it trains on, forward and backward;
            None as above.
        teacher: The same of its teacher, at its own size, 0 without one.
        images: Images of an epoch.
        passes: How often a step passes them through the trained network.
    """

    macs: int | None
    student: tuple[float, ...] | None
    teacher: tuple[float, ...] | None
    images: int
    passes: int

    @classmethod
    def of_learner(cls, learn: DMSLearner) -> "Work":
        loader, shape, epochs = learn.dls.train, learn.card.shape, learn.recipe.schedule.epochs
        sizes = _sizes(getattr(learn, "progressive_resize", None), shape, len(loader), epochs)
        student = _counted(learn.model, sizes)
        if student is not None:
            part = learn.recipe.fine_tune
            frozen = 0 if part is None else part.freeze_epochs
            passes = (PASSES - (epoch < frozen) for epoch in range(epochs))  # a frozen body's weights need no gradients
            student = tuple(cost * each for cost, each in zip(student, passes, strict=True))
        teacher = (0.0,) * len(sizes)
        if hasattr(learn, "teacher_distill"):
            teaching = learn.teacher_distill.teacher
            own = (shape[0], *(teaching.size or shape[1:]))
            teacher = _counted(teaching.model, [Counter({own: 1})] * len(sizes))
        if teacher is not None and hasattr(learn, "fixed_views"):
            asked = learn.fixed_views.count  # from then on, it is known what the teacher says
            teacher = (*teacher[:asked], *(0.0 for _ in teacher[asked:]))
        whole = _counted(learn.model, [Counter({shape: 1})])
        macs = None if whole is None else int(whole[0])
        return cls(macs, student, teacher, len(loader) * loader.bs, 2 if hasattr(learn, "sam") else 1)

    def of(self, epochs: int) -> Compute | None:
        """The work of the first so many epochs, without validation; None if it cannot be counted."""
        if self.student is None or self.teacher is None:
            return None
        student = FLOP * sum(self.student[:epochs]) * self.passes * self.images / 1e15
        teacher = FLOP * sum(self.teacher[:epochs]) * self.images / 1e15
        return Compute(*(float(f"{pflop:.6g}") for pflop in (student, teacher, student + teacher)))


def share_of_whole(network: nn.Module, resize: ProgressiveResize, shape: Shape, steps: int, epochs: int) -> float:
    """The multiply-accumulates of a training on growing images, as a share of those on whole ones of shape (C, H, W).

    1 if they cannot be counted.
    """
    counted = _counted(network, _sizes(resize, shape, steps, epochs))
    return 1.0 if counted is None else sum(counted) / (len(counted) * macs(network, shape))


def _sizes(resize: ProgressiveResize | None, shape: Shape, steps: int, epochs: int) -> list[Counter[Shape]]:
    """How many steps of each epoch train on images of which shape (C, H, W)."""
    if resize is None:
        return [Counter({shape: steps})] * epochs

    def at(step: int) -> Shape:
        return resize.shape(shape, step / (epochs * steps))

    return [Counter(map(at, range(epoch * steps, (epoch + 1) * steps))) for epoch in range(epochs)]


def _counted(network: nn.Module, sizes: list[Counter[Shape]]) -> tuple[float, ...] | None:
    """Multiply-accumulates of each epoch, the mean for one image."""
    try:
        costs = {shape: macs(network, shape) for shape in set().union(*sizes)}
    except Exception:  # a network of somebody's own, which may need a device, or values
        return None
    return tuple(sum(costs[shape] * steps for shape, steps in epoch.items()) / epoch.total() for epoch in sizes)
