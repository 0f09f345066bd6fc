"""Accuracy by class, the hardest first."""

from typing import Any

import numpy as np
from matplotlib.figure import Figure

from ..rows import Row, Section
from .drawing import Look, Theme, figure, legend, looks, named, rounded, shortened

__all__ = ["class_accuracies", "classes", "classes_data"]

HARDEST = 15  # how many classes are shown


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
    return {row.label: rounded(class_accuracies(row)) for row in section.rows if row.predictions[0]}


def _same_classes(section: Section, theme: Theme) -> list[tuple[Row, Look]]:
    """The rows with predictions in the headline's classes."""
    found = section.headline.predictions[0]
    if not found:
        return []
    vocab = found[0].vocab.tolist()
    rows = [(row, look) for row, look in looks(section, theme) if row.predictions[0]]
    return [(row, look) for row, look in rows if all(p.vocab.tolist() == vocab for p in row.predictions[0])]
