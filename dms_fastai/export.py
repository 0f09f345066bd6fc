"""What leaves a run: a .pkl for fastai, safetensors for everyone; and pictures classified with either."""

import warnings
from collections.abc import Iterable
from pathlib import Path

import torch
from fastai.learner import load_learner
from torch import Tensor

from .callbacks.distill import WEIGHTS
from .data.augment import affine, normalize
from .data.pictures import read_picture
from .errors import UserError
from .learner import DMSLearner
from .models.weights import load_weights, save_weights

__all__ = ["export_run", "predict_files"]

LEARNER = "learner.pkl"


def export_run(learn: DMSLearner, folder: Path) -> None:
    """Write `learner.pkl` and `model.safetensors` into a run's folder, each whole or not at all."""
    save_weights(learn.model, learn.card, folder / WEIGHTS)
    partial = folder / f"{LEARNER}.partial"
    learn.export(partial.resolve())
    partial.replace(folder / LEARNER)


def predict_files(source: Path, pictures: Iterable[Path]) -> tuple[list[str], Tensor]:
    """Class names, and the probabilities of each picture, shape (N, C).

    Args:
        source: A run's folder, a model.safetensors, or a .pkl of `Learner.export`, which runs the code inside it.
        pictures: Files.

    Raises:
        UserError: There is no model at `source`, or a file is no picture.
    """
    if source.suffix == ".pkl":
        learn = _load_pkl(source)
        probabilities, _ = learn.get_preds(dl=learn.dls.test_dl(list(pictures)))
        return [str(name) for name in learn.dls.vocab], probabilities
    if source.suffix != ".safetensors" and not source.is_dir():
        raise UserError(f"no model at {source}; give a learner.pkl, a model.safetensors or a run's folder")
    model, card = load_weights(source / WEIGHTS if source.is_dir() else source)
    x = torch.stack([read_picture(picture, card.size) for picture in pictures])
    with torch.inference_mode():
        x = normalize(x, *affine(card.mean, card.std, card.size, x.device))
        return card.vocab, model(x).softmax(1)


def _load_pkl(file: Path):
    if not file.is_file():
        raise UserError(f"no such Learner: {file}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            learn = load_learner(file)
    except Exception as error:  # unpickling lets through whatever the file's classes raise
        raise UserError(f"{file} cannot be loaded as a fastai Learner ({type(error).__name__}: {error})") from None
    learn.remove_cbs([cb for cb in learn.cbs if cb.name == "progress"])
    return learn
