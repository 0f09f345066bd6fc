"""What more processes cost on this machine, and what they would give on GPUs that are not here.

    python -m benchmarks.scale [--rounds 3] [--processes 2] [--arch dmsresnet_small] [--threads 2]

Measured: `se` in one process, and in several that torchrun starts, at the same batch and on the same cores; the share
of a step that making the whole batch takes, which every process does; and the bytes that go through this machine's
loopback, on Linux. Each contender is a whole command, with the speed of its last epoch.

Calculated: images a second of `dmsresnet` on 1, 8 and 64 H100s, at batches of 1,024 and 8,192. Nothing of this has run
on such a GPU. The assumptions are `H100`; printed with the table.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
import timm
import torch
from rich.console import Console
from rich.table import Table

import dms_fastai  # noqa: F401  (registers the architectures)
from benchmarks.common import arguments, in_turn, random_images, summary, write
from dms_fastai.models.macs import macs
from dms_fastai.run_folder import RunFolder

EPOCHS = 2  # the first one is for kernels and memory
BYTES = 4  # of a gradient
GPUS, BATCHES = (1, 8, 64), (1024, 8192)
LOOPBACK = Path("/proc/net/dev")


@dataclass(frozen=True)
class Machine:
    """What a step's time is calculated from.

    Attributes:
        flops: Floating-point operations a second that a GPU does in bf16.
        used: Share of these that a network reaches. Its layers are small: most wait for memory.
        node: GPUs that share a fast link.
        link: Bytes a second of that link, each GPU's, in one direction.
        network: The same between nodes.
        latency: Seconds of a message from one GPU to the next.
        host: Seconds that Python needs to start a step's kernels. A step takes at least as long.
        per_image: Seconds in which a GPU makes an image of the batch. Every process makes the whole batch.
    """

    flops: float
    used: float
    node: int
    link: float
    network: float
    latency: float
    host: float
    per_image: float

    def step(self, flop: float, parameters: int, batch: int, gpus: int) -> float:
        """Seconds of a training step.

        The gradients go round a ring when the backward pass is over: of 19 MB, torch's first message is one megabyte,
        and the rest is the second, which waits for the last layer.

        Args:
            flop: Floating-point operations of an image, forward and backward.
            parameters: Of the network.
            batch: Images in a step, of all GPUs.
            gpus: How many.
        """
        compute = flop * batch / gpus / (self.flops * self.used)
        made = self.per_image * batch
        speed = self.link if gpus <= self.node else self.network
        ring = 2 * (gpus - 1) * (BYTES * parameters / gpus / speed + self.latency)
        return max(compute + made, self.host) + ring


# The figures of the data sheet for flops and links; the rest are guesses, of the order of what others report.
H100 = Machine(flops=989e12, used=0.25, node=8, link=450e9, network=50e9, latency=5e-6, host=2e-3, per_image=2e-8)


@dataclass(frozen=True)
class Measured:
    """A training by some processes: images a second, and bytes that went through the loopback in a step, if known."""

    images_s: float
    bytes_a_step: float | None


def main() -> None:
    parser = arguments(__doc__, rounds=3, on_device=False)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="of all processes together")
    parser.add_argument("--arch", default="dmsresnet_small")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--images", type=int, default=4096)
    parser.add_argument("--size", type=int, default=32)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "random.npz"
        random_npz(data, args.images, args.size)
        counts = {f"{n} process{'es' * (n > 1)}": n for n in (1, args.processes)}
        contenders = {name: partial(train, args, data, n) for name, n in counts.items()}
        taken = in_turn(contenders, args.rounds, rehearse=False)
    figures = {name: [each.images_s for each in measured] for name, measured in taken.items()}
    rows = summary(figures, "images/s", f"{args.arch}, batch {args.batch_size}, {args.threads} threads in all")
    console, sent = Console(), taken[list(counts)[-1]][0].bytes_a_step
    parameters = sum(p.numel() for p in timm.create_model(args.arch).parameters())
    if sent is not None:
        said = f"sent in a step: {sent / 1e6:,.1f} MB, of gradients of {BYTES * parameters / 1e6:,.1f} MB"
        console.print(said, highlight=False)
    made = seconds_of_a_batch(args.batch_size, args.size)
    console.print(f"the whole batch is made in {1e3 * made:,.1f} ms on one thread", highlight=False)
    facts = {
        "arch": args.arch, "batch_size": args.batch_size, "images": args.images, "n": args.rounds,
        "unit": "images/s", "figures": rows, "bytes_a_step": sent, "milliseconds_to_make_a_batch": round(1e3 * made, 3),
        "calculated": calculated(console), "assumptions": asdict(H100),
    }  # fmt: skip
    write("scale", facts, torch.device("cpu"), args.out)


def random_npz(file: Path, images: int, size: int) -> None:
    """A data set of random pixels in ten classes."""
    random = np.random.default_rng(0)
    arrays = {}
    for split, n in (("train", images), ("test", 128)):
        arrays[f"{split}_images"] = random.integers(0, 256, (n, size, size, 3), dtype=np.uint8)
        arrays[f"{split}_labels"] = np.arange(n) % 10
    np.savez(file, **arrays)


def train(args: argparse.Namespace, data: Path, processes: int) -> Measured:
    """Train for two epochs by whole commands; gives what the last one did."""
    python = [sys.executable, "-m", "dms_fastai"]
    if processes > 1:
        python = [
            sys.executable, "-m", "torch.distributed.run", "--standalone",
            "--nproc-per-node", str(processes), "-m", "dms_fastai",
        ]  # fmt: skip
    with tempfile.TemporaryDirectory() as out:
        command = [
            *python, "run", "se", "--arch", args.arch, "--data", str(data), "--epochs", str(EPOCHS), "--out", out,
            "--device", "cpu", "--set", f"data.batch_size={args.batch_size}",
        ]  # fmt: skip
        environment = os.environ | {"OMP_NUM_THREADS": str(max(args.threads // processes, 1))}
        before = loopback()
        subprocess.run(command, check=True, capture_output=True, env=environment)
        after = loopback()
        [file] = Path(out).rglob("metrics.csv")
        last = RunFolder(file.parent).rows()[-1]
    steps = EPOCHS * (args.images // args.batch_size)
    sent = None if before is None or processes == 1 else (after - before) / steps
    return Measured(last["images_per_second"], sent)


def loopback() -> int | None:
    """Bytes that this machine has sent to itself; None where that is not told."""
    if not LOOPBACK.is_file():
        return None
    [line] = [line for line in LOOPBACK.read_text().splitlines() if line.strip().startswith("lo:")]
    return int(line.split(":")[1].split()[0])


def seconds_of_a_batch(batch_size: int, size: int) -> float:
    """Seconds in which one thread makes a training batch: the fastest of ten."""
    torch.set_num_threads(1)
    taken = []
    loader = random_images(10 * batch_size, batch_size, size, torch.device("cpu")).train
    began = time.perf_counter()
    for _ in loader:
        taken.append(time.perf_counter() - began)
        began = time.perf_counter()
    return min(taken)


def calculated(console: Console) -> list[dict[str, float]]:
    """Print and give what `H100`s would do."""
    model = timm.create_model("dmsresnet")
    parameters, flop = sum(p.numel() for p in model.parameters()), 6 * macs(model, (3, 32, 32))
    table = Table("GPUs", "batch", "ms a step", "images/s", "seconds an epoch", "of the ideal, %", title_justify="left")
    table.title = "dmsresnet on H100s, calculated: nothing of this has run"
    rows = []
    for batch in BATCHES:
        alone = batch / H100.step(flop, parameters, batch, 1)
        for gpus in GPUS:
            step = H100.step(flop, parameters, batch, gpus)
            speed = batch / step
            row = {"gpus": gpus, "batch": batch, "milliseconds_a_step": round(1e3 * step, 3), "images_s": round(speed)}
            row |= {"epoch_seconds": round(50_000 / speed, 3), "efficiency": round(speed / (alone * gpus), 3)}
            rows.append(row)
            table.add_row(
                str(gpus), f"{batch:,}", f"{1e3 * step:.2f}", f"{speed:,.0f}", f"{50_000 / speed:.2f}",
                f"{100 * row['efficiency']:.0f}",
            )  # fmt: skip
    console.print(table)
    for name, value in asdict(H100).items():
        console.print(f"assumed {name}: {value:g}", highlight=False)
    return rows


if __name__ == "__main__":
    main()
