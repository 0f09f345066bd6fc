"""What a teacher has said, kept on disk, so that it need not be asked again."""

import json
import shutil
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..data.decoded import cache_dir
from ..errors import UserError

__all__ = ["KeptLogits"]

MAKING = "1"  # to be counted up when batches are made in another way, so that older answers are not used


class KeptLogits:
    """A teacher's logits by view and step, in float16, shape (views, steps, B, C), in two files of a folder.

    They are written as they come, mapped into memory, and several processes may share them: all write the same. What
    has been written is marked afterwards, so that a killed process leaves nothing half said.
    """

    def __init__(self, folder: Path, shape: tuple[int, int, int, int]):
        """
        Args:
            folder: Of these answers alone; made if it is missing.
            shape: Views, steps, images in a batch, classes.

        Raises:
            UserError: There is no room for them.
        """
        self.folder, self.nbytes = folder, 2 * int(np.prod(shape))
        try:
            folder.mkdir(parents=True, exist_ok=True)
            free = shutil.disk_usage(folder).free
            if not (folder / "said.npy").exists() and free < self.nbytes:
                raise UserError(
                    f"the teacher's answers take {self.nbytes / 1e9:.1f} GB and {folder} has {free / 1e9:.1f} GB; set "
                    f"DMS_FASTAI_CACHE to another folder, or take a smaller --set fixed_views.count"
                )
            self.logits = _mapped(folder / "logits.npy", np.float16, shape)
            self.said = _mapped(folder / "said.npy", np.bool_, shape[:2])
        except OSError as error:
            raise UserError(f"the teacher's answers cannot be kept in {folder} ({error.strerror})") from None

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
        partial = file.with_name(f"{file.name}.partial")
        np.lib.format.open_memmap(partial, "w+", dtype, shape).flush()
        partial.replace(file)
    return np.lib.format.open_memmap(file, "r+")
