"""Which runs came with the package, and are not the user's own."""

import subprocess
from pathlib import Path

from ..run_folder import RunFolder

__all__ = ["shipped"]

ROOT = Path(__file__).parents[2]  # of a checkout; an installed package comes without runs


def shipped() -> set[Path]:
    """The folders of the runs that are committed to the package's repository, and have not been trained again."""
    name = RunFolder(Path()).facts_file.name
    return {file.parent for file in _files("--cached", name) - _files("--modified", name)}


def _files(which: str, name: str) -> set[Path]:
    """The files of this name that git lists; none where there is no git, or no repository."""
    command = ["git", "-C", str(ROOT), "ls-files", "-z", which, "--", f"*/{name}"]
    try:
        listed = subprocess.run(command, capture_output=True, text=True)
    except OSError:
        return set()
    return {(ROOT / file).resolve() for file in listed.stdout.split("\0") if file}
