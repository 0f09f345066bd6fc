"""Run the tutorial's cells as they stand in tutorial.md, draw its images, and write what the cells print below them.

python -m docs.build
"""

import contextlib
import io
import os
import re
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("agg")

import matplotlib.pyplot as plt
from fastai.callback.progress import ProgressCallback
from fastcore.basics import defaults

HERE = Path(__file__).parent
TUTORIAL = HERE / "tutorial.md"
CELL = re.compile(r"^```python\n(.*?)^```\n", re.M | re.S)
TEXT = re.compile(r"\n```text\n.*?```\n", re.S)
LOGGED = re.compile(r"^\[\d+, .*\n", re.M)  # fastai's line for an epoch, where there is no progress bar


@dataclass(frozen=True)
class Ran:
    """A cell that has run.

    Attributes:
        end: Where it ends in the text.
        printed: What it printed.
        figures: What it drew.
        names: The variables so far.
    """

    end: int
    printed: str
    figures: list[Any]
    names: dict[str, Any]


def cells(text: str) -> Iterator[Ran]:
    """Run the cells of a text one after the other, in an empty folder."""
    names: dict[str, Any] = {"__name__": "tutorial"}
    before, bars = Path.cwd(), list(defaults.callbacks)
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        defaults.callbacks = [cb for cb in bars if cb is not ProgressCallback]
        try:
            for cell in CELL.finditer(text):
                with contextlib.redirect_stdout(io.StringIO()) as printed:
                    exec(compile(cell.group(1), f"cell at {cell.start()}", "exec"), names)
                yield Ran(
                    cell.end(), LOGGED.sub("", printed.getvalue()), list(map(plt.figure, plt.get_fignums())), names
                )
                plt.close("all")
        finally:
            os.chdir(before)
            defaults.callbacks = bars


def build(out: Path) -> str:
    """Draw the images into `out`, and give the tutorial with what its cells print."""
    text, done, parts = TUTORIAL.read_text(), 0, []
    out.mkdir(parents=True, exist_ok=True)
    for number, ran in enumerate(cells(text), start=1):
        parts.append(text[done : ran.end])
        done = ran.end
        for index, figure in enumerate(ran.figures, start=1):
            part = f"-{index}" if len(ran.figures) > 1 else ""
            figure.savefig(out / f"tutorial-{number}{part}.png", dpi=80, bbox_inches="tight")
        below = TEXT.match(text, done)
        if below:
            done = below.end()
        if ran.printed:
            parts.append(f"\n```text\n{ran.printed}```\n")
    return "".join([*parts, text[done:]])


if __name__ == "__main__":
    TUTORIAL.write_text(build(HERE / "images"))
