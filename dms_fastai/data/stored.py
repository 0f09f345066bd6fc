"""The images of a split wherever their bytes are, in memory or in a memory map: some of them are gathered by index."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

import torch
from torch import Tensor

__all__ = ["CHANNELS", "Squares", "Stored", "Wholes"]

BLOCK = 1024  # images that are gone through at once
CHANNELS = 3


class Stored:
    """Images in one or more parts, of which a selection is meant, in an order of its own.

    Attributes:
        shape: Channels, height and width of the images as they are given out.
    """

    shape: tuple[int, int, int]

    def __len__(self) -> int:
        raise NotImplementedError

    @property
    def nbytes(self) -> int:
        """Bytes of the selected images."""
        raise NotImplementedError

    def subset(self, index: Tensor) -> Stored:
        """The images at `index`, shape (n,), without a copy."""
        raise NotImplementedError

    def joined(self, other: Stored) -> Stored:
        """These images and, after them, others with the same shape, without a copy."""
        raise NotImplementedError

    def gathered(self, index: Tensor, pinned: bool = False) -> Stored:
        """A copy of the images at `index`, shape (B,), in memory; `pinned`: from where a GPU copies without waiting."""
        raise NotImplementedError

    def to(self, device: torch.device) -> Stored:
        """The selected images on `device`; without a copy if they are there."""
        raise NotImplementedError

    def middles(self, index: Tensor | None = None) -> Tensor:
        """The images at `index`, as they are given out without crops: uint8, (B, C, H, W). None: all of them."""
        raise NotImplementedError

    def blocks(self) -> Iterator[Tensor]:
        """The bytes of all selected images in order, some images at a time: contiguous uint8 tensors."""
        raise NotImplementedError


class Squares(Stored):
    """Images of one size."""

    def __init__(self, parts: Sequence[Tensor], rows: Tensor | None = None):
        """
        Args:
            parts: uint8, each of shape (N, C, H, W), contiguous or channels last.
            rows: Which images, counted through all parts. None: all, in order.
        """
        self.parts, self.rows = list(parts), rows
        self.shape = tuple(parts[0].shape[1:])

    def __len__(self) -> int:
        return sum(map(len, self.parts)) if self.rows is None else len(self.rows)

    @property
    def nbytes(self) -> int:
        channels, height, width = self.shape
        return len(self) * channels * height * width

    def subset(self, index: Tensor) -> Squares:
        return Squares(self.parts, index if self.rows is None else self.rows[index])

    def joined(self, other: Stored) -> Stored:
        if isinstance(other, Wholes):
            return self.as_wholes().joined(other)
        if self.rows is None and other.rows is None:
            return Squares(self.parts + other.parts)
        first = sum(map(len, self.parts))
        own, others = (torch.arange(len(each)) if each.rows is None else each.rows for each in (self, other))
        return Squares(self.parts + other.parts, torch.cat([own, others + first]))

    def gathered(self, index: Tensor, pinned: bool = False) -> Squares:
        return Squares([self._pixels(index, pinned)])

    def to(self, device: torch.device) -> Squares:
        if all(part.device == device for part in self.parts):
            return self
        if self.rows is None:
            return Squares([part.to(device, non_blocking=True) for part in self.parts])
        found = torch.empty(len(self), *self._last().shape[1:], dtype=torch.uint8, device=device)
        for block in torch.arange(len(self)).split(BLOCK):
            found[block[0] : block[-1] + 1] = self._pixels(block).permute(0, 2, 3, 1)
        return Squares([found.permute(0, 3, 1, 2)])

    def middles(self, index: Tensor | None = None) -> Tensor:
        if index is not None:
            return self._pixels(index)
        return self.parts[0] if len(self.parts) == 1 and self.rows is None else self._pixels(torch.arange(len(self)))

    def blocks(self) -> Iterator[Tensor]:
        if self.rows is None:
            return (block.contiguous() for part in self.parts for block in part.split(BLOCK))
        return (self._pixels(index).contiguous() for index in torch.arange(len(self)).split(BLOCK))

    def as_wholes(self) -> Wholes:
        """The same images; those that are channels last are not copied."""
        channels, height, width = self.shape
        parts = [part.permute(0, 2, 3, 1).reshape(-1) for part in self.parts]
        counts = torch.tensor([len(part) for part in self.parts])
        part = torch.repeat_interleave(torch.arange(len(counts)), counts)
        starts = torch.cat([torch.arange(count) for count in counts.tolist()]) * channels * height * width
        found = Wholes(parts, part, starts, torch.tensor([height, width]).expand(len(starts), 2), height)
        return found if self.rows is None else found.subset(self.rows)

    def _last(self) -> Tensor:
        """The first part, channels last."""
        return self.parts[0].permute(0, 2, 3, 1)

    def _pixels(self, index: Tensor, pinned: bool = False) -> Tensor:
        rows = index if self.rows is None else self.rows[index]
        if len(self.parts) == 1:
            return _selected(self.parts[0], rows, pinned)
        shape, device = (len(rows), *self._last().shape[1:]), self.parts[0].device
        found = torch.empty(shape, dtype=torch.uint8, device=device, pin_memory=pinned)
        ends = [0, *torch.tensor([len(part) for part in self.parts]).cumsum(0).tolist()]
        for part, (first, end) in zip(self.parts, pairwise(ends), strict=True):
            own = ((rows >= first) & (rows < end)).nonzero().flatten()
            found[_sent(own, device)] = _selected(part, rows[own] - first).permute(0, 2, 3, 1)
        return found.permute(0, 3, 1, 2)


def _selected(part: Tensor, rows: Tensor, pinned: bool = False) -> Tensor:
    """Images of a part, copied as they lie in memory."""
    planes = part.is_contiguous()
    pixels = part if planes else part.permute(0, 2, 3, 1)
    found = torch.empty(len(rows), *pixels.shape[1:], dtype=torch.uint8, device=part.device, pin_memory=pinned)
    torch.index_select(pixels, 0, _sent(rows, part.device), out=found)
    return found if planes else found.permute(0, 3, 1, 2)


def _sent(index: Tensor, device: torch.device) -> Tensor:
    """An index, which is drawn on the CPU, on the images' device; nothing waits until a GPU has it."""
    return index.to(device, non_blocking=device.type != "cpu")


class Wholes(Stored):
    """Images of any shape, from which crops are cut in training; without crops, their middle squares are given out."""

    def __init__(self, parts: Sequence[Tensor], part: Tensor, starts: Tensor, sides: Tensor, size: int):
        """
        Args:
            parts: uint8, one-dimensional: rows of pixels in colour, image after image.
            part: In which part each image is, int64, shape (N,).
            starts: Where it begins there, int64, shape (N,).
            sides: Its height and width, at least `size`, int64, shape (N, 2).
            size: Height and width of what is given out.
        """
        self.parts, self.part, self.starts, self.sides = list(parts), part, starts, sides
        self.size, self.shape = size, (CHANNELS, size, size)

    @classmethod
    def in_a_row(cls, pixels: Tensor, sides: Tensor, size: int) -> Wholes:
        """Images that follow one another in `pixels`; arguments as above."""
        ends = (sides.prod(1) * CHANNELS).cumsum(0)
        starts = torch.cat([ends.new_zeros(1), ends[:-1]]) if len(ends) else ends
        return cls([pixels], torch.zeros(len(sides), dtype=torch.long), starts, sides, size)

    def __len__(self) -> int:
        return len(self.starts)

    @property
    def nbytes(self) -> int:
        return int(self.sides.prod(1).sum()) * CHANNELS

    def subset(self, index: Tensor) -> Wholes:
        index = index.cpu()
        return Wholes(self.parts, self.part[index], self.starts[index], self.sides[index], self.size)

    def joined(self, other: Stored) -> Wholes:
        if isinstance(other, Squares):
            other = other.as_wholes()
        pairs = (self.part, other.part + len(self.parts)), (self.starts, other.starts), (self.sides, other.sides)
        return Wholes(self.parts + other.parts, *map(torch.cat, pairs), self.size)

    def gathered(self, index: Tensor, pinned: bool = False) -> Wholes:
        chosen = self.subset(index)
        pixels = torch.empty(chosen.nbytes, dtype=torch.uint8, pin_memory=pinned)
        found = Wholes.in_a_row(pixels, chosen.sides, self.size)
        for own, copy in zip(chosen, found, strict=True):
            copy.copy_(own)
        return found

    def to(self, device: torch.device) -> Wholes:
        if all(part.device == device for part in self.parts):
            return self
        if len(self.parts) == 1 and self.nbytes == len(self.parts[0]):
            pixels = self.parts[0].to(device, non_blocking=True)
            return Wholes([pixels], self.part, self.starts, self.sides, self.size)
        found = torch.empty(self.nbytes, dtype=torch.uint8, device=device)
        moved = Wholes.in_a_row(found, self.sides, self.size)
        for first in range(0, len(self), BLOCK):
            block = self.gathered(torch.arange(first, min(first + BLOCK, len(self))))
            start = int(moved.starts[first])
            found[start : start + block.nbytes].copy_(block.parts[0], non_blocking=True)
        return moved

    def __iter__(self) -> Iterator[Tensor]:
        """Views of the images, each uint8 of shape (C, height, width), channels last."""
        for part, start, (height, width) in zip(
            self.part.tolist(), self.starts.tolist(), self.sides.tolist(), strict=True
        ):
            pixels = self.parts[part][start : start + height * width * CHANNELS]
            yield pixels.view(height, width, CHANNELS).permute(2, 0, 1)

    def middles(self, index: Tensor | None = None) -> Tensor:
        chosen, size = self if index is None else self.subset(index), self.size
        found = torch.empty(len(chosen), size, size, CHANNELS, dtype=torch.uint8, device=self.parts[0].device)
        found = found.permute(0, 3, 1, 2)
        for image, middle in zip(chosen, found, strict=True):
            top, left = ((side - size) // 2 for side in image.shape[1:])
            middle.copy_(image[:, top : top + size, left : left + size])
        return found

    def blocks(self) -> Iterator[Tensor]:
        for index in torch.arange(len(self)).split(BLOCK):
            block = self.subset(index)
            yield block.sides
            yield from (image.permute(1, 2, 0).contiguous() for image in block)
