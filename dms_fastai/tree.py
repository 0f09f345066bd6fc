"""The image files in a folder, at any depth."""

import os
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePath

from PIL import Image

from .errors import notice, unlistable
from .files import FACTS, LOCK, RECIPE, is_hidden

__all__ = ["Tree", "readable_endings", "walk"]

OURS = ({RECIPE, FACTS}, {"report.md", "index.html"})  # in the folders of runs and of reports, with plots
OUR_ENDINGS = {".log", ".toml"}  # of all files in a folder of logs, and of a run that has just begun
MODEL_DIR = "models"  # fastai's name for where a Learner saves weights, beside the images
ENDINGS = 5  # in one message


@dataclass
class Tree:
    """What a folder holds.

    Attributes:
        root: The folder.
        images: The image files in each folder that has some, by the folder's path relative to the root.
        empty: Folders without images and without other folders in them.
        endings: How many files have an ending that is no image's.
    """

    root: Path
    images: dict[PurePath, list[str]] = field(default_factory=dict)
    empty: list[PurePath] = field(default_factory=list)
    endings: Counter = field(default_factory=Counter)

    @property
    def files(self) -> list[str]:
        """The image files, relative to the root, sorted."""
        return sorted(str(where / name) for where, names in self.images.items() for name in names)

    @property
    def skipped(self) -> str:
        """The most frequent endings that are no image's: ".txt (3), .heic (1)"."""
        return ", ".join(f"{ending or 'none'} ({count})" for ending, count in self.endings.most_common(ENDINGS))

    def say_skipped(self) -> None:
        """Say how many files have an ending that is no image's."""
        if total := self.endings.total():
            files = f"{total} file{'s' * (total != 1)}"
            notice(f"{self.root}: {files} skipped, because Pillow does not read such files here: {self.skipped}")


def walk(root: Path, besides: Collection[Path] = ()) -> Tree:
    """List a folder without those `besides`, of runs, and of fastai's weights.

    Links are followed, but not back to their origin.

    Raises:
        UserError: A folder in it cannot be listed.
    """

    def refuse(error: OSError) -> None:
        raise unlistable(error) from None

    tree, endings = Tree(root), readable_endings()
    real: dict[str, str] = {}
    for where, folders, names in os.walk(root, onerror=refuse, followlinks=True):
        real[where] = os.path.realpath(where)
        around = (real.get(str(parent)) for parent in PurePath(where).parents)
        inside = where != str(root)
        if real[where] in around or (inside and (_is_ours(folders, names) or _is_fastais(where, folders, names))):
            folders.clear()
            continue
        folders[:] = sorted(name for name in folders if not is_hidden(name) and Path(where, name) not in besides)
        files = sorted(name for name in names if not is_hidden(name))
        images = [name for name in files if PurePath(name).suffix.lower() in endings]
        tree.endings.update(PurePath(name).suffix.lower() for name in set(files) - set(images))
        here = PurePath(os.path.relpath(where, root))
        if images:
            tree.images[here] = images
        elif not folders and inside:
            tree.empty.append(here)
    tree.empty = [each for each in tree.empty if not any(parent in tree.images for parent in each.parents[:-1])]
    return tree


def readable_endings() -> set[str]:
    """The endings of image files that Pillow reads here, in lower case: {".jpg", ".png", ...}."""
    return {ending for ending, kind in Image.registered_extensions().items() if kind in Image.OPEN}


def _is_fastais(where: str, folders: Sequence[str], names: Sequence[str]) -> bool:
    """Whether a folder is the one of a Learner's weights, which `lr_find` alone leaves empty."""
    weights = all(PurePath(name).suffix == ".pth" for name in names if not is_hidden(name))
    return PurePath(where).name == MODEL_DIR and not folders and weights


def _is_ours(folders: Sequence[str], names: Sequence[str]) -> bool:
    """Whether a folder with these folders and files is one that a command of this package has made."""
    files = {name for name in names if not is_hidden(name)}
    alone = (bool(files) or LOCK in names) and not folders
    logs = alone and all(PurePath(name).suffix in OUR_ENDINGS for name in files)
    return logs or any(ours <= files for ours in OURS)
