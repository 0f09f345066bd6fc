"""What a command asks for, and the recipes that result from it.

Whatever is mistyped is refused here, before torch is imported.
"""

import os
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from functools import cached_property
from pathlib import Path
from typing import Any

from ..errors import UserError, notice, unknown
from ..names import DATA_SETS, architectures, is_architecture, shipped, source_name, source_place
from ..recipes import ALONE, SCALARS, Recipe, ablation_of, load_recipe, recipe_names
from ..run_folder import Run, RunFolder
from ..training.parts import PARTS
from .start_from import called, settings_from

__all__ = ["EDGE", "FOR_TEACHER", "SAME_IMAGES", "SEVERAL", "Wanted", "recipes_of"]

EDGE = "edge"  # the word for a student that is then pruned and exported
SEVERAL = ("ablation", "table1", EDGE)  # words that stand for several recipes
SAME_IMAGES = ("data.size", "data.valid", "data.labels")  # what teacher and student must have in common
SHARED = ("data", "augment", "bf16", "compile")  # tables whose settings a teacher that is trained gets, too
PRETRAINED = "teacher/pretrained"  # the recipe that trains a teacher from timm's weights
FOR_TEACHER = "teacher."  # before the keys of settings that a teacher alone gets
FOR_PRUNING = "prune."  # before the keys of settings that the pruning of `EDGE` alone gets


def recipes_of(word: str) -> list[str]:
    """The recipes that a word of a command stands for.

    "ablation" is every recipe that `kd` extends, and `kd`; "table1" adds the other systems of the paper's Table 1.
    "edge" is `kd`, what `Wanted.pruning` makes of its run, and files of both.
    """
    if word not in SEVERAL:
        return [word]
    if word == EDGE:
        return ["kd"]
    others = [name for name in recipe_names() if name.startswith("table1/")]
    return [*ablation_of("kd"), *(others if word == "table1" else [])]


@dataclass(frozen=True)
class Wanted:
    """Recipes to train on a data set, and changes to them.

    Attributes:
        recipes: Names or files, or one of the words `SEVERAL`.
        data: As in `load_data`.
        seeds: Each recipe is trained with each seed.
        out: Runs go to OUT/RECIPE/seedS; None: artifacts/DATA.
        arch: Architecture of the recipes, not of their teachers.
        teacher: Teacher in place of the recipes': a recipe, a run's folder, a file, or "timm:NAME".
        fine_tune_teacher: Train the teacher "timm:NAME" on the data first, from timm's weights.
        epochs, schedule: For every stage, including teachers.
        settings: Recipe values by dotted key. A teacher that is trained gets those of the tables `SHARED`, too, and
            alone those whose key begins with "teacher.". Of several recipes, those that have the setting's table get
            it; if none has it, all of them do.
        budget: Minutes for every stage and its teacher, as in `[budget]`.
        compare: Train each student that has a teacher without one, too.
        only: Name of the one recipe to train, of these and their teachers; None: all.
        into: The folder of the only run, where another process has worked it out; None: it is worked out here.
    """

    recipes: tuple[str, ...]
    data: str | Path = "digits"
    seeds: tuple[int, ...] = (0,)
    out: Path | None = None
    arch: str | None = None
    teacher: str | None = None
    fine_tune_teacher: bool = False
    epochs: int | None = None
    schedule: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    budget: float | None = None
    compare: bool = False
    only: str | None = None
    into: Path | None = None

    @cached_property
    def root(self) -> Path:
        """The folder of the runs; if artifacts/DATA has those of other data of this name, one beside it."""
        if self.out is not None:
            return self.out
        name, place = source_name(self.data), source_place(self.data)
        root = Path("artifacts") / name
        places = {run.facts.place for run in _runs_in(root)}
        if name not in DATA_SETS:
            places.discard(None)  # of runs that do not say it
        if place is None or not places or place in places:
            return root
        beside = root.with_name(f"{name}-{place}")
        notice(f"{root} has runs on data called {name!r} that lay elsewhere; those on {self.data} are in {beside}")
        return beside

    def folder(self, recipe: Recipe, seed: int, teacher: bool = False) -> RunFolder:
        """The folder of a recipe's run; if the recipe's own has runs of another network or size, one beside it.

        Args:
            recipe: The recipe, as it is to be trained.
            seed: The seed.
            teacher: It is the teacher of a recipe, and none of the recipes itself. Unless the command says its network,
                it may be any, and so may that of a recipe whose budget chooses one; then it is the recipe's own folder.
        """
        if self.into is not None:
            return RunFolder(self.into)
        own = self.root / recipe.name
        theirs = next(_recipes_in(own), recipe)
        any_network = (teacher or recipe.budget is not None) and "model.name" not in self.given(to_teacher=teacher)
        differs = []
        if theirs.model.name != recipe.model.name and not any_network:
            differs.append(recipe.model.name)
        if theirs.data.size != recipe.data.size:
            differs.append(f"{recipe.data.size}px" if recipe.data.size else "own-size")
        return RunFolder(own.with_name("-".join([own.name, *differs])) / f"seed{seed}")

    def resolved(self) -> list[Recipe]:
        """The recipes, as they are to be trained.

        Raises:
            UserError: A recipe, architecture, data set, key or teacher that does not exist, or a value out of range.
        """
        for seed in self.seeds:
            if not 0 <= seed < 2**32:
                raise UserError(f"seed is {seed}; it must be between 0 and {2**32 - 1}")
        name = source_name(self.data)
        files = list(dict.fromkeys(file for recipe in self.recipes for file in recipes_of(recipe)))
        several = {file: load_recipe(file, name, self.arch, self._everywhere()) for file in files[len(files) == 1 :]}
        given = {k: v for k, v in self.settings.items() if not k.startswith(self._apart)}
        found = []
        for file in files:
            own = {k: v for k, v in given.items() if not several or _is_for(k, several[file], [*several.values()])}
            found.append(load_recipe(file, name, self.arch, {**self._everywhere(), **own}))
        names = [recipe.name for recipe in found]
        for name in names:
            if names.count(name) > 1:
                raise UserError(f"two of the recipes are called {name!r}, and so are their folders; rename one")
        if EDGE in self.recipes:
            if self.budget is not None:
                raise UserError("edge has no budget, for it trains with the network that it prunes; leave --budget out")
            self.prune_recipe()
        teaching = self.teacher is not None or self.settings.get("teacher") or self.fine_tune_teacher
        if teaching and all(r.distill is None for r in found):
            which = f"recipe {names[0]!r} does" if len(names) == 1 else "these recipes do"
            raise UserError(f"{which} not distil; leave --teacher out, or take kd")
        for recipe in found:
            self._check_teacher(recipe)
            self._check_pruning(recipe)
            self._check_budget(recipe)
        self._check_teachers(found)
        alone = next((key for key in self.settings if key.startswith(FOR_TEACHER)), None)
        if alone is not None and not any(isinstance(self.teacher_of(recipe), Recipe) for recipe in found):
            raise UserError(f"{alone} is for a teacher that is trained, and this command trains none")
        if self.compare:
            if all(recipe.distill is None for recipe in found):
                raise UserError("none of these recipes distils, so there is no teacher to compare without")
            found = [each for recipe in found for each in (recipe, *_without_teacher(recipe))]
        if self.only is not None and not self.needed(found):
            teachers = [teacher for recipe in found if isinstance(teacher := self.teacher_of(recipe), Recipe)]
            raise unknown("stage", self.only, {recipe.name for recipe in (*found, *teachers)})
        return found

    def needed(self, recipes: list[Recipe]) -> list[Recipe]:
        """Those of the resolved recipes that are to be trained, or whose teacher is."""
        if self.only is None or (own := [recipe for recipe in recipes if recipe.name == self.only]):
            return recipes if self.only is None else own
        taught = ((recipe, self.teacher_of(recipe)) for recipe in recipes)
        return [recipe for recipe, teacher in taught if isinstance(teacher, Recipe) and teacher.name == self.only]

    def teacher_of(self, recipe: Recipe) -> str | Recipe | None:
        """The teacher of a recipe: what `load_teacher` takes, or a recipe to train; None if it does not distil."""
        if recipe.distill is None:
            return None
        source = self.teacher if self.teacher is not None else recipe.teacher
        if source is None:
            raise UserError(f"recipe {recipe.name!r} distils without a teacher; give --teacher, or leave out [distill]")
        network = source.removeprefix("timm:") if self.fine_tune_teacher else None
        if network is not None:
            if network == source or "," in source:
                raise UserError(f"--fine-tune-teacher is for one --teacher timm:NAME, and this one is {source}")
            if not is_architecture(network):
                raise unknown("timm model", network, architectures())
            source = PRETRAINED
        if source not in recipe_names() and not source.endswith(".toml"):
            return source
        if source.endswith(".toml") and not Path(source).is_file():
            raise UserError(f"recipe {recipe.name!r} names the teacher {source!r}, and there is no such file")
        shared = {key: value for key, value in self.settings.items() if key.split(".")[0] in SHARED}
        alone = {k.removeprefix(FOR_TEACHER): v for k, v in self.settings.items() if k.startswith(FOR_TEACHER)}
        teaching = load_recipe(source, source_name(self.data), network, self._everywhere() | shared | alone)
        if teaching.distill is not None:
            raise UserError(f"recipe {teaching.name!r} needs a teacher itself; train it, and give its run's folder")
        return teaching

    def pruning(self, student: RunFolder, seed: int) -> "Wanted":
        """What `EDGE` trains next: a finished student, pruned, with itself as the teacher."""
        settings = settings_from(str(student.path), self.prune_recipe()) | self._to_pruning()
        more = {"epochs": self.epochs, "schedule": self.schedule, "settings": settings}
        return Wanted(("prune",), self.data, (seed,), self.root, **more)

    def pruned_folder(self, student: Recipe, seed: int) -> RunFolder:
        """Where the run of `pruning` goes."""
        recipe = replace(self.prune_recipe(), model=student.model, data=student.data)
        return self.folder(replace(recipe, **called(student.name, recipe)), seed)

    def prune_recipe(self) -> Recipe:
        """The recipe that `pruning` begins with. Like a teacher, it gets settings of `SHARED`, and those of its own."""
        return load_recipe("prune", source_name(self.data), None, self._everywhere() | self._to_pruning())

    def _to_pruning(self) -> dict[str, Any]:
        return {k: v for k, v in self.settings.items() if k.split(".")[0] in SHARED or k.startswith(FOR_PRUNING)}

    @property
    def _apart(self) -> tuple[str, ...]:
        """How the keys of settings begin that the recipes themselves do not get."""
        return (FOR_TEACHER, FOR_PRUNING) if EDGE in self.recipes else (FOR_TEACHER,)

    def given(self, to_teacher: bool) -> set[str]:
        """The keys that the command sets for recipes, or for the teachers that it trains."""
        keys = {key for key in self.settings if not key.startswith(self._apart)}
        if to_teacher:
            keys = {key for key in keys if key.split(".")[0] in SHARED}
            keys |= {key.removeprefix(FOR_TEACHER) for key in self.settings if key.startswith(FOR_TEACHER)}
            keys |= {"model.name"} if self.fine_tune_teacher else set()
        elif self.arch is not None:
            keys.add("model.name")
        return keys | self._everywhere().keys()

    def _everywhere(self) -> dict[str, Any]:
        given = {
            "schedule.name": self.schedule,
            "schedule.epochs": self.epochs,
            "budget.minutes": self.budget,
        }
        return {key: value for key, value in given.items() if value is not None}

    def _check_pruning(self, recipe: Recipe) -> None:
        """Raise a UserError if a recipe prunes, and there is nothing to prune or the network is to be another one."""
        if recipe.prune is None or "mid_widths" in (recipe.model.args or {}):
            return
        if recipe.model.weights is None:
            raise UserError(f"recipe {recipe.name!r} prunes a trained network; give it: dms-fastai prune RUN")
        for option, given in (("--arch", self.arch), ("--budget", recipe.budget)):
            if given is not None:
                raise UserError(f"recipe {recipe.name!r} has the network that it prunes; leave {option} out")

    def _check_budget(self, recipe: Recipe) -> None:
        """Raise a UserError if the command gives minutes to a recipe that has been fitted to others."""
        if recipe.budget is not None and recipe.budget.fitted and "budget.minutes" in self.given(to_teacher=False):
            option = "--budget" if self.budget is not None else "budget.minutes"
            raise UserError(
                f"recipe {recipe.name!r} has been fitted already, and {option} would change nothing; leave it out, or "
                f"add --set budget.fitted=false"
            )

    def _check_teachers(self, recipes: list[Recipe]) -> None:
        """Raise a UserError if two teachers that are to be trained differ, and would have the same folder."""
        wanted, teachers = {recipe.name for recipe in recipes}, {}
        for teacher in map(self.teacher_of, recipes):
            if not isinstance(teacher, Recipe) or teacher.name in wanted:
                continue
            if teachers.setdefault(teacher.name, teacher) != teacher:
                raise UserError(
                    f"two of the teachers are called {teacher.name!r}, and so are their folders; rename one"
                )

    def _check_teacher(self, recipe: Recipe) -> None:
        """Raise a UserError if a teacher does not exist."""
        source = self.teacher_of(recipe)
        if not isinstance(source, str) or os.path.exists(source):
            return
        for part in (part.strip() for part in source.split(",")):
            if part in recipe_names():
                raise UserError(f"{source!r} holds the recipe {part!r}; of several teachers, each is a run or a file")
            if part.startswith("timm:"):
                if not is_architecture(part.removeprefix("timm:")):
                    raise unknown("timm model", part.removeprefix("timm:"), architectures())
            elif part and not os.path.exists(part) and shipped(part) is None:
                near = get_close_matches(part, recipe_names(), n=1)
                hint = f"did you mean {near[0]!r}?" if near else "give a recipe, a run's folder, a file or timm:NAME"
                raise UserError(f"no teacher at {part}; {hint}")


def _runs_in(folder: Path, below: str = "**/seed*") -> Iterator[Run]:
    """The runs in a folder; a damaged one is left out."""
    for file in sorted(folder.glob(f"{below}/{RunFolder(folder).facts_file.name}")):
        with suppress(UserError):
            yield Run.read(file.parent)


def _recipes_in(folder: Path) -> Iterator[Recipe]:
    """The recipes of the runs in a recipe's folder that have something to lose; a damaged one is left out."""
    for run in _runs_in(folder, "seed*"):
        with suppress(UserError):
            if run.folder.begun:
                yield run.folder.recipe()


def _without_teacher(recipe: Recipe) -> list[Recipe]:
    """The same student on its own, if the recipe distils."""
    if recipe.distill is None:
        return []
    name, title = f"{recipe.name}{ALONE}", f"{recipe.title}, no teacher"
    return [replace(recipe.without_teacher(), name=name, title=title)]


def _is_for(key: str, recipe: Recipe, others: list[Recipe]) -> bool:
    table = key.split(".")[0]
    parts = {part.table for part in PARTS}
    if table in SCALARS or table not in parts:
        return True
    having = [other for other in others if getattr(other, table) is not None]
    return not having or recipe in having
