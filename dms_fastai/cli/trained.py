"""Commands for what has been trained: predict, evaluate, export, bench."""

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.box import SIMPLE_HEAD
from rich.table import Table

from ..errors import UserError, either, unknown
from ..files import amount, check_file
from ..names import TIMM, architectures, check_device, check_format, check_int8, is_architecture, source_name
from ..run_folder import own_data
from ..schema import choices_of
from .app import app, console, errors
from .common import progress_bar, say_what_is_read
from .options import SPLITS, TRUST, arch_words, check_model, data_words, device_words, home, split_words

if TYPE_CHECKING:
    from torch import Tensor

    from ..export import Classified
    from ..export.calibrate import Compared


MANY = 500  # images that take long enough for a bar
TOP = 3  # classes of an image that `predict` prints
WORST = 20  # classes in the table of `evaluate`


@app.command()
def predict(
    learner: Annotated[
        Path, typer.Argument(help="A learner.pkl, a model.safetensors, a run's folder, dmsresnet, or an exported file.")
    ],
    images: Annotated[list[str], typer.Argument(help="Images, folders of images, or quoted patterns: 'new/*.png'.")],
    top: Annotated[int | None, typer.Option(min=1, help="How many classes to print; 3 by default.")] = None,
    csv: Annotated[Path | None, typer.Option(help="Write a table to this file, or to - for standard output.")] = None,
    trust_pickle: Annotated[bool, TRUST] = False,
) -> None:
    """Classify images: the likeliest classes of each, with their probabilities.

    If a folder's sub-folders are named after the classes, the accuracy is printed, too. The table of --csv has the
    file, its class, the probability, and a column for each class, and is printed in place of the rest. Exit code 1:
    some images could not be read; 2: none could.
    """
    from ..predict import check_table, image_files, table

    learner = home(learner)
    csv = None if csv is None else home(csv)
    if csv is not None:
        check_table(csv)
        if top is not None:
            raise UserError("--top is for what is printed, and the table of --csv has every class; leave one out")
    files = image_files(images) if check_model(learner) else {}  # if not, `classify_files` says so

    from ..data.folder import class_name
    from ..export import classify_files

    say_what_is_read(learner, trust_pickle)
    bad: list[UserError] = []
    vocab, found = classify_files(learner, files, trust_pickle, bad)

    def say(image: Path, probabilities: list[float]) -> None:
        best = sorted(zip(probabilities, vocab, strict=True), key=lambda pair: -pair[0])[: top or TOP]
        console.say(f"{image}: {', '.join(f'{name} {100 * share:.1f} %' for share, name in best)}")

    right: list[bool] = []
    with nullcontext(say) if csv is None else table(csv, vocab) as write:
        for image, probabilities in _tracked(found, len(files), csv):
            write(image, probabilities.tolist())
            classes = [name for name in map(class_name, files[image]) if name in vocab]
            if classes:
                right.append(classes[0] == vocab[probabilities.argmax()])
        if len(bad) == len(files):
            raise _unread(bad, len(files))
    if right:
        told = (
            f"accuracy: {100 * sum(right) / len(right):.2f} %, of {len(right):,} images in folders named after classes"
        )
        (errors if str(csv) == "-" else console).say(told)
    if csv is not None and str(csv) != "-":
        console.say(f"table: {csv}")
    if bad:
        errors.say(f"dms-fastai: error: {_unread(bad, len(files)).message}")
        raise typer.Exit(1)


def _tracked(found: "Iterable[Classified]", images: int, csv: Path | None) -> "Iterator[Classified]":
    """The answers; many with a bar on standard error, unless their lines show on the same terminal how it goes."""
    lines = console.is_terminal and (csv is None or str(csv) == "-")
    if images < MANY or lines or not errors.is_terminal:
        yield from found
        return
    with progress_bar() as bar:
        yield from bar.track(found, total=images, description="classifying")


def _unread(bad: list[UserError], images: int) -> UserError:
    """Print why images could not be read; gives the error that says how many these were, or the reason if it is all."""
    if images == 1:
        return bad[0]
    for error in bad:
        errors.say(error.message)
    return UserError(f"{len(bad):,} of {images:,} images could not be read")


@app.command()
def evaluate(
    learner: Annotated[
        Path,
        typer.Argument(
            help="A run's folder, a .safetensors, a learner.pkl, an exported file, dmsresnet, or timm:NAME."
        ),
    ],
    data: Annotated[
        str | None,
        typer.Option(help="As in run. A run on a data set with a name takes that.", autocompletion=data_words),
    ] = None,
    split: Annotated[
        str | None,
        typer.Option(help="test, val or train; test by default, or val if there is none.", autocompletion=split_words),
    ] = None,
    labels: Annotated[Path | None, typer.Option(help="As in run.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or mps.", autocompletion=device_words)] = "auto",
    tta: Annotated[bool, typer.Option("--tta", help="Average the answers to each image and its mirror image.")] = False,
    trust_pickle: Annotated[bool, TRUST] = False,
) -> None:
    """Measure a model on labelled images: accuracy, loss, and the accuracy in each class, the worst first."""
    learner = home(learner)
    if split is not None and split not in SPLITS:
        raise UserError(f"split is {split!r}; it must be {either(SPLITS)}")
    check_device(device)
    timms = str(learner).startswith(TIMM)
    if timms and not is_architecture(network := str(learner).removeprefix(TIMM)):
        raise unknown("timm model", network, architectures())
    if not timms and not check_model(learner):
        from ..export import open_model

        open_model(learner, trust_pickle)  # says what is missing
    data = own_data(learner, "evaluate on") if data is None else os.path.expanduser(data)
    name = source_name(data)

    from ..evaluate import evaluate_model
    from ..runs.machine import choose_device

    def track(batches: "Sequence[Tensor]") -> "Iterable[Tensor]":
        with progress_bar() as bar:
            yield from bar.track(batches, description="classifying")

    say_what_is_read(learner, trust_pickle)
    labels = None if labels is None else home(labels)
    found = evaluate_model(learner, data, split, labels, choose_device(device), trust_pickle, track, tta)
    listing = Table("class", "images", "accuracy, %")
    for column in listing.columns[1:]:
        column.justify = "right"
    for of_class in found.classes[:WORST]:
        listing.add_row(of_class.name, f"{of_class.images:,}", f"{100 * of_class.accuracy:.2f}")
    console.print(listing)
    rest = found.classes[WORST:]
    if rest:
        console.say(f"and {len(rest)} more classes, {100 * rest[0].accuracy:.2f} % or better")
    told = f"accuracy: {100 * found.accuracy:.2f} %, loss: {found.loss:.4f}"
    told += ", averaged with mirror images (--tta)" if tta else ""
    console.say(f"{told}, of {found.images:,} images: {name}, {found.split}")


@app.command()
def export(
    learner: Annotated[Path, typer.Argument(help="A learner.pkl, a model.safetensors, a run's folder, or dmsresnet.")],
    file: Annotated[Path, typer.Argument(help="NAME.onnx, NAME.int8.onnx, NAME.pt2, NAME.pte or NAME.int8.pte.")],
    data: Annotated[
        str | None,
        typer.Option(
            help="For int8: the images, as in run. A run on a data set with a name takes that.",
            autocompletion=data_words,
        ),
    ] = None,
    labels: Annotated[Path | None, typer.Option(help="For int8: as in run. A run has its own.")] = None,
    calibrate: Annotated[
        int | None, typer.Option(min=1, help="For int8: how many training images to calibrate with; 200 by default.")
    ] = None,
    tolerance: Annotated[
        float | None, typer.Option(min=0, max=100, help="For int8: points of accuracy it may lose; 0.5 by default.")
    ] = None,
    trust_pickle: Annotated[bool, TRUST] = False,
) -> None:
    """Write a model for other runtimes: pixels go in, probabilities come out.

    NAME.int8.onnx and NAME.int8.pte are calibrated with training images, compared with the float model on the
    validation images, and refused if they lose too much.
    """
    learner, file = home(learner), home(file)
    there, formats = check_model(learner), choices_of("export.formats:FORMATS")
    int8 = check_int8(
        file, formats, {"--data": data, "--labels": labels, "--calibrate": calibrate, "--tolerance": tolerance}
    )
    check_file(file, "file")
    if int8 and there:
        data = own_data(learner, "calibrate with") if data is None else os.path.expanduser(data)
        source_name(data)  # refuses what is no data set

    from ..export import export_model

    say_what_is_read(learner, trust_pickle)
    labels = None if labels is None else home(labels)
    written = export_model(learner, file, trust_pickle, data, calibrate, tolerance, _show_compared, labels)
    console.say(f"{written}: {amount(written.stat().st_size)}")


def _show_compared(rows: "Sequence[Compared]") -> None:
    listing = Table("", "accuracy, %", "agreement, %", "NLL", "sums off", "MB", "ms", box=SIMPLE_HEAD)
    for column in listing.columns[1:]:
        column.justify = "right"
    for row in rows:
        shares = (f"{100 * share:.2f}" for share in (row.answers.accuracy, row.agreement))
        losses = (f"{row.answers.nll:.4f}", f"{row.answers.sum_error:.0e}")
        listing.add_row(row.name, *shares, *losses, f"{row.size / 1e6:.2f}", f"{row.milliseconds:.3g}")
    console.print(listing)
    console.say(
        f"on {len(rows[0].answers.labels):,} validation images; agreement: the same class as float; sums off: how far "
        f"the sum of an image's probabilities is from 1, at most; ms: processor time of one image, on one thread"
    )


@app.command()
def bench(
    files: Annotated[list[Path], typer.Argument(help="Exported files: .onnx, .int8.onnx, .pt2, .pte, .int8.pte.")],
    data: Annotated[
        str | None, typer.Option(help="As in run: measure the accuracy, too.", autocompletion=data_words)
    ] = None,
    labels: Annotated[Path | None, typer.Option(help="As in run.")] = None,
    arch: Annotated[
        str | None, typer.Option(help="NAME,NAME: untrained architectures of timm beside.", autocompletion=arch_words)
    ] = None,
    png: Annotated[Path | None, typer.Option(help="Draw accuracy against time; needs --data.")] = None,
    trust_pickle: Annotated[bool, TRUST] = False,
) -> None:
    """Compare exported files: size, multiply-accumulates, accuracy and time, each in its own runtime on one thread."""
    files, formats = [home(file) for file in files], choices_of("export.formats:FORMATS")
    for file in files:
        check_format(file, formats, "run")
        if not file.is_file():
            raise UserError(f"no such file: {file}")
    archs = [] if arch is None else [name.strip() for name in arch.split(",")]
    for name in archs:
        if not is_architecture(name):
            raise unknown("timm model", name, architectures())
    png, data = None if png is None else home(png), None if data is None else os.path.expanduser(data)
    if png is not None and png.suffix != ".png":
        raise UserError(f"{png} is no name of a plot; give --png NAME.png")
    if png is not None:
        check_file(png, "--png")
    if png is not None and data is None:
        raise UserError("--png draws accuracy, which needs images; give --data as well")
    if labels is not None and data is None:
        raise UserError("--labels is for images, of which there are none; give --data as well")
    if data is not None:
        source_name(data)  # refuses what is no data set

    import numpy as np

    from ..bench import bench as measured
    from ..bench import plot
    from ..export.measure import BATCH

    rows = measured(files, archs, data, trust_pickle, None if labels is None else home(labels))
    listing = Table("file", "MB", "M MACs", "accuracy, %", "ms", "p95", f"ms of {BATCH}", "p95", box=SIMPLE_HEAD)
    listing.padding, listing.show_edge, listing.columns[0].overflow = 0, False, "fold"
    for column in listing.columns[1:]:
        column.justify = "right"
    for row in rows:
        macs = "" if row.macs is None else f"{row.macs / 1e6:,.1f}"
        right = "untrained" if not row.trained else "" if row.accuracy is None else f"{100 * row.accuracy:.2f}"
        times = (f"{np.percentile(taken, share):.3g}" for taken in (row.one, row.many) for share in (50, 95))
        listing.add_row(row.name, f"{row.size / 1e6:.2f}", macs, right, *times)
    console.print(listing)
    console.say(
        f"ms: processor time of one image on one thread, alone and in a batch of {BATCH}; the median of several calls, "
        f"and p95, which one call in twenty exceeds"
    )
    if png is not None:
        plot(rows, png)
        console.say(f"plot: {png}")
