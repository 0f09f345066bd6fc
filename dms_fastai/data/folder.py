"""Folders of images, `train/CLASS/*.png` and the like: decoded once, then cached beside the user's other caches."""

import contextlib
import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from PIL import Image
from rich.progress import track
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ..errors import UserError
from ..files import whole
from .images import read_image
from .imageset import ImageSet

__all__ = ["cache_dir", "read_folder"]

SPLIT_FOLDERS = {"train": ("train",), "test": ("test",), "val": ("valid", "val")}
SHOW_PROGRESS_FROM = 2000
NAMED = 10  # unreadable files in one message
READING = b"2"  # to be counted up when images are read in another way, so that older caches are not used


def cache_dir() -> Path:
    """Where decoded folders are cached: DMS_FASTAI_CACHE, or dms_fastai in XDG_CACHE_HOME or ~/.cache."""
    own = os.environ.get("DMS_FASTAI_CACHE")
    return Path(own) if own else Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "dms_fastai"


def read_folder(folder: Path, size: int) -> dict[str, ImageSet]:
    """The splits of an image folder; an image's class is the name of the folder that it lies in.

    Decoded images are cached; any file added, removed, resized or touched makes the cache stale.

    Args:
        folder: A folder with train/CLASS/ and, optionally, test/CLASS/ and valid/CLASS/ or val/CLASS/.
        size: Height and width that every image is cropped and resized to.

    Raises:
        UserError: There is no train folder, a class is empty or the only one, a split has a class that train has not,
            or a file cannot be read as an image.
    """
    found = {split: _first_dir(folder, names) for split, names in SPLIT_FOLDERS.items()}
    if found["train"] is None:
        raise UserError(f"{folder} has no folder 'train'; the layout is train/CLASS/*.png and test/CLASS/*.png")
    files = {split: _list_images(path) for split, path in found.items() if path is not None}
    files = {split: classes for split, classes in files.items() if classes or split == "train"}
    vocab = sorted(files["train"])
    if len(vocab) < 2:
        have = f"only the class {vocab[0]!r}" if vocab else "no class folders"
        raise UserError(f"{found['train']} has {have}; a classifier needs at least 2 folders of images")
    for split, classes in files.items():
        strange = sorted(set(classes) - set(vocab))
        if strange:
            raise UserError(f"{found[split]} has a class {strange[0]!r} that {found['train']} does not have")
        empty = sorted(name for name, paths in classes.items() if not paths)
        if empty:
            raise UserError(f"{found[split] / empty[0]} holds no images; fill it or remove it")
    return {split: _read_split(found[split], classes, vocab, size) for split, classes in files.items()}


def _first_dir(folder: Path, names: tuple[str, ...]) -> Path | None:
    return next((folder / name for name in names if (folder / name).is_dir()), None)


def _list_images(split: Path) -> dict[str, list[Path]]:
    """The image files of each class, sorted. Class folders may lie in other folders; hidden files are skipped."""
    suffixes = Image.registered_extensions()
    classes: dict[str, list[Path]] = {}
    seen: set[str] = set()
    for where, folders, names in os.walk(split, followlinks=True):
        here = Path(where)
        if os.path.realpath(here) in seen:  # a link back
            folders.clear()
            continue
        seen.add(os.path.realpath(here))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        images = [here / n for n in sorted(names) if Path(n).suffix.lower() in suffixes and not n.startswith(".")]
        if here != split and (images or not folders):
            classes.setdefault(here.name, []).extend(images)
    return classes


def _read_split(folder: Path, classes: dict[str, list[Path]], vocab: list[str], size: int) -> ImageSet:
    paths = [path for name in vocab for path in classes.get(name, [])]
    labels = torch.tensor([label for label, name in enumerate(vocab) for _ in classes.get(name, [])])
    stamp = _stamp(folder, paths)
    where = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:16]
    cache = cache_dir() / f"{folder.resolve().parent.name}-{folder.name}-{size}-{where}.safetensors"
    images = _load_cache(cache, stamp)
    if images is None:
        images = _decode(paths, size, folder)
        _save_cache(cache, images, stamp)
    return ImageSet(images, labels, vocab)


def _stamp(folder: Path, paths: list[Path]) -> str:
    """A digest of every file's name, size and time of change, and of how files are read."""
    digest = hashlib.sha256(READING)
    for path in paths:
        try:
            stat = path.stat()
        except OSError as error:
            raise UserError(f"{path} cannot be read ({error.strerror}); remove or replace it") from None
        digest.update(json.dumps([str(path.relative_to(folder)), stat.st_size, stat.st_mtime_ns]).encode())
    return digest.hexdigest()


def _decode(paths: list[Path], size: int, folder: Path) -> torch.Tensor:
    images = torch.empty(len(paths), 3, size, size, dtype=torch.uint8)
    errors: dict[str, UserError] = {}
    with ThreadPoolExecutor() as pool:
        decoded = pool.map(lambda path: _image_or_error(path, size), paths)
        if len(paths) >= SHOW_PROGRESS_FROM:
            decoded = track(decoded, f"reading {folder}", total=len(paths), transient=True)
        for index, image in enumerate(decoded):
            if isinstance(image, UserError):
                errors[str(paths[index].relative_to(folder))] = image
            else:
                images[index] = image
    if errors:
        _, *more = errors
        named = ", ".join(more[:NAMED]) + (", ..." if len(more) > NAMED else "")
        first = next(iter(errors.values())).message
        raise UserError(first + (f"; so it is with {len(more)} more in {folder}: {named}" if more else ""))
    return images


def _image_or_error(path: Path, size: int) -> torch.Tensor | UserError:
    try:
        return read_image(path, size)
    except UserError as error:
        return error


def _load_cache(cache: Path, stamp: str) -> torch.Tensor | None:
    try:
        with safe_open(cache, "pt") as file:
            return file.get_tensor("images") if file.metadata().get("stamp") == stamp else None
    except (OSError, SafetensorError):
        return None


def _save_cache(cache: Path, images: torch.Tensor, stamp: str) -> None:
    """Cache decoded images. A cache that cannot be written is no error."""
    with contextlib.suppress(OSError, SafetensorError):
        cache.parent.mkdir(parents=True, exist_ok=True)
        with whole(cache) as partial:
            save_file({"images": images}, partial, {"stamp": stamp})
