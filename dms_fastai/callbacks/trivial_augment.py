"""TrivialAugment: one operation of random strength for each image, for whole batches on their device."""

import torch
import torch.nn.functional as F
from fastai.callback.core import Callback
from torch import Tensor
from torchvision.transforms.v2 import functional as TV

from ..data.augment import affine, normalize
from ..data.loader import statistics
from ..training.parts import order_of

__all__ = ["OPERATIONS", "TrivialAugment", "apply", "trivial_augment"]

OPERATIONS = (
    *("identity", "shear_x", "shear_y", "translate_x", "translate_y", "rotate"),
    *("brightness", "color", "contrast", "sharpness"),
    *("posterize", "solarize", "autocontrast", "equalize"),
)
IDENTITY, SHEAR_X, SHEAR_Y, TRANSLATE_X, TRANSLATE_Y, ROTATE = range(6)
BRIGHTNESS, COLOR, CONTRAST, SHARPNESS, POSTERIZE, SOLARIZE, AUTOCONTRAST, EQUALIZE = range(6, 14)
BINS = 31  # strengths, from none to full
SHEAR, TRANSLATION, ROTATION, CHANGE, BITS = 0.99, 32.0, 135.0, 0.99, 6.0  # the wide space, translation in pixels


class TrivialAugment(Callback):
    """Change each training image by one of 14 operations, drawn with its strength (Mueller and Hutter, 2021).

    The operations and their ranges are those of the paper's wide space. All images of a batch go through the same few
    kernels, whatever each has drawn: nothing is done image by image, and nothing waits for the device.
    """

    order, run_valid = order_of("trivial_augment"), False
    scaling: tuple[Tensor, Tensor] | None = None
    _stateattrs = ("scaling",)

    def before_fit(self) -> None:
        self.scaling = None  # the DataLoaders may have changed

    def before_batch(self) -> None:
        x, *rest = self.learn.xb
        if self.scaling is None or self.scaling[0].device != x.device:
            self.scaling = affine(*statistics(self.learn.dls), 1, x.device)
        scale, shift = self.scaling
        pixels = ((x - shift) / scale).round().clamp(0, 255)
        self.learn.xb = (normalize(trivial_augment(pixels), scale, shift), *rest)


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

    def of(*operations: int) -> Tensor:
        return torch.stack([operation == index for index in operations]).any(0)

    def where(index: int, value: Tensor, otherwise: float) -> Tensor:
        return torch.where(operation == index, value, otherwise).view(-1, 1, 1, 1)

    moved = torch.where(of(*range(SHEAR_X, ROTATE + 1)).view(-1, 1, 1, 1), _move(x, operation, signed), x)
    factor = torch.where(of(BRIGHTNESS, COLOR, CONTRAST, SHARPNESS), 1 + CHANGE * signed, 1.0).view(-1, 1, 1, 1)
    base = _base(moved, operation)
    blended = torch.where(factor == 1, moved, (base + factor * (moved - base)).clamp(0, 255).floor())
    step = 2 ** where(POSTERIZE, (BITS * strength).round(), 0.0)
    coarse = (blended / step).floor() * step
    threshold = where(SOLARIZE, 255 * (1 - strength), 256.0)
    inverted = torch.where(coarse >= threshold, 255 - coarse, coarse)
    whole = inverted.to(torch.uint8)
    stretched = torch.where((operation == AUTOCONTRAST).view(-1, 1, 1, 1), TV.autocontrast(whole), whole)
    return torch.where((operation == EQUALIZE).view(-1, 1, 1, 1), TV.equalize(stretched), stretched)


def _move(x: Tensor, operation: Tensor, signed: Tensor) -> Tensor:
    """Shear images about the upper left corner, shift them, or turn them about the centre; fill with black."""
    height, width = x.shape[-2:]
    zero = torch.zeros_like(signed)
    shear_x, shear_y, right, down, angle = (
        torch.where(operation == index, signed * most, zero)
        for index, most in (
            (SHEAR_X, SHEAR),
            (SHEAR_Y, SHEAR),
            (TRANSLATE_X, TRANSLATION),
            (TRANSLATE_Y, TRANSLATION),
            (ROTATE, ROTATION),
        )
    )
    cos, sin = torch.cos(torch.deg2rad(angle)), torch.sin(torch.deg2rad(angle))
    # Where each pixel comes from, in pixels from the centre: a matrix and a shift. Only one operation is not idle.
    # In units of half a side, as affine_grid takes them, the matrix also has the ratio of the sides.
    across = [cos, (shear_x - sin) * height / width, shear_x * height / width - right.trunc() * 2 / width]
    along = [(shear_y + sin) * width / height, cos, shear_y * width / height - down.trunc() * 2 / height]
    theta = torch.stack([torch.stack(row, 1) for row in (across, along)], 1)
    grid = F.affine_grid(theta, list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, mode="nearest", padding_mode="zeros", align_corners=False)


def _base(x: Tensor, operation: Tensor) -> Tensor:
    """What an image is blended with: black, the image in grey, the mean of that, or the blurred image."""
    grey = (0.2989 * x[:, :1] + 0.587 * x[:, 1:2] + 0.114 * x[:, 2:3]).floor()
    # The kernel is 1 1 1 / 1 5 1 / 1 1 1, over 13: nine of a mean of nine, and four of the middle.
    inside = ((9 * F.avg_pool2d(x, 3, stride=1) + 4 * x[..., 1:-1, 1:-1]) / 13).round()
    blurred = x.clone()
    blurred[..., 1:-1, 1:-1] = inside
    chosen = operation.view(-1, 1, 1, 1)
    base = torch.where(chosen == COLOR, grey, torch.zeros_like(x))
    base = torch.where(chosen == CONTRAST, grey.mean((1, 2, 3), keepdim=True), base)
    return torch.where(chosen == SHARPNESS, blurred, base)
