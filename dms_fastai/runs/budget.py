"""Batch size, epochs and network that fit the data, the device and the time that there is."""

import math
from collections.abc import Collection
from dataclasses import replace
from typing import Any

import torch

from ..clock import clock
from ..data import Sets
from ..errors import UserError, notice
from ..recipes import Recipe
from ..trained import Teacher
from ..training.budget import Budget
from .estimate import Estimate, estimate
from .machine import is_out_of_memory

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
    recipe: Recipe,
    sets: Sets,
    device: torch.device,
    seconds: float,
    given: Collection[str],
    before: Estimate | Teacher | None = None,
) -> tuple[Recipe, Estimate]:
    """The recipe with what is chosen for it, and what it will take.

    The network is the recipe's own, or else the first smaller one of `NETWORKS` that trains enough in time: `LEAST`
    epochs and `STEPS` steps. If none does, it is the fastest.

    Args:
        recipe: What is to be trained.
        sets: The images.
        device: Where to train.
        seconds: How long training may take.
        given: Keys that the user has set, and that stay as they are.
        before: Its teacher, if it is there, or what the teacher takes that is to be trained before: a student's step
            holds the teacher's forward pass, too.

    Raises:
        UserError: There is too little memory even for the smallest network.
    """
    images = len(sets.train) + len(sets.unlabelled or ())
    if "data.batch_size" not in given:
        fitting = 2 ** math.floor(math.log2(max(1, images / BATCHES)))
        recipe = replace(recipe, data=replace(recipe.data, batch_size=min(max(fitting, SMALLEST), LARGEST)))
    later = before.forward_seconds if isinstance(before, Estimate) else 0.0
    found: list[tuple[float, Recipe, Estimate]] = []  # first the seconds of an epoch
    for name, args in _networks(recipe, given):
        tried = replace(recipe, model=replace(recipe.model, name=name, args=args))
        try:
            took = estimate(tried, sets, device, before if isinstance(before, Teacher) else None)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            continue
        found.append((took.seconds(1, later=later), tried, took))
        if seconds / found[-1][0] >= _least(took):
            break
    else:
        if not found:
            raise UserError(f"batches of {recipe.data.batch_size} images do not fit into memory; try smaller ones")
        found.sort(key=lambda each: each[0])
        found = found[:1]
    epoch, chosen, took = found[-1]
    epochs = took.epochs_in(seconds, recipe.fixed_views and recipe.fixed_views.count, later)
    if "schedule.epochs" not in given:
        if epochs < min(_least(took), MOST):
            few = f"only {epochs} epochs fit into {clock(seconds)}"
            notice(f"{recipe.title}: {few}, and {_least(took)} or more are recommended")
        chosen = replace(chosen, schedule=replace(chosen.schedule, epochs=min(epochs, MOST)))
    elif chosen.schedule.epochs > epochs:
        notice(f"{recipe.title}: {epochs} epochs fit into {clock(seconds)}, and {chosen.schedule.epochs} are asked for")
    notice(
        f"{recipe.title}: fitted to {clock(seconds)}: {chosen.model.name} with {took.parameters:,} parameters, batches "
        f"of {chosen.data.batch_size}, {chosen.schedule.epochs} epochs of {epoch:.1f} s"
    )
    return replace(chosen, budget=replace(recipe.budget or Budget(seconds / 60), fitted=True)), took


def _least(took: Estimate) -> int:
    """How many epochs a network should train for."""
    return max(LEAST, math.ceil(STEPS / took.steps))


def _networks(recipe: Recipe, given: Collection[str]) -> list[tuple[str, dict[str, Any] | None]]:
    """The recipe's own network, and what may be trained in its place, from large to small."""
    own = (recipe.model.name, recipe.model.args)
    if recipe.model.weights is not None or any(key.startswith("model.") for key in given):
        return [own]
    return [own, *NETWORKS[NETWORKS.index(own) + 1 if own in NETWORKS else 0 :]]


def with_choices_of(recipe: Recipe, other: Recipe, given: Collection[str]) -> Recipe:
    """The recipe with what was chosen for `other`, but for the keys that are given."""
    model, schedule, data = recipe.model, recipe.schedule, recipe.data
    if not any(key.startswith("model.") for key in given):
        model = replace(model, name=other.model.name, args=other.model.args)
    if "schedule.epochs" not in given:
        schedule = replace(schedule, epochs=other.schedule.epochs)
    if "data.batch_size" not in given:
        data = replace(data, batch_size=other.data.batch_size)
    budget = None if recipe.budget is None else replace(recipe.budget, fitted=True)
    return replace(recipe, model=model, schedule=schedule, data=data, budget=budget)
