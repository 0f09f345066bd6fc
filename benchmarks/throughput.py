"""Images a second in training, end to end, from images on disk to updated weights: ours and other ways.

    python -m benchmarks.throughput [--recipe se|kd] [--arch cct_7_3x1] [--batch-size 128] [--steps 1] [--rounds 3]

Every way trains the same network on the same folder of images: `se` the network alone, `kd` with MixUp and a teacher.
"stock fastai": ImageDataLoaders.from_folder, float32, fastai's MixUp and a plain callback for the teacher. "authors":
torchvision transforms, float32, Lookahead, clipped gradients. "timm": a bare loop, with LogitDistillationTask and Mixup
where there is a teacher, as they come and in bf16 with channels last. "ours": `load_data` and `dms_learner` as they
come. Steps before the clock starts allocate memory, start workers and compile. The floor is the time that the
convolutions and linear layers alone need at least: for each, its multiplications at peak speed or its memory traffic at
full bandwidth, whichever is longer. Peak and bandwidth are measured here.
"""

import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import timm
import torch
from fastai.callback.progress import ProgressCallback
from fastcore.basics import noop
from PIL import Image
from rich.console import Console
from torch import nn

from benchmarks.common import Stopwatch, arguments, in_turn, now, summary, write
from benchmarks.rivals import LapCallback, authors_way, stock_fastai, timm_way
from dms_fastai import dms_learner, load_data
from dms_fastai.callbacks.bf16 import has_bf16
from dms_fastai.models.fold import fold_batch_norms

CLASSES = 10


def main() -> None:
    parser = arguments(__doc__, rounds=3)
    parser.add_argument("--recipe", choices=["se", "kd"], default="se")
    parser.add_argument("--arch", default="dmsresnet")
    parser.add_argument("--teacher", default="dmsresnet50")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--skip", type=int, default=None, help="steps before the clock starts; 1 on a CPU, else 50")
    parser.add_argument("--steps", type=int, default=None, help="timed steps; 1 on a CPU, else 100")
    args = parser.parse_args()
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    on_cpu = args.device.type == "cpu"
    skip, steps = args.skip or (1 if on_cpu else 50), args.steps or (1 if on_cpu else 100)

    peak, bandwidth = measure_peak(args.device), measure_bandwidth(args.device)
    Console().print(f"peak {peak / 1e12:.2f} TFLOP/s in bf16, memory {bandwidth / 1e9:.0f} GB/s, both measured")
    teacher = args.teacher if args.recipe == "kd" else None
    ways = {"stock fastai": stock_fastai, "authors": authors_way}
    ways |= {"timm": timm_way, "timm, bf16": partial(timm_way, bf16=True)}
    ways["ours"] = partial(ours, recipe=args.recipe)
    with tempfile.TemporaryDirectory() as temporary:
        folder = make_images(Path(temporary), args.batch_size * (skip + steps), args.size)
        contenders = {name: contender(way, folder, teacher, args, skip, steps) for name, way in ways.items()}
        seconds = in_turn(contenders, args.rounds, rehearse=False)
    rates = {name: [args.batch_size * steps / s for s in values] for name, values in seconds.items()}
    figures = summary(
        rates, "images/s", f"{args.recipe}: {args.arch}, batch {args.batch_size}, {args.size}x{args.size}"
    )

    floor = floor_seconds(args.arch, args.batch_size, args.size, peak, bandwidth, passes=3)
    if teacher:
        floor += floor_seconds(teacher, args.batch_size, args.size, peak, bandwidth, passes=1)
    ceiling = args.batch_size / floor
    share = figures["ours"]["median"] / ceiling
    Console().print(f"the floor allows {ceiling:,.0f} images/s; ours is at {100 * share:.0f} % of that")
    facts = {
        "recipe": args.recipe,
        "arch": args.arch,
        "teacher": teacher,
        "batch_size": args.batch_size,
        "size": args.size,
        "skipped_steps": skip,
        "timed_steps": steps,
        "n": args.rounds,
        "unit": "images/s",
        "figures": figures,
        "peak_tflops": round(peak / 1e12, 2),
        "bandwidth_gbs": round(bandwidth / 1e9, 1),
        "floor_images_s": round(ceiling),
        "share_of_floor": round(share, 3),
    }
    other = "" if args.arch == "dmsresnet" else f"-{args.arch}"
    write(f"throughput-{args.recipe}{other}", facts, args.device, args.out)


def contender(way: Callable, folder: Path, teacher: str | None, args, skip: int, steps: int) -> Callable[[], float]:
    """A way to train as what `in_turn` calls, with new networks each time."""

    def train() -> float:
        torch.manual_seed(0)
        stopwatch = Stopwatch(args.device, skip, steps)
        student, taught_by = (
            name and timm.create_model(name, num_classes=CLASSES, drop_rate=rate).to(args.device)
            for name, rate in ((args.arch, 0.1), (teacher, 0.0))
        )
        if taught_by is not None:
            taught_by.eval().requires_grad_(False)
        way(folder, student, taught_by, stopwatch, args.batch_size, args.size)
        return stopwatch.seconds

    return train


def ours(
    folder: Path,
    model: nn.Module,
    teacher: nn.Module | None,
    stopwatch: Stopwatch,
    batch_size: int,
    size: int,
    recipe: str,
) -> None:
    dls = load_data(folder, bs=batch_size, size=size, device=stopwatch.device)
    settings = {"compile.steps": 0}  # as for a run's thousands of steps
    learn = dms_learner(dls, recipe, teacher=teacher, settings=settings)
    learn.model = model.to(memory_format=torch.channels_last)
    learn.remove_cb(ProgressCallback)
    learn.logger = noop
    learn.fit_recipe(1, cbs=LapCallback(stopwatch))


def make_images(folder: Path, n: int, size: int) -> Path:
    """`n` random training images and a few for testing, as PNG files in a folder for each class."""
    rng = np.random.default_rng(0)
    for split, count in (("train", n), ("test", CLASSES)):
        for index in range(count):
            file = folder / split / f"class{index % CLASSES}" / f"{index}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 256, (size, size, 3), dtype=np.uint8)).save(file)
    return folder


def measure_peak(device: torch.device) -> float:
    """Floating point operations a second in a large product of matrices: bf16 where the hardware has it."""
    n = 2048 if device.type == "cpu" else 8192
    a = torch.randn(n, n, device=device, dtype=torch.bfloat16 if has_bf16(device) else torch.float32)
    return 2 * n**3 / best_of(lambda: a @ a, device)


def measure_bandwidth(device: torch.device) -> float:
    """Bytes a second, read and written, in copying more than any cache holds."""
    a = torch.zeros(2**28, dtype=torch.uint8, device=device)
    b = torch.empty_like(a)
    return 2 * a.numel() / best_of(lambda: b.copy_(a), device)


def best_of(call: Callable, device: torch.device, n: int = 5) -> float:
    call()
    seconds = []
    for _ in range(n):
        began = now(device)
        call()
        seconds.append(now(device) - began)
    return min(seconds)


def floor_seconds(arch: str, batch_size: int, size: int, peak: float, bandwidth: float, passes: int) -> float:
    """What a step's convolutions and linear layers must take in bf16: forward alone, or all three passes."""
    model = fold_batch_norms(timm.create_model(arch, num_classes=CLASSES), (3, size, size))
    total = 0.0

    def add(layer: nn.Module, inputs: tuple, output: torch.Tensor) -> None:
        nonlocal total
        weights = layer.weight.numel()
        per_output = weights / layer.weight.shape[0]  # multiplications behind each element of the output
        flops = 2 * output.numel() * per_output * batch_size
        traffic = 2 * ((inputs[0].numel() + output.numel()) * batch_size + weights)
        total += passes * max(flops / peak, traffic / bandwidth)

    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            module.register_forward_hook(add)
    with torch.no_grad():
        model(torch.zeros(1, 3, size, size))
    return total


if __name__ == "__main__":
    main()
