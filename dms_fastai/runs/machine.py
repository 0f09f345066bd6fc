"""What a run depends on: its device and the device's name, and the code."""

import hashlib
import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path

import torch

from .. import __version__
from ..errors import UserError
from ..names import check_device

__all__ = ["be_deterministic", "choose_device", "commit", "device_name", "processor", "versions"]

PACKAGE = Path(__file__).parent.parent
CODE = ("callbacks", "data", "learner", "models", "trained", "training")  # folders that a result depends on


def choose_device(name: str) -> torch.device:
    """The device for "auto", "cpu" or "cuda".

    Raises:
        UserError: Another name, or "cuda" where torch finds no GPU.
    """
    check_device(name)
    there = torch.cuda.is_available()
    if name == "cuda" and not there:
        raise UserError("device is cuda, but torch finds no GPU here; take --device auto or cpu")
    return torch.device("cuda" if there and name != "cpu" else "cpu")


def be_deterministic() -> None:
    """Have torch use algorithms that give the same bits every time on a GPU; those on a CPU do so anyway."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.deterministic = True


def device_name(device: torch.device) -> str:
    """The name of the GPU or the processor."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else processor()


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
