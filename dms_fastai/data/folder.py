"""Folders of images: which splits there are, and which class each image is of."""

import os
import unicodedata
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path, PurePath

from PIL import Image

from ..errors import UserError, notice, unlistable
from ..training.losses import UNLABELLED
from .decoded import Listing, decoded_image_set
from .imageset import ImageSet
from .splits import NEEDS_TEACHER, Splits, UnlabelledError

__all__ = [
    "NO_LABELS",
    "SPLIT_OF",
    "class_name",
    "find_images",
    "has_image_splits",
    "list_names",
    "only_folder",
    "read_folder",
    "unlabelled",
]

SPLIT_OF = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("test", "testing"), "test"),
    **dict.fromkeys(("val", "valid", "validation"), "val"),
}
NO_LABELS = ("unlabelled", "unlabeled")  # folders of images without classes
PASSED_OVER = {"__MACOSX", "@eaDir"}  # beside hidden files and folders
OURS = ({"recipe.toml", "run.json"}, {"report.md", "index.html"})  # in the folders of runs and of reports, with plots
OUR_ENDINGS = {".log", ".toml"}  # of all files in a folder of logs, and of a run that has just begun
LOCK = ".lock"  # all that there is of a run that opens its images
ENDINGS = 5  # in one message


def read_folder(
    folder: Path, size: int, classes: Sequence[str] | None = None, middle: float = 1.0, to_train: bool = True
) -> Splits:
    """The splits of an image folder.

    Args:
        folder: A folder with train/CLASS/ and, optionally, test/CLASS/ and val/CLASS/, or other names of `SPLIT_OF`; or
            one with CLASS/ alone, all of whose images are for training. An unlabelled/ beside these has images at any
            depth, without labels.
        size: Height and width of what is given out of each image.
        classes: Names of the classes, in order, to be taken where the training images are in no class folders.
        middle: As in `decoded_image_set`.
        to_train: Whether images to train on are needed, of two classes at least.

    Raises, some of it when a split is read:
        UserError: There are no classes, a class is empty or the only one, a split has a class that train has not, it
            is unclear which folders are the classes, or a file cannot be read as an image.
    """
    found = _split_folders(folder)
    if not found and (found := _split_folders(only_folder(folder))):
        folder = only_folder(folder)
    if not found.keys() - {"unlabelled"}:
        found["train"] = [folder]
    elif "train" not in found and to_train:
        raise UserError(f"{folder} has no folder 'train'; the layout is train/CLASS/*.png and test/CLASS/*.png")
    splits = Splits()
    vocab: list[str] = []

    def read(split: str) -> ImageSet:
        train = splits["train"] if split != "train" and "train" in found else None  # its folders are the classes
        if len(found[split]) > 1:
            first, second, *_ = found[split]
            raise UserError(f"{folder} has both {first.name!r} and {second.name!r}; remove or rename one")
        [root] = found[split]
        if split == "unlabelled":
            return decoded_image_set(unlabelled(root, find_images(root), vocab), size, train, middle)
        try:
            files = _classes(_walk(root, besides=found.get("unlabelled", ())), root, split)
        except UnlabelledError:
            if classes is None or (train is not None and train.labelled):
                raise
            vocab[:] = classes
            return decoded_image_set(unlabelled(root, find_images(root), vocab), size, train, middle)
        if train is None:
            vocab[:] = _vocab_of(files, root) if to_train else sorted(files)
        elif not set(files) <= set(vocab):
            strange = min(set(files) - set(vocab))
            who = f"{found['train'][0]} does not have" if train.labelled else "the teacher does not know"
            raise UserError(f"{root} has a class {strange!r} that {who}")
        listing = Listing(
            root,
            [file for name in vocab for file in files.get(name, [])],
            [label for label, name in enumerate(vocab) for _ in files.get(name, [])],
            vocab,
        )
        return decoded_image_set(listing, size, train, middle)

    for split in found:
        splits.add(split, partial(read, split))
    return splits


def has_image_splits(folder: Path) -> bool:
    """Whether a folder has one for a split, with an image in it."""
    if not folder.is_dir():
        return False
    endings, inner = _readable_endings(), [each for found in _split_folders(folder).values() for each in found]
    files = (name for each in inner for _, _, names in os.walk(each) for name in names if not _hidden(name))
    return any(PurePath(name).suffix.lower() in endings for name in files)


def list_names(folder: Path) -> list[str]:
    """The names in a folder that are not passed over, sorted.

    Raises:
        UserError: The folder cannot be listed.
    """
    try:
        names = os.listdir(folder)
    except OSError as error:
        raise unlistable(error) from None
    return sorted(name for name in names if not _hidden(name))


def find_images(folder: Path) -> list[str]:
    """All image files in a folder, at any depth, relative to it."""
    found = _walk(folder)
    return sorted(str(where / name) for where, names in found.images.items() for name in names)


def unlabelled(root: Path, files: Sequence[str], vocab: Sequence[str], name: str = "") -> Listing:
    """Images without labels, `files` in the folder `root`.

    Raises:
        UserError: There are none.
    """
    if not files:
        raise UserError(f"{root} holds no images; fill it or remove it")
    return Listing(root, files, [UNLABELLED] * len(files), vocab, name)


def class_name(text: str) -> str:
    """The name of a class as every system and file format has it: composed Unicode, other bytes escaped."""
    return unicodedata.normalize("NFC", os.fsencode(text).decode("utf-8", "backslashreplace"))


def _hidden(name: str) -> bool:
    return name.startswith(".") or name in PASSED_OVER


def only_folder(folder: Path) -> Path:
    """The folder, or the only one in it, beside which there is no image: archives often hold one, and a README."""
    names, endings = list_names(folder), _readable_endings()
    inner = [folder / name for name in names if (folder / name).is_dir()]
    images = any(PurePath(name).suffix.lower() in endings for name in names)
    return inner[0] if len(inner) == 1 and not images else folder


def _split_folders(folder: Path) -> dict[str, list[Path]]:
    """The folders that may be each split, whatever their case."""
    split_of = SPLIT_OF | dict.fromkeys(NO_LABELS, "unlabelled")
    folders = [folder / name for name in list_names(folder) if (folder / name).is_dir()]
    found: dict[str, list[Path]] = {}
    for inner in folders:
        if inner.name.lower() in split_of:
            found.setdefault(split_of[inner.name.lower()], []).append(inner)
    return found


@dataclass
class _Tree:
    """What a folder holds.

    Attributes:
        images: The image files in each folder that has some, by the folder's path relative to the root.
        empty: Folders without images and without other folders in them.
        endings: How many files have an ending that is no image's.
    """

    images: dict[PurePath, list[str]] = field(default_factory=dict)
    empty: list[PurePath] = field(default_factory=list)
    endings: Counter = field(default_factory=Counter)


def _walk(root: Path, besides: Collection[Path] = ()) -> _Tree:
    """List a folder without the folders `besides` and those of runs. Links are followed, but not back to their origin.

    Raises:
        UserError: A folder in it cannot be listed.
    """

    def refuse(error: OSError) -> None:
        raise unlistable(error) from None

    tree, endings = _Tree(), _readable_endings()
    real: dict[str, str] = {}
    for where, folders, names in os.walk(root, onerror=refuse, followlinks=True):
        real[where] = os.path.realpath(where)
        around = (real.get(str(parent)) for parent in PurePath(where).parents)
        if real[where] in around or (where != str(root) and _is_ours(folders, names)):
            folders.clear()
            continue
        folders[:] = sorted(name for name in folders if not _hidden(name) and Path(where, name) not in besides)
        files = sorted(name for name in names if not _hidden(name))
        images = [name for name in files if PurePath(name).suffix.lower() in endings]
        tree.endings.update(PurePath(name).suffix.lower() for name in set(files) - set(images))
        here = PurePath(os.path.relpath(where, root))
        if images:
            tree.images[here] = images
        elif not folders and where != str(root):
            tree.empty.append(here)
    tree.empty = [each for each in tree.empty if not any(parent in tree.images for parent in each.parents[:-1])]
    return tree


def _is_ours(folders: Sequence[str], names: Sequence[str]) -> bool:
    """Whether a folder with these folders and files is one that a command of this package has made."""
    files = {name for name in names if not _hidden(name)}
    alone = (bool(files) or LOCK in names) and not folders
    logs = alone and all(PurePath(name).suffix in OUR_ENDINGS for name in files)
    return logs or any(ours <= files for ours in OURS)


def _readable_endings() -> set[str]:
    return {ending for ending, kind in Image.registered_extensions().items() if kind in Image.OPEN}


def _classes(tree: _Tree, root: Path, split: str) -> dict[str, list[str]]:
    """The files of each class, relative to the root.

    Raises:
        UserError: A class is empty, or it is unclear which folders are the classes.
        UnlabelledError: There are no class folders.
    """
    loose = tree.images.pop(PurePath("."), [])
    passed_over = ", ".join(f"{ending or 'none'} ({count})" for ending, count in tree.endings.most_common(ENDINGS))
    if tree.empty and (tree.images or split == "train"):
        hint = f" (files with other endings: {passed_over})" if passed_over else ""
        raise UserError(f"{root / min(tree.empty)} holds no images{hint}; fill it or remove it")
    if not tree.images:
        if split == "train":
            hint = f"; {NEEDS_TEACHER}" if loose else ""
            raise UnlabelledError(f"{root} has no class folders; a classifier needs at least 2 folders of images{hint}")
        raise UnlabelledError(f"{root} has no images in class folders")
    level = _class_level(tree.images, root)
    classes: dict[str, list[str]] = {}
    for where, names in sorted(tree.images.items()):
        classes.setdefault(class_name(where.parts[level]), []).extend(str(where / name) for name in names)
    if passed_over:
        total = tree.endings.total()
        files = "1 file is" if total == 1 else f"{total} files are"
        notice(f"{root}: {files} passed over, by endings that Pillow does not read here: {passed_over}")
    if loose:
        images = f"the image {loose[0]} is" if len(loose) == 1 else f"{len(loose)} images are"
        notice(f"{root}: {images} in no class folder, and passed over")
    return classes


def _class_level(folders: Iterable[PurePath], root: Path) -> int:
    """Which part of the folders' paths names the class: the innermost part in which they differ.

    Raises:
        UserError: The folders lie at different depths, or folders of one name in different folders.
    """
    folders = sorted(folders, key=lambda folder: (len(folder.parts), folder))
    first, last = folders[0], folders[-1]
    depth = len(first.parts)
    if depth != len(last.parts):
        raise UserError(
            f"{root / first} and {root / last} hold images at different depths, so that either could be a class; put "
            f"the images of each class into one folder, train/CLASS"
        )
    level = next((k for k in reversed(range(depth)) if len({folder.parts[k] for folder in folders}) > 1), 0)
    where: dict[str, PurePath] = {}
    for folder in folders:
        inside = PurePath(*folder.parts[: level + 1])
        other = where.setdefault(folder.parts[level], inside)
        if other != inside:
            raise UserError(
                f"{root / other} and {root / inside} have the same name, so that either {other.name!r} or "
                f"{other.parent.name!r} could be a class; put the images of each class into one folder, train/CLASS"
            )
    if level and len({folder.parts[0] for folder in folders}) > 1:
        notice(f"{root}: the classes are the innermost folders, such as {first} and {last}")
    return level


def _vocab_of(classes: dict[str, list[str]], root: Path) -> list[str]:
    vocab = sorted(classes)
    if len(vocab) < 2:
        raise UserError(f"{root} has only the class {vocab[0]!r}; a classifier needs at least 2 folders of images")
    return vocab
