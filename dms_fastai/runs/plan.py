"""The wanted stages, in order. What they need is opened once, and checked before anything is trained."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from ..data import Sets
from ..data.splits import UnlabelledError
from ..errors import UserError, notice
from ..models.build import needs_more_than_one
from ..models.dmsresnet import MEAN, STD
from ..recipes import Recipe
from ..run_folder import RunFolder
from ..trained import Inputs, Teacher, begin_from, check_pretrained, check_teacher, load_teacher
from .budget import fitted, with_choices_of
from .estimate import Estimate
from .guards import refuse_other_origin, refuse_other_recipe
from .wanted import ALONE, FOR_TEACHER, SAME_IMAGES, Wanted

__all__ = ["Opened", "Stage", "plan"]


class Opened:
    """The data set and the teachers of a plan, each opened at the first call and then kept."""

    def __init__(self, data: str | Path, trust: bool = False):
        """
        Args:
            data: As in `load_data`.
            trust: A teacher may be a .pkl, whose code is run.
        """
        self.data, self.trust = data, trust
        self.teaching: str | Path | None = None  # a teacher that is there: it knows the classes of unlabelled images
        self._sets: dict[tuple, Sets] = {}
        self._teachers: dict[str, Teacher] = {}

    def sets(self, recipe: Recipe) -> Sets:
        """The images that a recipe is trained on; those without labels only if it distils."""
        wanted = recipe.data.build()
        key = (wanted.size, wanted.valid, wanted.labels)
        if key not in self._sets:
            try:
                self._sets[key] = wanted.open(self.data)
            except UnlabelledError:
                classes = None if self.teaching is None else self.teacher(self.teaching).vocab
                if classes is None:
                    raise
                self._sets[key] = wanted.open(self.data, classes=classes)
        return self._sets[key] if recipe.distill is None else self._sets[key].for_distillation

    def teacher(self, source: str | Path) -> Teacher:
        if str(source) not in self._teachers:
            self._teachers[str(source)] = load_teacher(source, self.trust)
        return self._teachers[str(source)]


@dataclass(frozen=True)
class Stage:
    """One training run of several.

    Attributes:
        recipe: What to train, resolved for the data.
        seed: Seed of the weights, the batches and the augmentation.
        folder: Where its files go.
        teacher: The teacher, if the recipe distils: whatever `load_teacher` takes.
    """

    recipe: Recipe
    seed: int
    folder: RunFolder
    teacher: str | Path | None = None


class _Fits:
    """The recipes of a plan with what their budgets choose, each fitted once."""

    def __init__(self, wanted: Wanted, opened: Opened, device: torch.device, restart: bool):
        self.wanted, self.opened, self.device, self.restart = wanted, opened, device, restart
        self._fitted: dict[str, tuple[Recipe, Estimate | None]] = {}

    def teacher(self, recipe: Recipe) -> Recipe:
        """A teacher that is to be trained for a student, in half of its budget."""
        return self._fit(recipe, 0.5, None, self.wanted.given(to_teacher=True))

    def student(self, recipe: Recipe, teaching: Recipe | None = None, teacher: Teacher | None = None) -> Recipe:
        """A recipe in its budget; half of it, if a recipe trains its teacher. `teacher` is one that is there."""
        before = teacher if teaching is None or teacher is not None else self._took(teaching)
        return self._fit(recipe, 0.5 if teaching else 1.0, before, self.wanted.given(to_teacher=False))

    def _took(self, recipe: Recipe) -> Estimate | None:
        return self._fitted.get(recipe.name, (recipe, None))[1]

    def _fit(self, recipe: Recipe, share: float, before: Estimate | Teacher | None, given: set[str]) -> Recipe:
        if recipe.budget is None or recipe.budget.fitted:
            return recipe
        if recipe.name not in self._fitted:
            like = self._fitted.get(recipe.name.removesuffix(ALONE), (self._begun(recipe, given), None))[0]
            if like is not None:
                self._fitted[recipe.name] = with_choices_of(recipe, like, given), None
            else:
                sets, seconds = self.opened.sets(recipe), 60 * share * recipe.budget.minutes
                self._fitted[recipe.name] = fitted(recipe, sets, self.device, seconds, given, before)
        return self._fitted[recipe.name][0]

    def _begun(self, recipe: Recipe, given: set[str]) -> Recipe | None:
        """What was chosen when the recipe was begun, with any of the seeds."""
        for seed in () if self.restart else self.wanted.seeds:
            folder = self.wanted.folder(recipe, seed, "model.name" not in given)
            if folder.begun and folder.recipe_file.is_file():
                return folder.recipe()
        return None


def plan(wanted: Wanted, opened: Opened, restart: bool = False, device: torch.device | None = None) -> list[Stage]:
    """The stages that the wanted recipes need. A teacher that is still to be trained comes before its student.

    Args:
        wanted: Recipes, data and settings.
        opened: What opens the data and the teachers.
        restart: Train teachers that are finished, too.
        device: Where to train, for recipes with a budget; None: on the CPU.

    Raises:
        UserError: As in `Wanted.resolved`; or a teacher cannot be opened or does not know the data's classes, or a
            network cannot be built for the data.
    """
    stages: dict[Path, Stage] = {}
    recipes, fits = wanted.resolved(), _Fits(wanted, opened, device or torch.device("cpu"), restart)
    for seed in wanted.seeds:
        for recipe in recipes:
            for stage in _with_teacher(recipe, recipes, seed, fits):
                stages.setdefault(stage.folder.path, stage)
    for stage in stages.values():
        if isinstance(stage.teacher, str) and Path(stage.teacher).resolve() in {f.resolve() for f in stages}:
            raise UserError(f"this command trains {stage.teacher} itself; give its recipe as --teacher")
    _try_networks(stages.values(), opened)
    _check_labels(stages.values(), opened)
    return list(stages.values())


def _with_teacher(recipe: Recipe, recipes: list[Recipe], seed: int, fits: _Fits) -> list[Stage]:
    """A recipe's stage, after its teacher's stage if that is wanted, too, or not finished."""
    wanted, opened = fits.wanted, fits.opened
    teaching, before = wanted.teacher_of(recipe), []
    if isinstance(teaching, Recipe):
        named = next((other for other in recipes if other.name == teaching.name), None)
        if named is not None:
            teaching, recipe = fits.student(named), fits.student(recipe)
        else:
            if recipe.budget is not None:
                teaching = replace(teaching, budget=recipe.budget)
            teaching = fits.teacher(teaching)
        theirs = wanted.given(to_teacher=named is None)  # a teacher that is there may be any network
        first = Stage(teaching, seed, wanted.folder(teaching, seed, "model.name" not in theirs))
        if named is not None:
            before.append(first)
        elif fits.restart or not first.folder.finished:
            before.append(first)
            recipe = fits.student(recipe, teaching)
        else:
            asked = [key.removeprefix(FOR_TEACHER) for key in wanted.settings if key.startswith(FOR_TEACHER)]
            refuse_other_recipe(teaching, first.folder, (*SAME_IMAGES, *asked), or_else="--restart")
            origin = {"data_digest": opened.sets(teaching).digest}
            refuse_other_origin(origin, first.folder, or_else="--restart")
            recipe = fits.student(recipe, teaching, opened.teacher(first.folder.path))
        teaching = first.folder.path
    elif teaching is not None:  # refuse one that is missing or does not fit now, not after stages are trained
        opened.teaching = teaching
        sets = opened.sets(recipe)
        check_pretrained(teaching, len(sets.vocab))
        images = Inputs(_shape(sets), MEAN, STD)
        check_teacher(opened.teacher(teaching), len(sets.vocab), images, sets.vocab)
        recipe = fits.student(recipe, teacher=opened.teacher(teaching))
    else:
        recipe = fits.student(recipe)
    chosen = recipe.budget is not None and "model.name" not in wanted.given(to_teacher=False)
    return [*before, Stage(recipe, seed, wanted.folder(recipe, seed, any_network=chosen), teaching)]


def _try_networks(stages: Iterable[Stage], opened: Opened) -> None:
    """Raise a UserError if a network that is to be trained cannot be built, or does not take the batches."""
    tried: list[Recipe] = []
    for recipe in (stage.recipe for stage in stages if not stage.folder.finished):
        if any((recipe.model, recipe.data) == (other.model, other.data) for other in tried):
            continue
        sets, model = opened.sets(recipe), recipe.model.build()
        network = model.create(len(sets.vocab), _shape(sets))
        if recipe.data.batch_size == 1 and needs_more_than_one(network, _shape(sets)):
            raise UserError(f"data.batch_size is 1, too few images for a batch norm of {model.name}; take 2 or more")
        if model.weights is not None:
            begin_from(network, model.weights, model.name)
        tried.append(recipe)


def _check_labels(stages: Iterable[Stage], opened: Opened) -> None:
    """Say that images without labels are not used, if they are not; without any labels, only students can be trained.

    Raises:
        UserError: A stage has no image to train on.
    """
    sets = {stage.recipe.name: (opened.sets(stage.recipe), stage) for stage in stages}
    for found, stage in sets.values():
        if stage.teacher is None and not found.train.labelled:
            raise UserError(
                f"{opened.data}: no training image has a label, and {stage.recipe.name!r} learns from labels; take kd "
                f"with --teacher, a network that is trained"
            )
    if any("unlabelled" in (found.source or ()) for found, _ in sets.values()) and not any(
        stage.recipe.distill for _, stage in sets.values()
    ):
        notice(f"{opened.data}: its images without labels are not used: none of these recipes has a teacher")


def _shape(sets: Sets) -> tuple[int, int, int]:
    return 3, sets.size, sets.size
