"""A finished run's predictions for each validation image, kept in `predictions.npz` beside its weights."""

import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..errors import UserError
from ..files import whole
from ..legacy import modern_predictions

if TYPE_CHECKING:  # to read predictions needs no torch
    from fastai.learner import Learner

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
    """

    log_probabilities: np.ndarray
    predicted: np.ndarray
    labels: np.ndarray
    vocab: np.ndarray
    mistakes: np.ndarray
    images: np.ndarray

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
    images = learn.dls.valid_ds.images
    step = -(-images.shape[-1] // PIXELS)
    shown = images[mistakes.to(images.device)][..., ::step, ::step].permute(0, 2, 3, 1)
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
        )


def read_predictions(file: Path) -> Predictions:
    """What `write_predictions` kept.

    Raises:
        UserError: The file is missing or damaged.
    """
    try:
        with np.load(file, allow_pickle=False) as archive:
            found = Predictions(**modern_predictions({name: archive[name] for name in archive.files}))
    except FileNotFoundError:
        raise UserError(f"{file} is missing; repeat the run's command to write it") from None
    except (OSError, ValueError, TypeError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise UserError(f"{file} is damaged: {error}") from None
    n, c = found.log_probabilities.shape if found.log_probabilities.ndim == 2 else (0, 0)
    whole_ = (n,) == found.labels.shape == found.predicted.shape and c == len(found.vocab) and n > 0
    if not whole_ or len(found.mistakes) != len(found.images):
        raise UserError(f"{file} is damaged: its parts do not fit each other")
    return found
