"""Exported files beside one another: size, work, accuracy and time, as rows of a table and as a plot."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
from timm.utils import reparameterize_model

from .data import ImageSet
from .data.known import known_classes
from .evaluate import split_images
from .export import content_of
from .export.classifier import expressible
from .export.formats import FORMATS, Exported, open_exported
from .export.measure import BATCH, answers, milliseconds
from .files import whole
from .models.build import Model
from .models.card import ModelCard
from .models.dmsresnet import MEAN, STD
from .names import check_format
from .report.plots import LIGHT, figure

__all__ = ["Row", "bench", "plot"]


@dataclass(frozen=True)
class Row:
    """What was measured of a file.

    Attributes:
        name: The file's name, with the folders that tell it from others of its name; or that of an architecture.
        format: Its ending.
        size: Bytes.
        macs: Multiply-accumulates for one image; None where the file does not say.
        accuracy: The share of images that are classified right; None without data.
        one: Milliseconds of each call with one image.
        many: Milliseconds for an image, of each call with `BATCH` images.
        trained: Whether it comes from a file; an architecture has weights of chance.
    """

    name: str
    format: str
    size: int
    macs: int | None
    accuracy: float | None
    one: np.ndarray
    many: np.ndarray
    trained: bool = True


def bench(
    files: Sequence[Path],
    archs: Sequence[str] = (),
    data: str | Path | ImageSet | None = None,
    trust: bool = False,
    labels: str | Path | None = None,
) -> list[Row]:
    """Measure exported files and, beside them, untrained architectures of timm, in turn on one thread.

    Args:
        files: Files of `export_model`.
        archs: Names of architectures. They are exported to ONNX for the images and the classes of the first file.
        data: As in `load_data`, for the accuracy of the files on its test or validation images; or the images.
        trust: As in `open_exported`.
        labels: As in `load_data`.

    Raises:
        UserError: A file cannot be opened, an architecture cannot be exported, or the data do not fit a file.
    """
    opened = [open_exported(file, trust) for file in files]
    cards = [each.card(file.name) for file, each in zip(files, opened, strict=True)]
    found = [None] * len(files) if data is None else _accuracies(opened, cards, data, labels)
    rows = [
        (name, check_format(file, FORMATS), file.stat().st_size, True)
        for name, file in zip(_told_apart(files), files, strict=True)
    ]
    with TemporaryDirectory() as folder:
        for arch in archs:
            file = Path(folder) / f"{len(opened)}.onnx"
            file.write_bytes(_untrained(arch, opened[0]))
            opened.append(open_exported(file))
            found.append(None)
            rows.append((arch, ".onnx", file.stat().st_size, False))
    one = milliseconds(opened)
    many = [times / BATCH for times in milliseconds(opened, BATCH)]
    return [
        Row(name, ending, size, int(macs) if macs else None, accuracy, *times, trained)
        for (name, ending, size, trained), macs, accuracy, *times in zip(
            rows, (each.metadata.get("macs") for each in opened), found, one, many, strict=True
        )
    ]


def _told_apart(files: Sequence[Path]) -> list[str]:
    """The files' names; where several have the same, the shortest end of each path that no other has."""

    def alone(file: Path, parts: int) -> bool:
        return all(other == file or other.parts[-parts:] != file.parts[-parts:] for other in files)

    lengths = [next((n for n in range(1, len(file.parts)) if alone(file, n)), len(file.parts)) for file in files]
    return [str(Path(*file.parts[-length:])) for file, length in zip(files, lengths, strict=True)]


def _accuracies(
    opened: Sequence[Exported],
    cards: Sequence[ModelCard],
    data: str | Path | ImageSet,
    labels: str | Path | None = None,
) -> list[float]:
    """The accuracy of each file; images that several see alike are read once."""
    read, found = {}, []
    for exported, card in zip(opened, cards, strict=True):
        seen = card.shape, card.middle, card.white
        if seen not in read:
            read[seen] = data if isinstance(data, ImageSet) else split_images(data, None, labels, card)
        images = read[seen]
        found.append(answers(exported, images.images, known_classes(images, card)[images.labels]).accuracy)
    return found


def _untrained(arch: str, like: Exported) -> bytes:
    """An .onnx of an architecture, whatever the tag of its name, for the images and the classes of another file."""
    name, channels = arch.partition(".")[0], like.shape[0]
    card = ModelCard(arch, like.vocab, MEAN[:1] * channels, STD[:1] * channels, like.shape)
    with expressible(card, ".onnx"):
        network = replace(card, arch=name, args=Model(name).args_for(like.shape)).build()
        return content_of(reparameterize_model(network), card, ".onnx")


def plot(rows: Sequence[Row], file: Path) -> None:
    """Draw accuracy against the time of one image; an untrained architecture, which has no accuracy, as a line."""
    drawn = figure(9, 4.5)
    axes = drawn.subplots()
    for index, row in enumerate(rows):
        ms, colour = float(np.median(row.one)), LIGHT.colours[index % len(LIGHT.colours)]
        named = f"{row.name}, {row.size / 1e6:.2f} MB"
        if row.accuracy is None:
            axes.axvline(ms, color=colour, ls="--", lw=1, label=f"{named}, untrained")
        else:
            axes.plot(ms, 100 * row.accuracy, "o", color=colour, ms=9, label=named)
    axes.set_xscale("log")
    axes.margins(0.2)
    low, high = axes.get_ylim()
    axes.set_ylim(top=min(high, 100 + 0.05 * (100 - low)))
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("milliseconds for one image, on one thread")
    axes.set_ylabel("accuracy, %")
    axes.grid(True, alpha=0.25)
    drawn.legend(loc="outside right upper", frameon=False)
    FigureCanvasAgg(drawn)
    file.parent.mkdir(parents=True, exist_ok=True)
    with whole(file) as partial:
        drawn.savefig(partial, format="png", dpi=144)
