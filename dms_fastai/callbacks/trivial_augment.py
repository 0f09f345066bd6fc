"""TrivialAugment: one operation of random strength for each image, for whole batches on their device."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..data import operations
from ..training.parts import order_of
from .on_pixels import OnPixels

__all__ = ["OPERATIONS", "TrivialAugment", "apply", "trivial_augment"]

OPERATIONS = operations.OPERATIONS[: operations.EQUALIZE + 1]
BINS = 31  # strengths, from none to full
SHEAR, TRANSLATION, ROTATION, CHANGE, BITS = 0.99, 32.0, 135.0, 0.99, 6.0  # the wide space, translation in pixels


class TrivialAugment(OnPixels):
    """Change each training image by one of 14 operations, drawn with its strength (Mueller and Hutter, 2021).

    The operations and their ranges are those of the paper's wide space. `data.operations` says how a batch is computed.
    """

    order = order_of("trivial_augment")

    def change(self, pixels: Tensor, mean: Tensor) -> Tensor:
        return trivial_augment(pixels)


def trivial_augment(x: Tensor) -> Tensor:
    """Apply to each image an operation drawn for it: whole numbers 0...255, shape (B, 3, H, W)."""
    n, device = len(x), x.device
    operation = torch.randint(len(OPERATIONS), (n,), device=device)
    strength = torch.randint(BINS, (n,), device=device) / (BINS - 1)
    sign = torch.randint(2, (n,), device=device) * 2 - 1
    return apply(x, operation, strength, sign)


def apply(x: Tensor, operation: Tensor, strength: Tensor, sign: Tensor) -> Tensor:
    """Apply to each image the operation given for it.

    Args:
        x: Whole numbers 0...255, shape (B, 3, H, W).
        operation: Index into `OPERATIONS`, shape (B,).
        strength: 0...1, shape (B,).
        sign: -1 or 1, shape (B,): the direction of operations that have two.
    """
    signed = sign * strength
    none, shear, shift, angle = 0 * signed, SHEAR * signed, (TRANSLATION * signed).trunc(), ROTATION * signed
    factor, bits, threshold = 1 + CHANGE * signed, 8 - (BITS * strength).round(), 255 * (1 - strength)
    moves, blends = (shear, shear, shift, shift, angle), (factor, factor, factor, factor)
    amounts = torch.stack([none, *moves, *blends, bits, threshold, none, none])
    return operations.operate(x, operation, amounts.gather(0, operation[None])[0], _nearest)


def _nearest(x: Tensor, grid: Tensor, which: operations.Index) -> Tensor:
    """The nearest pixel, and black outside."""
    return F.grid_sample(x, grid, mode="nearest", padding_mode="zeros", align_corners=False)
