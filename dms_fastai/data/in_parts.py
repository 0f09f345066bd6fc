"""Arrays of images too large for memory, a part at a time: into the same raw file that image files are decoded into."""

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from .decoded import alone, cache_dir, write_rows
from .images import resize, to_rgb
from .rows import Rows, read_rows
from .stored import CHANNELS, Squares
from .white import as_bytes

if TYPE_CHECKING:
    from .npz import ArrayInFile

__all__ = ["extremes", "squares_of"]

READING = "1"  # to be counted up when arrays are converted in another way, so that older files are not used


def extremes(array: "ArrayInFile") -> np.ndarray:
    """The smallest and the largest value, in the array's type; NaN where there is any."""
    found = np.array([[part.min(), part.max()] for part in array.parts()], array.dtype)
    return np.array([found.min(), found.max()], array.dtype)


def squares_of(array: "ArrayInFile", size: int, white: float | None) -> Squares:
    """The middle squares of the images, memory-mapped; a process that was killed as it wrote them leaves what it had.

    Args:
        array: The images.
        size: Height and width that they are resized to.
        white: The value that becomes 255, for pixels that are no bytes.

    Raises:
        UserError: The file is damaged, or the images fit neither on the disk nor into memory.
    """
    stat, file = array.file.stat(), array.file.resolve()
    facts = [READING, array.member, size, white, stat.st_size, stat.st_mtime_ns, stat.st_ino]
    stamp = hashlib.sha256(json.dumps(facts).encode()).hexdigest()
    where = hashlib.sha256(str(file).encode(errors="surrogateescape")).hexdigest()[:16]
    cache = cache_dir() / f"{file.stem}-{Path(array.member).stem}-{size}-{where}"

    def write(rows: Rows) -> None:
        for part in array.parts(len(rows)):
            for image in resize(to_rgb(as_bytes(part, white)), size).permute(0, 2, 3, 1).numpy():
                rows.append(image)

    found = read_rows(cache, stamp, len(array))
    if found is None:
        with alone(cache) as locked:
            found = read_rows(cache, stamp, len(array))
            if found is None:
                needed = len(array) * CHANNELS * size**2
                found = write_rows(write, cache if locked else None, stamp, needed, array.file)
    return Squares([found[0].view(-1, size, size, CHANNELS).permute(0, 3, 1, 2)])
