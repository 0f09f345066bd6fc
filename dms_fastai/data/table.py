"""Images that a table labels: `--data images/ --labels train.csv`."""

import csv
import io
import re
from codecs import BOM_UTF16_BE, BOM_UTF16_LE
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from ..errors import UserError, notice
from .decoded import Listing, White, decoded_image_set, white_like
from .folder import NO_LABELS, SPLIT_OF, class_name, find_images, unlabelled
from .imageset import ImageSet
from .splits import Splits

__all__ = ["read_table"]

# Names of columns, in lower case; the first that a table has is taken.
FILE_COLUMNS = (
    "file", "filename", "file_name", "image", "image_path", "path", "filepath", "image_id", "img",
    "image_name", "image_file", "img_name", "img_path", "id",
)  # fmt: skip
LABEL_COLUMNS = ("label", "class", "class_name", "label_name", "category", "target", "y")
SPLIT_COLUMNS = ("split", "set", "subset")
NO_NAMES = {"nan", "na", "n/a", "null"}  # as programs write that there is none
# What spreadsheets write before the columns: empty lines, and which character is between two columns.
BEFORE = re.compile(r"(?:[ \t,;]*\n)*(?:sep=(?P<delimiter>.)\n)?(?:[ \t,;]*\n)*", re.IGNORECASE)


def read_table(
    folder: Path, table: Path, size: int, middle: float = 1.0, to_train: bool = True, white: White = None
) -> Splits:
    """The images of a folder, with the classes that a .csv or .tsv file gives them.

    Args:
        folder: Where the files are, at any depth. Those in its unlabelled/ that the table does not name have no label.
        table: A table with a column of files, such as "file" or "id", one of labels, such as "label" or "class", and
            perhaps one of splits, "split". Files are named relative to the folder, to one above or below it, or by
            their name alone, with or without its ending.
        size: Height and width of what is given out of each image.
        middle: As in `decoded_image_set`.
        to_train, white: As in `read_folder`.

    Raises, some of it when a split is read:
        UserError: The table cannot be read, lacks a column, or names a file that is not there or not unique.
    """
    files = _Files(folder)
    rows = _rows(table, files)
    labelled = _labelled(rows, files, table)
    if to_train and "train" not in labelled:
        raise UserError(f"{table} has no training images; its splits are {', '.join(sorted(labelled)) or 'empty'}")
    if odd := [(line, label) for line, _, label, _ in rows if label.lower() in NO_NAMES]:
        line, label = odd[0]
        notice(f"{table}, line {line}: {label!r} is taken for the name of a class, in {len(odd)} rows in all")
    telling = [labelled["train"]] if "train" in labelled else labelled.values()
    vocab = sorted({name for classes in telling for name in classes.values()})
    if to_train and len(vocab) < 2:
        raise UserError(f"{table} has one class, {vocab[0]!r}; a classifier needs at least 2")
    rest = sorted(files.paths.difference(*labelled.values()))
    without = [file for file in rest if Path(file).parts[0].lower() in NO_LABELS]
    if skipped := len(rest) - len(without):
        notice(f"{folder}: {skipped} images are not in {table.name}, and are skipped")
    reader = _Reader(folder, table, labelled, without, vocab, size, middle, to_train, white)
    for split in (*labelled, *(("unlabelled",) if without else ())):
        reader.splits.add(split, partial(reader.read, split))
    return reader.splits


@dataclass(eq=False)
class _Reader:
    """Reads the splits of a table. Arguments and errors as in `read_table`.

    Attributes:
        labelled: The class of each file, by split.
        without: Files without a label.
        vocab: Names of the classes.
        splits: What is read by it.
    """

    folder: Path
    table: Path
    labelled: dict[str, dict[str, str]]
    without: list[str]
    vocab: list[str]
    size: int
    middle: float
    to_train: bool
    white: White
    splits: Splits = field(default_factory=Splits)

    def read(self, split: str) -> ImageSet:
        """The images of a split, and their labels, if they have any."""
        listing = self._listing(split)  # what is wrong with it is said before other images are decoded
        white = white_like(self.splits["train"]) if self.to_train and split != "train" else self.white
        return decoded_image_set(listing, self.size, white, self.middle)

    def _listing(self, split: str) -> Listing:
        name = f"{self.table.resolve()} {split}"
        if split not in self.labelled:
            return unlabelled(self.folder, self.without, self.vocab, name)
        classes, place = self.labelled[split], {name: index for index, name in enumerate(self.vocab)}
        if strange := sorted({*classes.values()} - {*self.vocab}):
            raise UserError(f"{self.table} has a class {strange[0]!r} in {split} that it does not have in train")
        return Listing(self.folder, list(classes), [place[c] for c in classes.values()], self.vocab, name)


def _labelled(rows: Iterable[tuple[int, str, str, str]], files: "_Files", table: Path) -> dict[str, dict[str, str]]:
    """The class of each file, by split. Arguments and errors as in `read_table`; rows as `_rows` gives them."""
    labelled: dict[str, dict[str, str]] = defaultdict(dict)
    written: dict[str, str] = {}
    for line, name, label, split in rows:
        where = f"{table}, line {line}"
        if split and split.lower() not in SPLIT_OF:
            raise UserError(f"{where}: split is {split!r}; it must be {', '.join(SPLIT_OF)}")
        if not label:
            raise UserError(f"{where}: {name} has no label; give it one, or remove the row")
        file, ours = files.find(name, where), SPLIT_OF.get(split.lower(), "train")
        other = written.setdefault(file, name)
        if not _agree(_slashed(other), _slashed(name)):
            raise UserError(f"{where}: {name} is {files.folder / file}, and so is {other} in a line before")
        if any(file in others for split, others in labelled.items() if split != ours):
            raise UserError(f"{where}: {name} is in two splits")
        before = labelled[ours].setdefault(file, class_name(label))
        if before != class_name(label):
            raise UserError(f"{where}: {name} is {label!r} here, and {before!r} in a line before")
    return labelled


def _rows(table: Path, files: "_Files") -> list[tuple[int, str, str, str]]:
    """Line, file, label and split of every row that is not blank."""
    try:
        written = table.read_bytes()
        text = written.decode("utf-16" if written.startswith((BOM_UTF16_LE, BOM_UTF16_BE)) else "utf-8-sig")
        text = text.replace("\r\n", "\n").replace("\r", "\n")
    except OSError as error:
        raise UserError(f"{table} cannot be read ({error.strerror})") from None
    except UnicodeDecodeError as error:
        line = written[: error.start].count(b"\n") + 1
        raise UserError(f"{table}, line {line}, is not in UTF-8; save it as CSV UTF-8") from None
    try:
        before = BEFORE.match(text)
        text, skipped = text[before.end() :], before[0].count("\n")
        first = text.partition("\n")[0]
        delimiter = before["delimiter"] or max(",;\t", key=first.count)
        opened = io.StringIO(text, newline="")
        reader = csv.DictReader(opened, delimiter=delimiter, skipinitialspace=True, strict=True)
        given = [(name or "").strip().lower() for name in reader.fieldnames or []]
        columns = dict(zip(given, reader.fieldnames or [], strict=True))
        file, label = (_column(columns, names, table) for names in (FILE_COLUMNS, LABEL_COLUMNS))
        split = next((columns[name] for name in SPLIT_COLUMNS if name in columns), None)
        if twice := [name for name in given if given.count(name) > 1 and columns[name] in (file, label, split)]:
            raise UserError(f"{table} has the column {twice[0]!r} more than once; rename one")
        rows = []
        for row in reader:
            line = skipped + reader.line_num
            cells = [*row.values(), *row.get(None, ())]
            if not any(cell.strip() for cell in cells if isinstance(cell, str)):
                continue
            if not rows:
                _check_ids(row, file, label, table, files)
            if row[file] is None or row[label] is None:
                raise UserError(f"{table}, line {line}: the row is shorter than the first")
            if any(surplus.strip() for surplus in row.get(None, ())):
                raise UserError(f"{table}, line {line}: the row is longer than the first; use quotes")
            rows.append((line, row[file].strip(), row[label].strip(), (row[split] or "").strip() if split else ""))
    except csv.Error as error:
        raise UserError(f"{table} cannot be read as a table: {error}") from None
    if not rows:
        raise UserError(f"{table} has no rows")
    return rows


def _column(columns: dict[str, str], names: tuple[str, ...], table: Path) -> str:
    found = next((columns[name] for name in names if name in columns), None)
    if not columns:
        raise UserError(f"{table} is empty; one of its columns must be {', '.join(names)}")
    if found is None:
        raise UserError(f"{table} has the columns {', '.join(columns)}; one of them must be {', '.join(names)}")
    return found


def _check_ids(row: dict[str, str], file: str, label: str, table: Path, files: "_Files") -> None:
    """Raise a UserError if images may be named by another column than the one that counts them."""
    if file.strip().lower() != "id":
        return
    for column, cell in row.items():
        if column not in (None, file, label) and cell and files.has(cell.strip()):
            raise UserError(
                f"{table} has the images {row[file]!r} in the column {file!r} and {cell!r} in {column!r}; call the "
                f"right one 'file'"
            )


class _Files:
    """The image files of a folder, found by path, by the end of it, or by name; with or without its ending."""

    def __init__(self, folder: Path):
        self.folder, self._split = folder, SPLIT_OF.get(folder.resolve().name.lower())
        self.paths = set(find_images(folder))
        self._by_name: dict[str, set[str]] = defaultdict(set)
        for path in self.paths:
            self._by_name[class_name(Path(path).name)].add(path)
            self._by_name[class_name(Path(path).stem)].add(path)

    def named(self, name: str) -> list[str]:
        """The paths that a name may mean, relative to the folder."""
        if (path := str(Path(name))) in self.paths:
            return [path]
        name = _slashed(name)
        alike = self._by_name.get(class_name(Path(name).name), ())
        return sorted(path for path in alike if _agree(path, name) and not self._of_other_split(path, name))

    def has(self, name: str) -> bool:
        """Whether a name, with its ending, is that of a file."""
        return any(Path(path).name == Path(name).name for path in self.named(name))

    def _of_other_split(self, path: str, name: str) -> bool:
        """Whether a name leads out of the folder, which is a split's, into that of another split."""
        above = Path(name).parts[: -len(Path(path).parts)]
        other = SPLIT_OF.get(above[-1].lower()) if above else None
        return None not in (self._split, other) and self._split != other

    def find(self, name: str, where: str) -> str:
        """The path of a file, relative to the folder.

        Raises:
            UserError: There is none by that path or the end of it, or several.
        """
        found = self.named(name)
        if not found:
            raise UserError(f"{where}: {self.folder} has no image {name!r}")
        if len(found) > 1:
            raise UserError(
                f"{where}: {name!r} could be {found[0]} or {found[1]}; write its path relative to {self.folder}"
            )
        return found[0]


def _slashed(name: str) -> str:
    """A path as other systems than Windows write it."""
    return name.replace("\\", "/")


def _agree(path: str, name: str) -> bool:
    """Whether the folders of one of two paths to a file are the last ones of the other's."""
    folders, others = (Path(class_name(each)).parts[:-1] for each in (path, name))
    both = min(len(folders), len(others))
    return folders[len(folders) - both :] == others[len(others) - both :]
