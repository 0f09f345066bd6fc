"""What several commands say and show."""

from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import typer
from rich.progress import Progress

from .. import processes
from ..runs.threads import Load, fitting
from .app import EXIT_CODES, console, errors

if TYPE_CHECKING:
    from ..run_folder import Run


def choose_threads(load: Load) -> int:
    """The number of threads to train with, in a line if it is not torch's own; torch then has it, too."""
    import torch

    most, free = torch.get_num_threads(), load.free()
    threads = fitting(free, most)
    if threads < most:
        console.say(
            f"others leave {free:.1f} of {most} cores free: computing with {threads} thread{'s' * (threads > 1)}; "
            f"OMP_NUM_THREADS={most} takes all"
        )
        torch.set_num_threads(threads)
    return threads


def say_what_is_read(source: Path, trust_pickle: bool) -> None:
    """Print a line if weights are read in place of the pickle that was named."""
    from ..trained import without_code

    read = without_code(source, trust_pickle)
    if read != source:
        errors.say(f"reading {read} in place of {source.name}, which could run code")


def stopped(reason: str, state: str, restart: bool, later: Sequence[str] = ()) -> None:
    """End a command that somebody has stopped. `later` are recipes of finished runs that it has not begun again yet."""
    again = "without --restart the same command" if restart else "the same command"
    names = ", ".join(dict.fromkeys(later))
    left = f", but trains no finished run again: for {names}, --only NAME --restart" if later else ""
    console.say(f"stopped ({reason}): {state}; {again} resumes from there{left}")
    processes.leave()
    raise typer.Exit(EXIT_CODES[reason])


def show_runs(runs: "Iterable[Run]", shipped: Collection[Path] = ()) -> None:
    """Print the tables of runs, and what each stage gained over the one before; of those shipped, only their number."""
    from ..report.rows import sections
    from ..report.tables import difference_lines, table

    found = sections(runs, shipped)
    for section in found:
        if not section.shipped:
            console.print(table(section, console.width))
            for line in difference_lines(section.differences):
                console.print(line)
    theirs = sum(len(row.runs) for section in found if section.shipped for row in section.rows)
    if theirs:
        console.say(f"runs that came with the package: {theirs}, at the end of the page")


def progress_bar() -> Progress:
    """A bar on standard error, if that is a terminal; it leaves no trace."""
    return Progress(
        console=errors, transient=True, redirect_stdout=False, redirect_stderr=False, disable=not errors.is_terminal
    )
