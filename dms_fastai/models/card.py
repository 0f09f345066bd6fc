"""The card in a file of weights: what it takes to build the model again.

The file may be a stranger's, so nothing in the card is trusted: to build its model reads, fetches and writes nothing.
"""

import json
import math
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import timm
from torch import nn

from ..names import is_architecture

__all__ = ["START_WEIGHTS", "ModelCard", "channels_of", "check_fields", "read_card", "unreadable"]

# Arguments of timm's that choose the weights to begin with: they fetch, read or unpickle what they name.
START_WEIGHTS = (
    "cache_dir",
    "checkpoint_path",
    "pretrained",
    "pretrained_cfg",
    "pretrained_cfg_overlay",
    "pretrained_filter_fn",
    "pretrained_strict",
)
LONGEST, DEEPEST = 64, 2  # of texts and lists, and lists in lists
LARGEST = 8192  # a number, or the sum of a list: what takes longer to build than to read is no network of anybody's
CLASSES = 100_000
BOUNDS = f"numbers and sums of lists are at most {LARGEST:,}, and lists and texts have at most {LONGEST} parts"


@dataclass(frozen=True)
class ModelCard:
    """What it takes to build a model again and to feed it images.

    Attributes:
        arch: Name of the timm entry.
        args: Further arguments that it was built with, none of which chooses weights.
        vocab: Names of the classes, in the order of the logits.
        mean, std: What pixels (0...1) are normalised with, a value for each channel.
        shape: Channels, height and width of the training images.
        white: The value of pixels that stands for 255, if the training images were no bytes; as in `ImageSet`.
        note: What else to know about the architecture: that it is an approximation.
        middle: Share of an image's shorter side that the model is to see; as in `ImageSet`.
    """

    arch: str
    vocab: list[str]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    shape: tuple[int, int, int]
    args: dict[str, Any] = field(default_factory=dict)
    white: float | None = None
    note: str | None = None
    middle: float = 1.0

    def build(self) -> nn.Module:
        """The model, with fresh weights, in evaluation mode."""
        args = channels_of(self.shape) | self.args
        return timm.create_model(self.arch, num_classes=len(self.vocab), **args).eval()

    def to_json(self) -> str:
        """The card as `read_card` reads it."""
        table = asdict(self)
        if self.note is None:
            del table["note"]  # which earlier versions do not know
        if self.middle == 1:
            del table["middle"]  # likewise
        return json.dumps(table)


def channels_of(shape: tuple[int, int, int]) -> dict[str, int]:
    """The argument that timm needs for images of `shape` (C, H, W): its own default is three channels."""
    return {} if shape[0] == 3 else {"in_chans": shape[0]}


def unreadable(args: Mapping[str, Any]) -> str | None:
    """The first of a network's arguments that a card could name, but not be read with; None if there is none."""
    for name, value in args.items():
        with suppress(TypeError):  # an object, which no card can name
            if not _args({name: json.loads(json.dumps(value))}):
                return name
    return None


def read_card(text: str) -> ModelCard:
    """The card in a file, once each of its fields is known to be what a network could have.

    What chooses weights, which cards of earlier versions may have, is ignored.

    Raises:
        ValueError: It is no card, or a field is out of bounds; says which.
    """
    told = json.loads(text)
    names = [f.name for f in fields(ModelCard)]
    if not isinstance(told, dict):
        raise ValueError("its card is no table")
    if "size" in told and "shape" not in told:  # as earlier versions wrote it: the images were square
        args, size = told.get("args"), told.pop("size")
        told["shape"] = [args.get("in_chans", 3) if isinstance(args, dict) else 3, size, size]
    for name in told.keys() - set(names):
        raise ValueError(f"its card has a field {_short(name)}, which is unknown")
    for name in names:
        if name not in told and name not in ("args", "white", "note", "middle"):
            raise ValueError(f"its card has no {name!r}")
    args = told.get("args", {})
    if isinstance(args, dict):
        args = told["args"] = {key: value for key, value in args.items() if key not in START_WEIGHTS}
    check_fields(told)
    if len(told["mean"]) != len(told["std"]):
        raise ValueError("'mean' and 'std' of its card have different lengths")
    return ModelCard(**told | {name: tuple(told[name]) for name in ("mean", "std", "shape")})


class UnregisteredError(ValueError):
    """A card names a network that is none of timm's, and that nobody has registered with it."""


def check_fields(told: Mapping[str, Any]) -> None:
    """Raise a ValueError if a field of a card, as JSON has it, is not what a network could have; says which."""
    for name, sound in _CHECKS.items():
        if name in told and not sound(told[name]):
            raise ValueError(f"{name!r} of its card is {_short(told[name])}")
    if "arch" in told and not is_architecture(told["arch"]):
        raise UnregisteredError(f"'arch' of its card is {_short(told['arch'])}")


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _numbers(value: Any) -> bool:
    return isinstance(value, list) and 0 < len(value) <= LONGEST and all(map(_number, value))


def _plain(value: Any, depth: int = 0) -> bool:
    """Whether a value could be an argument of a network: a number, a word, or lists and tables of these."""
    if isinstance(value, list):
        inside = depth < DEEPEST and len(value) <= LONGEST and all(_plain(item, depth + 1) for item in value)
        return inside and sum(abs(item) for item in value if _number(item)) <= LARGEST
    if isinstance(value, dict):
        named = len(value) <= LONGEST and all(isinstance(key, str) for key in value)
        return depth < DEEPEST and named and all(_plain(item, depth + 1) for item in value.values())
    if isinstance(value, str):
        return len(value) <= LONGEST
    return value is None or isinstance(value, bool) or (_number(value) and abs(value) <= LARGEST)


def _args(value: Any) -> bool:
    named = isinstance(value, dict) and len(value) <= LONGEST and all(map(str.isidentifier, value))
    return named and all(map(_plain, value.values()))


def _names(value: Any) -> bool:
    listed = isinstance(value, list) and 0 < len(value) <= CLASSES and all(isinstance(name, str) for name in value)
    return listed and len(set(value)) == len(value)


_CHECKS = {
    "arch": lambda v: isinstance(v, str),
    "vocab": _names,
    "mean": _numbers,
    "std": lambda v: _numbers(v) and min(v) > 0,
    "shape": lambda v: isinstance(v, list) and len(v) == 3 and all(_whole(n) and 0 < n <= LARGEST for n in v),
    "args": _args,
    "white": lambda v: v is None or (_number(v) and 0 < v < 2**16),
    "middle": lambda v: _number(v) and 0 < v <= 1,
    "note": lambda v: v is None or (isinstance(v, str) and len(v) <= LONGEST),
}


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}..."
