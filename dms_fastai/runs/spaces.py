"""What `tune` searches: the values that a recipe's key may have, as the command line says them, without torch."""

import math
import re
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from ..errors import UserError
from ..recipes import Recipe, parse_setting
from .wanted import SEVERAL, Wanted

__all__ = ["INSTEAD", "Space", "parse_space", "searched"]

HELD_OUT = 0.1  # share of the training images that trials are judged by, where neither recipe nor command says another

INSTEAD = "leave data.valid out, or give a share of the training images: --set data.valid=0.1"

OPTIONS = {"schedule.epochs": "epochs", "schedule.name": "schedule", "model.name": "arch", "teacher": "teacher"}
NAMES = ("name", "title")  # keys on which nothing of a training depends

RANGE = re.compile(r"(log|uniform|int)\((.+)\)")
DIGITS = 3  # of a number that is drawn; more would only be harder to read


@dataclass(frozen=True)
class Space:
    """The values that a key may have.

    Attributes:
        key: The key, such as "optimizer.lr".
        kind: "log" and "uniform" are ranges of numbers, drawn evenly by their logarithm or by themselves; "int" is a
            range of whole numbers, and "list" are values of any kind.
        values: The lowest and the highest number, both included; or all values.
    """

    key: str
    kind: Literal["log", "uniform", "int", "list"]
    values: tuple[Any, ...]

    def setting(self, drawn: Any) -> Any:
        """What the key is set to: a number that was drawn, with few digits; of a list, the value at that place."""
        if self.kind == "list":
            return self.values[drawn]
        if self.kind == "int":
            return drawn
        low, high = self.values
        return min(max(float(f"{drawn:.{DIGITS}g}"), low), high)

    def __str__(self) -> str:
        if self.kind == "list":
            return f"[{', '.join(map(str, self.values))}]"
        return f"{self.kind}({self.values[0]:g}, {self.values[1]:g})"


def parse_space(text: str) -> Space:
    """Read one `table.key=space` of the command line: log(0.01, 1), uniform(0, 0.5), int(1, 8) or [64, 128, 256].

    Raises:
        UserError: It is none of these, or a range is empty.
    """
    key, value = parse_setting(text)
    found = RANGE.fullmatch(value) if isinstance(value, str) else None
    if isinstance(value, list) and value:
        return Space(key, "list", tuple(value))
    if found is None:
        raise UserError(f"{text!r} is no space; write {key}=log(0.01,1), uniform(0,0.5), int(1,8) or [64,128,256]")
    kind, inside = found.groups()
    numbers = _numbers(inside)
    if len(numbers) != 2 or not numbers[0] < numbers[1]:
        raise UserError(f"{text!r} is no range; write {kind}(low,high), with two numbers, the lower one first")
    if kind == "log" and numbers[0] <= 0:
        raise UserError(f"{text!r} begins at {numbers[0]:g}, which has no logarithm; take a number above 0, or uniform")
    if kind == "int" and not all(isinstance(number, int) for number in numbers):
        raise UserError(f"{text!r} is a range of whole numbers, and these are not; take uniform")
    return Space(key, kind, tuple(numbers) if kind == "int" else tuple(map(float, numbers)))


def _numbers(text: str) -> list[float]:
    """The numbers in a text such as "0.01, 1"; none if it has anything else."""
    try:
        found = tomllib.loads(f"value = [{text}]")["value"]
    except tomllib.TOMLDecodeError:
        return []
    numbers = [each for each in found if isinstance(each, (int, float)) and not isinstance(each, bool)]
    return numbers if len(numbers) == len(found) and all(map(math.isfinite, numbers)) else []


def searched(wanted: Wanted, over: Sequence[Space]) -> Wanted:
    """What is wanted, with images held out to judge by and a folder for the search.

    Args:
        wanted: One recipe and one seed.
        over: What to search.

    Raises:
        UserError: As in `Wanted.resolved`, for any end of a space; a key is both set and searched, searched twice, or
            only a name; trials would be judged by test images; or each would train a teacher.
    """
    keys = [space.key for space in over]
    for key in keys:
        option = OPTIONS.get(key)
        if option is not None and getattr(wanted, option) is not None:
            raise UserError(f"{key} is given twice, by --{option} and by --over; search it or set it, once")
        if key in wanted.settings or keys.count(key) > 1:
            raise UserError(f"{key} is given twice; search it or set it, once")
        if key in NAMES:
            raise UserError(f"{key} changes nothing in a training; search a key that does, such as optimizer.lr")
    for table in keys:
        inside = [key for key in (*keys, *wanted.settings) if key.startswith(f"{table}.")]
        if inside:
            raise UserError(
                f"{table} is searched, and {inside[0]} would switch it on in every trial; leave one of them out"
            )
    if wanted.recipes[0] in SEVERAL:
        raise UserError(f"{wanted.recipes[0]} is several recipes; search one at a time")
    [recipe] = replace(wanted, settings=wanted.settings | {s.key: s.values[0] for s in over}).resolved()
    if recipe.budget is not None and not recipe.budget.fitted:
        raise UserError(
            f"recipe {recipe.name!r} has a budget, which would be fitted anew in each trial; search the recipe.toml of "
            f"its run, or another recipe"
        )
    for space in over:
        for value in space.values:
            trial = replace(wanted, settings=wanted.settings | {space.key: value})
            _refuse_training(trial, *trial.resolved())
    valid = wanted.settings.get("data.valid")
    if valid == "test" or "data.valid" in keys:
        raise UserError(f"a search that looks at the test images would fit them; {INSTEAD}")
    held_out = {"data.valid": HELD_OUT} if valid is None and recipe.data.valid == "test" else {}
    out = wanted.out or wanted.root / "tune" / recipe.name
    return replace(wanted, out=out, settings=wanted.settings | held_out)


def _refuse_training(wanted: Wanted, recipe: Recipe) -> None:
    """Raise a UserError if the recipe's teacher is still to be trained."""
    if not isinstance(wanted.teacher_of(recipe), str | None):
        raise UserError(
            f"each trial would train the teacher of {recipe.name!r}; train it first, and give --teacher RUN"
        )
