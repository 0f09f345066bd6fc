"""The paper's table: every stage trained as its recipe says, set beside the paper's figures and its authors' log.

    python -m benchmarks.paper_table --data cifar10 [--stages teacher kd mixup se baseline] [--seeds 0] [--epochs 200]
                                     [--at-once 3] [--time-limit 9m] [--out artifacts/cifar10] [-- MORE]

Each stage, which may be a recipe of your own (a .toml), is a `dms-fastai run` of its own, in its own process, with its
own folder and log; MORE is given to all of them, `--arch dmsresnet_seblocks` say. Up to --at-once run side by side, in
the order given; a student waits for its teacher. What is finished is not run again and what was cut off goes on, so
that the same command, given again and again with a time limit, fits any machine that is lent in slices. --pilot trains
every stage for three epochs, in OUT-pilot, and says what the rest will take. At the end, and at every stop, the table
of what there is: OUT/table.md.
"""

import argparse
import os
import shlex
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from dms_fastai.callbacks.progress import clock
from dms_fastai.cli import EXIT_CODES, parse_duration
from dms_fastai.errors import UserError
from dms_fastai.report import METRICS, Run, read_rows, read_run
from dms_fastai.runs import choose_device, is_finished

STAGES = ("teacher", "kd", "mixup", "se", "baseline")  # in the order of their worth, should time run out
TEACHER_OF = {"kd": "teacher", "authors/kd": "authors/teacher"}
PILOT_EPOCHS = 3
TO_BEGIN = 45.0  # seconds under which no stage is begun: it would stop before it has learnt anything
LOOK = 0.2
SAY = 30.0
STOPPED = set(EXIT_CODES.values())


@dataclass(frozen=True)
class Published:
    """A stage as somebody else reports it: accuracies in per cent, `best` of the best epoch on the test set."""

    who: str
    last: float | None = None
    best: float | None = None
    training: float | None = None
    parameters: int | None = None
    seconds: int | None = None


PAPER_PARAMETERS = 4_367_742
STUDENT = Published("authors' log", 96.14, 96.24, 52.90, 4_697_742, 200 * 126)
TEACHER = Published("authors' log", 96.61, 96.72, None, 23_521_422, 200 * 92)
PUBLISHED = {  # in the ablation's order; all of 200 epochs, the log's on one P100 and by recipes/authors
    "baseline": [Published("paper", None, 81.79, 100.0)],
    "se": [Published("paper", None, 95.51, 99.99)],
    "mixup": [Published("paper", None, 96.46, 52.43)],
    "teacher": [TEACHER],
    "kd": [Published("paper", None, 96.56, 52.90, PAPER_PARAMETERS), STUDENT],
    "authors/teacher": [TEACHER],
    "authors/kd": [STUDENT],
}
COLUMNS = ("stage", "last epoch", "best*", "training", "parameters", "epochs", "time")
CAPTION = """Per cent of the {where}; the last epoch is the result. * the best epoch, chosen on the same pictures,
as the paper chose its. "paper" and "authors' log" are published figures, not measured here. Training accuracy under
MixUp counts the first picture's label alone."""


@dataclass
class Job:
    """A stage with a seed, and the process that trains it."""

    recipe: str
    seed: int
    out: Path
    process: subprocess.Popen | None = None
    code: int | None = None

    @property
    def needs(self) -> Path | None:
        """The folder of the run that teaches."""
        return self.out / TEACHER_OF[self.recipe] / f"seed{self.seed}" if self.recipe in TEACHER_OF else None

    @property
    def name(self) -> str:
        return Path(self.recipe).stem if self.recipe.endswith(".toml") else self.recipe

    @property
    def folder(self) -> Path:
        return self.out / self.name / f"seed{self.seed}"

    @property
    def log(self) -> Path:
        return self.out / "logs" / f"{self.name.replace('/', '-')}-seed{self.seed}.log"

    def state(self) -> str:
        """In a few words: who, how far, how good."""
        name = f"{self.name} seed {self.seed}"
        if not (self.folder / METRICS).is_file():
            return f"{name}: starting"
        facts, rows = read_run(self.folder).facts, read_rows(self.folder)
        if not rows:
            return f"{name}: starting"
        return f"{name}: {len(rows)}/{facts['epochs']}, {100 * rows[-1]['valid_accuracy']:.2f} %"

    def start(self, more: list[str], seconds: float | None) -> None:
        command = [sys.executable, "-m", "dms_fastai.cli", "run", self.recipe, "--out", str(self.out)]
        command += ["--seed", str(self.seed), *more]
        if seconds is not None:
            command += ["--time-limit", f"{seconds:.0f}s"]
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("a") as log:
            print("$", shlex.join(command[2:]), file=log, flush=True)
            self.process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)


def train(jobs: list[Job], more: list[str], at_once: int, deadline: float | None) -> None:
    """Run the jobs that are not finished; return when they are, or at the deadline, or when somebody asks to stop."""
    waiting = [job for job in jobs if not is_finished(job.folder)]
    running: list[Job] = []
    said, coming = time.monotonic(), {job.folder for job in waiting}
    try:
        while waiting or running:
            for job in [job for job in running if job.process.poll() is not None]:
                running.remove(job)
                job.code = job.process.returncode
                coming.discard(job.folder)
                print(f"{job.state()}; {'finished' if job.code == 0 else f'ended with code {job.code}'}", flush=True)
            left = None if deadline is None else deadline - time.monotonic()
            if left is not None and left < TO_BEGIN:
                waiting = []
            for job in list(waiting):
                ready = job.needs is None or "--teacher" in more or is_finished(job.needs)
                if not ready and job.needs not in coming:
                    print(f"{job.recipe} seed {job.seed}: its teacher did not get to its end", flush=True)
                    waiting.remove(job)
                    coming.discard(job.folder)
                elif ready and len(running) < at_once:
                    waiting.remove(job)
                    job.start(more, left)
                    running.append(job)
            if time.monotonic() - said > SAY and running:
                said = time.monotonic()
                print(" | ".join(job.state() for job in running), flush=True)
            time.sleep(LOOK)
    finally:
        for job in running:
            job.process.send_signal(signal.SIGTERM)  # a checkpoint is written, and the same command goes on
        for job in running:
            job.code = job.process.wait()


def complain(jobs: Iterable[Job]) -> int:
    """Print the last lines of what failed; the exit code."""
    failed = [job for job in jobs if job.code not in (None, 0, *STOPPED, -signal.SIGTERM)]
    for job in failed:
        print(f"--- {job.log}")
        print("\n".join(job.log.read_text().splitlines()[-5:]))
    return 1 if failed else 0


def rows(runs: list[Run]) -> list[list[str]]:
    """Each run's row, and below it what others report of the same stage."""
    order = list(PUBLISHED)
    found = []
    for run in sorted(runs, key=lambda r: [*order, r.facts["recipe"]].index(r.facts["recipe"])):
        facts = run.facts
        last, best = facts.get("last", {}), facts.get("best", {})
        title = f"{facts['title']}, seed {facts['seed']}" + ("" if run.finished else f" ({run.state})")
        shares = (last.get("valid_accuracy"), best.get("valid_accuracy"), last.get("train_accuracy"))
        accuracies = [percent(None if share is None else 100 * share) for share in shares]
        found.append(
            [title, *accuracies, f"{facts['parameters']:,}", str(facts["epochs_done"]), clock(facts["seconds"])]
        )
        for other in PUBLISHED.get(facts["recipe"], []):
            accuracies = [percent(value) for value in (other.last, other.best, other.training)]
            size = "-" if other.parameters is None else f"{other.parameters:,}"
            seconds = "-" if other.seconds is None else clock(other.seconds)
            found.append([f"- {other.who}", *accuracies, size, "200", seconds])
    return found


def percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def caption(runs: list[Run]) -> str:
    """What the figures are of: the test pictures, or those held out of the training ones."""
    splits = {run.facts["valid"] for run in runs}
    return CAPTION.format(where="test pictures" if splits == {"test"} else f"{' and '.join(sorted(splits))} pictures")


def table(runs: list[Run]) -> Table:
    shown = Table(
        box=SIMPLE_HEAD, caption=caption(runs).replace("\n", " "), caption_justify="left", padding=(0, 1, 0, 0)
    )
    for name in COLUMNS:
        shown.add_column(name.replace(" ", "\n"), justify="left" if name == "stage" else "right", no_wrap=True)
    for row in rows(runs):
        shown.add_row(*row, style="dim" if row[0].startswith("- ") else "bold")
    return shown


def markdown(runs: list[Run], more: list[str]) -> str:
    facts = [run.facts for run in runs]
    stages, seeds = (list(dict.fromkeys(str(f[key]) for f in facts)) for key in ("recipe", "seed"))
    command = f"python -m benchmarks.paper_table --data {facts[0]['data']} --epochs {facts[0]['epochs']}"
    command += f" --stages {' '.join(stages)} --seeds {' '.join(seeds)}" + (f" -- {shlex.join(more)}" if more else "")
    lines = [f"| {' | '.join(COLUMNS)} |", f"|---|{'---:|' * (len(COLUMNS) - 1)}"]
    for stage, *figures in rows(runs):
        bold = stage if stage.startswith("- ") else f"**{stage}**"
        lines.append(f"| {' | '.join([bold.replace('- ', ''), *figures])} |")
    devices = ", ".join(sorted({run.facts["device"] for run in runs}))
    return "\n".join([*lines, "", caption(runs), "", f"Trained on: {devices}.", "", "```sh", command, "```", ""])


def forecast(runs: list[Run], epochs: int) -> Table:
    """What `epochs` epochs of each stage will take, by its epochs but the first, in which kernels are compiled."""
    shown = Table("stage", "first epoch", "later epochs", f"{epochs} epochs", box=SIMPLE_HEAD)
    total = 0.0
    for run in runs:
        first, *later = (row["seconds"] for row in read_rows(run.folder))
        each = statistics.median(later) if later else first
        whole = first + (epochs - 1) * each
        total += whole
        shown.add_row(run.facts["recipe"], f"{first:.1f} s", f"{each:.2f} s", clock(whole))
    shown.add_row("all", "", "", clock(total))
    return shown


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="cifar10")
    parser.add_argument("--stages", nargs="+", default=STAGES, metavar="RECIPE", help=" ".join(STAGES))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], metavar="S")
    parser.add_argument("--epochs", type=int, default=200)
    parser.add_argument("--at-once", type=int, default=1, help="stages side by side")
    parser.add_argument("--time-limit", type=parse_duration, default=None, help="stop cleanly in time: 90s, 9m, 2h")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--out", type=Path, default=Path("artifacts/cifar10"))
    parser.add_argument(
        "--pilot", action="store_true", help=f"{PILOT_EPOCHS} epochs a stage, and what the rest will take"
    )
    parser.add_argument("more", nargs="*", metavar="MORE", help="after --: for every `dms-fastai run`")
    return parser.parse_args()


def main() -> None:
    args = arguments()
    deadline = None if args.time_limit is None else time.monotonic() + args.time_limit
    choose_device(args.device)
    out, epochs, more = args.out, args.epochs, args.more
    if args.pilot:
        out, epochs, more = out.with_name(f"{out.name}-pilot"), PILOT_EPOCHS, [*more, "--set", "compile=always"]
    more = ["--data", args.data, "--epochs", str(epochs), "--device", args.device, *more]
    jobs = [Job(recipe, seed, out) for seed in args.seeds for recipe in args.stages]
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    os.environ.setdefault("PYTHONUNBUFFERED", "1")
    began, stopped = time.monotonic(), False
    try:
        train(jobs, more, args.at_once, deadline)
    except KeyboardInterrupt:
        stopped = True
    runs = [read_run(job.folder) for job in jobs if (job.folder / METRICS).is_file()]
    console = Console()
    if runs and args.pilot:
        console.print(forecast(runs, args.epochs))
        console.print(f"{args.at_once} at once: {clock(time.monotonic() - began)} in all", highlight=False)
    elif runs:
        console.print(table(runs))
        (out / "table.md").write_text(markdown(runs, args.more))
    code = complain(jobs)
    done = all(is_finished(job.folder) for job in jobs)
    sys.exit(code or (130 if stopped else 0 if done else EXIT_CODES["time limit"]))


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        print(f"paper_table: {error.message}", file=sys.stderr)
        sys.exit(2)
