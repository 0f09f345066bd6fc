"""Types with ranges for the arguments of constructors, and the check of a value against them.

    @checked
    class Cutout(Callback):
        def __init__(self, size: PositiveShare = 0.25): ...

is all that it takes to refuse `Cutout(2)` and, by way of `schema`, `cutout.size = 2` in a recipe.
"""

import datetime
import functools
import inspect
import math
import numbers
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

from .errors import UserError, either

__all__ = [
    "Acute",
    "Count",
    "Counts",
    "Fraction",
    "Magnitude",
    "Milestones",
    "Momentum",
    "Names",
    "NotNegative",
    "OneOf",
    "Pixels",
    "Positive",
    "PositiveShare",
    "Rule",
    "Share",
    "Steps",
    "ValidSplit",
    "checked",
    "convert",
    "described",
]

AnyClass = TypeVar("AnyClass", bound=type)


@dataclass(frozen=True)
class Rule:
    """A range: whether a value lies in it, and the words that complete "it must be ..."."""

    holds: Callable[[Any], bool]
    words: str


@dataclass(frozen=True)
class OneOf:
    """A part that is chosen by name and has settings of its own.

    Attributes:
        choices: Name of the dictionary that has these parts by name, in the argument's module.
    """

    choices: str


Positive = Annotated[float, Rule(lambda v: v > 0, "above 0")]
NotNegative = Annotated[float, Rule(lambda v: v >= 0, "0 or more")]
Share = Annotated[float, Rule(lambda v: 0 <= v <= 1, "between 0 and 1")]
PositiveShare = Annotated[float, Rule(lambda v: 0 < v <= 1, "above 0 and at most 1")]
Fraction = Annotated[float, Rule(lambda v: 0 < v < 1, "above 0 and below 1")]
Momentum = Annotated[float, Rule(lambda v: 0 <= v < 1, "at least 0 and below 1")]
Acute = Annotated[float, Rule(lambda v: 0 <= v < 90, "at least 0 and below 90")]
Magnitude = Annotated[float, Rule(lambda v: 0 <= v <= 10, "between 0 and 10")]
Count = Annotated[int, Rule(lambda v: v >= 1, "at least 1")]
Steps = Annotated[int, Rule(lambda v: v >= 0, "0 or more")]
Pixels = Annotated[int, Rule(lambda v: v >= 8, "at least 8")]
Counts = Annotated[
    tuple[int, ...], Rule(lambda v: len(v) > 0 and min(v) >= 1, "not empty, with each number at least 1")
]
Names = tuple[str, ...]
Milestones = Annotated[
    tuple[int | float, ...],
    Rule(
        lambda v: list(v) == sorted(set(v)) and (all(type(m) is int and m > 0 for m in v) or all(0 < m < 1 for m in v)),
        "rising, and either whole epochs or shares above 0 and below 1",
    ),
]
ValidSplit = Annotated[
    str | float,
    Rule(lambda v: v in ("test", "val") or (isinstance(v, float) and 0 < v < 1), "'test', 'val' or 0 < share < 1"),
]


def checked(cls: AnyClass) -> AnyClass:
    """A class whose constructor refuses arguments that its annotations do not allow.

    Raises, when the class is called:
        UserError: Names the class, the argument and its value, and says what it must be.
    """
    init = cls.__init__
    signature = inspect.signature(init)

    @functools.wraps(init)
    def checked_init(self: Any, *args: Any, **kwargs: Any) -> None:
        for name, value in signature.bind(self, *args, **kwargs).arguments.items():
            hint = signature.parameters[name].annotation
            if is_setting(hint):
                convert(value, hint, f"{type(self).__name__}'s {name}")
        init(self, *args, **kwargs)

    cls.__init__ = checked_init
    return cls


def is_setting(hint: Any) -> bool:
    """Whether a recipe can hold the values that an annotation allows."""
    if get_origin(hint) is Annotated:
        return not any(isinstance(more, OneOf) for more in hint.__metadata__)
    plain = (bool, int, float, str)
    if hint in plain or get_origin(hint) in (Literal, tuple):
        return True
    return _is_union(hint) and any(map(is_setting, get_args(hint)))


def convert(value: Any, hint: Any, where: str) -> Any:
    """`value` in the type of the annotation `hint`. A whole number becomes a float, and a list a tuple.

    Raises:
        UserError: The value has another type or lies outside the range; the message begins with `where`.
    """
    for option in _options(hint):
        found = _fits(value, option.type)
        if found is REFUSED:
            continue
        for rule in option.rules:
            if not rule.holds(found):
                raise UserError(f"{where} is {_shown(value)}; it must be {rule.words}")
        return found
    kinds = [_describe(option.type) for option in _options(hint) if option.type is not type(None)]
    raise UserError(f"{where} is {_shown(value)}; it must be {either(kinds)}")


def _shown(value: Any) -> str:
    """A value as its file has it: a date has no quotes in TOML."""
    return str(value) if isinstance(value, datetime.date | datetime.time) else repr(value)


def described(hint: Any) -> str:
    """The values that an annotation allows, in words: "a finite number above 0"."""
    options = [option for option in _options(hint) if option.type is not type(None)]
    rules = dict.fromkeys(rule.words for option in options for rule in option.rules)
    return ", ".join([either(map(_describe, (option.type for option in options))), *rules])


REFUSED = object()


@dataclass(frozen=True)
class Option:
    """One of the types that a hint allows, and its ranges."""

    type: Any
    rules: tuple[Rule, ...]


def _fits(value: Any, option: Any) -> Any:
    """The value as a type has it, or `REFUSED`."""
    kind = get_origin(option) or option
    if option is Any:
        return value
    if kind is Literal:
        same = any(type(value) is type(choice) and value == choice for choice in get_args(option))
        return value if same else REFUSED
    if option is type(None):
        return value if value is None else REFUSED
    if kind is tuple:
        return _tuple(value, get_args(option)[0])
    if isinstance(value, bool) != (kind is bool):
        return REFUSED
    if kind is float:
        return float(value) if isinstance(value, numbers.Real) and _is_finite(value) else REFUSED
    if kind is int:
        return int(value) if isinstance(value, numbers.Integral) else REFUSED
    return value if isinstance(value, kind) else REFUSED


def _tuple(value: Any, hint: Any) -> Any:
    """A list as a tuple of what `hint` allows, or `REFUSED`."""
    if not isinstance(value, list | tuple):
        return REFUSED
    fits = [[found for o in _options(hint) if (found := _fits(item, o.type)) is not REFUSED] for item in value]
    return tuple(found[0] for found in fits) if all(fits) else REFUSED


def _is_finite(value: numbers.Real) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # a whole number that no float holds
        return False


def _options(hint: Any, rules: tuple[Rule, ...] = ()) -> list[Option]:
    if get_origin(hint) is Annotated:
        return _options(hint.__origin__, (*rules, *(more for more in hint.__metadata__ if isinstance(more, Rule))))
    return [o for part in get_args(hint) for o in _options(part, rules)] if _is_union(hint) else [Option(hint, rules)]


def _is_union(hint: Any) -> bool:
    return get_origin(hint) in (Union, types.UnionType)


def _describe(option: Any) -> str:
    if get_origin(option) is Literal:
        return either(map(repr, get_args(option)))
    if get_origin(option) is tuple:
        lists = {int: "a list of whole numbers, such as [10, 20]", str: 'a list of names, such as ["a", "b"]'}
        return lists.get(get_args(option)[0], "a list of numbers, such as [10, 20]")
    kinds = {bool: "true or false", int: "a whole number", float: "a finite number", str: "text", dict: "a table"}
    return kinds.get(get_origin(option) or option, str(option))
