"""The stages of a command as commands of their own, for whatever starts them: without torch or a look at the images."""

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..recipes import Recipe, parse_setting
from ..run_folder import RunFolder
from ..show import toml_value
from .wanted import EDGE, Wanted, recipes_of

__all__ = ["Command", "commands_of"]


@dataclass(frozen=True)
class Command:
    """A command that trains one stage.

    Attributes:
        number: From 1, in an order in which nothing comes before what it waits for.
        words: The command.
        after: Numbers of those that have to be finished before.
        folder: Where its run goes.
    """

    number: int
    words: tuple[str, ...]
    after: tuple[int, ...]
    folder: RunFolder

    @property
    def line(self) -> str:
        """The command, as a shell takes it."""
        return shlex.join(self.words)

    def told(self) -> dict[str, Any]:
        """The command as JSON has it."""
        where, finished = self.folder.path, self.folder.finished
        return {
            "id": self.number,
            "command": self.line,
            "after": list(self.after),
            "folder": str(where),
            "finished": finished,
        }


def commands_of(wanted: Wanted) -> list[Command]:
    """A command for each stage and seed, teachers before their students.

    Each is the whole command with --only: it resolves the same recipes, and so trains what the whole one would.

    Raises:
        UserError: As in `Wanted.resolved`; or a recipe is fitted to the machine that trains it, or has a teacher that
            the command itself trains, but by its folder.
    """
    recipes, found = wanted.resolved(), {}
    for seed in wanted.seeds:
        for recipe in recipes:
            _refuse_budget(recipe)
            teaching, after = wanted.teacher_of(recipe), ()
            if isinstance(teaching, Recipe):
                teaching = next((other for other in recipes if other.name == teaching.name), teaching)
                _refuse_budget(teaching)
                sized = _sized(recipe, teaching, wanted)
                after = (_add(found, wanted, sized, seed, teacher=teaching not in recipes),)
            number = _add(found, wanted, recipe, seed, after)
            if EDGE in wanted.recipes and [recipe.name] == recipes_of(EDGE):
                words = (*_words(wanted), "--seed", str(seed), "--wait")  # what is left: pruning, files and a table
                folder = wanted.pruned_folder(recipe, seed)
                found[folder.path] = Command(len(found) + 1, words, (number,), folder)
    trained = {path.resolve() for path in found}
    for recipe in recipes:
        teacher = wanted.teacher_of(recipe)
        if isinstance(teacher, str) and Path(teacher).resolve() in trained:
            raise UserError(f"this command trains {teacher} itself; give its recipe as --teacher")
    return list(found.values())


def _add(
    found: dict[Path, Command],
    wanted: Wanted,
    recipe: Recipe,
    seed: int,
    after: tuple[int, ...] = (),
    teacher: bool = False,
) -> int:
    """Add a stage's command, unless it is there; gives its number. `teacher` as in `Wanted.folder`."""
    folder = wanted.folder(recipe, seed, teacher)
    if folder.path not in found:
        words = (*_words(wanted), "--only", recipe.name, "--seed", str(seed), *(["--wait"] if after else []))
        found[folder.path] = Command(len(found) + 1, words, after, folder)
    return found[folder.path].number


def _words(wanted: Wanted) -> list[str]:
    """The command, but for its seeds."""
    options = {
        "--arch": wanted.arch,
        "--teacher": wanted.teacher,
        "--epochs": wanted.epochs,
        "--schedule": wanted.schedule,
        "--out": wanted.out,
    }
    words = ["dms-fastai", "run", *wanted.recipes, "--data", str(wanted.data)]
    words += [word for option, value in options.items() if value is not None for word in (option, str(value))]
    words += ["--fine-tune-teacher"] if wanted.fine_tune_teacher else []
    words += ["--compare"] if wanted.compare else []
    return words + [word for key, value in wanted.settings.items() for word in ("--set", _setting(key, value))]


def _setting(key: str, value: Any) -> str:
    """The text that `parse_setting` reads as this key and value; a bare word where that will do."""
    text = f"{key}={value}"
    bare = isinstance(value, str) and value.isprintable() and value.strip() and parse_setting(text) == (key, value)
    return text if bare else f"{key}={toml_value(value)}"


def _sized(recipe: Recipe, teaching: Recipe, wanted: Wanted) -> Recipe:
    """A teacher, at the size that its student's weights to begin from bring along; that takes torch to find out."""
    if recipe.model.weights is None and teaching.model.weights is None:
        return teaching
    from .plan import Opened, at_size_of

    return at_size_of(recipe, teaching, Opened(wanted.data))


def _refuse_budget(recipe: Recipe) -> None:
    if recipe.budget is not None and not recipe.budget.fitted:
        raise UserError(
            f"recipe {recipe.name!r} has a budget, which is fitted to the machine that trains it; plan the recipe.toml "
            f"of its run, or another recipe"
        )
