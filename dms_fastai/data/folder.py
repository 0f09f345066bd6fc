"""Folders of images: which splits there are, and which class each image is of."""

import os
import unicodedata
from collections.abc import Collection, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path, PurePath

from ..errors import UserError, notice, unlistable
from ..files import is_hidden
from ..training.losses import UNLABELLED
from ..tree import Tree, readable_endings, walk
from .decoded import Listing, White, decoded_image_set, white_like
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


def read_folder(
    folder: Path,
    size: int,
    classes: Sequence[str] | None = None,
    middle: float = 1.0,
    to_train: bool = True,
    white: White = None,
) -> Splits:
    """The splits of an image folder.

    Args:
        folder: A folder with train/CLASS/ and, optionally, test/CLASS/ and val/CLASS/, or other names of `SPLIT_OF`; or
            one with CLASS/ alone, all of whose images are for training. An unlabelled/ beside these has images at any
            depth, without labels.
        size: Height and width of what is given out of each image.
        classes: Names of the classes, in order, to be taken where the training images are in no class folders.
        middle: As in `decoded_image_set`.
        to_train: Whether images to train on are needed, of two classes at least. If not, those that are there tell the
            classes by their folders, and are read only when somebody asks for them.
        white: As in `decoded_image_set`, for images to train on; for others, where none are needed.

    Raises, some of it when a split is read:
        UserError: There are no classes, a class is empty or the only one, a split has a class that train has not, it
            is unclear which folders are the classes, or a file cannot be read as an image.
    """
    found = _split_folders(folder)
    if not found and (found := _split_folders(only_folder(folder, to_train))):
        folder = only_folder(folder, to_train)
    if not found.keys() - {"unlabelled"}:
        found["train"] = [folder]
    elif "train" not in found and to_train:
        raise UserError(
            f"{folder} has no folder 'train'; the layout is train/CLASS/*.png and test/CLASS/*.png"
            f"{_or_classes(folder, found)}"
        )
    reader = _Reader(folder, found, size, classes, middle, to_train, white)
    for split in found:
        reader.splits.add(split, partial(reader.read, split))
    return reader.splits


@dataclass(eq=False)
class _Reader:
    """Reads the splits of an image folder. Arguments and errors as in `read_folder`.

    Attributes:
        found: The folders that may be each split.
        splits: What is read by it.
    """

    folder: Path
    found: dict[str, list[Path]]
    size: int
    classes: Sequence[str] | None
    middle: float
    to_train: bool
    white: White
    splits: Splits = field(default_factory=Splits)
    _listed: "dict[str, _Classes | None]" = field(default_factory=dict)

    def read(self, split: str) -> ImageSet:
        """The images of a split, and their labels."""
        root, vocab = self._root(split), self._vocab(split)
        train = self.splits["train"] if self.to_train and split != "train" else None
        white = self.white if train is None else white_like(train)
        named = None if split == "unlabelled" else self._classes_in(split)
        if named is None:
            files = _without_labels(root, () if split == "unlabelled" else self._unlabelled)
            return decoded_image_set(unlabelled(root, files, vocab), self.size, white, self.middle)
        if not set(named.files) <= set(vocab):
            strange, known = min(set(named.files) - set(vocab)), self._classes_in(self._telling(split))
            who = "the teacher does not know" if known is None else f"{self._root('train')} does not have"
            raise UserError(f"{root} has a class {strange!r} that {who}")
        listing = Listing(
            root,
            [file for name in vocab for file in named.files.get(name, [])],
            [label for label, name in enumerate(vocab) for _ in named.files.get(name, [])],
            vocab,
        )
        return decoded_image_set(listing, self.size, white, self.middle)

    @property
    def _unlabelled(self) -> Sequence[Path]:
        return self.found.get("unlabelled", ())

    def _telling(self, split: str) -> str:
        """The split whose folders are the classes."""
        return "train" if "train" in self.found else split

    def _root(self, split: str) -> Path:
        if len(self.found[split]) > 1:
            first, second, *_ = self.found[split]
            raise UserError(f"{self.folder} has both {first.name!r} and {second.name!r}; remove or rename one")
        return self.found[split][0]

    def _vocab(self, split: str) -> list[str]:
        telling = self._telling(split)
        named = self._classes_in(telling)
        if named is None:
            return list(self.classes)
        return _vocab_of(named.files, self._root(telling)) if self.to_train else sorted(named.files)

    def _classes_in(self, split: str) -> "_Classes | None":
        """The class folders of a split, listed once; None: its images have no labels, and need none."""
        if split not in self._listed:
            self._listed[split] = self._list(split)
        return self._listed[split]

    def _list(self, split: str) -> "_Classes | None":
        root, telling = self._root(split), self._telling(split)
        train = None if split == telling else self._classes_in(telling)
        try:
            return _classes(walk(root, besides=self._unlabelled), split, train)
        except UnlabelledError as error:
            may = self.classes is not None and train is None
            named = split == "train" and class_name(root.name) in (self.classes or ())
            hint = _or_classes(self.folder, self.found) if named or (split == "train" and not may) else ""
            if may and not hint:
                return None
            if named:
                raise UserError(f"{root} has no class folders{hint}") from None
            raise UnlabelledError(f"{error.message}{hint}") from None


def _or_classes(folder: Path, splits: dict[str, list[Path]]) -> str:
    """A hint for folders whose classes may be called as splits are; empty where no others with images lie beside."""
    taken = [root for roots in splits.values() for root in roots]
    for name in list_names(folder):
        with suppress(UserError):  # one that cannot be listed
            if (folder / name).is_dir() and folder / name not in taken and walk(folder / name).images:
                return f"; if {taken[0].name!r} and {name!r} are classes, put all of them into one folder, train/"
    return ""


def has_image_splits(folder: Path) -> bool:
    """Whether a folder has one for a split, with an image in it."""
    if not folder.is_dir():
        return False
    endings, inner = readable_endings(), [each for found in _split_folders(folder).values() for each in found]
    files = (name for each in inner for _, _, names in os.walk(each) for name in names if not is_hidden(name))
    return any(PurePath(name).suffix.lower() in endings for name in files)


def list_names(folder: Path) -> list[str]:
    """The names in a folder that are not hidden, sorted.

    Raises:
        UserError: The folder cannot be listed.
    """
    try:
        names = os.listdir(folder)
    except OSError as error:
        raise unlistable(error) from None
    return sorted(name for name in names if not is_hidden(name))


def find_images(folder: Path) -> list[str]:
    """All image files in a folder, at any depth, relative to it."""
    return walk(folder).files


def _without_labels(root: Path, besides: Collection[Path] = ()) -> list[str]:
    """All image files in a folder without those `besides`, as in `find_images`; says how many others are there."""
    tree = walk(root, besides)
    tree.say_skipped()
    return tree.files


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


def only_folder(folder: Path, to_train: bool = True) -> Path:
    """The folder, or the only one in it, beside which there is no image: archives often hold one, and a README.

    It is not a split's; nor the only class, where it need not be trained on.
    """
    names, endings = list_names(folder), readable_endings()
    inner = [folder / name for name in names if (folder / name).is_dir()]
    images = any(PurePath(name).suffix.lower() in endings for name in names)
    if len(inner) != 1 or images or inner[0].name.lower() in (*SPLIT_OF, *NO_LABELS):
        return folder
    inside = list_names(inner[0])
    images = any(PurePath(name).suffix.lower() in endings for name in inside)
    is_class = images and not any((inner[0] / name).is_dir() for name in inside)
    return folder if is_class and not to_train else inner[0]


def _split_folders(folder: Path) -> dict[str, list[Path]]:
    """The folders that may be each split, whatever their case."""
    split_of = SPLIT_OF | dict.fromkeys(NO_LABELS, "unlabelled")
    folders = [folder / name for name in list_names(folder) if (folder / name).is_dir()]
    found: dict[str, list[Path]] = {}
    for inner in folders:
        if inner.name.lower() in split_of:
            found.setdefault(split_of[inner.name.lower()], []).append(inner)
    return found


@dataclass(frozen=True)
class _Classes:
    """The image files of a split.

    Attributes:
        files: Those of each class, relative to the split's folder.
        level: Which part of their paths names the class.
        depth: How many folders they lie in.
    """

    files: dict[str, list[str]]
    level: int
    depth: int


def _classes(tree: Tree, split: str, train: _Classes | None) -> _Classes:
    """The files of each class; where the split's folders are as deep as those of `train`, the classes lie as deep, too.

    Raises:
        UserError: A class is empty, or it is unclear which folders are the classes.
        UnlabelledError: There are no class folders.
    """
    root, loose = tree.root, tree.images.pop(PurePath("."), [])
    if tree.empty and (tree.images or split == "train"):
        hint = f" (files with other endings: {tree.skipped})" if tree.endings else ""
        raise UserError(f"{root / min(tree.empty)} holds no images{hint}; fill it or remove it")
    if not tree.images:
        if split == "train":
            hint = f"; {NEEDS_TEACHER}" if loose else ""
            raise UnlabelledError(f"{root} has no class folders; a classifier needs at least 2 folders of images{hint}")
        raise UnlabelledError(f"{root} has no images in class folders")
    depths = {len(folder.parts) for folder in tree.images}
    like_train = train is not None and depths == {train.depth}
    level = train.level if like_train else _class_level(tree.images, root)
    classes: dict[str, list[str]] = {}
    for where, names in sorted(tree.images.items()):
        classes.setdefault(class_name(where.parts[level]), []).extend(str(where / name) for name in names)
    tree.say_skipped()
    if loose:
        images = f"the image {loose[0]} is" if len(loose) == 1 else f"{len(loose)} images are"
        notice(f"{root}: {images} in no class folder, and skipped")
    return _Classes(classes, level, min(depths))


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
