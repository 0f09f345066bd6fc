"""Pictures: sources, batched augmentation and the loader; `load_data` puts them together."""

from pathlib import Path

import torch
from fastai.data.core import DataLoaders

from ..errors import UserError
from ..models.dmsresnet import MEAN, STD
from .augment import Border
from .imageset import ImageSet
from .loader import BatchLoader, PictureLoaders
from .sources import NAMED, load_splits, source_name, split_by_class

__all__ = ["NAMED", "BatchLoader", "ImageSet", "load_data", "source_name"]

VALID_BATCH = {"cpu": 128, "cuda": 512}  # a CPU is slower with tensors that outgrow its allocator's pools
NO_FLIP = {"digits"}


def load_data(
    data: str | Path = "digits",
    bs: int = 128,
    size: int | None = None,
    valid: str | float = "test",
    pad: float = 0.125,
    flip: float | None = None,
    seed: int = 0,
    mean: tuple[float, ...] = MEAN,
    std: tuple[float, ...] = STD,
    device: str | torch.device | None = None,
    border: Border = "black",
    alternate: bool = False,
) -> DataLoaders:
    """fastai `DataLoaders` over a data set, with crops and flips in training.

    Args:
        data: "digits", "cifar10", "cifar100", "imagenette"; a folder with train/CLASS/*.png and test/, valid/ or
            val/CLASS/*.png; or an .npz file with train_images, train_labels, test_images, test_labels.
        bs: Training pictures in a batch; cut to the number of training pictures.
        size: Height and width in pixels. None: the pictures' own size where they have one, else 32.
        valid: What to validate on: "test" or "val" (either stands in for the other where it is missing), or the
            share of the training pictures to hold out instead, between 0 and 1.
        pad: Border for random crops as a share of the size: 0.125 is the paper's 4 of 32 pixels. 0: no crops.
        flip: Probability of mirroring left to right. None: 0.5, but 0 for data whose classes have a handedness.
        seed: Chooses the held-out pictures, and nothing else.
        mean, std: What pixels (0...1) are normalised with, one a channel.
        device: Where pictures and batches live. None: the GPU where there is one.
        border: What the border shows: "black", or the picture's own pixels in "mirror" order.
        alternate: Where there is any mirroring, mirror each picture in every other epoch, not by chance.

    Raises:
        UserError: Data that is not there or cannot be trained on, or a setting out of range.
    """
    if bs < 1:
        raise UserError(f"the batch size is {bs}; it must be at least 1")
    if size is not None and size < 8:
        raise UserError(f"the size is {size} pixels; it must be at least 8")
    if not 0 <= pad <= 1:
        raise UserError(f"pad is {pad}; the border must be between 0 and 1 of the size")
    if flip is not None and not 0 <= flip <= 1:
        raise UserError(f"flip is {flip}; the probability must be between 0 and 1")
    if border not in ("black", "mirror"):
        raise UserError(f"border is {border!r}; it must be 'black' or 'mirror'")
    splits = load_splits(data, size)
    train, evaluation = _choose(splits, valid, seed, data)
    train.split_idx = 0
    if flip is None:
        flip = 0.0 if train.name in NO_FLIP else 0.5
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    bs = min(bs, len(train))
    own = {"pad": pad, "flip": flip, "border": border, "alternate": alternate, "mean": mean, "std": std}
    loaders = [
        BatchLoader(train, bs, shuffle=True, drop_last=True, device=device, **own),
        BatchLoader(evaluation, max(bs, VALID_BATCH.get(device.type, bs)), device=device, **own),
    ]
    return PictureLoaders(*loaders, device=device)


def _choose(splits: dict[str, ImageSet], valid: str | float, seed: int, data: str | Path) -> tuple[ImageSet, ImageSet]:
    """The training and the validation set out of the splits that there are."""
    if isinstance(valid, str):
        if valid not in ("test", "val"):
            raise UserError(f"valid is {valid!r}; it must be 'test', 'val' or a share between 0 and 1")
        other = {"test": "val", "val": "test"}[valid]
        evaluation = splits.get(valid, splits.get(other))
        if evaluation is None:
            raise UserError(
                f"{data} has no test or validation pictures; hold some out: --set data.valid=0.1, valid=0.1 in Python"
            )
        return splits["train"], evaluation
    if not 0 < valid < 1:
        raise UserError(f"valid is {valid}; the share of held-out pictures must be between 0 and 1")
    held_out, rest = split_by_class(splits["train"].labels, valid, seed)
    if not len(held_out) or not len(rest):
        raise UserError(f"valid is {valid}: of {len(splits['train'])} training pictures that leaves one side empty")
    train, evaluation = splits["train"].subset(rest), splits["train"].subset(held_out)
    evaluation.split = "held out"
    return train, evaluation
