"""The cost of a forward pass, counted by torch."""

import copy

import timm
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

__all__ = ["entry_macs", "macs"]


def macs(network: nn.Module, shape: tuple[int, ...]) -> int:
    """Multiply-accumulates for one image of `shape` (C, H, W), in convolutions and products of matrices.

    They are counted without computing, on a copy on the meta device: torch's counter misses the attention kernels of
    CPUs. The network stays as it is.
    """
    shadow = copy.deepcopy(network).to("meta").eval().requires_grad_(False)
    with FlopCounterMode(display=False) as flops, torch.inference_mode():
        shadow(torch.zeros(1, *shape, device="meta"))
    return flops.get_total_flops() // 2


def entry_macs(name: str) -> int:
    """`macs` of a timm entry for an image of its own size."""
    with torch.device("meta"):
        network = timm.create_model(name)
    return macs(network, network.default_cfg["input_size"])
