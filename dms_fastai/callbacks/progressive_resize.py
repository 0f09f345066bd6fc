"""The size of the student's images: small first, which costs less, and whole at the end; a teacher sees more."""

from typing import Any

from fastai.callback.core import Callback
from torch import Tensor

from ..data.augment import at_size
from ..data.imageset import ImageSet
from ..errors import UserError
from ..settings import PositiveShare, Share, checked
from ..training.parts import order_of
from .twins import refuse_twin

__all__ = ["ProgressiveResize"]

MULTIPLE = 4  # pixels: sides between are rounded down, so that kernels meet few shapes


@checked
class ProgressiveResize(Callback):
    """Train on smaller images at first, then on ever larger ones, and on the whole ones at the end.

    The share of the side is `smallest` until `grow_at`, rises evenly, and is 1 from `full_at` on, where the batch norms
    come to know what is validated. All else has happened to the images by then. Those of `load_data` with a larger
    `view` come to their own size in the same step, also in validation. A teacher sees the images as they were before.
    Nothing but the progress of the fit goes into it, so that a resumed fit goes on with the same sizes.
    """

    order = order_of("progressive_resize")
    given: Tensor | None = None
    _stateattrs = ("given",)

    def __init__(self, smallest: PositiveShare = 0.5, grow_at: Share = 0.25, full_at: Share = 0.75):
        """
        Args:
            smallest: Side at the start, as a share of the image's.
            grow_at: Progress, 0...1, at which the side begins to grow.
            full_at: Progress from which it is whole.

        Raises:
            UserError: A value out of range, or `grow_at` above `full_at`.
        """
        super().__init__()
        if grow_at > full_at:
            raise UserError(f"ProgressiveResize's grow_at is {grow_at}; it must be at most full_at, which is {full_at}")
        self.smallest, self.grow_at, self.full_at = smallest, grow_at, full_at

    def shape(self, whole: tuple[int, ...], progress: float) -> tuple[int, ...]:
        """The shape (C, H, W) that images of shape `whole` have at a progress of 0...1."""
        channels, *sides = whole
        return channels, *(self.side(side, progress) for side in sides)

    def shapes(self, whole: tuple[int, ...]) -> set[tuple[int, ...]]:
        """All shapes (C, H, W) that images of shape `whole` have in training."""
        return {self.shape(whole, step / 1000) for step in range(1001)}

    def side(self, whole: int, progress: float) -> int:
        """Pixels of a side of `whole` pixels at a progress of 0...1."""
        if progress >= self.full_at:
            return whole
        past = max(progress - self.grow_at, 0.0)
        grown = past / (self.full_at - self.grow_at) if past else 0.0
        side = whole * (self.smallest + (1 - self.smallest) * grown)
        return min(max(int(side) // MULTIPLE * MULTIPLE, MULTIPLE), whole)

    def before_fit(self) -> None:
        refuse_twin(self)

    def before_batch(self) -> None:
        """Make the student's images; `given` has the batch as it came."""
        self.given, *rest = self.learn.xb
        shape = students_shape(self.learn.dls, self.given)
        if self.learn.training:
            shape = self.shape(shape, self.learn.pct_train)
        self.learn.xb = (at_size(self.given, shape[1:]), *rest)

    def after_batch(self) -> None:
        self.given = None


def students_shape(dls: Any, x: Tensor) -> tuple[int, ...]:
    """The shape (C, H, W) of the whole images that a student is trained on, of which `x` is a batch, maybe larger."""
    data = dls.train_ds
    return data.shape if isinstance(data, ImageSet) else tuple(x.shape[1:])
