"""Seconds of a training epoch of 50,000 images, in a fastai Learner, by recipe and batch size.

    python -m benchmarks.epoch [--recipes se kd] [--batch-sizes 128 512] [--images 50000] [--epochs 5]

`dms_learner` as it comes, with random pixels and, for `kd`, a random teacher; on a GPU compiled from the first step.
The first epochs are not counted: kernels are chosen and compiled in them. With fewer images, the seconds are scaled up
to 50,000.
"""

import statistics

import timm
import torch
from fastai.callback.core import Callback
from fastai.callback.progress import ProgressCallback
from fastcore.basics import noop
from rich.console import Console
from rich.table import Table

from benchmarks.common import arguments, now, random_images, write
from dms_fastai import dms_learner

EPOCH = 50_000


class TrainingTime(Callback):
    """Keeps the seconds of each epoch's training part."""

    order = 2000

    def __init__(self, device: torch.device):
        super().__init__()
        self.device, self.seconds = device, []

    def before_train(self) -> None:
        self.began = now(self.device)

    def after_train(self) -> None:
        self.seconds.append(now(self.device) - self.began)


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--recipes", nargs="+", choices=["se", "kd"], default=["se", "kd"])
    parser.add_argument("--batch-sizes", nargs="+", type=int, default=[128, 512])
    parser.add_argument("--arch", default="dmsresnet")
    parser.add_argument("--teacher", default="dmsresnet50")
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--images", type=int, default=None, help="50,000 on a GPU, 1,024 on a CPU")
    parser.add_argument("--epochs", type=int, default=None, help="counted epochs; 5 on a GPU, 2 on a CPU")
    args = parser.parse_args()
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    on_gpu = args.device.type != "cpu"
    images, epochs = args.images or (EPOCH if on_gpu else 1024), args.epochs or (5 if on_gpu else 2)
    skipped = 2 if on_gpu else 1

    table = Table("recipe", "batch", "ms a step", "images/s", "seconds an epoch", title=args.arch, title_justify="left")
    rows = []
    for batch_size in args.batch_sizes:
        for recipe in args.recipes:
            torch.manual_seed(0)
            learn = dms_learner(
                random_images(images, batch_size, args.size, args.device),
                recipe,
                teacher=timm.create_model(args.teacher) if recipe == "kd" else None,
                arch=args.arch,
                settings={"compile.steps": 0},
            )
            learn.remove_cb(ProgressCallback)
            learn.logger = noop
            clock = TrainingTime(args.device)
            learn.fit_recipe(skipped + epochs, cbs=clock)
            steps = len(learn.dls.train)
            step = statistics.median(clock.seconds[skipped:]) / steps
            row = {"recipe": recipe, "batch_size": batch_size, "milliseconds_a_step": round(1e3 * step, 3)}
            row |= {"images_s": round(batch_size / step), "epoch_seconds": round(EPOCH // batch_size * step, 3)}
            row |= {"all_seconds": [round(s, 3) for s in clock.seconds]}
            rows.append(row)
            table.add_row(recipe, *(f"{row[key]:,}" for key in list(row)[1:-1]))
    Console().print(table)
    facts = {"arch": args.arch, "teacher": args.teacher, "size": args.size, "images": images}
    write("epoch", {**facts, "skipped_epochs": skipped, "n": epochs, "rows": rows}, args.device, args.out)


if __name__ == "__main__":
    main()
