"""What runs came to: statistics, tables, plots, and a page that shows them all."""

from .folders import METRICS, RUN, Problem, Run, find_runs, read_rows, read_run
from .page import write_report
from .plots import plot_curves
from .predictions import PREDICTIONS, write_predictions
from .rows import sections
from .tables import difference_lines, table

__all__ = [
    "METRICS",
    "PREDICTIONS",
    "RUN",
    "Problem",
    "Run",
    "difference_lines",
    "find_runs",
    "plot_curves",
    "read_rows",
    "read_run",
    "sections",
    "table",
    "write_predictions",
    "write_report",
]
