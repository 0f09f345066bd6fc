"""Is accuracy paid for speed? The same recipe in bf16 and in float32, seed by seed.

    python -m benchmarks.precision [--data digits] [--recipe se] [--arch NAME] [--pictures N] [--epochs N] [--seeds 5]

Accuracy after the last epoch on all test pictures, and seconds of the fit. Where the processor has no bf16 both are the
same.
"""

import statistics
from pathlib import Path

import torch
from fastai.callback.progress import ProgressCallback
from fastai.data.core import DataLoaders
from fastcore.basics import noop
from rich.console import Console
from rich.table import Table

from benchmarks.common import arguments, now, write
from dms_fastai import dms_learner, load_data, load_recipe
from dms_fastai.callbacks.precision import has_bf16
from dms_fastai.data import source_name

PRECISIONS = {"bf16": "auto", "float32": "float32"}


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--data", default="digits")
    parser.add_argument("--recipe", default="se")
    parser.add_argument("--teacher", default=None, help="for recipes that distil: a run's folder or a file")
    parser.add_argument("--arch", default=None)
    parser.add_argument("--pictures", type=int, default=None, help="train on so many, drawn once; all otherwise")
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
        for column, precision in PRECISIONS.items():
            recipe = load_recipe(args.recipe, source_name(args.data), args.arch, {**settings, "precision": precision})
            dls = loaders(args.data, recipe, args.pictures, args.device)
            torch.manual_seed(seed)
            learn = dms_learner(dls, recipe, teacher=args.teacher)
            learn.remove_cb(ProgressCallback)
            learn.logger = noop
            began = now(args.device)
            learn.fit_recipe()
            seconds[column].append(now(args.device) - began)
            accuracy[column].append(100 * learn.recorder.values[-1][-1])

    what = f"{recipe.title}, {recipe.model.name}, {recipe.schedule.epochs} epochs of {len(dls.train_ds):,} pictures"
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
        "training_pictures": len(dls.train_ds),
        "test_pictures": len(dls.valid_ds),
        "n": args.seeds,
        "accuracy": {name: [round(value, 2) for value in values] for name, values in accuracy.items()},
        "seconds": {name: [round(value, 1) for value in values] for name, values in seconds.items()},
    }
    write(f"precision-{name}-{recipe.name}", facts, args.device, args.out)


def loaders(data: str, recipe, pictures: int | None, device: torch.device) -> DataLoaders:
    """The recipe's loaders, over a part of the training pictures where `pictures` says so."""
    augment = recipe.augment
    own = {"pad": augment.pad, "flip": augment.flip, "border": augment.border, "alternate": augment.alternate}
    dls = load_data(data, recipe.data.batch_size, recipe.data.size, device=device, **own)
    if pictures is None:
        return dls
    chosen = torch.randperm(len(dls.train_ds), generator=torch.Generator().manual_seed(0))[:pictures]
    return DataLoaders(dls.train.new(dls.train_ds.subset(chosen)), dls.valid, device=device)


if __name__ == "__main__":
    main()
