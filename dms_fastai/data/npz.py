"""Arrays of images and labels: .npz files in MedMNIST's convention, or in Keras' (mnist.npz)."""

import os
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np

from ..errors import UserError, damage
from .arrays import ImagesAndLabels, array_splits
from .memory import machine_memory
from .splits import NEEDS_TEACHER, Splits, UnlabelledError

__all__ = ["ArrayInFile", "read_npz"]

NO_NPZ = "{} cannot be read as an .npz file of plain arrays"
KERAS = {"x_train": "train_images", "y_train": "train_labels", "x_test": "test_images", "y_test": "test_labels"}
LARGE, PART = 2**30, 2**23  # bytes of images that are not read as a whole, and of the parts that they are read in
SPLITS = ("train", "test", "val", "unlabelled")
OTHER_NAMES = KERAS | {"unlabeled_images": "unlabelled_images"}


def read_npz(
    file: Path,
    size: int | None,
    classes: Sequence[str] | None = None,
    to_train: bool = True,
    white: float | None = None,
) -> Splits:
    """`train_images`, `train_labels` and the same for test and val; or Keras' names.

    `unlabelled_images` and `class_names` are optional.

    Args:
        file: The .npz file.
        size: Height and width in pixels. None: the shorter side of the training images.
        classes: Names of the classes, in order, to be taken where there are no `train_labels`.
        to_train: As in `read_folder`.
        white: As in `array_splits`.

    Raises, some of it when a split is read:
        UserError: The file cannot be read, lacks an array, or fits neither into memory nor on the disk, or the arrays
            cannot be trained on.
    """
    archive = _Archive(file)
    found = [split for split in SPLITS if f"{split}_images" in archive]
    first = "train" if to_train or not found else found[0]
    images, labels = f"{first}_images", f"{first}_labels"
    lacks = f"{file} has no {{}}; it has {', '.join(sorted(archive)) or 'nothing'}".format
    if images not in archive:
        raise UserError(lacks(repr(images)))
    if labels not in archive and classes is None:
        raise UnlabelledError(f"{lacks(repr(labels))}; {NEEDS_TEACHER}")
    names, labelled = archive.get("class_names"), labels in archive
    if names is None and not labelled:
        names = np.array(classes)

    def reader(split: str) -> Callable[[], ImagesAndLabels]:
        def read() -> ImagesAndLabels:
            if f"{split}_labels" not in archive:
                if split == "unlabelled" or not labelled:
                    return ImagesAndLabels(archive.images(split), None)
                raise UserError(f"{file} has {split}_images without {split}_labels")
            return ImagesAndLabels(archive.images(split), archive[f"{split}_labels"])

        return read

    return array_splits(file, {split: reader(split) for split in found}, names, size, to_train, white)


@dataclass(frozen=True)
class ArrayInFile:
    """An array in an .npz file that is read a part at a time."""

    file: Path
    member: str
    shape: tuple[int, ...]
    dtype: np.dtype

    def __len__(self) -> int:
        return self.shape[0]

    def parts(self, first: int = 0) -> Iterator[np.ndarray]:
        """The array in parts, from element `first` on.

        Raises:
            UserError: The file is damaged.
        """
        each = int(np.prod(self.shape[1:])) * self.dtype.itemsize
        count = max(1, PART // each)
        with (
            damage(NO_NPZ.format(self.file)),
            zipfile.ZipFile(self.file) as archive,
            archive.open(self.member) as opened,
        ):
            _header(opened)
            opened.seek(first * each, os.SEEK_CUR)
            for start in range(first, len(self), count):
                content = opened.read(each * min(count, len(self) - start))
                yield np.frombuffer(content, self.dtype).reshape(-1, *self.shape[1:])


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

    def images(self, split: str) -> np.ndarray | ArrayInFile:
        """The images of a split; large ones are read when they are used."""
        name = f"{split}_images"
        shape, dtype, in_order, nbytes = self._checked(name)
        if in_order and nbytes > LARGE:
            return ArrayInFile(self.file, self._members[name], shape, dtype)
        return self[name]

    def __contains__(self, name: object) -> bool:
        return name in self._members  # a Mapping would read it

    def __getitem__(self, name: str) -> np.ndarray:
        member = self._members[name]
        shape, dtype, _, needed = self._checked(name)
        if needed > (there := machine_memory()):
            raise UserError(
                f"{self.file}: {member} is {dtype} {shape}, {needed / 1e9:,.1f} GB; this machine has "
                f"{there / 1e9:,.1f} GB of memory"
            )
        with damage(NO_NPZ.format(self.file)), np.load(self.file, allow_pickle=False) as archive:
            return archive[member]

    def _checked(self, name: str) -> tuple[tuple[int, ...], np.dtype, bool, int]:
        """What `_header` gives, and the bytes that the array takes, all of which the file has."""
        member = self._members[name]
        with damage(NO_NPZ.format(self.file)), zipfile.ZipFile(self.file) as archive, archive.open(member) as opened:
            shape, dtype, in_order = _header(opened)
            needed = dtype.itemsize * int(np.prod(shape, dtype=object))
            if needed > archive.getinfo(member).file_size:
                raise ValueError(f"{member} is shorter than its shape {shape} says")
        return shape, dtype, in_order, needed


def _header(opened: IO[bytes]) -> tuple[tuple[int, ...], np.dtype, bool]:
    """Shape and type of an array, and whether its elements follow one another."""
    version = np.lib.format.read_magic(opened)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran, dtype = read(opened)
    if dtype.hasobject:
        raise ValueError("it holds Python objects")
    return shape, dtype, not fortran
