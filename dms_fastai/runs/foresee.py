"""What a command is going to train: the data, and for each stage its network, its steps and its time."""

from collections.abc import Iterable

import torch
from rich.box import SIMPLE_HEAD
from rich.table import Table

from ..clock import clock
from ..data import Sets
from .estimate import estimate
from .plan import Opened, Stage

__all__ = ["foreseen"]

STAGE, NETWORK = 13, 20  # letters of a stage's title and of a network's name in a line


def foreseen(
    stages: Iterable[Stage], opened: Opened, device: torch.device, restart: bool = False
) -> tuple[list[str], Table]:
    """Lines about the data sets, and a table of the stages, with times that are measured by a few steps of each recipe.

    With `restart`, finished stages are to be trained again.
    """
    said: dict[int, str] = {}
    table = Table("stage", "network", box=SIMPLE_HEAD)
    stages = list(stages)
    table.columns[0].max_width, table.columns[1].overflow = STAGE, "fold"
    table.columns[1].min_width = min(NETWORK, max(len(stage.recipe.model.name) for stage in stages))
    for name in ("parameters", "MACs", "batch", "steps/\nepoch", "epochs", "time"):
        table.add_column(name, justify="right", no_wrap=True)
    table.padding, table.show_edge = 0, False
    total, steps, measured = 0.0, {}, {}
    planned = {str(stage.folder.path) for stage in stages if restart or not stage.folder.finished}
    for stage in stages:
        recipe, sets = stage.recipe, opened.sets(stage.recipe)
        if id(sets.train) not in said or sets.unlabelled is not None:
            said[id(sets.train)] = _described(sets)
        if stage.folder.finished and not restart:
            table.add_row(recipe.title, recipe.model.name, "", "", "", "", "", "finished")
            continue
        if recipe.name not in measured:  # once for all seeds
            there = None if stage.teacher is None or str(stage.teacher) in planned else opened.teacher(stage.teacher)
            measured[recipe.name] = estimate(recipe, sets, device, there)
        found = measured[recipe.name]
        teaching = steps.get(str(stage.teacher), 0.0) / 3 * found.steps
        seconds = recipe.schedule.epochs * (found.epoch_seconds + teaching)
        steps[str(stage.folder.path)], total = found.step_seconds, total + seconds
        size = (f"{found.parameters:,}", amount(found.macs), str(recipe.data.batch_size), str(found.steps))
        table.add_row(recipe.title, recipe.model.name, *size, str(recipe.schedule.epochs), clock(seconds))
    last = f"{clock(total)} in all on {device.type}, with checkpoints and exports a little more"
    return [*dict.fromkeys(said.values()), last], table


def amount(macs: int) -> str:
    """A number of multiply-accumulates in a few letters: 798.7 M, 1.18 G."""
    return f"{macs / 1e9:.2f} G" if macs >= 1e9 else f"{macs / 1e6:.1f} M"


def _described(sets: Sets) -> str:
    train, valid = sets.train, sets.valid
    counts, without = train.counts.tolist(), len(train) - train.labelled + len(sets.unlabelled or ())
    each = f"{min(counts):,}" if min(counts) == max(counts) else f"{min(counts):,} to {max(counts):,}"
    there = f"{train.labelled:,} training images of {len(counts)} classes, {each} of each"
    if not train.labelled:
        there = f"{without:,} training images without labels, for the teacher's {len(counts)} classes"
    elif without:
        there += f", and {without:,} without labels, for distillation alone"
    split = f"{valid.split}, agreement with the teacher" if sets.agreement else valid.split
    return f"{train.name}: {there}; {len(valid):,} to validate on ({split}); {sets.size}x{sets.size} pixels"
