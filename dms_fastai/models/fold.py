"""Batch norms folded into the convolutions before them, for networks that are done training."""

import copy
from collections import Counter

from torch import nn
from torch.fx import symbolic_trace
from torch.fx.experimental.optimization import fuse

__all__ = ["fold_batch_norms"]


def fold_batch_norms(model: nn.Module) -> nn.Module:
    """A frozen copy in evaluation mode, with batch norms folded into the convolutions before them where possible.

    It computes what `model.eval()` does, up to rounding, and saves a pass over memory for each batch norm.
    """
    model = copy.deepcopy(model).eval().requires_grad_(False)
    if not any(isinstance(module, nn.BatchNorm2d) for module in model.modules()):
        return model
    try:
        calls = Counter(node.target for node in symbolic_trace(model).graph.nodes if node.op == "call_module")
        again = [model.get_submodule(name) for name, count in calls.items() if count > 1]
        if any(hasattr(module, "weight") for module in again):
            return model  # a norm folded for one call would change the others
        return fuse(model)
    except Exception:  # a network that torch.fx cannot trace, for any of its reasons, stays as it is
        return model
