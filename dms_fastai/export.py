"""What leaves a run: a .pkl for fastai, safetensors for everyone; and pictures classified with either."""

from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from .callbacks.distill import open_learner, without_code
from .data.augment import affine, normalize
from .data.pictures import read_picture
from .errors import UserError
from .files import whole
from .learner import DMSLearner
from .models.weights import WEIGHTS, load_weights, save_weights, shipped_weights

__all__ = ["export_run", "predict_files"]

LEARNER = "learner.pkl"


def export_run(learn: DMSLearner, folder: Path) -> None:
    """Write `learner.pkl` and `model.safetensors` into a run's folder, each whole or not at all."""
    save_weights(learn.model, learn.card, folder / WEIGHTS)
    rates = vars(learn.recorder).pop("hps", {})  # every step's rate, which fastai would take along
    with whole(folder / LEARNER) as partial:
        learn.export(partial.resolve())
    learn.recorder.hps = rates


def predict_files(source: Path, pictures: Iterable[Path], trust: bool = False) -> tuple[list[str], Tensor]:
    """Class names, and the probabilities of each picture, shape (N, C).

    Args:
        source: A run's folder, a model.safetensors, a .pkl of `Learner.export`, or the name of an architecture whose
            weights come with this package.
        pictures: Files.
        trust: Load a .pkl, which runs the code inside it. Without, the weights beside it are taken, in a run's folder.

    Raises:
        UserError: There is no model at `source`, it is a .pkl that is not trusted, or a file is no picture.
    """
    source = (None if source.exists() else shipped_weights(str(source))) or without_code(source, trust)
    if source.suffix == ".pkl":
        learn = open_learner(source, trust)
        learn.remove_cbs([cb for cb in learn.cbs if cb.name == "progress"])
        probabilities, _ = learn.get_preds(dl=learn.dls.test_dl(list(pictures)))
        return [str(name) for name in learn.dls.vocab], probabilities
    if source.suffix != ".safetensors" and not source.is_dir():
        raise UserError(
            f"no model at {source}; give a learner.pkl, a model.safetensors, a run's folder, or an architecture whose "
            f"weights come with this package, dmsresnet"
        )
    model, card = load_weights(source / WEIGHTS if source.is_dir() else source)
    x = torch.stack([read_picture(picture, card.size) for picture in pictures])
    with torch.inference_mode():
        x = normalize(x, *affine(card.mean, card.std, card.size, x.device))
        return card.vocab, model(x).softmax(1)
