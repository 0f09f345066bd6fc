"""What a teacher has said, kept on disk, so that it need not be asked again."""

import errno
import json
import os
import shutil
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock
from torch import Tensor

from ..data.decoded import cache_dir
from ..errors import UserError
from ..files import amount, whole

__all__ = ["KeptLogits"]

MAKING = "2"  # to be counted up when batches are made in another way, so that older answers are not used


class KeptLogits:
    """A teacher's logits by view and step, in float16, shape (views, steps, B, C), in two files of a folder.

    They are written as they come, mapped into memory, and several processes may share them: all write the same. What
    has been written is marked afterwards, so that a killed process leaves nothing half said. Of processes that begin
    together, one makes the files.
    """

    def __init__(self, folder: Path, shape: tuple[int, int, int, int]):
        """
        Args:
            folder: Of these answers alone; made if it is missing.
            shape: Views, steps, images in a batch, classes.

        Raises:
            UserError: There is no room for them, or they cannot be kept there.
        """
        self.folder, self.nbytes = folder, 2 * int(np.prod(shape))
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with FileLock(folder / ".lock"):
                free = shutil.disk_usage(folder).free
                if not (folder / "logits.npy").exists() and free < self.nbytes:
                    raise UserError(
                        f"the teacher's answers take {amount(self.nbytes)} and {folder} has {amount(free)}; "
                        f"set DMS_FASTAI_CACHE to another folder, or take a smaller --set fixed_views.count"
                    )
                self.logits = _mapped(folder / "logits.npy", np.float16, shape)
                self.said = _mapped(folder / "said.npy", np.bool_, shape[:2])
        except (OSError, NotImplementedError) as error:  # the second, where the disk has no locks
            reason = getattr(error, "strerror", None) or error
            raise UserError(f"the teacher's answers cannot be kept in {folder} ({reason})") from None

    @classmethod
    def of(cls, facts: dict[str, Any], shape: tuple[int, int, int, int]) -> "KeptLogits":
        """The answers in this machine's cache. `facts` are all that they depend on, as JSON has it."""
        key = blake2b(json.dumps([MAKING, facts, shape], sort_keys=True).encode(), digest_size=8).hexdigest()
        return cls(cache_dir() / f"answers-{key}", shape)

    def get(self, view: int, step: int) -> Tensor | None:
        """The logits of a step, on the CPU, float16, shape (B, C); None if nobody has asked yet."""
        return torch.from_numpy(self.logits[view, step].copy()) if self.said[view, step] else None

    def put(self, view: int, step: int, logits: Tensor) -> None:
        """Keep the logits of a step, shape (B, C)."""
        self.logits[view, step] = logits.to(torch.float16).cpu().numpy()
        self.said[view, step] = True

    @property
    def share(self) -> float:
        """How much has been said, 0...1."""
        return float(self.said.mean())


def _mapped(file: Path, dtype: type, shape: tuple[int, ...]) -> np.ndarray:
    """An array in a file, of zeros where it is new, mapped into memory."""
    if not file.exists():
        with whole(file) as partial:
            np.lib.format.open_memmap(partial, "w+", dtype, shape).flush()
            _reserve(partial)
    return np.lib.format.open_memmap(file, "r+")


def _reserve(file: Path) -> None:
    """Have the disk keep room for all of a new file: where it is full, writing to mapped memory ends the process."""
    if not hasattr(os, "posix_fallocate"):
        return
    with file.open("r+b") as opened:
        try:
            os.posix_fallocate(opened.fileno(), 0, file.stat().st_size)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):  # of disks that cannot
                raise
