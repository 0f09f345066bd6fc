"""Batch size, epochs and network that fit the data, the device and the time that there is."""

import math
from collections.abc import Collection
from dataclasses import replace
from typing import Any

import torch

from ..clock import clock
from ..data import Sets
from ..errors import notice
from ..recipes import Recipe
from .estimate import Estimate, estimate

__all__ = ["fitted", "with_choices_of"]

# From the paper's network to one that trains in seconds.
NETWORKS: tuple[tuple[str, dict[str, Any] | None], ...] = (
    ("dmsresnet", None),
    ("dmsresnet", {"depths": [2, 2, 2], "widths": [32, 64, 128]}),
    ("test_dmsresnet", None),
)
LEAST, MOST = 10, 200  # epochs
STEPS = 1000  # with fewer, a network of this kind has hardly begun to learn
BATCHES = 8  # at least in an epoch, if batches of `SMALLEST` images allow it
SMALLEST, LARGEST = 8, 128


def fitted(
    recipe: Recipe, sets: Sets, device: torch.device, seconds: float, fixed: Collection[str], before: Estimate | None
) -> tuple[Recipe, Estimate]:
    """The recipe with what is chosen for it, and what it will take.

    The network is the recipe's own, or else the first smaller one of `NETWORKS` that trains enough in time: `LEAST`
    epochs and `STEPS` steps.

    Args:
        recipe: What is to be trained.
        sets: The images.
        device: Where to train.
        seconds: How long training may take.
        fixed: Keys that the user has set, and that stay as they are.
        before: What its teacher takes, if it has one: a student's step holds the teacher's forward pass, too.
    """
    images = len(sets.train)
    if "data.batch_size" not in fixed:
        fitting = 2 ** math.floor(math.log2(max(1, images / BATCHES)))
        recipe = replace(recipe, data=replace(recipe.data, batch_size=min(max(fitting, SMALLEST), LARGEST)))
    own = (recipe.model.name, recipe.model.args)
    smaller = [] if "model.name" in fixed else [network for network in NETWORKS if network != own]
    for name, args in (own, *smaller):
        tried = replace(recipe, model=replace(recipe.model, name=name, args=args))
        found = estimate(tried, sets, device)
        teaching = 0.0 if before is None else before.step_seconds / 3 * found.steps
        epochs = math.floor(seconds / (found.epoch_seconds + teaching))
        least = max(LEAST, math.ceil(STEPS / found.steps))
        if epochs >= least:
            break
    if "schedule.epochs" not in fixed:
        if epochs < min(least, MOST):
            notice(f"{recipe.title}: {max(epochs, 1)} epochs fit into {clock(seconds)}; {least} are wanted")
        epochs = min(max(epochs, 1), MOST)
        tried = replace(tried, schedule=replace(tried.schedule, epochs=epochs))
    return tried, found


def with_choices_of(recipe: Recipe, other: Recipe) -> Recipe:
    """The recipe with what was chosen for `other`."""
    return replace(
        recipe,
        data=replace(recipe.data, batch_size=other.data.batch_size),
        schedule=replace(recipe.schedule, epochs=other.schedule.epochs),
        model=replace(recipe.model, name=other.model.name, args=other.model.args),
    )
