"""Files that are complete or absent, and how large they are, in words."""

import contextlib
import glob
import os
import stat
import time
from collections.abc import Iterator
from pathlib import Path

from .errors import UserError

__all__ = ["FACTS", "LOCK", "RECIPE", "amount", "check_file", "check_folder", "is_hidden", "partials", "sweep", "whole"]

FACTS, RECIPE, LOCK = "run.json", "recipe.toml", ".lock"  # in the folder of a run
PARTIAL = ".partial"
SKIPPED = {"__MACOSX", "@eaDir"}  # what systems put beside images
OLD = 24 * 3600  # seconds
PATIENCE, PAUSE = 2.0, 0.05  # seconds in which a file that is in use may come free, and between two tries


def is_hidden(name: str) -> bool:
    """Whether a file or folder of this name is none that a user means."""
    return name.startswith(".") or name in SKIPPED


def check_folder(folder: Path, option: str = "--out") -> None:
    """Raise a UserError if a folder cannot be made, or files in it cannot. It is not made yet.

    Args:
        folder: The folder.
        option: What of the command names it, for the error.
    """
    why = _obstacle(folder)
    if why is not None:
        raise UserError(f"{folder} cannot be written: {why}; give another {option}")


def _obstacle(folder: Path) -> str | None:
    """Why files cannot be written to a folder, which may be missing; None if they can."""
    try:
        mode = os.stat(folder).st_mode
    except (FileNotFoundError, NotADirectoryError):
        if folder.is_symlink():
            return f"{folder} is a link to nothing"
        return None if folder == folder.parent else _obstacle(folder.parent)
    except OSError as error:
        return error.strerror
    if not stat.S_ISDIR(mode):
        return f"{folder} is no folder"
    return None if os.access(folder, os.W_OK | os.X_OK) else f"no permission to write to {folder}"


def check_file(file: Path, option: str = "--out") -> None:
    """Raise a UserError if a file cannot be written; `option` as in `check_folder`."""
    if file.is_dir():
        raise UserError(f"{file} is a folder, and no file can be written there; give another {option}")
    check_folder(file.parent, option)


@contextlib.contextmanager
def whole(file: Path, durable: bool = True) -> Iterator[Path]:
    """A temporary path beside `file` to write to. When the block has succeeded, it is flushed to disk and replaces
    `file`. Nobody ever reads half a file, and a full disk leaves the old one unchanged.

    Args:
        file: The file to write.
        durable: Flush it. False for a file that is soon written again, and that nothing depends on: a power cut may
            leave it empty.
    """
    partial = file.with_name(f"{file.name}.{os.getpid()}{PARTIAL}")
    try:
        yield partial
        if durable:
            with partial.open("r+b") as written:  # Windows flushes only what is open for writing
                os.fsync(written.fileno())
        _replace(partial, file)
        if durable:
            _flush_folder(file.parent)
            sweep(file.parent, glob.escape(file.name))
    except BaseException as error:
        with contextlib.suppress(OSError):
            partial.unlink()
        if isinstance(error, OSError) and error.errno is not None and error.filename is None:  # as of a write
            error.filename = str(file)
        raise


def partials(folder: Path, name: str) -> list[Path]:
    """What `whole` has left beside a file when its process was killed; `name` may be a pattern of files."""
    left = folder.glob(f"{name}.*{PARTIAL}")
    return [file for file in left if file.name.removesuffix(PARTIAL).rpartition(".")[2].isdecimal()]


def sweep(folder: Path, name: str) -> None:
    """Remove what `whole` has left beside a file, once it is so old that no process can still be writing it."""
    for left in partials(folder, name):
        with contextlib.suppress(OSError):
            if time.time() - left.stat().st_mtime > OLD:
                left.unlink()


def _replace(partial: Path, file: Path) -> None:
    """Rename `partial` to `file`. Windows refuses this while somebody reads `file`, so it is tried for a while."""
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            partial.replace(file)
            return
        except PermissionError:
            if time.monotonic() > deadline:
                raise
            time.sleep(PAUSE)


def _flush_folder(folder: Path) -> None:
    """Flush a folder to disk: only then has a renamed file its new name there."""
    with contextlib.suppress(OSError):  # not every system lets a folder be opened
        opened = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(opened)
        finally:
            os.close(opened)


def amount(size: float) -> str:
    """A number of bytes in words, such as 118.3 kB, 4.8 MB and 1.5 GB."""
    for unit, name in ((1e9, "GB"), (1e6, "MB")):
        if size >= unit:
            return f"{size / unit:,.1f} {name}"
    return f"{size / 1e3:.1f} kB"
