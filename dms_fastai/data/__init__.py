"""Images: sources, batched augmentation and the loader; `load_data` puts them together."""

from collections.abc import Iterable, Sequence
from dataclasses import fields
from inspect import signature
from math import isfinite
from pathlib import Path
from typing import Any

import torch
from fastai.data.core import DataLoaders

from ..errors import UserError, reason_of, unknown
from ..models.dmsresnet import MEAN, STD
from ..names import source_name
from ..settings import Pixels, convert
from .augment import Crops
from .imageset import ImageSet
from .loader import BatchLoader
from .sets import Data, Sets

__all__ = ["BatchLoader", "Crops", "Data", "ImageSet", "Sets", "load_data", "source_name"]

NO_FLIP = {"digits"}
FASTAIS = ("item_tfms", "batch_tfms", "after_item", "after_batch")


def load_data(
    data: str | Path = "digits",
    bs: int = 128,
    size: int | None = None,
    valid: str | float = "test",
    seed: int = 0,
    mean: tuple[float, ...] = MEAN,
    std: tuple[float, ...] = STD,
    device: str | torch.device | None = None,
    labels: str | Path | None = None,
    balance: bool = False,
    view: int | None = None,
    classes: Sequence[str] | None = None,
    where: str = "auto",
    **crops: Any,
) -> DataLoaders:
    """fastai `DataLoaders` over a data set, with crops and flips in training.

    Args:
        data: "digits", "cifar10", "cifar100", "imagenette"; a folder with train/CLASS/*.png and test/, valid/, val/ or
            validation/CLASS/*.png, or with CLASS/*.png alone, and perhaps unlabelled/*.png; an .npz file with
            train_images, train_labels, test_images, test_labels, and perhaps unlabelled_images; CIFAR's own files,
            parquet files of Hugging Face's, or a .zip or .tar of a folder.
        bs, size, valid: As in `Data`; `bs` is its `batch_size`.
        seed: Chooses the held-out images, and nothing else.
        mean, std: What pixels (0...1) are normalised with, a value for each channel.
        device: Where images and batches are. None: the GPU if there is one.
        labels: A .csv table with the labels of the images in a folder.
        balance: As in `Data`.
        view: Height and width of the images that a teacher expects. Where they come larger than `size`, training
            batches are as large as that, and `dms_learner` makes the student's images from them.
        classes: Names of the classes, in order, for a teacher's student, where no training image has a label.
        where: As in `Data`.
        crops: As in `Crops`; digits are not flipped unless `flip` is given.

    Raises:
        UserError: Data that are missing or cannot be trained on, or a setting out of range.
    """
    _refuse_unknown(crops)
    chosen = Data(bs, size, valid, None if labels is None else str(labels), balance, where)
    if crops.get("flip") is None:
        crops.pop("flip", None)
    if source_name(data) in NO_FLIP:
        crops.setdefault("flip", 0.0)
    mean, std = _statistics(mean, std)
    device = _device(device)
    cropped = Crops(**crops)
    sets = chosen.open(data, seed, classes, crops=cropped).for_distillation
    if view is not None:
        sets = chosen.enlarged(sets, data, convert(view, Pixels, "view"), seed)
    return sets.loaders(bs, cropped, mean, std, device, balance, where)


def _refuse_unknown(crops: Iterable[str]) -> None:
    """Raise a UserError for an argument of `load_data` that is none of `Crops`, either."""
    known = [field.name for field in fields(Crops)]
    for name in (name for name in crops if name not in known):
        if name in FASTAIS:
            raise UserError(
                f"load_data has no {name}; augment by callbacks, or give dms_learner DataLoaders of fastai's own"
            )
        raise unknown("argument of load_data", name, [*signature(load_data).parameters, *known])


def _statistics(mean: Any, std: Any) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """What pixels are normalised with, as plain numbers.

    Raises:
        UserError: They are no numbers, too few or too many, or not finite; or a number of std is not above 0.
    """
    try:
        found = [tuple(map(float, values)) for values in (mean, std)]
    except (TypeError, ValueError):
        found = []
    if [len(values) for values in found] != [3, 3] or not all(map(isfinite, sum(found, ()))) or min(found[1]) <= 0:
        raise UserError(f"mean is {mean!r} and std is {std!r}; give three numbers of each, those of std above 0")
    return found[0], found[1]


def _device(device: str | torch.device | None) -> torch.device | None:
    try:
        return None if device is None else torch.device(device)
    except RuntimeError as error:
        raise UserError(f"device is {device!r}: {reason_of(error)}") from None
