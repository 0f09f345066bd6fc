"""Recipes: what a run trains, as typed and validated data, read from TOML files that extend one another.

A recipe file holds its changes to another recipe. `extends` names that recipe, or a file relative to this one. The
tables `[on.NAME]` hold further changes, for the data set NAME alone. `load_recipe` follows the chain, applies what the
caller overrides, and returns a `Recipe`; `Recipe.to_toml` writes the whole recipe.

A recipe may have a table for each of `training.parts.PARTS`. A part without a table is off; `mixup = false` switches
off what another file switched on.
"""

import dataclasses
import datetime
import os
import re
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path, PurePath
from typing import Annotated, Any

import tomli_w

from .errors import UserError, unknown
from .files import FACTS
from .legacy import modern_layer, modern_recipe
from .names import architectures, is_architecture
from .schema import Table, choices_of, keys_of, read_table, settings_of, unknown_key
from .settings import Rule, convert
from .training.parts import PARTS, Part

__all__ = [
    "ALONE",
    "Recipe",
    "ablation_of",
    "added_by",
    "all_keys",
    "cut_path",
    "defaults_of",
    "flat",
    "load_recipe",
    "origins_of",
    "parse_setting",
    "recipe_names",
]

Nested = dict[str, Any]


def _where(part: Part) -> str:
    return part.settings or part.at


def _field(part: Part) -> tuple[str, Any, Any]:
    default = read_table(_where(part), {}, part.table) if part.always else None
    return part.table, Table | None, dataclasses.field(default=default)


Tables = dataclasses.make_dataclass("Tables", map(_field, PARTS), frozen=True, kw_only=True)


def _names_a_folder(path: str) -> bool:
    """Whether a text is a relative path to one folder, by one spelling, below any other."""
    plain = not {"", ".", ".."} & {*path.split("/"), *Path(path).parts}
    return plain and not Path(path).is_absolute() and path.isprintable()


RelativePath = Annotated[
    str,
    Rule(
        _names_a_folder,
        "a relative path without '..', '.', empty parts or unprintable characters, because it names the runs' folder",
    ),
]


@dataclass(frozen=True, kw_only=True)
class Recipe(Tables):
    """Everything that a training run needs besides its data, its seed and its folder: a table for each part.

    Raises, when it is made:
        UserError: Settings of the schedule that do not fit together.

    Attributes:
        name: Name of the recipe and of its runs' folder; the file's name by default, not inherited.
        title: Name in tables and plots; `name` by default, not inherited.
        teacher: The teacher, if the recipe distils: whatever `--teacher` takes; a path, or each of several,
            may be relative to the file.
    """

    name: RelativePath = ""
    title: str = ""
    teacher: str | None = None

    def __post_init__(self) -> None:
        if self.teacher is not None and not self.teacher.strip(" ,"):
            raise UserError(f"teacher is {self.teacher!r}; give a recipe, a run's folder, a file or timm:NAME")
        self.schedule.build().hypers(self.optimizer.lr, self.optimizer.momentum)  # refuses what does not fit together

    def to_table(self) -> Nested:
        """The recipe as nested dictionaries, without what is None."""
        words = {key: getattr(self, key) for key in SCALARS}
        tables = {part.table: getattr(self, part.table) for part in PARTS}
        tables = {key: dataclasses.asdict(table) for key, table in tables.items() if table is not None}
        return _plain(words | tables)

    def to_toml(self) -> str:
        """The whole recipe as TOML; `load_recipe` reads it back to an equal one."""
        return tomli_w.dumps(self.to_table())

    def without_teacher(self) -> "Recipe":
        """The recipe as it would be trained without distillation."""
        return dataclasses.replace(self, teacher=None, distill=None, feature_distill=None)

    def without_folders(self) -> "Recipe":
        """The recipe for other machines: of absolute paths, only the ends are left, and images are where they fit."""
        cut = {
            "data": {"labels": cut_path(self.data.labels), "where": "auto"},
            "model": {"weights": cut_path(self.model.weights)},
        }
        tables = {name: dataclasses.replace(getattr(self, name), **ends) for name, ends in cut.items()}
        return dataclasses.replace(self, teacher=cut_path(self.teacher), **tables)


def cut_path(source: str | PurePath | None) -> str | None:
    """Where something is, as other machines have it, too: an absolute path is cut to DATA/RECIPE/seedS, or to the name
    of its file. In a text, several paths have commas between them.
    """
    if not source:
        return source
    paths = map(PurePath, source.split(",")) if isinstance(source, str) else [source]
    return ",".join("/".join(p.parts[-1 if p.suffix else -3 :]) if p.is_absolute() else p.as_posix() for p in paths)


ALONE = "-alone"  # ends the name of a student's recipe without its teacher
AS_IN_PYTHON = {"True": True, "False": False}
DATES = (datetime.date, datetime.time)
NUMBER = re.compile(r"[+-]?(\d+\.|\.\d+)(e[+-]?\d+)?", re.IGNORECASE)  # .5 and 5., which TOML does not have
SCALARS = {"name": RelativePath, "title": str, "teacher": str | None}
WHOLE_FILES = ("name", "title", "extends", "on")  # keys that a file has for all data sets
SAID_ELSEWHERE = {  # arguments of every network that a recipe does not give as such
    "num_classes": "the data say how many classes there are",
    "drop_rate": "that is model.drop_rate",
    "model_name": "that is model.name",
}
PATHS = (("model", "weights"), ("data", "labels"))  # settings that may be relative to the file, as the teacher may


def recipes_dir() -> Path:
    """The recipe files: inside an installed package, or beside it in a checkout."""
    package = Path(__file__).parent
    packed = package / "_recipes"
    return packed if packed.is_dir() else package.parent / "recipes"


def recipe_names() -> list[str]:
    """The shipped recipes, in the order of the ablation: baseline, se, mixup, teacher, kd, then the rest."""
    root = recipes_dir()
    names = {path.relative_to(root).with_suffix("").as_posix() for path in root.rglob("*.toml")}
    first = ["baseline", "se", "mixup", "teacher", "kd"]
    return [name for name in first if name in names] + sorted(names - set(first))


@cache
def all_keys() -> list[str]:
    """Every key of a recipe, dotted."""
    return [*SCALARS, *(key for part in PARTS for key in [part.table, *keys_of(_where(part), part.table)])]


def load_recipe(
    recipe: str | Path,
    data: str = "",
    arch: str | None = None,
    settings: Mapping[str, Any] | None = None,
) -> Recipe:
    """Read a recipe, with its changes for a data set and the caller's own.

    Args:
        recipe: The name of a shipped recipe, or a path to a .toml file.
        data: Name of the data set whose `[on.NAME]` tables apply.
        arch: Architecture in place of the recipe's. If the recipe's is a plain one, NAME_plain, the plain variant of
            `arch` is taken, where there is one.
        settings: Values by dotted key, such as {"schedule.epochs": 30}; they win over everything else.

    Raises:
        UserError: An unknown recipe, architecture or key (suggests the nearest known one), or a value out of range.
    """
    layers = _layered(recipe, data, arch, settings)
    _refuse_unknown(layers)
    written = [layer["optimizer"] for at, layer in layers if at != "--set" and "optimizer" in layer]
    old = not any("name" in optimizer for optimizer in written if isinstance(optimizer, Mapping))
    table: Nested = {}
    for _, layer in layers:
        table = _merge(table, layer)
    mixing = [key for key in ("mixup", "cutmix", "mixup_or_cutmix") if isinstance(table.get(key), Mapping)]
    if len(mixing) > 1 and "mixup_or_cutmix" in mixing:
        raise UserError(f"{' and '.join(mixing)} would mix the same batch; leave out one: --set {mixing[0]}=false")
    try:
        built = _read(modern_recipe(table, old))
    except UserError as error:
        raise _with_its_file(error, layers, old) from None
    if built.feature_distill is not None and built.distill is None:
        raise UserError("feature_distill needs a teacher; extend kd or add [distill], or leave it out")
    for key in ("sam", "fixed_views"):
        if built.feature_distill is not None and getattr(built, key) is not None:
            raise UserError(f"feature_distill does not go with {key}; leave one of the two out: --set {key}=false")
    for key, instead in SAID_ELSEWHERE.items():
        if key in (built.model.args or {}):
            raise UserError(f"model.args.{key} is {built.model.args[key]!r}; leave it out: {instead}")
    if not is_architecture(built.model.name) and not _is_a_runs(_find(recipe)):  # which needs no network to be read
        raise unknown("model", built.model.name, architectures())
    taught = [file for file in _chain(_find(recipe)) if "teacher" in _toml(file) and not _is_a_runs(file)]
    if taught and not any("distill" in layer for _, layer in layers):
        raise UserError(
            f"{_shown(taught[0])} has the teacher {built.teacher!r}, and does not distil; extend kd, or add [distill]"
        )
    return built


def _refuse_unknown(layers: Iterable[tuple[str, Nested]]) -> None:
    """Raise a UserError if a layer has a key or a table that no recipe has; it names the file, if it is in one."""
    for origin, layer in layers:
        for key in layer:
            if key not in SCALARS and key not in TABLES:
                error = unknown_key(key, [*SCALARS, *TABLES], all_keys())
                raise error if origin == "--set" else UserError(f"{origin}: {error.message}")


def _with_its_file(error: UserError, layers: Iterable[tuple[str, Nested]], old: bool) -> UserError:
    """The error of a merged table, and the file that brings it in, unless an option of the caller's does."""
    table: Nested = {}
    for origin, layer in layers:
        table = _merge(table, layer)
        try:
            _read(modern_recipe(table, old))
        except UserError as found:
            if found.message == error.message:
                return UserError(f"{origin}: {error.message}") if ".toml" in origin else error
    return error


def origins_of(recipe: str | Path, data: str = "", settings: Mapping[str, Any] | None = None) -> dict[str, str]:
    """Where the values of `load_recipe` come from.

    Args:
        recipe, data, settings: As in `load_recipe`.

    Returns:
        For each dotted key that is not left to its default, what has the last word on it: a file, with [on.NAME] if it
        says so for the data set alone, or "--set". For each table, what has switched it on.
    """
    found: dict[str, str] = {}
    table: Nested = {}
    for origin, layer in _layered(recipe, data, None, settings):
        on = {key for key, value in _dotted(table).items() if isinstance(value, Mapping)}
        said = _dotted(layer).items()
        found |= {key: origin for key, value in said if key not in on or not isinstance(value, Mapping)}
        table = _merge(table, layer)
    return {key: origin for key, origin in found.items() if key in _dotted(table)}


def parse_setting(text: str) -> tuple[str, Any]:
    """Read one `table.key=value` of the command line. The value is TOML, or as in Python; a bare word is a string, and
    so is a date, which no key is.

    Raises:
        UserError: No key or no value, or a key with an empty word.
    """
    key, equals, value = text.partition("=")
    key, value = key.strip(), value.strip()
    if not key or not equals or not value:
        raise UserError(f"setting {text!r} has no key or no value; write table.key=value, such as optimizer.lr=0.05")
    if "" in key.split("."):
        raise UserError(
            f"setting {text!r} has a dot too many in its key; write table.key=value, such as optimizer.lr=0.05"
        )
    try:
        read = tomllib.loads(f"value = {value}")["value"]
        return key, value if isinstance(read, DATES) else read
    except tomllib.TOMLDecodeError:
        return key, AS_IN_PYTHON[value] if value in AS_IN_PYTHON else float(value) if NUMBER.fullmatch(value) else value


def ablation_of(recipe: str | Path) -> list[str]:
    """The names of the recipes that a recipe extends, from the one that extends nothing down to itself."""
    return [_name_of(file) for file in reversed(_chain(_find(recipe)))]


def added_by(recipe: str | Path) -> Nested:
    """What a recipe's own file holds: what it adds to the one that it extends."""
    return {key: value for key, value in _own(_find(recipe)).items() if key not in ("title", "on")}


@cache
def defaults_of(table: str) -> Nested:
    """The settings of a part, by dotted key, where nothing but its table's name is written."""
    part = next(part for part in PARTS if part.table == table)
    made = Recipe(**{table: read_table(_where(part), {}, table)})
    return {key: value for key, value in flat(made.to_table()).items() if key.partition(".")[0] == table}


def _layered(
    recipe: str | Path, data: str, arch: str | None, settings: Mapping[str, Any] | None
) -> list[tuple[str, Nested]]:
    """What a recipe is made up of, the last word last: where each layer comes from, and what it says."""
    file = _find(recipe)
    layers = [layer for f in reversed(_chain(file)) for layer in _layers(f, data)]
    layers += _called(file)
    if arch is not None:
        layers.append(("--arch", {"model": {"name": _variant(arch, [layer for _, layer in layers])}}))
    layers += [("--set", _nest(key.split("."), value)) for key, value in (settings or {}).items()]
    return [(origin, modern_layer(layer)) for origin, layer in layers]


def _find(recipe: str | Path) -> Path:
    packed = recipes_dir() / f"{recipe}.toml"
    if str(recipe) in recipe_names():
        return packed
    path = Path(recipe)
    if path.suffix == ".toml":
        if path.is_file():
            return path
        raise UserError(f"no such recipe file: {path}")
    raise unknown("recipe", str(recipe), [*recipe_names(), "ablation"])


def _name_of(file: Path) -> str:
    root = recipes_dir().resolve()
    file = file.resolve()
    return file.relative_to(root).with_suffix("").as_posix() if file.is_relative_to(root) else file.stem


def _chain(file: Path) -> list[Path]:
    """The file and those it extends, nearest first."""
    files = [file]
    while (base := _toml(files[-1]).get("extends")) is not None:
        following = recipes_dir() / f"{base}.toml" if base in recipe_names() else files[-1].parent / str(base)
        if not following.is_file():
            raise UserError(f"{files[-1]} extends {base!r}, which is neither a recipe nor a file beside it")
        if following.resolve() in {f.resolve() for f in files}:
            raise UserError(f"{following} extends itself, by way of {files[-1]}")
        files.append(following)
    return files


def _own(file: Path) -> Nested:
    return {key: value for key, value in _toml(file).items() if key != "extends"}


def _layers(file: Path, data: str) -> list[tuple[str, Nested]]:
    """What a file says, and what it says further for a data set.

    Raises:
        UserError: That is no table, or has keys that are the whole file's.
    """
    table = _own(file)
    on = table.pop("on", {})
    more = on.get(data, {}) if isinstance(on, Mapping) else on
    if not isinstance(more, Mapping):
        raise UserError(f"{file}: on is {on!r}; it must hold tables, [on.NAME.TABLE]")
    for key in WHOLE_FILES:
        if key in more:
            raise UserError(f"{file}: [on.{data}] has {key!r}, which is the whole file's; give it above the tables")
    if _is_a_runs(file):  # its paths are from the folder where it was trained
        return [(_shown(file), table), (f"{_shown(file)} [on.{data}]", dict(more))]
    return [(_shown(file), _beside(file, table)), (f"{_shown(file)} [on.{data}]", _beside(file, more))]


def _is_a_runs(file: Path) -> bool:
    return (file.parent / FACTS).is_file()


def _beside(file: Path, layer: Mapping[str, Any]) -> Nested:
    """A layer of a file with the paths of what lies beside the file, whatever the current folder."""
    found = dict(layer)
    if isinstance(teacher := found.get("teacher"), str):
        whole = _path(file, teacher)
        parts = (_path(file, part.strip()) if part.strip() else part for part in teacher.split(","))
        found["teacher"] = whole if whole != teacher else ",".join(parts)
    for name, key in PATHS:
        table = found.get(name)
        if isinstance(table, Mapping) and isinstance(table.get(key), str):
            found[name] = {**table, key: _path(file, table[key])}
    return found


def _path(file: Path, source: str) -> str:
    """A source as it is or, if that is the path of something beside a recipe's file, from the current folder."""
    named = source in ("", "timm", *recipe_names())
    return source if named or not os.path.exists(file.parent / source) else str(file.parent / source)


def _called(file: Path) -> list[tuple[str, Nested]]:
    """Name and title, which are not inherited: nothing else tells two recipes apart in a table of results."""
    table = _toml(file)
    name = table.get("name", _name_of(file))
    named = {"name": (name, "the file's name"), "title": (table.get("title", name), "the recipe's name")}
    return [(_shown(file) if key in table else at, {key: value}) for key, (value, at) in named.items()]


def _shown(file: Path) -> str:
    """A recipe's file, by its name if it comes with the package."""
    return f"{_name_of(file)}.toml" if file.resolve().is_relative_to(recipes_dir().resolve()) else str(file)


def _toml(file: Path) -> Nested:
    try:
        return tomllib.loads(file.read_text(encoding="utf-8-sig"))  # some editors begin a file with a mark
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise UserError(f"{file} is not valid TOML: {error}") from None


def _merge(table: Mapping[str, Any], layer: Mapping[str, Any], where: str = "") -> Nested:
    """Merge a later layer into a table; nested tables are merged in turn.

    A layer that chooses another part by its name inherits those settings that the new part has, too; one that names
    another network inherits no arguments of the one before. `false` in place of a table switches the part off, `true`
    switches it on.
    """
    merged = dict(table)
    several = choices_of(CHOOSES[where]) if where in CHOOSES else None
    name = layer.get("name", merged.get("name"))
    if several and isinstance(name, str) and name in several and name != merged.get("name"):
        merged = {key: value for key, value in merged.items() if key in settings_of(several[name])}
    if where == "model" and name != merged.get("name", name):
        merged.pop("args", None)
    for key, value in layer.items():
        old, dotted = merged.get(key), f"{where}.{key}" if where else key
        if value is True and dotted in TABLES:
            value = {}
        both = isinstance(value, Mapping) and (isinstance(old, Mapping) or dotted in CHOOSES)
        merged[key] = _merge(old if isinstance(old, Mapping) else {}, value, dotted) if both else value
    return merged


def _choosing() -> dict[str, str]:
    """Where a name chooses one of several parts, by dotted key."""
    tables = {part.table: _where(part) for part in PARTS}
    found = {table: at for table, at in tables.items() if choices_of(at) is not None}
    for table, at in tables.items():
        inside = settings_of(at).items() if table not in found else ()
        found |= {f"{table}.{key}": setting.choices for key, setting in inside if setting.choices}
    return found


CHOOSES = _choosing()
TABLES = {part.table for part in PARTS}


def _variant(arch: str, layers: Iterable[Mapping[str, Any]]) -> str:
    """The architecture, or its plain variant if it replaces a plain one."""
    models = [layer["model"] for layer in layers if isinstance(layer.get("model"), Mapping)]
    plain = str(next((model["name"] for model in reversed(models) if "name" in model), "")).endswith("_plain")
    return f"{arch}_plain" if plain and is_architecture(f"{arch}_plain") else arch


def flat(table: Mapping[str, Any], prefix: str = "") -> Nested:
    """A nested table as one of dotted keys; a part without settings becomes a key with the value true."""
    found: Nested = {}
    for key, value in table.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{prefix}{key}.") or ({} if prefix else {key: True})
        else:
            found[f"{prefix}{key}"] = value
    return found


def _dotted(table: Mapping[str, Any], prefix: str = "") -> Nested:
    """The values in a nested table, by dotted key, and the tables in it."""
    found: Nested = {}
    for key, value in table.items():
        found[f"{prefix}{key}"] = value
        if isinstance(value, Mapping):
            found |= _dotted(value, f"{prefix}{key}.")
    return found


def _nest(keys: list[str], value: Any) -> Nested:
    return {keys[0]: _nest(keys[1:], value) if keys[1:] else value}


def _plain(value: Any) -> Any:
    """The value as TOML would give it: without what is None, and with lists for tuples."""
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items() if inner is not None}
    return list(value) if isinstance(value, tuple) else value


def _read(table: Mapping[str, Any]) -> Recipe:
    """The recipe that a merged table is."""
    parts = {part.table: part for part in PARTS}
    values = {}
    for key, value in table.items():
        if key in SCALARS:
            values[key] = convert(value, SCALARS[key], key)
        elif value is not False or parts[key].always:
            values[key] = read_table(_where(parts[key]), value, key, all_keys(), not parts[key].always)
    return Recipe(**values)
