"""What DataLoaders give a network: images of one shape, in one normalisation, with one class each."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from fastai.data.core import DataLoaders
from fastai.torch_core import no_random, to_device
from torch import Tensor

from ..data.imageset import ImageSet
from ..data.loader import statistics
from ..errors import UserError

__all__ = ["Inputs", "images_of", "inputs_of", "seen_of", "shortest"]


@dataclass(frozen=True)
class Inputs:
    """The images that a network sees.

    Attributes:
        shape: Channels, height and width.
        mean, std: What pixels (0...1) are normalised with, a value for each channel.
    """

    shape: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @classmethod
    def seen(cls, shape: Sequence[int], dls: DataLoaders) -> "Inputs":
        """Images of `shape` (C, H, W), in the normalisation of `dls`."""
        mean, std = (v * shape[0] if len(v) == 1 else v for v in map(shortest, statistics(dls)))
        return cls(tuple(shape), mean, std)


def inputs_of(dls: DataLoaders) -> Inputs:
    """The images that DataLoaders give, from their first one. Random states stay as they are.

    Raises:
        UserError: They are no DataLoaders of images with one class each, or have no images.
    """
    if not isinstance(dls, DataLoaders):
        raise UserError(f"dls is a {type(dls).__name__}; give the DataLoaders of load_data, or fastai's own")
    data = dls.train_ds
    if isinstance(data, ImageSet):
        if data.labels is None:
            raise UserError("the training images have no labels; give each a class")
        return Inputs.seen(data.shape, dls)
    item = _first_item(dls)
    if len(item) != 2:
        raise UserError(f"an item of these DataLoaders has {len(item)} parts; give an image and its class")
    x, y = item
    if not _is_image(x):
        raise UserError(f"the inputs are {_kind(x)}; give float images of shape (B, C, H, W), as ImageBlock does")
    if not isinstance(y, Tensor) or y.ndim != 1 or y.dtype != torch.int64:
        raise UserError(
            f"the targets are {_kind(y)}; this package classifies one label an image: give int64 classes of shape "
            f"(B,), as CategoryBlock does"
        )
    if not getattr(dls, "c", None):
        raise UserError("the DataLoaders do not say how many classes there are; set dls.c")
    return Inputs.seen(x.shape[1:], dls)


def seen_of(dls: DataLoaders) -> dict[str, Any]:
    """`white` and `middle` of a `ModelCard`, for the images of DataLoaders."""
    sets = [dl.dataset for dl in dls.loaders[:2] if isinstance(dl.dataset, ImageSet)]
    white = sets[0].white if sets else None
    return {"white": white, "middle": min((images.middle for images in sets), default=1.0)}


def _first_item(dls: DataLoaders) -> tuple[Any, ...]:
    """A batch of the first item alone, of the validation set if it has any. Random states stay as they are.

    Raises:
        UserError: There are no items.
    """
    loaders = [getattr(dl, "dl", dl) for dl in reversed(dls.loaders[:2])]  # what a distributed loader wraps
    loader = next((dl for dl in loaders if getattr(dl, "n", None) != 0), None)
    if loader is None:
        raise UserError("these DataLoaders have no images")
    with no_random(reproducible=False):
        if not getattr(loader, "indexed", False):  # torch's, or one without an order
            return tuple(part[:1] for part in next(iter(loader)))
        loader.before_iter()
        batch = loader.do_batch([loader.do_item(0)])
        return tuple(loader.after_batch(to_device(batch, loader.device)))


def images_of(dls: DataLoaders) -> Inputs | None:
    """As `inputs_of`, whatever the targets are; None if the inputs are no images."""
    data = dls.train_ds
    if isinstance(data, ImageSet):
        return Inputs.seen(data.shape, dls)
    x = _first_item(dls)[0]
    return Inputs.seen(x.shape[1:], dls) if _is_image(x) else None


def _is_image(x: Any) -> bool:
    """Whether an input is a batch of float images (B, C, H, W)."""
    return isinstance(x, Tensor) and x.ndim == 4 and x.is_floating_point()


def shortest(values: tuple[float, ...]) -> tuple[float, ...]:
    """Values of channels as one if all are the same: it is that of any number of channels."""
    return values[:1] if len(set(values)) == 1 else values


def _kind(value: Any) -> str:
    if not isinstance(value, Tensor):
        return f"a {type(value).__name__}"
    return f"{str(value.dtype).removeprefix('torch.')} of shape {tuple(value.shape)}"
