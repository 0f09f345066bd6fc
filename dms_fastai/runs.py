"""Runs: a recipe, data, a seed and a folder; stages in order, checkpoints and results.

A run's folder holds `recipe.toml` (whole, enough to run it again), `run.json` (versions, device, commit, times,
figures), `metrics.csv` (a row an epoch), `curves.png`, `learner.pkl`, `model.safetensors`, `predictions.npz` and
`checkpoint/`.
"""

import contextlib
import datetime
import gc
import hashlib
import json
import os
import platform
import random
import shutil
import subprocess
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fastai.callback.progress import ProgressCallback
from fastai.data.core import DataLoaders
from fastcore.basics import noop
from rich.console import Console

from . import __version__
from .callbacks.checkpoint import Checkpoint
from .callbacks.distill import Teacher, check_classes, check_pretrained, load_teacher
from .callbacks.history import History
from .callbacks.profile import StepProfile
from .callbacks.progress import RichProgress
from .callbacks.stop import StopOnRequest
from .data import load_data, source_name
from .data.loader import vocabulary
from .errors import UserError
from .export import export_run
from .files import PARTIAL, whole
from .learner import DMSLearner, build_model, dms_learner
from .lock import LOCK, locked
from .models.weights import WEIGHTS, load_weights
from .recipes import Recipe, ablation_of, flat, load_recipe, recipe_names
from .report import METRICS, PREDICTIONS, RUN, Run, plot_curves, read_run, write_predictions

__all__ = [
    "Stage",
    "be_deterministic",
    "check_folders",
    "choose_device",
    "is_finished",
    "plan",
    "processor",
    "run_stage",
]

RECIPE = "recipe.toml"
CHECKPOINT = "checkpoint"
OPTIONAL_TABLES = ("mixup", "cutmix", "ema", "distill", "lookahead")
CODE = ("callbacks", "data", "models", "events.py", "learner.py", "losses.py", "optim.py", "schedule.py")
SAME_PICTURES = ("data.size", "data.valid")  # what teacher and student must have in common


@dataclass(frozen=True)
class Stage:
    """One training run of several.

    Attributes:
        recipe: What to train, resolved for the data.
        folder: Where its files go.
        teacher: Who teaches, where the recipe distils: whatever `load_teacher` takes.
    """

    recipe: Recipe
    folder: Path
    teacher: str | Path | None = None


def choose_device(name: str) -> torch.device:
    """The device for "auto", "cpu" or "cuda".

    Raises:
        UserError: Another name, or "cuda" where torch finds no GPU.
    """
    if name not in ("auto", "cpu", "cuda"):
        raise UserError(f"device is {name!r}; it must be auto, cpu or cuda")
    there = torch.cuda.is_available()
    if name == "cuda" and not there:
        raise UserError("device is cuda, but torch finds no GPU here; take --device auto or cpu")
    return torch.device("cuda" if there and name != "cpu" else "cpu")


def be_deterministic() -> None:
    """Have torch take algorithms that give the same bits every time on a GPU; on a CPU they do so anyway."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.deterministic = True


def is_finished(folder: str | Path) -> bool:
    """Whether a folder holds a run that went to its end, weights and all."""
    folder = Path(folder)
    return (folder / RUN).is_file() and (folder / WEIGHTS).is_file() and read_run(folder).finished


def plan(
    recipe: str,
    data: str | Path,
    out: Path | None = None,
    seed: int = 0,
    arch: str | None = None,
    teacher: str | None = None,
    epochs: int | None = None,
    schedule: str | None = None,
    settings: Mapping[str, Any] | None = None,
    trust_pickle: bool = False,
) -> list[Stage]:
    """The stages that a recipe needs, in order; a teacher that has yet to be trained comes before its student.

    Args:
        recipe: A recipe, or "ablation": the files that `kd` extends one after the other, and `kd`.
        data: As in `load_data`.
        out: Stages go to OUT/RECIPE/seedS; None: artifacts/DATA.
        seed: Of the weights, the batches and the augmentation.
        arch: Architecture of the recipe itself, not of its teacher.
        teacher: In place of the recipe's: a recipe, a run's folder, a file or "timm:NAME".
        epochs, schedule: For every stage, the teacher's too.
        settings: Recipe values by dotted key; of these, a teacher shares the pictures' size and the held-out share
            alone. In an ablation, tables that a stage may lack (mixup, distill, ...) are set where it has them.
        trust_pickle: The teacher may be a .pkl, whose code is run.

    Raises:
        UserError: A recipe, architecture or key that does not exist, a value out of range, or a teacher that cannot
            be had or does not know the data's classes.
    """
    if not 0 <= seed < 2**32:
        raise UserError(f"seed is {seed}; it must be between 0 and {2**32 - 1}")
    name = source_name(data)
    root = out if out is not None else Path("artifacts") / name
    common = {"schedule.epochs": epochs, "schedule.name": schedule}
    common = {key: value for key, value in common.items() if value is not None}
    settings = dict(settings or {})
    shared = common | {key: value for key, value in settings.items() if key in SAME_PICTURES}

    several = recipe == "ablation"
    recipes = []
    for stage in ablation_of("kd") if several else [recipe]:
        bare = load_recipe(stage, name, arch)
        own = {k: v for k, v in settings.items() if not several or _applies(k, bare)}
        recipes.append(load_recipe(stage, name, arch, {**common, **own}))
    unused = [key for key in settings if several and not any(_applies(key, r) for r in recipes)]
    if unused:
        raise UserError(f"no stage of the ablation has the table of {unused[0]!r}")

    stages = []
    for built in recipes:
        source = None
        if built.distill is not None:
            source = teacher if teacher is not None else built.teacher
            if source.endswith(".toml") and not Path(source).is_file():
                raise UserError(f"recipe {built.name!r} names the teacher {source!r}, and there is no such file")
            if source in recipe_names() or source.endswith(".toml"):
                teaching = load_recipe(source, name, None, shared)
                if teaching.distill is not None:
                    raise UserError(
                        f"recipe {teaching.name!r} needs a teacher itself; train it, and give its run's folder"
                    )
                source = root / teaching.name / f"seed{seed}"
                if is_finished(source):
                    _refuse_other_recipe(teaching, source, SAME_PICTURES, or_else="remove it")
                    dls = load_data(data, size=teaching.data.size, valid=teaching.data.valid, device="cpu")
                    _refuse_other_origin(_pictures(dls), source, or_else="remove it")
                elif source not in {s.folder for s in stages}:
                    stages.append(Stage(teaching, source))
            else:  # say now, not after the stages before it, that it cannot be had or does not fit
                dls = load_data(data, size=built.data.size, valid=built.data.valid, device="cpu")
                check_pretrained(source, dls.c)
                check_classes(load_teacher(source, trust_pickle), vocabulary(dls))
        elif (teacher is not None or settings.get("teacher")) and not several:
            raise UserError(f"recipe {built.name!r} does not distil; leave --teacher out, or take kd")
        stages.append(Stage(built, root / built.name / f"seed{seed}", source))
    for recipe in (stage.recipe for stage in stages if not is_finished(stage.folder)):  # before any stage is trained
        dls = load_data(data, size=recipe.data.size, valid=recipe.data.valid, device="cpu")
        build_model(recipe, dls.c, dls.train_ds.size)
    return stages


def check_folders(stages: Iterable[Stage]) -> None:
    """Raise a UserError, before anything is trained, where a stage's folder holds a run of another recipe."""
    for stage in stages:
        _refuse_other_recipe(stage.recipe, stage.folder)


def run_stage(
    stage: Stage,
    data: str | Path,
    seed: int = 0,
    device: torch.device | str = "cpu",
    deadline: float | None = None,
    restart: bool = False,
    console: Console | None = None,
    profile: bool = False,
    checkpoint_steps: int | None = None,
    trust_pickle: bool = False,
) -> Run:
    """Train a stage, or what is left of it, and write its folder. A finished one is only read.

    Args:
        stage: Of `plan`.
        data, seed: As in `plan`.
        device: Where to train.
        deadline: On the clock of `time.monotonic`; training stops with the first step that ends after it.
        restart: Throw away what the folder holds.
        console: Where to show progress; None: standard output.
        profile: Trace a few steps, and print where their time goes.
        checkpoint_steps: Write a checkpoint after so many steps, and not only after epochs.
        trust_pickle: A teacher may be a .pkl, whose code is run.

    Returns:
        The run. Ctrl-C, SIGTERM or the deadline leave it unfinished, with a checkpoint of the step that they met, and
        the reason among its facts, "stopped_by". That is there, too, of a finished run whose end they met.

    Raises:
        UserError: The data or the teacher do not fit, the folder holds a run of another recipe or is in use by another
            process, the loss is no number, or the GPU has too little memory.
    """
    console = console or Console()
    recipe, folder = stage.recipe, stage.folder
    if not restart:
        _refuse_other_recipe(recipe, folder)
    dls = load_data(
        data,
        bs=recipe.data.batch_size,
        size=recipe.data.size,
        valid=recipe.data.valid,
        pad=recipe.augment.pad,
        flip=recipe.augment.flip,
        border=recipe.augment.border,
        alternate=recipe.augment.alternate,
        device=device,
    )
    teacher = None if stage.teacher is None else load_teacher(stage.teacher, trust_pickle)
    origin = _pictures(dls)
    if teacher is not None:
        check_classes(teacher, vocabulary(dls))
        origin |= {"teacher": _name_of(stage.teacher), "teacher_digest": teacher.digest()}
    with locked(folder):
        for left in folder.rglob(f"*{PARTIAL}"):
            left.unlink()  # by a process that was killed as it wrote
        if restart:
            _empty(folder)
        _refuse_other_origin(origin, folder)
        if is_finished(folder):
            if profile:
                console.print(
                    f"{recipe.title}: finished before, nothing to profile; give --out elsewhere", markup=False
                )
            if not (folder / PREDICTIONS).is_file():
                _predict_again(_learner(dls, recipe, teacher, folder), folder)
            return read_run(folder)
        _refuse_other_code(folder)
        gc.collect()  # the Learner of the stage before, whose callbacks know it, and its pictures
        _seed_everything(seed)
        learn = _learner(dls, recipe, teacher, folder)
        return _train(learn, folder, _facts(learn, seed) | origin, deadline, console, profile, checkpoint_steps)


def _learner(dls: DataLoaders, recipe: Recipe, teacher: Teacher | None, folder: Path) -> DMSLearner:
    """The recipe's Learner, which leaves the talking to the run."""
    learn = dms_learner(dls, recipe, teacher=teacher, path=folder)
    learn.remove_cb(ProgressCallback)
    learn.logger = noop
    return learn


def _predict_again(learn: DMSLearner, folder: Path) -> None:
    """Write the predictions of a finished run that has none, from its weights."""
    model, _ = load_weights(folder / WEIGHTS)
    learn.model.load_state_dict(model.state_dict())
    learn.model.to(learn.dls.device)
    write_predictions(learn, folder)


def _train(
    learn: DMSLearner,
    folder: Path,
    facts: dict[str, Any],
    deadline: float | None,
    console: Console,
    profile: bool,
    checkpoint_steps: int | None,
) -> Run:
    """Train from the folder's checkpoint to the end, or until somebody asks to stop."""
    recipe = learn.recipe
    checkpoint = Checkpoint(folder / CHECKPOINT, checkpoint_steps)
    resumed = checkpoint.resume(learn)
    for file in resumed.damaged:
        console.print(f"{file} is damaged; going on from the one before", soft_wrap=True, markup=False)
    before = read_run(folder).facts if resumed.epochs or resumed.steps else {}
    if before:
        step = f", step {resumed.steps}" if resumed.steps else ""
        going_on = f"{recipe.title}: going on after epoch {resumed.epochs} of {recipe.schedule.epochs}{step}"
        console.print(going_on, markup=False)
        facts["started"] = before.get("started", facts["started"])
    _write_text(folder / RECIPE, recipe.to_toml())
    history = History(folder / METRICS, resumed.rows, lambda: note("running"))
    stop = StopOnRequest(deadline)
    began = time.perf_counter()

    def note(status: str, **more: Any) -> Run:
        facts.update(_figures(history.rows), status=status, epochs_done=len(history.rows), **more)
        facts["seconds"] = round(before.get("seconds", 0) + time.perf_counter() - began, 1)
        _write_text(folder / RUN, json.dumps(facts, indent=2, ensure_ascii=False) + "\n")
        return Run(folder, facts)

    note("running")
    try:
        with contextlib.ExitStack() as stack:
            cbs = [history, checkpoint, stack.enter_context(stop.listening())]
            cbs.append(stack.enter_context(RichProgress(recipe.title, console)))
            if profile:
                cbs += stack.enter_context(StepProfile(folder / "profile", console)).edges
            learn.fit_recipe(cbs=cbs, start_epoch=resumed.epochs)
    except torch.OutOfMemoryError:
        note("interrupted")
        bs = recipe.data.batch_size
        raise UserError(
            f"batches of {bs} pictures do not fit into the GPU's memory; try --set data.batch_size={max(bs // 2, 1)}"
        ) from None
    except BaseException:
        note("interrupted")
        raise
    if len(history.rows) < recipe.schedule.epochs:
        return note("interrupted", stopped_by=stop.reason)
    export_run(learn, folder)
    write_predictions(learn, folder)
    plot_curves(history.rows, f"{recipe.title}, {learn.card.arch} on {facts['data']}", folder / "curves.png")
    finished = note("finished")
    shutil.rmtree(folder / CHECKPOINT, ignore_errors=True)  # not before the run says that it needs it no more
    return replace(finished, facts=finished.facts | {"stopped_by": stop.reason}) if stop.reason else finished


def _applies(key: str, recipe: Recipe) -> bool:
    table = key.split(".")[0]
    return table not in OPTIONAL_TABLES or getattr(recipe, table) is not None


def _begun(folder: Path) -> bool:
    """Whether a folder holds a run with something to lose."""
    if not (folder / RUN).is_file():
        return False
    return read_run(folder).facts.get("epochs_done", 0) > 0 or any((folder / CHECKPOINT).glob("*.pt"))


def _refuse_other_recipe(
    recipe: Recipe, folder: Path, of: tuple[str, ...] | None = None, or_else: str = "--restart"
) -> None:
    """Raise a UserError that names the keys in which a run's recipe differs; only those `of` the given ones."""
    file = folder / RECIPE
    if not file.is_file() or not _begun(folder):
        return
    theirs, ours = (flat(r.to_table()) for r in (load_recipe(file), recipe))  # loaded, so that defaults are filled in
    keys = sorted(key for key in of or theirs.keys() | ours.keys() if theirs.get(key) != ours.get(key))
    if keys:
        changes = ", ".join(f"{key} {theirs.get(key, 'default')} -> {ours.get(key, 'default')}" for key in keys)
        raise UserError(f"{folder} holds a run of another recipe ({changes}); give --out another folder, or {or_else}")


def _refuse_other_origin(origin: Mapping[str, Any], folder: Path, or_else: str = "--restart") -> None:
    """Raise a UserError where a folder's run was made from other pictures or by another teacher."""
    if not _begun(folder):
        return
    facts = read_run(folder).facts
    for key, what in (("data_digest", "on other pictures"), ("teacher_digest", "with another teacher")):
        if key in origin and facts.get(key) != origin[key]:
            raise UserError(f"{folder} holds a run {what}; give --out another folder, or {or_else}")


def _pictures(dls: DataLoaders) -> dict[str, Any]:
    """What tells a run's pictures from others, for its facts."""
    return {"data_digest": [dls.train_ds.digest(), dls.valid_ds.digest()]}


def _refuse_other_code(folder: Path) -> None:
    """Raise a UserError where an unfinished run was begun by other code, which would make the rest another run."""
    if not _begun(folder):
        return
    theirs, ours = read_run(folder).facts.get("versions", {}), _versions()
    changes = [f"{name} {theirs.get(name)} -> {ours[name]}" for name in ours if theirs.get(name) != ours[name]]
    if changes:
        raise UserError(
            f"{folder} holds an unfinished run of other code ({', '.join(changes)}); finish it with that code, "
            f"give --out another folder, or --restart"
        )


def _versions() -> dict[str, str]:
    """Of what the numbers depend on; this package's with a hash of its code, which may be a changed checkout."""
    package = Path(__file__).parent
    code = hashlib.blake2b(digest_size=4)
    for part in CODE:
        for file in sorted([package / part] if part.endswith(".py") else (package / part).rglob("*.py")):
            code.update(file.read_bytes())
    own = {"dms-fastai": f"{__version__}+{code.hexdigest()}"}
    return own | {name: metadata.version(name) for name in ("fastai", "timm", "torch")}


def _empty(folder: Path) -> None:
    """Remove what is in a run's folder, but for the lock."""
    if not (folder / RECIPE).is_file():
        return  # no run's
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name != LOCK:
            path.unlink()


def _name_of(teacher: str | Path) -> str:
    """A teacher's source as given, less what is of this machine alone: absolute paths end in DATA/RECIPE/seedS."""
    path = Path(teacher)
    return "/".join(path.parts[-2 if path.suffix else -3 :]) if path.is_absolute() else str(teacher)


def _seed_everything(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def _facts(learn: DMSLearner, seed: int) -> dict[str, Any]:
    """What is known before the first epoch."""
    recipe, device = learn.recipe, learn.dls.device
    return {
        "status": "running",
        "recipe": recipe.name,
        "title": recipe.title,
        "model": recipe.model.name,
        "parameters": sum(p.numel() for p in learn.model.parameters()),
        "data": learn.dls.train_ds.name,
        "valid": learn.dls.valid_ds.split,
        "training_pictures": len(learn.dls.train_ds),
        "validation_pictures": len(learn.dls.valid_ds),
        "classes": learn.dls.c,
        "size": learn.dls.train_ds.size,
        "mixup": recipe.mixup is not None or recipe.cutmix is not None,
        "seed": seed,
        "epochs": recipe.schedule.epochs,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else processor(),
        "threads": torch.get_num_threads(),
        "versions": _versions(),
        "python": platform.python_version(),
        "commit": _commit(),
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def _figures(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The last epoch, which is the result, and the best one on the validation pictures, which is not."""
    if not rows:
        return {}
    keys = ("epoch", "train_loss", "train_accuracy", "valid_loss", "valid_accuracy")
    best = max(rows, key=lambda row: row["valid_accuracy"])
    return {"last": {key: rows[-1][key] for key in keys}, "best": {key: best[key] for key in keys}}


def processor() -> str:
    """The name of the CPU."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _commit() -> str | None:
    """The commit of the checkout that this package runs from, marked where it has been changed.

    Elsewhere what GIT_COMMIT says, if anything: a copy without its history does not know by itself.
    """
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        tracked = subprocess.run([*git, "ls-files", "--error-unmatch", __file__], capture_output=True)
        if tracked.returncode:
            return os.environ.get("GIT_COMMIT")
        commit = subprocess.check_output([*git, "rev-parse", "--short=12", "HEAD"], text=True).strip()
        changed = subprocess.check_output([*git, "status", "--porcelain", "--untracked-files=no"], text=True).strip()
        return commit + (" (changed)" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def _write_text(file: Path, text: str) -> None:
    with whole(file) as partial:
        partial.write_text(text, encoding="utf-8")
