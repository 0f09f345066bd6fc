"""A finished run's predictions for each validation image, kept in `predictions.npz` beside its weights."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from zipfile import is_zipfile

import numpy as np

from ..errors import UserError
from ..files import whole
from ..legacy import modern_predictions

if TYPE_CHECKING:  # to read predictions needs no torch
    from fastai.learner import Learner
    from torch import Tensor

__all__ = ["Predictions", "read_predictions", "write_predictions"]

MISTAKES = 24
PIXELS = 64  # largest side of an image that is kept for display
LEAST = float(np.finfo(np.float16).min)


@dataclass(frozen=True)
class Predictions:
    """The predictions for N validation images in C classes, in the order of the data set.

    Attributes:
        log_probabilities: float16, shape (N, C).
        predicted: The classes with the largest probability before rounding, shape (N,).
        labels: The true classes, shape (N,).
        vocab: Names of the classes, shape (C,).
        mistakes: Indices of images classified wrong, the most confident mistakes first, shape (M,).
        images: These images, uint8, shape (M, H, W, 3).
        files: The files of the validation images, relative to the data set's folder, shape (N,); None if they come from
            none.
        regions: Where in these images the network found the predicted class, as `grad_cam` gives it, uint8, shape
            (M, h, w); None if it has no such map.
    """

    log_probabilities: np.ndarray
    predicted: np.ndarray
    labels: np.ndarray
    vocab: np.ndarray
    mistakes: np.ndarray
    images: np.ndarray
    files: np.ndarray | None = None
    regions: np.ndarray | None = None

    @property
    def right(self) -> np.ndarray:
        return self.predicted == self.labels


def write_predictions(learn: "Learner", file: Path) -> None:
    """Classify the validation images as validation does, and write the predictions to `file`."""
    with learn.no_bar(), learn.no_logging():
        logits, labels = learn.get_preds(ds_idx=1, act=lambda logits: logits)
    logs = logits.float().log_softmax(1)
    confidence, predicted = logs.max(1)
    wrong = (predicted != labels).nonzero().flatten()
    mistakes = wrong[confidence[wrong].argsort(descending=True, stable=True)[:MISTAKES]]
    images, files = learn.dls.valid_ds, getattr(learn.dls.valid_ds, "files", None)
    step = -(-images.held_size // PIXELS)
    shown = images.gathered(mistakes.cpu())[..., ::step, ::step].permute(0, 2, 3, 1)
    regions = _regions(learn, mistakes, predicted)
    small = np.int16 if logs.shape[1] < 2**15 else np.int32
    with whole(file) as partial, partial.open("wb") as opened:
        np.savez_compressed(
            opened,
            log_probabilities=logs.clamp(min=LEAST).cpu().numpy().astype(np.float16),
            predicted=predicted.cpu().numpy().astype(small),
            labels=labels.cpu().numpy().astype(small),
            vocab=np.array([str(name) for name in learn.dls.vocab]),
            mistakes=mistakes.cpu().numpy(),
            images=shown.cpu().numpy(),
            **({} if files is None else {"files": np.array([str(file) for file in files])}),
            **({} if regions is None else {"regions": regions}),
        )


def _regions(learn: "Learner", mistakes: "Tensor", predicted: "Tensor") -> np.ndarray | None:
    """The regions of the images at `mistakes` that speak for the predicted classes."""
    from ..models.grad_cam import grad_cam

    loader, device = learn.dls.valid, next(learn.model.parameters()).device
    x = loader.load_batch(mistakes.to(loader.device))[0].to(device)
    found = grad_cam(learn.model, x, predicted[mistakes].to(device))
    return None if found is None else (255 * found.float()).round().byte().numpy()


def read_predictions(file: Path) -> Predictions:
    """What `write_predictions` kept.

    Raises:
        UserError: The file is missing or damaged.
    """
    if not file.is_file():
        raise UserError(f"{file} is missing; repeat the run's command to write it")
    if not is_zipfile(file):
        raise UserError(f"{file} is damaged: it is no .npz file")
    try:
        with np.load(file, allow_pickle=False) as archive:
            found = Predictions(**modern_predictions({name: archive[name] for name in archive.files}))
    except Exception as error:  # numpy, zipfile and the decompressors raise whatever they stumble over
        raise UserError(f"{file} is damaged: {error}") from None
    if not _is_sound(found):
        raise UserError(f"{file} is damaged: its parts do not fit each other")
    return found


def _is_sound(p: Predictions) -> bool:
    """Whether shapes and types are as `Predictions` says, and every index is that of an image or a class."""
    if p.log_probabilities.ndim != 2 or p.log_probabilities.dtype.kind != "f":
        return False
    (n, c), m = p.log_probabilities.shape, len(np.atleast_1d(p.mistakes))
    return (
        n > 0
        and c > 1
        and bool((p.log_probabilities < 0.01).all())  # rounding aside, none is above 0
        and all(_is_index(classes, n, c) for classes in (p.predicted, p.labels))
        and _is_index(p.mistakes, m, n)
        and _is_names(p.vocab, c)
        and (p.files is None or _is_names(p.files, n))
        and p.images.dtype == np.uint8
        and p.images.shape == (m, *p.images.shape[1:3], 3)
        and (m == 0 or p.images.size > 0)
        and (p.regions is None or (p.regions.dtype == np.uint8 and p.regions.ndim == 3 and len(p.regions) == m))
    )


def _is_index(values: np.ndarray, count: int, end: int) -> bool:
    """Whether these are `count` indices below `end`."""
    return values.shape == (count,) and values.dtype.kind in "iu" and bool(((values >= 0) & (values < end)).all())


def _is_names(values: np.ndarray, count: int) -> bool:
    return values.shape == (count,) and values.dtype.kind == "U"
