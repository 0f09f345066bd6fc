"""One loader for every source: images are uint8, on the device or on the disk, and a batch is made in one go."""

from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import fastai.vision.learner  # noqa: F401  (teaches show_batch, show_results and plot_top_losses to draw images)
import torch
from fastai.data.core import DataLoaders, TfmdDL
from fastai.data.load import DataLoader
from fastai.data.transforms import Category, Normalize
from fastai.torch_core import TensorCategory, TensorImage
from fastcore.foundation import L
from torch import Tensor

from ..errors import UserError, notice
from ..models.dmsresnet import MEAN, STD
from ..training.losses import UNLABELLED
from .augment import NO_CROPS, Crops, affine, normalize
from .folder import class_name
from .imageset import ImageSet
from .placed import Placed, Where
from .stored import Stored

__all__ = ["BatchLoader", "ImageLoaders", "balanced", "statistics", "unlabelled_images", "vocabulary"]


class BatchLoader(TfmdDL):
    """A fastai loader over an `ImageSet` whose batches `(x, y)` are plain tensors, already on the device.

    `x` is float32, normalised, of the set's `held_size`, channels last; `y` is int64, shape (B,), with
    `UNLABELLED` for an image without a label, and is left out where the set is not labelled at all. Sets with
    `split_idx` 0 are cropped and flipped at random.
    """

    def __init__(
        self,
        dataset: ImageSet,
        bs: int = 128,
        shuffle: bool = False,
        drop_last: bool = False,
        balance: bool = False,
        crops: Crops | None = None,
        mean: tuple[float, ...] = MEAN,
        std: tuple[float, ...] = STD,
        where: Where = "copies",
        **kwargs: Any,
    ):
        """
        Args:
            dataset: Images and labels.
            bs: Images in a batch.
            shuffle: Draw a new order every epoch, from torch's random state.
            drop_last: Leave out a last batch of fewer than `bs` images.
            balance: In every pass that is shuffled, draw equally many images of each class, and those without a label
                once.
            crops: How training images are cropped and flipped; None: as the paper does.
            mean, std: What pixels (0...1) are normalised with, a value for each channel.
            where: Where the images are of which batches are made, as in `Placed`.
        """
        kwargs["num_workers"] = 0  # nothing is left to do for workers
        super().__init__(dataset, bs=bs, shuffle=shuffle, drop_last=drop_last, **kwargs)
        self.balance = balance
        self.crops, self.mean, self.std = crops or Crops(), tuple(mean), tuple(std)
        self.where = where
        self.passes = 0
        self._affine_on: dict[torch.device, tuple[Tensor, Tensor]] = {}
        self.first_batch, self._then = 0, None
        self.part: slice | None = None  # of the order, for one of several processes

    def resume_at(self, batch: int, then: Callable[[], None]) -> None:
        """Begin the next pass at batch `batch`, counted from 0; `then` is called once the order has been drawn."""
        self.first_batch, self._then = batch, then

    def new(self, dataset: Any = None, cls: type | None = None, **kwargs: Any) -> "BatchLoader":
        """This loader over another set, or over images that `ImageSet.from_items` can read."""
        if dataset is not None and not isinstance(dataset, ImageSet):
            dataset = self.dataset.from_items(dataset)
        own = {key: getattr(self, key) for key in ("balance", "crops", "mean", "std", "where")}
        # TfmdDL.new would draw a batch here to learn its types; they are known.
        return DataLoader.new(self, dataset, cls, **{"do_setup": False, **own, **kwargs})

    def get_idxs(self) -> Tensor:
        """The order of the next pass: int64, shape (n,)."""
        if not self.shuffle:
            return torch.arange(self.n)
        if self.balance and self.dataset.labels is not None:
            return balanced(self.dataset.labels)
        return torch.randperm(self.n)

    def sample(self) -> Tensor | Iterator[int]:
        """What `create_batches` is given: the order as it is, and not number by number as in fastai."""
        order = self._DataLoader__idxs  # where fastai's __iter__ keeps what get_idxs gave it
        return order if isinstance(order, Tensor) else super().sample()

    def create_batches(self, samps: Tensor | Iterator[int]) -> Iterator[tuple[Tensor, ...]]:
        order = samps if isinstance(samps, Tensor) else torch.tensor(list(islice(samps, self.n)), dtype=torch.long)
        if self.part is not None:
            order = order[self.part]
        if self.drop_last:
            order = order[: len(order) // self.bs * self.bs]
        there = order.to(self._where())
        chosen, batches = (all_.split(self.bs)[self.first_batch :] if len(all_) else () for all_ in (order, there))
        if self._then is not None:
            self._then()
        self.first_batch, self._then = 0, None
        self.passes += 1
        yield from map(self.load_batch, batches, self._placed().batches(chosen))

    def load_batch(self, index: Tensor, gathered: Stored | None = None) -> tuple[Tensor, ...]:
        """The images at `index`, shape (B,), augmented where this set is, normalised, with their labels.

        `gathered` are the same images, if they have been gathered ahead.
        """
        device, labels = self._where(), self.dataset.labels_on(self._where())
        x = self._placed().take(index, self.passes, gathered)
        x = normalize(x, *self._affine(device))
        return (x,) if labels is None else (x, labels[index])

    def decode(self, b: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """The batch as fastai shows it: images 0...1 and categories, on the CPU."""
        x, *y = (t.detach().cpu() for t in b)
        mean, std = (torch.tensor(v).view(1, -1, 1, 1) for v in (self.mean, self.std))
        return TensorImage((x * std + mean).clamp(0, 1)), *(TensorCategory(t) for t in y)

    def _decode_batch(self, b: tuple[Tensor, ...], max_n: int = 9, full: bool = True) -> L:
        x, *y = b
        names = [[Category(self.dataset.class_of(int(i))) for i in t[:max_n]] for t in y]
        return L(zip(x[:max_n], *names, strict=True))

    def _placed(self) -> Placed:
        """The images, cropped if they are to be."""
        crops = self.crops if self.dataset.split_idx == 0 else NO_CROPS
        return self.dataset.placed_on(self._where(), crops, self.where)

    def _affine(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """What `normalize` needs, on `device`, where it stays: a copy for every batch would wait for it."""
        if device not in self._affine_on:
            self._affine_on[device] = affine(self.mean, self.std, self.dataset.held_size, device)
        return self._affine_on[device]

    def _where(self) -> torch.device:
        return torch.device("cpu") if self.device is None else self.device


class ImageLoaders(DataLoaders):
    """fastai's DataLoaders, over `BatchLoader`s.

    Attributes:
        unlabelled: Images without labels, which are in none of the loaders; None if there are none.
        batch_size: Training images that were wanted in a batch; there may be fewer.
    """

    unlabelled: ImageSet | None = None
    batch_size: int | None = None

    def add_tfms(self, tfms: Any, event: str, loaders: Any = None) -> None:
        """As in fastai, for `Normalize` alone: all loaders normalise by its mean and std from now on.

        Raises:
            UserError: It has none; or it is another transform, which would not be called: batches are made in one go.
        """
        for transform in L(tfms):
            if not isinstance(transform, Normalize):
                raise UserError(
                    f"{type(transform).__name__} would not be called: batches are made in one go here; take a callback "
                    f"of this package, an argument of load_data, or fastai's own DataLoaders"
                )
            if transform.mean is None:
                raise UserError("Normalize() has no mean and std here; leave it out: images are normalised already")
            mean, std = (
                tuple(round(value, 6) for value in t.flatten().tolist()) for t in (transform.mean, transform.std)
            )
            notice(f"images are normalised with mean={mean} and std={std} from now on")
            for loader in self.loaders:
                loader.mean, loader.std = mean, std
                loader._affine_on.clear()

    def with_unlabelled(self) -> "ImageLoaders":
        """These loaders with the images without labels among the training images: for Learners that distil."""
        if self.unlabelled is None:
            return self
        both = self.train.dataset.joined(self.unlabelled)
        train = self.train.new(both, bs=min(self.batch_size or self.train.bs, len(both)))
        return ImageLoaders(train, self.valid, path=self.path, device=self.device)

    def validated_by(self, labels: Tensor) -> "ImageLoaders":
        """These loaders with a teacher's answers, shape (N,), for the labels of the images to validate on."""
        loaders = ImageLoaders(
            self.train, self.valid.new(self.valid.dataset.answered(labels)), path=self.path, device=self.device
        )
        loaders.unlabelled, loaders.batch_size = self.unlabelled, self.batch_size
        return loaders

    def test_dl(
        self, test_items: Any, rm_type_tfms: Any = None, with_labels: bool = False, **kwargs: Any
    ) -> BatchLoader:
        """A loader over other images, whatever `ImageSet.from_items` takes.

        Args:
            test_items: The images.
            rm_type_tfms: fastai's argument, ignored here.
            with_labels: Label files by the folder that they are in, unless they come with a label or are files of
                these loaders' own.
            kwargs: As in `BatchLoader`.
        """
        own = self._own(test_items) if with_labels else None
        if own is not None:
            return self.valid.new(own, **kwargs)
        if with_labels:
            test_items = [
                item if isinstance(item, tuple) else (item, class_name(Path(item).parent.name)) for item in test_items
            ]
        return self.valid.new(test_items, **kwargs)

    def _own(self, items: Any) -> ImageSet | None:
        """The images of these loaders that are in the files `items`, not augmented; None if others are among them."""
        for images in (self.valid.dataset, self.train.dataset):
            places = images.places_of(items)
            if places is not None:
                found = images.subset(torch.tensor(places, dtype=torch.long))
                found.split_idx = 1
                return found
        return None


def balanced(labels: Tensor) -> Tensor:
    """As many indices as there are labels, shape (N,), in a random order, with equally many of each class.

    The images of a class come equally often, up to one; of a class with too many, some are left out. What N leaves
    after its division by the classes goes to classes drawn at random. Images without a label come once.
    """
    without = labels == UNLABELLED
    if without.any():
        known = (~without).nonzero().flatten()
        order = torch.cat([known[balanced(labels[known])] if len(known) else known, without.nonzero().flatten()])
        return order[torch.randperm(len(order))]
    classes = labels.unique()
    share, left = divmod(len(labels), len(classes))
    drawn = []
    for place, c in enumerate(classes[torch.randperm(len(classes))]):
        wanted, own = share + (place < left), (labels == c).nonzero().flatten()
        rounds = [own[torch.randperm(len(own))] for _ in range(-(-wanted // len(own)))]
        drawn.append(torch.cat(rounds)[:wanted])
    order = torch.cat(drawn)
    return order[torch.randperm(len(order))]


def unlabelled_images(dls: DataLoaders) -> int:
    """How many of the training images have no label."""
    data = dls.train_ds
    return len(data) - data.labelled if isinstance(data, ImageSet) else 0


def vocabulary(dls: DataLoaders) -> list[str] | None:
    """The class names of fastai DataLoaders, where they have any."""
    vocab = getattr(dls, "vocab", None)
    return None if vocab is None else [str(name) for name in vocab]


def statistics(dls: DataLoaders) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation that DataLoaders normalise with: `BatchLoader`'s own, or those of `Normalize`."""
    loader = getattr(dls.train, "dl", dls.train)  # what a distributed loader wraps
    if getattr(loader, "mean", None) is not None:
        return tuple(loader.mean), tuple(loader.std)
    for transform in getattr(getattr(loader, "after_batch", None), "fs", []):
        if isinstance(transform, Normalize):
            return tuple(transform.mean.flatten().tolist()), tuple(transform.std.flatten().tolist())
    return (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
