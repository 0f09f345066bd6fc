"""The wanted stages, in order. What they need is opened once, and checked before anything is trained."""

import shlex
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from ..data import Data, Sets
from ..data.sets import middle_for
from ..data.sources import USUAL_SIZE, has_own_size, load_splits
from ..data.splits import Splits, UnlabelledError
from ..errors import UserError, notice
from ..models.build import needs_more_than_one
from ..recipes import ALONE, Recipe
from ..run_folder import RunFolder
from ..trained import Inputs, Teacher, begin_from, check_pretrained, check_teacher, load_teacher, pruned
from ..training.losses import check_standardized
from .budget import fitted, with_choices_of
from .estimate import Estimate, estimate
from .guards import refuse_other_origin, refuse_other_recipe
from .images import data_of, normalisation_of, size_of_weights
from .wait import UnfinishedError
from .wanted import FOR_TEACHER, SAME_IMAGES, Wanted

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
        self._splits: dict[tuple, Splits] = {}
        self._sets: dict[tuple, Sets] = {}
        self._teachers: dict[tuple, Teacher] = {}

    def sets(self, recipe: Recipe, teacher: Teacher | None = None) -> Sets:
        """The images of a recipe: those without labels only if it distils, larger ones where a teacher sees more."""
        wanted = data_of(recipe, self.data)
        middle = middle_for(recipe.augment.build())
        key = (wanted.size, wanted.valid, wanted.labels, middle)
        if key not in self._sets:
            try:
                self._sets[key] = self._open(wanted, middle)
            except UnlabelledError:
                classes = None if self.teaching is None else self.teacher(self.teaching).vocab
                if classes is None:
                    raise
                self._sets[key] = self._open(wanted, middle, classes)
        plain = self._sets[key] if recipe.distill is None else self._sets[key].for_distillation
        if teacher is None or teacher.largest <= plain.size:
            return plain
        key = (*key, teacher.largest)
        if key not in self._sets:
            self._sets[key] = wanted.enlarged(plain, self.data, teacher.largest)
        return self._sets[key]

    def _open(self, wanted: Data, middle: float, classes: Sequence[str] | None = None) -> Sets:
        """The images of a recipe; those that validate on different splits have the same ones in memory."""
        key = (wanted.size, wanted.labels, middle, classes and tuple(classes))
        if key not in self._splits:
            self._splits[key] = load_splits(self.data, wanted.size, wanted.labels, classes, middle)
        return wanted.open(self.data, classes=classes, splits=self._splits[key])

    def teacher(self, source: str | Path, size: int | None = None) -> Teacher:
        """The teacher at `source`, for images of `size`; None: of those that it was trained on."""
        key = (str(source), size)
        if key not in self._teachers:
            self._teachers[key] = load_teacher(source, self.trust) if size is None else self.teacher(source).at(size)
        return self._teachers[key]

    def teacher_of(self, stage: "Stage") -> Teacher | None:
        """The teacher of a stage, for the images that its recipe wants it to see; None without one."""
        return None if stage.teacher is None else self.teacher(stage.teacher, stage.recipe.distill.size)


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

    def teacher(self, recipe: Recipe, share: float) -> Recipe:
        """A teacher that is to be trained for a student, in a share of its budget."""
        return self._fit(recipe, share, None, to_teacher=True)

    def student(self, recipe: Recipe, teacher: Recipe | Teacher | None = None, share: float = 1.0) -> Recipe:
        """A recipe in a share of its budget. The teacher is there, or a recipe of this plan."""
        return self._fit(recipe, share, teacher, to_teacher=False)

    def _took(self, recipe: Recipe) -> Estimate:
        """What a recipe of this plan takes; of one that was begun before, or has no budget, it is found out now."""
        chosen, took = self._fitted.get(recipe.name, (recipe, None))
        return took or estimate(chosen, self.opened.sets(chosen), self.device)

    def _fit(self, recipe: Recipe, share: float, teaching: Recipe | Teacher | None, to_teacher: bool) -> Recipe:
        if recipe.budget is None or recipe.budget.fitted:
            return recipe
        given = self.wanted.given(to_teacher)
        if recipe.name not in self._fitted:
            like = self._fitted.get(recipe.name.removesuffix(ALONE), (self._begun(recipe, to_teacher), None))[0]
            if like is not None:
                self._fitted[recipe.name] = with_choices_of(recipe, like, given), None
            else:
                teacher = teaching if isinstance(teaching, Teacher) else None
                before = self._took(teaching) if isinstance(teaching, Recipe) else teacher
                sets, seconds = self.opened.sets(recipe, teacher), 60 * share * recipe.budget.minutes
                self._fitted[recipe.name] = fitted(recipe, sets, self.device, seconds, given, before)
        return self._fitted[recipe.name][0]

    def _begun(self, recipe: Recipe, teacher: bool) -> Recipe | None:
        """What was chosen when the recipe was begun, with any of the seeds."""
        for seed in () if self.restart else self.wanted.seeds:
            folder = self.wanted.folder(recipe, seed, teacher)
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
        UnfinishedError: Only a student is to be trained, and its teacher has not finished.
    """
    stages: dict[Path, Stage] = {}
    recipes = [_pruned(recipe, opened) for recipe in wanted.resolved()]
    fits = _Fits(wanted, opened, device or torch.device("cpu"), restart)
    for seed in wanted.seeds:
        for recipe in wanted.needed(recipes):
            for stage in _with_teacher(recipe, recipes, seed, fits):
                if wanted.only in (None, stage.recipe.name):
                    stages.setdefault(stage.folder.path, stage)
    for stage in stages.values():
        if isinstance(stage.teacher, str) and Path(stage.teacher).resolve() in {f.resolve() for f in stages}:
            raise UserError(f"this command trains {stage.teacher} itself; give its recipe as --teacher")
    _try_networks(stages.values(), opened)
    _check_labels(stages.values(), opened)
    _check_losses(stages.values(), opened)
    return list(stages.values())


def _pruned(recipe: Recipe, opened: Opened) -> Recipe:
    """As `pruned`; without the weights, the images keep the size that these would have brought along."""
    found, size = pruned(recipe), size_of_weights(recipe, opened.data)
    if found.model.weights == recipe.model.weights or size is None:
        return found
    return replace(found, data=replace(found.data, size=size))


def _with_teacher(recipe: Recipe, recipes: list[Recipe], seed: int, fits: _Fits) -> list[Stage]:
    """A recipe's stage, after its teacher's stage if that is wanted, too, or not finished."""
    wanted, opened = fits.wanted, fits.opened
    teaching, before = wanted.teacher_of(recipe), []
    if isinstance(teaching, Recipe):
        named = next((other for other in recipes if other.name == teaching.name), None)
        sized = at_size_of(recipe, teaching if named is None else named, opened)
        if named is None:
            teaching = sized
        elif sized is not named:
            raise UserError(
                f"{named.title} would train on images of another size than {recipe.title}, which it teaches; add "
                f"--set data.size=N"
            )
        if named is not None:
            teaching = fits.student(named)
            recipe = fits.student(recipe, teaching)
        else:
            if recipe.budget is not None:
                teaching = replace(teaching, budget=recipe.budget)
            teaching = fits.teacher(teaching, share=1.0 if recipe.budget is None else 0.5)
        first = Stage(teaching, seed, wanted.folder(teaching, seed, teacher=named is None))
        if wanted.only == recipe.name and not first.folder.finished:
            raise UnfinishedError(first.folder)
        sets = opened.sets(teaching)
        if named is not None or fits.restart or not first.folder.finished:
            _check_untrained(teaching, recipe, sets, opened)
        if named is not None:
            before.append(first)
        elif fits.restart or not first.folder.finished or wanted.only == teaching.name:
            before.append(first)
            recipe = fits.student(recipe, teaching, share=0.5)
        else:
            asked = [key.removeprefix(FOR_TEACHER) for key in wanted.settings if key.startswith(FOR_TEACHER)]
            refuse_other_recipe(teaching, first.folder, (*SAME_IMAGES, *asked), or_else="--restart")
            origin = {"data_digest": sets.digest}
            refuse_other_origin(origin, first.folder, or_else="--restart")
            there = opened.teacher(first.folder.path, recipe.distill.size)
            recipe = fits.student(recipe, there, share=0.5)
        teaching = first.folder.path
    elif teaching is not None:  # refuse one that is missing or does not fit now, not after stages are trained
        opened.teaching = teaching
        sets = opened.sets(recipe)
        check_pretrained(teaching, len(sets.vocab), _same_images(wanted, sets))
        images, there = Inputs(_shape(sets), *normalisation_of(recipe)), opened.teacher(teaching, recipe.distill.size)
        check_teacher(there, len(sets.vocab), images, sets.vocab)
        recipe = fits.student(recipe, there)
    else:
        recipe = fits.student(recipe)
    return [*before, Stage(recipe, seed, wanted.folder(recipe, seed), teaching)]


def _check_untrained(teaching: Recipe, student: Recipe, sets: Sets, opened: Opened) -> None:
    """Raise a UserError if a teacher that is to be trained on `sets` could not see the student's images as wanted."""
    size = student.distill.size
    if size is not None:
        images = Inputs(_shape(opened.sets(student)), *normalisation_of(student))
        network = teaching.model.build().create(len(sets.vocab), _shape(sets))
        check_teacher(Teacher(network).at(size), len(sets.vocab), images)


def _same_images(wanted: Wanted, sets: Sets) -> str:
    """The options of `dms-fastai run` with which a teacher is trained on the images of its student."""
    same = {key: wanted.settings[key] for key in SAME_IMAGES if key in wanted.settings}
    if not has_own_size(wanted.data):
        same["data.size"] = sets.size
    return shlex.join(["--data", str(wanted.data), *(w for k, v in same.items() for w in ("--set", f"{k}={v}"))])


def at_size_of(recipe: Recipe, teaching: Recipe, opened: Opened) -> Recipe:
    """A teacher, at the size of its student's images where weights to begin from would have brought another one."""
    begun = teaching.model.weights is not None or recipe.model.weights is not None
    size = _size(recipe, opened)
    if not begun or teaching.data.size is not None or _size(teaching, opened) == size:
        return teaching
    return replace(teaching, data=replace(teaching.data, size=size))


def _size(recipe: Recipe, opened: Opened) -> int:
    """Height and width of a recipe's images; of a data set with its own size, 0 stands for that."""
    if recipe.data.size is not None:
        return recipe.data.size
    return 0 if has_own_size(opened.data) else size_of_weights(recipe, opened.data) or USUAL_SIZE


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


def _check_losses(stages: Iterable[Stage], opened: Opened) -> None:
    """Raise a UserError if a student could not learn from its teacher's answers."""
    for recipe in (stage.recipe for stage in stages if stage.recipe.distill):
        check_standardized(recipe.distill, len(opened.sets(recipe).vocab))


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
