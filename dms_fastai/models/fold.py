"""Batch norms folded into the convolutions before them, for networks that are done training."""

import copy
import inspect
from collections import Counter
from typing import Any

import torch
from torch import nn
from torch.fx import symbolic_trace
from torch.fx.experimental.optimization import fuse

__all__ = ["fold_batch_norms"]

ROUNDING = 1e-3  # of outputs, as a share of the largest


def fold_batch_norms(model: nn.Module, shape: tuple[int, ...]) -> nn.Module:
    """A frozen copy in evaluation mode, with batch norms folded into the convolutions before them where possible.

    It computes what `model.eval()` does with images alone, up to rounding, and saves a pass over memory for each batch
    norm. A network with hooks or with a `forward` that an object has for itself, or one that shares the weights of a
    layer, stays as it is.

    Args:
        model: The network.
        shape: Channels, height and width of an image. The copy is tried on noise, and the network stays as it is where
            that gives something else: Python in its `forward` that torch.fx does not see.
    """
    model = copy.deepcopy(model).eval()
    for parameter in model.parameters():
        if parameter.is_leaf:  # a copy of TorchScript's are not
            parameter.requires_grad_(False)
    if not any(isinstance(module, nn.BatchNorm2d) for module in model.modules()):
        return model
    if any(m._forward_hooks or m._forward_pre_hooks or "forward" in vars(m) for m in model.modules()):
        return model
    try:
        traced = symbolic_trace(model, concrete_args=_defaults(model))
        calls = Counter(node.target for node in traced.graph.nodes if node.op == "call_module")
        again = [model.get_submodule(name) for name, count in calls.items() if count > 1]
        read = {node.target.rpartition(".")[0] for node in traced.graph.nodes if node.op == "get_attr"}
        if any(hasattr(module, "weight") for module in again) or read & calls.keys():
            return model  # a norm folded for one call would change the others
        fused = fuse(traced, no_trace=True)
        return fused if _alike(fused, model, shape) else model
    except Exception:  # a network that torch.fx cannot trace, for any of its reasons, stays as it is
        return model


@torch.inference_mode()
def _alike(one: nn.Module, other: nn.Module, shape: tuple[int, ...]) -> bool:
    like = next(other.parameters())
    noise = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0)).to(like)
    ours, theirs = one(noise).float(), other(noise).float()
    return bool((ours - theirs).abs().max() <= ROUNDING * theirs.abs().max())


def _defaults(model: nn.Module) -> dict[str, Any]:
    """What `forward` takes beside the images, by default: which way it goes may depend on it."""
    _, *others = inspect.signature(model.forward).parameters.values()
    return {each.name: each.default for each in others if each.default is not each.empty}
