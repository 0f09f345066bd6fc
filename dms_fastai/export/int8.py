"""An ONNX file in int8: onnxruntime's static quantisation, with what would suffer kept in float.

Activations are uint8 and weights int8, a scale for each output channel: on x86 that is the combination whose
convolutions, additions and activations onnxruntime runs in integers throughout. Weights have 7 of the 8 bits: without
VNNI, such processors add two products of 8 bits in 16, where those of larger weights do not fit and are cut.
"""

import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import onnx

__all__ = ["float_nodes", "name_global_pools", "quantize", "quiet"]

BATCH = 20  # images whose activations are in memory at once
WEIGHTED = {"Conv", "ConvTranspose", "Gemm", "MatMul"}
PREFIX = "model."  # of the names of tensors
POOLS = {"ReduceMean", "GlobalAveragePool", "GlobalMaxPool", "ReduceMax"}
IN_INTEGERS = "GlobalAveragePool"  # the one of them that runtimes have in integers


def quantize(model: bytes, pixels: np.ndarray) -> bytes:
    """An ONNX file of `export_model` in int8, with input, output and metadata as they are.

    Args:
        model: The file's content.
        pixels: Images whose activations give the scales, uint8 of shape (N, C, H, W).
    """
    import onnx
    from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_static

    before = onnx.load_from_string(model)
    name_global_pools(before.graph)
    # onnxruntime would advise to optimise the graph first, which was measured to gain nothing.
    with TemporaryDirectory() as folder, quiet():
        file = Path(folder) / "int8.onnx"
        quantize_static(
            before,
            file,
            _Reader(pixels),
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            reduce_range=True,
            calibrate_method=CalibrationMethod.MinMax,
            nodes_to_exclude=float_nodes(before.graph),
        )
        after = onnx.load(file)
    del after.metadata_props[:]
    after.metadata_props.extend(before.metadata_props)
    _shorten(after.graph)
    return after.SerializeToString()


def name_global_pools(graph: "onnx.GraphProto") -> None:
    """Make means over height and width the operator that has a form in integers; what they compute is the same."""
    from onnx import helper, numpy_helper

    constants = {weights.name: weights for weights in graph.initializer}
    rank = {value.name: len(value.type.tensor_type.shape.dim) for value in graph.value_info}
    for node in graph.node:
        if node.op_type != "ReduceMean" or len(node.input) != 2 or rank.get(node.input[0]) != 4:
            continue
        axes = constants.get(node.input[1])
        keeps = {given.name: helper.get_attribute_value(given) for given in node.attribute}.get("keepdims", 1)
        if keeps and axes is not None and {axis % 4 for axis in numpy_helper.to_array(axes).tolist()} == {2, 3}:
            node.CopyFrom(helper.make_node(IN_INTEGERS, [node.input[0]], node.output, node.name))
    used = {name for node in graph.node for name in node.input}
    for name in constants.keys() - used:
        graph.initializer.remove(constants[name])


def _shorten(graph: "onnx.GraphProto") -> None:
    """Leave out what a runtime does not need: an eighth of the file of a network of 74 thousand parameters."""
    del graph.value_info[:]
    names = {name for node in graph.node for name in (*node.input, *node.output)} | {w.name for w in graph.initializer}
    if any(name.removeprefix(PREFIX) in names for name in names if name.startswith(PREFIX)):
        return  # two would have one name
    for node in graph.node:
        node.ClearField("name")
        for names in (node.input, node.output):
            names[:] = [name.removeprefix(PREFIX) for name in names]
    for weights in graph.initializer:
        weights.name = weights.name.removeprefix(PREFIX)


def float_nodes(graph: "onnx.GraphProto") -> list[str]:
    """Names of the nodes that stay in float, by their place in the graph.

    These are the normalisation, which is before the first weights; the softmax, and whatever else is after the last
    weights: 256 levels would make its probabilities sum to less or more than 1; and squeeze-and-excitation, between a
    global pool and the product that scales the pool's own input. These two are in integers: in float, a pool would
    need all of its input in float, which takes longer than the pool.

    Args:
        graph: Its nodes have names, and are in the order in which they are computed.
    """
    nodes = list(graph.node)
    kept = _beyond_weights(nodes, "input", "output") | _beyond_weights(reversed(nodes), "output", "input")
    maker = {name: node for node in nodes for name in node.output}
    inputs = {value.name for value in graph.input}
    for node in nodes:
        if node.op_type == "Mul":
            for gate, scaled in (node.input, reversed(node.input)):
                kept |= _gate(gate, scaled, inputs, maker)
    return [node.name for node in nodes if node.name in kept]


def _beyond_weights(nodes: "Iterable[onnx.NodeProto]", near: str, far: str) -> set[str]:
    """Names of the nodes that have no weights and are reached, from their `near` side, through none that has."""
    reached, found = set(), set()
    for node in nodes:
        if node.op_type in WEIGHTED or reached.intersection(getattr(node, near)):
            reached.update(getattr(node, far))
        else:
            found.add(node.name)
    return found


def _gate(name: str, scaled: str, inputs: set[str], maker: "dict[str, onnx.NodeProto]") -> set[str]:
    """Names of the nodes from a global pool of `scaled` to the tensor `name`; none if it depends on more.

    The pool is among them if it has no form in integers.
    """
    inside, ahead, pooled = set(), [name], False
    while ahead:
        tensor = ahead.pop()
        if tensor == scaled or tensor in inputs:
            return set()
        node = maker.get(tensor)
        if node is None or node.op_type == "Shape":  # weights; a shape says nothing of the values
            continue
        pools = node.op_type in POOLS and node.input[0] == scaled
        pooled |= pools
        if not (pools and node.op_type == IN_INTEGERS):
            inside.add(node.name)
        if not pools:
            ahead += node.input
    return inside if pooled else set()


class _Reader:
    """Batches of images, as onnxruntime's calibration asks for them."""

    def __init__(self, pixels: np.ndarray):
        self.batches = iter(np.array_split(pixels, -(-len(pixels) // BATCH)))

    def get_next(self) -> dict[str, np.ndarray] | None:
        batch = next(self.batches, None)
        return None if batch is None else {"pixels": batch}


@contextmanager
def quiet() -> Iterator[None]:
    """Python's loggers pass no warnings on until the block ends."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)
