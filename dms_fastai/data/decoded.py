"""Image files, decoded once into a raw file beside the user's other caches, which is then memory-mapped."""

import contextlib
import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from filelock import FileLock
from rich.console import Console
from rich.progress import track
from torch import Tensor

from ..errors import UserError, notice
from ..files import amount, sweep
from ..training.losses import UNLABELLED
from .images import grey_white, open_image, read_image, read_whole
from .imageset import ImageSet
from .memory import free_memory
from .rows import Rows, bytes_of, read_rows
from .stored import CHANNELS, Squares, Stored, Wholes
from .white import BYTE, beyond, describe

__all__ = ["EACH", "Listing", "White", "alone", "cache_dir", "decoded_image_set", "white_like", "write_rows"]

SHOW_PROGRESS_FROM = 2000
LISTED = 10  # unreadable files in one message
AHEAD = 64  # files that are given to the threads before the first is asked for
EACH = "each"  # in place of a white: each image is scaled by its own values
NAME = 150  # bytes of a folder's name in that of its cache; systems take 255 in all
White = float | Literal["each"] | None
READING = b"5"  # to be counted up when images are read in another way, so that older caches are not used


@dataclass(frozen=True)
class Listing:
    """The image files of a split.

    Attributes:
        root: The folder that they lie in.
        files: Paths relative to it.
        labels: The class of each, an index into `vocab`, or `UNLABELLED`.
        vocab: Names of the classes.
        name: Tells it from other listings of the same folder.
    """

    root: Path
    files: Sequence[str]
    labels: Sequence[int]
    vocab: Sequence[str]
    name: str = ""


def cache_dir() -> Path:
    """Where decoded images are cached: DMS_FASTAI_CACHE, or dms_fastai in XDG_CACHE_HOME or ~/.cache."""
    own = os.environ.get("DMS_FASTAI_CACHE")
    return Path(own) if own else Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "dms_fastai"


def white_like(train: ImageSet) -> White:
    """How grey of more than 8 bits is scaled in other images than those for training: as theirs, if they have such."""
    return EACH if train.white is None else train.white


def decoded_image_set(listing: Listing, size: int, white: White = None, middle: float = 1.0) -> ImageSet:
    """The listed images, memory-mapped from the cache.

    Any file added, removed, moved, resized or touched makes the cache stale. A process that was killed as it decoded
    leaves the images that it had done, and the next one goes on.

    Args:
        listing: The files.
        size: Height and width of what is given out of each image.
        white: The value of grey of more than 8 bits that becomes 255; `EACH`: what the values of each image suggest.
            None: what those of all images suggest.
        middle: Below 1, images are kept whole, as `read_whole` makes them, and not as their middle squares.

    Raises:
        UserError: Files that cannot be read as images; names them. Or the images fit neither on the disk nor into
            memory.
    """
    images, found = _read(listing, size, white, middle)
    if white is None and found not in (None, BYTE):
        notice(f"{listing.root}: grey {describe(found)}")
    labels = torch.tensor(listing.labels, dtype=torch.long)
    return ImageSet(images, labels, listing.vocab, files=listing.files, root=listing.root, white=found)


def _read(listing: Listing, size: int, white: White, middle: float) -> tuple[Stored, float | None]:
    """The images, and the white that they were scaled with if there is grey of more than 8 bits."""
    root, count = listing.root.resolve(), len(listing.files)
    where = hashlib.sha256(f"{root}{listing.name}".encode(errors="surrogateescape")).hexdigest()[:16]
    stamps = _stamp(listing, *dict.fromkeys((white, None)))
    kept = "" if middle == 1 else f"of{round(size / middle)}"
    name = os.fsencode(f"{root.parent.name}-{root.name}")[-NAME:].decode(errors="ignore")
    cache = cache_dir() / f"{name}-{size}{kept}-{where}"
    found = _kept(cache, stamps, count, white)
    if found is None:
        with alone(cache) as locked:  # of several processes that begin together, one decodes
            found = _kept(cache, stamps, count, white)
            if found is None:
                found = _decode(listing, size, white, middle, cache if locked else None, stamps[0])
    pixels, rows = found
    sides = torch.from_numpy(np.stack([rows["height"], rows["width"]], 1).astype(np.int64))
    whites = rows["white"][~np.isnan(rows["white"])]
    white = float(whites[0]) if len(whites) else None if white == EACH else white
    if (sides == size).all():
        return Squares([pixels.view(count, size, size, CHANNELS).permute(0, 3, 1, 2)]), white
    return Wholes.in_a_row(pixels, sides, size), white


def _kept(cache: Path, stamps: Sequence[str], count: int, white: White) -> tuple[Tensor, np.ndarray] | None:
    """What is in the cache, as `read_rows` gives it; also what was read without a white, if no pixel differs for it."""
    for stamp in stamps:
        found = read_rows(cache, stamp, count)
        if found is not None and (stamp == stamps[0] or {*found[1]["white"][~np.isnan(found[1]["white"])]} <= {white}):
            return found
    return None


@contextlib.contextmanager
def alone(cache: Path) -> Iterator[bool]:
    """Keep other processes from making the same cache; gives whether that was possible, and so whether to write it."""
    lock, locked = FileLock(cache.with_name(f".{cache.name}.lock")), False
    with contextlib.suppress(OSError, NotImplementedError):
        cache.parent.mkdir(parents=True, exist_ok=True)
        sweep(cache.parent, "*")
        lock.acquire()
        locked = True
    try:
        yield locked
    finally:
        lock.release()


def _stamp(listing: Listing, *whites: White) -> list[str]:
    """For each white, a digest of how files are read, and of all names, classes, sizes, times and numbers on the disk.

    The number tells two folders that changed names from what they were, even if sizes and times are the same.
    """
    digests = [hashlib.sha256(READING + json.dumps(white).encode()) for white in whites]
    for name, label in zip(listing.files, listing.labels, strict=True):
        try:
            stat = (listing.root / name).stat()
        except OSError as error:
            raise UserError(f"{listing.root / name} cannot be read ({error.strerror}); remove or replace it") from None
        of_class = "" if label == UNLABELLED else listing.vocab[label]
        facts = [name, of_class, stat.st_size, stat.st_mtime_ns, stat.st_ino]
        for digest in digests:
            digest.update(json.dumps(facts).encode())
    return [digest.hexdigest() for digest in digests]


def _decode(
    listing: Listing, size: int, white: White, middle: float, cache: Path | None, stamp: str
) -> tuple[Tensor, np.ndarray]:
    """Decode what the cache does not have yet; into memory, where there is no cache or it cannot be written."""

    clipped, scaled_alone = [], []

    def decode(index: int, scale: White = white) -> tuple[np.ndarray, float | None]:
        with open_image(listing.root / listing.files[index], round(size / middle)) as image:
            own, scaling = grey_white(image), None if scale == EACH else scale
            kept = read_image(image, size, scaling) if middle == 1 else read_whole(image, size, scaling, middle)
            if None not in (own, scaling) and beyond(own, scaling, decimal=image.mode == "F"):
                clipped.append(listing.files[index])
        if scale == EACH and own not in (None, BYTE):
            scaled_alone.append(listing.files[index])
        return kept.permute(1, 2, 0).numpy(), own if scale is None else None

    def decode_into(rows: Rows) -> None:
        _each(range(len(rows), len(listing.files)), decode, listing, lambda _, found: rows.append(*found))
        whites = {index: own for index, own in enumerate(rows.rows["white"].tolist()) if not math.isnan(own)}
        if whites:
            common = max(whites.values())
            others = [index for index, own in whites.items() if own != common]
            scaled = partial(decode, scale=common)
            _each(others, scaled, listing, lambda index, found: rows.replace(index, found[0], common))
        if clipped:
            notice(
                f"{listing.root}: pixels above {white:g}, which is white in train, become white in {len(clipped)} "
                f"images, such as {min(clipped)}"
            )
        if scaled_alone:
            notice(
                f"{listing.root}: {len(scaled_alone)} grey images of other pixels than bytes, which no training image "
                f"has, are scaled by their own values, such as {min(scaled_alone)}"
            )

    needed = len(listing.files) * CHANNELS * round(size / middle) ** 2
    return write_rows(decode_into, cache, stamp, needed, listing.root)


def write_rows(
    write: Callable[[Rows], None], cache: Path | None, stamp: str, needed: int, source: object
) -> tuple[Tensor, np.ndarray]:
    """Have images written to the cache or, where it cannot be written, into memory; gives them as `read_rows` does.

    Args:
        write: Appends all images that are not there yet.
        cache: As in `read_rows`; None: there is none.
        stamp: As in `read_rows`.
        needed: Bytes that the images take at least.
        source: What they are read from, for messages.

    Raises:
        UserError: They fit neither on the disk nor into memory.
    """
    free, reason = 0, "no cache can be written"
    with contextlib.suppress(OSError):
        free = shutil.disk_usage(cache_dir()).free
    if cache is not None and needed <= free + bytes_of(cache):
        try:
            with Rows.on_disk(cache, stamp) as rows:
                write(rows)
            found = read_rows(cache, stamp, len(rows))
            if found is not None:
                return found
        except OSError as error:
            reason = error.strerror or str(error)
    if needed > (memory := free_memory(torch.device("cpu"))):
        raise UserError(
            f"{source}: the images take {amount(needed)}; {cache_dir()} has {amount(free)} free ({reason}), and "
            f"memory {amount(memory)}; set DMS_FASTAI_CACHE to a folder on another disk, or give a smaller --set "
            f"data.size, or distill.size for a teacher's"
        )
    rows = Rows.in_memory()
    write(rows)
    return rows.content()


def _each(
    indices: Sequence[int], decode: Callable[[int], Any], listing: Listing, use: Callable[[int, Any], None]
) -> None:
    """Call `decode` for every index, several at a time, and `use` with what it gives, in order, up to the first error.

    An interruption ends it after the images at hand.

    Raises:
        UserError: The first error; names the other files that have one, too.
    """

    def try_to(index: int) -> Any:
        try:
            return decode(index)
        except UserError as error:
            return error

    errors: dict[str, UserError] = {}
    pool = ThreadPoolExecutor()
    try:
        found = (
            each for first in range(0, len(indices), AHEAD) for each in pool.map(try_to, indices[first : first + AHEAD])
        )
        if len(indices) >= SHOW_PROGRESS_FROM:
            console = Console(stderr=True)
            found = track(found, f"reading {listing.root}", len(indices), console=console, transient=True)
        for index, each in zip(indices, found, strict=True):
            if isinstance(each, UserError):
                errors[listing.files[index]] = each
            elif not errors:
                use(index, each)
    finally:
        pool.shutdown(cancel_futures=True)
    if errors:
        _, *more = errors
        named = ", ".join(more[:LISTED]) + (", ..." if len(more) > LISTED else "")
        first = next(iter(errors.values())).message
        raise UserError(
            first + (f"; {len(more)} more in {listing.root} cannot be read either: {named}" if more else "")
        )
