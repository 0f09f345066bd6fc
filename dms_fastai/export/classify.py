"""Classification of image files."""

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from fastcore.basics import chunked
from torch import Tensor

from ..data.augment import affine, normalize
from ..data.images import read_image, read_pixels
from ..errors import UserError
from ..trained import open_learner
from .source import find_source, read_model, vocab_of

__all__ = ["Classified", "classify_files", "predict_files"]

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
            found = learn.get_preds(dl=learn.dls.test_dl(files))[0]
            return found if hasattr(learn.loss_func, "activation") else found.softmax(1)  # as torch's own losses
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
