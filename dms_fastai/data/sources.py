"""Where images come from: digits, named data sets, folders, arrays, tables and archives, each as splits."""

import contextlib
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from fastai.data.external import URLs, fastai_path, untar_data
from filelock import FileLock

from ..errors import UserError, notice, reason_of
from ..names import source_name
from .archive import count_files, is_archive, unpacked
from .cifar import is_cifar, read_cifar
from .decoded import EACH, White
from .folder import find_images, has_image_splits, only_folder, read_folder
from .images import resize, to_rgb
from .imageset import ImageSet
from .npz import read_npz
from .parquet import LABELS, parquet_files, unpack_parquet
from .splits import Splits
from .table import read_table

__all__ = ["NAMED", "USUAL_SIZE", "has_own_size", "load_splits", "split_by_class"]

URL = {"cifar10": URLs.CIFAR, "cifar100": URLs.CIFAR_100, "imagenette": URLs.IMAGENETTE_160}
IMAGES = {"cifar10": 60_000, "cifar100": 60_000, "imagenette": 13_394}
USUAL_SIZE = 32  # of images that have none of their own
DEFAULT_SIZE = {"digits": 8, "imagenette": 64}
DIGITS_TEST_SHARE = 0.2
DIGITS_SEED = 0


def load_splits(
    data: str | Path,
    size: int | None = None,
    labels: str | Path | None = None,
    classes: Sequence[str] | None = None,
    middle: float = 1.0,
    to_train: bool = True,
    white: White = None,
) -> Splits:
    """Open a data set, each of its splits read when it is asked for.

    These are "train" and, where there are any, "test", "val" and "unlabelled".

    Args:
        data: A name in `NAMED`, a folder, a file or an archive, as in `load_data`.
        size: Height and width in pixels. None: the data set's own size if it has one, else 32.
        labels: A table of the images' labels, if `data` is a folder without them.
        classes: Names of the classes, in order, to be taken where no training image has a label.
        middle: Share of the shorter side of image files that is seen without crops. Below 1, they are kept whole;
            arrays are read as squares of `size` all the same.
        to_train: Whether a network is to be trained on them. If not, a folder, a table or an .npz file may
            have test images alone, or one class; image files to train on are read only when somebody asks for them.
        white: The white that a network was trained with, for pixels that are no bytes; `EACH`: it was trained on bytes.
            None: what the training images suggest.

    Raises:
        UserError: Data that are missing or cannot be trained on; says which and why.
    """
    name = source_name(data)
    if str(data) in NAMED:
        if Path(data).is_dir():
            notice(f"{data} is the data set of that name; for the folder, give ./{data}")
        if labels is not None:
            raise UserError(f"labels is {labels}, and {data} has labels of its own")
        splits = NAMED[name](name, size or DEFAULT_SIZE.get(name, USUAL_SIZE), middle, to_train, white)
    else:
        table = None if labels is None else Path(labels).expanduser()
        splits = _read(Path(data).expanduser(), size, table, classes, middle, to_train, white)
    splits.name = name
    return splits


def has_own_size(data: str | Path) -> bool:
    """Whether the images of a data set have a size where none is asked for; those of folders and tables get one."""
    if str(data) in NAMED:
        return True
    path = Path(data).expanduser()
    if path.is_file() and is_archive(path):
        path = only_folder(unpacked(path))
    return path.suffix.lower() == ".npz" or is_cifar(path)


def _read(
    path: Path,
    size: int | None,
    labels: Path | None,
    classes: Sequence[str] | None,
    middle: float,
    to_train: bool,
    white: White,
) -> Splits:
    if path.is_file() and is_archive(path):
        path = only_folder(unpacked(path), to_train)
    if labels is not None:
        if not path.is_dir():
            raise UserError(f"labels is {labels}, and {path} is no folder of images")
        return read_table(path, labels, size or USUAL_SIZE, middle, to_train, white)
    if path.suffix.lower() == ".npz" and path.is_file():
        return read_npz(path, size, classes, to_train, None if white == EACH else white)
    if not has_image_splits(path) and (files := parquet_files(path)):
        images = unpacked(path, unpack_parquet, [file for _, file in files])
        return read_table(images, images / LABELS, size or USUAL_SIZE, middle, to_train, white)
    if is_cifar(path):
        return read_cifar(path, size)
    return read_folder(path, size or USUAL_SIZE, classes, middle, to_train, white)


def _digits(name: str, size: int, middle: float, to_train: bool, white: White) -> Splits:
    """The 1,797 digits that scikit-learn ships, 8x8 with 17 grey levels; every class is split alike."""
    from sklearn.datasets import load_digits  # a second and a half of imports, for this alone

    bunch = load_digits()
    pixels = torch.from_numpy((bunch.images * (255 / 16)).round().astype(np.uint8))
    labels = torch.from_numpy(bunch.target).long()
    every = ImageSet(resize(to_rgb(pixels), size), labels, [str(i) for i in bunch.target_names])
    every.own_size = pixels.shape[-1]
    test, train = split_by_class(labels, DIGITS_TEST_SHARE, DIGITS_SEED)
    splits = Splits()
    splits.add("train", lambda: every.subset(train))
    splits.add("test", lambda: every.subset(test))
    return splits


def _fastai(name: str, size: int, middle: float, to_train: bool, white: White) -> Splits:
    """A data set at fastai's own address, downloaded once into fastai's data folder."""
    folder = fastai_path("data") / Path(URL[name]).stem
    if not folder.is_dir():
        _download(name, folder)
    _check_complete(name, folder)
    return read_folder(folder, size, None, middle, to_train, white)


def _download(name: str, folder: Path) -> None:
    """Download a data set and unpack it beside `folder`, which is there when all of it is."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_name(f".{folder.name}.lock")):
        if folder.is_dir():  # another process has been faster
            return
        partial = folder.with_name(f".{folder.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        try:
            untar_data(URL[name], data=partial).rename(folder)
        except Exception as error:  # the downloader may raise whatever its libraries raise
            raise UserError(
                f"{name} could not be downloaded ({reason_of(error)}); put train/CLASS/*.png and test/CLASS/*.png into "
                f"{folder}, or give a folder or an .npz file with --data"
            ) from None
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def _check_complete(name: str, folder: Path) -> None:
    """Raise a UserError if the folder has fewer files than the archive that it comes from.

    Stock fastai, if it is killed while it unpacks, leaves such a folder.
    """
    checked = folder / ".complete"
    if checked.is_file():
        return
    archive = fastai_path("archive") / Path(URL[name]).name
    found = sum(len(files) for _, _, files in os.walk(folder))
    if archive.is_file() and found < (whole := count_files(archive)):
        raise UserError(
            f"{folder} has {found:,} of the {whole:,} files in {archive}: it is still being unpacked, or that was "
            f"stopped; wait, or remove the folder, and the same command unpacks it again"
        )
    if not archive.is_file() and (images := len(find_images(folder))) < IMAGES[name]:
        notice(f"{folder} has {images:,} of the {IMAGES[name]:,} images of {name}")
        return
    with contextlib.suppress(OSError):
        checked.touch()


NAMED: dict[str, Callable[[str, int, float, bool, White], Splits]] = {
    "digits": _digits,
    "cifar10": _fastai,
    "cifar100": _fastai,
    "imagenette": _fastai,
}


def split_by_class(labels: torch.Tensor, share: float, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Indices of a `share` of every class, drawn by `seed` alone, and of the rest; both in ascending order.

    The rest has one image of each class at least.
    """
    generator = torch.Generator().manual_seed(seed)
    taken = torch.zeros(len(labels), dtype=torch.bool)
    for label in labels.unique():
        members = (labels == label).nonzero().flatten()
        order = torch.randperm(len(members), generator=generator)
        taken[members[order[: min(round(share * len(members)), len(members) - 1)]]] = True
    return taken.nonzero().flatten(), (~taken).nonzero().flatten()
