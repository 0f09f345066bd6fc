"""Classification of image files."""

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from fastcore.basics import chunked
from PIL import Image, ImageOps
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor

from ..data.augment import affine, normalize
from ..data.images import read_image
from ..errors import UserError
from ..trained import open_learner
from .source import find_source, read_model, vocab_of

__all__ = ["Classified", "classify_files", "predict_files", "read_pixels"]

Classified = tuple[Path, Tensor]  # an image file and its probabilities, shape (C,)
BATCH = 64  # images to predict at once


def predict_files(
    source: str | Path,
    images: Iterable[str | Path] | str | Path,
    trust: bool = False,
    errors: list[UserError] | None = None,
) -> tuple[list[str], Tensor]:
    """Classify image files: gives the class names, and the probabilities of each image, shape (N, C).

    Args:
        source: A run's folder, a model.safetensors, a .pkl of `Learner.export`, the name of an architecture whose
            weights come with this package, or a file of `export_model`, which its own runtime runs.
        images: Image files, or one.
        trust: Load a .pkl, which runs the code in it, or a .pt2, which may. Otherwise, for a run's .pkl, the weights
            beside it are read.
        errors: Gets the error of each file that is no image; such files have no row. None: the first error is raised.

    Raises:
        UserError: There is no model at `source`, it is a .pkl that is not trusted, or a file is no image.
    """
    vocab, found = classify_files(source, images, trust, errors)
    rows = [probabilities for _, probabilities in found]
    return vocab, torch.stack(rows) if rows else torch.empty(0, len(vocab))


def classify_files(
    source: str | Path,
    images: Iterable[str | Path] | str | Path,
    trust: bool = False,
    errors: list[UserError] | None = None,
) -> tuple[list[str], Iterator[Classified]]:
    """`predict_files` for any number of images, of which only a batch is in memory.

    Returns:
        The class names, and an iterator over the files that are images, each with its probabilities, shape (C,).
    """
    images = [images] if isinstance(images, str | Path) else images
    source = find_source(source, trust)
    if source.suffix == ".pkl":
        learn = open_learner(source, trust)
        learn.remove_cbs([cb for cb in learn.cbs if cb.name == "progress"])
        vocab = vocab_of(learn)

        def read(file: Path) -> Path:
            read_image(file)  # what fastai raises need not name the file
            return file

        def classify(files: list[Path]) -> Tensor:
            return learn.get_preds(dl=learn.dls.test_dl(files))[0]
    else:
        model, card = read_model(source, trust)
        vocab, scaling = card.vocab, affine(card.mean, card.std, 1, torch.device("cpu"))

        def read(file: Path) -> Tensor:
            return read_pixels(file, card.shape, card.white, card.middle)

        @torch.inference_mode()
        def classify(pixels: list[Tensor]) -> Tensor:
            return model(normalize(torch.stack(pixels), *scaling)).softmax(1)

    return vocab, _classified(images, read, classify, errors)


def _classified(
    images: Iterable[Path],
    read: Callable[[Path], Any],
    classify: Callable[[list[Any]], Tensor],
    errors: list[UserError] | None,
) -> Iterator[Classified]:
    for batch in chunked(images, BATCH):
        files, items = [], []
        for file in batch:
            try:
                items.append(read(file))
                files.append(file)
            except UserError as error:
                if errors is None:
                    raise
                errors.append(error)
        if items:
            yield from zip(files, classify(items), strict=True)


def read_pixels(
    image: str | Path, shape: tuple[int, int, int], white: float | None = None, middle: float = 1.0
) -> Tensor:
    """The middle of an image file, resized to uint8 of `shape` (C, H, W), in colour or grey; `white` becomes 255.

    `middle` as in `read_image`, for a square in colour.

    Raises:
        UserError: The file is no image, or `shape` has neither 1 channel nor 3.
    """
    channels, height, width = shape
    if channels not in (1, 3):
        raise UserError(f"the model takes images of {channels} channels; files are in colour (3) or grey (1)")
    if channels == 3 and height == width:
        return read_image(image, height, white, middle)
    colours = Image.fromarray(read_image(image, None, white).permute(1, 2, 0).numpy())
    fitted = ImageOps.fit(colours, (width, height), method=Image.Resampling.BILINEAR)
    return pil_to_tensor(fitted if channels == 3 else fitted.convert("L"))
