"""The curves of one run, drawn when it has finished."""

import warnings
from pathlib import Path

from ..terminal import printable

__all__ = ["plot_curves"]

TRAINING, VALIDATION, PARTS = "#8a8a8a", "#0b6e99", ("#c77d0a", "#2a9d6f")


def plot_curves(rows: list[dict[str, float | None]], title: str, file: Path, measure: str = "accuracy") -> None:
    """Losses and accuracies of one run by epoch, training and validation, as a .png.

    Args:
        rows: The rows of metrics.csv; what is None was not measured.
        title: The title above the curves.
        file: The .png to write.
        measure: "accuracy", or what is measured in its place.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # imported here: needed only at the end of a run
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    epochs = [row["epoch"] for row in rows]
    losses = {"training": ("train_loss", TRAINING), "validation": ("valid_loss", VALIDATION)}
    if "train_distillation" in rows[0]:
        losses["training: cross-entropy"] = ("train_cross_entropy", PARTS[0])
        losses["training: distillation"] = ("train_distillation", PARTS[1])
    shares = {"training": ("train_accuracy", TRAINING), "validation": ("valid_accuracy", VALIDATION)}
    drawn = Figure(figsize=(9, 3.6), layout="constrained")
    panels = ((losses, 1, "loss"), (shares, 100, f"{measure}, %"))
    for axes, (lines, scale, label) in zip(drawn.subplots(1, 2), panels, strict=True):
        for name, (key, colour) in lines.items():
            dashed = "--" if name.startswith("training:") else "-"
            if any(row[key] is None for row in rows):  # of images without labels
                continue
            values = [scale * row[key] for row in rows]
            axes.plot(epochs, values, dashed, label=name, color=colour, marker="o" if len(rows) < 3 else None)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_xlabel("epoch")
        axes.set_ylabel(label)
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
    drawn.suptitle(printable(title), parse_math=False)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # of names in scripts that the font does not have
        FigureCanvasAgg(drawn).print_png(file)
