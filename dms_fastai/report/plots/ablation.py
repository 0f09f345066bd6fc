"""The last epoch of each stage, with its interval and its seeds."""

from typing import Any

from matplotlib.figure import Figure

from ..rows import Section
from .drawing import Theme, ends, figure, looks, lowest, named, rounded

__all__ = ["ablation", "ablation_data"]


def ablation(section: Section, theme: Theme) -> Figure | None:
    if not any(row.measured for row in section.rows):
        return None
    rows = [(row, look.colour) for row, look in looks(section, theme) if row.accuracy]
    drawn = figure(8, 1.2 + 0.5 * len(rows))
    axes = drawn.subplots()
    intervals = [ends(row) for row, _ in rows]
    left = lowest(intervals)
    for place, (row, colour) in enumerate(rows):
        estimate, (low, high) = row.accuracy, intervals[place]
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


def ablation_data(section: Section) -> Any:
    rows = [row for row in section.rows if row.accuracy]
    return {row.label: rounded([row.accuracy.mean, row.accuracy.low, row.accuracy.high]) for row in rows}
