"""A lock that lets one process at a time use a run's folder."""

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import UserError

try:
    import fcntl
except ImportError:  # Windows has none; nothing is locked there
    fcntl = None

__all__ = ["LOCK", "locked"]

LOCK = ".lock"


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Lock `folder`, made if it is missing, for this process. The system frees the lock when the process ends.

    Raises:
        UserError: Another process has the lock; says which, and on which host.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / LOCK
    while True:
        try:
            opened = os.open(file, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o644)
        except OSError as error:
            if file.is_symlink():  # what it points to is not ours to write to
                raise UserError(f"{file} is a link; remove it") from None
            raise error
        try:
            if fcntl is not None:
                fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(opened, 200).decode() or "another process"
            os.close(opened)
            raise UserError(f"{folder} is in use by {holder}; wait for it, or give --out another folder") from None
        if file.exists() and os.fstat(opened).st_ino == file.stat().st_ino:
            break
        os.close(opened)  # its last holder has just removed it
    os.truncate(opened, 0)
    os.write(opened, f"process {os.getpid()} on {socket.gethostname()}".encode())
    try:
        yield
    finally:
        file.unlink(missing_ok=True)
        os.close(opened)
