"""What leaves a run: a .pkl for fastai, safetensors, ONNX and torch.export's .pt2; and pictures classified."""

import json
import warnings
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path

import torch
from fastai.learner import Learner
from fastcore.basics import chunked
from torch import Tensor, nn
from torch.onnx.errors import OnnxExporterError

from .callbacks.distill import open_learner, without_code
from .data.augment import affine, normalize
from .data.pictures import read_picture
from .errors import UserError
from .files import whole
from .learner import DMSLearner
from .models.fold import fold_batch_norms
from .models.weights import WEIGHTS, ModelCard, load_weights, save_weights, shipped_weights, weights_in

__all__ = ["Classifier", "export_model", "export_run", "predict_files"]

LEARNER = "learner.pkl"
BATCH = 64  # pictures to predict at once


def export_run(learn: DMSLearner, folder: Path) -> None:
    """Write `learner.pkl` and `model.safetensors` into a run's folder, each whole or not at all."""
    save_weights(learn.model, learn.card, folder / WEIGHTS)
    rates = vars(learn.recorder).pop("hps", {})  # every step's rate, which fastai would take along
    with whole(folder / LEARNER) as partial:
        learn.export(partial.resolve())
    learn.recorder.hps = rates


class Classifier(nn.Module):
    """Pixels in, probabilities out: a network between its normalisation and a softmax, its batch norms folded."""

    def __init__(self, model: nn.Module, card: ModelCard):
        super().__init__()
        self.model = fold_batch_norms(model)
        self.scale, self.shift = (nn.Buffer(v) for v in affine(card.mean, card.std, 1, torch.device("cpu")))

    def forward(self, pixels: Tensor) -> Tensor:
        """uint8 pictures, shape (B, 3, H, W), red first, to float32 of shape (B, C)."""
        return self.model(pixels.float() * self.scale + self.shift).softmax(1)


def export_model(source: str | Path | DMSLearner, file: str | Path, trust: bool = False) -> Path:
    """Write a model that needs none of this package: pixels 0...255 go in, probabilities of the classes come out.

    The input "pixels" is uint8 of shape (batch, 3, size, size), red first; the output "probabilities" is float32 of
    shape (batch, classes). The names of the classes are in the file, as JSON: the metadata "classes" of an .onnx, the
    extra file "classes.json" of a .pt2.

    Args:
        source: As in `predict_files`, or a Learner of `dms_learner`.
        file: NAME.onnx, or NAME.pt2, which `torch.export.load` reads. Written whole or not at all.
        trust: As in `predict_files`.

    Raises:
        UserError: As `predict_files`; another ending; ONNX's packages are missing, or cannot express the network.
    """
    file = Path(file)
    if file.suffix not in (".onnx", ".pt2"):
        raise UserError(f"{file} cannot be written; the formats are .onnx and .pt2")
    if file.suffix == ".onnx" and not (find_spec("onnx") and find_spec("onnxscript")):
        raise UserError(f"{file} needs two more packages: pip install onnx onnxscript")
    if not isinstance(source, Learner):
        source = _find(source, trust)
        source = open_learner(source, trust) if source.suffix == ".pkl" else source
    if isinstance(source, DMSLearner):
        model, card = source.model, source.card
    elif isinstance(source, Learner):
        raise UserError("this Learner does not say what pictures its model takes; those of dms_learner do")
    else:
        model, card = load_weights(source)
    classifier = Classifier(model, card).cpu().eval()
    write = _write_onnx if file.suffix == ".onnx" else _write_pt2
    file.parent.mkdir(parents=True, exist_ok=True)
    with whole(file) as partial, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's, of its own deprecations
        try:
            write(_traced(classifier, card.size), json.dumps(card.vocab), partial)
        except (RuntimeError, OnnxExporterError) as error:
            reason = str(error).strip().splitlines()[0]
            raise UserError(f"{card.arch} cannot be written as {file.suffix}: {reason}") from error
    return file


def _traced(classifier: Classifier, size: int) -> torch.export.ExportedProgram:
    """The classifier as a graph for batches of any length, without where in this machine's files it came from."""
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


def predict_files(source: Path, pictures: Iterable[Path], trust: bool = False) -> tuple[list[str], Tensor]:
    """Class names, and the probabilities of each picture, shape (N, C).

    Args:
        source: A run's folder, a model.safetensors, a .pkl of `Learner.export`, or the name of an architecture whose
            weights come with this package.
        pictures: Files.
        trust: Load a .pkl, which runs the code inside it. Without, the weights beside it are taken, in a run's folder.

    Raises:
        UserError: There is no model at `source`, it is a .pkl that is not trusted, or a file is no picture.
    """
    source = _find(source, trust)
    if source.suffix == ".pkl":
        learn = open_learner(source, trust)
        learn.remove_cbs([cb for cb in learn.cbs if cb.name == "progress"])
        probabilities, _ = learn.get_preds(dl=learn.dls.test_dl(list(pictures)))
        return [str(name) for name in learn.dls.vocab], probabilities
    model, card = load_weights(source)
    scaling, found = affine(card.mean, card.std, card.size, torch.device("cpu")), []
    with torch.inference_mode():
        for batch in chunked(pictures, BATCH):
            x = torch.stack([read_picture(picture, card.size) for picture in batch])
            found.append(model(normalize(x, *scaling)).softmax(1))
    return card.vocab, torch.cat(found)


def _find(source: str | Path, trust: bool) -> Path:
    """The .safetensors or .pkl file that `source` stands for."""
    path = Path(source)
    path = (None if path.exists() else shipped_weights(str(source))) or without_code(path, trust)
    if path.is_dir():
        return weights_in(path)
    if path.suffix not in (".safetensors", ".pkl"):
        raise UserError(
            f"no model at {source}; give a learner.pkl, a model.safetensors, a run's folder, or an architecture whose "
            f"weights come with this package, dmsresnet"
        )
    return path
