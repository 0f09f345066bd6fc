"""Random affine maps of training images."""

import torch
import torch.nn.functional as F
from fastai.callback.core import Callback
from torch import Tensor

from ..data.operations import sampling_grid
from ..settings import Acute, Momentum, NotNegative, Share, checked
from ..training.parts import order_of

__all__ = ["RandomAffine", "affine_map"]


@checked
class RandomAffine(Callback):
    """Shift, zoom, shear and turn each training image a little, each by an amount drawn uniformly for it.

    Images are read bilinearly. Where an image has ended there is 0, which is the mean of normalised images. An amount
    of 0 leaves that change out.
    """

    order, run_valid = order_of("affine"), False

    def __init__(self, shift: Share = 0.1, zoom: Momentum = 0.1, shear: Acute = 10.0, rotation: NotNegative = 0.0):
        """
        Args:
            shift: Furthest shift, across and along, as a share of width and height.
            zoom: An image is enlarged by a factor of 1 - zoom to 1 + zoom.
            shear: Largest angle by which upright lines are tilted, in degrees, below 90.
            rotation: Largest angle of a rotation, in degrees.

        Raises:
            UserError: A value out of range.
        """
        super().__init__()
        self.shift, self.zoom, self.shear, self.rotation = shift, zoom, shear, rotation

    def before_batch(self) -> None:
        x, *rest = self.learn.xb
        right, down, zoom, shear, angle = 2 * torch.rand(5, len(x), device=x.device) - 1
        right, down = right * self.shift * x.shape[-1], down * self.shift * x.shape[-2]
        changed = affine_map(x, right, down, 1 + self.zoom * zoom, self.shear * shear, self.rotation * angle)
        self.learn.xb = (changed, *rest)


def affine_map(x: Tensor, right: Tensor, down: Tensor, zoom: Tensor, shear: Tensor, angle: Tensor) -> Tensor:
    """Shear each image about its centre, turn it, enlarge it and shift it, in this order.

    Args:
        x: Normalised images, shape (B, C, H, W).
        right, down: Shifts in pixels, shape (B,).
        zoom: Factors, shape (B,).
        shear, angle: Degrees, shape (B,); the angle clockwise.

    Returns:
        Images of the same shape, channels last.
    """
    cos, sin, tan = torch.cos(torch.deg2rad(angle)), torch.sin(torch.deg2rad(angle)), torch.tan(torch.deg2rad(shear))
    # The way back, from what is seen to where it comes from.
    a, b, d, e = (cos - tan * sin) / zoom, (sin + tan * cos) / zoom, -sin / zoom, cos / zoom
    grid = sampling_grid((a, b, -a * right - b * down), (d, e, -d * right - e * down), x.shape)
    changed = F.grid_sample(x, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
    return changed.contiguous(memory_format=torch.channels_last)
