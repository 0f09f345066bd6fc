"""Microseconds that a Learner adds to a step of a bare loop that does the same: MixUp, a teacher, the loss, SGD.

    python -m benchmarks.host_overhead [--steps 100] [--rounds 40]

Student and teacher have two layers each, and batches are small, so that little but Python takes time. "bare": a torch
loop. "stock fastai": a Learner with fastai's MixUp, SGD, accuracy, recorder and progress bar, and a plain callback for
the teacher. "stock fastai, fused SGD": the same with torch's optimiser. "ours": `dms_learner` with the recipe `kd`,
accuracy in training too, recorder, schedule and progress display. One thread and float32 for all, and all batches come
from the same loader.
"""

import contextlib
import io
import tempfile
from functools import partial
from pathlib import Path

import torch
from fastai.callback.progress import ProgressCallback
from fastai.data.core import DataLoaders
from fastai.optimizer import OptimWrapper
from fastcore.basics import noop
from rich.console import Console
from torch import nn
from torch.distributions import Beta

from benchmarks.common import Stopwatch, arguments, difference, in_turn, random_images, summary, write
from benchmarks.rivals import ALPHA, LR, MOMENTUM, WEIGHT_DECAY, LapCallback, T, stock_learner
from dms_fastai import DMSLoss, dms_learner
from dms_fastai.runs.history import History
from dms_fastai.runs.progress import RichProgress

SKIP = 20


class TwoLayers(nn.Module):
    """As little work as a network can have."""

    num_classes = 10

    def __init__(self):
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 4, 3, stride=4), nn.Linear(4, self.num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.conv(x).mean((2, 3)))


def main() -> None:
    parser = arguments(__doc__, rounds=40)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--size", type=int, default=8)
    parser.add_argument("--steps", type=int, default=100)
    args = parser.parse_args()
    torch.set_num_threads(args.threads or 1)
    dls = random_images((SKIP + args.steps) * args.batch_size, args.batch_size, args.size, args.device)

    def contender(train) -> float:
        torch.manual_seed(0)
        student, teacher = (TwoLayers().to(args.device) for _ in range(2))
        stopwatch = Stopwatch(args.device, SKIP, args.steps)
        with contextlib.redirect_stdout(io.StringIO()):
            train(dls, student, teacher.eval().requires_grad_(False), stopwatch)
        return stopwatch.seconds

    fused = partial(stock_fastai, opt_func=fused_sgd)
    ways = {"bare": bare, "stock fastai": stock_fastai, "stock fastai, fused SGD": fused, "ours": ours}
    seconds = in_turn({name: partial(contender, way) for name, way in ways.items()}, args.rounds)
    microseconds = {name: [1e6 * s / args.steps for s in values] for name, values in seconds.items()}
    figures = summary(microseconds, "µs a step", "what a step costs", difference)
    shape = {"batch_size": args.batch_size, "size": args.size, "steps": args.steps}
    write("host_overhead", {"unit": "µs a step", **shape, "n": args.rounds, "figures": figures}, args.device, args.out)


def bare(dls: DataLoaders, student: nn.Module, teacher: nn.Module, stopwatch: Stopwatch) -> None:
    loader, device = dls.train, stopwatch.device
    sgd = torch.optim.SGD(student.parameters(), LR, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY, fused=True)
    loss_func, beta = DMSLoss(ALPHA, T), Beta(torch.ones((), device=device), torch.ones((), device=device))
    student.train()
    for index in torch.randperm(loader.n, device=device).split(loader.bs):
        x, y_a = loader.load_batch(index)
        lam, shuffle = beta.sample(), torch.randperm(len(x), device=device)
        x, y_b = torch.lerp(x[shuffle], x, lam), y_a[shuffle]
        with torch.no_grad():
            logits = teacher(x)
        loss_func(student(x), y_a, y_b, lam, logits).backward()
        sgd.step()
        sgd.zero_grad()
        if stopwatch.lap():
            return


def stock_fastai(dls: DataLoaders, student: nn.Module, teacher: nn.Module, stopwatch: Stopwatch, opt_func=None) -> None:
    learn = stock_learner(dls, student, teacher, mixup=True)
    if opt_func is not None:
        learn.opt_func = opt_func
    learn.fit_one_cycle(1, LR, cbs=LapCallback(stopwatch))


def fused_sgd(params, lr: float) -> OptimWrapper:
    return OptimWrapper(params, torch.optim.SGD, lr=lr, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY, fused=True)


def ours(dls: DataLoaders, student: nn.Module, teacher: nn.Module, stopwatch: Stopwatch) -> None:
    settings = {"bf16": False, "compile": False, "schedule.name": "one-cycle"}
    learn = dms_learner(dls, "kd", teacher=teacher, arch="test_dmsresnet", settings=settings)
    learn.model = student
    learn.remove_cb(ProgressCallback)
    learn.logger = noop
    console = Console(file=io.StringIO(), force_terminal=True)
    with tempfile.TemporaryDirectory() as folder:
        history = History(Path(folder) / "metrics.csv")
        with RichProgress("kd", history, console) as progress:
            learn.fit_recipe(1, cbs=[history, progress, LapCallback(stopwatch)])


if __name__ == "__main__":
    main()
