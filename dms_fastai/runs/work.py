"""The work of a training, which does not depend on the machine: PFLOP, counted from the networks and the images."""

from dataclasses import dataclass

from torch import nn

from ..learner import DMSLearner
from ..models.macs import macs
from ..run_folder import Compute

__all__ = ["EpochWork"]

FLOP = 2  # of a multiply-accumulate
PASSES = 3  # a backward pass costs as much as two forward passes


@dataclass(frozen=True)
class EpochWork:
    """The work of an epoch.

    Attributes:
        macs: Multiply-accumulates of the trained network for one image; None if they cannot be counted.
        teacher_macs: Those of its teacher; 0 without one.
        images: Images that the network is trained on, each as often as a step passes it through.
        taught: Images that the teacher sees.
    """

    macs: int | None
    teacher_macs: int | None
    images: int
    taught: int

    @classmethod
    def of_learner(cls, learn: DMSLearner) -> "EpochWork":
        loader, shape = learn.dls.train, learn.card.shape
        images = len(loader) * loader.bs
        teacher = learn.teacher_distill.teacher.model if hasattr(learn, "teacher_distill") else None
        passes = 2 if hasattr(learn, "sam") else 1
        return cls(_counted(learn.model, shape), _counted(teacher, shape), passes * images, images)

    def of(self, epochs: int) -> Compute | None:
        """The work of several epochs, without validation; None if it cannot be counted."""
        if self.macs is None or self.teacher_macs is None:
            return None
        student = FLOP * PASSES * self.macs * self.images * epochs / 1e15
        teacher = FLOP * self.teacher_macs * self.taught * epochs / 1e15
        return Compute(*(float(f"{pflop:.6g}") for pflop in (student, teacher, student + teacher)))


def _counted(network: nn.Module | None, shape: tuple[int, ...]) -> int | None:
    if network is None:
        return 0
    try:
        return macs(network, shape)
    except Exception:  # a network of somebody's own, which may need a device, or values
        return None
