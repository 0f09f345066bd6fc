"""Operations on whole batches of images, each of which has its own operation and its own amount of it.

All images go through the same few kernels, whatever each has drawn: nothing is done image by image, and nothing waits
for the device.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms.v2 import functional as TV

__all__ = ["OPERATIONS", "operate", "sampling_grid"]

OPERATIONS = (
    *("identity", "shear_x", "shear_y", "translate_x", "translate_y", "rotate"),
    *("brightness", "color", "contrast", "sharpness"),
    *("posterize", "solarize", "autocontrast", "equalize", "invert", "solarize_add"),
)
IDENTITY, SHEAR_X, SHEAR_Y, TRANSLATE_X, TRANSLATE_Y, ROTATE = range(6)
BRIGHTNESS, COLOR, CONTRAST, SHARPNESS, POSTERIZE, SOLARIZE, AUTOCONTRAST, EQUALIZE, INVERT, SOLARIZE_ADD = range(6, 16)


def operate(x: Tensor, operation: Tensor, amount: Tensor, sample: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Apply to each image the operation given for it.

    Args:
        x: Whole numbers 0...255 as float32, shape (B, 3, H, W).
        operation: Index into `OPERATIONS`, shape (B,).
        amount: How much of it, shape (B,): for a shear, the tangent of its angle; for a shift, pixels; for a rotation,
            degrees; for brightness, colour, contrast and sharpness, the factor, of which 1 changes nothing; for
            posterize, the bits that are kept; for solarize, the lowest value that is inverted; for solarize_add, what
            is added to values below 128. The others have none.
        sample: Reads images at a grid, as `grid_sample` does.

    Returns:
        uint8, shape (B, 3, H, W).
    """

    def of(*operations: int) -> Tensor:
        return torch.stack([operation == index for index in operations]).any(0)

    def amount_of(*operations: int, otherwise: float) -> Tensor:
        return torch.where(of(*operations), amount, otherwise).view(-1, 1, 1, 1)

    moved = torch.where(
        of(*range(SHEAR_X, ROTATE + 1)).view(-1, 1, 1, 1), sample(x, _grid(x.shape, operation, amount)), x
    )
    factor = amount_of(BRIGHTNESS, COLOR, CONTRAST, SHARPNESS, otherwise=1.0)
    base = _base(moved, operation)
    blended = torch.where(factor == 1, moved, (base + factor * (moved - base)).clamp(0, 255).floor())
    step = 2 ** (8 - amount_of(POSTERIZE, otherwise=8.0))
    coarse = (blended / step).floor() * step
    threshold = torch.where((operation == INVERT).view(-1, 1, 1, 1), 0.0, amount_of(SOLARIZE, otherwise=256.0))
    inverted = torch.where(coarse >= threshold, 255 - coarse, coarse)
    brighter = (inverted + amount_of(SOLARIZE_ADD, otherwise=0.0)).clamp(max=255)
    whole = torch.where(inverted < 128, brighter, inverted).to(torch.uint8)
    stretched = torch.where((operation == AUTOCONTRAST).view(-1, 1, 1, 1), TV.autocontrast(whole), whole)
    return torch.where((operation == EQUALIZE).view(-1, 1, 1, 1), TV.equalize(stretched), stretched)


def sampling_grid(across: tuple[Tensor, ...], along: tuple[Tensor, ...], shape: torch.Size) -> Tensor:
    """Where each pixel comes from, as `grid_sample` takes it: shape (B, H, W, 2).

    Args:
        across, along: (a, b, c) and (d, e, f), each of shape (B,): what is seen at (x, y) comes from (a x + b y + c,
            d x + e y + f), in pixels from the image's centre.
        shape: Of the images, (B, C, H, W).
    """
    height, width = shape[-2:]
    (a, b, c), (d, e, f) = across, along
    # affine_grid counts in half sides.
    rows = [a, b * height / width, c * 2 / width], [d * width / height, e, f * 2 / height]
    theta = torch.stack([torch.stack(row, 1) for row in rows], 1)
    return F.affine_grid(theta, list(shape), align_corners=False)


def _grid(shape: torch.Size, operation: Tensor, amount: Tensor) -> Tensor:
    """Shears about the upper left corner, shifts, and rotations about the centre."""
    height, width = shape[-2:]
    shear_x, shear_y, right, down, angle = (
        torch.where(operation == index, amount, 0.0) for index in (SHEAR_X, SHEAR_Y, TRANSLATE_X, TRANSLATE_Y, ROTATE)
    )
    cos, sin = torch.cos(torch.deg2rad(angle)), torch.sin(torch.deg2rad(angle))
    # Only one operation is not idle.
    across = cos, shear_x - sin, shear_x * height / 2 - right
    along = shear_y + sin, cos, shear_y * width / 2 - down
    return sampling_grid(across, along, shape)


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
