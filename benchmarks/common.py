"""Shared by the benchmarks: contenders timed in turn in one process, a table, and a JSON that says where and when."""

import argparse
import datetime
import json
import statistics
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from dms_fastai.runs import processor

ARTIFACTS = Path(__file__).parent.parent / "artifacts" / "benchmarks"


def arguments(description: str, rounds: int | None = None) -> argparse.ArgumentParser:
    """A parser with what every benchmark has."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    if rounds is not None:
        parser.add_argument("--rounds", type=int, default=rounds, help="times each contender is timed, in turn")
    parser.add_argument("--threads", type=int, default=None, help="CPU threads for torch")
    parser.add_argument("--out", type=Path, default=ARTIFACTS, help="folder of the JSON")
    return parser


def in_turn(contenders: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each call: all contenders once, untimed, then A B C, A B C, ... so that a machine's drift hits all."""
    for call in contenders.values():
        call()
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, call in contenders.items():
            began = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - began)
    return seconds


def where() -> dict[str, Any]:
    """Hardware, versions and date, for the JSON."""
    return {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else processor(),
        "threads": torch.get_num_threads(),
        "versions": {package: metadata.version(package) for package in ("fastai", "timm", "torch", "torchvision")},
        "date": datetime.date.today().isoformat(),
    }


def report(name: str, unit: str, figures: dict[str, list[float]], settings: dict[str, Any], out: Path) -> None:
    """Print median, spread and the ratio to the first contender, and write NAME.json."""
    first = next(iter(figures))
    base = figures[first]
    table = Table("", f"{unit}, median", "min to max", f"ratio to {first}, by round", title=name, title_justify="left")
    rows = {}
    for contender, values in figures.items():
        ratios = [v / b for v, b in zip(values, base, strict=True)]
        row = {
            "median": statistics.median(values),
            "min": min(values),
            "max": max(values),
            "ratio_median": statistics.median(ratios),
            "ratio_min": min(ratios),
            "ratio_max": max(ratios),
        }
        rows[contender] = row
        spread = f"{row['min']:,.0f} to {row['max']:,.0f}"
        table.add_row(
            contender,
            f"{row['median']:,.0f}",
            spread,
            f"{row['ratio_median']:.2f} ({row['ratio_min']:.2f} to {row['ratio_max']:.2f})",
        )
    Console().print(table)
    facts = {
        "benchmark": name,
        **where(),
        "unit": unit,
        "n": len(base),
        "settings": settings,
        "figures": rows,
    }
    out.mkdir(parents=True, exist_ok=True)
    (out / f"{name}.json").write_text(json.dumps(facts, indent=2) + "\n")
