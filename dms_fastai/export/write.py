"""Exports of a run: a .pkl for fastai, safetensors and the `FORMATS`."""

from collections.abc import Callable, Sequence
from pathlib import Path

from fastai.learner import Learner

from ..data import Sets
from ..errors import UserError
from ..files import check_file, whole
from ..learner import DMSLearner
from ..models.build import try_network
from ..models.weights import save_weights
from ..names import check_format, check_int8
from ..run_folder import RunFolder
from ..settings import Count, NotNegative, convert
from .calibrate import Calibration, Compared, sets_of
from .classifier import content_of, expressible, traced
from .formats import FORMATS, check_packages, is_exported
from .source import open_model

__all__ = ["export_learner", "export_model", "export_run"]


def export_run(learn: DMSLearner, folder: RunFolder) -> None:
    """Write the Learner and the weights into a run's folder, each whole or not at all."""
    save_weights(learn.model, learn.card, folder.weights)
    export_learner(learn, folder)


def export_learner(learn: DMSLearner, folder: RunFolder) -> None:
    """Write the Learner into a run's folder."""
    rates = vars(learn.recorder).pop("hps", {})  # every step's rate, which fastai would take along
    learn.export(folder.learner.resolve())
    learn.recorder.hps = rates


def export_model(
    source: str | Path | Learner,
    file: str | Path,
    trust: bool = False,
    data: str | Path | Sets | None = None,
    calibrate: int | None = None,
    tolerance: float | None = None,
    compared: Callable[[Sequence[Compared]], None] = lambda rows: None,
    labels: str | Path | None = None,
) -> Path:
    """Write a model that runs without this package: pixels 0...255 go in, probabilities of the classes come out.

    The input "pixels" is uint8 of shape (batch, channels, height, width), in RGB order. The output "probabilities" is
    float32 of shape (batch, classes). A .pte takes a batch of one image. The file holds the names of the classes as
    JSON, and the multiply-accumulates for one image: an .onnx in its metadata "classes" and "macs", a .pt2 in its extra
    files "classes.json" and "macs.json", a .pte in methods of these names, which return them. So it holds "white" and
    "middle" of the `ModelCard`, where they are not None and 1.

    Weights and activations of an .int8.onnx or .int8.pte are 8-bit integers. It is compared with the float file on the
    validation images, and says in "calibration" which images it was calibrated with.

    Args:
        source: As in `predict_files`, but no exported file; or a Learner that classifies images.
        file: NAME.onnx or NAME.int8.onnx; NAME.pt2, which `torch.export.load` reads; NAME.pte or NAME.int8.pte, which
            ExecuTorch runs. Written whole or not at all.
        trust: As in `predict_files`.
        data: For int8, the data set with the images to calibrate with and to compare on, or the images. None: the
            Learner's own, or those of the run's data set.
        labels: For int8, a table of the images' labels, as in `load_data`. None: that of the run.
        calibrate: For int8, how many training images to calibrate with; None: 200.
        tolerance: For int8, how many points of accuracy it may lose; None: 0.5.
        compared: For int8, gets the figures of the float file and of the int8 file.

    Raises:
        UserError: As in `predict_files`; or `file` has another ending, the Learner does not say what images its model
            takes, weights are NaN or infinite, packages are missing or cannot express the network, int8 has no images
            or loses too much, or something is given that is for int8 alone, or out of range.
    """
    file = Path(file)
    check_file(file, "file")
    ending = check_format(file, FORMATS)
    check_int8(file, FORMATS, {"data": data, "labels": labels, "calibrate": calibrate, "tolerance": tolerance})
    own = {} if calibrate is None else {"images": convert(calibrate, Count, "calibrate")}
    own |= {} if tolerance is None else {"tolerance": convert(tolerance, NotNegative, "tolerance")}
    written = FORMATS[ending]
    check_packages(file, written.packages, written.extra)
    if not isinstance(source, Learner) and is_exported(source):
        raise UserError(f"{source} has been exported already; give the run or the weights that it comes from")
    model, card = open_model(source, trust)
    if isinstance(source, Learner):
        try_network(model, card.arch, len(card.vocab), card.shape, "export the Learner that it was trained in")
    if written.quantize is None:
        content = content_of(model, card, ending)
    else:
        calibration = Calibration(sets_of(source, card, data, trust, labels), compared=compared, **own)
        with expressible(card, ending):
            content = calibration.quantize(*traced(model, card, written.batch), written, card, file)
    file.parent.mkdir(parents=True, exist_ok=True)
    with whole(file) as partial:
        partial.write_bytes(content)
    return file
