"""The command line: parse, call, print.

Imports that need torch are inside the commands, after the arguments have been checked: nobody should wait seconds for
the report of a typing mistake.
"""

import gc
import os
import sys
import time
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from errno import ENOSPC
from importlib.util import find_spec
from json import dumps
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.progress import Progress
from rich.table import Table

from . import __version__, processes
from .clock import seconds_of
from .errors import Notice, TryAgainError, UserError, either, no_model, notice, unknown
from .names import (
    DATA_SETS,
    DEVICES,
    INT8,
    TIMM,
    architectures,
    check_device,
    check_format,
    entries,
    is_architecture,
    shipped,
    source_name,
)
from .recipes import ablation_of, added_by, all_keys, flat, load_recipe, parse_setting, recipe_names
from .run_folder import RunFolder, own_data
from .runs.threads import Load, fitting
from .runs.wanted import EDGE, SEVERAL, Wanted, recipes_of
from .schema import choices_of
from .terminal import Terminal, any_encoding

if TYPE_CHECKING:
    from torch import Tensor

    from .bench import Row
    from .export import Classified
    from .export.calibrate import Compared
    from .run_folder import Run
    from .runs.plan import Opened, Stage
    from .runs.stage import Manner
    from .runs.tune import Trial

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)
console, errors = Terminal(), Terminal(stderr=True)

SIGNAL_CODES = {"SIGHUP": 129, "SIGINT": 130, "SIGUSR1": 138, "SIGUSR2": 140, "SIGTERM": 143, "SIGXCPU": 152}
EXIT_CODES = {**SIGNAL_CODES, "time limit": 75}
MANY = 500  # images that take long enough for a bar
BEST = 10  # trials in the table of `tune`
WORST = 20  # classes in the table of `evaluate`
TRAINING = ("run", "prune")  # commands that several processes carry out together
SPLITS = ("test", "val", "train")
KEYS = "keys"  # in place of a recipe, what `show` takes for a list of all keys
TRUST = typer.Option(
    "--trust-pickle", help="Load a .pkl or .pt2, which may run code in it; only for files that you trust."
)


def beginning(words: Callable[[], Iterable[str]]) -> Callable[[str], list[str]]:
    """A function that completes a word in a shell: it gives those of `words` that begin with it."""
    return lambda incomplete: [word for word in words() if word.startswith(incomplete)]


recipe_words = beginning(lambda: [*recipe_names(), *SEVERAL])
schedule_words = beginning(lambda: choices_of("training.schedules:SCHEDULES"))
data_words, device_words, arch_words = (
    beginning(lambda: DATA_SETS),
    beginning(lambda: DEVICES),
    beginning(architectures),
)
key_words = beginning(lambda: [f"{key}=" for key in all_keys()])
split_words = beginning(lambda: SPLITS)
shown_words = beginning(lambda: [*recipe_names(), KEYS])
Settings = Annotated[
    list[str] | None, typer.Option("--set", help="table.key=value; may be repeated.", autocompletion=key_words)
]
# What `run` trains, and `plan` plans.
Recipes = Annotated[
    list[str],
    typer.Argument(
        help="baseline, se, mixup, kd, teacher, small, small/kd, ablation, fast, table1, ..., or a .toml",
        autocompletion=recipe_words,
    ),
]
DataSet = Annotated[
    str, typer.Option(help="A data set's name, a folder, an .npz file or an archive.", autocompletion=data_words)
]
Labels = Annotated[Path | None, typer.Option(help="A .csv table with the labels of the images in the folder --data.")]
Arch = Annotated[
    str | None, typer.Option(help="Any timm architecture, in place of the recipe's.", autocompletion=arch_words)
]
TeacherOf = Annotated[
    str | None, typer.Option(help="A recipe, a run's folder, a file, or timm:NAME.", autocompletion=recipe_words)
]
FineTuneTeacher = Annotated[
    bool, typer.Option("--fine-tune-teacher", help="Train the teacher timm:NAME on the data first.")
]
Epochs = Annotated[int | None, typer.Option(help="Epochs of every stage, in place of the recipe's.")]
Schedule = Annotated[
    str | None, typer.Option(help="cosine, one-cycle, sgdr ..., for every stage.", autocompletion=schedule_words)
]
Seed = Annotated[int, typer.Option(help="Seed of the weights, the batches and the augmentation.")]
Seeds = Annotated[str | None, typer.Option(help="Several seeds, each trained: 0,1,2.")]
From = Annotated[
    str | None, typer.Option("--from", help="Begin from weights: a finished run's folder, or a .safetensors or .pth.")
]
BudgetOf = Annotated[
    str | None, typer.Option(help="Choose batch size, epochs and networks that train in 90s, 20m or 2h.")
]
Compare = Annotated[bool, typer.Option("--compare", help="Train each student without its teacher, too.")]
Out = Annotated[Path | None, typer.Option(help="Folder of the runs, instead of artifacts/DATA.")]


def _version(asked: bool) -> None:
    if asked:
        console.say(f"dms-fastai {__version__}")
        raise typer.Exit


@app.callback()
def about(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", help="Show the version and exit.", is_eager=True, callback=_version)
    ] = False,
) -> None:
    """Tiny residual networks, distilled: train, compare and export small image classifiers."""
    command = context.invoked_subcommand
    if processes.started() and command not in TRAINING:
        raise UserError(f"torchrun is for what trains, {either(TRAINING)}; start {command} without it")


@app.command()
def run(
    recipe: Recipes,
    data: DataSet = "digits",
    labels: Labels = None,
    arch: Arch = None,
    teacher: TeacherOf = None,
    fine_tune_teacher: FineTuneTeacher = False,
    epochs: Epochs = None,
    schedule: Schedule = None,
    seed: Seed = 0,
    seeds: Seeds = None,
    set_: Settings = None,
    from_: From = None,
    budget: BudgetOf = None,
    compare: Compare = False,
    only: Annotated[
        str | None, typer.Option(help="Of all these stages, train this one alone: a recipe's name.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be trained, and how long.")] = False,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or mps.", autocompletion=device_words)] = "auto",
    out: Out = None,
    time_limit: Annotated[str | None, typer.Option(help="Stop cleanly after 90s, 9m or 2h.")] = None,
    wait: Annotated[bool, typer.Option("--wait", help="Wait for stages that other processes train.")] = False,
    at_once: Annotated[int, typer.Option(min=1, help="How many stages to train side by side.")] = 1,
    restart: Annotated[bool, typer.Option("--restart", help="Begin again, in place of what these runs have.")] = False,
    checkpoint_steps: Annotated[int | None, typer.Option(min=1, help="Also checkpoint every so many steps.")] = None,
    keep_best: Annotated[bool, typer.Option("--keep-best", help="Also keep the weights of the best epoch.")] = False,
    tensorboard: Annotated[bool, typer.Option("--tensorboard", help="Also write the epochs for TensorBoard.")] = False,
    trust_pickle: Annotated[bool, TRUST] = False,
    deterministic: Annotated[bool, typer.Option("--deterministic", help="Repeatable on a GPU, but slower.")] = False,
    profile: Annotated[bool, typer.Option("--profile", help="Print where step time goes; trace a few steps.")] = False,
) -> None:
    """Train recipes and the teachers that they need, and print the results. After a stop, the same command resumes."""
    load = Load()
    deadline = None if time_limit is None else time.monotonic() + seconds_of(time_limit)
    if wait and restart:
        raise UserError("--wait is for stages that others train, and --restart trains them again; leave one out")
    wanted = _wanted(
        recipe,
        data,
        labels,
        arch,
        teacher,
        fine_tune_teacher,
        epochs,
        schedule,
        seed,
        seeds,
        set_,
        from_,
        budget,
        compare,
        out,
        only,
    )
    check_device(device)
    if at_once > 1 and processes.started():
        raise UserError("--at-once starts processes of its own; leave it out, or start the command without torchrun")
    found = wanted.resolved()  # whatever is mistyped is refused before torch is imported
    if from_ is not None:
        weights, folders = wanted.settings["model.weights"], _folders_from(wanted)
        short = f"--from is short for --set model.weights={weights}; " if found[0].prune is None else ""
        console.say(f"{short}the run goes to {folders[0].parent}")

    from .callbacks.replicate import rows_of
    from .runs.guards import refuse_other_recipe
    from .runs.machine import be_deterministic, choose_device
    from .runs.plan import Opened
    from .runs.stage import Manner
    from .runs.wait import Patience

    gc.freeze()
    processes.join_processes(device)
    manner = Manner(choose_device(device), deadline, restart, profile, checkpoint_steps, keep_best, tensorboard)
    if deterministic:
        be_deterministic()
    elif manner.device.type == "cpu" and at_once == processes.count() == 1 and "OMP_NUM_THREADS" not in os.environ:
        manner = replace(manner, threads=_choose_threads(load))
    if wait:
        manner = replace(manner, wait=Patience(console.say, deadline))
    if wanted.teacher is not None:
        _say_what_is_read(Path(wanted.teacher), trust_pickle)
    opened = Opened(wanted.data, trust_pickle)
    size = processes.count()

    def planned() -> "tuple[list[Stage], str | Path | None]":
        stages = _planned(wanted, opened, manner)
        for stage in stages:  # before anything is trained
            rows_of(stage.recipe.data.batch_size, size)
            if not restart:
                refuse_other_recipe(stage.recipe, stage.folder)
        return stages, opened.teaching

    stages, opened.teaching = processes.from_first(planned)
    students = _to_prune(stages, wanted, opened) if EDGE in recipe and only is None else []
    if dry_run:
        processes.from_first(lambda: _show_plan(stages, opened, manner))
        for stage in students:
            _foresee_pruning(stage, wanted, opened, manner)
        return
    if at_once > 1:
        flags = {"--restart": restart, "--wait": wait, "--trust-pickle": trust_pickle, "--deterministic": deterministic}
        flags |= {"--profile": profile, "--keep-best": keep_best, "--tensorboard": tensorboard}
        options = ["--data", str(wanted.data), "--device", device, *(flag for flag, given in flags.items() if given)]
        options += [] if checkpoint_steps is None else ["--checkpoint-steps", str(checkpoint_steps)]
        _train_at_once(stages, wanted.root, at_once, options, manner)
    else:
        _train_in_turn(stages, opened, manner)
    for seed in wanted.seeds:
        last = [stage for stage in stages if stage.seed == seed][-1].folder
        console.say(f"learner: {last.learner}")
        if keep_best:
            from .runs.best import describe_best

            console.say(f"best: {describe_best(last)}")
    if students:
        _show_steps([row for stage in students for row in _prune_and_export(stage, wanted, opened, manner)])
    processes.leave()


@app.command(name="plan")
def plan_commands(
    recipe: Recipes,
    data: DataSet = "digits",
    labels: Labels = None,
    arch: Arch = None,
    teacher: TeacherOf = None,
    fine_tune_teacher: FineTuneTeacher = False,
    epochs: Epochs = None,
    schedule: Schedule = None,
    seed: Seed = 0,
    seeds: Seeds = None,
    set_: Settings = None,
    from_: From = None,
    budget: BudgetOf = None,
    compare: Compare = False,
    out: Out = None,
    json: Annotated[bool, typer.Option("--json", help="As JSON, with what each command waits for.")] = False,
) -> None:
    """Print a command for each stage and seed that `run` would train, for xargs, Slurm, make ... Trains nothing.

    A teacher comes before its student, whose command waits for it. Other options of `run` may be added to each line.
    """
    from .runs.commands import commands_of

    wanted = _wanted(
        recipe,
        data,
        labels,
        arch,
        teacher,
        fine_tune_teacher,
        epochs,
        schedule,
        seed,
        seeds,
        set_,
        from_,
        budget,
        compare,
        out,
    )
    found = commands_of(wanted)
    if from_ is not None:
        _folders_from(wanted)
    if json:
        console.say(dumps([command.told() for command in found]))
        return
    for command in found:
        console.say(command.line)


def _wanted(
    recipe: list[str],
    data: str,
    labels: Path | None,
    arch: str | None,
    teacher: str | None,
    fine_tune_teacher: bool,
    epochs: int | None,
    schedule: str | None,
    seed: int,
    seeds: str | None,
    set_: list[str] | None,
    from_: str | None,
    budget: str | None,
    compare: bool,
    out: Path | None,
    only: str | None = None,
) -> Wanted:
    """What the options that `run` and `plan` share ask for."""
    data = os.path.expanduser(data)
    teacher = None if teacher is None else ",".join(map(os.path.expanduser, teacher.split(",")))
    settings = _settings(set_) | _labelled(labels)
    if from_ is not None:
        settings = _beginning(os.path.expanduser(from_), recipe, data, settings) | settings
    return Wanted(
        recipes=tuple(map(os.path.expanduser, recipe)),
        data=data,
        seeds=(seed,) if seeds is None else parse_seeds(seeds),
        out=None if out is None else _home(out),
        arch=arch,
        teacher=teacher,
        fine_tune_teacher=fine_tune_teacher,
        epochs=epochs,
        schedule=schedule,
        settings=settings,
        budget=None if budget is None else seconds_of(budget, "budget") / 60,
        compare=compare,
        only=only,
    )


def _folders_from(wanted: Wanted) -> list[Path]:
    """The folders of runs that begin --from another; a UserError if that would be written over."""
    from .runs.start_from import refuse_same_folder

    [recipe, *_] = wanted.resolved()
    folders = [wanted.folder(recipe, seed).path for seed in wanted.seeds]
    refuse_same_folder(wanted.settings["model.weights"], folders)
    return folders


def _planned(wanted: Wanted, opened: "Opened", manner: "Manner") -> "list[Stage]":
    """The stages to train, after a teacher that is awaited has finished."""
    from .runs.plan import plan
    from .runs.wait import UnfinishedError, wait_for

    while True:
        try:
            return plan(wanted, opened, manner.restart, manner.device)
        except UnfinishedError as teacher:
            if manner.wait is None:
                raise
            wait_for(teacher.folder, manner.wait)


@app.command()
def tune(
    recipe: Annotated[str, typer.Argument(help="A recipe or a .toml.", autocompletion=recipe_words)],
    over: Annotated[
        list[str],
        typer.Option(
            help="table.key=SPACE; may be repeated. SPACE: log(0.01,1), uniform(0,0.5), int(1,8) or [64,128].",
            autocompletion=key_words,
        ),
    ],
    trials: Annotated[int, typer.Option(min=1, help="How many there are to be, earlier ones among them.")] = 20,
    data: DataSet = "digits",
    labels: Labels = None,
    arch: Arch = None,
    teacher: TeacherOf = None,
    epochs: Epochs = None,
    schedule: Schedule = None,
    seed: Seed = 0,
    set_: Settings = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or mps.", autocompletion=device_words)] = "auto",
    out: Annotated[Path | None, typer.Option(help="Folder of the search, instead of artifacts/DATA/tune.")] = None,
    time_limit: Annotated[str | None, typer.Option(help="Stop cleanly after 90s, 9m or 2h.")] = None,
    trust_pickle: Annotated[bool, TRUST] = False,
) -> None:
    """Search for the best values of a recipe's keys, judged by training images that are held out: a tenth of them.

    Trials that are behind the others end early. After a stop, the same command goes on. It needs the package optuna.
    """
    from .runs.spaces import parse_space, searched

    load = Load()
    deadline = None if time_limit is None else time.monotonic() + seconds_of(time_limit)
    spaces = [parse_space(text) for text in over]
    wanted = _wanted(
        [recipe], data, labels, arch, teacher, False, epochs, schedule, seed, None, set_, None, None, False, out
    )
    check_device(device)
    wanted = searched(wanted, spaces)
    if find_spec("optuna") is None:
        raise UserError("tune needs one more package: pip install optuna, or 'dms-fastai[tune]'")

    from .runs.machine import choose_device
    from .runs.plan import Opened
    from .runs.stage import Manner
    from .runs.tune import tune as search

    gc.freeze()
    manner = Manner(choose_device(device), deadline)
    if manner.device.type == "cpu" and "OMP_NUM_THREADS" not in os.environ:
        manner = replace(manner, threads=_choose_threads(load))
    if wanted.teacher is not None:
        _say_what_is_read(Path(wanted.teacher), trust_pickle)
    found, reason = search(wanted, spaces, trials, Opened(wanted.data, trust_pickle), manner, console)
    _show_trials(found)
    if reason is not None and len(found) < trials:
        _stopped(reason, f"{len(found)} of {trials} trials", False)


def _show_trials(found: "list[Trial]") -> None:
    """The best trials as a table, and the best one's settings as `run` takes them."""
    from .show import toml_value

    if not found:
        return
    best = found[0]
    listing = Table("trial", *best.settings, "accuracy, %", "", box=SIMPLE_HEAD)
    for trial in found[:BEST]:
        right = "" if trial.accuracy is None else f"{100 * trial.accuracy:.2f}"
        state = "" if trial.state == "finished" else trial.state
        listing.add_row(str(trial.number), *map(toml_value, trial.settings.values()), right, state)
    console.print(listing)
    if len(found) > BEST:
        console.say(f"the {BEST} best of {len(found)} trials")
    if best.state == "finished":
        settings = " ".join(f"--set {quote(f'{key}={toml_value(value)}')}" for key, value in best.settings.items())
        console.say(f"best, by {best.images:,} held-out images and one seed: {settings}")


@app.command()
def prune(
    learner: Annotated[str, typer.Argument(help="A run's folder, a .safetensors file of this package, or dmsresnet.")],
    macs: Annotated[float, typer.Option(help="Multiply-accumulates that are left, as a share.")] = 0.5,
    data: Annotated[
        str | None,
        typer.Option(help="As in run. A run on a data set with a name takes that.", autocompletion=data_words),
    ] = None,
    labels: Annotated[Path | None, typer.Option(help="As in run.")] = None,
    teacher: Annotated[str | None, typer.Option(help="As in run, in place of the network that is pruned.")] = None,
    epochs: Annotated[int | None, typer.Option(help="Epochs, in place of the recipe's.")] = None,
    from_scratch: Annotated[
        bool, typer.Option("--from-scratch", help="Train the same network from fresh weights, to compare.")
    ] = False,
    seed: Annotated[int | None, typer.Option(help="As in run; by default that of the run that is pruned.")] = None,
    set_: Settings = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="As in run.")] = False,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or mps.", autocompletion=device_words)] = "auto",
    out: Annotated[Path | None, typer.Option(help="As in run.")] = None,
    time_limit: Annotated[str | None, typer.Option(help="As in run.")] = None,
    restart: Annotated[bool, typer.Option("--restart", help="As in run.")] = False,
) -> None:
    """Make a residual network faster: prune the insides of its blocks, and train what is left with it as the teacher.

    Short for `run prune --from RUN`, or `run prune/scratch`. After a stop, the same command resumes.
    """
    source = _home(Path(learner))
    if not _check_model(source):
        raise UserError(f"{source} holds no finished run; give the folder of one, or a file of weights")
    folder = RunFolder(source if source.is_dir() else source.parent)
    if seed is None:
        seed = folder.facts().seed if source.exists() and folder.facts_file.is_file() else 0
    run(
        ["prune/scratch" if from_scratch else "prune"],
        data=own_data(source, "prune with") if data is None else data,
        labels=labels,
        teacher=teacher,
        epochs=epochs,
        seed=seed,
        set_=[f"prune.macs={macs}", *(set_ or [])],
        from_=str(source),
        dry_run=dry_run,
        device=device,
        out=out,
        time_limit=time_limit,
        restart=restart,
    )


def _choose_threads(load: Load) -> int:
    """The number of threads to train with, in a line if it is not torch's own; torch then has it, too."""
    import torch

    most, free = torch.get_num_threads(), load.free()
    threads = fitting(free, most)
    if threads < most:
        console.say(
            f"others leave {free:.1f} of {most} cores free: computing with {threads} thread{'s' * (threads > 1)}; "
            f"OMP_NUM_THREADS={most} takes all"
        )
        torch.set_num_threads(threads)
    return threads


def _train_in_turn(stages: "list[Stage]", opened: "Opened", manner: "Manner") -> None:
    from .run_folder import Run
    from .runs.advice import teacher_advice
    from .runs.progress import ahead
    from .runs.stage import run_stage

    runs: dict[Path, Run] = {}
    several = len({stage.seed for stage in stages}) > 1
    for place, stage in enumerate(stages, start=1):
        if several:
            console.say(f"seed {stage.seed}")
        teacher = None if stage.teacher is None else RunFolder(Path(stage.teacher))
        if teacher is not None and teacher.finished and teacher.path not in runs:
            runs[teacher.path] = Run.read(teacher.path)
            facts = runs[teacher.path].facts
            epochs = f"{facts.epochs_done} epoch{'s' * (facts.epochs_done != 1)}"
            known = "" if facts.last is None else f": {100 * facts.last.valid_accuracy:.2f} % after {epochs}"
            console.say(f"taught by the finished run in {teacher.path}{known}")
        to_come = ahead(stages[place:], stages[: place - 1], manner.restart)
        result = run_stage(stage, opened, replace(manner, ahead=to_come), console)
        reason = result.facts.stopped_by
        if reason is not None and (not result.finished or place < len(stages)):
            _stopped(reason, f"{result.facts.title}, {result.state or 'finished'}", manner.restart)
        runs[stage.folder.path] = result
        if teacher is not None and teacher.path in runs and stage.recipe.prune is None:
            for line in teacher_advice(result.facts, runs[teacher.path].facts):
                notice(line)
    if processes.is_first():
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


def _to_prune(stages: "list[Stage]", wanted: Wanted, opened: "Opened") -> "list[Stage]":
    """The stages whose students `run edge` prunes when they have been trained."""
    from .edge import check_student

    if processes.count() > 1:
        raise UserError("edge prunes and exports in one process; train kd with torchrun, then run edge without it")
    [name] = recipes_of(EDGE)
    students = [stage for stage in stages if stage.recipe.name == name]
    check_student(students[0].recipe, opened.sets(students[0].recipe), wanted.prune_recipe().prune.macs)
    return students


def _prune_and_export(student: "Stage", wanted: Wanted, opened: "Opened", manner: "Manner") -> "list[Row]":
    """What `run edge` does with a finished student; gives what was measured of its files."""
    from .edge import files_of

    [pruned] = _planned(wanted.pruning(student.folder, student.seed), opened, manner)
    _train_in_turn([pruned], opened, manner)
    rows = files_of([student.folder, pruned.folder], opened.sets(student.recipe), console.say)
    return [replace(row, name=f"{row.name}, seed {student.seed}") if len(wanted.seeds) > 1 else row for row in rows]


def _show_steps(rows: "Sequence[Row]") -> None:
    import numpy as np

    from .export.measure import BATCH

    listing = Table("run", "format", "MB", "MACs", "accuracy, %", "ms", f"ms of {BATCH}", box=SIMPLE_HEAD)
    listing.padding, listing.show_edge, listing.columns[0].overflow = 0, False, "fold"
    for column in listing.columns[2:]:
        column.justify = "right"
    for row in rows:
        times = (f"{np.median(taken):.3g}" for taken in (row.one, row.many))
        macs = f"{row.macs / 1e6:,.1f} M"
        listing.add_row(row.name, row.format, f"{row.size / 1e6:.2f}", macs, f"{100 * row.accuracy:.2f}", *times)
    console.print(listing)
    console.say(f"ms: processor time of an image on one thread, alone and in a batch of {BATCH}; the median of several")


def _foresee_pruning(student: "Stage", wanted: Wanted, opened: "Opened", manner: "Manner") -> None:
    if student.folder.finished and not manner.restart:
        _show_plan(_planned(wanted.pruning(student.folder, student.seed), opened, manner), opened, manner)
        return
    recipe = wanted.prune_recipe()
    console.say(
        f"then {wanted.pruned_folder(student.recipe, student.seed).path}: pruned to {100 * recipe.prune.macs:.3g} % of "
        f"the MACs, {recipe.schedule.epochs} epochs; and both as files, in float and in int8"
    )


def _show_plan(stages: "list[Stage]", opened: "Opened", manner: "Manner") -> None:
    from .runs.foresee import foreseen

    said, table = foreseen(stages, opened, manner.device, manner.restart)
    for line in said[:-1]:
        console.say(line)
    console.print(table)
    console.say(said[-1])


def _stopped(reason: str, state: str, restart: bool) -> None:
    again = "without --restart the same command" if restart else "the same command"
    console.say(f"stopped ({reason}): {state}; {again} goes on from there")
    processes.leave()
    raise typer.Exit(EXIT_CODES[reason])


@app.command()
def recipes() -> None:
    """List the recipes and what each adds to the one before."""
    from .show import toml_value

    for name in recipe_names():
        chain = ablation_of(name)
        base = f", extends {chain[-2]}" if len(chain) > 1 else ""
        console.say(f"{name}: {load_recipe(name).title}{base}")
        for key, value in flat(added_by(name)).items():
            console.say(f"    {key} = {toml_value(value)}")
    console.say(f"{either(SEVERAL)} in a command stands for several of them")


@app.command()
def show(
    recipe: Annotated[
        str, typer.Argument(help="A recipe or a .toml; or the word keys, for all keys.", autocompletion=shown_words)
    ],
    data: Annotated[
        str | None, typer.Option(help="A data set, to which the recipe may adapt.", autocompletion=data_words)
    ] = None,
    set_: Settings = None,
) -> None:
    """Print a whole recipe as TOML: what each key means, and which file its value comes from; or list all keys."""
    from .show import annotated, list_of_keys

    if recipe == KEYS and (data is not None or set_):
        raise UserError("show keys lists all keys; leave --data and --set out, or name a recipe")
    name = "" if data is None else source_name(os.path.expanduser(data))
    text = list_of_keys() if recipe == KEYS else annotated(os.path.expanduser(recipe), name, _settings(set_))
    console.print(text, end="", soft_wrap=True)


@app.command()
def models() -> None:
    """List this package's architectures: parameters for 10 classes, and multiply-accumulates for one image."""
    listing = Table("model", "parameters", "MACs", "what it is", box=SIMPLE_HEAD, padding=0, show_edge=False)
    for column in listing.columns[:3]:
        column.no_wrap = True
    for column in listing.columns[1:3]:
        column.justify = "right"
    for entry in entries():
        weights = f"; with weights, {entry.weights}" if entry.weights else ""
        listing.add_row(entry.name, entry.parameters, entry.macs, entry.what + weights)
    console.print(listing)
    console.print("Any other timm architecture works as well: dms-fastai run se --arch resnet18")


@app.command("lr-find")
def lr_find(
    recipe: Annotated[str, typer.Argument(help="A recipe or a .toml.", autocompletion=recipe_words)],
    data: Annotated[str, typer.Option(help="As in run.", autocompletion=data_words)] = "digits",
    labels: Annotated[Path | None, typer.Option(help="As in run.")] = None,
    arch: Annotated[str | None, typer.Option(help="As in run.", autocompletion=arch_words)] = None,
    teacher: Annotated[str | None, typer.Option(help="As in run.", autocompletion=recipe_words)] = None,
    seed: Annotated[int, typer.Option(help="As in run.")] = 0,
    set_: Settings = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or mps.", autocompletion=device_words)] = "auto",
    out: Annotated[Path, typer.Option(help="The plot, a .png.")] = Path("lr-find.png"),
    trust_pickle: Annotated[bool, TRUST] = False,
) -> None:
    """Look for a learning rate, as fastai's lr_find does: a plot, and a line to paste. Takes a hundred steps.

    A teacher takes part if it is at hand. No run is written.
    """
    load = Load()
    out, data = _home(out), os.path.expanduser(data)
    if out.suffix != ".png":
        raise UserError(f"{out} is no name of a plot; give --out NAME.png")
    if recipe in SEVERAL:
        raise UserError("lr-find takes one recipe; baseline, se, mixup and kd are those of the ablation")
    wanted = Wanted(
        recipes=(os.path.expanduser(recipe),),
        data=data,
        seeds=(seed,),
        arch=arch,
        teacher=None if teacher is None else ",".join(map(os.path.expanduser, teacher.split(","))),
        settings=_settings(set_) | _labelled(labels),
    )
    check_device(device)
    wanted.resolved()

    from .runs.lr_find import STEPS, find_rates, plot_rates, without_untrained_teacher
    from .runs.machine import choose_device
    from .runs.plan import Opened, plan

    opened, on = Opened(data, trust_pickle), choose_device(device)
    if on.type == "cpu" and "OMP_NUM_THREADS" not in os.environ:
        _choose_threads(load)
    *_, planned = plan(wanted, opened, device=on)
    stage = without_untrained_teacher(planned)
    if stage is not planned:
        console.say(f"without the teacher, which has not been trained: {planned.teacher}")
    console.say(f"{STEPS} steps of {stage.recipe.data.batch_size} images with {stage.recipe.model.name}")
    with _bar() as bar:
        task = bar.add_task("looking", total=STEPS)
        found = find_rates(stage, opened, on, lambda: bar.advance(task))
    plot_rates(found, stage.recipe.optimizer.lr, f"{stage.recipe.title} on {source_name(data)}", out)
    console.say(f"plot: {out}")
    console.say(f"--set optimizer.lr={found.suggested:.2g}")


@app.command()
def predict(
    learner: Annotated[
        Path, typer.Argument(help="A learner.pkl, a model.safetensors, a run's folder, dmsresnet, or an exported file.")
    ],
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
    with _bar() as bar:
        yield from bar.track(found, total=images, description="classifying")


def _bar() -> Progress:
    """A bar on standard error, if that is a terminal; it leaves no trace."""
    return Progress(
        console=errors, transient=True, redirect_stdout=False, redirect_stderr=False, disable=not errors.is_terminal
    )


def _unread(bad: list[UserError], images: int) -> UserError:
    """Print why images could not be read; gives the error that says how many these were, or the reason if it is all."""
    if images == 1:
        return bad[0]
    for error in bad:
        errors.say(error.message)
    return UserError(f"{len(bad):,} of {images:,} images could not be read")


@app.command()
def evaluate(
    learner: Annotated[
        Path,
        typer.Argument(
            help="A run's folder, a .safetensors, a learner.pkl, an exported file, dmsresnet, or timm:NAME."
        ),
    ],
    data: Annotated[
        str | None,
        typer.Option(help="As in run. A run on a data set with a name takes that.", autocompletion=data_words),
    ] = None,
    split: Annotated[
        str | None,
        typer.Option(help="test, val or train; test by default, or val if there is none.", autocompletion=split_words),
    ] = None,
    labels: Annotated[Path | None, typer.Option(help="As in run.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or mps.", autocompletion=device_words)] = "auto",
    tta: Annotated[bool, typer.Option("--tta", help="Average the answers to each image and its mirror image.")] = False,
    trust_pickle: Annotated[bool, TRUST] = False,
) -> None:
    """Measure a model on labelled images: accuracy, loss, and the accuracy in each class, the worst first."""
    learner = _home(learner)
    if split is not None and split not in SPLITS:
        raise UserError(f"split is {split!r}; it must be {either(SPLITS)}")
    check_device(device)
    timms = str(learner).startswith(TIMM)
    if timms and not is_architecture(network := str(learner).removeprefix(TIMM)):
        raise unknown("timm model", network, architectures())
    if not timms and not _check_model(learner):
        from .export import open_model

        open_model(learner, trust_pickle)  # says what is missing
    data = own_data(learner, "evaluate on") if data is None else os.path.expanduser(data)
    name = source_name(data)

    from .evaluate import evaluate_model
    from .runs.machine import choose_device

    def track(batches: "Sequence[Tensor]") -> "Iterable[Tensor]":
        with _bar() as bar:
            yield from bar.track(batches, description="classifying")

    _say_what_is_read(learner, trust_pickle)
    labels = None if labels is None else _home(labels)
    found = evaluate_model(learner, data, split, labels, choose_device(device), trust_pickle, track, tta)
    listing = Table("class", "images", "accuracy, %")
    for column in listing.columns[1:]:
        column.justify = "right"
    for of_class in found.classes[:WORST]:
        listing.add_row(of_class.name, f"{of_class.images:,}", f"{100 * of_class.accuracy:.2f}")
    console.print(listing)
    rest = found.classes[WORST:]
    if rest:
        console.say(f"and {len(rest)} more classes, {100 * rest[0].accuracy:.2f} % or better")
    told = f"accuracy: {100 * found.accuracy:.2f} %, loss: {found.loss:.4f}"
    told += ", averaged with mirror images (--tta)" if tta else ""
    console.say(f"{told}, of {found.images:,} images: {name}, {found.split}")


@app.command()
def export(
    learner: Annotated[Path, typer.Argument(help="A learner.pkl, a model.safetensors, a run's folder, or dmsresnet.")],
    file: Annotated[Path, typer.Argument(help="NAME.onnx, NAME.int8.onnx, NAME.pt2, NAME.pte or NAME.int8.pte.")],
    data: Annotated[
        str | None,
        typer.Option(help="For int8: the images, as in run. A run has its own.", autocompletion=data_words),
    ] = None,
    calibrate: Annotated[int, typer.Option(min=1, help="For int8: how many training images to calibrate with.")] = 200,
    tolerance: Annotated[float, typer.Option(min=0, max=100, help="For int8: points of accuracy it may lose.")] = 0.5,
    trust_pickle: Annotated[bool, TRUST] = False,
) -> None:
    """Write a model for other runtimes: pixels go in, probabilities come out.

    NAME.int8.onnx and NAME.int8.pte are calibrated with training images, compared with the float model on the
    validation images, and refused if they lose too much.
    """
    learner, file = _home(learner), _home(file)
    there, formats = _check_model(learner), choices_of("export.formats:FORMATS")
    int8 = check_format(file, formats).startswith(INT8)
    if not int8 and data is not None:
        small = next((e for e in formats if e.startswith(INT8) and e.endswith(file.suffix)), f"{INT8}onnx")
        raise UserError(f"--data is for int8, and {file} is not; call it {file.stem}{small}, or leave --data out")
    if int8 and there:
        data = own_data(learner, "calibrate with") if data is None else os.path.expanduser(data)
        source_name(data)  # refuses what is no data set

    from .export import export_model

    _say_what_is_read(learner, trust_pickle)
    written = export_model(learner, file, trust_pickle, data, calibrate, tolerance, _show_compared)
    console.say(f"{written}: {written.stat().st_size / 1e6:.1f} MB")


def _show_compared(rows: "Sequence[Compared]") -> None:
    listing = Table("", "accuracy, %", "agreement, %", "NLL", "sums off", "MB", "ms", box=SIMPLE_HEAD)
    for column in listing.columns[1:]:
        column.justify = "right"
    for row in rows:
        shares = (f"{100 * share:.2f}" for share in (row.answers.accuracy, row.agreement))
        losses = (f"{row.answers.nll:.4f}", f"{row.answers.sum_error:.0e}")
        listing.add_row(row.name, *shares, *losses, f"{row.size / 1e6:.2f}", f"{row.milliseconds:.3g}")
    console.print(listing)
    console.say(
        f"on {len(rows[0].answers.labels):,} validation images; agreement: the same class as float; sums off: how far "
        f"the sum of an image's probabilities is from 1, at most; ms: processor time of one image, on one thread"
    )


@app.command()
def bench(
    files: Annotated[list[Path], typer.Argument(help="Exported files: .onnx, .int8.onnx, .pt2, .pte, .int8.pte.")],
    data: Annotated[
        str | None, typer.Option(help="As in run: measure the accuracy, too.", autocompletion=data_words)
    ] = None,
    arch: Annotated[
        str | None, typer.Option(help="NAME,NAME: untrained architectures of timm beside.", autocompletion=arch_words)
    ] = None,
    png: Annotated[Path | None, typer.Option(help="Draw accuracy against time; needs --data.")] = None,
    trust_pickle: Annotated[bool, TRUST] = False,
) -> None:
    """Compare exported files: size, multiply-accumulates, accuracy and time, each in its own runtime on one thread."""
    files, formats = [_home(file) for file in files], choices_of("export.formats:FORMATS")
    for file in files:
        check_format(file, formats, "run")
        if not file.is_file():
            raise UserError(f"no such file: {file}")
    archs = [] if arch is None else [name.strip() for name in arch.split(",")]
    for name in archs:
        if not is_architecture(name):
            raise unknown("timm model", name, architectures())
    png, data = None if png is None else _home(png), None if data is None else os.path.expanduser(data)
    if png is not None and png.suffix != ".png":
        raise UserError(f"{png} is no name of a plot; give --png NAME.png")
    if png is not None and data is None:
        raise UserError("--png draws accuracy, which needs images; give --data as well")
    if data is not None:
        source_name(data)  # refuses what is no data set

    import numpy as np

    from .bench import bench as measured
    from .bench import plot
    from .export.measure import BATCH

    rows = measured(files, archs, data, trust_pickle)
    listing = Table(
        "file", "format", "MB", "MACs", "accuracy, %", "ms", "p95", f"ms of {BATCH}", "p95", box=SIMPLE_HEAD
    )
    listing.columns[0].overflow = "fold"
    for column in listing.columns[2:]:
        column.justify = "right"
    for row in rows:
        macs = "" if row.macs is None else f"{row.macs / 1e6:,.1f} M"
        right = "untrained" if not row.trained else "" if row.accuracy is None else f"{100 * row.accuracy:.2f}"
        times = (f"{np.percentile(taken, share):.3g}" for taken in (row.one, row.many) for share in (50, 95))
        listing.add_row(row.name, row.format, f"{row.size / 1e6:.2f}", macs, right, *times)
    console.print(listing)
    console.say(
        f"ms: processor time of one image on one thread, alone and in a batch of {BATCH}; the median of several calls, "
        f"and p95, which one call in twenty exceeds"
    )
    if png is not None:
        plot(rows, png)
        console.say(f"plot: {png}")


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
    from .report.shipped import shipped

    theirs = shipped()
    _show(runs, theirs)
    for problem in problems:
        console.say(f"left out: {problem.what}")
    page = write_report(sections(runs, theirs), problems, _home(out))
    console.say(f"report: {page}")


def _show(runs: "Iterable[Run]", shipped: Collection[Path] = ()) -> None:
    """Print the tables of runs, and what each stage gained over the one before; of those shipped, only their number."""
    from .report.rows import sections
    from .report.tables import difference_lines, table

    found = sections(runs, shipped)
    for section in found:
        if not section.shipped:
            console.print(table(section))
            for line in difference_lines(section.differences):
                console.print(line)
    theirs = sum(len(row.runs) for section in found if section.shipped for row in section.rows)
    if theirs:
        console.say(f"runs that came with the package: {theirs}, at the end of the page")


def _settings(texts: list[str] | None) -> dict[str, Any]:
    """What the options --set say."""
    return dict(parse_setting(text) for text in texts or [])


def _beginning(source: str, recipes: list[str], data: str, settings: dict[str, Any]) -> dict[str, Any]:
    """The settings that --from is short for."""
    from .runs.start_from import settings_from

    if len(recipes) > 1 or recipes[0] in SEVERAL:
        raise UserError("--from is for one recipe; give the others commands of their own")
    if "model.weights" in settings:
        raise UserError("--from and --set model.weights say the same thing; leave one out")
    return settings_from(source, load_recipe(os.path.expanduser(recipes[0]), source_name(data), None, settings))


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


def _tell_for_all(message: str) -> None:
    """Say what has ended the command; of several processes, which all end then, the first to know it does."""
    if processes.first_to_tell():
        errors.quiet = False
        errors.say(f"dms-fastai: {message}")


def main() -> None:
    """Run the console script. An error that the user can fix gives one line and exit code 2."""
    any_encoding()
    gc.freeze()  # what is imported stays, so that no collection, a fifth of a second, need look at it
    console.quiet = errors.quiet = processes.started() and os.environ["RANK"] != "0"
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            app()
    except UserError as error:
        _tell_for_all(error.message)
        sys.exit(EXIT_CODES["time limit"] if isinstance(error, TryAgainError) else 2)
    except UnicodeEncodeError as error:
        errors.say(f"dms-fastai: the name {error.object} is not UTF-8, and a file has to hold it; rename it")
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(EXIT_CODES["SIGINT"])
    except RuntimeError as error:
        if not processes.lost_another(error):
            raise
        _tell_for_all("one of the processes has ended; the same command goes on from the last checkpoint")
        sys.exit(2)
    except OSError as error:  # a folder that cannot be written, a full disk
        kept = "; what was finished is kept: make room, and the same command goes on" if error.errno == ENOSPC else ""
        _tell_for_all(f"{error}{kept}")
        sys.exit(2)


if __name__ == "__main__":  # python -m dms_fastai.cli, as well as python -m dms_fastai
    main()
