"""Cutout: a blank square in every training image."""

import torch
from fastai.callback.core import Callback
from torch import Tensor

from ..settings import PositiveShare, checked
from ..training.parts import order_of

__all__ = ["Cutout", "cutout"]


@checked
class Cutout(Callback):
    """Blank a square of each training image, before anything is mixed (DeVries and Taylor, 2017).

    The square's centre is drawn uniformly from the image's pixels, so that the square may reach over the border. It is
    filled with 0, which is the mean of normalised images.
    """

    order, run_valid = order_of("cutout"), False

    def __init__(self, size: PositiveShare = 0.25):
        """
        Args:
            size: Side of the square as a share of the image's; 0.25 is 8 of 32 pixels.

        Raises:
            UserError: A value out of range.
        """
        super().__init__()
        self.size = size

    def before_batch(self) -> None:
        self.learn.xb = (cutout(self.learn.xb[0], self.size), *self.learn.xb[1:])


def cutout(x: Tensor, size: float) -> Tensor:
    """Images (B, C, H, W), each with a square of `size` times the shorter side set to 0."""
    height, width = x.shape[-2:]
    side = max(round(size * min(height, width)), 1)
    inside = []
    for pixels in (height, width):
        first = torch.randint(pixels, (len(x), 1), device=x.device) - side // 2
        place = torch.arange(pixels, device=x.device)
        inside.append((place >= first) & (place < first + side))
    square = (inside[0][:, :, None] & inside[1][:, None, :])[:, None]
    return torch.where(square, 0.0, x)  # keeps the layout in memory, which masked_fill does not
