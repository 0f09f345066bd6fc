"""Files that are whole or not there at all."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

__all__ = ["PARTIAL", "whole"]

PARTIAL = ".partial"


@contextlib.contextmanager
def whole(file: Path) -> Iterator[Path]:
    """A path beside `file` to write to. It is flushed to disk and takes the file's place once the block has ended well,
    so that nobody ever reads half a file and a full disk leaves the old one as it was.
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


def _flush_folder(folder: Path) -> None:
    """A renamed file has its new name on disk only when its folder is there, too."""
    with contextlib.suppress(OSError):  # not every system lets a folder be opened
        opened = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(opened)
        finally:
            os.close(opened)
