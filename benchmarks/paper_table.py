"""The paper's table: every stage trained as its recipe says, set beside the paper's figures and its authors' log.

    python -m benchmarks.paper_table --data cifar10 [--stages teacher kd mixup se baseline] [--seeds 0] [--epochs 200]
                                     [--at-once 3] [--time-limit 9m] [--out artifacts/cifar10] [-- MORE]

One `dms-fastai run` trains the stages, which may be your own recipes (.toml). MORE is passed on to it, such as
`--arch dmsresnet_seblocks`. Finished runs are skipped, and unfinished ones are resumed: on a machine that is available
in slices, repeat the same command with a time limit. --pilot trains every stage for three epochs, in OUT-pilot, and
says how long the rest will take. At the end, and at every stop, the table so far is in OUT/table.md.
"""

import argparse
import shlex
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from dms_fastai.cli import app
from dms_fastai.clock import clock
from dms_fastai.errors import UserError
from dms_fastai.report.published import STAGES as PUBLISHED
from dms_fastai.report.published import Published
from dms_fastai.run_folder import Run, RunFolder
from dms_fastai.runs.wanted import Wanted

STAGES = ("teacher", "kd", "mixup", "se", "baseline")  # the most important first, in case time runs out
PILOT_EPOCHS = 3
COLUMNS = ("stage", "last epoch", "best*", "training", "parameters", "epochs", "time")
CAPTION = """Accuracy in per cent of the {where}; the last epoch is the result. * the best epoch, chosen on the same
images, as in the paper. "paper" and "authors' log" are published figures, not measured here. Training accuracy under
MixUp counts the first image's label alone."""


def train(args: argparse.Namespace, wanted: Wanted) -> int:
    """Train the stages by `dms-fastai run`; gives its exit code."""
    command = ["run", *wanted.recipes, "--data", wanted.data, "--seeds", ",".join(map(str, wanted.seeds))]
    command += ["--epochs", str(wanted.epochs), "--out", str(wanted.root), "--at-once", str(args.at_once)]
    command += ["--device", args.device]
    if args.time_limit is not None:
        command += ["--time-limit", args.time_limit]
    if args.pilot:
        command += ["--set", "compile.steps=0"]  # as in the many steps of the whole training
    try:
        app([*command, *args.more], prog_name="dms-fastai")
    except SystemExit as end:
        return end.code
    except UserError as error:  # the stages before it have a place in the table
        print(f"dms-fastai: {error.message}", file=sys.stderr)
        return 2


def folders_of(wanted: Wanted) -> list[RunFolder]:
    """Where the stages' runs go, in the ablation's order."""
    names = [recipe.name for recipe in wanted.resolved()]
    ordered = sorted(names, key=lambda name: [*PUBLISHED, name].index(name))
    return [RunFolder(wanted.root / name / f"seed{seed}") for name in ordered for seed in wanted.seeds]


def rows(runs: list[Run]) -> Iterator[list[str]]:
    """Each run's row, and below it what others report of the same stage."""
    for run in runs:
        yield measured(run)
        yield from map(reported, PUBLISHED.get(run.facts.recipe, []))


def measured(run: Run) -> list[str]:
    facts, last, best = run.facts, run.facts.last, run.facts.best
    title = f"{facts.title}, seed {facts.seed}" + ("" if run.finished else f" ({run.state})")
    shares = [last.valid_accuracy, best.valid_accuracy, last.train_accuracy] if last else [None] * 3
    accuracies = [percent(None if share is None else 100 * share) for share in shares]
    return [title, *accuracies, f"{facts.parameters:,}", str(facts.epochs_done), clock(facts.seconds)]


def reported(other: Published) -> list[str]:
    accuracies = [percent(value) for value in (other.last, other.best, other.training)]
    parameters = "-" if other.parameters is None else f"{other.parameters:,}"
    seconds = "-" if other.seconds is None else clock(other.seconds)
    return [f"- {other.who}", *accuracies, parameters, str(other.epochs), seconds]


def percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def caption(runs: list[Run]) -> str:
    """The caption; it says which images the figures are of: the test images, or held-out training images."""
    splits = {run.facts.valid for run in runs}
    return CAPTION.format(where="test images" if splits == {"test"} else f"{' and '.join(sorted(splits))} images")


def table(runs: list[Run]) -> Table:
    """The table for the terminal."""
    note = caption(runs).replace("\n", " ")
    shown = Table(box=SIMPLE_HEAD, caption=note, caption_justify="left", padding=(0, 1, 0, 0))
    shown.add_column("stage")
    for name in COLUMNS[1:]:
        shown.add_column(name.replace(" ", "\n"), justify="right", no_wrap=True)
    for row in rows(runs):
        shown.add_row(*row, style="dim" if row[0].startswith("- ") else "bold")
    return shown


def markdown(runs: list[Run], wanted: Wanted, more: list[str]) -> str:
    """The table, what it was trained on, and the command."""
    lines = [f"| {' | '.join(COLUMNS)} |", f"|---|{'---:|' * (len(COLUMNS) - 1)}"]
    for stage, *figures in rows(runs):
        bold = stage.removeprefix("- ") if stage.startswith("- ") else f"**{stage}**"
        lines.append(f"| {' | '.join([bold, *figures])} |")
    devices = ", ".join(sorted({run.facts.device for run in runs}))
    words = ["python", "-m", "benchmarks.paper_table", "--data", wanted.data, "--epochs", str(wanted.epochs)]
    words += ["--stages", *wanted.recipes, "--seeds", *map(str, wanted.seeds), *(["--", *more] if more else [])]
    return "\n".join(
        [*lines, "", caption(runs), "", f"Trained on: {devices}.", "", "```sh", shlex.join(words), "```", ""]
    )


def forecast(runs: list[Run], epochs: int) -> Table:
    """The time of `epochs` epochs of each stage, from its epochs so far; in the first, kernels are compiled."""
    shown = Table("stage", "first epoch", "later epochs", f"{epochs} epochs", box=SIMPLE_HEAD)
    total = 0.0
    for run in [run for run in runs if run.facts.epochs_done]:
        first, *later = (row["seconds"] for row in run.folder.rows())
        each = statistics.median(later) if later else first
        whole = first + (epochs - 1) * each
        total += whole
        shown.add_row(run.facts.recipe, f"{first:.1f} s", f"{each:.2f} s", clock(whole))
    shown.add_row("all", "", "", clock(total))
    return shown


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="cifar10")
    parser.add_argument("--stages", nargs="+", default=STAGES, metavar="RECIPE", help=" ".join(STAGES))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], metavar="S")
    parser.add_argument("--epochs", type=int, default=200)
    parser.add_argument("--at-once", type=int, default=1, help="stages side by side")
    parser.add_argument("--time-limit", default=None, help="stop cleanly in time: 90s, 9m, 2h")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or mps")
    parser.add_argument("--out", type=Path, default=None, help="artifacts/DATA if not given")
    parser.add_argument(
        "--pilot", action="store_true", help=f"{PILOT_EPOCHS} epochs a stage, and how long the rest will take"
    )
    parser.add_argument("more", nargs="*", metavar="MORE", help="after --: for `dms-fastai run`")
    return parser.parse_args()


def main() -> None:
    args, began = arguments(), time.monotonic()
    wanted = Wanted(tuple(args.stages), args.data, tuple(args.seeds), args.out, epochs=args.epochs)
    if args.pilot:
        wanted = replace(wanted, out=wanted.root.with_name(f"{wanted.root.name}-pilot"), epochs=PILOT_EPOCHS)
    folders, console = folders_of(wanted), Console()
    code = train(args, wanted)
    runs = [Run.read(folder.path) for folder in folders if folder.facts_file.is_file()]
    if runs and args.pilot:
        console.print(forecast(runs, args.epochs))
        console.print(f"{args.at_once} at once: {clock(time.monotonic() - began)} in all", highlight=False)
    elif runs:
        console.print(table(runs))
        (wanted.root / "table.md").write_text(markdown(runs, wanted, args.more), encoding="utf-8")
    sys.exit(code)


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        print(f"paper_table: {error.message}", file=sys.stderr)
        sys.exit(2)
