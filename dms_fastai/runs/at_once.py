"""Several stages side by side, each a `dms-fastai run` in a process of its own; a student waits for its teacher."""

import hashlib
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import torch
from rich.console import Console

from ..callbacks.torch_compile import can_compile
from ..errors import UserError
from ..files import whole
from ..run_folder import RunFolder
from .plan import Stage
from .stop import SIGNALS, TIME_LIMIT, TO_COMPILE, heeded, name_of

__all__ = ["Job", "complain", "train_at_once"]

TO_BEGIN = 45.0  # seconds under which no stage is begun: it would stop before it has learnt anything
TO_START = 10.0  # seconds in which a process imports what it needs, before its own clock starts
LOOK, SAY = 0.2, 30.0  # seconds between looks at the processes, and between lines about them
LINES = 5  # of a failed process's log
ERROR = "dms-fastai: error: "  # of a line that says all
# Windows knows no SIGTERM, but can send Ctrl-Break to a group of processes.
OWN_GROUP = getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0)


@dataclass
class Job:
    """A stage, and the process that trains it.

    Attributes:
        stage: Of `plan`.
        root: The folder of the runs.
        process: Once it has been started.
        begin: Bytes of the log from before that.
    """

    stage: Stage
    root: Path
    process: subprocess.Popen | None = None
    begin: int = 0

    @property
    def name(self) -> str:
        return f"{self.stage.recipe.name} seed {self.stage.seed}"

    @property
    def log(self) -> Path:
        """What the process prints. No other stage of this folder of runs has a file of this name."""
        return self.root / "logs" / f"{self._file_name()}.log"

    def _file_name(self) -> str:
        """The stage's name as that of a file; where another's could become the same, with a hash of its folder."""
        name, seed = self.stage.recipe.name, self.stage.seed
        plain, own = re.sub(r"[/\s]", "-", name), self.root / name / f"seed{seed}"
        if plain == name.replace("/", "-") and "-" not in name and self.stage.folder.path == own:
            return f"{plain}-seed-{seed}"
        return f"{plain}-{_hashed(os.path.relpath(self.stage.folder.path, self.root))}-seed-{seed}"

    def _write_recipe(self) -> Path:
        """Write the resolved recipe beside the log, in a file that other settings of the same stage do not share."""
        text = self.stage.recipe.to_toml()
        file = self.log.with_name(f"{self._file_name()}-{_hashed(text)}.toml")
        with whole(file) as partial:
            partial.write_text(text, encoding="utf-8")
        return file

    @property
    def complete(self) -> bool:
        """Whether the stage has finished, with its predictions."""
        return self.stage.folder.finished and self.stage.folder.predictions.is_file()

    @property
    def code(self) -> int | None:
        """How the process ended; None while it runs, or where there was none."""
        return None if self.process is None else self.process.poll()

    def state(self) -> str:
        """In a few words: who, how far, how good."""
        folder = self.stage.folder
        try:
            facts = folder.facts()
        except UserError:
            return f"{self.name}: starting"
        if facts.last is None:
            return f"{self.name}: starting"
        return f"{self.name}: {facts.epochs_done}/{facts.epochs}, {100 * facts.last.valid_accuracy:.2f} %"

    def start(self, options: Sequence[str], threads: int | None) -> None:
        """Train the stage by its resolved recipe, which is written beside the log for that."""
        self.log.parent.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-P", "-m", "dms_fastai", "run", str(self._write_recipe()), "--out", str(self.root)]
        command += ["--seed", str(self.stage.seed), "--into", str(self.stage.folder.path), *options]
        if self.stage.teacher is not None:
            command += ["--teacher", str(self.stage.teacher)]
        if os.name == "posix":  # elsewhere a process may have another one between
            command += ["--parent", str(os.getpid())]
        environment = {"PYTHONUNBUFFERED": "1", "PYTHONUTF8": "1"}
        environment |= {**({"OMP_NUM_THREADS": str(threads)} if threads else {}), **os.environ}
        with self.log.open("a", encoding="utf-8") as log:
            self.begin = log.tell()
            print("$", shlex.join(command[3:]), file=log, flush=True)
            self.process = subprocess.Popen(
                command, stdout=log, stderr=subprocess.STDOUT, env=environment, creationflags=OWN_GROUP
            )

    def last_words(self) -> list[str]:
        """The process's error, if it has said one, or its last lines."""
        said = self.log.read_bytes()[self.begin :].decode(errors="replace").splitlines()
        errors = [line for line in said if line.startswith(ERROR)]
        return errors[-1:] or said[-LINES:]

    def stop(self) -> None:
        """Have the process write a checkpoint and end; the same command resumes it."""
        self.process.send_signal(getattr(signal, "CTRL_BREAK_EVENT", signal.SIGTERM))


def train_at_once(
    jobs: list[Job],
    at_once: int,
    options: Sequence[str],
    deadline: float | None,
    console: Console,
    threads: int | None = None,
    restart: bool = False,
) -> str | None:
    """Train the stages that are not finished; return when they are, at the deadline, or when somebody asks to stop.

    Args:
        jobs: In the order in which they are to be begun.
        at_once: How many run side by side.
        options: Of `dms-fastai run`, for all of them.
        deadline: On the clock of `time.monotonic`.
        console: Where to say how they do.
        threads: Of each process, unless OMP_NUM_THREADS says so; None: as many as it finds.
        restart: Train those that are finished, too.

    Returns:
        Why it ended early, as in `Facts.stopped_by`; None where everything that could be begun ran to its end.
    """
    waiting = [job for job in jobs if restart or not job.complete]
    coming = {job.stage.folder.path for job in waiting}
    running: list[Job] = []
    said, reason = time.monotonic(), None
    to_begin = 0.0 if deadline is None else min(_to_begin(jobs), (deadline - said) / 2)
    with _signals() as asked:
        try:
            while waiting or running:
                for job in [job for job in running if job.code is not None]:
                    running.remove(job)
                    coming.discard(job.stage.folder.path)
                    _say(console, f"{job.state()}; {'finished' if job.code == 0 else f'ended with code {job.code}'}")
                left = None if deadline is None else deadline - time.monotonic()
                if asked or (left is not None and left < to_begin):
                    reason = asked[0] if asked else TIME_LIMIT if waiting or running else None
                    waiting = []
                    if asked:
                        break
                for job in _ready(waiting, coming, at_once - len(running), console):
                    waiting.remove(job)
                    limit = [] if left is None else ["--time-limit", f"{max(left - TO_START, left / 2):.3f}s"]
                    job.start([*options, *limit], threads)
                    running.append(job)
                if time.monotonic() - said > SAY and running:
                    said = time.monotonic()
                    _say(console, " | ".join(job.state() for job in running))
                time.sleep(LOOK)
        finally:
            for job in running:
                job.stop()
            for job in running:
                job.process.wait()
    return reason


def _to_begin(jobs: list[Job]) -> float:
    """Seconds that a stage must have left to be worth beginning: more, if it is compiled first."""
    compiled = any(job.stage.recipe.compile is not None for job in jobs) and can_compile(torch.device("cuda"))
    return TO_COMPILE if compiled else TO_BEGIN


def _ready(waiting: list[Job], coming: set[Path], free: int, console: Console) -> Iterable[Job]:
    """Those that can begin now; whose teacher will not come is given up."""
    ready = []
    for job in list(waiting):
        teacher = job.stage.teacher
        if teacher in coming:
            continue
        if isinstance(teacher, Path) and not RunFolder(teacher).finished:
            _say(console, f"{job.name}: its teacher did not finish")
            waiting.remove(job)
            coming.discard(job.stage.folder.path)
        elif len(ready) < free:
            ready.append(job)
    return ready


def complain(jobs: Iterable[Job], stopped: Iterable[int], console: Console) -> int:
    """Print what failed, and why; the exit code."""
    killed = [-number for number in SIGNALS]
    failed = [job for job in jobs if job.code not in (None, 0, *stopped, *killed)]
    for job in failed:
        _say(console, f"--- {job.log}")
        _say(console, "\n".join(job.last_words()))
    return max((job.code if job.code > 0 else 128 - job.code for job in failed), default=0)


def _hashed(text: str) -> str:
    return hashlib.blake2b(os.fsencode(text), digest_size=4).hexdigest()


@contextmanager
def _signals() -> Iterator[list[str]]:
    """The names of the signals that have asked to stop."""
    asked: list[str] = []

    def note(number: int, frame: FrameType | None) -> None:
        asked.append(name_of(number))

    before = {number: signal.signal(number, note) for number in heeded()}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _say(console: Console, text: str) -> None:
    console.print(text, soft_wrap=True, highlight=False, markup=False)
