"""Does the speed of bf16 cost accuracy? The same recipe in bf16 and in float32, seed by seed.

    python -m benchmarks.precision [--data digits] [--recipe se] [--arch NAME] [--images N] [--epochs N] [--seeds 5]

Accuracy after the last epoch on all test images, and seconds of the fit. If the hardware has no bf16, both are float32.
"""

import statistics
from dataclasses import replace
from pathlib import Path

import torch
from fastai.callback.progress import ProgressCallback
from fastai.data.core import DataLoaders
from fastcore.basics import noop
from rich.console import Console
from rich.table import Table

from benchmarks.common import arguments, now, write
from dms_fastai import Recipe, dms_learner, load_recipe
from dms_fastai.callbacks.bf16 import has_bf16
from dms_fastai.names import source_name

PRECISIONS = {"bf16": True, "float32": False}


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--data", default="digits")
    parser.add_argument("--recipe", default="se")
    parser.add_argument("--teacher", default=None, help="for recipes that distil: a run's folder or a file")
    parser.add_argument("--arch", default=None)
    parser.add_argument("--images", type=int, default=None, help="how many training images, drawn once; all by default")
    parser.add_argument("--epochs", type=int, default=None)
    parser.add_argument("--seeds", type=int, default=5)
    args = parser.parse_args()
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    if not has_bf16(args.device):
        Console().print("no bf16 in this hardware: both columns are float32")

    settings = {"schedule.name": "one-cycle"}
    settings |= {"schedule.epochs": args.epochs} if args.epochs else {}
    accuracy: dict[str, list[float]] = {name: [] for name in PRECISIONS}
    seconds: dict[str, list[float]] = {name: [] for name in PRECISIONS}
    for seed in range(args.seeds):
        for column, bf16 in PRECISIONS.items():
            recipe = load_recipe(args.recipe, source_name(args.data), args.arch, {**settings, "bf16": bf16})
            dls = loaders(args.data, recipe, args.images, args.device)
            torch.manual_seed(seed)
            learn = dms_learner(dls, recipe, teacher=args.teacher)
            learn.remove_cb(ProgressCallback)
            learn.logger = noop
            began = now(args.device)
            learn.fit_recipe()
            seconds[column].append(now(args.device) - began)
            accuracy[column].append(100 * learn.recorder.values[-1][-1])

    what = f"{recipe.title}, {recipe.model.name}, {recipe.schedule.epochs} epochs of {len(dls.train_ds):,} images"
    name = dls.train_ds.name or Path(args.data).stem
    table = Table("seed", *PRECISIONS, "difference", title=f"{name}: {what}", title_justify="left")
    differences = [a - b for a, b in zip(*accuracy.values(), strict=True)]
    for seed, row in enumerate(zip(*accuracy.values(), differences, strict=True)):
        table.add_row(str(seed), *(f"{value:.2f} %" for value in row[:-1]), f"{row[-1]:+.2f}")
    summaries = {"mean": statistics.mean} | ({"standard deviation": statistics.stdev} if args.seeds > 1 else {})
    for label, function in summaries.items():
        values = [function(v) for v in (*accuracy.values(), differences)]
        table.add_row(label, *(f"{value:.2f} %" for value in values[:-1]), f"{values[-1]:+.2f}")
    table.add_row("seconds, median", *(f"{statistics.median(v):.1f}" for v in seconds.values()), "")
    Console().print(table)
    facts = {
        "data": name,
        "recipe": recipe.name,
        "model": recipe.model.name,
        "epochs": recipe.schedule.epochs,
        "training_images": len(dls.train_ds),
        "test_images": len(dls.valid_ds),
        "n": args.seeds,
        "accuracy": {name: [round(value, 2) for value in values] for name, values in accuracy.items()},
        "seconds": {name: [round(value, 1) for value in values] for name, values in seconds.items()},
    }
    write(f"precision-{name}-{recipe.name}", facts, args.device, args.out)


def loaders(data: str, recipe: Recipe, images: int | None, device: torch.device) -> DataLoaders:
    """The recipe's loaders, over a part of the training images where `images` says so."""
    sets = recipe.data.build().open(data)
    if images is not None:
        chosen = torch.randperm(len(sets.train), generator=torch.Generator().manual_seed(0))[:images]
        sets = replace(sets, train=sets.train.subset(chosen))
    return sets.loaders(recipe.data.batch_size, recipe.augment.build(), device=device, balance=recipe.data.balance)


if __name__ == "__main__":
    main()
