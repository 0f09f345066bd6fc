"""Names of architectures and data sets, known without importing timm or torch.

The command line uses them to complete a word, and to refuse a mistyped one at once.
"""

import ast
import hashlib
import os
import re
import sys
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from .errors import UserError, no_format, unknown

__all__ = [
    "ARCHIVES",
    "DATA_FILES",
    "DATA_SETS",
    "DEVICES",
    "INT8",
    "TIMM",
    "Entry",
    "architectures",
    "check_device",
    "check_format",
    "check_int8",
    "entries",
    "is_architecture",
    "shipped",
    "source_name",
    "source_place",
]

DATA_SETS = ("digits", "cifar10", "cifar100", "imagenette")
ARCHIVES = (".zip", ".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")
DATA_FILES = (".npz", ".parquet", *ARCHIVES)
TIMM = "timm:"  # before the name of a network of timm with its own weights
INT8 = ".int8."  # how the endings of files in 8-bit integers begin
DEVICES = ("auto", "cpu", "cuda", "mps")

MODELS = Path(__file__).parent / "models"
DEPRECATED = re.compile(r"^register_model_deprecations\(__name__, \{(.*?)^\}\)", re.M | re.S)
FORMER = re.compile(r"""['"]([\w.]+)['"]\s*:\s*['"]([\w.]+)['"]""")
REGISTERED = re.compile(r"^@register_model\s*\ndef (\w+)\(", re.M)


class Entry:
    """An architecture of this package, as its source file describes it."""

    def __init__(self, name: str, docstring: str):
        self.name, self.docstring = name, docstring

    @property
    def what(self) -> str:
        """What it is: the first sentence of its docstring."""
        return re.split(r"\.\s", self.docstring)[0].rstrip(".")

    @property
    def parameters(self) -> str:
        """Number of parameters for 10 classes, from its docstring; a test counts them."""
        return re.search(r"([\d,]+) parameters", self.docstring).group(1)

    @property
    def macs(self) -> str:
        """Multiply-accumulates for one image of its own size, from its docstring; a test counts them, too."""
        return re.search(r"([\d,.]+ M) MACs", self.docstring).group(1)

    @property
    def weights(self) -> str | None:
        """The tag of the weights that come with the package."""
        tags = [
            file.stem.partition(".")[2] for file in sorted((MODELS / "pretrained").glob(f"{self.name}.*safetensors"))
        ]
        return tags[0] if tags else None


@cache
def entries() -> list[Entry]:
    """This package's architectures."""
    found = []
    for file in sorted(MODELS.glob("*.py")):
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            decorators = getattr(node, "decorator_list", [])
            if any(isinstance(d, ast.Name) and d.id == "register_model" for d in decorators):
                found.append(Entry(node.name, ast.get_docstring(node) or ""))
    return sorted(found, key=lambda entry: entry.name)


def shipped(name: str) -> str | None:
    """The tag of the weights that come with the package for an architecture; None if none do."""
    return next((entry.weights for entry in entries() if entry.name == name), None)


@cache
def _from_source() -> frozenset[str]:
    [timm] = find_spec("timm").submodule_search_locations
    files = (Path(timm) / "models").glob("*.py")
    timms = {name for file in files for name in REGISTERED.findall(file.read_text(encoding="utf-8"))}
    return frozenset(timms | {entry.name for entry in entries()})


@cache
def _deprecated() -> frozenset[str]:
    """Former names that timm still knows."""
    [timm] = find_spec("timm").submodule_search_locations
    found = set()
    for file in (Path(timm) / "models").glob("*.py"):
        for table in DEPRECATED.findall(file.read_text(encoding="utf-8")):
            found |= {old for old, new in FORMER.findall(table)}
    return frozenset(found)


def architectures() -> list[str]:
    """Every architecture of timm and of this package and, once timm is imported, those that others have registered."""
    if "timm" in sys.modules:
        return sys.modules["timm"].list_models()
    return sorted(_from_source())


def is_architecture(name: str) -> bool:
    """Whether timm can create the architecture; its name may have a pretrained tag, NAME.TAG."""
    name = name.split(".")[0]
    if "timm" in sys.modules:
        return sys.modules["timm"].is_model(name)
    return name in _from_source() or name in _deprecated()


def source_name(data: str | Path) -> str:
    """The name of a data set: its own, or that of its folder or file.

    Raises:
        UserError: `data` is neither a known name nor a folder nor a file of a known kind; suggests the nearest name.
    """
    if str(data) in DATA_SETS:
        return str(data)
    path = Path(data).expanduser()
    if path.is_dir():
        return path.resolve().name
    if path.is_file():
        ending = next((ending for ending in DATA_FILES if path.name.lower().endswith(ending)), None)
        if ending is None:
            raise UserError(
                f"{path} is neither a folder nor a file of images ({', '.join(DATA_FILES)}); known data sets: "
                f"{', '.join(DATA_SETS)}"
            )
        return path.name[: -len(ending)]
    here = [entry.name for entry in os.scandir() if entry.is_dir() and not entry.name.startswith(".")]
    near = get_close_matches(str(data), here, n=1)
    raise unknown("data set, folder or .npz file", str(data), [*DATA_SETS, *near])


def source_place(data: str | Path) -> str | None:
    """What tells a folder or file of images from others of its name: a hash of its path. None for a known name."""
    if str(data) in DATA_SETS:
        return None
    path = os.path.realpath(Path(data).expanduser())
    return hashlib.blake2b(os.fsencode(path), digest_size=3).hexdigest()


def check_device(name: str) -> None:
    """Raise a UserError if no device has this name."""
    if name not in DEVICES:
        raise UserError(f"device is {name!r}; it must be {', '.join(DEVICES[:-1])} or {DEVICES[-1]}")


def check_format(file: Path, formats: Iterable[str], purpose: str = "written") -> str:
    """The ending of a file's name that chooses its format, the longest that fits; a UserError if none does."""
    formats = list(formats)
    fitting = [ending for ending in formats if file.name.endswith(ending)]
    small = file.name.endswith(f"{INT8}{file.suffix[1:]}")
    if not fitting or (small and not max(fitting, key=len).startswith(INT8)):  # a file in floats is not called int8
        raise no_format(file, formats, purpose)
    return max(fitting, key=len)


def check_int8(file: Path, formats: Iterable[str], given: Mapping[str, object]) -> bool:
    """Whether a file is to be in 8-bit integers.

    Args:
        file: The file.
        formats: Endings, as in `check_format`.
        given: What is for such files alone, by what the user calls it; None where it is not given.

    Raises:
        UserError: Something is given, and the file is none; or its ending is none of the formats.
    """
    formats = list(formats)
    if check_format(file, formats).startswith(INT8):
        return True
    for name, value in given.items():
        if value is not None:
            small = next((e for e in formats if e.startswith(INT8) and e.endswith(file.suffix)), f"{INT8}onnx")
            raise UserError(f"{name} is for int8, and {file} is not; call it {file.stem}{small}, or leave {name} out")
    return False


def check_tensorboard() -> None:
    """Raise a UserError if TensorBoard is not installed."""
    if find_spec("tensorboard") is None:
        raise UserError("--tensorboard needs one more package: pip install tensorboard, or 'dms-fastai[tensorboard]'")
