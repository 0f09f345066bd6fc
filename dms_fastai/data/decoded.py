"""Image files, decoded once, then cached beside the user's other caches."""

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from filelock import FileLock
from rich.console import Console
from rich.progress import track
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..errors import UserError, notice
from ..files import sweep, whole
from ..training.losses import UNLABELLED
from .images import grey_white, open_image, read_image
from .imageset import ImageSet
from .white import BYTE, describe

__all__ = ["Listing", "cache_dir", "decoded_image_set"]

SHOW_PROGRESS_FROM = 2000
LISTED = 10  # unreadable files in one message
AHEAD = 64  # files that are given to the threads before the first is asked for
READING = b"3"  # to be counted up when images are read in another way, so that older caches are not used


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


def decoded_image_set(listing: Listing, size: int, like: ImageSet | None = None) -> ImageSet:
    """The listed images, square.

    They are cached; any file added, removed, moved, resized or touched makes the cache stale.

    Args:
        listing: The files.
        size: Height and width that every image is cropped and resized to.
        like: The training images, if these are others: grey of more than 8 bits is scaled as theirs is.

    Raises:
        UserError: Files that cannot be read as images; names them.
    """
    images, white = _read(listing, size, None if like is None else like.white)
    if like is None and white not in (None, BYTE):
        notice(f"{listing.root}: grey {describe(white)}")
    labels = torch.tensor(listing.labels, dtype=torch.long)
    return ImageSet(images, labels, listing.vocab, files=listing.files, root=listing.root, white=white)


def _read(listing: Listing, size: int, white: float | None) -> tuple[Tensor, float | None]:
    """The images, and the white that they were scaled with if there is grey of more than 8 bits."""
    root = listing.root.resolve()
    where = hashlib.sha256(f"{root}{listing.name}".encode(errors="surrogateescape")).hexdigest()[:16]
    stamp = _stamp(listing, white)
    cache = cache_dir() / f"{root.parent.name}-{root.name}-{size}-{where}.safetensors"
    found = _load_cache(cache, stamp)
    if found is None:
        with _alone(cache):  # of several processes that begin together, one decodes
            found = _load_cache(cache, stamp)
            if found is None:
                found = _decode(listing, size, white)
                _save_cache(cache, *found, stamp)
    return found


@contextlib.contextmanager
def _alone(cache: Path) -> Iterator[None]:
    """Keep other processes from making the same cache. Where nothing can be cached or locked, everybody decodes."""
    lock = FileLock(cache.with_name(f".{cache.name}.lock"))
    with contextlib.suppress(OSError, NotImplementedError):
        cache.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _stamp(listing: Listing, white: float | None) -> str:
    """A digest of how files are read, and of every file's name, class, size, time of change and number on its disk.

    The number tells two folders that changed names from what they were, even if sizes and times are the same.
    """
    digest = hashlib.sha256(READING + json.dumps(white).encode())
    for name, label in zip(listing.files, listing.labels, strict=True):
        try:
            stat = (listing.root / name).stat()
        except OSError as error:
            raise UserError(f"{listing.root / name} cannot be read ({error.strerror}); remove or replace it") from None
        of_class = "" if label == UNLABELLED else listing.vocab[label]
        facts = [name, of_class, stat.st_size, stat.st_mtime_ns, stat.st_ino]
        digest.update(json.dumps(facts).encode())
    return digest.hexdigest()


def _decode(listing: Listing, size: int, white: float | None) -> tuple[Tensor, float | None]:
    images = torch.empty(len(listing.files), 3, size, size, dtype=torch.uint8)
    whites: dict[int, float] = {}

    def decode(index: int, scale: float | None) -> None:
        with open_image(listing.root / listing.files[index]) as image:
            own = grey_white(image) if scale is None else None
            images[index] = read_image(image, size, scale)
        if own is not None:
            whites[index] = own

    _each(range(len(images)), lambda index: decode(index, white), listing)
    if whites:
        white = max(whites.values())
        _each([index for index, own in whites.items() if own != white], lambda index: decode(index, white), listing)
    return images, white


def _each(indices: Sequence[int], decode: Callable[[int], None], listing: Listing) -> None:
    """Call `decode` for every index, several at a time; an interruption ends it after the images at hand.

    Raises:
        UserError: The first error; names the other files that have one, too.
    """

    def error_of(index: int) -> UserError | None:
        try:
            decode(index)
        except UserError as error:
            return error
        return None

    errors: dict[str, UserError] = {}
    pool = ThreadPoolExecutor()
    try:
        found = (
            error
            for first in range(0, len(indices), AHEAD)
            for error in pool.map(error_of, indices[first : first + AHEAD])
        )
        if len(indices) >= SHOW_PROGRESS_FROM:
            console = Console(stderr=True)
            found = track(found, f"reading {listing.root}", len(indices), console=console, transient=True)
        for index, error in zip(indices, found, strict=True):
            if error is not None:
                errors[listing.files[index]] = error
    finally:
        pool.shutdown(cancel_futures=True)
    if errors:
        _, *more = errors
        named = ", ".join(more[:LISTED]) + (", ..." if len(more) > LISTED else "")
        first = next(iter(errors.values())).message
        raise UserError(first + (f"; so it is with {len(more)} more in {listing.root}: {named}" if more else ""))


def _load_cache(cache: Path, stamp: str) -> tuple[Tensor, float | None] | None:
    try:
        with safe_open(cache, "pt") as file:
            facts = file.metadata() or {}
            if facts.get("stamp") == stamp:
                return file.get_tensor("images"), json.loads(facts["white"])
    except (OSError, SafetensorError, KeyError, ValueError):
        pass
    return None


def _save_cache(cache: Path, images: Tensor, white: float | None, stamp: str) -> None:
    """Cache decoded images. A cache that cannot be written is no error."""
    with contextlib.suppress(OSError, SafetensorError):
        cache.parent.mkdir(parents=True, exist_ok=True)
        sweep(cache.parent, "*")
        with whole(cache) as partial:
            save_file({"images": images}, partial, {"stamp": stamp, "white": json.dumps(white)})
