"""Files that are complete or absent."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

__all__ = ["partials", "whole"]

PARTIAL = ".partial"


@contextlib.contextmanager
def whole(file: Path) -> Iterator[Path]:
    """A temporary path beside `file` to write to. When the block has succeeded, it is flushed to disk and replaces
    `file`. Nobody ever reads half a file, and a full disk leaves the old one unchanged.
    """
    partial = file.with_name(f"{file.name}.{os.getpid()}{PARTIAL}")
    try:
        yield partial
        with partial.open("rb") as written:
            os.fsync(written.fileno())
        partial.replace(file)
        _flush_folder(file.parent)
    except BaseException:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise


def partials(folder: Path, name: str) -> list[Path]:
    """What `whole` has left beside a file when its process was killed; `name` may be a pattern of files."""
    left = folder.glob(f"{name}.*{PARTIAL}")
    return [file for file in left if file.name.removesuffix(PARTIAL).rpartition(".")[2].isdecimal()]


def _flush_folder(folder: Path) -> None:
    """Flush a folder to disk: only then has a renamed file its new name there."""
    with contextlib.suppress(OSError):  # not every system lets a folder be opened
        opened = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(opened)
        finally:
            os.close(opened)
