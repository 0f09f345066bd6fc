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
    "COLUMNS",
    "MISTAKE_COLUMNS",
    "as_text",
    "cells",
    "difference_lines",
    "markdown",
    "markdown_table",
    "mistake_cells",
    "notes",
    "points",
    "share",
    "table",
]

COLUMNS = ("stage", "last epoch, %", "95 % interval", "best*, %", "training, %", "parameters", "epochs", "time")
MISTAKE_COLUMNS = ("file", "predicted", "confidence, %", "is")


def share(value: float | None) -> str:
    """A share in per cent, as text."""
    return "-" if value is None else f"{100 * value:.2f}"


def headline(estimate: Estimate | None) -> str:
    """The mean and, for several seeds, their standard deviation."""
    if estimate is None or estimate.sd is None:
        return share(estimate and estimate.mean)
    return f"{100 * estimate.mean:.2f} ± {100 * estimate.sd:.2f}"


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


def cells(row: Row) -> list[str]:
    """The cells of a row, a text for each of `COLUMNS`."""
    mixed = "+" if row.first.mixup and row.measured else ""
    state = "; ".join(f"seed {run.facts.seed} {run.state}" for run in row.runs if not run.finished)
    return [
        row.label + (f" [{state}]" if state else ""),
        headline(row.accuracy),
        interval(row.accuracy),
        share(row.mean("best", "valid_accuracy")),
        share(row.mean("last", "train_accuracy")) + mixed,
        f"{row.first.parameters:,}",
        " to ".join(dict.fromkeys(str(done(row, pick)) for pick in (min, max))),
        clock(sum(run.facts.seconds for run in row.runs) / len(row.runs)),
    ]


def done(row: Row, pick: type[min]) -> int:
    return pick(run.facts.epochs_done for run in row.runs)


def heading(section: Section) -> str:
    seeds = sorted({seed for row in section.rows for seed in row.seeds})
    return f"{section.data}, seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, seeds))}"


def notes(rows: Sequence[Row]) -> list[str]:
    """The notes that the table needs."""
    where = "the test set" if {row.first.valid for row in rows} == {"test"} else "the validation images"
    measured = [row for row in rows if row.accuracy]
    several, single = ([row for row in measured if row.accuracy.over == over] for over in ("seeds", "images"))
    found = []
    if several:
        n = _span(row.accuracy.n for row in several)
        found.append(f"± is the standard deviation over seeds, the interval that of their mean (Student's t, n = {n}).")
    if same := [row for row in several if row.accuracy.sd == 0]:
        found.append(f"An interval of no width: all seeds classify as many of the {_images(same)} images right.")
    if single:
        one = "where there is one seed" if several else "one seed"
        found.append(
            f"{one}: the interval is binomial, of {_images(single)} images; other seeds differ, too.".capitalize()
        )
    found.append(f"* the best epoch, chosen on {where}, which flatters it; the paper's figures are such.")
    if any(row.first.mixup for row in rows):
        found.append("+ of mixed images, by the first image's label alone, as the paper counts.")
    return found


def _images(rows: Sequence[Row]) -> str:
    return _span(row.first.validation_images for row in rows)


def _span(counts: Iterable[int]) -> str:
    """A count, or the range from the smallest to the largest."""
    counts = set(counts)
    return " to ".join(f"{count:,}" for count in sorted({min(counts), max(counts)}))


def table(section: Section) -> Table:
    """The table for a terminal of 80 columns."""
    shown = Table(title=Text(heading(section), "table.title"), caption="\n".join(notes(section.rows)), box=SIMPLE_HEAD)
    shown.title_justify = shown.caption_justify = "left"
    shown.padding, shown.collapse_padding = (0, 1), True
    shown.add_column("stage")
    for column in ("last\nepoch, %", "best*\n%", "training\n%", "parameters", "epochs\ntime"):
        shown.add_column(column, justify="right", no_wrap=True)
    for row in section.rows:
        stage, mean, ends, best, training, parameters, epochs, time = cells(row)
        training += "" if training.endswith("+") else " "
        shown.add_row(
            _two(stage, row.model),
            _two(mean, ends, "bold"),
            *(best, training, parameters, _two(epochs, time)),
        )
    return shown


def _two(first: str, second: str, style: str = "") -> Text:
    """A cell of two lines."""
    return Text.assemble((first, style), "\n", (second, "dim"))


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
    lines = []
    for row in section.rows:
        stage, mean, *rest = map(as_text, cells(row))
        lines.append([f"{stage}<br>`{as_text(row.model)}`", f"**{mean}**", *rest])
    paragraphs = [_plain(note) for note in notes(section.rows)]
    gains = "".join(f"- {_plain(as_text(line))}\n" for line in difference_lines(section.differences))
    if gains:
        paragraphs += ["Differences of the last epochs, with 95 % intervals:", gains]
    return "\n\n".join([markdown_table(COLUMNS, lines), *paragraphs]).rstrip() + "\n"


def markdown_table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Rows of cells, which are Markdown, as a table."""
    lines = [f"| {' | '.join(columns)} |", f"|---|{'---:|' * (len(columns) - 1)}"]
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
