"""CutMix, and the switch between it and MixUp."""

import random

import torch
from torch import Tensor

from ..errors import UserError
from .mixup import MixUp

__all__ = ["CutMix", "MixUpOrCutMix", "cut"]


class CutMix(MixUp):
    """Put a rectangle of a partner from its batch into each picture, and train on both labels by their areas.

    Yun et al., 2019. The rectangle has the picture's shape, 1 - lambda of its area and one place for the whole batch,
    and is cut off at the border; lambda is then the share that the first picture really keeps. All else is as in
    `MixUp`.
    """

    def __init__(self, alpha: float = 1.0):
        """
        Args:
            alpha: Lambda is drawn from Beta(alpha, alpha); 1 is uniform.

        Raises:
            UserError: `alpha` is not above 0.
        """
        super().__init__(alpha)

    def pair(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        inside, lam = cut(x.shape[-2], x.shape[-1], self.draw(len(x), x.device))
        shuffle = torch.randperm(len(x), device=x.device)
        return torch.where(inside, x[shuffle], x), y[shuffle], lam


class MixUpOrCutMix(MixUp):
    """For each batch by chance MixUp or CutMix, as timm's recipes switch between them."""

    def __init__(self, alpha: float = 1.0, cutmix_alpha: float = 1.0, share: float = 0.5):
        """
        Args:
            alpha: Of MixUp.
            cutmix_alpha: Of CutMix.
            share: Of the batches that CutMix has, 0...1.

        Raises:
            UserError: An alpha not above 0, or a share outside 0...1.
        """
        super().__init__(alpha)
        if not 0 <= share <= 1:
            raise UserError(f"CutMix's share of the batches is {share}; it must be between 0 and 1")
        self.cutmix, self.share = CutMix(cutmix_alpha), share

    def pair(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.cutmix.pair(x, y) if random.random() < self.share else super().pair(x, y)


def cut(height: int, width: int, lam: Tensor) -> tuple[Tensor, Tensor]:
    """Where a rectangle of 1 - lam of the area lies, its centre drawn uniformly.

    Args:
        height, width: Of the pictures, in pixels.
        lam: Share of the first picture, without dimensions.

    Returns:
        A mask, shape (H, W), and the share of the pixels outside it, without dimensions; both on `lam`'s device.
    """
    device, side = lam.device, (1 - lam).sqrt()
    inside = []
    for size in (height, width):
        centre, half = torch.rand((), device=device) * size, side * size / 2
        pixels = torch.arange(size, device=device) + 0.5
        inside.append((pixels - centre).abs() < half)
    mask = inside[0][:, None] & inside[1][None, :]
    return mask, 1 - mask.float().mean()
