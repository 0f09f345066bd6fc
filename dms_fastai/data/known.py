"""The classes of a data set as a trained network knows them, by name."""

import torch
from torch import Tensor

from ..errors import UserError
from ..models.card import ModelCard
from .imageset import ImageSet

__all__ = ["check_square", "known_classes"]

STRANGE = 3  # unknown classes in a message


def check_square(card: ModelCard) -> None:
    """Raise a UserError if a network does not take square images in colour, as which data sets are read."""
    channels, height, width = card.shape
    if channels != 3 or height != width:
        raise UserError(
            f"the model takes images of {width}x{height} pixels and {channels} channels, and data sets are read as "
            f"square images in colour; dms-fastai predict classifies the files"
        )


def known_classes(images: ImageSet, card: ModelCard) -> Tensor:
    """The model's index of each class of the images, int64 of shape (classes,); -1 for those that it does not know.

    Raises:
        UserError: The images have a class that the model does not know.
    """
    place = {name: index for index, name in enumerate(card.vocab)}
    known = torch.tensor([place.get(str(name), -1) for name in images.vocab])
    strange = [str(images.vocab[label]) for label in images.labels.unique().tolist() if known[label] < 0]
    if strange:
        more = f" and {len(strange) - STRANGE} more" if len(strange) > STRANGE else ""
        few = ", ".join(map(repr, card.vocab[:STRANGE])) + (", ..." if len(card.vocab) > STRANGE else "")
        raise UserError(
            f"the data have the class {', '.join(map(repr, strange[:STRANGE]))}{more}, which the model does not know; "
            f"its {len(card.vocab)} classes are {few}"
        )
    return known
