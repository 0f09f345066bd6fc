"""What `dms-fastai predict` reads and writes: the images that its arguments mean, and a table of their classes."""

import csv
import glob
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from .errors import UserError
from .files import check_folder, whole
from .terminal import printable, reader_gone
from .tree import walk

__all__ = ["check_table", "image_files", "table"]


def image_files(given: Iterable[str]) -> dict[Path, tuple[str, ...]]:
    """The image files that arguments mean, each once.

    Args:
        given: Files, folders, whose images at any depth are meant, and patterns such as new/*.png; ~ is the home.

    Returns:
        For each file of a folder, the names of the folders that it lies in, nearest first, as far as that folder; for
        other files none. What is neither folder nor pattern is taken for a file, whether it exists or not.

    Raises:
        UserError: A pattern or a folder without images, or none of the files exists.
    """
    found: dict[Path, tuple[str, ...]] = {}
    for text in map(os.path.expanduser, given):
        paths = [Path(text)]
        if not os.path.lexists(text) and glob.has_magic(text):
            paths = [Path(name) for name in sorted(glob.glob(text, recursive=True))]
            if not paths:
                raise UserError(f"no file is called {text}")
        for path in paths:
            if path.is_dir():
                inside = _images_below(path)
                if not inside:
                    raise UserError(f"no images in {path}")
                found |= {file: (*reversed(file.relative_to(path).parts[:-1]), path.name) for file in inside}
            else:
                found.setdefault(path, ())
    if not any(file.exists() for file in found):
        more = f", nor the {len(found) - 1} others" if len(found) > 1 else ""
        raise UserError(f"no such image: {next(iter(found))}{more}")
    return found


def _images_below(folder: Path) -> list[Path]:
    """The image files in or below a folder, sorted; says how many others are there. Links add no image twice."""
    tree = walk(folder)
    tree.say_skipped()
    found: dict[tuple[str, str], Path] = {}
    for file in (folder / name for name in tree.files):
        found.setdefault((os.path.realpath(file.parent), file.name), file)
    return list(found.values())


def check_table(file: Path) -> None:
    """Raise a UserError if a table cannot be written to `file`, which may be "-", standard output."""
    if str(file) == "-":
        return
    if file.exists() and not file.is_file():
        raise UserError(f"{file} is no file; give NAME.csv, or - for standard output")
    if file.suffix.lower() != ".csv":  # it may be an image that follows the option
        raise UserError(f"--csv is {file}; give NAME.csv, or - for standard output")
    check_folder(file.parent, "--csv")


@contextmanager
def table(file: Path, vocab: Sequence[str]) -> Iterator[Callable[[Path, Sequence[float]], None]]:
    """Write a .csv: file, class, its probability, and the probability of each class.

    Names are written as they are; a terminal gets them in printable form.

    Args:
        file: Written whole or not at all; or "-", standard output.
        vocab: The classes.

    Yields:
        A function that writes the row of an image, from its file and the probabilities of the classes.
    """
    with ExitStack() as stack:
        if str(file) == "-":
            opened = sys.stdout
        else:
            file.parent.mkdir(parents=True, exist_ok=True)
            partial = stack.enter_context(whole(file))
            opened = stack.enter_context(partial.open("w", newline="", encoding="utf-8", errors="surrogateescape"))
        shown = printable if opened.isatty() else str
        writer = csv.writer(opened, lineterminator="\n")

        def write(image: Path, probabilities: Sequence[float]) -> None:
            highest = max(probabilities)
            best = vocab[list(probabilities).index(highest)]
            writer.writerow([shown(image), shown(best), *(f"{p:.6f}" for p in (highest, *probabilities))])

        try:
            writer.writerow(["file", "class", "probability", *map(shown, vocab)])
            yield write
            opened.flush()
        except BrokenPipeError:
            reader_gone(opened)
