"""Data sets in one file, .zip, .tar or parquet: unpacked once, into the cache of decoded images."""

import hashlib
import json
import shutil
import stat
import tarfile
import zipfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import IO

from filelock import FileLock

from ..errors import UserError, damage, notice
from ..names import ARCHIVES
from .decoded import cache_dir

__all__ = ["count_files", "is_archive", "unpacked"]


def is_archive(file: Path) -> bool:
    return file.name.lower().endswith(ARCHIVES)


def unpacked(
    source: Path, unpack: Callable[[Path, Path], None] | None = None, files: Iterable[Path] | None = None
) -> Path:
    """The folder with the content of a file. It is there as a whole or not at all, and only one process makes it.

    Args:
        source: A .zip or .tar file; or what `unpack` reads.
        unpack: Writes the content of `source` into an empty folder.
        files: What the content depends on, if not on the file `source` alone.

    Raises:
        UserError: The file is damaged, has a password, holds paths that lead out of it, or is larger than the disk.
    """
    stats = [(str(file.resolve()), file.stat()) for file in files or [source]]
    facts = json.dumps([(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats])
    key = hashlib.sha256(facts.encode()).hexdigest()[:16]
    folder = cache_dir() / "unpacked" / f"{source.name}-{key}"
    if folder.is_dir():
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"{source} cannot be unpacked into {cache_dir()} ({error.strerror}); set DMS_FASTAI_CACHE to a folder that "
            f"can be written"
        ) from None
    with FileLock(f"{folder}.lock"):
        if not folder.is_dir():
            partial = folder.with_name(f"{folder.name}.partial")
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
            try:
                (unpack or _unpack)(source, partial)
            except BaseException:
                shutil.rmtree(partial, ignore_errors=True)
                raise
            partial.rename(folder)
            notice(f"{source} is unpacked into {folder}")
    return folder


def count_files(archive: Path) -> int:
    """How many files an archive holds.

    Raises:
        UserError: It is damaged.
    """
    with damage(f"{archive} cannot be unpacked"):
        if zipfile.is_zipfile(archive):
            with zipfile.ZipFile(archive) as opened:
                return sum(not info.is_dir() for info in opened.infolist())
        with tarfile.open(archive) as opened:
            return sum(member.isfile() for member in opened)


def _unpack(archive: Path, folder: Path) -> None:
    with damage(f"{archive} cannot be unpacked"):
        if archive.suffix.lower() == ".zip":
            with zipfile.ZipFile(archive) as opened:
                if not any("/" in info.filename for info in opened.infolist()):
                    for info in opened.infolist():  # folders as Windows PowerShell writes them
                        info.filename = info.filename.replace("\\", "/")
                _check_room(archive, sum(info.file_size for info in opened.infolist()), folder)
                links = [info for info in opened.infolist() if stat.S_ISLNK(info.external_attr >> 16)]
                opened.extractall(folder, [info for info in opened.infolist() if info not in links])
                _name_links(archive, [info.filename for info in links], "zip packs what links lead to, without -y")
        else:
            with tarfile.open(archive) as opened:
                _check_room(archive, sum(member.size for member in opened), folder)
                nowhere = []  # links that lead to no file in the archive
                for member in opened:
                    if member.isfile() or member.islnk() or member.issym():
                        content = _content(opened, member)
                        if content is None:
                            nowhere.append(member.name)
                        else:
                            _write(content, member.name, folder)
                _name_links(archive, nowhere, "tar -h packs what links lead to")


def _name_links(archive: Path, links: Sequence[str], hint: str) -> None:
    if links:
        found = f"the link {links[0]} is" if len(links) == 1 else f"{len(links)} links are"
        notice(f"{archive}: {found} skipped; {hint}")


def _content(archive: tarfile.TarFile, member: tarfile.TarInfo) -> IO[bytes] | None:
    """The content of a file, or of the one in the archive that a link leads to; None if there is none."""
    try:
        return archive.extractfile(member)
    except (KeyError, RecursionError):
        return None


def _write(content: IO[bytes], name: str, folder: Path) -> None:
    file = (folder / name).resolve()
    if not file.is_relative_to(folder.resolve()):
        raise ValueError(f"{name} in it leads out of its folder")
    file.parent.mkdir(parents=True, exist_ok=True)
    with content, file.open("wb") as opened:
        shutil.copyfileobj(content, opened)


def _check_room(archive: Path, needed: int, folder: Path) -> None:
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise UserError(
            f"{archive} holds {needed / 1e9:,.1f} GB, and {free / 1e9:,.1f} GB are free in {folder.parent}; make room, "
            f"or set DMS_FASTAI_CACHE to a folder on another disk"
        )
