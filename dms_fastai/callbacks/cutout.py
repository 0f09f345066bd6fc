"""Cutout: a square of nothing in every training picture."""

import torch
from fastai.callback.core import Callback
from torch import Tensor

from ..errors import UserError

__all__ = ["Cutout", "cutout"]


class Cutout(Callback):
    """Blank a square of each training picture, before anything is mixed (DeVries and Taylor, 2017).

    The square's centre is drawn uniformly from the picture's pixels, so that it may reach over the border; it gets the
    value 0, which for normalised pictures is the training pictures' mean.
    """

    order, run_valid = -1, False  # before MixUp (0)

    def __init__(self, size: float = 0.25):
        """
        Args:
            size: Side of the square as a share of the picture's; 0.25 is 8 of 32 pixels.

        Raises:
            UserError: `size` outside 0...1.
        """
        super().__init__()
        if not 0 < size <= 1:
            raise UserError(f"Cutout's size is {size}; it must be above 0 and at most 1 of the picture's side")
        self.size = size

    def before_batch(self) -> None:
        self.learn.xb = (cutout(self.learn.xb[0], self.size), *self.learn.xb[1:])


def cutout(x: Tensor, size: float) -> Tensor:
    """Pictures (B, C, H, W), each with a square of `size` times the shorter side set to 0."""
    height, width = x.shape[-2:]
    side = max(round(size * min(height, width)), 1)
    inside = []
    for pixels in (height, width):
        first = torch.randint(pixels, (len(x), 1), device=x.device) - side // 2
        place = torch.arange(pixels, device=x.device)
        inside.append((place >= first) & (place < first + side))
    square = (inside[0][:, :, None] & inside[1][:, None, :])[:, None]
    return torch.where(square, 0.0, x)  # keeps the layout in memory, which masked_fill does not
