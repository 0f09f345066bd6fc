"""Recipes: what a run trains, as typed and validated data, read from TOML files that extend one another.

A recipe file holds what it changes: `extends` names the recipe that it starts from, or a file relative to itself, and
the tables `[on.NAME]` hold what changes further for the data set NAME. `load_recipe` follows the chain, applies what
the caller overrides, and returns a `Recipe`; `Recipe.to_toml` writes it out whole.
"""

import dataclasses
import math
import os
import tomllib
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import timm
import tomli_w

from .errors import UserError, unknown
from .models import DMSResNet  # noqa: F401  (registers the architectures)

__all__ = ["Recipe", "ablation_of", "added_by", "flat", "known_models", "load_recipe", "parse_setting", "recipe_names"]

Table = dict[str, Any]


def _checked(default: Any, check: Callable[[Any], bool], rule: str) -> Any:
    """A dataclass field whose values must satisfy `check`; `rule` completes "it must be ..."."""
    return field(default=default, metadata={"check": check, "rule": rule})


def _positive(default: Any) -> Any:
    return _checked(default, lambda v: v > 0, "above 0")


def _not_negative(default: Any) -> Any:
    return _checked(default, lambda v: v >= 0, "0 or more")


def _at_least(low: int, default: Any) -> Any:
    return _checked(default, lambda v: v >= low, f"at least {low}")


def _share(default: Any) -> Any:
    return _checked(default, lambda v: 0 <= v <= 1, "between 0 and 1")


def _momentum(default: Any) -> Any:
    return _checked(default, lambda v: 0 <= v < 1, "at least 0 and below 1")


@dataclass(frozen=True)
class Model:
    """A timm entry. `args` are further arguments of it, such as `widths = [32, 64, 128]`."""

    name: str = "dmsresnet"
    drop_rate: float = _momentum(0.0)
    args: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Data:
    """What `load_data` is given. `valid` is "test", "val", or the share of training pictures to hold out."""

    batch_size: int = _at_least(1, 128)
    size: int | None = _at_least(8, None)
    valid: str | float = _checked(
        "test", lambda v: v in ("test", "val") or _inside(v), "'test', 'val' or 0 < share < 1"
    )


@dataclass(frozen=True)
class Augment:
    """Random crops out of a border of `pad` times the size, mirroring with probability `flip`, TrivialAugment, Cutout.

    The border is black or mirrors the picture. With `alternate` each picture is mirrored in every other epoch, rather
    than by chance. `cutout` is the side of a blanked square as a share of the picture's; 0
    blanks nothing.
    """

    pad: float = _share(0.125)
    flip: float = _share(0.5)
    border: Literal["black", "mirror"] = "black"
    alternate: bool = False
    trivial: bool = False
    cutout: float = _share(0.0)


@dataclass(frozen=True)
class Optimizer:
    """SGD with momentum and L2 weight decay; gradient values are clipped to +-`clip_value` where it is given.

    `sam` is the rho of sharpness-aware minimisation, which takes a second pass a step.
    The paper decays all parameters; `wd_bn_bias = false` spares batch norms and biases.
    """

    lr: float = _positive(0.1)
    momentum: float = _momentum(0.9)
    weight_decay: float = _not_negative(5e-4)
    wd_bn_bias: bool = True
    clip_value: float | None = _positive(None)
    sam: float | None = _positive(None)


@dataclass(frozen=True)
class Lookahead:
    """Slow weights that move by `alpha` towards the fast ones every `k` steps, around the optimiser."""

    k: int = _at_least(1, 5)
    alpha: float = _share(0.5)


@dataclass(frozen=True)
class Schedule:
    """Learning rate over `epochs`. `step` says whether the cosine moves every batch or once an epoch.

    One-cycle moves the momentum too, by 0.05 to either side of the optimiser's.
    """

    name: Literal["cosine", "one-cycle"] = "cosine"
    epochs: int = _at_least(1, 200)
    step: Literal["batch", "epoch"] = "batch"


@dataclass(frozen=True)
class MixUp:
    """Lambda is drawn from Beta(alpha, alpha), one for each batch or one for each sample."""

    alpha: float = _positive(1.0)
    per: Literal["batch", "sample"] = "batch"


@dataclass(frozen=True)
class CutMix:
    """Lambda is drawn from Beta(alpha, alpha). Where there is MixUp, too, CutMix has this `share` of the batches."""

    alpha: float = _positive(1.0)
    share: float = _share(0.5)


@dataclass(frozen=True)
class EMA:
    """An average of the weights, by `decay` a step, is validated and exported in their place."""

    decay: float = _checked(0.999, lambda v: 0 < v < 1, "above 0 and below 1")
    every: int = _at_least(1, 1)


@dataclass(frozen=True)
class Distill:
    """Weight, temperature and reading of the divergence in equations (ii) and (iv).

    `divergence` puts another in the paper's place: "dkd", with its `beta`, or "dist".
    """

    alpha: float = _share(0.95)
    T: float = _positive(6.0)
    kl: Literal["batchmean", "mean"] = "batchmean"
    divergence: Literal["kl", "dkd", "dist"] = "kl"
    beta: float = _not_negative(8.0)


@dataclass(frozen=True)
class Recipe:
    """Everything that a training run needs to know beside its data, its seed and its folder.

    Attributes:
        name: Of the recipe, and of its runs' folder. Not inherited, and neither is `title`: the file's name by default.
        teacher: Who teaches, where the recipe distils: whatever `--teacher` takes; a file may lie beside the recipe's.
        precision: "auto" is bf16 where the hardware multiplies it.
        compile: "auto" is torch.compile on a GPU for training long enough to pay for it, "always" for any there.
        label_smoothing: How much of the targets is spread over all classes.
    """

    name: str = _checked("", lambda v: _stays_below(v), "a relative path without '..', for it names the runs' folder")
    title: str = ""
    teacher: str | None = None
    precision: Literal["auto", "float32"] = "auto"
    compile: Literal["auto", "always", "never"] = "auto"
    label_smoothing: float = _share(0.0)
    model: Model = field(default_factory=Model)
    data: Data = field(default_factory=Data)
    augment: Augment = field(default_factory=Augment)
    optimizer: Optimizer = field(default_factory=Optimizer)
    lookahead: Lookahead | None = None
    schedule: Schedule = field(default_factory=Schedule)
    mixup: MixUp | None = None
    cutmix: CutMix | None = None
    ema: EMA | None = None
    distill: Distill | None = None

    def to_table(self) -> Table:
        """The recipe as nested dictionaries, without what is None."""
        return _without_none(dataclasses.asdict(self))

    def to_toml(self) -> str:
        """The whole recipe as TOML; `load_recipe` reads it back to an equal one."""
        return tomli_w.dumps(self.to_table())


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


def known_models() -> list[str]:
    """Every architecture that timm knows, this package's own among them."""
    return timm.list_models()


def load_recipe(
    recipe: str | Path,
    data: str = "",
    arch: str | None = None,
    settings: Mapping[str, Any] | None = None,
) -> Recipe:
    """Read a recipe, with what it changes for a data set and what the caller overrides.

    Args:
        recipe: The name of a shipped recipe, or a path to a .toml file.
        data: Name of the data set whose `[on.NAME]` tables apply.
        arch: Architecture in place of the recipe's. Where the recipe is the ablation's plain baseline and the
            architecture has a plain variant, NAME_plain, that one is taken.
        settings: Values by dotted key, such as {"schedule.epochs": 30}; they win over everything else.

    Raises:
        UserError: No such recipe, architecture or key (names the nearest known one), or a value out of range.
    """
    file = _find(recipe)
    table = _merge(*(part for f in reversed(_chain(file)) for part in _parts(f, data)), _called(file))
    if arch is not None:
        plain = table.get("model", {}).get("name", "").endswith("_plain")
        table = _merge(
            table, {"model": {"name": f"{arch}_plain" if plain and timm.is_model(f"{arch}_plain") else arch}}
        )
    for key, value in (settings or {}).items():
        table = _merge(table, _nest(key.split("."), value))
    built = _build(Recipe, table, "")
    if not timm.is_model(built.model.name):
        raise unknown("model", built.model.name, known_models())
    if built.distill is not None and built.teacher is None:
        raise UserError(f"recipe {built.name!r} distils without a teacher; add teacher = NAME or leave out [distill]")
    return built


def parse_setting(text: str) -> tuple[str, Any]:
    """One `table.key=value` of the command line, the value as TOML has it; bare words are strings.

    Raises:
        UserError: No key or no value.
    """
    key, equals, value = text.partition("=")
    key, value = key.strip(), value.strip()
    if not key or not equals or not value:
        raise UserError(f"setting {text!r} has no key or no value; write table.key=value, such as optimizer.lr=0.05")
    try:
        return key, tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        return key, value


def ablation_of(recipe: str | Path) -> list[str]:
    """The chain of files behind a recipe, from the one that extends nothing to itself, as names or paths."""
    return [_name_of(file) for file in reversed(_chain(_find(recipe)))]


def added_by(recipe: str | Path) -> Table:
    """What a recipe's own file holds: what it adds to the one that it extends."""
    return {key: value for key, value in _read(_find(recipe)).items() if key not in ("title", "on")}


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


def _read(file: Path) -> Table:
    return {key: value for key, value in _toml(file).items() if key != "extends"}


def _parts(file: Path, data: str) -> tuple[Table, Table]:
    """What a file says, and what it says further for a data set."""
    table = _read(file)
    teacher = table.get("teacher")
    if isinstance(teacher, str) and teacher not in recipe_names() and os.path.exists(file.parent / teacher):
        table["teacher"] = str(file.parent / teacher)  # of a file beside this one, from wherever it is read
    on = table.pop("on", {})
    return table, on.get(data, {}) if isinstance(on, Mapping) else {}


def _called(file: Path) -> Table:
    """Name and title, which nobody inherits: two recipes would be told apart by nothing in a table of results."""
    table = _toml(file)
    name = table.get("name", _name_of(file))
    return {"name": name, "title": table.get("title", name)}


def _toml(file: Path) -> Table:
    try:
        return tomllib.loads(file.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{file} is not valid TOML: {error}") from None


def _merge(*tables: Mapping[str, Any]) -> Table:
    """Later tables win; tables inside are merged in turn."""
    merged: Table = {}
    for table in tables:
        for key, value in table.items():
            old = merged.get(key)
            both = isinstance(old, Mapping) and isinstance(value, Mapping)
            merged[key] = _merge(old, value) if both else value
    return merged


def flat(table: Mapping[str, Any], prefix: str = "") -> Table:
    """A nested table as one of dotted keys."""
    found: Table = {}
    for key, value in table.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return found


def _nest(keys: list[str], value: Any) -> Table:
    return {keys[0]: _nest(keys[1:], value) if keys[1:] else value}


def _without_none(table: Table) -> Table:
    return {k: _without_none(v) if isinstance(v, dict) else v for k, v in table.items() if v is not None}


def _build(cls: type, table: Any, where: str) -> Any:
    """An instance of the dataclass `cls` from a table; `where` is the dotted key that it stands at."""
    if not isinstance(table, Mapping):
        raise UserError(f"{where} is {table!r}; it must be a table")
    fields = {f.name: f for f in dataclasses.fields(cls)}
    hints = typing.get_type_hints(cls)
    values = {}
    for key, value in table.items():
        dotted = f"{where}.{key}" if where else key
        if key not in fields:
            moved = [known for known in _all_keys(Recipe) if known.split(".")[-1] == key]
            if moved:
                raise UserError(f"unknown recipe key {dotted!r}: did you mean {' or '.join(map(repr, moved))}?")
            raise unknown("recipe key", dotted, _dotted_keys(fields, where))
        values[key] = _convert(value, hints[key], dotted)
        check = fields[key].metadata.get("check")
        if check is not None and values[key] is not None and not check(values[key]):
            raise UserError(f"{dotted} is {value!r}; it must be {fields[key].metadata['rule']}")
    return cls(**values)


def _all_keys(cls: type, where: str = "") -> list[str]:
    """Every key of a recipe, dotted."""
    found = []
    for name, hint in typing.get_type_hints(cls).items():
        tables = [option for option in (typing.get_args(hint) or (hint,)) if dataclasses.is_dataclass(option)]
        found += _all_keys(tables[0], f"{where}{name}.") if tables else [f"{where}{name}"]
    return found


def _dotted_keys(names: Iterable[str], where: str) -> list[str]:
    return [f"{where}.{name}" if where else name for name in names]


def _convert(value: Any, hint: Any, where: str) -> Any:
    """`value` as the annotation `hint` has it: an int will do for a float, and nothing else is bent."""
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    for option in options:
        if dataclasses.is_dataclass(option):
            return _build(option, value, where)
        if typing.get_origin(option) is Literal and value in typing.get_args(option):
            return value
        if option is float:
            if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
                return float(value)
            continue
        kind = typing.get_origin(option) or option
        if isinstance(kind, type) and isinstance(value, kind) and (kind is bool or not isinstance(value, bool)):
            return value
    raise UserError(
        f"{where} is {value!r}; it must be {' or '.join(_describe(o) for o in options if o is not type(None))}"
    )


def _describe(option: Any) -> str:
    if typing.get_origin(option) is Literal:
        return " or ".join(repr(choice) for choice in typing.get_args(option))
    kinds = {bool: "true or false", int: "a whole number", float: "a finite number", str: "text", dict: "a table"}
    return kinds.get(typing.get_origin(option) or option, str(option))


def _inside(value: Any) -> bool:
    return isinstance(value, float) and 0 < value < 1


def _stays_below(path: str) -> bool:
    return not Path(path).is_absolute() and ".." not in Path(path).parts
