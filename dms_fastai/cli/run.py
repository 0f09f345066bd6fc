"""Commands that train what they are told to: run, plan, prune."""

import gc
import math
import os
import time
from collections.abc import Sequence
from dataclasses import replace
from json import dumps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.box import SIMPLE_HEAD
from rich.table import Table

from .. import processes
from ..clock import seconds_of
from ..errors import UserError, notice
from ..files import check_folder
from ..names import check_device, check_tensorboard
from ..recipes import ALONE, Recipe
from ..run_folder import RunFolder, own_data
from ..runs.threads import Load
from ..runs.wanted import EDGE, Wanted, recipes_of
from .app import EXIT_CODES, app, console
from .common import choose_threads, say_what_is_read, show_runs, stopped
from .options import (
    TRUST,
    Arch,
    BudgetOf,
    Compare,
    DataSet,
    Epochs,
    FineTuneTeacher,
    From,
    Labels,
    Out,
    Recipes,
    Schedule,
    Seed,
    Seeds,
    Settings,
    TeacherOf,
    check_model,
    data_words,
    device_words,
    home,
    refuse_twice,
    wanted_by,
)

if TYPE_CHECKING:
    from ..bench import Row
    from ..runs.plan import Opened, Stage
    from ..runs.stage import Manner


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
    seed: Seed = None,
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
    into: Annotated[Path | None, typer.Option(hidden=True)] = None,  # for the processes of --at-once
    parent: Annotated[int | None, typer.Option(hidden=True)] = None,
) -> None:
    """Train recipes and the teachers that they need, and print the results. After a stop, the same command resumes."""
    load = Load()
    deadline = None if time_limit is None else time.monotonic() + seconds_of(time_limit)
    if wait and restart:
        raise UserError("--wait is for stages that others train, and --restart trains them again; leave one out")
    wanted = wanted_by(
        recipe,
        data,
        labels=labels,
        arch=arch,
        teacher=teacher,
        fine_tune_teacher=fine_tune_teacher,
        epochs=epochs,
        schedule=schedule,
        seed=seed,
        seeds=seeds,
        set_=set_,
        from_=from_,
        budget=budget,
        compare=compare,
        out=out,
        only=only,
    )
    wanted = replace(wanted, into=into)
    check_device(device)
    if tensorboard:
        check_tensorboard()
    if at_once > 1 and processes.started():
        raise UserError("--at-once starts processes of its own; leave it out, or start the command without torchrun")
    found = wanted.resolved()  # whatever is mistyped is refused before torch is imported
    if not dry_run:
        _check_folders(wanted, found, at_once)
    if from_ is not None:
        weights, folders = wanted.settings["model.weights"], _folders_from(wanted)
        short = f"--from is short for --set model.weights={weights}; " if found[0].prune is None else ""
        console.say(f"{short}the run goes to {folders[0].parent}")

    from ..runs.guards import refuse_other_recipe
    from ..runs.machine import be_deterministic, choose_device
    from ..runs.plan import Opened
    from ..runs.stage import Manner
    from ..runs.wait import Patience

    gc.freeze()
    processes.join_processes(device)
    manner = Manner(
        device=choose_device(device),
        deadline=deadline,
        restart=restart,
        profile=profile,
        checkpoint_steps=checkpoint_steps,
        keep_best=keep_best,
        tensorboard=tensorboard,
        wait=Patience(console.say, deadline) if wait else None,
        parent=parent,
    )
    if deterministic:
        be_deterministic()
    elif manner.device.type == "cpu" and at_once == processes.count() == 1 and "OMP_NUM_THREADS" not in os.environ:
        manner = replace(manner, threads=choose_threads(load))
    if wanted.teacher is not None:
        say_what_is_read(Path(wanted.teacher), trust_pickle)
    opened = Opened(wanted.data, trust_pickle)
    size = processes.count()

    def planned() -> "tuple[list[Stage], str | Path | None]":
        stages = _planned(wanted, opened, manner)
        for stage in stages:  # before anything is trained
            images = len(opened.sets(stage.recipe).trained) if size > 1 else math.inf
            processes.rows_of(min(stage.recipe.data.batch_size, images), size)
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
        _train_in_turn(stages, opened, manner, more=bool(students))
    for seed in wanted.seeds:
        own = [stage for stage in stages if stage.seed == seed]
        taught = [stage for stage in own if not stage.recipe.name.endswith(ALONE)]
        last = (taught or own)[-1].folder
        console.say(f"learner: {last.learner}")
        if keep_best:
            from ..runs.best import describe_best

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
    seed: Seed = None,
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
    from ..runs.commands import commands_of

    wanted = wanted_by(
        recipe,
        data,
        labels=labels,
        arch=arch,
        teacher=teacher,
        fine_tune_teacher=fine_tune_teacher,
        epochs=epochs,
        schedule=schedule,
        seed=seed,
        seeds=seeds,
        set_=set_,
        from_=from_,
        budget=budget,
        compare=compare,
        out=out,
    )
    found = commands_of(wanted)
    if from_ is not None:
        _folders_from(wanted)
    if json:
        console.say(dumps([command.told() for command in found]))
        return
    for command in found:
        console.say(command.line)


def _folders_from(wanted: Wanted) -> list[Path]:
    """The folders of runs that begin --from another; a UserError if that would be written over."""
    from ..runs.start_from import refuse_same_folder

    [recipe, *_] = wanted.resolved()
    folders = [wanted.folder(recipe, seed).path for seed in wanted.seeds]
    refuse_same_folder(wanted.settings["model.weights"], folders)
    return folders


def _check_folders(wanted: Wanted, recipes: list[Recipe], at_once: int) -> None:
    """Raise a UserError if a folder cannot be written that the command is going to write."""
    if not os.path.isdir(wanted.root):
        check_folder(wanted.root)
    if at_once > 1:
        check_folder(wanted.root / "logs")
    for recipe in wanted.needed(recipes):
        teacher = wanted.teacher_of(recipe)
        for seed in wanted.seeds:
            check_folder(wanted.folder(recipe, seed).path)
            taught_by = wanted.folder(teacher, seed, teacher=True) if isinstance(teacher, Recipe) else None
            if taught_by is not None and not taught_by.finished:
                check_folder(taught_by.path)


def _planned(wanted: Wanted, opened: "Opened", manner: "Manner") -> "list[Stage]":
    """The stages to train, after a teacher that is awaited has finished."""
    from ..runs.plan import plan
    from ..runs.wait import UnfinishedError, wait_for

    while True:
        try:
            return plan(wanted, opened, manner.restart, manner.device)
        except UnfinishedError as teacher:
            if manner.wait is None:
                raise
            wait_for(teacher.folder, manner.wait)


@app.command()
def prune(
    learner: Annotated[str, typer.Argument(help="A run's folder, a .safetensors file of this package, or dmsresnet.")],
    macs: Annotated[
        float | None, typer.Option(help="Multiply-accumulates that are left, as a share; 0.5 by default.")
    ] = None,
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
    checkpoint_steps: Annotated[int | None, typer.Option(min=1, help="As in run.")] = None,
) -> None:
    """Make a residual network faster: prune the insides of its blocks, and train what is left with it as the teacher.

    Short for `run prune --from RUN`, or `run prune/scratch`. After a stop, the same command resumes.
    """
    refuse_twice(set_, {"prune.macs": ("--macs", macs), "prune.from_scratch": ("--from-scratch", from_scratch or None)})
    source = home(Path(learner))
    if not check_model(source):
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
        set_=[*([] if macs is None else [f"prune.macs={macs}"]), *(set_ or [])],
        from_=str(source),
        dry_run=dry_run,
        device=device,
        out=out,
        time_limit=time_limit,
        restart=restart,
        checkpoint_steps=checkpoint_steps,
    )


def _train_in_turn(stages: "list[Stage]", opened: "Opened", manner: "Manner", more: bool = False) -> None:
    """Train stages one after another, and print their results; `more`: the command has more to do afterwards."""
    from ..run_folder import Run
    from ..runs.advice import teacher_advice
    from ..runs.progress import ahead
    from ..runs.stage import run_stage, tidy_finished

    runs: dict[Path, Run] = {}
    several = len({stage.seed for stage in stages}) > 1
    for place, stage in enumerate(stages, start=1):
        if several:
            console.say(f"seed {stage.seed}")
        teacher = None if stage.teacher is None else RunFolder(Path(stage.teacher))
        if teacher is not None and teacher.finished and teacher.path not in runs:
            tidy_finished(teacher)  # if it was killed after its last word
            runs[teacher.path] = Run.read(teacher.path)
            facts = runs[teacher.path].facts
            epochs = f"{facts.epochs_done} epoch{'s' * (facts.epochs_done != 1)}"
            known = "" if facts.last is None else f": {100 * facts.last.valid_accuracy:.2f} % after {epochs}"
            console.say(f"taught by the finished run in {teacher.path}{known}")
        to_come = ahead(stages[place:], stages[: place - 1], manner.restart)
        result = run_stage(stage, opened, replace(manner, ahead=to_come), console)
        reason = result.facts.stopped_by
        if reason is not None and (not result.finished or place < len(stages) or more):
            later = [stage.recipe.name for stage in stages[place:] if manner.restart and stage.folder.finished]
            stopped(reason, f"{result.facts.title}, {result.state or 'finished'}", manner.restart, later)
        runs[stage.folder.path] = result
        if teacher is not None and teacher.path in runs and stage.recipe.prune is None:
            for line in teacher_advice(result.facts, runs[teacher.path].facts):
                notice(line)
    if processes.is_first():
        show_runs(runs.values())


def _train_at_once(stages: "list[Stage]", root: Path, at_once: int, options: list[str], manner: "Manner") -> None:
    from ..run_folder import Run
    from ..runs.at_once import Job, complain, train_at_once
    from ..runs.stage import add_to_finished

    jobs = [Job(stage, root) for stage in stages]
    for job in jobs:
        if job.complete and not manner.restart:
            add_to_finished(job.stage, manner, console)
    threads = None if manner.device.type != "cpu" else max((os.cpu_count() or 1) // at_once, 1)
    reason = train_at_once(jobs, at_once, options, manner.deadline, console, threads, manner.restart)
    folders = [folder for job in jobs for folder in (job.stage.teacher, job.stage.folder.path)]
    runs = [RunFolder(Path(path)) for path in dict.fromkeys(folder for folder in folders if folder is not None)]
    show_runs(Run.read(run.path) for run in runs if run.facts_file.is_file())
    code = complain(jobs, EXIT_CODES.values(), console)
    if code:
        raise typer.Exit(code)
    unfinished = [job.state() for job in jobs if not job.stage.folder.finished or (manner.restart and job.code is None)]
    if unfinished:
        codes = {code: reason for reason, code in EXIT_CODES.items()}
        reason = reason or next((codes[job.code] for job in jobs if job.code in codes), None)
        if reason is None:
            raise UserError(f"{unfinished[0]}, and nobody has stopped it; what it said is in {root / 'logs'}")
        later = [job.stage for job in jobs if manner.restart and job.code is None and job.stage.folder.finished]
        stopped(reason, unfinished[0], manner.restart, [stage.recipe.name for stage in later])


def _to_prune(stages: "list[Stage]", wanted: Wanted, opened: "Opened") -> "list[Stage]":
    """The stages whose students `run edge` prunes when they have been trained."""
    from ..edge import check_student

    if processes.count() > 1:
        raise UserError("edge prunes and exports in one process; train kd with torchrun, then run edge without it")
    [name] = recipes_of(EDGE)
    students = [stage for stage in stages if stage.recipe.name == name]
    check_student(students[0].recipe, opened.sets(students[0].recipe), wanted.prune_recipe().prune.macs)
    return students


def _prune_and_export(student: "Stage", wanted: Wanted, opened: "Opened", manner: "Manner") -> "list[Row]":
    """What `run edge` does with a finished student; gives what was measured of its files."""
    from ..edge import files_of

    [pruned] = _planned(wanted.pruning(student.folder, student.seed), opened, manner)
    _train_in_turn([pruned], opened, manner, more=True)
    rows = files_of([student.folder, pruned.folder], opened.sets(student.recipe), console.say)
    return [replace(row, name=f"{row.name}, seed {student.seed}") if len(wanted.seeds) > 1 else row for row in rows]


def _show_steps(rows: "Sequence[Row]") -> None:
    import numpy as np

    from ..export.measure import BATCH

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
    epochs = recipe.schedule.epochs
    console.say(
        f"then {wanted.pruned_folder(student.recipe, student.seed).path}: pruned to {100 * recipe.prune.macs:.3g} % of "
        f"the MACs, {epochs} epoch{'s' * (epochs != 1)}; and both as files, in float and in int8"
    )


def _show_plan(stages: "list[Stage]", opened: "Opened", manner: "Manner") -> None:
    from ..runs.foresee import foreseen

    said, table = foreseen(stages, opened, manner.device, manner.restart)
    for line in said[:-1]:
        console.say(line)
    console.print(table)
    console.say(said[-1])
