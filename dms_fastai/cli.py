"""The command line: parse, call, print.

Imports that need torch are inside the commands, after the arguments have been checked: nobody should wait seconds for
the report of a typing mistake.
"""

import os
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from errno import ENOSPC
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.progress import Progress
from rich.table import Table

from .clock import seconds_of
from .errors import Notice, UserError, no_format, no_model
from .names import DATA_SETS, DEVICES, architectures, check_device, entries, shipped
from .recipes import ablation_of, added_by, flat, load_recipe, parse_setting, recipe_names
from .run_folder import RunFolder
from .runs.wanted import ABLATION, Wanted
from .schema import choices_of
from .terminal import Terminal, any_encoding

if TYPE_CHECKING:
    from .export import Classified
    from .run_folder import Run
    from .runs.plan import Opened, Stage
    from .runs.stage import Manner

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode="rich")
console, errors = Terminal(), Terminal(stderr=True)

SIGNAL_CODES = {"SIGHUP": 129, "SIGINT": 130, "SIGUSR1": 138, "SIGUSR2": 140, "SIGTERM": 143, "SIGXCPU": 152}
EXIT_CODES = {**SIGNAL_CODES, "time limit": 75}
MANY = 500  # images that take long enough for a bar
TRUST = typer.Option("--trust-pickle", help="Load a .pkl, which runs the code in it; only for files that you trust.")


def beginning(words: Callable[[], Iterable[str]]) -> Callable[[str], list[str]]:
    """A function that completes a word in a shell: it gives those of `words` that begin with it."""
    return lambda incomplete: [word for word in words() if word.startswith(incomplete)]


recipe_words = beginning(lambda: [*recipe_names(), ABLATION])
schedule_words = beginning(lambda: choices_of("training.schedules:SCHEDULES"))
data_words, device_words, arch_words = (
    beginning(lambda: DATA_SETS),
    beginning(lambda: DEVICES),
    beginning(architectures),
)


@app.callback()
def about() -> None:
    """Tiny residual networks, distilled: train, compare and export small image classifiers."""


@app.command()
def run(
    recipe: Annotated[
        list[str],
        typer.Argument(
            help="baseline, se, mixup, kd, teacher, ablation, fast, authors/..., or a .toml",
            autocompletion=recipe_words,
        ),
    ],
    data: Annotated[
        str, typer.Option(help="A data set's name, a folder, an .npz file or an archive.", autocompletion=data_words)
    ] = "digits",
    labels: Annotated[
        Path | None, typer.Option(help="A .csv table with the labels of the images in the folder --data.")
    ] = None,
    arch: Annotated[
        str | None, typer.Option(help="Any timm architecture, in place of the recipe's.", autocompletion=arch_words)
    ] = None,
    teacher: Annotated[
        str | None,
        typer.Option(help="A recipe, a run's folder, a file, or timm:NAME.", autocompletion=recipe_words),
    ] = None,
    epochs: Annotated[int | None, typer.Option(help="Epochs of every stage, in place of the recipe's.")] = None,
    schedule: Annotated[
        str | None, typer.Option(help="cosine, one-cycle or linear, for every stage.", autocompletion=schedule_words)
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the weights, the batches and the augmentation.")] = 0,
    seeds: Annotated[str | None, typer.Option(help="Several seeds, each trained: 0,1,2.")] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", help="table.key=value; may be repeated.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or mps.", autocompletion=device_words)] = "auto",
    out: Annotated[Path | None, typer.Option(help="Folder of the runs, instead of artifacts/DATA.")] = None,
    time_limit: Annotated[str | None, typer.Option(help="Stop cleanly after 90s, 9m or 2h.")] = None,
    at_once: Annotated[int, typer.Option(min=1, help="How many stages to train side by side.")] = 1,
    restart: Annotated[bool, typer.Option("--restart", help="Delete what these runs have, and begin again.")] = False,
    checkpoint_steps: Annotated[int | None, typer.Option(min=1, help="Also checkpoint every so many steps.")] = None,
    trust_pickle: Annotated[bool, TRUST] = False,
    deterministic: Annotated[bool, typer.Option("--deterministic", help="Repeatable on a GPU, but slower.")] = False,
    profile: Annotated[bool, typer.Option("--profile", help="Print where step time goes; trace a few steps.")] = False,
) -> None:
    """Train recipes and the teachers that they need, and print the results. After a stop, the same command resumes."""
    deadline = None if time_limit is None else time.monotonic() + seconds_of(time_limit)
    data = os.path.expanduser(data)
    teacher = None if teacher is None else ",".join(map(os.path.expanduser, teacher.split(",")))
    wanted = Wanted(
        recipes=tuple(map(os.path.expanduser, recipe)),
        data=data,
        seeds=(seed,) if seeds is None else parse_seeds(seeds),
        out=None if out is None else _home(out),
        arch=arch,
        teacher=teacher,
        epochs=epochs,
        schedule=schedule,
        settings=dict(parse_setting(text) for text in set_ or []) | _labelled(labels),
    )
    check_device(device)
    wanted.resolved()  # whatever is mistyped is refused before torch is imported

    from .runs.guards import refuse_other_recipe
    from .runs.machine import be_deterministic, choose_device
    from .runs.plan import Opened, plan
    from .runs.stage import Manner

    manner = Manner(choose_device(device), deadline, restart, profile, checkpoint_steps)
    if deterministic:
        be_deterministic()
    if teacher is not None:
        _say_what_is_read(Path(teacher), trust_pickle)
    opened = Opened(data, trust_pickle)
    stages = plan(wanted, opened)
    if not restart:
        for stage in stages:  # before anything is trained
            refuse_other_recipe(stage.recipe, stage.folder)
    if at_once > 1:
        flags = {"--restart": restart, "--trust-pickle": trust_pickle, "--deterministic": deterministic}
        flags |= {"--profile": profile}
        options = ["--data", data, "--device", device, *(flag for flag, given in flags.items() if given)]
        options += [] if checkpoint_steps is None else ["--checkpoint-steps", str(checkpoint_steps)]
        _train_at_once(stages, wanted.root, at_once, options, manner)
    else:
        _train_in_turn(stages, opened, manner)
    for seed in wanted.seeds:
        last = [stage for stage in stages if stage.seed == seed][-1].folder.learner
        console.say(f"learner: {last}")


def _train_in_turn(stages: "list[Stage]", opened: "Opened", manner: "Manner") -> None:
    from .run_folder import Run
    from .runs.stage import run_stage

    runs: dict[Path, Run] = {}
    several = len({stage.seed for stage in stages}) > 1
    for place, stage in enumerate(stages, start=1):
        if several:
            console.say(f"seed {stage.seed}")
        teacher = None if stage.teacher is None else RunFolder(Path(stage.teacher))
        if teacher is not None and teacher.finished and teacher.path not in runs:
            runs[teacher.path] = Run.read(teacher.path)
            console.say(f"taught by the finished run in {teacher.path}")
        result = run_stage(stage, opened, manner, console)
        reason = result.facts.stopped_by
        if reason is not None and (not result.finished or place < len(stages)):
            _stopped(reason, f"{result.facts.title}, {result.state or 'finished'}", manner.restart)
        runs[stage.folder.path] = result
    _show(runs.values())


def _train_at_once(stages: "list[Stage]", root: Path, at_once: int, options: list[str], manner: "Manner") -> None:
    from .run_folder import Run
    from .runs.at_once import Job, complain, train_at_once

    jobs = [Job(stage, root) for stage in stages]
    threads = None if manner.device.type != "cpu" else max((os.cpu_count() or 1) // at_once, 1)
    reason = train_at_once(jobs, at_once, options, manner.deadline, console, threads, manner.restart)
    folders = [folder for job in jobs for folder in (job.stage.teacher, job.stage.folder.path)]
    runs = [RunFolder(Path(path)) for path in dict.fromkeys(folder for folder in folders if folder is not None)]
    _show(Run.read(run.path) for run in runs if run.facts_file.is_file())
    code = complain(jobs, EXIT_CODES.values(), console)
    if code:
        raise typer.Exit(code)
    unfinished = [job.state() for job in jobs if not job.stage.folder.finished or (manner.restart and job.code is None)]
    if unfinished:
        codes = {code: reason for reason, code in EXIT_CODES.items()}
        asked = next((codes[job.code] for job in jobs if job.code in codes), "time limit")
        _stopped(reason or asked, unfinished[0], manner.restart)


def _stopped(reason: str, state: str, restart: bool) -> None:
    again = "without --restart the same command" if restart else "the same command"
    console.say(f"stopped ({reason}): {state}; {again} goes on from there")
    raise typer.Exit(EXIT_CODES[reason])


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
    for entry in entries():
        listing.add_row(entry.name, entry.parameters, entry.weights or "-", entry.what)
    console.print(listing)
    console.print("Any other timm architecture works as well: dms-fastai run se --arch resnet18")


@app.command()
def predict(
    learner: Annotated[Path, typer.Argument(help="A learner.pkl, a model.safetensors, a run's folder, or dmsresnet.")],
    images: Annotated[list[str], typer.Argument(help="Images, folders of images, or quoted patterns: 'new/*.png'.")],
    top: Annotated[int, typer.Option(min=1, help="How many classes to print.")] = 3,
    csv: Annotated[Path | None, typer.Option(help="Write a table to this file, or to - for standard output.")] = None,
    trust_pickle: Annotated[bool, TRUST] = False,
) -> None:
    """Classify images: the likeliest classes of each, with their probabilities.

    If a folder has sub-folders that are called as the classes, the accuracy follows. The table of --csv has the file,
    its class, the probability, and a column for each class, and is printed in place of the rest. Exit code 1: some
    images could not be read; 2: none could.
    """
    from .predict import check_table, image_files, table

    learner = _home(learner)
    csv = None if csv is None else _home(csv)
    if csv is not None:
        check_table(csv)
    files = image_files(images) if _check_model(learner) else {}  # if not, `classify_files` says so

    from .data.folder import class_name
    from .export import classify_files

    _say_what_is_read(learner, trust_pickle)
    bad: list[UserError] = []
    vocab, found = classify_files(learner, files, trust_pickle, bad)

    def say(image: Path, probabilities: list[float]) -> None:
        best = sorted(zip(probabilities, vocab, strict=True), key=lambda pair: -pair[0])[:top]
        console.say(f"{image}: {', '.join(f'{name} {100 * share:.1f} %' for share, name in best)}")

    right: list[bool] = []
    with nullcontext(say) if csv is None else table(csv, vocab) as write:
        for image, probabilities in _tracked(found, len(files), csv):
            write(image, probabilities.tolist())
            classes = [name for name in map(class_name, files[image]) if name in vocab]
            if classes:
                right.append(classes[0] == vocab[probabilities.argmax()])
        if len(bad) == len(files):
            raise _unread(bad, len(files))
    if right:
        told = f"accuracy: {100 * sum(right) / len(right):.2f} %, of {len(right):,} images in folders called as classes"
        (errors if str(csv) == "-" else console).say(told)
    if csv is not None and str(csv) != "-":
        console.say(f"table: {csv}")
    if bad:
        errors.say(f"dms-fastai: {_unread(bad, len(files)).message}")
        raise typer.Exit(1)


def _tracked(found: "Iterable[Classified]", images: int, csv: Path | None) -> "Iterator[Classified]":
    """The answers; many with a bar on standard error, unless their lines show on the same terminal how it goes."""
    lines = console.is_terminal and (csv is None or str(csv) == "-")
    if images < MANY or lines or not errors.is_terminal:
        yield from found
        return
    with Progress(console=errors, transient=True, redirect_stdout=False, redirect_stderr=False) as progress:
        yield from progress.track(found, total=images, description="classifying")


def _unread(bad: list[UserError], images: int) -> UserError:
    """Print why images could not be read; gives the error that says how many these were, or the reason if it is all."""
    if images == 1:
        return bad[0]
    for error in bad:
        errors.say(error.message)
    return UserError(f"{len(bad):,} of {images:,} images could not be read")


@app.command()
def export(
    learner: Annotated[Path, typer.Argument(help="A learner.pkl, a model.safetensors, a run's folder, or dmsresnet.")],
    file: Annotated[Path, typer.Argument(help="NAME.onnx or NAME.pt2.")],
    trust_pickle: Annotated[bool, TRUST] = False,
) -> None:
    """Write a model for other runtimes: pixels go in, probabilities come out."""
    learner, file = _home(learner), _home(file)
    _check_model(learner)
    formats = choices_of("export:FORMATS")
    if file.suffix not in formats:
        raise no_format(file, formats)

    from .export import export_model

    _say_what_is_read(learner, trust_pickle)
    written = export_model(learner, file, trust_pickle)
    console.say(f"{written}: {written.stat().st_size / 1e6:.1f} MB")


@app.command()
def report(
    folders: Annotated[list[Path] | None, typer.Argument(help="Folders with runs; ./artifacts by default.")] = None,
    out: Annotated[Path, typer.Option(help="Folder of the page and its plots.")] = Path("report"),
) -> None:
    """Show all runs in the folders, finished or not: tables in the terminal, and a page with tables and plots."""
    from .run_folder import find_runs

    runs, problems = find_runs([_home(folder) for folder in folders or [Path("artifacts")]])

    from .report.page import write_report
    from .report.rows import sections

    _show(runs)
    for problem in problems:
        console.say(f"left out: {problem.what}")
    page = write_report(sections(runs), problems, _home(out))
    console.say(f"report: {page}")


def _show(runs: "Iterable[Run]") -> None:
    """Print the tables of runs, and what each stage gained over the one before."""
    from .report.rows import sections
    from .report.tables import difference_lines, table

    for section in sections(runs):
        console.print(table(section))
        for line in difference_lines(section.differences):
            console.print(line)


def _labelled(labels: Path | None) -> dict[str, str]:
    return {} if labels is None else {"data.labels": str(_home(labels))}


def _home(path: Path) -> Path:
    """The path with ~ replaced by the home folder, which a shell does not do in --out=~/runs."""
    return Path(os.path.expanduser(path))


def _check_model(source: Path) -> bool:
    """Whether a trained model is there; a UserError if nothing can be one by this name."""
    there = RunFolder(source).weights.is_file() or source.is_file() or shipped(str(source)) is not None
    if not there and not source.exists() and source.suffix not in (".safetensors", ".pkl"):
        raise no_model(source)
    return there


def _say_what_is_read(source: Path, trust_pickle: bool) -> None:
    """Print a line if weights are read in place of the pickle that was named."""
    from .trained import without_code

    read = without_code(source, trust_pickle)
    if read != source:
        errors.say(f"reading {read} in place of {source.name}, which could run code")


def parse_seeds(text: str) -> tuple[int, ...]:
    """The seeds in a text such as 0,1,2.

    Raises:
        UserError: The text has another form, or a seed twice.
    """
    try:
        seeds = tuple(int(part) for part in text.split(","))
    except ValueError:
        raise UserError(f"seeds is {text!r}; write 0,1,2") from None
    if len(set(seeds)) < len(seeds):
        raise UserError(f"seeds is {text!r}; the same seed twice is the same run")
    return seeds


def _show_warning(message: Warning | str, category: type[Warning], *where: object, **more: object) -> None:
    """Print a warning: in one line, if it is for users."""
    if issubclass(category, Notice):
        errors.say(f"dms-fastai: {message}")
    else:
        sys.stderr.write(warnings.formatwarning(message, category, *where[:2]))


def main() -> None:
    """Run the console script. An error that the user can fix gives one line and exit code 2."""
    any_encoding()
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            app()
    except UserError as error:
        errors.say(f"dms-fastai: {error.message}")
        sys.exit(2)
    except UnicodeEncodeError as error:
        errors.say(f"dms-fastai: the name {error.object} is not UTF-8, and a file has to hold it; rename it")
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(EXIT_CODES["SIGINT"])
    except OSError as error:  # a folder that cannot be written, a full disk
        kept = "; what was finished is kept: make room, and the same command goes on" if error.errno == ENOSPC else ""
        errors.say(f"dms-fastai: {error}{kept}")
        sys.exit(2)


if __name__ == "__main__":  # python -m dms_fastai.cli, as well as python -m dms_fastai
    main()
