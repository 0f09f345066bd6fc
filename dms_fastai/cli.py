"""The command line: parse, call, print."""

import sys
import time
from collections.abc import Iterable
from errno import ENOSPC
from pathlib import Path
from typing import Annotated

import timm
import typer
from rich.console import Console
from rich.table import Table

from .callbacks.distill import without_code
from .errors import UserError
from .export import export_model, predict_files
from .models.weights import shipped_weights
from .recipes import ablation_of, added_by, flat, load_recipe, parse_setting, recipe_names
from .report import Run, difference_lines, find_runs, read_run, sections, table, write_report
from .runs import be_deterministic, check_folders, choose_device, is_finished, plan, run_stage

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="rich")
console = Console()

INTERRUPTED = 130
EXIT_CODES = {"SIGINT": INTERRUPTED, "SIGTERM": 143, "time limit": 75}
TRUST = typer.Option("--trust-pickle", help="Load a .pkl, which runs the code in it: only from people you trust.")


@app.callback()
def about() -> None:
    """Tiny residual networks, distilled: train, compare and export small image classifiers."""


@app.command()
def run(
    recipe: Annotated[str, typer.Argument(help="baseline, se, mixup, kd, teacher, ablation, authors/..., or a .toml")],
    data: Annotated[str, typer.Option(help="A data set's name, a folder or an .npz file.")] = "digits",
    arch: Annotated[str | None, typer.Option(help="Any timm architecture, in place of the recipe's.")] = None,
    teacher: Annotated[str | None, typer.Option(help="A recipe, a run's folder, a file, or timm:NAME.")] = None,
    epochs: Annotated[int | None, typer.Option(help="In place of the recipe's, for every stage.")] = None,
    schedule: Annotated[str | None, typer.Option(help="cosine or one-cycle, for every stage.")] = None,
    seed: Annotated[int, typer.Option(help="Of the weights, the batches and the augmentation.")] = 0,
    seeds: Annotated[str | None, typer.Option(help="Several, one after the other: 0,1,2.")] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", help="table.key=value, as often as needed.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    out: Annotated[Path | None, typer.Option(help="Folder of the runs, instead of artifacts/DATA.")] = None,
    time_limit: Annotated[str | None, typer.Option(help="Stop cleanly in time: 90s, 9m, 2h.")] = None,
    restart: Annotated[bool, typer.Option("--restart", help="Throw away what these runs have so far.")] = False,
    checkpoint_steps: Annotated[int | None, typer.Option(min=1, help="A checkpoint every so many steps, too.")] = None,
    trust_pickle: Annotated[bool, TRUST] = False,
    deterministic: Annotated[bool, typer.Option("--deterministic", help="The same bits on a GPU; slower.")] = False,
    profile: Annotated[bool, typer.Option("--profile", help="Print where a step's time goes; trace a few.")] = False,
) -> None:
    """Train a recipe, with the teacher it needs, and print what came of it. The same command goes on after a stop."""
    deadline = None if time_limit is None else time.monotonic() + parse_duration(time_limit)
    where = choose_device(device)
    settings = dict(parse_setting(text) for text in set_ or [])
    if deterministic:
        be_deterministic()
    if teacher is not None:
        _say_what_is_read(Path(teacher), trust_pickle)
    every = parse_seeds(seeds) if seeds is not None else [seed]
    planned = {s: plan(recipe, data, out, s, arch, teacher, epochs, schedule, settings, trust_pickle) for s in every}
    if not restart:
        for stages in planned.values():
            check_folders(stages)
    runs: dict[Path, Run] = {}
    todo = [(s, stage) for s, stages in planned.items() for stage in stages]
    for place, (number, stage) in enumerate(todo, start=1):
        if len(every) > 1:
            console.print(f"seed {number}", highlight=False)
        if stage.teacher is not None and is_finished(stage.teacher) and Path(stage.teacher) not in runs:
            runs[Path(stage.teacher)] = read_run(Path(stage.teacher))
            console.print(
                f"taught by the finished run in {stage.teacher}", soft_wrap=True, highlight=False, markup=False
            )
        result = run_stage(
            stage, data, number, where, deadline, restart, console, profile, checkpoint_steps, trust_pickle
        )
        reason = result.facts.get("stopped_by")
        if reason is not None and (not result.finished or place < len(todo)):
            state = f"{result.facts['title']}, {result.state or 'finished'}"
            again = "without --restart the same command" if restart else "the same command"
            console.print(f"stopped ({reason}): {state}; {again} goes on from there", markup=False, soft_wrap=True)
            raise typer.Exit(EXIT_CODES[reason])
        runs[stage.folder] = result
    _show(runs.values())
    for stages in planned.values():
        last = stages[-1].folder / "learner.pkl"
        console.print(f"learner: {last}", soft_wrap=True, highlight=False, markup=False)


@app.command()
def recipes() -> None:
    """List the recipes and what each adds to the one before."""
    listing = Table("recipe", "title", "extends", "adds or changes")
    for name in recipe_names():
        chain = ablation_of(name)
        base = chain[-2] if len(chain) > 1 else "-"
        added = "\n".join(f"{key} = {value!r}" for key, value in flat(added_by(name)).items())
        listing.add_row(name, load_recipe(name).title, base, added)
    console.print(listing)


@app.command()
def models() -> None:
    """List this package's architectures with their parameters for 10 classes."""
    listing = Table("model", "parameters", "weights", "what it is")
    listing.columns[1].justify = "right"
    for name in timm.list_models(module="dmsresnet"):
        entry, weights = timm.model_entrypoint(name), shipped_weights(name)
        parameters = sum(p.numel() for p in timm.create_model(name).parameters())
        tag = weights.stem.partition(".")[2] if weights else "-"
        listing.add_row(name, f"{parameters:,}", tag, (entry.__doc__ or "").split(". ")[0].rstrip("."))
    console.print(listing)
    console.print("Any other timm architecture works as well: dms-fastai run se --arch resnet18", highlight=False)


@app.command()
def predict(
    learner: Annotated[Path, typer.Argument(help="A learner.pkl, a model.safetensors, a run's folder, or dmsresnet.")],
    images: Annotated[list[Path], typer.Argument(help="Pictures.")],
    top: Annotated[int, typer.Option(min=1, help="How many classes to print.")] = 3,
    trust_pickle: Annotated[bool, TRUST] = False,
) -> None:
    """Classify pictures: the likeliest classes of each, with their probabilities."""
    _say_what_is_read(learner, trust_pickle)
    vocab, probabilities = predict_files(learner, images, trust_pickle)
    for image, row in zip(images, probabilities, strict=True):
        best = row.topk(min(top, len(vocab)))
        classes = zip(best.indices.tolist(), best.values.tolist(), strict=True)
        line = ", ".join(f"{vocab[index]} {100 * share:.1f} %" for index, share in classes)
        console.print(f"{image}: {line}", soft_wrap=True, highlight=False, markup=False)


@app.command()
def export(
    learner: Annotated[Path, typer.Argument(help="A learner.pkl, a model.safetensors, a run's folder, or dmsresnet.")],
    file: Annotated[Path, typer.Argument(help="NAME.onnx or NAME.pt2.")],
    trust_pickle: Annotated[bool, TRUST] = False,
) -> None:
    """Write a model for other runtimes: pixels go in, probabilities come out."""
    _say_what_is_read(learner, trust_pickle)
    written = export_model(learner, file, trust_pickle)
    console.print(f"{written}: {written.stat().st_size / 1e6:.1f} MB", soft_wrap=True, highlight=False, markup=False)


@app.command()
def report(
    folders: Annotated[list[Path] | None, typer.Argument(help="Folders with runs; ./artifacts if none.")] = None,
    out: Annotated[Path, typer.Option(help="Folder of the page and its pictures.")] = Path("report"),
) -> None:
    """Tables and plots of all runs in folders, finished or not: in the terminal, and as a page to open."""
    runs, problems = find_runs(folders or [Path("artifacts")])
    _show(runs)
    for problem in problems:
        console.print(f"left out: {problem.what}", soft_wrap=True, highlight=False, markup=False)
    page = write_report(sections(runs), problems, out)
    console.print(f"report: {page}", soft_wrap=True, highlight=False, markup=False)


def _show(runs: Iterable[Run]) -> None:
    """The tables of runs, and what each stage gained over the one before."""
    for section in sections(runs):
        console.print(table(section))
        for line in difference_lines(section.differences):
            console.print(line, highlight=False, markup=False)


def _say_what_is_read(source: Path, trust_pickle: bool) -> None:
    """A line where weights are read in place of the pickle that was named."""
    read = without_code(source, trust_pickle)
    if read != source:
        print(f"reading {read} in place of {source.name}, which could run code", file=sys.stderr)


def parse_duration(text: str) -> float:
    """Seconds of a duration such as 90s, 9m or 2h.

    Raises:
        UserError: It is no such thing, or not above 0.
    """
    try:
        seconds = float(text[:-1]) * {"s": 1, "m": 60, "h": 3600}[text[-1]]
    except (KeyError, ValueError, IndexError):
        seconds = 0.0
    if not seconds > 0:
        raise UserError(f"time limit is {text!r}; write 90s, 9m or 2h")
    return seconds


def parse_seeds(text: str) -> list[int]:
    """The seeds in a text such as 0,1,2.

    Raises:
        UserError: It is no such thing, or has a seed twice.
    """
    try:
        seeds = [int(part) for part in text.split(",")]
    except ValueError:
        raise UserError(f"seeds is {text!r}; write 0,1,2") from None
    if len(set(seeds)) < len(seeds):
        raise UserError(f"seeds is {text!r}; the same seed twice is the same run")
    return seeds


def main() -> None:
    """The console script: one line and exit code 2 for what the user can mend."""
    try:
        app()
    except UserError as error:
        print(f"dms-fastai: {error.message}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
    except OSError as error:  # a folder that cannot be written, a full disk
        kept = "; what was finished is kept: make room, and the same command goes on" if error.errno == ENOSPC else ""
        print(f"dms-fastai: {error}{kept}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
