"""The table of results: for the terminal, as Markdown, and as cells for other layouts."""

import re
from collections.abc import Iterable, Sequence
from html import escape

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from ..clock import clock
from ..terminal import printable
from .rows import Difference, Row, Section
from .statistics import Estimate

__all__ = [
    "MISTAKE_COLUMNS",
    "as_text",
    "cells",
    "columns",
    "difference_lines",
    "markdown",
    "markdown_table",
    "mistake_cells",
    "notes",
    "points",
    "share",
    "table",
]

COLUMNS = (
    *("stage", "network", "parameters", "M MACs", "epochs", "accuracy, %", "±", "95 % interval"),
    *("best epoch*, %", "training, %", "PFLOP", "time"),
)
WIDE = ("95 % interval", "training, %", "PFLOP")  # columns for which 80 letters have no room
TERMINAL = tuple(column for column in COLUMNS if column not in WIDE)
MEASURED = {"test": "the test images", "val": "the val images", "held out": "held-out training images"}
EXPENDABLE = ("best epoch*, %", "parameters", "M MACs", "network", "epochs", "time")  # the first go first
NARROW = 12  # letters that a column of words needs
NETWORK = 20  # letters of a network's name in a line of the terminal
WORDS = ("stage", "network", "file", "predicted", "is")  # columns that hold words, and are aligned on the left
MISTAKE_COLUMNS = ("file", "predicted", "confidence, %", "is")


def share(value: float | None) -> str:
    """A share in per cent, as text."""
    return "-" if value is None else f"{100 * value:.2f}"


def interval(estimate: Estimate | None) -> str:
    """The ends of the interval of a share, in per cent and between 0 and 100."""
    if estimate is None:
        return "-"
    low, high = (100 * min(max(end, 0), 1) for end in (estimate.low, estimate.high))
    return f"{low:.2f} to {high:.2f}"


def points(estimate: Estimate) -> str:
    """A difference in percentage points, with its interval if there is one."""
    mean = f"{100 * estimate.mean:+.2f}"
    return (
        mean if estimate.low == estimate.high else f"{mean} ({100 * estimate.low:+.2f} to {100 * estimate.high:+.2f})"
    )


def columns(section: Section) -> list[str]:
    """The columns of the table.

    A ± is there only where a row has several seeds, PFLOP only where they have been counted, and MACs only where a
    network has been pruned.
    """
    several = any(row.accuracy and row.accuracy.sd is not None for row in section.rows)
    counted = any(row.first.train_pflop for row in section.rows)
    pruned = any("prune.macs" in row.recipe for row in section.rows)
    optional = (("±", several), ("PFLOP", counted), ("M MACs", pruned))
    left_out = {column for column, there in optional if not there}
    return [column for column in COLUMNS if column not in left_out]


def cells(row: Row) -> dict[str, str]:
    """The cells of a row: a text for each of `COLUMNS`."""
    training = row.mean("last", "train_accuracy")
    mixed = "+" if row.first.mixup and training is not None else ""
    state = "; ".join(f"seed {run.facts.seed} {run.state}" for run in row.runs if not run.finished)
    accuracy = row.accuracy
    return {
        "stage": row.label + (f" [{state}]" if state else ""),
        "network": row.model,
        "parameters": f"{row.first.parameters:,}",
        "M MACs": "-" if row.first.macs is None else f"{row.first.macs / 1e6:,.4g}",
        "epochs": " to ".join(dict.fromkeys(str(done(row, pick)) for pick in (min, max))),
        "accuracy, %": share(accuracy and accuracy.mean),
        "±": share(accuracy and accuracy.sd),
        "95 % interval": interval(accuracy),
        "best epoch*, %": share(row.mean("best", "valid_accuracy")),
        "training, %": share(training) + mixed,
        "PFLOP": f"{row.train_pflop:.3g}" if row.train_pflop else "-",
        "time": clock(row.seconds),
    }


def done(row: Row, pick: type[min]) -> int:
    return pick(run.facts.epochs_done for run in row.runs)


def heading(section: Section) -> str:
    seeds = sorted({seed for row in section.rows for seed in row.seeds})
    return f"{section.data}, seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, seeds))}"


def notes(rows: Sequence[Row], columns: Sequence[str] = COLUMNS) -> list[str]:
    """The notes that a table with these columns needs."""
    where = "the test set" if {row.first.valid for row in rows} == {"test"} else "the validation images"
    measured = [row for row in rows if row.accuracy]
    several, single = ([row for row in measured if row.accuracy.over == over] for over in ("seeds", "images"))
    found, intervals = ["The accuracy is that of the last epoch."], "95 % interval" in columns
    if several:
        n = _span(row.accuracy.n for row in several)
        student = f", the interval that of their mean (Student's t, n = {n})" if intervals else f" (n = {n})"
        found.append(f"± is the standard deviation over seeds{student}.")
    if intervals and (same := [row for row in several if row.accuracy.sd == 0]):
        found.append(f"An interval of no width: all seeds classify as many of the {_images(same)} images right.")
    if single:
        one, images = "where there is one seed" if several else "one seed", _images(single)
        half = max(row.accuracy.high - row.accuracy.low for row in single) / 2
        binomial = f"the interval is binomial, of {images} images"
        chance = binomial if intervals else f"{images} images leave up to {100 * half:.1f} points to chance"
        found.append(f"{one}: {chance}; other seeds differ, too.".capitalize())
    valids = {row.first.valid for row in rows}
    for valid in sorted(valids) if len(valids) > 1 else ():
        labels = ", ".join(dict.fromkeys(row.label for row in rows if row.first.valid == valid))
        found.append(f"Measured on {MEASURED.get(valid, printable(valid))}: {labels}.")
    paper = "; the paper's figures are such" if {row.first.data for row in rows} == {"cifar10"} else ""
    if "best epoch*, %" in columns:
        found.append(f"* the best epoch, chosen on {where}, which flatters it{paper}.")
    if "PFLOP" in columns and any(row.train_pflop for row in rows):
        found.append("PFLOP: forward and backward passes of the training, and the teacher's forward passes.")
    if "training, %" in columns and any(row.first.mixup for row in rows):
        found.append("+ of mixed images, by the first image's label alone, as the paper counts.")
    if rows[0].first.agreement:
        found = [note.replace("accuracy", "agreement") for note in found]
        found.append("Agreement: how often the answer is the teacher's. No label tells whether that is right.")
    return [*found, *(f"({row.mark}) {row.note}" for row in rows if row.mark is not None)]


def _images(rows: Sequence[Row]) -> str:
    return _span(row.first.validation_images for row in rows)


def _span(counts: Iterable[int]) -> str:
    """A count, or the range from the smallest to the largest."""
    counts = set(counts)
    return " to ".join(f"{count:,}" for count in sorted({min(counts), max(counts)}))


def table(section: Section, width: int = 80) -> Table:
    """The table for a terminal of `width` letters; a narrow one gets fewer columns."""
    names = [column for column in columns(section) if column in TERMINAL]
    for column in EXPENDABLE:
        if _width(section, names) <= width:
            break
        names = [name for name in names if name != column]
    caption = "\n".join(notes(section.rows, names))
    shown = Table(title=Text(heading(section), "table.title"), caption=caption, box=SIMPLE_HEAD)
    shown.title_justify = shown.caption_justify = "left"
    shown.padding, shown.show_edge = 0, False
    for name in names:
        number = name not in WORDS
        head = _head(section, name)
        style = "bold" if name.startswith("accuracy") else ""
        shown.add_column(head, justify="right" if number else "left", no_wrap=number, style=style)
    for name, column in zip(names, shown.columns, strict=True):
        if name in WORDS:
            column.overflow = "fold"
        if name == "network":
            column.max_width = min(NETWORK, max(len(row.model) for row in section.rows))
    for row in section.rows:
        found = cells(row)
        shown.add_row(*(found[name] for name in names))
    return shown


def _head(section: Section, name: str) -> str:
    """The head of a column in a terminal, in lines."""
    return section.worded(name).replace(", ", "\n").replace("best epoch", "best")


def _width(section: Section, names: Sequence[str]) -> int:
    """How many letters a table with these columns needs: a number stays in one line."""
    rows = [cells(row) for row in section.rows]
    heads = {name: max(map(len, _head(section, name).splitlines())) for name in names}
    longest = {name: max(heads[name], *(len(found[name]) for found in rows)) for name in names}
    return sum(min(n, NARROW) if name in WORDS else n for name, n in longest.items()) + len(names) - 1


def difference_lines(differences: Sequence[Difference]) -> list[str]:
    """One line for each stage: what it gained over the one that it builds on."""
    lines = []
    for d in differences:
        if d.estimate is None:
            continue
        n = f"{d.estimate.n} shared seeds" if d.estimate.n > 1 else "one seed"
        if d.estimate.n == 1 and d.estimate.low < d.estimate.high:
            n += ", the same images"
        lines.append(f"{d.row.label} against {d.base.label}: {points(d.estimate)} points, {n}")
    return lines


def markdown(section: Section) -> str:
    """The table, its notes and the differences, as Markdown."""
    names, lines, marks = columns(section), [], {"network": "`", "accuracy, %": "**"}
    for row in section.rows:
        found = cells(row)
        lines.append([f"{marks.get(name, '')}{as_text(found[name])}{marks.get(name, '')}" for name in names])
    paragraphs = [_plain(note) for note in notes(section.rows)]
    gains = "".join(f"- {_plain(as_text(line))}\n" for line in difference_lines(section.differences))
    if gains:
        paragraphs += ["Differences of the last epochs, with 95 % intervals:", gains]
    return "\n\n".join([markdown_table([*map(section.worded, names)], lines), *paragraphs]).rstrip() + "\n"


def markdown_table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Rows of cells, which are Markdown, as a table."""
    dashes = ("---" if column in WORDS else "---:" for column in columns)
    lines = [f"| {' | '.join(columns)} |", f"|{'|'.join(dashes)}|"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


def as_text(text: str) -> str:
    """Text in printable form, without a meaning in Markdown or HTML."""
    return re.sub(r"([|*`])", r"\\\1", escape(printable(text), quote=False))


def mistake_cells(section: Section) -> list[list[str]]:
    """A row of cells for each image in the plot of mistakes; none if the images come from no files."""
    found = section.headline.predictions[0]
    if not found or found[0].files is None:
        return []
    p = found[0]
    sure = np.exp(p.log_probabilities.max(axis=1).astype(float))
    named = [(p.files[i], p.vocab[p.predicted[i]], f"{100 * sure[i]:.0f}", p.vocab[p.labels[i]]) for i in p.mistakes]
    return [list(map(printable, cells)) for cells in named]


def _plain(line: str) -> str:
    """A line with its first character escaped, if it is one of Markdown's."""
    return f"\\{line}" if line[0] in "*+" else line
