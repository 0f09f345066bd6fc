"""Which classes are taken for which."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure

from ...runs.predictions import Predictions
from ..rows import Row, Section
from .drawing import Theme, figure, named, shortened

__all__ = ["confusion", "confusion_data", "confusion_matrix"]

FEW_CLASSES = 25  # a matrix of more classes has no room for its numbers
SOME_CLASSES = 110  # and one of more than these no room for their names
MANY_CLASSES = 2000  # and one of more than these has more cells than the image has pixels


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


def _seeds(predictions: Sequence[Predictions]) -> str:
    return f", {len(predictions)} seeds together" if len(predictions) > 1 else ""
