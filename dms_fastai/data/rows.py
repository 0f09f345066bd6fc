"""A raw file of images, written image by image: what a killed process wrote, but for the last seconds, is not lost.

The pixels of image after image lie in NAME.pixels. Beside it, NAME.rows has a stamp, which says what the images are
made of, and the height, the width and the white of each image whose pixels are safe on the disk.
"""

import contextlib
import os
import time
import warnings
from array import array
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor

__all__ = ["Rows", "bytes_of", "read_rows"]

ROW = np.dtype([("height", "<u4"), ("width", "<u4"), ("white", "<f8")])
STAMP = 64  # bytes
SECONDS = 5.0  # between two times that the disk has all that was written
CHANNELS = 3


class Rows:
    """Images that are being written."""

    def __init__(self, pixels: BinaryIO, table: BinaryIO, stamp: str, rows: np.ndarray):
        self._pixels, self._table, self._stamp = pixels, table, stamp.encode()
        self._rows, self._ends = bytearray(rows.tobytes()), array("q", [0, *_ends(rows)])
        self._safe, self._synced = len(self._rows), time.monotonic()

    @classmethod
    @contextlib.contextmanager
    def on_disk(cls, file: Path, stamp: str) -> Iterator["Rows"]:
        """Go on with the file NAME, after the images that an earlier process wrote for the same stamp.

        Raises:
            OSError: The disk is full, or nothing can be written there.
        """
        pixels, table = _files(file)
        rows = _readable(file, stamp)
        if not len(rows):  # a file that others may have mapped is never cut short
            for path in (table, pixels):
                path.unlink(missing_ok=True)
        with pixels.open("r+b" if len(rows) else "w+b") as opened, table.open("r+b" if len(rows) else "w+b") as told:
            found = cls(opened, told, stamp, rows)
            opened.truncate(found._ends[-1])
            opened.seek(found._ends[-1])
            told.truncate(STAMP + rows.nbytes if len(rows) else 0)
            try:
                yield found
            finally:
                found.sync()

    @classmethod
    def in_memory(cls) -> "Rows":
        """A file that is nowhere but in memory."""
        return cls(BytesIO(), BytesIO(), "", np.empty(0, ROW))

    def __len__(self) -> int:
        return len(self._ends) - 1

    @property
    def rows(self) -> np.ndarray:
        """Height, width and white of each image that is there; white is NaN where there is none."""
        return np.frombuffer(bytes(self._rows), ROW)

    def append(self, image: np.ndarray, white: float | None = None) -> None:
        """Write the next image, uint8 of shape (H, W, 3), and the white that its own values suggest, if any."""
        self._pixels.write(np.ascontiguousarray(image).data)
        self._ends.append(self._ends[-1] + image.nbytes)
        self._rows += _row(image, white)
        if time.monotonic() - self._synced > SECONDS:
            self.sync()

    def replace(self, index: int, image: np.ndarray, white: float) -> None:
        """Write an image again that is there, with the same height and width."""
        self._pixels.seek(self._ends[index])
        self._pixels.write(np.ascontiguousarray(image).data)
        self._pixels.seek(self._ends[-1])
        first = index * ROW.itemsize
        self._rows[first : first + ROW.itemsize] = _row(image, white)
        self._safe = min(self._safe, first)

    def sync(self) -> None:
        """Have the disk keep all images so far, and only then say that they are there."""
        _flush(self._pixels)
        self._table.seek(0)
        self._table.write(self._stamp)
        self._table.seek(self._safe, os.SEEK_CUR)
        self._table.write(self._rows[self._safe :])
        _flush(self._table)
        self._safe, self._synced = len(self._rows), time.monotonic()

    def content(self) -> tuple[Tensor, np.ndarray]:
        """As `read_rows`, for images in memory."""
        return torch.frombuffer(self._pixels.getbuffer(), dtype=torch.uint8), self.rows


def read_rows(file: Path, stamp: str, count: int) -> tuple[Tensor, np.ndarray] | None:
    """The images of a file that is complete: their pixels, memory-mapped, and their rows; None if it is not.

    Args:
        file: Folder and NAME.
        stamp: What they must be made of.
        count: How many there must be.
    """
    with contextlib.suppress(OSError, ValueError):
        rows = _readable(file, stamp)
        if len(rows) == count and len(np.unique(rows["white"][~np.isnan(rows["white"])])) < 2:
            mapped = np.memmap(_files(file)[0], np.uint8, "r", shape=(int(_ends(rows)[-1]),))
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # that nobody may write to it
                return torch.from_numpy(mapped), rows
    return None


def bytes_of(file: Path) -> int:
    """How many bytes a file has on the disk that is complete, or that has been begun."""
    pixels, _ = _files(file)
    return pixels.stat().st_size if pixels.is_file() else 0


def _files(file: Path) -> tuple[Path, Path]:
    return file.with_name(f"{file.name}.pixels"), file.with_name(f"{file.name}.rows")


def _readable(file: Path, stamp: str) -> np.ndarray:
    """The rows of the images that are there with all their pixels; none if they are of something else."""
    pixels, table = _files(file)
    with contextlib.suppress(OSError):
        told, size = table.read_bytes(), pixels.stat().st_size
        if told[:STAMP] == stamp.encode():
            rows = np.frombuffer(told[STAMP : STAMP + (len(told) - STAMP) // ROW.itemsize * ROW.itemsize], ROW)
            return rows[: np.searchsorted(_ends(rows), size, "right")]
    return np.empty(0, ROW)


def _row(image: np.ndarray, white: float | None) -> bytes:
    return np.array((*image.shape[:2], np.nan if white is None else white), ROW).tobytes()


def _ends(rows: np.ndarray) -> np.ndarray:
    """Where each image ends in the file, in bytes."""
    return (rows["height"].astype(np.int64) * rows["width"] * CHANNELS).cumsum()


def _flush(opened: BinaryIO) -> None:
    opened.flush()
    if not isinstance(opened, BytesIO):
        os.fsync(opened.fileno())
