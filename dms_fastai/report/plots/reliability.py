"""How often a prediction is right, by its confidence."""

from typing import Any

import numpy as np
from matplotlib.figure import Figure

from ..rows import Section
from ..statistics import calibrate
from .drawing import Theme, figure, legend, looks, named, rounded

__all__ = ["reliability", "reliability_data"]

FEW = 10  # a bin of confidence with fewer images is not drawn: its accuracy says nothing yet


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
            data[row.label] = rounded([np.mean([c.ece for c in found]), np.mean([c.nll for c in found])])
    return data
