"""Opens whatever holds a trained network, an exported file included, and finds what images it expects."""

import math
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from fastai.data.core import DataLoaders
from fastai.learner import Learner
from fastai.torch_core import no_random
from PIL import Image
from torch import Tensor, nn

from ..data.images import read_pixels
from ..data.imageset import ImageSet
from ..data.loader import vocabulary
from ..errors import UserError, no_model, notice, reason_of
from ..learner import DMSLearner
from ..models.card import ModelCard
from ..models.weights import all_finite, load_weights
from ..trained import Inputs, find_file, inputs_of, open_learner
from ..trained.inputs import seen_of
from .formats import Exported, is_exported, open_exported
from .measure import SMALLEST

__all__ = ["find_source", "open_model", "read_model", "vocab_of"]

GREY = 128
ALIKE = 0.01  # is the mean difference of pixels, 0...1, that ways of resizing make


class NoFilesError(UserError):
    """DataLoaders do not read the file of an image."""


def open_model(source: str | Path | Learner, trust: bool = False) -> tuple[nn.Module, ModelCard]:
    """A trained network, and what it is and expects of its images.

    Args:
        source, trust: As in `export_model`.

    Raises:
        UserError: There is no model at `source`, it is a .pkl that is not trusted, the Learner does not say what images
            its model takes, or weights are NaN or infinite.
    """
    if not isinstance(source, Learner):
        source = find_source(source, trust)
        source = open_learner(source, trust) if source.suffix == ".pkl" else source
    if not isinstance(source, Learner):
        return read_model(source, trust)
    card = _card_of_ours(source) if isinstance(source, DMSLearner) else _card_of(source)
    if not all_finite(source.model):
        raise UserError("the Learner's weights are NaN or infinite; train it again")
    return source.model, card


def find_source(source: str | Path, trust: bool) -> Path:
    """The .safetensors, .pkl or exported file that `source` stands for."""
    if is_exported(source):
        return Path(source)
    file = find_file(source, trust)
    if file is None:
        raise no_model(source)
    return file


def read_model(file: Path, trust: bool) -> tuple[nn.Module, ModelCard]:
    """The network in a file of weights or in an exported file, and what it is."""
    if not is_exported(file):
        return load_weights(file)
    exported = open_exported(file, trust)
    return _InRuntime(exported), exported.card(file.name)


class _InRuntime(nn.Module):
    """An exported file as a network, in its own runtime: log-probabilities of images that are normalised to 0...1."""

    def __init__(self, exported: Exported):
        super().__init__()
        self.exported = exported

    def forward(self, x: Tensor) -> Tensor:
        pixels = (255 * x).round().to("cpu", torch.uint8).contiguous()
        probabilities = torch.from_numpy(self.exported.classify(pixels.numpy()))
        return probabilities.clamp(min=SMALLEST).log().to(x.device)


def vocab_of(learn: Learner) -> list[str]:
    """Names of a Learner's classes; a UserError if it has none."""
    vocab = vocabulary(learn.dls)
    if not vocab:
        raise UserError("this Learner's DataLoaders have no vocab; give one that classifies images")
    return vocab


def _card_of_ours(learn: DMSLearner) -> ModelCard:
    """The Learner's own card; over fastai's DataLoaders, with what they show of an image, where they read files.

    Raises:
        UserError: They do more to an image than resize and normalise.
    """
    if isinstance(learn.dls.train_ds, ImageSet) or vocabulary(learn.dls) is None:
        return learn.card
    try:
        known = None if len(learn.dls.train_ds) else learn.exported_inputs
        return replace(learn.card, middle=_card_of(learn, known).middle)
    except NoFilesError:  # tensors, which the network's graph is given as they are
        return learn.card


def _card_of(learn: Learner, known: Inputs | None = None) -> ModelCard:
    """What the model of a stock Learner expects, found by what its DataLoaders make of a grey image.

    `known` are its images, if it is known what they were.

    Raises:
        UserError: It does not classify images of one size by one label, or does more to them than resize and normalise.
    """
    name, vocab, dls = type(learn.model).__name__, vocab_of(learn), learn.dls
    activation = getattr(learn.loss_func, "activation", None)
    logits = torch.eye(len(vocab))
    if activation is not None and not torch.allclose(activation(logits).as_subclass(Tensor), logits.softmax(1)):
        raise UserError(
            f"this Learner's loss, {learn.loss_func}, is not of one label an image; only such can be written"
        )
    if isinstance(dls.train_ds, ImageSet):
        images = inputs_of(dls)
        return ModelCard(name, vocab, images.mean, images.std, images.shape, **seen_of(dls))
    small, large = (_made_of(dls, Image.new("RGB", size, (GREY,) * 3)) for size in ((61, 97), (120, 80)))
    if known is not None or any(len(dl.dataset) for dl in dls.loaders):
        images = known or inputs_of(dls)
    elif small.shape == large.shape:
        images = Inputs.seen(small.shape, dls)
    else:
        raise UserError("this Learner's transforms do not give images one size; export it with a Resize among them")
    middle = small[:, small.shape[1] // 2, small.shape[2] // 2].cpu()
    mean, std = torch.tensor(images.mean), torch.tensor(images.std)
    card = ModelCard(name, vocab, images.mean, images.std, images.shape)
    if small.shape[0] == images.shape[0] and torch.allclose(middle, (GREY / 255 - mean) / std, atol=1e-3):
        factor = 2 if small.shape == large.shape else 1  # where nothing is resized, all images have one size
        for share in (1.0, _fastais_middle(card.shape)):
            found = replace(card, middle=share)
            if _sees(dls, found, (factor, factor)):
                if factor > 1 and not _sees(dls, found, (factor, factor + 1)):
                    notice("this Learner squeezes or pads longer images; predict shows an exported file their middle")
                return found
    raise UserError("this Learner's transforms do more than resize and normalise; such a model cannot be written")


def _fastais_middle(shape: tuple[int, ...]) -> float:
    """The share of an image that fastai's RandomResizedCrop sees in validation, in steps of 8 pixels."""
    longer = max(shape[1:])
    return longer / (longer + 8 * math.ceil(0.14 * longer / 8))


def _sees(dls: DataLoaders, card: ModelCard, factors: tuple[int, int]) -> bool:
    """Whether DataLoaders make of an image what `predict_files` does; `factors`: its height and width by a card's."""
    channels, height, width = card.shape
    size = factors[1] * width, factors[0] * height
    across, down = np.meshgrid(*(np.linspace(0, 255, side) for side in size))
    image = Image.fromarray(np.stack([across, down, (across + 255 - down) / 2], 2).round().astype(np.uint8))
    with TemporaryDirectory() as folder:
        file = Path(folder) / "ramps.png"
        image.save(file)
        pixels = read_pixels(file, card.shape, middle=card.middle if channels == 3 and height == width else 1.0) / 255
    mean, std = (torch.tensor(each)[:, None, None] for each in (card.mean, card.std))
    given = _made_of(dls, image).cpu() * std + mean
    return given.shape == pixels.shape and (given - pixels).abs().mean().item() < ALIKE


def _made_of(dls: DataLoaders, image: Image.Image) -> Tensor:
    """What DataLoaders make of the file of an image: shape (C, H, W)."""
    with TemporaryDirectory() as folder, no_random(reproducible=False):
        file = Path(folder) / "image.png"
        image.save(file)
        try:
            [made] = dls.test_dl([file], num_workers=0).one_batch()[0]
        except Exception as error:  # the transforms are the user's
            raise NoFilesError(
                f"this Learner's DataLoaders do not read the file of an image: {reason_of(error)}"
            ) from None
    return made.as_subclass(Tensor)
