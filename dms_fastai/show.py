"""What `dms-fastai show` prints: a recipe with the meaning and the origin of each value, and a list of all keys."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from textwrap import wrap
from typing import Any

import tomli_w

from .errors import either
from .recipes import SCALARS, Recipe, load_recipe, origins_of
from .schema import Table, choices_of, meaning_of, settings_of
from .settings import described
from .terminal import printable
from .training.parts import PARTS

__all__ = ["Key", "annotated", "every_key", "list_of_keys", "toml_value"]

WIDTH, INDENT = 100, "    "
BUDGET = "# A run chooses batch size, epochs and network anew, to fit [budget] and the data, where no --set says them."


@dataclass(frozen=True)
class Key:
    """A key of a recipe.

    Attributes:
        key: Dotted.
        kind: The values that it may have, in words.
        default: Its default, as TOML; "" if it has none.
        meaning: What it means.
        of: Of a part that is one of several: the names of those that have this setting; () if all have it.
    """

    key: str
    kind: str
    default: str
    meaning: str
    of: tuple[str, ...] = ()


def every_key() -> list[Key]:
    """Every key of a recipe, in the order of a training step. A part without settings is a key of its own."""
    said = meaning_of("recipes:Recipe").settings
    keys = [Key(key, described(hint), "", said[key]) for key, hint in SCALARS.items()]
    for part in PARTS:
        at = part.settings or part.at
        keys += _keys(at, part.table) or [Key(part.table, "true or false", "false", meaning_of(at).part)]
    return keys


def list_of_keys() -> str:
    """Every key with its default; below it, its values and its meaning."""
    lines = []
    for key in every_key():
        lines.append(f"{key.key} = {key.default}" if key.default else key.key)
        only = f", for {either(map(json.dumps, key.of))}" if key.of else ""
        lines += wrap(f"{key.kind}{only}: {key.meaning}", WIDTH, initial_indent=INDENT, subsequent_indent=INDENT)
    return "\n".join(lines) + "\n"


def _keys(at: str, where: str) -> list[Key]:
    """The keys of the table `where`, whose part or parts are at `at`."""
    several = choices_of(at)
    if several is None:
        return [key for name in settings_of(at) for key in _setting(at, name, where)]
    parts = "; ".join(f"{json.dumps(name)}: {_sentence(place)}" for name, place in several.items())
    found = {"name": Key(f"{where}.name", either(map(json.dumps, several)), json.dumps(next(iter(several))), parts)}
    for name, place in several.items():
        for key in _keys(place, where):
            before = found.get(key.key)
            found[key.key] = replace(key, of=(name,)) if before is None else _joined(before, key, name)
    return [replace(key, of=()) if len(key.of) == len(several) else key for key in found.values()]


def _joined(key: Key, other: Key, name: str) -> Key:
    """The key of several parts, of which the one called `name` may have another default."""
    first = key.default.split("; for ")[0]
    default = key.default if first == other.default else f"{key.default}; for {json.dumps(name)}: {other.default}"
    return replace(key, default=default, of=(*key.of, name))


def _sentence(at: str) -> str:
    return meaning_of(at).part.partition(". ")[0].rstrip(".")


def _setting(at: str, name: str, where: str) -> list[Key]:
    setting = settings_of(at)[name]
    if setting.choices is not None:
        return _keys(setting.choices, f"{where}.{name}")
    default = "" if setting.default is None else toml_value(setting.default)
    return [Key(f"{where}.{name}", described(setting.hint), default, meaning_of(at).settings[name])]


def annotated(recipe: str | Path, data: str = "", settings: Mapping[str, Any] | None = None) -> str:
    """A whole recipe as TOML. Above each key stands what it means, and after its value where that comes from.

    Args:
        recipe, data, settings: As in `load_recipe`, which reads the text back to the same recipe.

    Raises:
        UserError: As in `load_recipe`.
    """
    found = load_recipe(recipe, data, settings=settings)
    meanings = {key.key: key.meaning for key in every_key()}
    for part in PARTS:
        meanings |= _meanings(getattr(found, part.table), part.table)
    lines = _Lines(meanings, origins_of(recipe, data, settings))
    chosen = found.budget is not None and not found.budget.fitted
    first = [BUDGET] if chosen else []
    return "\n".join([*first, *lines.of_recipe(found)]) + "\n"


def _meanings(table: Table | None, where: str) -> dict[str, str]:
    """What the keys of a table mean to the part that is chosen: each optimiser has a weight decay of its own."""
    if table is None:
        return {}
    found = {f"{where}.{name}": said for name, said in meaning_of(table.at).settings.items()}
    for name, value in vars(table).items():
        found |= _meanings(value, f"{where}.{name}") if isinstance(value, Table) else {}
    return found


@dataclass(frozen=True)
class _Lines:
    """The lines of an annotated recipe, of the meanings and the origins of its keys."""

    meanings: Mapping[str, str]
    origins: Mapping[str, str]

    def of_recipe(self, recipe: Recipe) -> Iterator[str]:
        table = recipe.to_table()
        for key in SCALARS:
            if key in table:
                yield from self.of_value(key, key, table[key])
        for part in PARTS:
            if part.table in table:
                told = meaning_of(getattr(recipe, part.table).at).part
                switched = "" if part.always else self.origin(part.table)
                yield from self.of_table((part.table,), table[part.table], told, switched)

    def of_table(
        self, where: tuple[str, ...], table: Mapping[str, Any], meaning: str, switched: str = ""
    ) -> Iterator[str]:
        """Values first, then the tables in it, as TOML wants them."""
        yield ""
        yield from _comment(meaning)
        yield _header(where) + switched
        inner = {key: value for key, value in table.items() if isinstance(value, Mapping)}
        for key, value in table.items():
            if key not in inner:
                yield from self.of_value(".".join((*where, key)), key, value)
        for key, value in inner.items():
            yield from self.of_table((*where, key), value, self.meanings.get(".".join((*where, key)), ""))

    def of_value(self, dotted: str, key: str, value: Any) -> Iterator[str]:
        yield from _comment(self.meanings.get(dotted, ""))
        begun = tomli_w.dumps({key: 0}).strip().removesuffix("0")
        yield begun + toml_value(value) + self.origin(dotted)

    def origin(self, dotted: str) -> str:
        return f"  # {printable(self.origins.get(dotted, 'default'))}"


def _header(keys: tuple[str, ...]) -> str:
    table: dict[str, Any] = {}
    for key in reversed(keys):
        table = {key: table}
    return tomli_w.dumps(table).strip()


def toml_value(value: Any) -> str:
    """A value as TOML; a list in one line, but for one that holds tables."""
    if isinstance(value, (list, tuple)) and not any(isinstance(item, Mapping) for item in value):
        return f"[{', '.join(map(toml_value, value))}]"
    return tomli_w.dumps({"": value}).partition("=")[2].strip()


def _comment(text: str) -> list[str]:
    return [f"# {line}" for line in wrap(text, WIDTH, break_on_hyphens=False)]
