"""The command line: parse, call, print."""

import sys
import time
from errno import ENOSPC
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from .errors import UserError

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
    from .recipes import parse_setting
    from .report import ablation_table, read_run
    from .runs import be_deterministic, check_folders, choose_device, is_finished, plan, run_stage

    deadline = None if time_limit is None else time.monotonic() + parse_duration(time_limit)
    where = choose_device(device)
    settings = dict(parse_setting(text) for text in set_ or [])
    if deterministic:
        be_deterministic()
    if teacher is not None:
        _say_what_is_read(Path(teacher), trust_pickle)
    stages = plan(recipe, data, out, seed, arch, teacher, epochs, schedule, settings, trust_pickle)
    if not restart:
        check_folders(stages)
    runs = []
    for stage in stages:
        if stage.teacher is not None and is_finished(stage.teacher) and stage.teacher not in {r.folder for r in runs}:
            runs.append(read_run(Path(stage.teacher)))
            console.print(
                f"taught by the finished run in {stage.teacher}", soft_wrap=True, highlight=False, markup=False
            )
        result = run_stage(
            stage, data, seed, where, deadline, restart, console, profile, checkpoint_steps, trust_pickle
        )
        if not result.finished:
            reason = result.facts["stopped_by"]
            console.print(
                f"stopped ({reason}): {result.facts['title']}, {result.state}; the same command goes on from there",
                markup=False,
                soft_wrap=True,
            )
            raise typer.Exit(EXIT_CODES[reason])
        runs.append(result)
    console.print(ablation_table(runs, f"{runs[-1].facts['data']}, seed {seed}"))
    console.print(f"learner: {runs[-1].folder / 'learner.pkl'}", soft_wrap=True, highlight=False)


@app.command()
def recipes() -> None:
    """List the recipes and what each adds to the one before."""
    from .recipes import ablation_of, added_by, load_recipe, recipe_names

    table = Table("recipe", "title", "extends", "adds or changes")
    for name in recipe_names():
        chain = ablation_of(name)
        base = chain[-2] if len(chain) > 1 else "-"
        table.add_row(name, load_recipe(name).title, base, "\n".join(_lines(added_by(name))))
    console.print(table)


@app.command()
def models() -> None:
    """List this package's architectures with their parameters for 10 classes."""
    import timm

    table = Table("model", "parameters", "what it is")
    table.columns[1].justify = "right"
    for name in timm.list_models(module="dmsresnet"):
        entry = timm.model_entrypoint(name)
        parameters = sum(p.numel() for p in timm.create_model(name).parameters())
        table.add_row(name, f"{parameters:,}", (entry.__doc__ or "").split(". ")[0].rstrip("."))
    console.print(table)
    console.print("Any other timm architecture works as well: dms-fastai run se --arch resnet18", highlight=False)


@app.command()
def predict(
    learner: Annotated[Path, typer.Argument(help="A learner.pkl, a model.safetensors, or a run's folder.")],
    images: Annotated[list[Path], typer.Argument(help="Pictures.")],
    top: Annotated[int, typer.Option(min=1, help="How many classes to print.")] = 3,
    trust_pickle: Annotated[bool, TRUST] = False,
) -> None:
    """Classify pictures: the likeliest classes of each, with their probabilities."""
    from .export import predict_files

    _say_what_is_read(learner, trust_pickle)
    vocab, probabilities = predict_files(learner, images, trust_pickle)
    for image, row in zip(images, probabilities, strict=True):
        best = row.topk(min(top, len(vocab)))
        classes = zip(best.indices.tolist(), best.values.tolist(), strict=True)
        line = ", ".join(f"{vocab[index]} {100 * share:.1f} %" for index, share in classes)
        console.print(f"{image}: {line}", soft_wrap=True, highlight=False, markup=False)


@app.command()
def report(folders: Annotated[list[Path] | None, typer.Argument(help="Folders with runs.")] = None) -> None:
    """Print the table of all runs in folders: ./artifacts unless told otherwise."""
    from .report import ablation_table, find_runs

    by_data: dict[tuple, list] = {}
    for found in find_runs(folders or [Path("artifacts")]):
        by_data.setdefault((found.facts["data"], found.facts["seed"]), []).append(found)
    for (data, seed), runs in sorted(by_data.items()):
        console.print(ablation_table(runs, f"{data}, seed {seed}"))


def _say_what_is_read(source: Path, trust_pickle: bool) -> None:
    """A line where weights are read in place of the pickle that was named."""
    from .callbacks.distill import without_code

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


def _lines(table: dict, prefix: str = "") -> list[str]:
    """A nested table as lines of dotted keys."""
    lines: list[str] = []
    for key, value in table.items():
        lines += _lines(value, f"{prefix}{key}.") if isinstance(value, dict) else [f"{prefix}{key} = {value!r}"]
    return lines


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
