"""Progressive resizing: small images first, which cost less, and large ones at the end."""

import torch.nn.functional as F
from fastai.callback.core import Callback

from ..errors import UserError
from ..settings import PositiveShare, Share, checked
from ..training.parts import order_of

__all__ = ["ProgressiveResize"]

MULTIPLE = 4  # pixels: sides between are rounded down, so that kernels meet few shapes


@checked
class ProgressiveResize(Callback):
    """Train on smaller images at first, then on ever larger ones, and on the whole ones at the end.

    The share of the side is `smallest` until `grow_at`, rises evenly, and is 1 from `full_at` on, where the batch norms
    come to know what is validated. All else has happened to the images by then, and a teacher sees them as they are.
    Nothing but the progress of the fit goes into it, so that a resumed fit goes on with the same sizes.
    """

    order, run_valid = order_of("progressive_resize"), False

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

    def side(self, whole: int, progress: float) -> int:
        """Pixels of a side of `whole` pixels at a progress of 0...1."""
        if progress >= self.full_at:
            return whole
        past = max(progress - self.grow_at, 0.0)
        grown = past / (self.full_at - self.grow_at) if past else 0.0
        side = whole * (self.smallest + (1 - self.smallest) * grown)
        return min(max(int(side) // MULTIPLE * MULTIPLE, MULTIPLE), whole)

    def before_batch(self) -> None:
        x, *rest = self.learn.xb
        shape = self.shape(x.shape[1:], self.learn.pct_train)
        if shape != x.shape[1:]:
            self.learn.xb = (F.interpolate(x, shape[1:], mode="bilinear", antialias=True), *rest)
