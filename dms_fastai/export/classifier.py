"""A network from pixels to probabilities, and the content of a file that holds it."""

import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import torch
from torch import Tensor, nn

from ..data.augment import affine
from ..errors import UserError, reason_of
from ..models.card import ModelCard
from ..models.fold import fold_batch_norms
from ..models.macs import macs
from .formats import FORMATS

__all__ = ["Classifier", "content_of", "expressible", "traced"]


class Classifier(nn.Module):
    """A network from pixels to probabilities: with its normalisation and a softmax, and its batch norms folded."""

    def __init__(self, model: nn.Module, card: ModelCard):
        super().__init__()
        self.model = fold_batch_norms(model, tuple(card.shape))
        self.scale, self.shift = (nn.Buffer(v) for v in affine(card.mean, card.std, 1, torch.device("cpu")))

    def forward(self, pixels: Tensor) -> Tensor:
        """Probabilities, float32 of shape (B, classes), of uint8 images, shape (B, C, H, W), in RGB order."""
        return self.model(pixels.float() * self.scale + self.shift).softmax(1)


def content_of(model: nn.Module, card: ModelCard, ending: str) -> bytes:
    """The content of a file with a network as a classifier of pixels, in floating-point numbers.

    Args:
        model, card: The network, and what it is.
        ending: One of `FORMATS`.

    Raises:
        UserError: The format cannot express the network.
    """
    with expressible(card, ending):
        return FORMATS[ending].content(*traced(model, card, FORMATS[ending].batch))


def traced(
    model: nn.Module, card: ModelCard, batch: int | None = None
) -> tuple[torch.export.ExportedProgram, dict[str, str]]:
    """A network as the graph of a classifier of pixels, and the texts that go with it.

    These are "classes" and "macs"; and "white" and "middle" of the card, where they are not None and 1.

    Args:
        model, card: The network, and what it is.
        batch: How many images the graph takes at once; None: any number.
    """
    classifier = Classifier(model, card).cpu().float().to(memory_format=torch.contiguous_format).eval()
    texts = {"classes": json.dumps(card.vocab)}
    if card.white is not None:
        texts["white"] = json.dumps(card.white)
    if card.middle != 1:
        texts["middle"] = json.dumps(card.middle)
    with suppress(Exception):  # what cannot be counted can still be written
        texts["macs"] = str(macs(classifier.model, card.shape))
    example = torch.zeros(batch or 2, *card.shape, dtype=torch.uint8)
    free = {"pixels": {0: torch.export.Dim("batch")}} if batch is None else None
    program = torch.export.export(classifier, (example,), dynamic_shapes=free)
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # this machine's file paths
    return program, texts


@contextmanager
def expressible(card: ModelCard, ending: str) -> Iterator[None]:
    """Turn what exporters raise of a network, which may be anybody's, into a UserError; no warnings of theirs."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's, of its own deprecations
            yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{card.arch} cannot be written as {ending}: {reason_of(error)}") from error
