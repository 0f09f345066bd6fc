"""A whole split of a data set, in memory or memory-mapped: the dataset behind `BatchLoader`."""

import copy
import hashlib
from collections.abc import Callable, Iterable, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from fastai.data.transforms import CategoryMap
from fastai.losses import CrossEntropyLossFlat
from torch import Tensor

from ..errors import UserError
from ..training.losses import UNLABELLED
from .augment import NO_CROPS, Crops
from .images import MIDDLE, read_image
from .placed import Placed, Where, place_for
from .stored import Squares, Stored, Wholes

__all__ = ["ImageSet"]


class ImageSet:
    """Images, labels and class names, with what fastai's DataLoaders expect of a dataset.

    Attributes:
        stored: The images, wherever their bytes are.
        labels: int64, shape (N,), `UNLABELLED` where an image has none; or None for images that nobody trains on.
        vocab: Class names, as fastai keeps them; a label is an index into it.
        name: The data set's name, "" if it has none; recipes may have settings for this name.
        split: Which split of it: "train", "test", "val", "unlabelled" or "held out" of train; "" if it is none of them.
        files: The images' files, relative to `root`; None if they come from none.
        root: The folder of the files.
        white: The value that became 255, if pixels were no bytes; None if they were.
        seen: Height and width of the images that a network is trained on, where `images` are larger, for its teacher;
            None where they are not.
        own_size: The shorter side of the images as they came, in pixels; None where nobody has noted it.
        middle: Share of a file's shorter side that is seen without crops; more of a file that is hardly larger.
        split_idx: 0 for images that are augmented (training), 1 for those that are not.
        by_teacher: Whether the labels are a teacher's answers.
    """

    n_inp = 1
    seen: int | None = None
    own_size: int | None = None
    by_teacher = False
    middle = 1.0

    def __init__(
        self,
        images: Tensor | Stored,
        labels: Tensor | None,
        vocab: Sequence[str],
        name: str = "",
        split_idx: int = 1,
        files: Sequence[str] | None = None,
        root: Path | None = None,
        white: float | None = None,
    ):
        self.stored, self.labels = images if isinstance(images, Stored) else Squares([images]), labels
        if isinstance(images, Wholes):
            self.middle = MIDDLE
        self.files, self.root, self.white = files, root, white
        self.vocab = CategoryMap(vocab, sort=False)
        self.name, self.split, self.split_idx = name, "", split_idx
        self._resident: dict[tuple, Any] = {}

    def __len__(self) -> int:
        return len(self.stored)

    def __getitem__(self, index: int | slice) -> tuple[Tensor, ...]:
        rows = torch.arange(len(self))[index]
        images = self.gathered(rows.flatten()).view(*rows.shape, *self.stored.shape)
        return (images,) if self.labels is None else (images, self.labels[index])

    def __iter__(self):
        return (self[index] for index in range(len(self)))

    def __repr__(self) -> str:
        return f"ImageSet({self.name!r}, {len(self)} images of {self.size}x{self.size}, {self.c} classes)"

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_resident": {}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        if "images" in state:  # as earlier versions wrote it
            state = {**state, "stored": Squares([state["images"]])}
            del state["images"]
        self.__dict__.update(state)

    @property
    def images(self) -> Tensor:
        """All images as they are without crops: uint8, shape (N, 3, H, W), square.

        Where they are no tensor yet, they become one, in memory, at the first call; `gathered` gives some of them.
        """
        if isinstance(self.stored, Squares) and self.stored.rows is None and len(self.stored.parts) == 1:
            return self.stored.parts[0]
        return self._keep(("images",), self.stored.middles)

    def gathered(self, index: Tensor) -> Tensor:
        """Some of the images, at `index` of shape (B,), as they are without crops: uint8, shape (B, 3, H, W)."""
        return self.stored.middles(index)

    def brightest(self, enough: int) -> int:
        """The largest value of any pixel, or one that is at least `enough`."""
        found = 0
        for block in self.stored.blocks():
            if block.dtype == torch.uint8:
                found = max(found, int(block.max()))
            if found >= enough:
                break
        return found

    @property
    def held_size(self) -> int:
        """Height and width of the images without crops."""
        return self.stored.shape[-1]

    @property
    def size(self) -> int:
        """Height and width of what a network is trained on."""
        return self.seen or self.held_size

    @property
    def shape(self) -> tuple[int, int, int]:
        """The same with the channels, (C, H, W)."""
        return self.stored.shape[0], self.size, self.size

    @property
    def c(self) -> int:
        """The number of classes, under fastai's name."""
        return len(self.vocab)

    @property
    def labelled(self) -> int:
        """How many images have a label."""
        return 0 if self.labels is None else int((self.labels != UNLABELLED).sum())

    @property
    def counts(self) -> Tensor:
        """How many images of each class there are, shape (C,)."""
        return self.labels[self.labels != UNLABELLED].bincount(minlength=self.c)

    @property
    def loss_func(self) -> CrossEntropyLossFlat:
        """The loss that a stock Learner uses if it is given none."""
        return CrossEntropyLossFlat()

    @property
    def items(self) -> "ImageSet | list[Path]":
        """The images' files, or the set itself if they have none.

        fastai shows them, lets a user delete them, and picks some for `test_dl`.
        """
        return self if self.files is None else [self.root / file for file in self.files]

    def places_of(self, items: Iterable[Any]) -> list[int] | None:
        """The indices of images that are given by the files that `items` lists; None if one is none of these."""
        if self.files is None:
            return None
        place = {path: index for index, path in enumerate(self.items)}
        found = [place.get(item) if isinstance(item, Path) else None for item in items]
        return None if None in found else found

    @contextmanager
    def set_split_idx(self, index: int):
        """Augment (0) or do not (1) until the block ends; fastai's `tta` calls this."""
        before, self.split_idx = self.split_idx, index
        try:
            yield self
        finally:
            self.split_idx = before

    def labels_on(self, device: torch.device) -> Tensor | None:
        """The labels on `device`, where they stay: copied at the first call."""
        return None if self.labels is None else self._keep(("labels", device), lambda: self.labels.to(device))

    def placed_on(self, device: torch.device, crops: Crops = NO_CROPS, where: Where = "copies") -> Placed:
        """The images where batches are made of them on `device`; they stay there."""
        return self._keep((crops, device, where), lambda: Placed(self.stored, crops, device, where))

    def place(self, others: Sequence["ImageSet"], crops: Crops, device: torch.device, wanted: str) -> Where:
        """Choose where batches are made of these images, and of others; arguments and errors as in `place_for`.

        Those that are on a device for other crops leave it.
        """
        for images in (self, *others):
            images.leave(crops)
        there = [key[2] for key in self._resident if key[:2] == (crops, device)]
        if wanted != "disk" and there:
            return there[0]
        return place_for(self.stored, [each.stored for each in others], crops, device, wanted)

    def leave(self, *but: Crops) -> None:
        """Take the images off all devices, except those for some crops and those without any."""
        kept = (*but, NO_CROPS, "labels", "digest")
        self._resident = {key: value for key, value in self._resident.items() if key[0] in kept}

    def _keep(self, key: tuple, make: Callable[[], Any]) -> Any:
        if key not in self._resident:
            self._resident[key] = make()
        return self._resident[key]

    def new_empty(self) -> "ImageSet":
        """A set with the same size and classes but no images, for an exported Learner."""
        labels = None if self.labels is None else self.labels.new_empty(0)
        images = torch.empty(0, *self.shape, dtype=torch.uint8)
        return self._like(ImageSet(images, labels, self.vocab, self.name, self.split_idx, white=self.white))

    def _like(self, other: "ImageSet") -> "ImageSet":
        """The other set, which is to see as much of an image as this one."""
        other.middle = self.middle
        return other

    def subset(self, index: Tensor) -> "ImageSet":
        files = None if self.files is None else [self.files[i] for i in index.tolist()]
        labels = None if self.labels is None else self.labels[index]
        kept = {"files": files, "root": self.root, "white": self.white}
        found = ImageSet(self.stored.subset(index), labels, self.vocab, self.name, self.split_idx, **kept)
        found.seen, found.own_size = self.seen, self.own_size
        return found

    def answered(self, labels: Tensor) -> "ImageSet":
        """The same images with a teacher's answers for labels."""
        found = copy.copy(self)
        found.labels, found.by_teacher, found._resident = labels, True, {}
        return found

    def joined(self, other: "ImageSet") -> "ImageSet":
        """This set and, after it, the images and labels of another with the same size and classes."""
        images, labels = self.stored.joined(other.stored), torch.cat([self.labels, other.labels])
        files = None
        if self.files is not None and other.files is not None:
            files = [str(path) for path in (*self.items, *other.items)]  # absolute, for they have no root in common
        kept = {"files": files, "root": self.root, "white": self.white}
        both = ImageSet(images, labels, self.vocab, self.name, self.split_idx, **kept)
        both.split, both.seen, both.own_size = self.split, self.seen, self.own_size
        return both

    def digest(self) -> str:
        """A short hash of all images and labels: what tells one data set from another of the same name.

        They are read for it at the first call.
        """
        return self._keep(("digest",), self._hashed)[0]

    def hashes(self) -> list[int]:
        """A hash of each image: equal images have equal ones, within this process. They are read as for `digest`."""
        return self._keep(("digest",), self._hashed)[1].tolist()

    def _hashed(self) -> tuple[str, Tensor]:
        state, images = hashlib.blake2b(digest_size=8), []
        for block in self.stored.blocks():
            state.update(block.numpy())
            if block.dtype == torch.uint8:  # else it is the sides of images to come
                last = block.permute(0, 2, 3, 1).contiguous() if block.ndim == 4 else block[None]
                images += [hash((*image.shape, image.numpy().tobytes())) for image in last]
        state.update(b"" if self.labels is None else self.labels.contiguous().numpy())
        return state.hexdigest(), torch.tensor(images, dtype=torch.int64)

    def class_of(self, label: int) -> str:
        """The name of a label's class, to be shown."""
        return "no label" if label == UNLABELLED else str(self.vocab[label])

    def _label(self, value: Any) -> int:
        label = self.vocab.o2i.get(value, -1) if isinstance(value, str) else int(value)
        if not 0 <= label < self.c:
            raise UserError(f"label {value!r} is none of the {self.c} classes: {', '.join(map(str, self.vocab))}")
        return label

    def from_items(self, items: Iterable[Any]) -> "ImageSet":
        """A set of other images, read to this set's size: paths, PIL images, arrays, or (image, label) pairs.

        Labels may be indices or class names.
        """
        images, labels = [], []
        for item in items:
            image, *label = item if isinstance(item, tuple) else (item,)
            images.append(read_image(image, self.size, self.white, self.middle))
            labels += [self._label(value) for value in label]
        if labels and len(labels) < len(images):
            raise UserError(f"{len(images)} images come with {len(labels)} labels; give each a label, or none")
        stacked = torch.stack(images) if images else torch.empty(0, *self.shape, dtype=torch.uint8)
        labels = torch.tensor(labels) if labels else None
        return self._like(ImageSet(stacked, labels, self.vocab, self.name, white=self.white))
