"""Augmentation of whole batches, on the device that holds them."""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ..settings import PositiveShare, Share, checked
from .boxes import random_sides, random_starts, resized_crops, resized_parts
from .stored import Squares, Stored, Wholes

__all__ = ["NO_CROPS", "BatchCropper", "Cropper", "Crops", "affine", "at_size", "normalize"]


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
        min_area: Smallest share of an image that is cut out and resized to the image's size; the largest is all of it.
            Image files that are larger are kept so for it, and not square; of others, it is cut out after the crop with
            a border. 1: nothing is cut out.
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


class BatchCropper:
    """Crops of a batch of images, and of their mirror images."""

    def __init__(self, images: Stored, crops: Crops = NO_CROPS, device: torch.device | str = "cpu"):
        """
        Args:
            images: What batches are gathered from.
            crops: What is drawn from.
            device: Where batches are.
        """
        self.crops, self.mirrored = crops, crops.flip > 0
        self.channels, self.height, self.width = images.shape
        self.padding = padding = round(crops.pad * self.width)
        self.padded_height, self.padded_width = self.height + 2 * padding, self.width + 2 * padding
        if crops.border == "mirror":
            self.rows_of, self.columns_of = (mirror(side, padding, device) for side in (self.height, self.width))
        if crops.alternate:
            coins = torch.randint(2, (len(images),), generator=torch.Generator().manual_seed(0), dtype=torch.bool)
            self.coins = coins.to(device)

    def crop(self, images: Stored, index: Tensor, epoch: int = 0) -> Tensor:
        """A crop of each image of a batch, its place drawn uniformly: uint8 (B, C, H, W), channels last.

        Where the images are whole, a part of each is cut out and resized, of random area and shape, and cropped then.

        Args:
            images: The batch, in memory on the device, which nobody else needs.
            index: Which images of all they are, shape (B,), on the device.
            epoch: Counts passes, for `Crops.alternate`.
        """
        cut = isinstance(images, Wholes) and self.crops.min_area < 1
        x = self.cut(images) if cut else images.middles()
        top, left, flipped = self.drawn(index, epoch)
        if flipped is not None:
            x = mirrored(x, flipped)
        if self.padding:
            rows = self.rows(self.padded(x.permute(0, 2, 3, 1)))
            x = self.windows(rows, torch.arange(len(index), device=index.device), top, left)
        x = x.contiguous(memory_format=torch.channels_last)
        return x if cut or self.crops.min_area == 1 else self.enlarged(x)

    def drawn(self, index: Tensor, epoch: int) -> tuple[Tensor | int, Tensor | int, Tensor | None]:
        """Top and left of a crop of each image in its border, and which images are mirrored; None: none is."""
        n, device = len(index), index.device
        top, left = torch.randint(2 * self.padding + 1, (2, n), device=device) if self.padding else (0, 0)
        return top, left, self.flipped(index, epoch) if self.mirrored else None

    def padded(self, pixels: Tensor) -> Tensor:
        """Images (N, H, W, C) with their borders."""
        if self.crops.border == "black":
            return F.pad(pixels, [0, 0, *[self.padding] * 4])
        return pixels[:, self.rows_of][:, :, self.columns_of]

    def rows(self, pixels: Tensor) -> Tensor:
        """Rows of padded images (N, H, W, C); they may start at any pixel, for they overlap in memory."""
        starts = max(pixels.numel() // self.channels - self.width + 1, 0)
        return pixels.contiguous().as_strided((starts, self.width * self.channels), (self.channels, 1))

    def windows(self, rows: Tensor, place: Tensor, top: Tensor | int, left: Tensor | int) -> Tensor:
        """The crops at `top` and `left` of the padded images at `place`: uint8 (B, C, H, W), channels last.

        A crop copies whole rows, which is several times faster than indexing pixels.
        """
        first = (place * self.padded_height + top) * self.padded_width + left
        below = torch.arange(self.height, device=place.device) * self.padded_width
        found = rows.index_select(0, (first[:, None] + below).flatten())
        return found.view(len(place), self.height, self.width, self.channels).permute(0, 3, 1, 2)

    def enlarged(self, x: Tensor) -> Tensor:
        """A part of each image, of random area and shape, at the image's size; all of it where no part drawn fits."""
        n, size, crops = len(x), (self.height, self.width), self.crops
        sides = random_sides(n, size, self.height * self.width, (crops.min_area, 1.0), crops.min_aspect, x.device)
        height, width = (torch.where(side == 0, whole, side) for side, whole in zip(sides, size, strict=True))
        top, left = random_starts(height, self.height), random_starts(width, self.width)
        bicubic = torch.rand(n, device=x.device) < BICUBIC[crops.interpolation]
        return resized_crops(x, top, left, height, width, bicubic)

    def cut(self, images: Wholes) -> Tensor:
        """The same of whole images, each of a size of its own. It is drawn on the CPU, which cuts one after another."""
        crops, most = self.crops, images.sides.T.float()
        area = (crops.min_area, 1.0)
        sides = random_sides(len(images), most, most.prod(0), area, crops.min_aspect, torch.device("cpu"))
        squares = most.amin(0)
        height, width = (torch.where(side == 0, squares, side) for side in sides)
        top, left = (random_starts(side, whole) for side, whole in zip((height, width), most, strict=True))
        bicubic = torch.rand(len(images)) < BICUBIC[crops.interpolation]
        boxes = torch.stack([top, left, height, width], 1).long().tolist()
        return resized_parts(images, boxes, bicubic.tolist(), images.size)

    def flipped(self, index: Tensor, epoch: int) -> Tensor:
        """Which images are mirrored, shape (B,)."""
        if self.crops.alternate:
            return self.coins[index] ^ (epoch % 2 == 1)
        return torch.rand(len(index), device=index.device) < self.crops.flip


class Cropper(BatchCropper):
    """The same crops from copies of all images, with their borders and mirror images: several times faster.

    Takes the memory of the padded images, or twice that with mirror images; see `nbytes`.
    """

    def __init__(self, images: Stored | Tensor, crops: Crops = NO_CROPS, device: torch.device | str | None = None):
        """
        Args:
            images: All images, as `Squares`, or uint8 of shape (N, C, H, W).
            crops: What is drawn from.
            device: Where the copies are; None: where the tensor is.
        """
        device = images.device if device is None else torch.device(device)
        images = images if isinstance(images, Stored) else Squares([images])
        super().__init__(images, crops, device)
        shape = (len(images), 1 + self.mirrored, self.padded_height, self.padded_width, self.channels)
        copies, first = torch.empty(shape, dtype=torch.uint8, device=device), 0
        for block in images.blocks():  # no second copy of everything while this one is made
            pixels = self.padded(block.to(device).permute(0, 2, 3, 1))
            copies[first : first + len(block), 0] = pixels
            if self.mirrored:
                copies[first : first + len(block), 1] = pixels.flip(2)
            first += len(block)
        self.copies = self.rows(copies.flatten(0, 1))

    @staticmethod
    def nbytes(images: Stored, crops: Crops) -> int:
        """Bytes of the copies."""
        channels, height, width = images.shape
        padding = round(crops.pad * width)
        return len(images) * (2 if crops.flip else 1) * channels * (height + 2 * padding) * (width + 2 * padding)

    def take(self, index: Tensor, epoch: int = 0) -> Tensor:
        """As `crop`, for the images at `index`, shape (B,)."""
        top, left, flipped = self.drawn(index, epoch)
        place = index if flipped is None else 2 * index + flipped
        x = self.windows(self.copies, place, top, left)
        return x if self.crops.min_area == 1 else self.enlarged(x)


def mirrored(x: Tensor, flipped: Tensor) -> Tensor:
    """Images (B, C, H, W), some of them flipped left to right; on a CPU, they are changed."""
    if x.device.type != "cpu":
        return torch.where(flipped[:, None, None, None], x.flip(3), x)
    for image in flipped.nonzero().flatten().tolist():  # one after another, they stay in the processor's cache
        x[image] = x[image].flip(2)
    return x


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
    """uint8 images (B, C, H, W) as x * scale + shift, in float32 or the type of `scale`, laid out channels last."""
    pixels = x.to(torch.float32, memory_format=torch.channels_last)
    # To get new memory takes as long as the arithmetic.
    own = pixels if pixels is not x and pixels.dtype == scale.dtype else None
    return torch.addcmul(shift, pixels, scale, out=own)
