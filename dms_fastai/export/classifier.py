"""A network from pixels to probabilities, and the content of a file that holds it."""

import json
import warnings
from collections.abc import Mapping
from contextlib import suppress

import torch
from torch import Tensor, nn

from ..data.augment import affine
from ..errors import UserError
from ..models.card import ModelCard
from ..models.fold import fold_batch_norms
from ..models.macs import macs
from .formats import FORMATS

__all__ = ["Classifier", "content_of"]


class Classifier(nn.Module):
    """A network from pixels to probabilities: with its normalisation and a softmax, and its batch norms folded."""

    def __init__(self, model: nn.Module, card: ModelCard):
        super().__init__()
        self.model = fold_batch_norms(model)
        self.scale, self.shift = (nn.Buffer(v) for v in affine(card.mean, card.std, 1, torch.device("cpu")))

    def forward(self, pixels: Tensor) -> Tensor:
        """Probabilities, float32 of shape (B, classes), of uint8 images, shape (B, C, H, W), in RGB order."""
        return self.model(pixels.float() * self.scale + self.shift).softmax(1)


def content_of(model: nn.Module, card: ModelCard, ending: str, metadata: Mapping[str, str] | None = None) -> bytes:
    """The content of a file with a network as a classifier of pixels, in floating-point numbers.

    Args:
        model, card: The network, and what it is.
        ending: One of `FORMATS`.
        metadata: What the file is to hold besides "classes" and "macs".

    Raises:
        UserError: The format cannot express the network.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's, of its own deprecations
            classifier = Classifier(model, card).cpu().float().eval()
            told = {"classes": json.dumps(card.vocab), **(metadata or {})}
            with suppress(Exception):  # what cannot be counted can still be written
                told["macs"] = str(macs(classifier.model, card.shape))
            return FORMATS[ending].content(_traced(classifier, card.shape), told)
    except Exception as error:  # the network may be anybody's
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"{card.arch} cannot be written as {ending}: {reason}") from error


def _traced(classifier: Classifier, shape: tuple[int, int, int]) -> torch.export.ExportedProgram:
    """The classifier as a graph for batches of any size, without this machine's file paths."""
    example = torch.zeros(2, *shape, dtype=torch.uint8)
    batch = {"pixels": {0: torch.export.Dim("batch")}}
    program = torch.export.export(classifier, (example,), dynamic_shapes=batch)
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)
    return program
