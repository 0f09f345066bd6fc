"""Exports of a run: a .pkl for fastai, safetensors, ONNX and torch.export's .pt2; and classification of image files."""

import json
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch
from fastai.learner import Learner
from fastcore.basics import chunked
from torch import Tensor, nn
from torch.onnx.errors import OnnxExporterError

from .data.augment import affine, normalize
from .data.images import read_image
from .errors import UserError, no_format, no_model
from .files import whole
from .learner import DMSLearner
from .models.card import ModelCard
from .models.fold import fold_batch_norms
from .models.weights import load_weights, save_weights
from .run_folder import RunFolder
from .trained import find_file, open_learner

__all__ = ["Classifier", "export_model", "export_run", "predict_files"]

BATCH = 64  # images to predict at once


def export_run(learn: DMSLearner, folder: RunFolder) -> None:
    """Write the Learner and the weights into a run's folder, each whole or not at all."""
    save_weights(learn.model, learn.card, folder.weights)
    rates = vars(learn.recorder).pop("hps", {})  # every step's rate, which fastai would take along
    with whole(folder.learner) as partial:
        learn.export(partial.resolve())
    learn.recorder.hps = rates


class Classifier(nn.Module):
    """A network from pixels to probabilities: with its normalisation and a softmax, and its batch norms folded."""

    def __init__(self, model: nn.Module, card: ModelCard):
        super().__init__()
        self.model = fold_batch_norms(model)
        self.scale, self.shift = (nn.Buffer(v) for v in affine(card.mean, card.std, 1, torch.device("cpu")))

    def forward(self, pixels: Tensor) -> Tensor:
        """Probabilities, float32 of shape (B, C), of uint8 images in RGB order, shape (B, 3, H, W)."""
        return self.model(pixels.float() * self.scale + self.shift).softmax(1)


def export_model(source: str | Path | DMSLearner, file: str | Path, trust: bool = False) -> Path:
    """Write a model that runs without this package: pixels 0...255 go in, probabilities of the classes come out.

    The input "pixels" is uint8 of shape (batch, 3, size, size), in RGB order. The output "probabilities" is float32 of
    shape (batch, classes). The file holds the names of the classes as JSON: an .onnx in its metadata "classes", a .pt2
    in its extra file "classes.json".

    Args:
        source: As in `predict_files`, or a Learner of `dms_learner`.
        file: NAME.onnx, or NAME.pt2, which `torch.export.load` reads. Written whole or not at all.
        trust: As in `predict_files`.

    Raises:
        UserError: As in `predict_files`; or `file` has another ending, or ONNX's packages are missing or cannot express
            the network.
    """
    file = Path(file)
    if file.suffix not in FORMATS:
        raise no_format(file, FORMATS)
    written = FORMATS[file.suffix]
    if not all(map(find_spec, written.packages)):
        raise UserError(f"{file} needs more packages: pip install {' '.join(written.packages)}")
    if not isinstance(source, Learner):
        source = _find(source, trust)
        source = open_learner(source, trust) if source.suffix == ".pkl" else source
    if isinstance(source, DMSLearner):
        model, card = source.model, source.card
    elif isinstance(source, Learner):
        raise UserError("this Learner does not say what images its model takes; give one that dms_learner made")
    else:
        model, card = load_weights(source)
    classifier = Classifier(model, card).cpu().eval()
    file.parent.mkdir(parents=True, exist_ok=True)
    with whole(file) as partial, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's, of its own deprecations
        try:
            written.write(_traced(classifier, card.size), json.dumps(card.vocab), partial)
        except (RuntimeError, OnnxExporterError) as error:
            reason = str(error).strip().splitlines()[0]
            raise UserError(f"{card.arch} cannot be written as {file.suffix}: {reason}") from error
    return file


def _traced(classifier: Classifier, size: int) -> torch.export.ExportedProgram:
    """The classifier as a graph for batches of any size, without this machine's file paths."""
    example = torch.zeros(2, 3, size, size, dtype=torch.uint8)
    batch = {"pixels": {0: torch.export.Dim("batch")}}
    program = torch.export.export(classifier, (example,), dynamic_shapes=batch)
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)
    return program


def _write_onnx(program: torch.export.ExportedProgram, classes: str, file: Path) -> None:
    names = {"input_names": ["pixels"], "output_names": ["probabilities"], "dynamic_shapes": {"pixels": {0: "batch"}}}
    onnx = torch.onnx.export(program, dynamo=True, verbose=False, **names)
    onnx.model.metadata_props["classes"] = classes
    onnx.save(str(file), external_data=False)


def _write_pt2(program: torch.export.ExportedProgram, classes: str, file: Path) -> None:
    with file.open("wb") as opened:  # a path would have to end in .pt2
        torch.export.save(program, opened, extra_files={"classes.json": classes})


@dataclass(frozen=True)
class Format:
    """A kind of file to export to.

    Attributes:
        write: Writes the classifier's graph, and the names of the classes as JSON, to a file.
        packages: Further packages that this needs.
    """

    write: Callable[[torch.export.ExportedProgram, str, Path], None]
    packages: tuple[str, ...] = ()


ONNX = Format(_write_onnx, ("onnx", "onnxscript"))
PT2 = Format(_write_pt2)
FORMATS = {".onnx": ONNX, ".pt2": PT2}


def predict_files(source: Path, images: Iterable[Path], trust: bool = False) -> tuple[list[str], Tensor]:
    """Classify image files: gives the class names, and the probabilities of each image, shape (N, C).

    Args:
        source: A run's folder, a model.safetensors, a .pkl of `Learner.export`, or the name of an architecture whose
            weights come with this package.
        images: Image files.
        trust: Load a .pkl, which runs the code in it. Otherwise, for a run's .pkl, the weights beside it are read.

    Raises:
        UserError: There is no model at `source`, it is a .pkl that is not trusted, or a file is no image.
    """
    source = _find(source, trust)
    if source.suffix == ".pkl":
        learn = open_learner(source, trust)
        learn.remove_cbs([cb for cb in learn.cbs if cb.name == "progress"])
        probabilities, _ = learn.get_preds(dl=learn.dls.test_dl(list(images)))
        return [str(name) for name in learn.dls.vocab], probabilities
    model, card = load_weights(source)
    scaling, found = affine(card.mean, card.std, card.size, torch.device("cpu")), []
    with torch.inference_mode():
        for batch in chunked(images, BATCH):
            x = torch.stack([read_image(image, card.size) for image in batch])
            found.append(model(normalize(x, *scaling)).softmax(1))
    return card.vocab, torch.cat(found)


def _find(source: str | Path, trust: bool) -> Path:
    """The .safetensors or .pkl file that `source` stands for."""
    file = find_file(source, trust)
    if file is None:
        raise no_model(source)
    return file
