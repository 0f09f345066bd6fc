"""RandAugment as timm's recipes have it, for whole batches on their device."""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from ..data.operations import IDENTITY, OPERATIONS, Index, operate, where_chosen
from ..settings import Count, Magnitude, NotNegative, Share, checked
from ..training.parts import order_of
from .on_pixels import OnPixels

__all__ = ["RandAugment", "apply"]

MOST = 10.0  # the highest magnitude


@checked
class RandAugment(OnPixels):
    """Change each training image by some of 15 operations, all of about the same magnitude (Cubuk et al., 2020).

    They are the increasing ones of timm, `rand-m9-mstd0.5-inc1`: the higher the magnitude, the stronger each. Shears,
    shifts and rotations read the image bilinearly or bicubically, by chance, and fill with the data's mean.
    """

    order = order_of("rand_augment")

    def __init__(
        self,
        num_ops: Count = 2,
        magnitude: Magnitude = 9.0,
        magnitude_std: NotNegative = 0.5,
        prob: Share = 0.5,
    ):
        """
        Args:
            num_ops: Operations that are drawn for an image, with replacement.
            magnitude: How strong they are, 0...10.
            magnitude_std: Standard deviation of an operation's own magnitude round that; it stays in 0...10.
            prob: Probability that an operation that was drawn is applied.

        Raises:
            UserError: A value out of range.
        """
        super().__init__()
        self.num_ops, self.magnitude, self.magnitude_std, self.prob = num_ops, magnitude, magnitude_std, prob

    def change(self, pixels: Tensor, mean: Tensor) -> Tensor:
        n, device, fill = len(pixels), pixels.device, mean.round()
        for _ in range(self.num_ops):
            operation = torch.randint(IDENTITY + 1, len(OPERATIONS), (n,), device=device)
            operation = torch.where(torch.rand(n, device=device) < self.prob, operation, IDENTITY)
            magnitude = self.magnitude + self.magnitude_std * torch.randn(n, device=device)
            sign = torch.randint(2, (n,), device=device) * 2 - 1
            bicubic = torch.rand(n, device=device) < 0.5
            pixels = apply(pixels, operation, magnitude.clamp(0, MOST), sign, bicubic, fill).float()
        return pixels


def apply(x: Tensor, operation: Tensor, magnitude: Tensor, sign: Tensor, bicubic: Tensor, fill: Tensor) -> Tensor:
    """Apply to each image the operation given for it.

    Args:
        x: Whole numbers 0...255 as float32, shape (B, 3, H, W).
        operation: Index into `OPERATIONS`, shape (B,).
        magnitude: 0...10, shape (B,).
        sign: -1 or 1, shape (B,): the direction of operations that have two.
        bicubic: Whether a moved image is read bicubically, shape (B,); if not, bilinearly.
        fill: What is seen where a moved image has ended, shape (1, 3, 1, 1).

    Returns:
        uint8, shape (B, 3, H, W).
    """
    height, width = x.shape[-2:]
    share = magnitude / MOST
    signed = sign * share
    none, shear, angle, factor = 0 * signed, 0.3 * signed, 30 * signed, 1 + 0.9 * signed
    moves, blends = (shear, shear, 0.45 * width * signed, 0.45 * height * signed, angle), (factor,) * 4
    bits, threshold, added = 4 - (4 * share).floor(), 256 - (256 * share).floor(), (110 * share).floor()
    amounts = torch.stack([none, *moves, *blends, bits, threshold, none, none, none, added])
    sample = partial(_smooth, bicubic=bicubic, fill=fill)
    return operate(x, operation, amounts.gather(0, operation[None])[0], sample)


def _smooth(x: Tensor, grid: Tensor, which: Index, bicubic: Tensor, fill: Tensor) -> Tensor:
    """What lies between pixels is made of its neighbours; outside is `fill`, with a sharp edge, as in PIL."""

    def read(mode: str, x: Tensor, grid: Tensor) -> Tensor:
        return F.grid_sample(x, grid, mode=mode, padding_mode="border", align_corners=False)

    linear = read("bilinear", x, grid)
    both = where_chosen(bicubic[which], linear, lambda _, cubic: read("bicubic", x[cubic], grid[cubic]))
    inside = ((grid >= -1) & (grid < 1)).all(-1)[:, None]
    return torch.where(inside, both.round().clamp(0, 255), fill)
