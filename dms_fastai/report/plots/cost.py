"""Accuracy against what it costs: parameters, arithmetic for an image, training."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from ..published import TABLE_1, System
from ..rows import Row, Section
from .drawing import LETTER, Theme, ends, figure, looks, lowest, named

__all__ = ["MACS", "PARAMETERS", "PFLOP", "against", "against_data", "apart"]

NEAR = 2.0  # points whose costs differ by a smaller factor have their labels in one column


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
    lambda row: row.train_pflop,
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
    bottom = lowest([ends(row) for row, _ in rows])
    for row, look in rows:
        x, y, (low, high) = cost.of(row), 100 * row.accuracy.mean, ends(row)
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
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
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
