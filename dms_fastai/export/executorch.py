"""ExecuTorch programs (.pte) for the processors of phones and boards, in float or int8, by its XNNPACK backend.

Such a program takes one image: with a free number of them, ExecuTorch splits the network into several parts.
"""

import io
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stderr
from itertools import takewhile
from pathlib import Path

import numpy as np
import torch
from torch.export import ExportedProgram
from torch.fx import Graph

from .int8 import quiet

__all__ = ["lowered", "open_program", "quantized"]

WEIGHTED = ("conv", "linear", "matmul")  # parts of operations' names
TEXTS = ("classes", "macs", "calibration", "white", "middle")
KIND = slice(4, 6), b"ET"  # of a file; the runtime ends the process where these bytes are no text


def lowered(program: ExportedProgram, texts: Mapping[str, str]) -> bytes:
    """The content of a .pte. It holds each text as a method without arguments, which returns it."""
    with quiet():
        from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
        from executorch.exir import to_edge_transform_and_lower

        edge = to_edge_transform_and_lower(
            program, partitioner=[XnnpackPartitioner()], constant_methods=dict(texts) or None
        )
        return edge.to_executorch().buffer


def quantized(program: ExportedProgram, pixels: np.ndarray) -> ExportedProgram:
    """The program with int8 weights, a scale for each output channel, and int8 activations.

    Normalisation and softmax stay in float.

    Args:
        program: It takes one image, shape (1, C, H, W).
        pixels: Images whose activations give the scales, uint8 of shape (N, C, H, W).
    """
    with quiet(), torch.no_grad():
        from executorch.backends.xnnpack.quantizer.xnnpack_quantizer import (
            XNNPACKQuantizer,
            get_symmetric_quantization_config,
        )
        from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

        config = get_symmetric_quantization_config(is_per_channel=True)
        network = program.module()
        in_float = _before_weights(network.graph)
        quantizer = XNNPACKQuantizer().set_global(config).set_filter_function(lambda node: node.name not in in_float)
        network = prepare_pt2e(network, quantizer)
        images = torch.from_numpy(np.ascontiguousarray(pixels)).split(1)
        for image in images:
            network(image)
        return torch.export.export(convert_pt2e(network), images[:1])


def _before_weights(graph: Graph) -> set[str]:
    """Names of the operations before the first one with weights: the normalisation."""
    operations = (node for node in graph.nodes if node.op == "call_function")
    before = takewhile(lambda node: not any(word in str(node.target) for word in WEIGHTED), operations)
    return {node.name for node in before}


def open_program(file: Path) -> tuple[Callable[[np.ndarray], np.ndarray], tuple[int, ...], dict[str, str]]:
    """What classifies uint8 images, shape (B, C, H, W), one by one; the shape of an image; and the file's texts."""
    content = file.read_bytes()
    where, kind = KIND
    if content[where] != kind:
        raise ValueError("it is no ExecuTorch program")
    with quiet(), _reasons():
        from executorch.extension.pybindings import portable_lib
        from executorch.runtime import Runtime

        if portable_lib._threadpool_get_thread_count() != 1:
            portable_lib._unsafe_reset_threadpool(1)  # unsafe for programs that are open, and have other threads
        program = Runtime.get().load_program(content)
        texts = {name: program.load_method(name).execute([])[0] for name in TEXTS if name in program.method_names}
        shape = program.metadata("forward").input_tensor_meta(0).sizes()[1:]

    def classify(images: np.ndarray) -> np.ndarray:
        with _reasons():
            forward = program.load_method("forward")  # once: the program keeps it, and has to outlive it
            images = np.ascontiguousarray(images)  # the runtime reads memory, and no strides
            found = [forward.execute([image])[0] for image in torch.from_numpy(images).split(1)]
        return torch.cat(found).numpy()

    return classify, shape, texts


@contextmanager
def _reasons() -> Iterator[None]:
    """What the runtime logs on standard error is not shown; if it fails, the last line is the reason."""
    log = io.StringIO()
    try:
        with redirect_stderr(log):
            yield
    except RuntimeError as error:
        last = [str(error), *log.getvalue().splitlines()][-1]
        raise RuntimeError(last.partition("] ")[2] or last) from None
