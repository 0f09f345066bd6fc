"""What a checkpoint after every epoch costs: its seconds, as a share of a training epoch of 50,000 images.

    python -m benchmarks.checkpoint [--arch dmsresnet] [--batch-size 128] [--folder .]

Times complete checkpoints in the middle of a training: written, flushed, read back and renamed. Each is timed in turn
with the training steps before it.
"""

import statistics
import tempfile
from pathlib import Path

import torch
from fastai.callback.core import Callback, CancelFitException
from fastai.callback.progress import ProgressCallback
from fastcore.basics import noop
from rich.console import Console

from benchmarks.common import arguments, now, random_images, write
from dms_fastai import dms_learner
from dms_fastai.runs.checkpoint import Checkpoint
from dms_fastai.runs.history import History

EPOCH = 50_000


class CheckpointEveryFewSteps(Callback):
    """Times steps and checkpoints in turn."""

    order = 100

    def __init__(self, device: torch.device, rounds: int, steps: int):
        super().__init__()
        self.device, self.rounds, self.steps = device, rounds, steps
        self.step_seconds, self.checkpoint_seconds = [], []

    def after_batch(self) -> None:
        done = self.learn.iter + 1
        if not self.learn.training or done % self.steps:
            return
        began = now(self.device)
        if done > self.steps:  # the first ones allocate memory
            self.step_seconds.append((began - self.began) / self.steps)
            self.learn.checkpoint.save_step()
            self.checkpoint_seconds.append(now(self.device) - began)
        if len(self.checkpoint_seconds) == self.rounds:
            raise CancelFitException
        self.began = now(self.device)


def main() -> None:
    parser = arguments(__doc__, rounds=7)
    parser.add_argument("--arch", default="dmsresnet")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--steps", type=int, default=3, help="training steps between two checkpoints")
    parser.add_argument("--folder", type=Path, default=Path(), help="on the disk that is to be measured")
    args = parser.parse_args()
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    images = (args.rounds + 1) * args.steps * args.batch_size
    learn = dms_learner(random_images(images, args.batch_size, 32, args.device), "se", arch=args.arch)
    learn.remove_cb(ProgressCallback)
    learn.logger = noop
    timing = CheckpointEveryFewSteps(args.device, args.rounds, args.steps)
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        history = History(Path(folder) / "metrics.csv")
        learn.fit_recipe(1, cbs=[history, Checkpoint(Path(folder), history), timing])
        size = max(file.stat().st_size for file in Path(folder).glob("*.pt"))
    checkpoint, step = (statistics.median(v) for v in (timing.checkpoint_seconds, timing.step_seconds))
    epoch = EPOCH // args.batch_size * step
    low, high = min(timing.checkpoint_seconds), max(timing.checkpoint_seconds)
    Console().print(
        f"{args.arch}: a checkpoint of {size / 1e6:.1f} MB takes {1e3 * checkpoint:.0f} ms ({1e3 * low:.0f} to "
        f"{1e3 * high:.0f}), an epoch {epoch:.1f} s: {100 * checkpoint / epoch:.3f} % of it",
        soft_wrap=True,
    )
    facts = {
        "arch": args.arch,
        "batch_size": args.batch_size,
        "n": args.rounds,
        "megabytes": round(size / 1e6, 1),
        "checkpoint_seconds": [round(s, 4) for s in timing.checkpoint_seconds],
        "step_seconds": [round(s, 4) for s in timing.step_seconds],
        "share_of_epoch": round(checkpoint / epoch, 6),
    }
    write("checkpoint", facts, args.device, args.out)


if __name__ == "__main__":
    main()
