"""A search over a recipe's values: trials by Optuna, each a run of its own, judged by held-out training images."""

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from fastai.callback.core import Callback, CancelFitException
from rich.console import Console

from ..errors import FolderError, TryAgainError, UserError
from ..recipes import Recipe
from ..run_folder import SEARCH, Run
from ..show import toml_value
from ..trained import digest_of
from .checkpoint import DivergedError
from .lock import locked
from .plan import Opened, plan
from .spaces import INSTEAD, Space
from .stage import Manner, run_stage
from .wanted import Wanted

__all__ = ["Trial", "tune"]

STARTUP_TRIALS = 5  # trials that are all trained to their end; later ones may fall behind them
REFUSED = 3  # trials one after another that cannot be trained: the reason is not their values


@dataclass(frozen=True)
class Trial:
    """A trial of a search.

    Attributes:
        number: From 1; its run's folder is called so.
        settings: The values that were tried, by their keys.
        state: "finished", or why it was not trained to its end: "behind" the median of the others, "diverged", or
            "refused", because it cannot be trained with these values.
        accuracy: The last epoch's, a share of the held-out images; None if there was none.
        images: How many held-out images there are; None as above.
    """

    number: int
    settings: Mapping[str, Any]
    state: str
    accuracy: float | None = None
    images: int | None = None


def tune(
    wanted: Wanted, over: Sequence[Space], trials: int, opened: Opened, manner: Manner, console: Console
) -> tuple[list[Trial], str | None]:
    """Search for the values of a recipe that classify most held-out images right, by a tree-structured Parzen
    estimator (Bergstra et al., 2011). A trial that is behind the median of the earlier ones, at the same epoch, ends.

    The folder `wanted.out` holds the search, and the run of each trial. A search that was stopped goes on from there.

    Args:
        wanted: What `searched` gave.
        over: What to search.
        trials: How many trials there are to be, those that are there already among them.
        opened: What opens the data.
        manner: How to train.
        console: Where to show progress.

    Returns:
        The trials, best first, and the reason if somebody asked to stop.

    Raises:
        UserError: The folder has a search of something else, the trials would be judged by test images, or several in
            turn cannot be trained.
    """
    with locked(wanted.root):
        [recipe] = wanted.resolved()
        sets = opened.sets(recipe)
        if sets.valid.split == "test":
            raise UserError(f"a search must not look at the test images, and {wanted.data} has no others; {INSTEAD}")
        facts = {"images": sets.digest, "recipe": recipe.without_folders().to_table()}
        search = _Search(wanted, over, facts, _files(wanted, recipe, over, opened))
        search.revive()
        reason = None
        while len(search.done()) < trials and reason is None:
            reason = search.once(trials, opened, manner, console)
        return search.best_first(), reason


class _Search:
    """A study of Optuna's in a file, whose trials are runs."""

    def __init__(self, wanted: Wanted, over: Sequence[Space], facts: Mapping[str, Any], files: Mapping[str, Any]):
        import optuna
        from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.wanted, self.over, self.states = wanted, over, optuna.trial.TrialState
        file = str(wanted.root / SEARCH)
        backend = JournalFileBackend(file, JournalFileOpenLock(file))  # the usual lock is a link, which Windows forbids
        storage = optuna.storages.JournalStorage(backend)
        pruner = optuna.pruners.MedianPruner(STARTUP_TRIALS)
        self.study = optuna.create_study(
            study_name="tune", storage=storage, direction="maximize", load_if_exists=True, pruner=pruner
        )
        # Not what the stopped process has drawn.
        self.study.sampler = optuna.samplers.TPESampler(seed=(wanted.seeds[0] + len(self.study.trials)) % 2**32)
        self.distributions = {space.key: _distribution(space) for space in over}
        self.refused = 0
        self._check_same(facts, files)

    def _check_same(self, facts: Mapping[str, Any], files: Mapping[str, Any]) -> None:
        """Raise a UserError if the folder has a search of something else; earlier versions did not note the files."""
        spaces = {space.key: str(space) for space in self.over}
        more = {"seed": self.wanted.seeds[0], "over": list(spaces.items())}
        searched, without = (json.dumps({**facts, **noted, **more}) for noted in (files, {}))
        if self.study.user_attrs.get("search", searched) not in (searched, without):
            raise UserError(f"{self.wanted.root} has a search of other values or data; give --out another folder")
        self.study.set_user_attr("search", searched)

    def revive(self) -> None:
        """Let trials that were stopped be tried next, in the folder in which they have begun."""
        for left in self.study.get_trials(deepcopy=False, states=(self.states.RUNNING,)):
            self.study.tell(left.number, state=self.states.FAIL)
            self.study.enqueue_trial(left.params, user_attrs={"folder": self._folder(left)})

    def done(self) -> list[Any]:
        """The trials that need not be tried again."""
        return self.study.get_trials(deepcopy=False, states=(self.states.COMPLETE, self.states.PRUNED))

    def once(self, trials: int, opened: Opened, manner: Manner, console: Console) -> str | None:
        """Train one trial; gives the reason if somebody asked to stop."""
        trial = self.study.ask(self.distributions)
        settings, folder = self.settings(trial), self._folder(trial)
        trial.set_user_attr("folder", folder)
        said = " ".join(f"{key}={toml_value(value)}" for key, value in settings.items())
        console.print(f"trial {len(self.done()) + 1} of {trials}: {said}", soft_wrap=True, markup=False)
        wanted = replace(self.wanted, out=self.wanted.root / folder, settings={**self.wanted.settings, **settings})
        judge = _Judge(trial)
        try:
            [stage] = plan(wanted, opened, False, manner.device)
            run = run_stage(stage, opened, replace(manner, cbs=(judge,)), console)
        except TryAgainError:
            raise
        except FolderError as error:  # nothing that other values would mend
            again = f"remove {wanted.out}, and the trial begins again"
            raise FolderError(error.message.replace("--restart", again)) from None
        except UserError as error:
            diverged = isinstance(error, DivergedError)
            self.refused = 0 if diverged else self.refused + 1
            if diverged:
                shutil.rmtree(stage.folder.checkpoints, ignore_errors=True)
            trial.set_user_attr("state", "diverged" if diverged else "refused")
            self.study.tell(trial, state=self.states.PRUNED)
            if self.refused == REFUSED:
                raise
            console.print(f"this trial ends here: {error.message}", soft_wrap=True, markup=False)
            return None
        self.refused = 0
        if judge.behind:
            shutil.rmtree(stage.folder.checkpoints, ignore_errors=True)  # nobody goes on with it
        elif not run.finished:
            return run.facts.stopped_by
        self._tell(trial, run, "behind" if judge.behind else "finished")
        return run.facts.stopped_by

    def _tell(self, trial: Any, run: Run, state: str) -> None:
        trial.set_user_attr("state", state)
        trial.set_user_attr("accuracy", run.facts.last.valid_accuracy)
        trial.set_user_attr("images", run.facts.validation_images)
        if state == "behind":
            self.study.tell(trial, state=self.states.PRUNED)
        else:
            self.study.tell(trial, run.facts.last.valid_accuracy)

    def _folder(self, trial: Any) -> str:
        """Name of the folder of a trial's run, by how many were there before; one that was stopped keeps it."""
        last = max((int(other.user_attrs["folder"]) for other in self.done()), default=0)
        return trial.user_attrs.get("folder", f"{last + 1:03d}")

    def settings(self, trial: Any) -> dict[str, Any]:
        """What a trial sets."""
        return {space.key: space.setting(trial.params[space.key]) for space in self.over}

    def best_first(self) -> list[Trial]:
        """The trials: those that were trained to their end first, by accuracy."""
        found = []
        for trial in self.done():
            told = trial.user_attrs
            number, accuracy, images = int(told["folder"]), told.get("accuracy"), told.get("images")
            found.append(Trial(number, self.settings(trial), told["state"], accuracy, images))
        return sorted(found, key=lambda trial: (trial.state != "finished", -(trial.accuracy or 0.0)))


class _Judge(Callback):
    """Report the accuracy of every epoch, and end a training that is behind the other trials."""

    order = 76  # after the checkpoint, and after somebody's request to stop

    def __init__(self, trial: Any):
        super().__init__()
        self.trial, self.behind = trial, False

    def after_epoch(self) -> None:
        names, values = self.learn.recorder.metric_names[1:], self.learn.recorder.values[-1]
        self.trial.report(dict(zip(names, values, strict=False))["valid_accuracy"], self.learn.epoch + 1)
        if self.learn.epoch + 1 < self.learn.n_epoch and self.trial.should_prune():
            self.behind = True
            raise CancelFitException


def _files(wanted: Wanted, recipe: Recipe, over: Sequence[Space], opened: Opened) -> dict[str, Any]:
    """Digests of what a recipe names and does not hold: its teacher, or those that are searched, and its weights."""
    teachers = [value for space in over if space.key == "teacher" for value in space.values]
    teachers = [each for each in teachers or [wanted.teacher_of(recipe)] if isinstance(each, str)]
    found = {"teacher": [opened.teacher(each).digest for each in teachers]} if teachers else {}
    begun = None if recipe.model.weights is None else digest_of(recipe.model.weights)
    return found if begun is None else {**found, "begun": begun}


def _distribution(space: Space) -> Any:
    """A space as Optuna's; of a list, the places of its values, which may be of any kind."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if space.kind == "list":
        return CategoricalDistribution(range(len(space.values)))
    if space.kind == "int":
        return IntDistribution(*space.values)
    return FloatDistribution(*space.values, log=space.kind == "log")
