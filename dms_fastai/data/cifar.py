"""CIFAR-10 and CIFAR-100 as their authors distribute them: binary, or pickled, which is read without running code."""

import pickle
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import UserError, notice
from .arrays import ImagesAndLabels, array_splits
from .splits import Splits

__all__ = ["is_cifar", "read_cifar"]

SHAPE = (3, 32, 32)
PIXELS = 3 * 32 * 32
# All that NumPy's arrays need in a pickle; none of it runs code of the file's.
HARMLESS = {
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
    ("numpy.core.multiarray", "_reconstruct"),
    ("numpy._core.multiarray", "_reconstruct"),
    ("numpy.core.multiarray", "scalar"),
    ("numpy._core.multiarray", "scalar"),
    ("_codecs", "encode"),
}


@dataclass(frozen=True)
class Layout:
    """The files of one form of one of the two data sets.

    Attributes:
        train, test: Names of the files with images.
        names: Name of the file with the names of the classes.
        counts: How many images the real data set has for training and for testing.
        label_bytes: For binary files: bytes before each image, the last of which is the label. None: pickles.
        keys: For pickles: of the labels, and of the names.
    """

    train: tuple[str, ...]
    test: tuple[str, ...]
    names: str
    counts: tuple[int, int]
    label_bytes: int | None = None
    keys: tuple[str, str] = ("", "")

    @property
    def files(self) -> tuple[str, ...]:
        return (*self.train, *self.test, self.names)


BATCHES = tuple(f"data_batch_{i}" for i in range(1, 6))
LAYOUTS = (
    Layout(tuple(f"{name}.bin" for name in BATCHES), ("test_batch.bin",), "batches.meta.txt", (50_000, 10_000), 1),
    Layout(("train.bin",), ("test.bin",), "fine_label_names.txt", (50_000, 10_000), 2),
    Layout(BATCHES, ("test_batch",), "batches.meta", (50_000, 10_000), keys=("labels", "label_names")),
    Layout(("train",), ("test",), "meta", (50_000, 10_000), keys=("fine_labels", "fine_label_names")),
)


def is_cifar(folder: Path) -> bool:
    """Whether the folder has the files of one of the two data sets, or some of them."""
    return _layout(folder) is not None


def read_cifar(folder: Path, size: int | None) -> Splits:
    """The splits of an unpacked cifar-10-batches-bin, cifar-10-batches-py, cifar-100-binary or cifar-100-python.

    Raises, some of it when a split is read:
        UserError: A file is missing or damaged, or a pickle holds more than arrays.
    """
    layout = _layout(folder)
    for name in layout.files:
        if not (folder / name).is_file():
            raise UserError(f"{folder} has no {name}; it is not complete: unpack it again")
    if layout.label_bytes is None:
        names = np.array([str(name) for name in _unpickled(folder / layout.names, layout.keys[1])])
    else:
        names = np.array((folder / layout.names).read_text(encoding="utf-8", errors="replace").split())
    readers: dict[str, Callable[[], ImagesAndLabels]] = {
        "train": partial(_read, folder, layout, layout.train, layout.counts[0]),
        "test": partial(_read, folder, layout, layout.test, layout.counts[1]),
    }
    return array_splits(folder, readers, names, size)


def _layout(folder: Path) -> Layout | None:
    fitting = [layout for layout in LAYOUTS if all((folder / name).is_file() for name in (layout.names, *layout.test))]
    some = [layout for layout in LAYOUTS if (folder / layout.train[0]).is_file()]
    return next(iter(fitting + some), None)


def _read(folder: Path, layout: Layout, files: tuple[str, ...], count: int) -> ImagesAndLabels:
    parts = [_read_file(folder / file, layout) for file in files]
    images, labels = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    if len(images) != count:
        notice(f"{folder} has {len(images):,} images in {', '.join(files)}, and the data set {count:,}")
    return ImagesAndLabels(images, labels)


def _read_file(file: Path, layout: Layout) -> tuple[np.ndarray, np.ndarray]:
    if layout.label_bytes is None:
        pixels = np.asarray(_unpickled(file, "data"))
        labels = np.asarray(_unpickled(file, layout.keys[0]))
        if pixels.dtype != np.uint8 or pixels.size % PIXELS:
            raise UserError(f"{file} is damaged: its data are {pixels.dtype} {pixels.shape}")
        return pixels.reshape(-1, *SHAPE), labels
    rows = np.frombuffer(file.read_bytes(), np.uint8)
    width = layout.label_bytes + PIXELS
    if not len(rows) or len(rows) % width:
        raise UserError(f"{file} is damaged: {len(rows):,} bytes are no whole number of images of {width:,} each")
    rows = rows.reshape(-1, width)
    return rows[:, layout.label_bytes :].reshape(-1, *SHAPE), rows[:, layout.label_bytes - 1]


class _ArraysOnly(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in HARMLESS:
            raise pickle.UnpicklingError(f"it would call {module}.{name}, which no array needs")
        return super().find_class(module, name)


def _unpickled(file: Path, key: str) -> Any:
    """What a pickled table holds under a key, in which bytes stand for text."""
    try:
        with file.open("rb") as opened:
            table = _ArraysOnly(opened, encoding="latin1").load()
        found = {name.decode() if isinstance(name, bytes) else name: value for name, value in table.items()}
    except Exception as error:  # a damaged pickle raises anything
        raise UserError(f"{file} cannot be read as a pickle of arrays: {error}") from None
    if key not in found:
        raise UserError(f"{file} has no {key!r}")
    return found[key]
