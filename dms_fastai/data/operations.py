"""Operations on whole batches of images, each of which has its own operation and its own amount of it.

Nothing is done image by image, and nothing waits for the device: on a GPU, all images go through the same few kernels,
whatever each has drawn. On a CPU, an operation computes the images that have drawn it.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms.v2 import functional as TV

__all__ = ["OPERATIONS", "Index", "operate", "runs_ahead", "sampling_grid", "where_chosen"]

Index = Tensor | slice  # which images of a batch
Sample = Callable[[Tensor, Tensor, Index], Tensor]

OPERATIONS = (
    *("identity", "shear_x", "shear_y", "translate_x", "translate_y", "rotate"),
    *("brightness", "color", "contrast", "sharpness"),
    *("posterize", "solarize", "autocontrast", "equalize", "invert", "solarize_add"),
)
IDENTITY, SHEAR_X, SHEAR_Y, TRANSLATE_X, TRANSLATE_Y, ROTATE = range(6)
BRIGHTNESS, COLOR, CONTRAST, SHARPNESS, POSTERIZE, SOLARIZE, AUTOCONTRAST, EQUALIZE, INVERT, SOLARIZE_ADD = range(6, 16)


def operate(x: Tensor, operation: Tensor, amount: Tensor, sample: Sample) -> Tensor:
    """Apply to each image the operation given for it.

    Args:
        x: Whole numbers 0...255 as float32, shape (B, 3, H, W).
        operation: Index into `OPERATIONS`, shape (B,).
        amount: How much of it, shape (B,): for a shear, the tangent of its angle; for a shift, pixels; for a rotation,
            degrees; for brightness, colour, contrast and sharpness, the factor, of which 1 changes nothing; for
            posterize, the bits that are kept; for solarize, the lowest value that is inverted; for solarize_add, what
            is added to values below 128. The others have none.
        sample: Reads some of the images at a grid: `sample(images, grid, which)` is `grid_sample(images, grid)` in
            its own way, and `which` are the images' indices in the batch.

    Returns:
        uint8, shape (B, 3, H, W).
    """

    x = x.clone()

    def of(first: int, last: int, change: Callable[[Tensor, Index], Tensor]) -> None:
        nonlocal x
        x = where_chosen((operation >= first) & (operation <= last), x, change)

    def of_one(index: int, change: Callable[[Tensor, Tensor], Tensor]) -> None:
        of(index, index, lambda x, which: change(x, amount[which].view(-1, 1, 1, 1)))

    of(SHEAR_X, ROTATE, lambda x, which: sample(x, _grid(x.shape, operation[which], amount[which]), which))
    of_one(BRIGHTNESS, lambda x, factor: _blend(torch.zeros_like(x), x, factor))
    of_one(COLOR, lambda x, factor: _blend(_grey(x), x, factor))
    of_one(CONTRAST, lambda x, factor: _blend(_grey(x).mean((1, 2, 3), keepdim=True), x, factor))
    of_one(SHARPNESS, lambda x, factor: _blend(_blurred(x), x, factor))
    of_one(POSTERIZE, lambda x, bits: (x / 2 ** (8 - bits)).floor() * 2 ** (8 - bits))
    of_one(SOLARIZE, lambda x, lowest: torch.where(x >= lowest, 255 - x, x))
    of_one(AUTOCONTRAST, lambda x, _: TV.autocontrast(x.to(torch.uint8)).to(x.dtype))
    of_one(EQUALIZE, lambda x, _: TV.equalize(x.to(torch.uint8)).to(x.dtype))
    of_one(INVERT, lambda x, _: 255 - x)
    of_one(SOLARIZE_ADD, lambda x, added: torch.where(x < 128, (x + added).clamp(max=255), x))
    return x.to(torch.uint8)


def runs_ahead(device: torch.device) -> bool:
    """Whether Python goes on while the device computes, so that a shape that depends on values has to be waited for."""
    return device.type != "cpu"


def where_chosen(chosen: Tensor, x: Tensor, change: Callable[[Tensor, Index], Tensor]) -> Tensor:
    """Change the chosen images, and leave the others as they are.

    A CPU computes the chosen ones alone, in place. A device that runs ahead computes all: it would have to be waited
    for to learn how many there are.

    Args:
        chosen: Which, bool, shape (B,).
        x: Images, shape (B, C, H, W); on a CPU, they are changed.
        change: Gets images, and which of the batch they are, as an index of anything that has a value for each image.
    """
    if runs_ahead(x.device):
        return torch.where(chosen.view(-1, 1, 1, 1), change(x, slice(None)), x)
    which = chosen.nonzero().flatten()
    return x.index_copy_(0, which, change(x[which], which)) if len(which) else x


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


def _grey(x: Tensor) -> Tensor:
    """Shape (B, 1, H, W)."""
    return (0.2989 * x[:, :1] + 0.587 * x[:, 1:2] + 0.114 * x[:, 2:3]).floor()


def _blurred(x: Tensor) -> Tensor:
    """The kernel is 1 1 1 / 1 5 1 / 1 1 1, over 13: nine of a mean of nine, and four of the middle. Edges stay."""
    blurred = x.clone()
    blurred[..., 1:-1, 1:-1] = ((9 * F.avg_pool2d(x, 3, stride=1) + 4 * x[..., 1:-1, 1:-1]) / 13).round()
    return blurred


def _blend(base: Tensor, x: Tensor, factor: Tensor) -> Tensor:
    """The base of 0, and the image of 1; what lies beyond is extrapolated."""
    return torch.where(factor == 1, x, (base + factor * (x - base)).clamp(0, 255).floor())
