"""Where the time of a training step goes."""

import json
import os
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from fastai.callback.core import Callback
from rich.console import Console
from rich.table import Table
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

from ..callbacks.distill import TeacherDistill
from ..files import whole

__all__ = ["StepProfile", "busy_milliseconds"]

WARM_UP, TIMED, TRACED = 10, 20, 5  # steps
STEPS = WARM_UP + TIMED + TRACED

# The parts of a step in order, and what they hold.
PARTS = {
    "data": "a batch: crop, flip, normalise",
    "mixup": "MixUp, learning rate",
    "forward": "the student",
    "teacher": "the teacher, on the same images",
    "loss": "",
    "backward": "",
    "optimiser": "clipping, SGD",
    "host": "recorder, metrics, progress",
}


class StepProfile:
    """Times the parts of twenty training steps, then traces five more with torch.profiler; prints and writes both.

    Use it as a context manager round `fit`, with `edges` among its callbacks. On a GPU, a part ends when the GPU has
    finished it, and includes the time that the GPU waited for it.
    """

    def __init__(self, folder: Path, console: Console | None = None):
        """
        Args:
            folder: Gets `step.json`, milliseconds by part, and `trace.json.gz`, for Perfetto or chrome://tracing.
            console: Where to print; None: standard output.
        """
        self.folder, self.console = folder, console or Console()
        self.edges: list[Callback] = [FirstOfAll(self.mark), LastOfAll(self.mark)]
        self.steps, self.marks = 0, []
        self.profiler = self.range = None

    def __enter__(self) -> "StepProfile":
        return self

    def __exit__(self, *_: object) -> None:
        if self.profiler is not None:
            self._stop()
        if self.steps < STEPS:
            self.console.print(f"no profile: it takes {STEPS} training steps, and there were {self.steps}")

    def mark(self, part: str, learn: Any) -> None:
        """Note that `part` ends here; "start" ends none."""
        if self.steps >= STEPS:
            return
        if part == "start":
            self.device = next(learn.model.parameters()).device
            self.taught = any(isinstance(cb, TeacherDistill) for cb in learn.cbs)
        if self.profiler is not None:
            self._next_range(part)
        elif self.steps >= WARM_UP:
            self.marks.append((part, self._stamp()))
        if part == "host":
            self._count()

    def _count(self) -> None:
        self.steps += 1
        if self.steps == WARM_UP:
            self.marks.append(("start", self._stamp()))
        elif self.steps == WARM_UP + TIMED:
            self.split = self._split()
            os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # or it reports on standard error that there is no GPU
            gpu = [ProfilerActivity.CUDA] if self.device.type == "cuda" else []
            self.profiler = profile(activities=[ProfilerActivity.CPU, *gpu], acc_events=True)
            self.profiler.start()
        elif self.steps == STEPS:
            self._stop()
            self._write()

    def _stamp(self) -> Any:
        if self.device.type == "cpu":
            return time.perf_counter()
        if self.device.type != "cuda":
            torch.accelerator.synchronize(self.device)
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _split(self) -> dict[str, float]:
        """Milliseconds a step by part."""
        total = dict.fromkeys(PARTS, 0.0)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        for (_, before), (part, now) in zip(self.marks, self.marks[1:], strict=False):
            if part != "start":
                total[part] += before.elapsed_time(now) if self.device.type == "cuda" else 1e3 * (now - before)
        if not self.taught:
            total["host"] += total.pop("teacher")
        return {part: milliseconds / TIMED for part, milliseconds in total.items()}

    def _next_range(self, part: str) -> None:
        """Name, in the trace, the part that begins where this one ends."""
        if self.range is not None:
            self.range.__exit__(None, None, None)
        names = list(PARTS)
        following = names[0] if part == "start" else names[(names.index(part) + 1) % len(names)]
        self.range = record_function(following)
        self.range.__enter__()

    def _stop(self) -> None:
        if self.range is not None:
            self.range.__exit__(None, None, None)
            self.range = None
        self.profiler.stop()
        self.trace, self.profiler = self.profiler, None

    def _write(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        partial = self.folder / "trace.partial.json.gz"
        self.trace.export_chrome_trace(str(partial))
        partial.replace(self.folder / "trace.json.gz")
        facts: dict[str, Any] = {"milliseconds": {part: round(ms, 4) for part, ms in self.split.items()}}
        if self.device.type == "cuda":
            facts["gpu_busy_milliseconds"] = round(busy_milliseconds(self.trace.key_averages()) / TRACED, 4)
        with whole(self.folder / "step.json") as file:
            file.write_text(json.dumps(facts, indent=2) + "\n")
        self._print(facts)

    def _print(self, facts: dict[str, Any]) -> None:
        step = sum(self.split.values())
        table = Table(
            "part", "ms", "share", "", title=f"a training step: {step:.2f} ms", title_justify="left", box=None
        )
        for column in table.columns[1:3]:
            column.justify = "right"
        for part, milliseconds in self.split.items():
            table.add_row(part, f"{milliseconds:.2f}", f"{100 * milliseconds / step:.1f} %", PARTS[part])
        self.console.print(table)
        if "gpu_busy_milliseconds" in facts:
            self.console.print(f"the GPU computes for {facts['gpu_busy_milliseconds']:.2f} ms of it")
        self.console.print(f"trace: {self.folder / 'trace.json.gz'}", soft_wrap=True, highlight=False, markup=False)


class Edge(Callback):
    """Ends parts of a step at events."""

    run_valid = False

    def __init__(self, mark: Callable[[str, Any], None]):
        super().__init__()
        self.mark = mark


class FirstOfAll(Edge):
    order = -1000

    def before_train(self) -> None:
        self.mark("start", self.learn)

    def before_batch(self) -> None:
        self.mark("data", self.learn)

    def after_pred(self) -> None:
        self.mark("forward", self.learn)

    def before_backward(self) -> None:
        self.mark("loss", self.learn)

    def after_batch(self) -> None:
        self.mark("optimiser", self.learn)


class LastOfAll(Edge):
    order = 1000

    def before_batch(self) -> None:
        self.mark("mixup", self.learn)

    def after_pred(self) -> None:
        self.mark("teacher", self.learn)

    def after_backward(self) -> None:
        self.mark("backward", self.learn)  # with SAM's second pass

    def after_batch(self) -> None:
        self.mark("host", self.learn)


def busy_milliseconds(events: Iterable[Any]) -> float:
    """The time that a GPU has computed or copied, from a profile's `key_averages()`.

    A kernel's time is also that of the operation on the host which launched it, and that of each named range round it.
    """
    on_gpu = [event for event in events if event.device_type != DeviceType.CPU and not event.is_user_annotation]
    return sum(event.self_device_time_total for event in on_gpu) / 1e3
