"""CutMix, and the switch between it and MixUp."""

import random
from typing import Literal

import torch
from torch import Tensor

from ..settings import Positive, Share, checked
from .mixup import MixUp

__all__ = ["CutMix", "MixUpOrCutMix", "cut"]


@checked
class CutMix(MixUp):
    """Put a rectangle of a partner from its batch into each image, and train on both labels by their areas.

    Yun et al., 2019. The rectangle has the image's proportions, 1 - lambda of its area, and the same place in the whole
    batch. Where it reaches over the border it is cut off, and lambda becomes the share that the first image really
    keeps. All else is as in `MixUp`.
    """

    def __init__(self, alpha: Positive = 1.0, partner: Literal["random", "reversed"] = "random"):
        """
        Args:
            alpha: Lambda is drawn from Beta(alpha, alpha); 1 is uniform.
            partner: As in `MixUp`.

        Raises:
            UserError: A value out of range.
        """
        super().__init__(alpha, partner=partner)

    def pair(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        inside, lam = cut(x.shape[-2], x.shape[-1], self.draw(len(x), x.device))
        partners = self.partners(len(x), x.device)
        return torch.where(inside, x[partners], x), y[partners], lam


@checked
class MixUpOrCutMix(MixUp):
    """Apply MixUp or CutMix, drawn for each batch, as timm's recipes do."""

    def __init__(
        self,
        alpha: Positive = 1.0,
        cutmix_alpha: Positive = 1.0,
        share: Share = 0.5,
        partner: Literal["random", "reversed"] = "random",
    ):
        """
        Args:
            alpha: alpha of MixUp.
            cutmix_alpha: alpha of CutMix.
            share: Share of the batches that get CutMix, 0...1.
            partner: As in `MixUp`.

        Raises:
            UserError: A value out of range.
        """
        super().__init__(alpha, partner=partner)
        self.cutmix, self.share = CutMix(cutmix_alpha, partner), share

    def pair(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.cutmix.pair(x, y) if random.random() < self.share else super().pair(x, y)


def cut(height: int, width: int, lam: Tensor) -> tuple[Tensor, Tensor]:
    """Draw a rectangle of 1 - lam of the area, with a uniformly drawn centre.

    Args:
        height, width: Size of the images, in pixels.
        lam: Share of the first image, a scalar tensor.

    Returns:
        A mask of the rectangle, shape (H, W), and the share of the pixels outside it, a scalar; both on `lam`'s device.
    """
    device, side = lam.device, (1 - lam).sqrt()
    inside = []
    for size in (height, width):
        centre, half = torch.rand((), device=device) * size, side * size / 2
        pixels = torch.arange(size, device=device) + 0.5
        inside.append((pixels - centre).abs() < half)
    mask = inside[0][:, None] & inside[1][None, :]
    return mask, 1 - mask.float().mean()
