"""Augmentation of whole batches, on the device that holds them."""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["Border", "Crops", "affine", "normalize"]

Border = Literal["black", "mirror"]


class Crops:
    """Every crop of every padded picture, and of its mirror image, to be gathered by the batch.

    Pictures are kept as rows of pixels, so that a crop is a few whole rows copied: several times faster than indexing
    pixels, and a flip costs nothing. Takes the memory of the padded pictures, twice that with mirror images.
    """

    def __init__(self, images: Tensor, padding: int = 0, mirrored: bool = False, border: Border = "black"):
        """
        Args:
            images: uint8, shape (N, C, H, W).
            padding: Pixels of border on every side.
            mirrored: Keep mirror images too, so that `take` can flip.
            border: "black", as the paper's code pads before it normalises, or "mirror", which goes on with the
                picture's own pixels backwards, without the outermost.
        """
        self.padding, self.mirrored = padding, mirrored
        self.channels, self.height, self.width = images.shape[1:]
        pixels = images.permute(0, 2, 3, 1)
        if border == "black":
            pixels = F.pad(pixels, [0, 0, *[padding] * 4])
        else:
            rows, columns = (mirror(size, padding, images.device) for size in (self.height, self.width))
            pixels = pixels[:, rows][:, :, columns]
        if mirrored:
            pixels = torch.stack([pixels, pixels.flip(2)], dim=1).flatten(0, 1)
        pixels = pixels.contiguous()
        self.padded_height, self.padded_width = pixels.shape[1:3]
        # A row of W pixels may start at any pixel: the rows overlap in memory.
        starts = max(pixels.numel() // self.channels - self.width + 1, 0)
        self.rows = pixels.as_strided((starts, self.width * self.channels), (self.channels, 1))

    def take(self, index: Tensor, flip: float | Tensor = 0.0) -> Tensor:
        """A crop of each picture in `index`, its place drawn uniformly, mirrored with probability `flip`.

        `flip` may say it for each picture instead, as bool of shape (B,). Returns uint8 pictures, shape (B, C, H, W),
        channels last.
        """
        n, device = len(index), index.device
        top, left = torch.randint(2 * self.padding + 1, (2, n), device=device) if self.padding else (0, 0)
        if self.mirrored:
            index = 2 * index + (flip if isinstance(flip, Tensor) else torch.rand(n, device=device) < flip)
        first = (index * self.padded_height + top) * self.padded_width + left
        below = torch.arange(self.height, device=device) * self.padded_width
        rows = self.rows.index_select(0, (first[:, None] + below).flatten())
        return rows.view(n, self.height, self.width, self.channels).permute(0, 3, 1, 2)


def mirror(size: int, padding: int, device: torch.device) -> Tensor:
    """Indices of a side of `size` pixels with a border in which they run backwards: 2 1 0 1 2 3 2 1 for 4 and 2."""
    place = torch.arange(-padding, size + padding, device=device).abs()
    return (size - 1 - (size - 1 - place).abs()).clamp(min=0)


def affine(mean: tuple[float, ...], std: tuple[float, ...], size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Scale and shift that turn pixels 0...255 into (x / 255 - mean) / std, each of shape (1, C, size, size).

    Of full size and channels last, so that a batch is normalised in one pass over memory in order.
    """
    mean, std = (torch.tensor(v, device=device).view(1, -1, 1, 1) for v in (mean, std))
    scale, shift = 1 / (255 * std), -mean / std
    return tuple(v.expand(-1, -1, size, size).contiguous(memory_format=torch.channels_last) for v in (scale, shift))


def normalize(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """uint8 pictures (B, C, H, W) as float32, x * scale + shift, laid out channels last."""
    return torch.addcmul(shift, x.to(torch.float32, memory_format=torch.channels_last), scale)
