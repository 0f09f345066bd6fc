"""Train a stage, from an empty folder or from its last checkpoint to a folder with its results."""

import contextlib
import dataclasses
import datetime
import gc
import os
import platform
import shutil
import time
from dataclasses import dataclass, replace
from typing import Any

import torch
from fastai.callback.core import Callback
from fastai.callback.progress import ProgressCallback
from fastcore.basics import noop
from rich.console import Console

from .. import processes
from ..errors import UserError, notice
from ..export import export_learner, export_run
from ..files import whole
from ..learner import DMSLearner, dms_learner
from ..models.weights import card_in, load_weights
from ..names import source_place
from ..random_states import seed_everything
from ..recipes import cut_path
from ..run_folder import Facts, Figures, Run, RunFolder
from ..trained import check_classes, digest_of, origin_of
from .advice import advice, other_settings
from .best import KeepBest
from .checkpoint import Checkpoint
from .curves import plot_curves
from .estimate import held
from .guards import (
    arithmetic,
    other_arithmetic,
    refuse_other_code,
    refuse_other_origin,
    refuse_other_recipe,
    refuse_unknown,
)
from .history import History, write_rows
from .images import loaders_of
from .lock import locked
from .machine import commit, device_name, is_out_of_memory, versions
from .plan import Opened, Stage
from .predictions import write_predictions
from .profile import StepProfile
from .progress import NOTHING, Ahead, RichProgress
from .prune import after_pruning
from .stop import StopOnRequest
from .tensorboard import TensorBoard, write_epochs
from .wait import Patience
from .work import Work

__all__ = ["Manner", "add_to_finished", "run_stage", "tidy_finished"]

LARGE = 10**9  # bytes of images that somebody should know of


@dataclass(frozen=True, kw_only=True)
class Manner:
    """How to train. Nothing of this changes what is trained.

    Attributes:
        device: The device to train on.
        deadline: A time on the clock of `time.monotonic`; training stops with the first step that ends after it.
        restart: Begin again. A finished run is kept in the folder until the new one has finished, too.
        profile: Trace a few steps, and print where their time goes.
        checkpoint_steps: Write a checkpoint after every so many steps, and not only after epochs.
        keep_best: Also keep the weights of the best epoch; a run that has begun to goes on doing so.
        tensorboard: Also write the epochs for TensorBoard.
        ahead: What the command trains after this stage, for the time left.
        wait: Waits for a folder that another process uses; None: that is refused.
        parent: As in `StopOnRequest`.
        threads: Threads to compute with; a resumed run keeps those that it was begun with. None: whatever torch has.
        cbs: Callbacks that look on, and may end the training.
    """

    device: torch.device | str = "cpu"
    deadline: float | None = None
    restart: bool = False
    profile: bool = False
    checkpoint_steps: int | None = None
    keep_best: bool = False
    tensorboard: bool = False
    ahead: Ahead = NOTHING
    wait: Patience | None = None
    parent: int | None = None
    threads: int | None = None
    cbs: tuple[Callback, ...] = ()


def run_stage(stage: Stage, opened: Opened, manner: Manner | None = None, console: Console | None = None) -> Run:
    """Train a stage, or what is left of it, and write its folder. A finished one is only read.

    Args:
        stage, opened: A stage that `plan` gave, and what `plan` was given.
        manner: How to train.
        console: Where to show progress; None: standard output.

    Returns:
        The run. Ctrl-C, SIGTERM or the deadline leave it unfinished, with a checkpoint of the current step, and with
        the reason among its facts, `stopped_by`. If they come in the last step, the run is finished and has the reason,
        too.

    Raises:
        UserError: The data or the teacher do not fit, the folder holds a run of another recipe or is in use by another
            process, the loss is NaN or infinite, or there is too little memory.
    """
    manner, console = manner or Manner(), console or Console()
    recipe, folder = stage.recipe, stage.folder
    with processes.together():
        teacher = opened.teacher_of(stage)
        sets = opened.sets(recipe, teacher)
        origin = {"data_digest": sets.digest, "place": source_place(opened.data)}
        if recipe.model.weights is not None:
            origin["begun_digest"] = digest_of(recipe.model.weights)
        if teacher is not None:
            check_classes(teacher, sets.vocab)
            origin |= {"teacher": cut_path(stage.teacher), "teacher_digest": teacher.digest}
    with contextlib.ExitStack() as stack:
        with processes.in_order():
            if processes.is_first():
                stack.enter_context(locked(folder.path, manner.wait))
            if manner.restart:
                refuse_unknown(folder, restart=True)
            else:
                refuse_other_recipe(recipe, folder)
            if processes.is_first():
                _tidy(folder, manner.restart)
            refuse_other_origin(origin, folder)
            if not folder.finished:
                refuse_other_code(versions(), folder)
        if folder.finished:
            card_in(folder.weights)  # damaged weights are refused
        if folder.finished and not folder.missing:
            processes.from_first(lambda: add_to_finished(stage, manner, console))
            return Run.read(folder.path)
        if manner.threads is not None:
            torch.set_num_threads(_threads(folder, manner.threads))
        gc.collect()  # free the Learner of the stage before, which its callbacks refer to
        torch.compiler.reset()  # and its graphs, which hold gigabytes of a GPU's memory
        if line := held(recipe, sets, torch.device(manner.device), at_least=LARGE):
            notice(f"{recipe.title}: {line}")
        for line in sets.repeated:
            notice(f"{opened.data}: {line}")
        dls = loaders_of(recipe, sets, manner.device)
        seed_everything(stage.seed)  # only after fastai's loaders have drawn from Python's generator
        begun = folder.finished or any(folder.checkpoints.glob("*.pt"))
        with processes.together():
            learn = dms_learner(dls, recipe, teacher=teacher, path=folder.path, fresh=begun)
        learn.remove_cb(ProgressCallback)  # the run shows its own progress
        learn.logger = noop
        if folder.finished:
            processes.from_first(lambda: add_to_finished(stage, manner, console))
            return processes.from_first(lambda: _complete(learn, folder, console))
        if recipe.prune is not None and not begun:
            for line in after_pruning(learn):
                console.print(f"{recipe.title}: {line}", soft_wrap=True, markup=False, highlight=False)
        return _Training(learn, stage, origin, manner, console).run()


class _Training:
    """The training of a stage, from the folder's checkpoint to its end, or until somebody asks to stop."""

    def __init__(self, learn: DMSLearner, stage: Stage, origin: dict[str, Any], manner: Manner, console: Console):
        self.learn, self.recipe, self.folder = learn, stage.recipe, stage.folder
        self.manner, self.console = manner, console
        self.history = History(self.folder.metrics, then=lambda: self.note("running"))
        self.checkpoint = Checkpoint(self.folder.checkpoints, self.history, manner.checkpoint_steps)
        self.stop = StopOnRequest(self.checkpoint, manner.deadline, manner.parent)
        self.work = Work.of_learner(learn)
        self.facts, self.before = _facts(learn, stage.seed, origin, self.work), 0.0
        self.began = time.perf_counter()

    def run(self) -> Run:
        first_epoch = self.resume()
        if processes.is_first():
            with whole(self.folder.recipe_file) as partial:
                partial.write_text(self.recipe.without_folders().to_toml(), encoding="utf-8")
        self.note("running")
        try:
            self.fit(first_epoch)
            if len(self.history.rows) < self.recipe.schedule.epochs and not self.stopped_early:
                return self.told(self.note("interrupted"))
            processes.from_first(self.leave)
            finished = self.note("finished")
        except BaseException as error:
            with contextlib.suppress(OSError):  # a full disk, of which `error` tells
                self.note("interrupted")
            if is_out_of_memory(error):
                raise self.too_large() from None
            raise
        processes.from_first(lambda: self.afterwards(finished))
        return self.told(finished)

    def afterwards(self, finished: Run) -> None:
        """Remove what a finished run no longer needs, and say what somebody should know about it."""
        tidy_finished(self.folder)  # only after run.json says "finished"
        for line in self.advice(finished):
            notice(line)

    def resume(self) -> int:
        """Restore the Learner from the last checkpoint; gives the number of epochs that are done."""
        with processes.in_order():  # the first one puts damaged files aside
            resumed = self.checkpoint.resume(self.learn)
        if resumed.arithmetic is not None:
            other = other_arithmetic(resumed.arithmetic, arithmetic(self.learn))
            if other is not None:
                self.console.print(f"{self.recipe.title}: {other}", soft_wrap=True, markup=False)
        for file in resumed.damaged:
            self.console.print(f"{file} is damaged; resuming from the one before", soft_wrap=True, markup=False)
        if resumed.epochs or resumed.steps:
            before = self.folder.facts()
            self.before, self.facts = before.seconds, replace(self.facts, started=before.started)
            step = f", step {resumed.steps}" if resumed.steps else ""
            done = f"resuming after epoch {resumed.epochs} of {self.recipe.schedule.epochs}{step}"
            self.console.print(f"{self.recipe.title}: {done}", markup=False)
        return resumed.epochs

    def fit(self, first_epoch: int) -> None:
        with contextlib.ExitStack() as stack:
            cbs = [self.history, self.checkpoint, stack.enter_context(self.stop.listening())]
            shown = RichProgress(self.recipe.title, self.history, self.console, self.manner.ahead)
            cbs.append(stack.enter_context(shown))
            cbs += self.written(stack) if processes.is_first() else []
            self.learn.fit_recipe(cbs=[*cbs, *self.manner.cbs], start_epoch=first_epoch)

    def written(self, stack: contextlib.ExitStack) -> list[Callback]:
        """The callbacks that write what the command asks for."""
        cbs = []
        if self.manner.keep_best or self.folder.best.is_file():
            cbs.append(KeepBest(self.folder, self.history))
        if self.manner.tensorboard:
            cbs.append(TensorBoard(self.folder.tensorboard, self.history))
        if self.manner.profile:
            cbs += stack.enter_context(StepProfile(self.folder.profile, self.console)).edges
        return cbs

    @property
    def stopped_early(self) -> bool:
        """Whether the recipe's own `EarlyStopping` has ended the training."""
        return hasattr(self.learn, "early_stopping") and self.learn.early_stopping.stopped

    def leave(self) -> None:
        """Write what a finished run leaves."""
        write_rows(self.history.rows, self.folder.metrics, durable=True)
        export_run(self.learn, self.folder)
        write_predictions(self.learn, self.folder.predictions)
        _plot_epochs(self.history.rows, self.learn, self.folder)

    def note(self, status: str) -> Run:
        """Write how far the run has come."""
        rows = self.history.rows
        best = max(rows, key=lambda row: row["valid_accuracy"], default=None)
        self.facts = replace(
            self.facts,
            status=status,
            epochs_done=len(rows),
            last=_figures(rows[-1]) if rows else None,
            best=_figures(best) if rows else None,
            seconds=round(self.before + time.perf_counter() - self.began, 1),
            train_pflop=self.work.of(len(rows)),
        )
        if processes.is_first():
            self.folder.write_facts(self.facts)
        return Run(self.folder, self.facts)

    def too_large(self) -> UserError:
        """The error for batches that do not fit into memory."""
        loader, size = self.learn.dls.train, self.facts.size
        where = "memory" if loader.device.type == "cpu" else "the GPU's memory"
        smaller = [f"--set data.batch_size={loader.bs // 2}"] if loader.bs > 1 else []
        smaller += [f"--set data.size={size // 2}"] if size >= 16 else []
        if hasattr(self.learn, "teacher_distill") and self.learn.teacher_distill.teacher.largest > size:
            smaller += [f"--set distill.size={size}"]
        advice = " or ".join(smaller) or "a smaller --arch"
        return UserError(f"batches of {loader.bs} images do not fit into {where}; try {advice}")

    def advice(self, run: Run) -> list[str]:
        """What somebody should know about the finished run."""
        rows, labels = self.history.rows, self.learn.dls.valid_ds.labels
        largest = int(labels.bincount().max()) / len(labels)
        return advice(run.facts, rows, len(rows) * len(self.learn.dls.train), largest, other_settings(run))

    def told(self, run: Run) -> Run:
        """The run, with the reason why it was stopped, if it was."""
        self.stop.agree()
        return replace(run, facts=replace(run.facts, stopped_by=self.stop.reason))


def _complete(learn: DMSLearner, folder: RunFolder, console: Console) -> Run:
    """Write what a finished run has lost, from its weights and its epochs."""
    model, card = load_weights(folder.weights)
    for dl in learn.dls.loaders:
        dl.mean, dl.std = card.mean, card.std  # what it began from may be gone
    learn.model.load_state_dict(model.state_dict())
    learn.model.to(learn.dls.device)
    writes = {
        folder.learner: lambda: export_learner(learn, folder),
        folder.predictions: lambda: write_predictions(learn, folder.predictions),
        folder.curves: lambda: _plot_epochs(folder.rows(), learn, folder),
    }
    for path in folder.missing:
        writes[path]()
        console.print(f"{path} was missing, and has been written again", soft_wrap=True, markup=False, highlight=False)
    return Run.read(folder.path)


def _plot_epochs(rows: list[dict[str, Any]], learn: DMSLearner, folder: RunFolder) -> None:
    measure = "agreement with the teacher" if learn.dls.valid_ds.by_teacher else "accuracy"
    plot_curves(rows, f"{learn.recipe.title}, {learn.card.arch} on {learn.dls.train_ds.name}", folder.curves, measure)


def _tidy(folder: RunFolder, restart: bool) -> None:
    """Delete what a process that was killed has left half written and, to begin again, what the run has."""
    for left in folder.partial_files():
        left.unlink()
    if restart:
        _empty(folder)
    tidy_finished(folder)


def add_to_finished(stage: Stage, manner: Manner, console: Console) -> None:
    """Write what a command asks for that a finished run does not have yet, or say that there is none."""
    title, folder = stage.recipe.title, stage.folder
    if manner.profile:
        console.print(f"{title}: already finished, nothing to profile; give --out another folder", markup=False)
    if manner.tensorboard and not folder.tensorboard.is_dir():
        write_epochs(folder.rows(), folder.tensorboard)
        console.print(f"{title}: already finished; its epochs are in {folder.tensorboard}", markup=False)


def tidy_finished(folder: RunFolder) -> None:
    """Remove what a finished run no longer needs: its checkpoints, and the run that it has replaced."""
    if folder.finished:
        for left in (folder.checkpoints, folder.replaced):
            shutil.rmtree(left, ignore_errors=True)


def _empty(folder: RunFolder) -> None:
    """Delete what a run leaves or, if it has finished, move it aside. What is somebody else's stays."""
    if not folder.recipe_file.is_file() or not (folder.facts_file.is_file() or folder.lost):
        return  # not a run's folder
    left = folder.own_files()[::-1]  # what says that it is a run's goes last
    if folder.finished or folder.lost == folder.weights:
        shutil.rmtree(folder.replaced, ignore_errors=True)
        folder.replaced.mkdir()
        for path in left:
            path.replace(folder.replaced / path.name)
        return
    for path in left:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def _threads(folder: RunFolder, threads: int) -> int:
    """The threads that a run was begun with, as other numbers give other last digits; `threads` if it begins now."""
    begun = folder.facts().threads if folder.begun else None
    return threads if begun is None or begun > (os.cpu_count() or 1) else begun


def _facts(learn: DMSLearner, seed: int, origin: dict[str, Any], work: Work) -> Facts:
    """What is known before the first epoch."""
    recipe, train, valid = learn.recipe, learn.dls.train_ds, learn.dls.valid_ds
    weights = recipe.model.weights
    return Facts(
        status="running",
        recipe=recipe.name,
        title=recipe.title,
        model=recipe.model.name,
        parameters=sum(p.numel() for p in learn.model.parameters()),
        macs=work.macs,
        data=train.name,
        valid=valid.split,
        training_images=train.labelled,
        unlabelled_images=len(train) - train.labelled or None,
        agreement=valid.by_teacher,
        validation_images=len(valid),
        classes=learn.dls.c,
        size=train.size,
        mixup=any((recipe.mixup, recipe.cutmix, recipe.mixup_or_cutmix)),
        seed=seed,
        begun_from=None if weights is None else cut_path(origin_of(weights, recipe.model.name)),
        epochs=recipe.schedule.epochs,
        epochs_done=0,
        seconds=0.0,
        device=device_name(learn.dls.device),
        threads=torch.get_num_threads(),
        processes=processes.count() if processes.count() > 1 else None,
        versions=versions(),
        python=platform.python_version(),
        commit=commit(),
        started=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        **origin,
    )


def _figures(row: dict[str, Any]) -> Figures:
    return Figures(**{f.name: row[f.name] for f in dataclasses.fields(Figures)})
