"""What a command is going to train: the data, and for each stage its network, its steps and its time."""

from collections.abc import Iterable

import torch
from rich.box import SIMPLE_HEAD
from rich.table import Table

from ..clock import clock
from ..data import Sets
from .estimate import estimate, held
from .images import size_of_weights
from .plan import Opened, Stage

__all__ = ["foreseen"]

STAGE, NETWORK = 13, 20  # letters of a stage's title and of a network's name in a line


def foreseen(
    stages: Iterable[Stage], opened: Opened, device: torch.device, restart: bool = False
) -> tuple[list[str], Table]:
    """Lines about the data sets, and a table of the stages, with times that are measured by a few steps of each recipe.

    With `restart`, finished stages are to be trained again.
    """
    said: dict[int | str, str] = {}  # by set of images, or by recipe
    table = Table("stage", "network", box=SIMPLE_HEAD)
    stages = list(stages)
    table.columns[0].max_width, table.columns[1].overflow = STAGE, "fold"
    table.columns[1].min_width = min(NETWORK, max(len(stage.recipe.model.name) for stage in stages))
    for name in ("parameters", "MACs", "batch", "steps/\nepoch", "epochs", "time"):
        table.add_column(name, justify="right", no_wrap=True)
    table.padding, table.show_edge = 0, False
    total, measured = 0.0, {}
    trained: dict[str, tuple[float, int]] = {}  # of each stage: seconds of a forward pass, and the size of its images
    planned = {str(stage.folder.path) for stage in stages if restart or not stage.folder.finished}
    for stage in stages:
        recipe, finished = stage.recipe, stage.folder.finished and not restart
        teacher = None if finished or str(stage.teacher) in planned else opened.teacher_of(stage)
        sets = opened.sets(recipe, teacher)
        plain = sets.plain or sets
        if id(plain.train) not in said or sets.unlabelled is not None:
            said[id(plain.train)] = _described(sets, size_of_weights(recipe, opened.data) and recipe.model.name)
        if line := held(recipe, sets, device):
            said[id(sets.train)] = line
        if finished:
            table.add_row(recipe.title, recipe.model.name, "", "", "", "", "", "finished")
            continue
        if recipe.name not in measured:  # once for all seeds
            measured[recipe.name] = estimate(recipe, sets, device, teacher)
        found = measured[recipe.name]
        sizes, teaching, later = [], found.teacher_seconds, 0.0
        if teacher is not None:
            sizes = [size or (sets.size, sets.size) for size in teacher.sizes]
        elif str(stage.teacher) in trained:  # by then; it is not in what was measured
            forward, own = trained[str(stage.teacher)]
            sees = recipe.distill.size or own
            sizes, later = [(sees, sees)], forward * (sees / own) ** 2
            teaching = later
        epochs, step = recipe.schedule.epochs, found.step_seconds + later
        seconds = found.seconds(epochs, recipe.fixed_views and recipe.fixed_views.count, later)
        trained[str(stage.folder.path)], total = (found.forward_seconds, sets.size), total + seconds
        if sizes:
            at = " and ".join(dict.fromkeys(f"{height}x{width}" for height, width in sizes))
            said[recipe.name] = f"{recipe.title}: teacher at {at}, {teaching / step:.0%} of the time of a step"
        size = (f"{found.parameters:,}", amount(found.macs), str(recipe.data.batch_size), str(found.steps))
        table.add_row(recipe.title, recipe.model.name, *size, str(epochs), clock(seconds))
    last = f"{clock(total)} in all on {device.type}, with checkpoints and exports a little more"
    return [*dict.fromkeys(said.values()), last], table


def amount(macs: int) -> str:
    """A number of multiply-accumulates in a few letters: 798.7 M, 1.18 G."""
    return f"{macs / 1e9:.2f} G" if macs >= 1e9 else f"{macs / 1e6:.1f} M"


def _described(sets: Sets, like: str | None) -> str:
    """A line about the images; `like` is the network whose weights have brought their size along, if some have."""
    train, valid = sets.train, sets.valid
    counts, without = train.counts.tolist(), len(train) - train.labelled + len(sets.unlabelled or ())
    each = f"{min(counts):,}" if min(counts) == max(counts) else f"{min(counts):,} to {max(counts):,}"
    there = f"{train.labelled:,} training images of {len(counts)} classes, {each} of each"
    if not train.labelled:
        there = f"{without:,} training images without labels, for the teacher's {len(counts)} classes"
    elif without:
        there += f", and {without:,} without labels, for distillation alone"
    split = f"{valid.split}, agreement with the teacher" if sets.agreement else valid.split
    why = f", as the weights of {like} expect" if like else ""
    return f"{train.name}: {there}; {len(valid):,} to validate on ({split}); {sets.size}x{sets.size} pixels{why}"
