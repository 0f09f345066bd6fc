"""Exports of a run: a .pkl for fastai, safetensors and the `FORMATS`; and classification of image files."""

import json
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from fastai.data.core import DataLoaders
from fastai.learner import Learner
from fastai.torch_core import no_random
from fastcore.basics import chunked
from PIL import Image, ImageOps
from torch import Tensor, nn
from torchvision.transforms.functional import pil_to_tensor

from .calibrate import Calibration, Compared, sets_of
from .data.augment import affine, normalize
from .data.images import read_image
from .data.imageset import ImageSet
from .data.loader import vocabulary
from .errors import UserError, damage, no_model
from .files import whole
from .formats import FORMATS, Exported, check_packages, is_exported, open_exported
from .learner import DMSLearner
from .models.card import ModelCard
from .models.fold import fold_batch_norms
from .models.macs import macs
from .models.weights import all_finite, load_weights, save_weights
from .names import check_format
from .run_folder import RunFolder
from .trained import Inputs, find_file, inputs_of, open_learner

__all__ = [
    "Classifier",
    "classify_files",
    "content_of",
    "export_model",
    "export_run",
    "open_model",
    "predict_files",
]

Classified = tuple[Path, Tensor]  # an image file and its probabilities, shape (C,)
BATCH = 64  # images to predict at once
GREY = 128


def export_run(learn: DMSLearner, folder: RunFolder) -> None:
    """Write the Learner and the weights into a run's folder, each whole or not at all."""
    save_weights(learn.model, learn.card, folder.weights)
    rates = vars(learn.recorder).pop("hps", {})  # every step's rate, which fastai would take along
    learn.export(folder.learner.resolve())
    learn.recorder.hps = rates


class Classifier(nn.Module):
    """A network from pixels to probabilities: with its normalisation and a softmax, and its batch norms folded."""

    def __init__(self, model: nn.Module, card: ModelCard):
        super().__init__()
        self.model = fold_batch_norms(model)
        self.scale, self.shift = (nn.Buffer(v) for v in affine(card.mean, card.std, 1, torch.device("cpu")))

    def forward(self, pixels: Tensor) -> Tensor:
        """Probabilities, float32 of shape (B, classes), of uint8 images, shape (B, C, H, W), in RGB order."""
        return self.model(pixels.float() * self.scale + self.shift).softmax(1)


def export_model(
    source: str | Path | Learner,
    file: str | Path,
    trust: bool = False,
    data: str | Path | None = None,
    calibrate: int = 200,
    tolerance: float = 0.5,
    compared: Callable[[Sequence[Compared]], None] = lambda rows: None,
) -> Path:
    """Write a model that runs without this package: pixels 0...255 go in, probabilities of the classes come out.

    The input "pixels" is uint8 of shape (batch, channels, height, width), in RGB order. The output "probabilities" is
    float32 of shape (batch, classes). The file holds the names of the classes as JSON, and the multiply-accumulates for
    one image: an .onnx in its metadata "classes" and "macs", a .pt2 in its extra files "classes.json" and "macs.json".

    Weights and activations of an .int8.onnx are 8-bit integers. It is compared with the float file on the validation
    images. Its metadata "calibration" says which images it was calibrated with.

    Args:
        source: As in `predict_files`, but no exported file; or a Learner that classifies images.
        file: NAME.onnx, NAME.int8.onnx, or NAME.pt2, which `torch.export.load` reads. Written whole or not at all.
        trust: As in `predict_files`.
        data: For int8, the data set with the images to calibrate with and to compare on. None: the Learner's own, or
            that of the run.
        calibrate: For int8, how many training images to calibrate with.
        tolerance: For int8, how many points of accuracy it may lose.
        compared: For int8, gets the figures of the float file and of the int8 file.

    Raises:
        UserError: As in `predict_files`; or `file` has another ending, the Learner does not say what images its model
            takes, weights are NaN or infinite, packages are missing or cannot express the network, or int8 has no
            images or loses too much.
    """
    file = Path(file)
    ending = check_format(file, FORMATS)
    written = FORMATS[ending]
    check_packages(file, written.packages)
    if not isinstance(source, Learner) and is_exported(source):
        raise UserError(f"{source} has been exported already; give the run or the weights that it comes from")
    model, card = open_model(source, trust)
    metadata, calibration = {}, None
    if written.quantize is not None:
        calibration = Calibration(sets_of(source, card, data, trust), calibrate, tolerance, compared)
        metadata = calibration.metadata()
    content = content_of(model, card, ending, metadata)
    if calibration is not None:
        with damage(f"{card.arch} cannot be written as {ending}"):  # the network may be anybody's
            content = calibration.quantize(content, written, card, file)
    file.parent.mkdir(parents=True, exist_ok=True)
    with whole(file) as partial:
        partial.write_bytes(content)
    return file


def open_model(source: str | Path | Learner, trust: bool = False) -> tuple[nn.Module, ModelCard]:
    """A trained network, and what it is and expects of its images.

    Args:
        source, trust: As in `export_model`.

    Raises:
        UserError: There is no model at `source`, it is a .pkl that is not trusted, the Learner does not say what images
            its model takes, or weights are NaN or infinite.
    """
    if not isinstance(source, Learner):
        source = _find(source, trust)
        source = open_learner(source, trust) if source.suffix == ".pkl" else source
    if not isinstance(source, Learner):
        return _read_model(source, trust)
    card = source.card if isinstance(source, DMSLearner) else _card_of(source)
    if not all_finite(source.model):
        raise UserError("the Learner's weights are NaN or infinite; train it again")
    return source.model, card


def _vocab_of(learn: Learner) -> list[str]:
    """Names of a Learner's classes; a UserError if it has none."""
    vocab = vocabulary(learn.dls)
    if not vocab:
        raise UserError("this Learner's DataLoaders have no vocab; give one that classifies images")
    return vocab


def _card_of(learn: Learner) -> ModelCard:
    """What the model of a stock Learner expects, found by what its DataLoaders make of a grey image.

    Raises:
        UserError: It does not classify images of one size by one label, or does more to them than resize and normalise.
    """
    name, vocab, dls = type(learn.model).__name__, _vocab_of(learn), learn.dls
    activation = getattr(learn.loss_func, "activation", None)
    logits = torch.eye(len(vocab))
    if activation is not None and not torch.allclose(activation(logits).as_subclass(Tensor), logits.softmax(1)):
        raise UserError(
            f"this Learner's loss, {learn.loss_func}, is not of one label an image; only such can be written"
        )
    if isinstance(dls.train_ds, ImageSet):
        images = inputs_of(dls)
        return ModelCard(name, vocab, images.mean, images.std, images.shape)
    small, large = (_made_of_grey(dls, size) for size in ((61, 97), (120, 80)))
    if any(len(dl.dataset) for dl in dls.loaders):
        images = inputs_of(dls)
    elif small.shape == large.shape:
        images = Inputs.seen(small.shape, dls)
    else:
        raise UserError("this Learner's transforms do not give images one size; export it with a Resize among them")
    middle = small[:, small.shape[1] // 2, small.shape[2] // 2].cpu()
    mean, std = torch.tensor(images.mean), torch.tensor(images.std)
    if small.shape[0] != images.shape[0] or not torch.allclose(middle, (GREY / 255 - mean) / std, atol=1e-3):
        raise UserError("this Learner's transforms do more than resize and normalise; such a model cannot be written")
    return ModelCard(name, vocab, images.mean, images.std, images.shape)


def _made_of_grey(dls: DataLoaders, size: tuple[int, int]) -> Tensor:
    """What DataLoaders make of the file of a grey image of (width, height) pixels: shape (C, H, W)."""
    with TemporaryDirectory() as folder, no_random(reproducible=False):
        file = Path(folder) / "grey.png"
        Image.new("RGB", size, (GREY,) * 3).save(file)
        try:
            [image] = dls.test_dl([file], num_workers=0).one_batch()[0]
        except Exception as error:  # the transforms are the user's
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise UserError(f"this Learner's DataLoaders do not read the file of an image: {reason}") from None
    return image.as_subclass(Tensor)


def content_of(model: nn.Module, card: ModelCard, ending: str, metadata: Mapping[str, str] | None = None) -> bytes:
    """The content of a file with a network as a classifier of pixels, in floating-point numbers.

    Args:
        model, card: The network, and what it is.
        ending: One of `FORMATS`.
        metadata: What the file is to hold besides "classes" and "macs".

    Raises:
        UserError: The format cannot express the network.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's, of its own deprecations
            classifier = Classifier(model, card).cpu().float().eval()
            told = {"classes": json.dumps(card.vocab), **(metadata or {})}
            with suppress(Exception):  # what cannot be counted can still be written
                told["macs"] = str(macs(classifier.model, card.shape))
            return FORMATS[ending].content(_traced(classifier, card.shape), told)
    except Exception as error:  # the network may be anybody's
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"{card.arch} cannot be written as {ending}: {reason}") from error


def _traced(classifier: Classifier, shape: tuple[int, int, int]) -> torch.export.ExportedProgram:
    """The classifier as a graph for batches of any size, without this machine's file paths."""
    example = torch.zeros(2, *shape, dtype=torch.uint8)
    batch = {"pixels": {0: torch.export.Dim("batch")}}
    program = torch.export.export(classifier, (example,), dynamic_shapes=batch)
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)
    return program


def predict_files(
    source: str | Path, images: Iterable[Path], trust: bool = False, errors: list[UserError] | None = None
) -> tuple[list[str], Tensor]:
    """Classify image files: gives the class names, and the probabilities of each image, shape (N, C).

    Args:
        source: A run's folder, a model.safetensors, a .pkl of `Learner.export`, the name of an architecture whose
            weights come with this package, or a file of `export_model`, which its own runtime runs.
        images: Image files.
        trust: Load a .pkl, which runs the code in it, or a .pt2, which may. Otherwise, for a run's .pkl, the weights
            beside it are read.
        errors: Gets the error of each file that is no image; such files have no row. None: the first error is raised.

    Raises:
        UserError: There is no model at `source`, it is a .pkl that is not trusted, or a file is no image.
    """
    vocab, found = classify_files(source, images, trust, errors)
    rows = [probabilities for _, probabilities in found]
    return vocab, torch.stack(rows) if rows else torch.empty(0, len(vocab))


def classify_files(
    source: str | Path, images: Iterable[Path], trust: bool = False, errors: list[UserError] | None = None
) -> tuple[list[str], Iterator[Classified]]:
    """`predict_files` for any number of images, of which only a batch is in memory.

    Returns:
        The class names, and an iterator over the files that are images, each with its probabilities, shape (C,).
    """
    source = _find(source, trust)
    if source.suffix == ".pkl":
        learn = open_learner(source, trust)
        learn.remove_cbs([cb for cb in learn.cbs if cb.name == "progress"])
        vocab = _vocab_of(learn)

        def read(file: Path) -> Path:
            read_image(file)  # what fastai raises need not name the file
            return file

        def classify(files: list[Path]) -> Tensor:
            return learn.get_preds(dl=learn.dls.test_dl(files))[0]
    else:
        model, card = _read_model(source, trust)
        vocab, scaling = card.vocab, affine(card.mean, card.std, 1, torch.device("cpu"))

        def read(file: Path) -> Tensor:
            return read_pixels(file, card.shape, card.white)

        @torch.inference_mode()
        def classify(pixels: list[Tensor]) -> Tensor:
            return model(normalize(torch.stack(pixels), *scaling)).softmax(1)

    return vocab, _classified(images, read, classify, errors)


def _classified(
    images: Iterable[Path],
    read: Callable[[Path], Any],
    classify: Callable[[list[Any]], Tensor],
    errors: list[UserError] | None,
) -> Iterator[Classified]:
    for batch in chunked(images, BATCH):
        files, items = [], []
        for file in batch:
            try:
                items.append(read(file))
                files.append(file)
            except UserError as error:
                if errors is None:
                    raise
                errors.append(error)
        if items:
            yield from zip(files, classify(items), strict=True)


def read_pixels(image: str | Path, shape: tuple[int, int, int], white: float | None = None) -> Tensor:
    """The middle of an image file, resized to uint8 of `shape` (C, H, W), in colour or grey; `white` becomes 255.

    Raises:
        UserError: The file is no image, or `shape` has neither 1 channel nor 3.
    """
    channels, height, width = shape
    if channels not in (1, 3):
        raise UserError(f"the model takes images of {channels} channels; files are in colour (3) or grey (1)")
    if channels == 3 and height == width:
        return read_image(image, height, white)
    colours = Image.fromarray(read_image(image, None, white).permute(1, 2, 0).numpy())
    fitted = ImageOps.fit(colours, (width, height), method=Image.Resampling.BILINEAR)
    return pil_to_tensor(fitted if channels == 3 else fitted.convert("L"))


class _InRuntime(nn.Module):
    """An exported file as a network, in its own runtime: log-probabilities of images that are normalised to 0...1."""

    def __init__(self, exported: Exported):
        super().__init__()
        self.exported = exported

    def forward(self, x: Tensor) -> Tensor:
        pixels = (255 * x).round().to("cpu", torch.uint8).contiguous()
        return torch.from_numpy(self.exported.classify(pixels.numpy())).log().to(x.device)


def _read_model(file: Path, trust: bool) -> tuple[nn.Module, ModelCard]:
    """The network in a file of weights or in an exported file, and what it is."""
    if not is_exported(file):
        return load_weights(file)
    exported = open_exported(file, trust)
    mean, std = (0.0,) * exported.shape[0], (1.0,) * exported.shape[0]
    return _InRuntime(exported), ModelCard(file.name, exported.vocab, mean, std, exported.shape)


def _find(source: str | Path, trust: bool) -> Path:
    """The .safetensors, .pkl or exported file that `source` stands for."""
    if is_exported(source):
        return Path(source)
    file = find_file(source, trust)
    if file is None:
        raise no_model(source)
    return file
