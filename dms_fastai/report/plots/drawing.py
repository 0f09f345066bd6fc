"""What all plots share: colours for light and dark pages, labels, legends, axes, and how a plot becomes a file."""

import io
import json
import textwrap
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from ...terminal import printable
from ..rows import Row, Section

__all__ = [
    "DARK",
    "LETTER",
    "LIGHT",
    "Look",
    "Plot",
    "Theme",
    "draw",
    "ends",
    "figure",
    "legend",
    "looks",
    "lowest",
    "named",
    "rounded",
    "shortened",
]

DPI = 144
LETTER = 0.08  # width of a letter of 10 points, in inches, or a little less
FAR = 3  # times the span of all other rows, at which a row is left out of the frame
TALLEST = 300  # inches; matplotlib draws no image of 65,536 pixels
WIDE = 42  # letters of a label in a line
LINES = ("-", "--", ":", "-.", (0, (6, 1, 1, 1, 1, 1)), (0, (9, 3)))  # of the rows that share a colour
MARKERS = "os^DvP"


@dataclass(frozen=True)
class Theme:
    """The colours of background, text, weak lines, right and wrong shares, and stages.

    The stages have Okabe and Ito's colours, which most people can tell apart.
    """

    name: str
    paper: str
    ink: str
    faint: str
    right: str
    wrong: str
    colours: tuple[str, ...]


LIGHT = Theme(
    *("light", "#ffffff", "#1f2328", "#8b949e", "#62a8d3", "#f27a24"),
    ("#7a7a7a", "#0072b2", "#009e73", "#cc79a7", "#d55e00", "#e69f00", "#56b4e9", "#8c6d31"),
)
DARK = Theme(
    *("dark", "#161b22", "#e6edf3", "#848d97", "#1f6a9c", "#b3510f"),
    ("#a8a8a8", "#56b4e9", "#2fc79b", "#e29ac3", "#ff8b4d", "#f0c14b", "#7f9cf5", "#c9a96a"),
)


@dataclass(frozen=True)
class Plot:
    """A figure of the report.

    Attributes:
        name: Name of its file, without the ending.
        caption: What it shows.
        draw: Draws it in a theme's colours; gives None if there is nothing to draw.
        data: Gives the numbers in it.
    """

    name: str
    caption: str
    draw: Callable[[Section, Theme], Figure | None]
    data: Callable[[Section], Any]


def draw(plot: Plot, section: Section, theme: Theme) -> bytes | None:
    """The plot as a .png, with its numbers as JSON in the file's description; None if there is nothing to draw."""
    colours = {
        **dict.fromkeys(("figure.facecolor", "axes.facecolor", "savefig.facecolor"), theme.paper),
        **dict.fromkeys(("text.color", "axes.labelcolor", "xtick.color", "ytick.color"), theme.ink),
        "axes.edgecolor": theme.faint,
        "grid.color": theme.faint,
    }
    style = {
        "text.parse_math": False,
        "font.size": 10,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "grid.alpha": 0.25,
    }
    with rc_context({**colours, **style}), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # a letter that the font lacks, a legend that leaves little room
        drawn = plot.draw(section, theme)
        if drawn is None:
            return None
        for axes in drawn.axes:
            axes.set(xlabel=section.worded(axes.get_xlabel()), ylabel=section.worded(axes.get_ylabel()))
        FigureCanvasAgg(drawn)
        file = io.BytesIO()
        drawn.savefig(file, format="png", dpi=DPI, metadata={"Description": json.dumps(plot.data(section))})
        return file.getvalue()


def figure(width: float, height: float) -> Figure:
    return Figure(figsize=(width, min(height, TALLEST)), layout="constrained")


@dataclass(frozen=True)
class Look:
    """How a row is drawn: the rows that share a colour, of which there are few, differ in line and marker."""

    colour: str
    line: Any
    marker: str


def looks(section: Section, theme: Theme) -> list[tuple[Row, Look]]:
    """Each row with its look, the same in every plot; the first to repeat one is the 49th."""
    found = []
    for index, row in enumerate(section.rows):
        turn, place = divmod(index, len(theme.colours))
        found.append((row, Look(theme.colours[place], LINES[turn % len(LINES)], MARKERS[turn % len(MARKERS)])))
    return found


def legend(drawn: Figure) -> None:
    """A legend below the figure's axes, for which the figure grows."""
    handles, labels = drawn.axes[0].get_legend_handles_labels()
    longest = max((len(line) for label in labels for line in label.splitlines()), default=0)
    columns = max(min(len(labels), 3, int(drawn.get_figwidth() / (0.7 + LETTER * longest))), 1)
    lines = max(sum(label.count("\n") + 1 for label in labels[n::columns]) for n in range(columns))
    drawn.set_figheight(min(drawn.get_figheight() + 0.2 * lines + 0.2, TALLEST))
    drawn.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False)


def lowest(groups: Sequence[Sequence[float]]) -> float:
    """Where an axis begins that shows the numbers of each group: without a few groups far below all others.

    They are left out if they are a minority, and more than FAR times as far away as the others span.
    """
    ordered = sorted(groups, key=min)
    for left in range((len(ordered) - 1) // 2, 0, -1):
        rest = [value for group in ordered[left:] for value in group]
        if min(rest) - max(ordered[left - 1]) > FAR * (max(rest) - min(rest)):
            return min(rest)
    return min(min(group) for group in ordered)


def shortened(name: str, most: int) -> str:
    """The name in printable form, without its middle if it is too long: long names often differ at their ends."""
    name = printable(name)
    return name if len(name) <= most else f"{name[: most // 2]}…{name[1 - (most - most // 2) :]}"


def named(row: Row, note: str = "") -> str:
    """The row's label as a plot shows it, in lines; matplotlib leaves labels that begin with _ out of a legend."""
    label = "\n".join(textwrap.wrap(shortened(f"{row.label}{note}", 2 * WIDE), WIDE))
    return f" {label}" if label.startswith("_") else label


def ends(row: Row) -> tuple[float, float]:
    """The ends of the interval of the row's accuracy, in per cent."""
    low, high = (100 * min(max(end, 0), 1) for end in (row.accuracy.low, row.accuracy.high))
    return low, high


def rounded(values: Any) -> list[float | None]:
    """Numbers as a plot's file has them; None in place of NaN."""
    return [None if np.isnan(v) else round(float(v), 6) for v in values]
