"""Dropout with a mask that a CPU draws fast."""

import torch
import torch.fx
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import get_proxy_mode

__all__ = ["Dropout", "dropout", "on_eager_cpu"]

LEVELS = 2**16  # an element is dropped or kept by 16 random bits


def on_eager_cpu(x: Tensor) -> bool:
    """Whether a CPU computes with `x` here and now, and no tracer, compiler or exporter looks on."""
    graphed = isinstance(x, torch.fx.Proxy) or torch.compiler.is_compiling() or torch.jit.is_tracing()
    # make_fx, on which AOTAutograd and quantisers stand, sees operators, and writes `random_` as invalid Python.
    return not graphed and x.device.type == "cpu" and get_proxy_mode() is None


def dropout(x: Tensor, p: float, training: bool) -> Tensor:
    """`torch.nn.functional.dropout`, but on a CPU four elements share a draw of 64 random bits.

    On a CPU, torch draws for each element, one after the other, which took a sixth of a training step. `p` is exact to
    1 in 65,536. Tracers, compilers and exporters see torch's own.
    """
    if not training or p in (0.0, 1.0) or not on_eager_cpu(x):
        return F.dropout(x, p, training)
    n = x.numel()
    bits = torch.empty((n + 3) // 4, dtype=torch.int64).random_(-(2**63), None).view(torch.int16)[:n]
    dropped = min(round(p * LEVELS), LEVELS - 1)
    kept = (bits >= dropped - LEVELS // 2).to(x.dtype).mul_(1 / (1 - p))
    # The mask in the memory order of x, so that the product keeps it.
    return x * kept.as_strided(x.shape, torch.empty_like(x, device="meta").stride())


class Dropout(nn.Dropout):
    """`torch.nn.Dropout` by `dropout`."""

    def forward(self, x: Tensor) -> Tensor:
        if torch.jit.is_scripting():
            return F.dropout(x, self.p, self.training)
        return dropout(x, self.p, self.training)
