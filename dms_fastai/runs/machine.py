"""What a run depends on: its device, with its name and its memory, and the code."""

import hashlib
import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path

import torch

from .. import __version__
from ..errors import UserError, notice
from ..names import DEVICES, check_device

__all__ = [
    "be_deterministic",
    "choose_device",
    "commit",
    "device_name",
    "is_out_of_memory",
    "processor",
    "versions",
]

PACKAGE = Path(__file__).parent.parent
NO_MEMORY = ("you tried to allocate", "MPS backend out of memory")  # for a CPU and for mps torch has no error class
CODE = ("callbacks", "data", "learner", "models", "trained", "training")  # folders that a result depends on


def choose_device(name: str) -> torch.device:
    """The device for "auto" or another of `DEVICES`; a notice says that "mps" is not tested.

    Raises:
        UserError: Another name, or a device that torch does not find.
    """
    check_device(name)
    found = torch.accelerator.current_accelerator(check_available=True)
    there = "cpu" if found is None or found.type not in DEVICES else found.type
    if name not in ("auto", "cpu", there):
        raise UserError(f"device is {name}, but torch finds no GPU of this kind here; take --device auto or cpu")
    device = torch.device(there if name == "auto" else name)
    if device.type == "mps":
        notice("device mps: nobody has trained on it yet; --device cpu is tested")
    return device


def be_deterministic() -> None:
    """Have torch use algorithms that give the same bits every time on a GPU; those on a CPU do so anyway."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.deterministic = True


def device_name(device: torch.device) -> str:
    """The name of the GPU or the processor."""
    names = {"cuda": torch.cuda.get_device_name, "mps": lambda _: torch.backends.mps.get_name()}
    return names[device.type](device) if device.type in names else processor()


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory could not be had: Python's own, or torch's for a GPU, for mps or for a CPU."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in NO_MEMORY)


def processor() -> str:
    """The name of the CPU."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def versions() -> dict[str, str]:
    """The versions that a result depends on; this package's has a hash of its code, in case a checkout was changed."""
    code = hashlib.blake2b(digest_size=4)
    for file in sorted(file for folder in CODE for file in (PACKAGE / folder).rglob("*.py")):
        code.update(file.read_bytes())
    own = {"dms-fastai": f"{__version__}+{code.hexdigest()}"}
    return own | {name: metadata.version(name) for name in ("fastai", "timm", "torch")}


def commit() -> str | None:
    """The commit of the checkout that this package runs from, marked if files have been changed.

    Outside a checkout, the variable GIT_COMMIT, if set: a copy without its history does not know its commit.
    """
    git = ["git", "-C", str(PACKAGE)]
    try:
        tracked = subprocess.run([*git, "ls-files", "--error-unmatch", __file__], capture_output=True)
        if tracked.returncode:
            return os.environ.get("GIT_COMMIT")
        head = subprocess.check_output([*git, "rev-parse", "--short=12", "HEAD"], text=True).strip()
        changed = subprocess.check_output([*git, "status", "--porcelain", "--untracked-files=no"], text=True).strip()
        return head + (" (changed)" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return None
