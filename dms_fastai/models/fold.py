"""Batch norms folded into the convolutions before them, for networks that are done training."""

import copy

from torch import nn
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
        return fuse(model)
    except Exception:  # a network that torch.fx cannot trace, for any of its reasons, stays as it is
        return model
