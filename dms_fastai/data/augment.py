"""Augmentation of whole batches, on the device that holds them."""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ..settings import PositiveShare, Share, checked
from .boxes import random_sides, random_starts, resized_crops

__all__ = ["Cropper", "Crops", "affine", "at_size", "normalize"]


@checked
@dataclass(frozen=True)
class Crops:
    """Random crops of training images, and their mirror images.

    Attributes:
        pad: Border that is added to an image before a crop of its old size is taken, as a share of the size: 0.125 is
            the paper's 4 of 32 pixels. 0: no crops.
        flip: Probability of mirroring left to right.
        border: What the border shows: "black", as in the paper's code, which pads before it normalises; or "mirror",
            the image's own pixels reflected at its edge, the outermost not repeated.
        alternate: If images are mirrored, mirror each in every other epoch and not by chance; in each epoch, about half
            of them.
        min_area: Smallest share of an image that is cut out and enlarged to the image's size, after the crop with a
            border; the largest is all of it. 1: nothing is enlarged.
        min_aspect: Smallest ratio of width to height of what is enlarged; the largest is the inverse.
        interpolation: How pixels in between are made when it is enlarged: "bilinear", "bicubic", or either by chance
            for each image.
    """

    pad: Share = 0.125
    flip: Share = 0.5
    border: Literal["black", "mirror"] = "black"
    alternate: bool = False
    min_area: PositiveShare = 1.0
    min_aspect: PositiveShare = 0.75
    interpolation: Literal["random", "bilinear", "bicubic"] = "random"


BICUBIC = {"bilinear": 0.0, "random": 0.5, "bicubic": 1.0}  # share of the images
NO_CROPS = Crops(pad=0.0, flip=0.0)


class Cropper:
    """Crops of padded images and of their mirror images, a batch at a time.

    Images are kept as rows of pixels. A crop copies whole rows, which is several times faster than indexing pixels, and
    a flip costs nothing. Takes the memory of the padded images, or twice that with mirror images.
    """

    def __init__(self, images: Tensor, crops: Crops = NO_CROPS):
        """
        Args:
            images: uint8, shape (N, C, H, W).
            crops: What `take` draws from.
        """
        self.crops, self.mirrored = crops, crops.flip > 0
        self.channels, self.height, self.width = images.shape[1:]
        self.padding = padding = round(crops.pad * self.width)
        pixels = images.permute(0, 2, 3, 1)
        if crops.border == "black":
            pixels = F.pad(pixels, [0, 0, *[padding] * 4])
        else:
            rows, columns = (mirror(size, padding, images.device) for size in (self.height, self.width))
            pixels = pixels[:, rows][:, :, columns]
        if self.mirrored:
            pixels = torch.stack([pixels, pixels.flip(2)], dim=1).flatten(0, 1)
        pixels = pixels.contiguous()
        self.padded_height, self.padded_width = pixels.shape[1:3]
        # A row of W pixels may start at any pixel: the rows overlap in memory.
        starts = max(pixels.numel() // self.channels - self.width + 1, 0)
        self.rows = pixels.as_strided((starts, self.width * self.channels), (self.channels, 1))
        if crops.alternate:
            coins = torch.randint(2, (len(images),), generator=torch.Generator().manual_seed(0), dtype=torch.bool)
            self.coins = coins.to(images.device)

    def take(self, index: Tensor, epoch: int = 0) -> Tensor:
        """A crop of each image in `index`, shape (B,), its place drawn uniformly: uint8 (B, C, H, W), channels last."""
        n, device = len(index), index.device
        top, left = torch.randint(2 * self.padding + 1, (2, n), device=device) if self.padding else (0, 0)
        if self.mirrored:
            index = 2 * index + self.flipped(index, epoch)
        first = (index * self.padded_height + top) * self.padded_width + left
        below = torch.arange(self.height, device=device) * self.padded_width
        rows = self.rows.index_select(0, (first[:, None] + below).flatten())
        x = rows.view(n, self.height, self.width, self.channels).permute(0, 3, 1, 2)
        return x if self.crops.min_area == 1 else self.enlarged(x)

    def enlarged(self, x: Tensor) -> Tensor:
        """A part of each image, of random area and shape, at the image's size; all of it where no part drawn fits."""
        n, size, crops = len(x), (self.height, self.width), self.crops
        sides = random_sides(n, size, self.height * self.width, (crops.min_area, 1.0), crops.min_aspect, x.device)
        height, width = (torch.where(side == 0, whole, side) for side, whole in zip(sides, size, strict=True))
        top, left = random_starts(height, self.height), random_starts(width, self.width)
        bicubic = torch.rand(n, device=x.device) < BICUBIC[crops.interpolation]
        return resized_crops(x, top, left, height, width, bicubic)

    def flipped(self, index: Tensor, epoch: int) -> Tensor:
        """Which images are mirrored, shape (B,)."""
        if self.crops.alternate:
            return self.coins[index] ^ (epoch % 2 == 1)
        return torch.rand(len(index), device=index.device) < self.crops.flip


def mirror(size: int, padding: int, device: torch.device) -> Tensor:
    """Indices of a side of `size` pixels with mirrored borders of `padding` pixels: 2 1 0 1 2 3 2 1 for 4 and 2."""
    place = torch.arange(-padding, size + padding, device=device).abs()
    return (size - 1 - (size - 1 - place).abs()).clamp(min=0)


def affine(mean: tuple[float, ...], std: tuple[float, ...], size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Scale and shift that turn pixels 0...255 into (x / 255 - mean) / std, each of shape (1, C, size, size).

    They have the full size and are channels last, so that a batch is normalised in one pass over memory in order.
    """
    mean, std = (torch.tensor(v, device=device).view(1, -1, 1, 1) for v in (mean, std))
    scale, shift = 1 / (255 * std), -mean / std
    return tuple(v.expand(-1, -1, size, size).contiguous(memory_format=torch.channels_last) for v in (scale, shift))


def at_size(x: Tensor, sides: tuple[int, int]) -> Tensor:
    """Images (B, C, H, W) resized to `sides`, height and width, as PIL does; the same tensor if they have them."""
    if tuple(x.shape[-2:]) == tuple(sides):
        return x
    return F.interpolate(x, tuple(sides), mode="bilinear", antialias=True)


def normalize(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """uint8 images (B, C, H, W) as float32, x * scale + shift, laid out channels last."""
    return torch.addcmul(shift, x.to(torch.float32, memory_format=torch.channels_last), scale)
