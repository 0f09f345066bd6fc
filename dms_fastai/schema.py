"""The tables of a recipe, made from the constructors of its parts.

`table_of("callbacks.cutout:Cutout")` is a frozen dataclass of the constructor's settings; its `build` calls the
constructor. Settings are the arguments that have a default and an annotation with the types of `settings`. What else a
part needs, such as a teacher, is an argument of `build`.

Settings are read from the part's source file. Importing the part would import torch and fastai, which takes seconds:
too long for the report of a typing mistake. A test checks that source and constructor agree.
"""

import ast
import dataclasses
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any, ClassVar, get_args, get_origin

from . import settings
from .errors import UserError, either, unknown
from .settings import OneOf, convert

__all__ = [
    "Meaning",
    "Table",
    "choices_of",
    "keys_of",
    "load",
    "meaning_of",
    "read_table",
    "settings_of",
    "table_of",
]

PACKAGE = Path(__file__).parent
WORDS = vars(settings)  # the names that an annotation may use
SECTION = re.compile(r"^(?:Args|Attributes):\n((?: .*\n?|\n)+)", re.M)
ENTRY = re.compile(r"^ {4}(\w+(?:, \w+)*): (.*(?:\n {5,}.*)*)", re.M)


@dataclass(frozen=True)
class Table:
    """The settings of a part.

    Attributes:
        at: Where the part is: module and name, "callbacks.cutout:Cutout".
        chosen: The name that chooses it, if it is one of several.
    """

    at: ClassVar[str]
    chosen: ClassVar[str | None]

    def build(self, *args: Any, **more: Any) -> Any:
        """Build the part with these settings; `args` and `more` are further arguments of its constructor."""
        own = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        if self.chosen is not None:
            del own["name"]
        own = {key: value.build() if isinstance(value, Table) else value for key, value in own.items()}
        return load(self.at)(*args, **own, **more)

    def __reduce__(self) -> tuple:
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.init}
        return _made, (self.at, self.chosen, values)


def _made(at: str, chosen: str | None, values: dict[str, Any]) -> Table:
    return table_of(at, chosen)(**values)


@dataclass(frozen=True)
class Setting:
    """An argument of a part's constructor.

    Attributes:
        hint: Its type and range.
        default: Its default; for a part that is chosen by name, the name.
        choices: For such a part, where the dictionary of the parts is.
    """

    hint: Any
    default: Any
    choices: str | None = None


@dataclass(frozen=True)
class Meaning:
    """What the docstrings of a part say.

    Attributes:
        part: The first paragraph: what the part does.
        settings: What each of its settings means, by name.
    """

    part: str
    settings: dict[str, str]


def load(at: str) -> Any:
    """What is at "module:name" in this package."""
    module, name = at.split(":")
    return getattr(import_module(f"{__package__}.{module}"), name)


def table_of(at: str, chosen: str | None = None) -> type[Table]:
    """The dataclass of the settings of the part at `at`; `chosen` is its name, if it is one of several."""
    return _table_of(at, chosen)


@cache
def _table_of(at: str, chosen: str | None) -> type[Table]:
    fields = [("name", str, dataclasses.field(default=chosen, init=False))] if chosen is not None else []
    for name, setting in settings_of(at).items():
        default = setting.default
        if setting.choices is not None:
            default = table_of(choices_of(setting.choices)[default], default)()
        fields.append((name, setting.hint, dataclasses.field(default=default)))
    name = at.split(":")[1]
    made = dataclasses.make_dataclass(name, fields, bases=(Table,), frozen=True, kw_only=True)
    made.at, made.chosen = at, chosen
    return made


def read_table(at: str, table: Any, where: str, known_keys: Sequence[str] = (), can_be_off: bool = False) -> Table:
    """Read a TOML table as the settings of the part at `at`, or of the one that its "name" chooses there.

    Args:
        at: Where the part is, or a dictionary of parts.
        table: The table.
        where: The dotted key that it stands at.
        known_keys: All keys of a recipe: the error for an unknown key suggests one of them.
        can_be_off: Whether the caller takes true and false, too; the error for what is no table says so.

    Raises:
        UserError: No table, an unknown key or name, or a value of another type or out of range.
    """
    several, chosen = choices_of(at), None
    if not isinstance(table, Mapping):
        named = isinstance(table, str) and (several is not None or "name" in settings_of(at))
        raise UserError(
            f"{where} is {table!r}; "
            + (f"write {where}.name={table}" if named else f"it must be {'true, false or ' * can_be_off}a table")
        )
    if several is not None:
        chosen = table.get("name", next(iter(several)))
        if not isinstance(chosen, str) or chosen not in several:
            raise UserError(f"{where}.name is {chosen!r}; it must be {either(map(repr, several))}")
        at = several[chosen]
    known, values = settings_of(at), {}
    for key, value in table.items():
        if key == "name" and chosen is not None:
            continue
        if key not in known:
            others = [name for name, other in (several or {}).items() if key in settings_of(other)]
            if others:
                raise UserError(f"{where}.{key} is a setting of {either(map(repr, others))}, not of {chosen!r}")
            raise unknown_key(f"{where}.{key}", [f"{where}.{name}" for name in known] or [where], known_keys)
        setting, dotted = known[key], f"{where}.{key}"
        if setting.choices is not None:
            values[key] = read_table(setting.choices, value, dotted, known_keys)
        else:
            values[key] = convert(value, setting.hint, dotted)
    return table_of(at, chosen)(**values)


def unknown_key(dotted: str, near: Sequence[str], known_keys: Sequence[str]) -> UserError:
    """The error for an unknown key. It suggests the same key in another table, or the nearest key of its own."""
    last = dotted.split(".")[-1]
    moved = [key for key in known_keys if key.split(".")[-1] == last]
    if moved and not get_close_matches(dotted, near, cutoff=0.9):
        return UserError(f"unknown recipe key {dotted!r}: did you mean {' or '.join(map(repr, moved))}?")
    return unknown("recipe key", dotted, near)


def keys_of(at: str, where: str) -> list[str]:
    """Every key of a table, dotted; if its `name` chooses a part, the keys of all choices."""
    several = choices_of(at)
    if several is not None:
        found = [f"{where}.name", *(key for other in several.values() for key in keys_of(other, where))]
        return list(dict.fromkeys(found))
    found = []
    for name, setting in settings_of(at).items():
        found += keys_of(setting.choices, f"{where}.{name}") if setting.choices else [f"{where}.{name}"]
    return found


@cache
def settings_of(at: str) -> dict[str, Setting]:
    """The settings of the part at `at`, by name, in their order."""
    module, _ = at.split(":")
    found = _definition(at)
    own: dict[str, Setting] = {}
    init = next((f for f in found.body if isinstance(f, ast.FunctionDef) and f.name == "__init__"), None)
    if init is None:  # a dataclass, or as the class that it builds on
        for base in found.bases:
            if isinstance(base, ast.Name) and base.id in _definitions(module):
                own |= settings_of(f"{module}:{base.id}")
        pairs = [(f.target.id, f.annotation, f.value) for f in found.body if isinstance(f, ast.AnnAssign) and f.value]
    else:
        positional = init.args.args[len(init.args.args) - len(init.args.defaults) :]
        pairs = [(a.arg, a.annotation, d) for a, d in zip(positional, init.args.defaults, strict=True)]
        pairs += [(a.arg, a.annotation, d) for a, d in zip(init.args.kwonlyargs, init.args.kw_defaults, strict=True)]
    for argument, annotation, default in pairs:
        hint = _hint(annotation)
        if hint is None:
            continue
        chooses = get_args(hint)[1:] if get_origin(hint) is Annotated else ()
        choices = next((f"{module}:{more.choices}" for more in chooses if isinstance(more, OneOf)), None)
        try:
            own[argument] = Setting(hint, ast.literal_eval(default), choices)
        except ValueError:
            raise TypeError(f"{at}: the default of {argument} is {ast.unparse(default)}, which is no literal") from None
    return own


@cache
def meaning_of(at: str) -> Meaning:
    """What the docstrings of the class at `at` and of its constructor say of it and of its settings.

    A class without a constructor has the settings of the classes of its module that it builds on, and what they say.
    """
    module, _ = at.split(":")
    found = _definition(at)
    init = [node for node in found.body if isinstance(node, ast.FunctionDef) and node.name == "__init__"]
    texts = [ast.get_docstring(node) or "" for node in (found, *init)]
    entries = [pair for text in texts for body in SECTION.findall(text) for pair in ENTRY.findall(body)]
    told: dict[str, str] = {}
    for base in found.bases if not init else ():
        if isinstance(base, ast.Name) and isinstance(_definitions(module).get(base.id), ast.ClassDef):
            told |= meaning_of(f"{module}:{base.id}").settings
    told |= {name: " ".join(said.split()) for names, said in entries for name in names.split(", ")}
    return Meaning(" ".join(texts[0].partition("\n\n")[0].split()), told)


@cache
def choices_of(at: str) -> dict[str, str] | None:
    """The parts in the dictionary at `at`: their names and where they are; None if `at` is no dictionary."""
    module, _ = at.split(":")
    found = _definition(at)
    if not isinstance(found, ast.Dict):
        return None
    if strange := [ast.unparse(value) for value in found.values if not isinstance(value, ast.Name)]:
        raise TypeError(f"{at} has {strange[0]}; an entry is a class of this file, by its name alone")
    return {ast.literal_eval(key): f"{module}:{value.id}" for key, value in zip(found.keys, found.values, strict=True)}


def _definition(at: str) -> Any:
    """The class, or the value of the variable, at "module:name", as it is written."""
    module, name = at.split(":")
    try:
        return _definitions(module)[name]
    except (FileNotFoundError, KeyError):
        raise LookupError(f"{at} is listed as a part, and there is no {name} in that file of the package") from None


@cache
def _definitions(module: str) -> dict[str, Any]:
    """The classes of a module, and the values of its variables, as they are written."""
    file = PACKAGE.joinpath(*module.split("."))
    file = file / "__init__.py" if file.is_dir() else file.with_suffix(".py")
    body = ast.parse(file.read_text(encoding="utf-8")).body
    classes = {node.name: node for node in body if isinstance(node, ast.ClassDef)}
    assigned = [(node.targets[0], node.value) for node in body if isinstance(node, ast.Assign)]
    assigned += [(node.target, node.value) for node in body if isinstance(node, ast.AnnAssign)]
    return classes | {target.id: value for target, value in assigned if isinstance(target, ast.Name)}


def _hint(annotation: ast.expr | None) -> Any:
    """The type that an annotation means; None if it uses other names than those of `settings`."""
    try:
        return None if annotation is None else eval(ast.unparse(annotation), WORDS)
    except NameError:
        return None
