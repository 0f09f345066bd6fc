"""Arrays of images and labels, of whatever type people save them in, as image sets."""

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from ..errors import UserError, notice
from ..training.losses import UNLABELLED
from .folder import class_name
from .images import resize, to_rgb
from .imageset import ImageSet
from .in_parts import extremes, squares_of
from .splits import Splits
from .white import UNIT, as_bytes, beyond, describe, other_range, white_of

if TYPE_CHECKING:
    from .npz import ArrayInFile

__all__ = ["ImagesAndLabels", "array_splits", "label_indices", "vocab_of"]

LARGEST = 2**31  # a larger number stands for "no class" in somebody's arrays


@dataclass(frozen=True)
class ImagesAndLabels:
    """The arrays of a split: images, shape (N, H, W), (N, H, W, C) or (N, C, H, W), and labels, shape (N,) or (N, 1).

    Images may also be a large array in a file, which is read in parts. Pixels may be bytes, other whole numbers, or
    decimal numbers; labels whole numbers or text; None: there are none.
    """

    images: "np.ndarray | ArrayInFile"
    labels: np.ndarray | None


def array_splits(
    source: Path,
    readers: Mapping[str, Callable[[], ImagesAndLabels]],
    names: np.ndarray | None,
    size: int | None,
    to_train: bool = True,
    white: float | None = None,
) -> Splits:
    """Splits over arrays, each read when it is asked for; the first tells the classes, the size and the pixels' scale.

    Args:
        source: The file, for messages.
        readers: What reads each split; the first is "train", if images to train on are there.
        names: Names of the classes, if there are any.
        size: Height and width in pixels. None: the shorter side of the first split's images.
        to_train: Whether two classes at least are needed.
        white: The value that becomes 255, for pixels that are not bytes. None: what those of the first split suggest.

    Raises, when a split is read:
        UserError: Images or labels that cannot be trained on; says which and why.
    """
    reader = _Reader(source, readers, names, size, to_train, white)
    for split in readers:
        reader.splits.add(split, partial(reader.read, split))
    return reader.splits


@dataclass(eq=False)
class _Reader:
    """Reads splits over arrays. Arguments and errors as in `array_splits`.

    Attributes:
        splits: What is read by it.
    """

    source: object
    readers: Mapping[str, Callable[[], ImagesAndLabels]]
    names: np.ndarray | None
    size: int | None
    to_train: bool
    white: float | None
    splits: Splits = field(default_factory=Splits)

    @property
    def first(self) -> str:
        return next(iter(self.readers))

    def read(self, split: str) -> ImageSet:
        """The images of a split, and their labels."""
        where = f"{self.source}: {split}"
        train = None if split == self.first else self.splits[self.first]  # read first: errors in it are told first
        arrays = self.readers[split]()
        images, whole = arrays.images, isinstance(arrays.images, np.ndarray)
        if len(images.shape) < 3:
            raise UserError(f"{where}_images has shape {images.shape}; give (N, H, W) or with channels")
        labels, vocab = self._labels(arrays, where, train)
        try:
            scale = None if images.dtype == np.uint8 else self._scale(images, where, train)
            pixels = to_rgb(as_bytes(images, scale)) if whole else to_rgb(torch.empty(0, *images.shape[1:]))
        except UserError as error:
            raise UserError(f"{where}_images: {error.message}") from None
        if len(images) != len(labels) or not len(labels):
            counts = f"{len(images)} images and {len(labels)} labels"
            raise UserError(f"{where} has {counts}; give equally many, at least 1")
        side = self.size or (min(pixels.shape[-2:]) if train is None else train.size)
        if train is None:
            if scale is not None:
                notice(f"{where}_images: {describe(scale, images.dtype)}")
            if self.to_train and arrays.labels is not None:
                _name_missing(labels, vocab, self.source)
        elif self.size is None and min(pixels.shape[-2:]) != side:
            found = "x".join(map(str, pixels.shape[-2:]))
            notice(
                f"{where}_images are {found} pixels; they are resized to {side}x{side}, as those of {self.first} are"
            )
        stored = resize(pixels, side) if whole else squares_of(images, side, scale)
        found = ImageSet(stored, torch.from_numpy(labels), vocab, white=scale)
        found.own_size = min(pixels.shape[-2:])
        return found

    def _labels(self, arrays: ImagesAndLabels, where: str, train: ImageSet | None) -> tuple[np.ndarray, list[str]]:
        """The class of each image, an index, and the names of the classes."""
        without = arrays.labels is None
        labels = np.full(len(arrays.images), UNLABELLED) if without else _one_each(arrays.labels, f"{where}_labels")
        vocab = vocab_of(labels, self.names, where, self.to_train) if train is None else list(train.vocab)
        if without:
            return labels, vocab
        return label_indices(labels, vocab, f"{where}_labels", named=self.names is not None), vocab

    def _scale(self, images: "np.ndarray | ArrayInFile", where: str, train: ImageSet | None) -> float:
        """The value that becomes white, of pixels that are not bytes; says if some go beyond it."""
        own = white_of(images if isinstance(images, np.ndarray) else extremes(images))
        told = self.white if train is None or train.white is None else train.white
        scale, decimal = own if told is None else told, images.dtype.kind in "fb"
        if decimal and own == UNIT < scale:  # of a whole split, and not of one dark image
            raise other_range(own, scale)
        if beyond(own, scale, decimal):
            notice(f"{where}_images: pixels above {scale:g} become white, as it is white in training")
        return scale


def vocab_of(labels: np.ndarray, names: np.ndarray | None, where: str, to_train: bool = True) -> list[str]:
    """Names of the classes: those that are given, or else the different labels.

    Args:
        labels: Whole numbers or text, shape (N,).
        names: Names that are given.
        where: File and split, for messages.
        to_train: Whether there must be two at least.

    Raises:
        UserError: There are too few, or a name is there twice.
    """
    if names is not None:
        names = np.asarray(names)
        vocab = [_text(name) for name in names.reshape(-1)]
        name, count = Counter(vocab).most_common(1)[0] if vocab else ("", 0)
        if count > 1:
            raise UserError(f"{where}: class_names has {name!r} more than once")
    else:
        ids = np.unique(labels)
        if ids.dtype.kind != "U" and len(ids):
            if ids[0] < 0 or ids[-1] >= LARGEST:
                bad = ids[0] if ids[0] < 0 else ids[-1]
                raise UserError(f"{where}_labels has {bad}, which is the number of no class; leave it out")
            if to_train and len(ids) <= ids[-1]:
                notice(f"{where}: {len(ids)} classes, whose labels run from {ids[0]} to {ids[-1]} with gaps")
        vocab = list(dict.fromkeys(map(_text, ids)))
    if to_train and len(vocab) < 2:
        raise UserError(f"{where} has one class; a classifier needs at least 2")
    return vocab


def label_indices(labels: np.ndarray, vocab: list[str], where: str, named: bool) -> np.ndarray:
    """The labels as indices into the class names, int64.

    Args:
        labels: Whole numbers or text, shape (N,).
        vocab: Names of the classes.
        where: Which labels, for messages.
        named: Numbers are indices already; if not, they are names.

    Raises:
        UserError: A label is that of no class.
    """
    if named and labels.dtype.kind != "U":
        outside = labels[(labels < 0) | (labels >= len(vocab))]
        if len(outside):
            last = len(vocab) - 1
            raise UserError(f"{where} has {outside[0]}, out of range for {len(vocab)} classes (0 to {last})")
        return labels.astype(np.int64)
    different, inverse = np.unique(labels, return_inverse=True)
    place = {name: index for index, name in enumerate(vocab)}
    for label in map(_text, different):
        if label not in place:
            raise UserError(f"{where} has {label}, a class that {'class_names' if named else 'train'} does not have")
    indices = np.array([place[_text(label)] for label in different], np.int64)
    return indices[inverse.reshape(-1)] if len(labels) else indices


def _one_each(labels: np.ndarray, where: str) -> np.ndarray:
    """The labels with one dimension, as whole numbers or text."""
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    kind = labels.dtype.kind
    if kind == "f" and labels.ndim == 1 and np.isfinite(labels).all() and (labels == labels.round()).all():
        notice(f"{where} is {labels.dtype} and holds whole numbers; it is read as such")
        if not labels.size or abs(labels).max() < LARGEST:
            labels, kind = labels.astype(np.int64), "i"
    if kind == "S":
        labels, kind = np.array([_text(label) for label in labels.reshape(-1)]).reshape(labels.shape), "U"
    if kind == "b":
        labels, kind = labels.astype(np.int64), "i"
    if labels.ndim != 1 or kind not in "iuU":
        has = ", with NaN or fractions" if kind == "f" and labels.ndim == 1 else ""
        raise UserError(f"{where} is {labels.dtype} {labels.shape}{has}; give whole numbers or names, one an image")
    return labels


def _text(label: object) -> str:
    return class_name(label.decode("utf-8", "backslashreplace") if isinstance(label, bytes) else str(label))


def _name_missing(indices: np.ndarray, vocab: list[str], source: object) -> None:
    missing = sorted(set(range(len(vocab))) - set(np.unique(indices).tolist()))
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        notice(f"{source}: no training image is of class {vocab[missing[0]]!r}{more}")
