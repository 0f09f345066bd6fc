"""Seconds of a training epoch of 50,000 images, in a fastai Learner, by recipe and batch size.

    python -m benchmarks.epoch [--recipes se kd] [--batch-sizes 128 512] [--runs compiled eager] [--images 50000]
                               [--epochs 5]

`dms_learner` as it comes, with random pixels and, where a recipe distils, a random teacher; on a GPU, compiled from the
first step, too. The first epochs are not counted: kernels are chosen and compiled in them. With fewer images, the
seconds are scaled up to 50,000. On a GPU, ten steps more are traced, for how long it computes in each.
"""

import argparse
import statistics
from itertools import product

import timm
import torch
from fastai.callback.core import Callback
from fastai.callback.progress import ProgressCallback
from fastai.data.core import DataLoaders
from fastcore.basics import noop
from rich.console import Console
from rich.table import Table
from torch.profiler import ProfilerActivity, profile

from benchmarks.common import arguments, now, random_images, write
from dms_fastai import DMSLearner, dms_learner, load_recipe
from dms_fastai.runs.profile import busy_milliseconds

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


class Trace(Callback):
    """Traces ten steps of the last epoch's: how long the GPU computes in each, in milliseconds."""

    order = 2000
    steps = range(5, 15)

    def after_batch(self) -> None:
        if self.learn.epoch + 1 < self.learn.n_epoch or not self.learn.training:
            return
        if self.learn.iter == self.steps.start:
            torch.cuda.synchronize()
            self.profiler = profile(activities=[ProfilerActivity.CUDA], acc_events=True)
            self.profiler.start()
        elif self.learn.iter == self.steps.stop:
            torch.cuda.synchronize()
            self.profiler.stop()
            self.milliseconds = busy_milliseconds(self.profiler.key_averages()) / len(self.steps)


def learner(recipe: str, dls: DataLoaders, args: argparse.Namespace, compiled: bool) -> DMSLearner:
    """A Learner of a recipe, with a random teacher where it distils; its images do not change their size."""
    torch.manual_seed(0)
    settings = {"compile.steps": 0} if compiled else {"compile": False}
    settings |= {"progressive_resize": False} if load_recipe(recipe).progressive_resize else {}
    teacher = timm.create_model(args.teacher) if load_recipe(recipe).distill else None
    arch = None if recipe.endswith("teacher") else args.arch
    learn = dms_learner(dls, recipe, teacher=teacher, arch=arch, settings=settings)
    learn.remove_cb(ProgressCallback)
    learn.logger = noop
    return learn


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--recipes", nargs="+", default=["se", "kd"], help="se kd teacher fast ...")
    parser.add_argument("--batch-sizes", nargs="+", type=int, default=[128, 512])
    parser.add_argument("--runs", nargs="+", default=["compiled", "eager"], choices=["compiled", "eager"])
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

    columns = ["recipe", "batch", "run", "ms a step", "images/s", "seconds an epoch", *["GPU, ms a step"] * on_gpu]
    table = Table(*columns, title=args.arch, title_justify="left")
    rows = []
    for batch_size, recipe, run in product(args.batch_sizes, args.recipes, args.runs if on_gpu else ["eager"]):
        learn = learner(recipe, random_images(images, batch_size, args.size, args.device), args, run == "compiled")
        clock, trace = TrainingTime(args.device), Trace()
        learn.fit_recipe(skipped + epochs + on_gpu, cbs=[clock, *[trace] * on_gpu])
        step = statistics.median(clock.seconds[skipped : skipped + epochs]) / len(learn.dls.train)
        row = {"recipe": recipe, "batch_size": batch_size, "run": run}
        row |= {"milliseconds_a_step": round(1e3 * step, 3), "images_s": round(batch_size / step)}
        row |= {"epoch_seconds": round(EPOCH // batch_size * step, 3)}
        row |= {"gpu_busy_milliseconds": round(trace.milliseconds, 3)} if on_gpu else {}
        table.add_row(
            recipe, *(f"{value:,}" if not isinstance(value, str) else value for value in list(row.values())[1:])
        )
        rows.append(row | {"all_seconds": [round(s, 3) for s in clock.seconds]})
    Console().print(table)
    facts = {"arch": args.arch, "teacher": args.teacher, "size": args.size, "images": images}
    write("epoch", {**facts, "skipped_epochs": skipped, "n": epochs, "rows": rows}, args.device, args.out)


if __name__ == "__main__":
    main()
