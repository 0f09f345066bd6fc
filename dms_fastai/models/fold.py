"""Batch norms folded into the convolutions before them, for networks that are done training."""

import copy
import inspect
from collections import Counter
from typing import Any

from torch import nn
from torch.fx import symbolic_trace
from torch.fx.experimental.optimization import fuse

__all__ = ["fold_batch_norms"]


def fold_batch_norms(model: nn.Module) -> nn.Module:
    """A frozen copy in evaluation mode, with batch norms folded into the convolutions before them where possible.

    It computes what `model.eval()` does with images alone, up to rounding, and saves a pass over memory for each batch
    norm. A network with hooks, or one that shares the weights of a layer, stays as it is.
    """
    model = copy.deepcopy(model).eval().requires_grad_(False)
    if not any(isinstance(module, nn.BatchNorm2d) for module in model.modules()):
        return model
    if any(module._forward_hooks or module._forward_pre_hooks for module in model.modules()):
        return model
    try:
        traced = symbolic_trace(model, concrete_args=_defaults(model))
        calls = Counter(node.target for node in traced.graph.nodes if node.op == "call_module")
        again = [model.get_submodule(name) for name, count in calls.items() if count > 1]
        read = {node.target.rpartition(".")[0] for node in traced.graph.nodes if node.op == "get_attr"}
        if any(hasattr(module, "weight") for module in again) or read & calls.keys():
            return model  # a norm folded for one call would change the others
        return fuse(traced, no_trace=True)
    except Exception:  # a network that torch.fx cannot trace, for any of its reasons, stays as it is
        return model


def _defaults(model: nn.Module) -> dict[str, Any]:
    """What `forward` takes beside the images, by default: which way it goes may depend on it."""
    _, *others = inspect.signature(model.forward).parameters.values()
    return {each.name: each.default for each in others if each.default is not each.empty}
