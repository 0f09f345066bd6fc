"""Shared by the benchmarks: contenders timed in turn in one process, a table, and a JSON that says where and when."""

import argparse
import datetime
import gc
import json
import statistics
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

import torch
from fastai.data.core import DataLoaders
from rich.console import Console
from rich.table import Table

from dms_fastai.data import BatchLoader, ImageSet
from dms_fastai.runs.machine import choose_device, device_name

ARTIFACTS = Path(__file__).parent.parent / "artifacts" / "benchmarks"
Result = TypeVar("Result")


def arguments(description: str, rounds: int | None = None, on_device: bool = True) -> argparse.ArgumentParser:
    """A parser with the options of every benchmark; if it runs `on_device`, with those for threads and device, too."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    if rounds is not None:
        parser.add_argument("--rounds", type=int, default=rounds, help="how often each contender is timed, in turn")
    if on_device:
        parser.add_argument("--threads", type=int, default=None, help="CPU threads for torch")
        parser.add_argument("--device", type=choose_device, default="auto", help="auto, cpu, cuda or mps")
    parser.add_argument("--out", type=Path, default=ARTIFACTS, help="folder of the JSON")
    return parser


class Stopwatch:
    """Times steps, but not the first few, in which workers start, kernels are chosen and memory is allocated."""

    def __init__(self, device: torch.device, skip: int, steps: int):
        """
        Args:
            device: The device to wait for before the clock is read.
            skip: Steps that are not timed, at least 1.
            steps: Steps that are timed.
        """
        self.device, self.skip, self.steps, self.done = device, skip, steps, 0

    def lap(self) -> bool:
        """Count a step; gives whether it was the last."""
        self.done += 1
        if self.done == self.skip:
            self._began = now(self.device)
        if self.done == self.skip + self.steps:
            self.seconds = now(self.device) - self._began
        return self.done >= self.skip + self.steps


def in_turn(contenders: dict[str, Callable[[], Result]], rounds: int, rehearse: bool = True) -> dict[str, list[Result]]:
    """Call contenders in turn, A B C, A B C, ..., so that a machine's drift hits all alike; gives what each returns.

    Args:
        contenders: The contenders, by name.
        rounds: How often each is timed.
        rehearse: Call each once before and drop the result, for contenders without untimed steps of their own.
    """
    seconds: dict[str, list[Result]] = {name: [] for name in contenders}
    for turn in range(-1 if rehearse else 0, rounds):
        for name, call in contenders.items():
            gc.collect()  # otherwise the garbage of one is collected in the time of another
            taken = call()
            if turn >= 0:
                seconds[name].append(taken)
    return seconds


def wall(call: Callable[[], Any], device: torch.device) -> Callable[[], float]:
    """The call as a contender that returns the seconds until `device` was done with it."""

    def timed() -> float:
        began = now(device)
        call()
        return now(device) - began

    return timed


def now(device: torch.device) -> float:
    """Seconds on the clock, once `device` has done all that it was given."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter()


def random_images(n: int, batch_size: int, size: int, device: torch.device) -> DataLoaders:
    """Loaders over `n` images of random pixels in ten classes, and a few to validate on."""
    classes = [str(i) for i in range(10)]
    train, valid = (
        ImageSet(torch.randint(256, (count, 3, size, size), dtype=torch.uint8), torch.randint(10, (count,)), classes)
        for count in (n, batch_size)
    )
    train.split_idx = 0
    loaders = [BatchLoader(train, batch_size, shuffle=True, drop_last=True), BatchLoader(valid, batch_size)]
    return DataLoaders(*loaders, device=device)


def where(device: torch.device) -> dict[str, Any]:
    """Hardware, versions and date, for the JSON."""
    return {
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "versions": {package: metadata.version(package) for package in ("fastai", "timm", "torch", "torchvision")},
        "date": datetime.date.today().isoformat(),
    }


def ratio(value: float, base: float) -> float:
    return value / base


def difference(value: float, base: float) -> float:
    return value - base


def summary(
    figures: dict[str, list[float]], unit: str, title: str, against: Callable[[float, float], float] = ratio
) -> dict[str, dict[str, float]]:
    """Print median and spread of each contender, and how it stands against the first one, round by round.

    Returns:
        The same figures, for the JSON.
    """
    first, base = next(iter(figures.items()))
    digits = 2 if against is ratio else 0
    versus = f"{against.__name__} to {first}" if against is ratio else f"above {first}"
    table = Table("", f"{unit}, median", "min to max", versus, title=title, title_justify="left")
    rows = {}
    for name, values in figures.items():
        rows[name] = {}
        compared = [against(v, b) for v, b in zip(values, base, strict=True)]
        for prefix, numbers in (("", values), (f"{against.__name__}_", compared)):
            parts = {"median": statistics.median(numbers), "min": min(numbers), "max": max(numbers)}
            rows[name] |= {prefix + key: round(value, 4) for key, value in parts.items()}
        table.add_row(
            name,
            f"{statistics.median(values):,.0f}",
            f"{min(values):,.0f} to {max(values):,.0f}",
            f"{statistics.median(compared):,.{digits}f} ({min(compared):,.{digits}f} to {max(compared):,.{digits}f})",
        )
    Console().print(table)
    return rows


def write(name: str, facts: dict[str, Any], device: torch.device, out: Path) -> None:
    """Write NAME.json, or NAME-cuda.json from such a GPU."""
    out.mkdir(parents=True, exist_ok=True)
    file = out / f"{name}{'' if device.type == 'cpu' else f'-{device.type}'}.json"
    text = json.dumps({"benchmark": name, **where(device), **facts}, indent=2) + "\n"
    file.write_text(text, encoding="utf-8")
