"""How long the command line takes to answer, beside `import timm`: whole processes, milliseconds.

    python -m benchmarks.start [--rounds 7]

Measures processor time, user and system together, which a busy machine changes least, and time by the clock. The last
two commands are mistyped, and are refused with exit code 2. Windows does not tell processor time in this way.
"""

import platform
import resource
import subprocess
import sys
import time
from dataclasses import dataclass
from functools import partial

import torch

from benchmarks.common import arguments, in_turn, summary, write

COMMANDS = {
    "import timm": ["-c", "import timm"],
    "import timm, dms_fastai": ["-c", "import timm, dms_fastai"],
    "import dms_fastai": ["-c", "import dms_fastai"],
    "--help": ["-m", "dms_fastai", "--help"],
    "recipes": ["-m", "dms_fastai", "recipes"],
    "models": ["-m", "dms_fastai", "models"],
}
REFUSED = {
    "run nosuch": ["-m", "dms_fastai", "run", "nosuch"],
    "run kd --set optimiser.lr=1": ["-m", "dms_fastai", "run", "kd", "--set", "optimiser.lr=1"],
}


@dataclass(frozen=True)
class Taken:
    """Milliseconds of a process."""

    processor: float
    clock: float


def main() -> None:
    args = arguments(__doc__, rounds=7, on_device=False).parse_args()
    contenders = {name: partial(run, command, code=0) for name, command in COMMANDS.items()}
    contenders |= {name: partial(run, command, code=2) for name, command in REFUSED.items()}
    taken = in_turn(contenders, args.rounds)
    figures = {}
    for kind, title in (("processor", "start: time on the processor"), ("clock", "start: time by the clock")):
        milliseconds = {name: [getattr(t, kind) for t in values] for name, values in taken.items()}
        figures[kind] = summary(milliseconds, "ms", title)
    facts = {"python": platform.python_version(), "unit": "ms", "n": args.rounds, "figures": figures}
    write("start", facts, torch.device("cpu"), args.out)


def run(command: list[str], code: int) -> Taken:
    """Run Python with a command line that is to end with `code`."""
    before, began = processor_seconds(), time.perf_counter()
    ended = subprocess.run([sys.executable, *command], capture_output=True, text=True)
    clock, processor = time.perf_counter() - began, processor_seconds() - before
    if ended.returncode != code:
        raise RuntimeError(f"python {' '.join(command)} ended with code {ended.returncode}: {ended.stderr}")
    return Taken(1e3 * processor, 1e3 * clock)


def processor_seconds() -> float:
    """Processor time of all child processes that have ended, user and system."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


if __name__ == "__main__":
    main()
