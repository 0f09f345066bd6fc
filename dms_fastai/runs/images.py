"""The images of a recipe as it trains on them: weights to begin from bring their size and their normalisation along."""

from dataclasses import replace
from pathlib import Path

import torch
from fastai.data.core import DataLoaders

from ..data import Data, Sets
from ..data.sources import has_own_size
from ..models.dmsresnet import MEAN, STD
from ..recipes import Recipe
from ..trained import expected_by

__all__ = ["data_of", "loaders_of", "normalisation_of", "size_of_weights"]


def size_of_weights(recipe: Recipe, data: str | Path) -> int | None:
    """The size in pixels of a recipe's images, where it is that of weights to begin from; None where it is not.

    It is, unless the recipe sets a size or the data set has its own.
    """
    model = recipe.model
    if model.weights is None or recipe.data.size is not None or has_own_size(data):
        return None
    return expected_by(model.weights, model.name).size


def data_of(recipe: Recipe, data: str | Path) -> Data:
    """Which images of a data set a recipe trains on, and how large."""
    wanted = recipe.data.build()
    size = size_of_weights(recipe, data)
    return wanted if size is None else replace(wanted, size=size)


def normalisation_of(recipe: Recipe) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation, a value for each channel: those of weights to begin from, or else CIFAR-10's."""
    if recipe.model.weights is None:
        return MEAN, STD
    expected = expected_by(recipe.model.weights, recipe.model.name)
    return expected.mean, expected.std


def loaders_of(recipe: Recipe, sets: Sets, device: torch.device | str) -> DataLoaders:
    """DataLoaders over a recipe's images, with its batches, augmentation and normalisation."""
    mean, std = normalisation_of(recipe)
    wanted, crops = recipe.data, recipe.augment.build()
    return sets.loaders(wanted.batch_size, crops, mean, std, device, wanted.balance, wanted.where)
