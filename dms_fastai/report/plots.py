"""The report's images: one function each, from rows to a figure, in colours for light and dark pages."""

import io
import json
import textwrap
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from ..runs.predictions import Predictions
from ..terminal import printable
from .published import TABLE_1, System
from .rows import Row, Section
from .statistics import calibrate

__all__ = ["DARK", "LIGHT", "PLOTS", "Plot", "Theme", "draw"]

DPI = 144
LETTER = 0.08  # width of a letter of 10 points, in inches, or a little less
FEW = 10  # a bin of confidence with fewer images is not drawn: its accuracy says nothing yet
FEW_CLASSES = 25  # a matrix of more classes has no room for its numbers
SOME_CLASSES = 110  # and one of more than these no room for their names
MANY_CLASSES = 2000  # and one of more than these has more cells than the image has pixels
MANY_TIMES = 5  # the epochs of the shortest run, from which on a linear axis would hide its curve
FAR = 3  # times the span of all other rows, at which a row is left out of the frame
TALLEST = 300  # inches; matplotlib draws no image of 65,536 pixels
HARDEST = 15  # how many classes the plot of classes shows
SHADE = 0.85  # opacity of the black over what said nothing
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


# --- by epoch


def by_epoch(row: Row, key: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Epochs, and a figure's mean and standard deviation over the seeds that have reached each epoch.

    Both are NaN where the figure is not finite for one of these seeds.
    """
    runs = [rows for rows in row.epochs[0] if rows]
    longest = max(map(len, runs), default=0)
    values, reached = np.zeros((len(runs), longest)), np.zeros((len(runs), longest), bool)
    for index, rows in enumerate(runs):
        values[index, : len(rows)] = [epoch[key] if np.isfinite(epoch[key]) else np.nan for epoch in rows]
        reached[index, : len(rows)] = True
    there = reached.sum(axis=0)
    mean = values.sum(axis=0) / there
    sd = np.sqrt((np.where(reached, values - mean, 0) ** 2).sum(axis=0) / np.maximum(there - 1, 1))
    return np.arange(1, longest + 1), mean, sd


def curves(section: Section, theme: Theme) -> Figure | None:
    if not any(any(row.epochs[0]) for row in section.rows):
        return None
    drawn = figure(10, 3.6)
    panels = drawn.subplots(1, 2)
    lengths = [len(rows) for row in section.rows for rows in row.epochs[0] if rows]
    for axes, key, scale, label in zip(
        panels, ("valid_accuracy", "valid_loss"), (100, 1), ("accuracy, %", "loss"), strict=True
    ):
        late = []
        for row, look in looks(section, theme):
            if not any(row.epochs[0]):
                continue
            epochs, mean, sd = by_epoch(row, key)
            mean, sd = scale * mean, scale * sd
            dot = look.marker if len(epochs) == 1 else None
            axes.plot(epochs, mean, color=look.colour, ls=look.line, lw=1.6, label=named(row), marker=dot)
            if len(row.epochs[0]) > 1:
                axes.fill_between(epochs, mean - sd, mean + sd, color=look.colour, alpha=0.25, lw=0)
            end = (mean - sd if scale > 1 else mean + sd)[min(max(len(mean) // 5, 1), len(mean) - 1) :]
            late.append(end[np.isfinite(end)])  # the first fifth would squeeze the rest into a corner
        late = [end for end in late if end.size]
        if scale > 1:
            axes.set_ylim(bottom=max(lowest(late) - 2, 0))
        elif late:
            axes.set_ylim(0, -1.1 * lowest([-end for end in late]) or 1)
        axes.set_xlabel("epoch")
        axes.set_ylabel(label)
        if max(lengths) > MANY_TIMES * min(lengths):
            axes.set_xscale("log")
            axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
            axes.xaxis.set_minor_formatter(NullFormatter())
        else:
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(True)
    legend(drawn)
    return drawn


def curves_data(section: Section) -> Any:
    return {row.label: _rounded(by_epoch(row, "valid_accuracy")[1]) for row in section.rows if any(row.epochs[0])}


# --- the ablation


def ablation(section: Section, theme: Theme) -> Figure | None:
    if not any(row.measured for row in section.rows):
        return None
    rows = [(row, look.colour) for row, look in looks(section, theme) if row.accuracy]
    drawn = figure(8, 1.2 + 0.5 * len(rows))
    axes = drawn.subplots()
    ends = [_ends(row) for row, _ in rows]
    left = lowest(ends)
    for place, (row, colour) in enumerate(rows):
        estimate, (low, high) = row.accuracy, ends[place]
        if high < left:  # outside of the frame, on the left
            beside = {"xycoords": axes.get_yaxis_transform(), "textcoords": "offset points", "va": "center"}
            axes.annotate(f"◂ {100 * estimate.mean:.2f}", (0, place), xytext=(4, 0), color=colour, **beside)
            continue
        axes.plot([low, high], [place, place], color=colour, lw=2.5, alpha=0.6, solid_capstyle="butt")
        if estimate.n > 1:
            seeds = [100 * run.facts.last.valid_accuracy for run in row.measured]
            axes.plot(seeds, [place] * len(seeds), "|", color=colour, ms=11, alpha=0.9)
        axes.plot(100 * estimate.mean, place, "o", color=colour, ms=9, zorder=3)
        axes.annotate(
            f"{100 * estimate.mean:.2f}", (high, place), xytext=(7, 0), textcoords="offset points", va="center"
        )
    notes = [f": {row.note}" if row.note else "" for row, _ in rows]
    axes.set_yticks(range(len(rows)), [named(row, note) for (row, _), note in zip(rows, notes, strict=True)])
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.margins(x=0.12)
    axes.set_xlabel("accuracy in the last epoch, %, and 95 % interval")
    axes.grid(True, axis="x")
    return drawn


def _ends(row: Row) -> tuple[float, float]:
    """The ends of the interval of the row's accuracy, in per cent."""
    low, high = (100 * min(max(end, 0), 1) for end in (row.accuracy.low, row.accuracy.high))
    return low, high


def ablation_data(section: Section) -> Any:
    rows = [row for row in section.rows if row.accuracy]
    return {row.label: _rounded([row.accuracy.mean, row.accuracy.low, row.accuracy.high]) for row in rows}


# --- which classes


def confusion_matrix(predictions: Sequence[Predictions]) -> np.ndarray:
    """Images of each true class (rows) by predicted class (columns), added up over the runs."""
    classes = len(predictions[0].vocab)
    total = np.zeros((classes, classes), dtype=int)
    for p in predictions:
        np.add.at(total, (p.labels, p.predicted), 1)
    return total


def confusion(section: Section, theme: Theme) -> Figure | None:
    predictions = _few_classes(section.headline)
    if not predictions:
        return None
    matrix, names = confusion_matrix(predictions), [shortened(name, 30) for name in predictions[0].vocab]
    n = len(names)
    shares = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    diagonal = np.eye(n, dtype=bool)
    side = max(0.62 * n, 4) if n <= 16 else 10 + 0.05 * min(n, SOME_CLASSES)  # inches
    drawn = figure(side + 1.2, side)
    axes = drawn.subplots()
    top = max(shares[~diagonal].max(), 1e-9)
    for part, colour, most in ((~diagonal, theme.wrong, top), (diagonal, theme.right, 1)):
        colours = LinearSegmentedColormap.from_list("from the background", [theme.paper, colour])
        axes.imshow(np.where(part, shares, np.nan), cmap=colours, vmin=0, vmax=most)
    if n <= FEW_CLASSES:
        for (y, x), count in np.ndenumerate(matrix):
            if count:
                axes.text(x, y, f"{count:,}", ha="center", va="center", fontsize=8)
    if n <= SOME_CLASSES:
        text = {"fontsize": min(10, 50 * side / n)}
        long = {"rotation": 45 if n <= FEW_CLASSES else 90, "ha": "right", "va": "top", "rotation_mode": "anchor"}
        axes.set_xticks(range(n), names, **text, **(long if max(map(len, names)) > 2 else {}))
        axes.set_yticks(range(n), names, **text)
    axes.spines[:].set_visible(True)
    axes.tick_params(length=0)
    axes.set_xlabel("predicted")
    axes.set_ylabel("true")
    axes.set_title(f"{named(section.headline)}{_seeds(predictions)}", fontsize=10)
    return drawn


def _few_classes(row: Row) -> list[Predictions]:
    """The row's predictions, unless they have too many classes for a matrix."""
    return [p for p in row.predictions[0] if len(p.vocab) <= MANY_CLASSES]


def confusion_data(section: Section) -> Any:
    predictions = _few_classes(section.headline)
    return confusion_matrix(predictions).tolist() if predictions else None


def class_accuracies(row: Row) -> np.ndarray:
    """The accuracy of each class, a mean over the seeds; NaN for a class without images."""
    each = []
    for p in row.predictions[0]:
        right, count = (np.bincount(p.labels, weights, len(p.vocab)) for weights in (p.right, None))
        each.append(np.divide(right, count, out=np.full(len(count), np.nan), where=count > 0))
    return np.mean(each, axis=0)


def classes(section: Section, theme: Theme) -> Figure | None:
    rows = _same_classes(section, theme)
    if not rows:
        return None
    headline = class_accuracies(section.headline)
    there = np.count_nonzero(~np.isnan(headline))
    order = np.argsort(headline, kind="stable")[: min(there, HARDEST)]  # classes without images come last
    names = [shortened(name, 30) for name in section.headline.predictions[0][0].vocab[order]]
    lines = len(rows) + 1.5  # each row has a line of its own in a class, and hides no other
    drawn = figure(8, 1.5 + 0.08 * lines * len(order))
    axes = drawn.subplots()
    for line, (row, look) in enumerate(rows, start=1):
        values, strong = 100 * class_accuracies(row)[order], row is section.headline
        places = np.arange(len(order)) - 0.5 + (line + 0.25) / lines
        dots = {"color": look.colour, "ms": 6 if strong else 4.5, "zorder": 2 + strong}
        axes.plot(values, places, look.marker, label=named(row), **dots)
    for place in range(0, len(order), 2):
        axes.axhspan(place - 0.5, place + 0.5, color=theme.faint, alpha=0.1, lw=0)
    axes.set_yticks(range(len(order)), names)
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(len(order) - 0.5, -0.5)
    axes.set_xlabel("accuracy, %" + (f"; the {len(order)} hardest classes" if len(order) < there else ""))
    axes.grid(True, axis="x")
    legend(drawn)
    return drawn


def classes_data(section: Section) -> Any:
    return {row.label: _rounded(class_accuracies(row)) for row in section.rows if row.predictions[0]}


# --- what it gets wrong


def mistakes(section: Section, theme: Theme) -> Figure | None:
    return _mistakes(section, regions=False)


def regions(section: Section, theme: Theme) -> Figure | None:
    return _mistakes(section, regions=True)


def _mistakes(section: Section, regions: bool) -> Figure | None:
    """The mistakes of the headline's first run, with or without the regions that speak for them."""
    found = section.headline.predictions[0]
    if not found or not len(found[0].mistakes) or (regions and found[0].regions is None):
        return None
    p = found[0]
    columns = min(len(p.mistakes), 6)
    lines = -(-len(p.mistakes) // columns)
    drawn = figure(max(1.5 * columns, 2.5), (1.85 if p.files is None else 2.0) * lines + 0.3)
    for axes in drawn.subplots(lines, columns, squeeze=False).flat:
        axes.set_axis_off()
    for number, (axes, index, image) in enumerate(zip(drawn.axes, p.mistakes, p.images, strict=False)):
        axes.imshow(image, interpolation="nearest")
        if regions:
            height, width = image.shape[:2]
            shade = np.zeros((*p.regions[number].shape, 4))
            shade[..., 3] = SHADE * (1 - p.regions[number] / 255)
            axes.imshow(shade, extent=(-0.5, width - 0.5, height - 0.5, -0.5), interpolation="bilinear")
        certain = np.exp(np.float64(p.log_probabilities[index].max()))
        true, said = (shortened(p.vocab[each[index]], 14) for each in (p.labels, p.predicted))
        file = "" if p.files is None else f"\n{shortened(p.files[index], 22)}"
        axes.set_title(f"{said}, {100 * certain:.0f} %\nis {true}{file}", fontsize=8)
    return drawn


def mistakes_data(section: Section) -> Any:
    found = section.headline.predictions[0]
    return found[0].mistakes.tolist() if found else None


# --- how far it can be trusted


def reliability(section: Section, theme: Theme) -> Figure | None:
    rows = [(row, look) for row, look in looks(section, theme) if row.predictions[0]]
    if not rows:
        return None
    drawn = figure(8, 5.4)
    axes = drawn.subplots()
    axes.plot([0, 100], [0, 100], color=theme.faint, lw=1, ls="--")
    least = 90.0
    for row, look in rows:
        found = [calibrate(p.log_probabilities, p.predicted, p.labels) for p in row.predictions[0]]
        first = found[0]
        enough = first.share * len(row.predictions[0][0].labels) >= FEW
        ece, nll = (np.mean([getattr(c, key) for c in found]) for key in ("ece", "nll"))
        label = named(row, f": ECE {100 * ece:.1f} %, NLL {nll:.3f}")
        x, y = 100 * first.confidence[enough], 100 * first.accuracy[enough]
        axes.plot(x, y, color=look.colour, ls=look.line, lw=1.4, marker=look.marker, ms=3, label=label)
        axes.scatter(x, y, s=12 + 250 * first.share[enough], color=look.colour, alpha=0.55, lw=0)
        least = min([least, *x, *y])
    axes.set_xlabel("confidence, %")
    axes.set_ylabel("accuracy, %")
    low = max(least - 0.15 * (100 - least), 0)
    axes.set_xlim(low, 100 + 0.02 * (100 - low))
    axes.set_ylim(low, 100 + 0.02 * (100 - low))
    axes.grid(True)
    legend(drawn)
    return drawn


def reliability_data(section: Section) -> Any:
    data = {}
    for row in section.rows:
        found = [calibrate(p.log_probabilities, p.predicted, p.labels) for p in row.predictions[0]]
        if found:
            data[row.label] = _rounded([np.mean([c.ece for c in found]), np.mean([c.nll for c in found])])
    return data


# --- what it costs


@dataclass(frozen=True)
class Cost:
    """What an accuracy costs.

    Attributes:
        axis: What the axis says.
        of: Of a row; None where it is not known.
        published: Of a published system.
    """

    axis: str
    of: Callable[[Row], float | None]
    published: Callable[[System], float]


PARAMETERS = Cost("parameters, millions", lambda row: row.first.parameters / 1e6, lambda system: system.parameters)
MACS = Cost(
    "multiply-accumulates for one image, millions",
    lambda row: row.first.macs and row.first.macs / 1e6,
    lambda system: system.macs,
)
PFLOP = Cost(
    "training, PFLOP, with the teacher's answers",
    lambda row: row.first.train_pflop and row.first.train_pflop.total,
    lambda system: system.train_pflop,
)


def against(cost: Cost, section: Section, theme: Theme) -> Figure | None:
    """Accuracy against a cost, beside the published systems."""
    rows = [(row, look) for row, look in looks(section, theme) if row.accuracy and cost.of(row)]
    if not rows:
        return None
    drawn = figure(9, 4.8)
    axes = drawn.subplots()
    spots, reach = [], []
    bottom = lowest([_ends(row) for row, _ in rows])
    for row, look in rows:
        x, y, (low, high) = cost.of(row), 100 * row.accuracy.mean, _ends(row)
        label = named(row)
        if high < bottom:  # outside of the frame, below
            label, low, high, y = f"{label}: {y:.2f} %, below", bottom, bottom, bottom
            axes.plot(x, y, "v", color=look.colour, ms=8)
        else:
            error = [[max(y - low, 0)], [max(high - y, 0)]]
            axes.errorbar(x, y, error, fmt=look.marker, color=look.colour, ms=8, capsize=3)
        reach += [low, high]
        spots.append((x, y, label, look.colour))
    for system in TABLE_1.get(section.data, []):
        x, y = cost.published(system), system.accuracy
        axes.plot(x, y, "D", mfc="none", mec=theme.faint, ms=7)
        reach.append(y)
        spots.append((x, y, f"{system.name} (published)", theme.faint))
    axes.set_xscale("log")
    left = min(x for x, *_ in spots) / 1.6
    longest = [max(map(len, text.splitlines()), default=0) for _, _, text, _ in spots]
    widths = [min(0.85 * LETTER * letters / 8 + 0.02, 0.7) for letters in longest]  # as shares of the axis
    decades = [np.log10(1.12 * _beside(spots, x) / left) / (1 - w) for (x, *_), w in zip(spots, widths, strict=True)]
    axes.set_xlim(left, left * 10 ** max(*decades, 1.0))  # so that the labels, too, find room
    margin = max(0.08 * (max(reach) - min(reach)), 0.1)
    axes.set_ylim(min(reach) - margin, max(reach) + margin)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel(cost.axis)
    axes.set_ylabel("accuracy, %")
    axes.grid(True)
    low, high = axes.get_ylim()
    gap = 0.055 * (high - low)
    for (x, y, text, colour), place in zip(spots, apart(spots, gap), strict=True):
        line = dict(arrowstyle="-", color=theme.faint, lw=0.6, shrinkA=0, shrinkB=4, relpos=(0, 0.5))
        axes.annotate(
            text,
            (x, y),
            xytext=(_beside(spots, x) * 1.12, place),
            va="center",
            fontsize=8.5,
            color=colour,
            arrowprops=line if abs(place - y) > gap / 2 or _beside(spots, x) > x else None,
        )
    return drawn


NEAR = 2.0  # points whose costs differ by a smaller factor have their labels in one column


def _beside(spots: Sequence[tuple], x: float) -> float:
    """Where the labels of the points near x begin: to the right of the last of these points."""
    right = x
    for other in sorted(spot[0] for spot in spots):
        if right <= other < right * NEAR:
            right = other
    return right


def apart(spots: Sequence[tuple], gap: float) -> list[float]:
    """Heights of the labels: those of their points, moved until labels in one column are `gap` apart."""
    columns: dict[float, list[int]] = {}
    for index, spot in enumerate(spots):
        columns.setdefault(_beside(spots, spot[0]), []).append(index)
    places = [spot[1] for spot in spots]
    for indices in columns.values():
        ordered = sorted(indices, key=lambda i: spots[i][1])
        for _ in range(100):  # neighbours push each other away, by halves
            for below, above in pairwise(ordered):
                push = max(gap - (places[above] - places[below]), 0) / 2
                places[below], places[above] = places[below] - push, places[above] + push
    return places


def against_data(cost: Cost, section: Section) -> Any:
    rows = [row for row in section.rows if row.accuracy and cost.of(row)]
    return {row.label: [float(f"{cost.of(row):.6g}"), round(row.accuracy.mean, 6)] for row in rows}


def _same_classes(section: Section, theme: Theme) -> list[tuple[Row, Look]]:
    """The rows with predictions in the headline's classes."""
    found = section.headline.predictions[0]
    if not found:
        return []
    vocab = found[0].vocab.tolist()
    rows = [(row, look) for row, look in looks(section, theme) if row.predictions[0]]
    return [(row, look) for row, look in rows if all(p.vocab.tolist() == vocab for p in row.predictions[0])]


def _seeds(predictions: Sequence[Predictions]) -> str:
    return f", {len(predictions)} seeds together" if len(predictions) > 1 else ""


def _rounded(values: Any) -> list[float | None]:
    return [None if np.isnan(v) else round(float(v), 6) for v in values]


PLOTS = (
    Plot("ablation", "The last epoch of each stage.", ablation, ablation_data),
    Plot("curves", "Validation accuracy and loss by epoch.", curves, curves_data),
    Plot("confusion", "Which classes are taken for which.", confusion, confusion_data),
    Plot("classes", "Accuracy by class.", classes, classes_data),
    Plot(
        "mistakes",
        "The most confident mistakes: what was predicted, how confidently, and what it is.",
        mistakes,
        mistakes_data,
    ),
    Plot(
        "regions",
        "Where in these images the network saw what it answered (Grad-CAM); the brighter, the more.",
        regions,
        mistakes_data,
    ),
    Plot("reliability", "How often a prediction is right, by its confidence.", reliability, reliability_data),
    Plot("parameters", "Accuracy against size.", partial(against, PARAMETERS), partial(against_data, PARAMETERS)),
    Plot("macs", "Accuracy against the cost of an image.", partial(against, MACS), partial(against_data, MACS)),
    Plot("pflop", "Accuracy against the cost of training.", partial(against, PFLOP), partial(against_data, PFLOP)),
)
