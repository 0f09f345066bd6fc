"""Where images come from: digits, named data sets, folders and .npz files, each as splits in memory."""

import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from fastai.data.external import URLs, fastai_path, untar_data

from ..errors import UserError
from ..names import source_name
from .folder import read_folder
from .images import resize, to_rgb
from .imageset import ImageSet

__all__ = ["NAMED", "load_splits", "split_by_class"]

Splits = dict[str, ImageSet]
URL = {"cifar10": URLs.CIFAR, "cifar100": URLs.CIFAR_100, "imagenette": URLs.IMAGENETTE_160}
DEFAULT_SIZE = {"digits": 8, "imagenette": 64}
DIGITS_TEST_SHARE = 0.2
DIGITS_SEED = 0


def load_splits(data: str | Path, size: int | None = None) -> Splits:
    """Read a data set: "train" and, where there are any, "test" and "val".

    Args:
        data: A name in `NAMED`, a folder with train/CLASS/ and test/, valid/ or val/CLASS/, or an .npz file.
        size: Height and width in pixels. None: the data set's own size if it has one, else 32.

    Raises:
        UserError: Data that are missing or cannot be trained on; says which and why.
    """
    name = source_name(data)
    if str(data) in NAMED:
        splits = NAMED[name](name, size or DEFAULT_SIZE.get(name, 32))
    elif Path(data).is_dir():
        splits = read_folder(Path(data), size or 32)
    else:
        splits = _read_npz(Path(data), size)
    for key, split in splits.items():
        split.name, split.split = name, key
    return splits


def _digits(name: str, size: int) -> Splits:
    """The 1,797 digits that scikit-learn ships, 8x8 with 17 grey levels; every class is split alike."""
    from sklearn.datasets import load_digits  # a second and a half of imports, for this alone

    bunch = load_digits()
    pixels = torch.from_numpy((bunch.images * (255 / 16)).round().astype(np.uint8))
    labels = torch.from_numpy(bunch.target).long()
    every = ImageSet(resize(to_rgb(pixels), size), labels, [str(i) for i in bunch.target_names])
    test, train = split_by_class(labels, DIGITS_TEST_SHARE, DIGITS_SEED)
    return {"train": every.subset(train), "test": every.subset(test)}


def _fastai(name: str, size: int) -> Splits:
    """A data set at fastai's own address, downloaded once into fastai's data folder."""
    url = URL[name]
    folder = fastai_path("data") / Path(url).stem
    if not folder.is_dir():
        try:
            folder = untar_data(url)
        except Exception as error:  # the downloader may raise whatever its libraries raise
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise UserError(
                f"{name} could not be downloaded ({reason}); put train/CLASS/*.png and test/CLASS/*.png into {folder}, "
                f"or give a folder or an .npz file with --data"
            ) from None
    return read_folder(folder, size)


NAMED: dict[str, Callable[[str, int], Splits]] = {
    "digits": _digits,
    "cifar10": _fastai,
    "cifar100": _fastai,
    "imagenette": _fastai,
}


def split_by_class(labels: torch.Tensor, share: float, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Indices of a `share` of every class, drawn by `seed` alone, and of the rest; both in ascending order."""
    generator = torch.Generator().manual_seed(seed)
    taken = torch.zeros(len(labels), dtype=torch.bool)
    for label in labels.unique():
        members = (labels == label).nonzero().flatten()
        order = torch.randperm(len(members), generator=generator)
        taken[members[order[: round(share * len(members))]]] = True
    return taken.nonzero().flatten(), (~taken).nonzero().flatten()


def _read_npz(file: Path, size: int | None) -> Splits:
    """`train_images`, `train_labels` and the same for test and val, `class_names` optional: MedMNIST's convention."""
    try:
        with np.load(file, allow_pickle=False) as archive:
            arrays = {key: archive[key] for key in archive.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise UserError(f"{file} cannot be read as an .npz file of plain arrays: {error}") from None
    for key in ("train_images", "train_labels"):
        if key not in arrays:
            raise UserError(f"{file} has no {key!r}; it has {', '.join(sorted(arrays)) or 'nothing'}")
    splits = [split for split in ("train", "test", "val") if f"{split}_images" in arrays]
    labels = {split: _npz_labels(file, arrays, split) for split in splits}
    names = arrays.get("class_names")
    if names is None:
        names = [str(i) for i in range(max(int(v.max()) for v in labels.values() if len(v)) + 1)]
    vocab = [str(name) for name in names]
    if len(vocab) < 2:
        raise UserError(f"{file} has one class; a classifier needs at least 2")
    if len(set(vocab)) < len(vocab):
        twice = next(name for name in vocab if vocab.count(name) > 1)
        raise UserError(f"{file}: class_names has {twice!r} more than once")
    result = {}
    for split in splits:
        where, y = f"{file}: {split}", labels[split]
        if len(y) and not (0 <= y.min() and y.max() < len(vocab)):
            bad = y[(y < 0) | (y >= len(vocab))][0]
            raise UserError(f"{where}_labels has {bad}, out of range for {len(vocab)} classes (0 to {len(vocab) - 1})")
        try:
            pixels = to_rgb(torch.from_numpy(arrays[f"{split}_images"]))
        except (UserError, TypeError) as error:
            raise UserError(f"{where}_images: {error}") from None
        if len(pixels) != len(y) or not len(y):
            raise UserError(f"{where} has {len(pixels)} images and {len(y)} labels; give equally many, at least 1")
        result[split] = ImageSet(resize(pixels, size or min(pixels.shape[-2:])), y, vocab)
    return result


def _npz_labels(file: Path, arrays: dict[str, np.ndarray], split: str) -> torch.Tensor:
    labels = arrays.get(f"{split}_labels")
    if labels is None:
        raise UserError(f"{file} has {split}_images without {split}_labels")
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    if labels.ndim != 1 or labels.dtype.kind not in "iu":
        raise UserError(f"{file}: {split}_labels is {labels.dtype} {labels.shape}; give whole numbers, one an image")
    return torch.from_numpy(labels.astype(np.int64))
