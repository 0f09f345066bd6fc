"""Random rectangles in images, and crops of them that are enlarged to the size of the image, by the batch."""

import math
from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["inside", "random_sides", "random_starts", "resized_crops", "resized_parts"]

TRIES = 10  # as in torchvision and timm
A = -0.5  # of the cubic kernel, as in PIL


def random_sides(
    n: int,
    most: tuple[int, int] | Tensor,
    pixels: int | Tensor,
    area: tuple[float, float],
    min_aspect: float,
    device: torch.device,
) -> tuple[Tensor, Tensor]:
    """Draw heights and widths of rectangles, in whole pixels.

    Args:
        n: How many.
        most: Largest height and width; of each image, shape (2, n), if they differ.
        pixels: Of the image, or of each, shape (n,).
        area: Smallest and largest area, as a share of the image's; drawn uniformly.
        min_aspect: Smallest ratio of width to height; the largest is its inverse. Its logarithm is drawn uniformly.
        device: Where they are drawn.

    Returns:
        Two tensors of shape (n,), float32; 0 for a rectangle that is too long in each of ten tries.
    """
    areas = torch.empty(TRIES, n, device=device).uniform_(*area) * pixels
    aspects = torch.empty(TRIES, n, device=device).uniform_(math.log(min_aspect), -math.log(min_aspect)).exp()
    heights, widths = (v.sqrt().round().clamp(min=1) for v in (areas / aspects, areas * aspects))
    fit = (heights <= most[0]) & (widths <= most[1])
    first = fit.int().argmax(0, keepdim=True)
    return tuple(torch.where(fit, sides, 0.0).gather(0, first)[0] for sides in (heights, widths))


def random_starts(sides: Tensor, size: int | Tensor) -> Tensor:
    """Draw where stretches of `sides` pixels begin in `size` pixels, or in those of each: float32, shape (n,)."""
    return (torch.rand_like(sides) * (size - sides + 1)).floor()


def inside(start: Tensor, side: Tensor, size: int) -> Tensor:
    """Which of `size` pixels lie in stretches of `side` pixels from `start`: shape (n, size)."""
    place = torch.arange(size, device=start.device)
    return (place >= start[:, None]) & (place < (start + side)[:, None])


def resized_crops(x: Tensor, top: Tensor, left: Tensor, height: Tensor, width: Tensor, bicubic: Tensor) -> Tensor:
    """Cut a rectangle out of each image and enlarge it to the image's size, as PIL does.

    No rectangle is larger than its image, so that nothing is made smaller.

    Args:
        x: uint8, shape (B, C, H, W).
        top, left, height, width: The rectangles, in whole pixels, shape (B,).
        bicubic: Whether pixels in between are made bicubically, shape (B,); if not, bilinearly.

    Returns:
        uint8, shape (B, C, H, W), channels last.
    """
    n, channels, rows, columns = x.shape
    pixels = x.permute(0, 3, 2, 1).flatten(2).float()
    pixels = (_weights(left, width, columns, bicubic) @ pixels).round_().clamp_(0, 255)
    pixels = pixels.view(n, columns, rows, channels).transpose(1, 2).flatten(2)
    pixels = (_weights(top, height, rows, bicubic) @ pixels).round_().clamp_(0, 255)
    return pixels.to(torch.uint8).view(n, rows, columns, channels).permute(0, 3, 1, 2)


def resized_parts(
    images: Iterable[Tensor], boxes: Sequence[tuple[int, int, int, int]], bicubic: Sequence[bool], size: int
) -> Tensor:
    """Cut a rectangle out of each image, of a size of its own, and resize it, with antialiasing.

    Args:
        images: uint8, each of shape (C, height, width), channels last.
        boxes: Top, left, height and width of each rectangle.
        bicubic: Whether pixels in between are made bicubically; if not, bilinearly.
        size: Height and width of the result.

    Returns:
        uint8, shape (B, C, size, size), channels last.
    """
    found = []
    for image, (top, left, height, width), cubic in zip(images, boxes, bicubic, strict=True):
        part = image[None, :, top : top + height, left : left + width]
        on_cpu = part.device.type == "cpu"  # where bytes are resized several times faster; nowhere else can they be
        part = F.interpolate(
            part if on_cpu else part.float(), (size, size), mode="bicubic" if cubic else "bilinear", antialias=True
        )
        found.append(part if on_cpu else part.round_().clamp_(0, 255).to(torch.uint8))
    return torch.cat(found).contiguous(memory_format=torch.channels_last)


def _weights(start: Tensor, side: Tensor, size: int, bicubic: Tensor) -> Tensor:
    """The share of each old pixel in each new one, along a side: shape (B, new, old)."""
    device = start.device
    centre = (start[:, None] + (torch.arange(size, device=device) + 0.5) * side[:, None] / size)[:, :, None]
    near = (centre - 1.5).floor() + torch.arange(4, device=device)  # a pixel is made of four at most
    d = (near + 0.5 - centre).abs()
    cubic = torch.where(d < 1, ((A + 2) * d - (A + 3)) * d * d + 1, (((d - 5) * d + 8) * d - 4) * A)
    weight = torch.where(bicubic[:, None, None], cubic, (1 - d).clamp(min=0))
    first, last = (place[:, None, None] for place in (start, start + side - 1))
    weight = torch.where((near >= first) & (near <= last), weight, 0.0)
    weight = weight / weight.sum(-1, keepdim=True)
    whole = torch.zeros(len(start), size, size, device=device)
    return whole.scatter_add_(2, near.clamp(0, size - 1).long(), weight)
