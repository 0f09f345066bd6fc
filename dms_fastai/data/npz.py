"""Arrays of images and labels: .npz files in MedMNIST's convention, or in Keras' (mnist.npz)."""

import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO

import numpy as np

from ..errors import UserError, damage
from .arrays import ImagesAndLabels, array_splits
from .memory import machine_memory
from .splits import NEEDS_TEACHER, Splits, UnlabelledError

__all__ = ["read_npz"]

NO_NPZ = "{} cannot be read as an .npz file of plain arrays"
KERAS = {"x_train": "train_images", "y_train": "train_labels", "x_test": "test_images", "y_test": "test_labels"}
OTHER_NAMES = KERAS | {"unlabeled_images": "unlabelled_images"}


def read_npz(file: Path, size: int | None, classes: Sequence[str] | None = None) -> Splits:
    """`train_images`, `train_labels` and the same for test and val; or Keras' names.

    `unlabelled_images` and `class_names` are optional.

    Args:
        file: The .npz file.
        size: Height and width in pixels. None: the shorter side of the training images.
        classes: Names of the classes, in order, to be taken where there are no `train_labels`.

    Raises, some of it when a split is read:
        UserError: The file cannot be read, lacks an array or does not fit into memory, or the arrays cannot be trained
            on.
    """
    archive = _Archive(file)
    for key in ("train_images", "train_labels"):
        if key not in archive and (key == "train_images" or classes is None):
            lacks = f"{file} has no {key!r}; it has {', '.join(sorted(archive)) or 'nothing'}"
            if key == "train_images":
                raise UserError(lacks)
            raise UnlabelledError(f"{lacks}; {NEEDS_TEACHER}")
    names, labelled = archive.get("class_names"), "train_labels" in archive
    if names is None and not labelled:
        names = np.array(classes)

    def reader(split: str) -> Callable[[], ImagesAndLabels]:
        def read() -> ImagesAndLabels:
            if f"{split}_labels" not in archive:
                if split == "unlabelled" or not labelled:
                    return ImagesAndLabels(archive[f"{split}_images"], None)
                raise UserError(f"{file} has {split}_images without {split}_labels")
            return ImagesAndLabels(archive[f"{split}_images"], archive[f"{split}_labels"])

        return read

    found = [split for split in ("train", "test", "val", "unlabelled") if f"{split}_images" in archive]
    return array_splits(file, {split: reader(split) for split in found}, names, size)


class _Archive(Mapping[str, np.ndarray]):
    """The arrays of an .npz file, each read when it is asked for, and checked against memory before."""

    def __init__(self, file: Path):
        self.file = file
        with damage(NO_NPZ.format(file)), file.open("rb") as opened:
            if opened.read(6) == b"\x93NUMPY":
                raise UserError(f"{file} is a single array (.npy); save several with numpy.savez")
        with damage(NO_NPZ.format(file)), zipfile.ZipFile(file) as archive:
            members = [name for name in archive.namelist() if name.endswith(".npy")]
        names = {name.removesuffix(".npy"): name for name in members}
        self._members = {OTHER_NAMES.get(name, name): member for name, member in names.items()}

    def __iter__(self) -> Iterator[str]:
        return iter(self._members)

    def __len__(self) -> int:
        return len(self._members)

    def __getitem__(self, name: str) -> np.ndarray:
        member = self._members[name]
        with damage(NO_NPZ.format(self.file)), zipfile.ZipFile(self.file) as archive, archive.open(member) as opened:
            shape, dtype = _header(opened)
            needed, there = dtype.itemsize * int(np.prod(shape, dtype=object)), machine_memory()
            if needed > there:
                raise UserError(
                    f"{self.file}: {member} is {dtype} {shape}, {needed / 1e9:,.1f} GB; this machine has "
                    f"{there / 1e9:,.1f} GB of memory"
                )
            if needed > archive.getinfo(member).file_size:
                raise ValueError(f"{member} is shorter than its shape {shape} says")
        with damage(NO_NPZ.format(self.file)), np.load(self.file, allow_pickle=False) as archive:
            return archive[member]


def _header(opened: IO[bytes]) -> tuple[tuple[int, ...], np.dtype]:
    version = np.lib.format.read_magic(opened)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, dtype = read(opened)
    if dtype.hasobject:
        raise ValueError("it holds Python objects")
    return shape, dtype
