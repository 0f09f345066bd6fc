"""The formats that a classifier is exported to: how each is written, and how it runs in its own runtime."""

import io
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch

from ..errors import UserError, damage
from ..models.card import ModelCard, check_fields
from ..names import check_format
from .executorch import lowered, open_program, quantized
from .int8 import quantize, quiet

__all__ = ["FORMATS", "Exported", "Format", "check_packages", "is_exported", "open_exported"]

Metadata = Mapping[str, str]  # texts that a file holds beside the network


@dataclass(frozen=True)
class Exported:
    """A file of `export_model`, in its own runtime; onnxruntime and ExecuTorch compute on one thread.

    Attributes:
        classify: Gives the probabilities, float32 of shape (B, classes), of uint8 images, shape (B, C, H, W).
        shape: Channels, height and width of the images.
        metadata: What the file says: "classes", and perhaps "macs", "calibration", "white" and "middle".
    """

    classify: Callable[[np.ndarray], np.ndarray]
    shape: tuple[int, int, int]
    metadata: Metadata

    @property
    def vocab(self) -> list[str]:
        """Names of the classes."""
        return json.loads(self.metadata["classes"])

    def card(self, name: str) -> ModelCard:
        """What the file, called `name`, expects of its images, as a network of pixels 0...1.

        Raises:
            ValueError: "white" or "middle" is no number, or out of bounds.
        """
        images = {key: json.loads(self.metadata[key]) for key in ("white", "middle") if key in self.metadata}
        check_fields(images)
        mean, std = (0.0,) * self.shape[0], (1.0,) * self.shape[0]
        return ModelCard(name, self.vocab, mean, std, self.shape, **images)


def open_exported(file: Path, trust: bool = False) -> Exported:
    """Open a file of `export_model` in the runtime of its format.

    Args:
        file: The file.
        trust: Load a .pt2, for which torch may run code in it.

    Raises:
        UserError: The file is missing, damaged, not trusted, of no known format, or another program's; or its runtime
            is missing.
    """
    written = FORMATS[check_format(file, FORMATS, "run")]
    check_packages(file, written.runtime, written.extra)
    if not file.is_file():
        raise UserError(f"no such file: {file}")
    if written.pickled and not trust:
        raise UserError(
            f"loading {file} may run code in it; if you trust who made it, give --trust-pickle, or trust=True in Python"
        )
    with damage(f"{file} cannot be run"), quiet():  # torch would log a traceback as well
        found = written.open(file)
        if "classes" not in found.metadata:
            raise UserError(f"{file} does not name its classes; it was not written by dms-fastai export")
        if len(found.shape) != 3 or not all(isinstance(length, int) for length in found.shape):
            raise UserError(f"{file} does not take images of one size; it was not written by dms-fastai export")
        found.card(file.name)
        blank = np.zeros((1, *found.shape), np.uint8)
        if found.classify(blank).shape != (1, len(found.vocab)):
            raise UserError(f"{file} does not give a probability for each of its {len(found.vocab)} classes")
    return found


def is_exported(source: str | Path) -> bool:
    """Whether a source is a file of one of the formats, by its name."""
    return str(source).endswith(tuple(FORMATS))


def check_packages(file: Path, packages: tuple[str, ...], extra: str) -> None:
    """Raise a UserError if one of the packages that a file needs is missing; the extra has them all."""
    if not all(map(find_spec, packages)):
        raise UserError(f"{file} needs more packages: pip install {' '.join(packages)}, or 'dms-fastai[{extra}]'")


def _onnx(program: torch.export.ExportedProgram, metadata: Metadata) -> bytes:
    names = {"input_names": ["pixels"], "output_names": ["probabilities"], "dynamic_shapes": {"pixels": {0: "batch"}}}
    onnx = torch.onnx.export(program, dynamo=True, verbose=False, **names)
    onnx.model.metadata_props.update(metadata)
    return onnx.model_proto.SerializeToString()


def _int8_onnx(program: torch.export.ExportedProgram, metadata: Metadata, pixels: np.ndarray) -> tuple[bytes, bytes]:
    content = _onnx(program, metadata)
    return content, quantize(content, pixels)


def _open_onnx(file: Path) -> Exported:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    metadata = session.get_modelmeta().custom_metadata_map
    pixels, *_ = session.get_inputs()
    return Exported(lambda images: session.run(None, {pixels.name: images})[0], tuple(pixels.shape[1:]), metadata)


def _pt2(program: torch.export.ExportedProgram, metadata: Metadata) -> bytes:
    buffer = io.BytesIO()  # to a full disk, torch's writer would end the process
    torch.export.save(program, buffer, extra_files={f"{name}.json": text for name, text in metadata.items()})
    return buffer.getvalue()


def _open_pt2(file: Path) -> Exported:
    found = {"classes.json": ""}  # torch adds what else there is
    program = torch.export.load(file, extra_files=found)
    [images, *_], _ = program.example_inputs
    network = program.module()

    @torch.inference_mode()
    def classify(images: np.ndarray) -> np.ndarray:
        return network(torch.from_numpy(images)).numpy()

    metadata = {name.removesuffix(".json"): text for name, text in found.items() if text}
    return Exported(classify, tuple(images.shape[1:]), metadata)


def _open_pte(file: Path) -> Exported:
    return Exported(*open_program(file))


def _int8_pte(program: torch.export.ExportedProgram, metadata: Metadata, pixels: np.ndarray) -> tuple[bytes, bytes]:
    return lowered(program, metadata), lowered(quantized(program, pixels), metadata)


@dataclass(frozen=True)
class Format:
    """A kind of file to export to.

    Attributes:
        content: The file's content, of the classifier's graph and the texts to be kept in it.
        open: Opens such a file in its runtime.
        packages: Further packages that writing it needs.
        runtime: Those that running it needs.
        extra: The extra of this package that has all of them.
        pickled: Whether opening such a file may run code in it.
        batch: How many images the graph takes at once; None: any number.
        quantize: Gives the content in float and in int8, from what `content` takes, and uint8 images that show the
            range of the activations.
    """

    content: Callable[[torch.export.ExportedProgram, Metadata], bytes]
    open: Callable[[Path], Exported]
    packages: tuple[str, ...] = ()
    runtime: tuple[str, ...] = ()
    extra: str = "edge"
    pickled: bool = False
    batch: int | None = None
    quantize: Callable[[torch.export.ExportedProgram, Metadata, np.ndarray], tuple[bytes, bytes]] | None = None


ONNX = Format(_onnx, _open_onnx, ("onnx", "onnxscript"), ("onnxruntime",))
INT8_ONNX = replace(ONNX, packages=(*ONNX.packages, *ONNX.runtime), quantize=_int8_onnx)
PT2 = Format(_pt2, _open_pt2, pickled=True)  # torch.load, where its safe reader fails, takes the other one
PTE = Format(lowered, _open_pte, ("executorch",), ("executorch",), "executorch", batch=1)
INT8_PTE = replace(PTE, quantize=_int8_pte)
FORMATS = {".onnx": ONNX, ".int8.onnx": INT8_ONNX, ".pt2": PT2, ".pte": PTE, ".int8.pte": INT8_PTE}
