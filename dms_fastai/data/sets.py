"""A data set as a run uses it: what to train on and what to validate on, and fastai's DataLoaders over the two."""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from statistics import median_low
from typing import Literal

import torch
from fastai.data.core import DataLoaders
from PIL import Image

from ..errors import UserError, notice
from ..models.dmsresnet import MEAN, STD
from ..settings import Count, Pixels, ValidSplit, checked
from .augment import NO_CROPS, Cropper, Crops
from .images import MIDDLE
from .imageset import ImageSet
from .loader import BatchLoader, ImageLoaders
from .placed import Where
from .repeats import repeats_said
from .sources import load_splits, split_by_class
from .splits import Splits, UnlabelledError

__all__ = ["Data", "Sets", "middle_for"]

FEW = 1000  # files whose headers tell how large the images of a folder are
DARK = 16  # a brighter pixel than this is in any image that can be seen
VALID_BATCH = {"cpu": 128, "cuda": 512}  # a CPU is slower with tensors that outgrow its allocator's pools


@dataclass(frozen=True)
class Sets:
    """The images to train on and those to validate on.

    Attributes:
        train: Images to train on; they may be larger than `size`, for a teacher that sees more of them.
        valid: Images to validate on.
        unlabelled: Further images without labels, for distillation alone, as large as `train`; None if there are none,
            or nobody distils.
        source: The data set that they are of.
        plain: The same sets without larger images; None: these are.
    """

    train: ImageSet
    valid: ImageSet
    unlabelled: ImageSet | None = None
    source: Splits | None = None
    plain: "Sets | None" = None

    @property
    def size(self) -> int:
        """Height and width of the images that a network is trained on, in pixels."""
        return self.train.size

    @property
    def held_size(self) -> int:
        """Height and width of the training images as they are held, in memory or on the disk."""
        return self.train.held_size

    @cached_property
    def trained(self) -> ImageSet:
        """All images to train on where somebody distils."""
        return self.train if self.unlabelled is None else self.train.joined(self.unlabelled)

    def place(self, crops: Crops, device: torch.device, wanted: str) -> Where:
        """Choose where batches are made of the images; arguments and errors as in `place_for`."""
        if self.unlabelled is not None:
            self.train.leave()  # without the others, they would be there twice
        return self.trained.place([self.valid], crops, device, wanted)

    def held_bytes(self, crops: Crops, where: Where) -> int:
        """Bytes of the training images and, where there are any, of their copies with borders and mirror images."""
        images = self.trained.stored
        return images.nbytes + (Cropper.nbytes(images, crops) if where == "copies" else 0)

    @property
    def vocab(self) -> list[str]:
        """Names of the classes."""
        return [str(name) for name in self.train.vocab]

    @property
    def not_validated(self) -> list[str]:
        """Classes with training images and without any to validate on."""
        if self.valid.labels is None or self.agreement:
            return []
        trained, validated = (s.counts for s in (self.train, self.valid))
        return [name for name, t, v in zip(self.vocab, trained, validated, strict=True) if t and not v]

    @property
    def agreement(self) -> bool:
        """Whether the images to validate on have no labels, so that only agreement with a teacher can be measured."""
        return not self.valid.labelled

    @cached_property
    def digest(self) -> list[str]:
        """A hash of each set, which tells these images from others; larger ones have that of the plain ones."""
        if self.plain is not None:
            return self.plain.digest
        return [each.digest() for each in (self.train, self.valid, self.unlabelled) if each is not None]

    @cached_property
    def repeated(self) -> list[str]:
        """A line about images to validate on that are trained on, too, and one about images in two classes."""
        plain = self.plain or self
        return list(repeats_said(plain.train, plain.valid))

    @cached_property
    def for_distillation(self) -> "Sets":
        """These sets and the data set's images without labels, if it has any, which are read now."""
        if self.source is None or "unlabelled" not in self.source:
            return self
        return replace(self, unlabelled=self.source["unlabelled"])

    def loaders(
        self,
        bs: int,
        crops: Crops | None = None,
        mean: tuple[float, ...] = MEAN,
        std: tuple[float, ...] = STD,
        device: str | torch.device | None = None,
        balance: bool = False,
        where: str = "auto",
    ) -> DataLoaders:
        """fastai DataLoaders with batches of `bs` training images. Arguments as in `load_data`.

        Raises:
            UserError: The images are to be on the device, and do not fit.
        """
        device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        wanted, bs, crops = bs, min(bs, len(self.train)), crops or Crops()
        own = {"crops": crops, "mean": mean, "std": std, "device": device, "where": self.place(crops, device, where)}
        train = BatchLoader(self.train, bs, shuffle=True, drop_last=True, balance=balance, **own)
        valid = BatchLoader(self.valid, max(bs, VALID_BATCH.get(device.type, bs)), **own)
        loaders = ImageLoaders(train, valid, device=device)
        loaders.unlabelled, loaders.batch_size = self.unlabelled, wanted
        return loaders


@checked
@dataclass(frozen=True)
class Data:
    """Which images of a data set, how large, and how many in a batch.

    Attributes:
        batch_size: Training images in a batch; at most all of them.
        size: Height and width in pixels. None: the data set's own size if it has one, else 32; in a run that begins
            from trained weights, theirs in place of 32.
        valid: What to validate on: "test" or "val" (either stands in for the other where it is missing), or the share
            of the training images to hold out instead.
        labels: A .csv table with the labels of the images in a folder; None: the images lie in folders of classes.
        balance: Whether an epoch has equally many images of each class: those of rare classes come several times, and
            of frequent ones some are left out.
        where: Where the images are from which batches are made: "device", in its memory; "disk", where they are stored,
            from where a thread gathers batches ahead; or "auto", on the device if they fit. The batches are the same.
    """

    batch_size: Count = 128
    size: Pixels | None = None
    valid: ValidSplit = "test"
    labels: str | None = None
    balance: bool = False
    where: Literal["auto", "device", "disk"] = "auto"

    def open(
        self,
        data: str | Path,
        seed: int = 0,
        classes: Sequence[str] | None = None,
        splits: Splits | None = None,
        crops: Crops = NO_CROPS,
    ) -> Sets:
        """Read a data set.

        Args:
            data: As in `load_data`.
            seed: Chooses the held-out images, and nothing else.
            classes: Names of the classes, in order, to be taken where no training image has a label.
            splits: What `load_splits` gave for all this; None: the data set is opened here.
            crops: How training images will be cropped: where parts of them are cut out, files are kept whole.

        Raises:
            UserError: Data that are missing or cannot be trained on.
        """
        if splits is None:
            splits = load_splits(data, self.size, self.labels, classes, middle_for(crops))
        train, valid = self._split(splits, seed, data)
        train.split_idx = 0
        brightest = train.brightest(enough=DARK)
        if brightest < DARK:
            notice(f"{data}: the brightest pixel of all training images is {brightest} of 255")
        found = Sets(train, valid, source=splits)
        if absent := found.not_validated:
            notice(f"{data}: no images to validate on of {', '.join(absent)}; the accuracy says nothing about that")
        return found

    def enlarged(self, sets: Sets, data: str | Path, size: int, seed: int = 0) -> Sets:
        """The sets with larger training images, of which a teacher sees more than its student.

        They have `size` pixels a side, or as many as the images came with, if these are fewer. The images to validate
        on stay as they are.

        Args:
            sets: What `open` gave, for the same `data` and `seed`.
            data: The data set.
            size: Height and width that a teacher expects.
            seed: As in `open`.

        Raises:
            UserError: They fit neither on the disk nor into memory.
        """
        if size <= sets.size or (held := min(size, _own_size(sets.train))) <= sets.size:
            return sets
        classes = None if sets.train.labelled else sets.vocab
        splits = load_splits(data, held, self.labels, classes, sets.train.middle)
        train, unlabelled = splits["train"], None if sets.unlabelled is None else splits["unlabelled"]
        if not isinstance(self.valid, str):
            train = train.subset(split_by_class(train.labels, self.valid, seed)[1])
        for images in filter(None, (train, unlabelled)):
            images.seen, images.split_idx = sets.size, 0
        return Sets(train, sets.valid, unlabelled, splits, plain=sets)

    def _split(self, splits: Splits, seed: int, data: str | Path) -> tuple[ImageSet, ImageSet]:
        """The training and the validation set out of the splits that there are."""
        train, valid = splits["train"], self.valid
        if isinstance(valid, str):
            return train, _valid(splits, valid, data)
        held_out, rest = split_by_class(train.labels, valid, seed)
        if not len(held_out) or not len(rest):
            raise UserError(f"valid is {valid}; with {len(train)} training images, that leaves one side empty")
        train, found = train.subset(rest), train.subset(held_out)
        found.split = "held out"
        return train, found


def middle_for(crops: Crops) -> float:
    """Share of image files that is seen without crops, as timm has it where training sees parts of them; else all."""
    return MIDDLE if crops.min_area < 1 else 1.0


def _own_size(images: ImageSet) -> int:
    """The shorter side of images as they came, in pixels; of files, the median of a few."""
    if images.own_size is None and images.files is not None:
        sides = []
        for file in images.items[:: max(1, len(images) // FEW)]:
            with suppress(OSError), Image.open(file) as image:  # a header alone; the files have been read before
                sides.append(min(image.size))
        images.own_size = median_low(sides) if sides else None
    return images.own_size or images.size


def _valid(splits: Splits, wanted: str, data: str | Path) -> ImageSet:
    """The split to validate on, or the one that stands in for it."""
    other = {"test": "val", "val": "test"}[wanted]
    unlabelled, without = "", None
    for split in (wanted, other):
        if split in splits:
            try:
                found = splits[split]
            except UnlabelledError as error:
                unlabelled = f" ({error.message})"
                continue
            if found.labelled:
                if unlabelled:
                    notice(f"validating on {split!r}{unlabelled}")
                return found
            without = without or found
    if without is not None:  # where no training image has a label, either
        return without
    raise UserError(
        f"{data} has no test or validation images with labels{unlabelled}; hold some out: --set data.valid=0.1, "
        f"valid=0.1 in Python"
    )
