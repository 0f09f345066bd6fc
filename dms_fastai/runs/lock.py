"""A lock that lets one process at a time use a run's folder."""

import contextlib
import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

from ..errors import FolderError
from ..files import LOCK

try:
    import fcntl
except ImportError:  # Windows has msvcrt instead
    fcntl = None
    import msvcrt

__all__ = ["held", "locked"]

FAR = 2**20  # the byte that Windows locks: nobody else could read it, so it lies behind the holder's name


@contextlib.contextmanager
def locked(folder: Path, wait: Callable[[str], None] | None = None) -> Iterator[None]:
    """Lock `folder`, made if it is missing, for this process. The system frees the lock when the process ends.

    Args:
        folder: The folder.
        wait: Called between tries with what is waited for, while another process has the lock.

    Raises:
        FolderError: Without `wait`, another process has the lock; says which, and on which host.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / LOCK
    while True:
        opened = _open(file)
        if not _try_to_lock(opened):
            os.lseek(opened, 0, os.SEEK_SET)
            holder = os.read(opened, 200).decode(errors="replace") or "another process"
            os.close(opened)
            said = f"{folder} is in use by {holder}"
            if wait is None:
                raise FolderError(f"{said}; wait for it, or give --out another folder")
            wait(said)
            continue
        if _is_still(opened, file):
            break
        os.close(opened)  # its last holder has just removed it
    os.ftruncate(opened, 0)
    os.lseek(opened, 0, os.SEEK_SET)
    os.write(opened, f"process {os.getpid()} on {socket.gethostname()}".encode())
    try:
        yield
    finally:
        # Removed while it is locked, or the next holder's file would be. Windows removes no open file.
        removed = _remove(file)
        os.close(opened)
        if not removed:
            _remove(file)


def held(folder: Path) -> bool:
    """Whether a process has the lock of `folder`, or may have it, where that cannot be found out. Writes nothing."""
    file = folder / LOCK
    if file.is_symlink() or not file.is_file():
        return False
    try:
        opened = os.open(file, os.O_RDONLY)
    except FileNotFoundError:  # its holder has just removed it
        return False
    except OSError:
        return True
    try:
        return not _try_to_lock(opened, shared=True)
    except OSError:
        return True
    finally:
        os.close(opened)


def _open(file: Path) -> int:
    """A descriptor of the lock's file, made if it is missing; what a link points to is not ours to write to."""
    try:
        if not file.is_symlink():  # where there is no O_NOFOLLOW, this look is all
            return os.open(file, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o644)
    except OSError:
        if not file.is_symlink():
            raise
    raise FolderError(f"{file} is a link; remove it")


def _try_to_lock(opened: int, shared: bool = False) -> bool:
    """Lock an open file for this process, unless another has locked it; gives whether it is locked now.

    NFS gives a lock that is not shared only for a file that has been opened to write.
    """
    try:
        if fcntl is not None:
            fcntl.flock(opened, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        else:
            os.lseek(opened, FAR, os.SEEK_SET)
            msvcrt.locking(opened, msvcrt.LK_NBLCK, 1)
    except (BlockingIOError, PermissionError):  # the first is flock's, the second msvcrt's
        return False
    return True


def _is_still(opened: int, file: Path) -> bool:
    """Whether a path still leads to the open file."""
    try:
        return os.path.samestat(os.fstat(opened), file.stat())
    except FileNotFoundError:
        return False


def _remove(file: Path) -> bool:
    """Remove a file, and say whether it is gone."""
    try:
        file.unlink(missing_ok=True)
    except PermissionError:  # Windows: it is open
        return False
    return True
