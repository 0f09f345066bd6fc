"""Validation accuracy and loss by epoch."""

from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from ..rows import Row, Section
from .drawing import Theme, figure, legend, looks, lowest, named, rounded

__all__ = ["by_epoch", "curves", "curves_data"]

MANY_TIMES = 5  # the epochs of the shortest run, from which on a linear axis would hide its curve


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
    return {row.label: rounded(by_epoch(row, "valid_accuracy")[1]) for row in section.rows if any(row.epochs[0])}
