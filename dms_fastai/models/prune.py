"""Structured pruning: residual blocks get narrower inside, and everything between blocks stays as wide as it was.

The filters with the smallest weights go, and with them their batch norms' channels and the channels of the convolution
that reads them. Stem, squeeze-and-excitation, shortcuts, features and classifier keep their shapes, so that a width for
each block (`mid_widths` of `DMSResNet`) says all that there is to know of a pruned network.
"""

import copy
import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

from ..errors import UserError
from .dmsresnet import DMSResNet
from .macs import macs

__all__ = ["as_narrow_as", "mid_widths_of", "narrowed", "reestimate_batch_norms", "widths_within"]

GROUP, WIDE = 8, 64  # filters that go together, twice as many in wide layers; see `_group`

Inner = tuple[nn.Conv2d, nn.BatchNorm2d, nn.Conv2d]


def widths_within(network: DMSResNet, share: float, shape: tuple[int, ...]) -> list[int]:
    """The inner widths of a network after pruning: the weakest groups of filters go until the MACs fit.

    A filter is as strong as the L2 norm of its weights, times the scale of its batch norm, as a multiple of the mean
    in its layer; a group, as its filters on average. A group has sixteen filters in layers of 64 or more, and eight in
    others. Layers are ranked together, and each keeps a group or more.

    Args:
        network: The network; it stays as it is.
        share: Multiply-accumulates, as a share of the network's; above 0 and below 1.
        shape: Channels, height and width of its images.

    Returns:
        A width for each block, a multiple of its group where the block has as many filters.

    Raises:
        UserError: Even the narrowest blocks have more MACs than that.
    """
    widths, groups, dense = mid_widths_of(network), [], macs(network, shape)
    for place, block in enumerate(_blocks(network)):
        strengths = torch.stack([_strengths(conv, norm).sort().values for conv, norm, _ in _inner(block)]).mean(0)
        start, width = 0, len(strengths)
        group = _group(width)
        for end in range(width % group or group, width - group + 1, group):  # an odd rest goes first
            groups.append((strengths[start:end].mean().item(), place, end - start))
            start = end
    groups.sort()

    def after(count: int) -> list[int]:
        found = list(widths)
        for _, place, filters in groups[:count]:
            found[place] -= filters
        return found

    def fits(count: int) -> bool:
        return macs(narrowed(network, after(count)), shape) <= share * dense

    if not fits(len(groups)):
        least = macs(narrowed(network, after(len(groups))), shape) / dense
        if not groups or least > 0.99:
            raise UserError(f"prune.macs is {share:g}, and these blocks cannot be narrower; prune a wider network")
        raise UserError(
            f"prune.macs is {share:g}, and the narrowest blocks still have {least:.3f} of the MACs; take "
            f"{math.ceil(100 * least) / 100:g} or more"
        )
    low, high = 0, len(groups)  # MACs fall with every group: the fewest that fit
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(middle) else (middle + 1, high)
    return after(low)


def narrowed(network: DMSResNet, mid_widths: Sequence[int]) -> DMSResNet:
    """A copy of a network with its strongest inner filters alone, their weights and their order as they were.

    Args:
        network: The network; it stays as it is.
        mid_widths: How many filters each block keeps; at most as many as it has.
    """
    network = copy.deepcopy(network)
    for block, width in zip(_blocks(network), mid_widths, strict=True):
        for conv, norm, reader in _inner(block):
            kept = _strengths(conv, norm).argsort(descending=True, stable=True)[:width].sort().values
            _keep(conv, kept, 0)
            _keep(norm, kept, 0)
            _keep(reader, kept, 1)
            conv.out_channels = norm.num_features = reader.in_channels = width
    return network


def as_narrow_as(model: nn.Module, trained: nn.Module) -> nn.Module:
    """`trained`, pruned to the inner widths of `model` where these are the narrower ones; else as it is."""
    if not (isinstance(model, DMSResNet) and isinstance(trained, DMSResNet)):
        return trained
    ours, theirs = mid_widths_of(model), mid_widths_of(trained)
    narrower = len(ours) == len(theirs) and all(a <= b for a, b in zip(ours, theirs, strict=True))
    return narrowed(trained, ours) if narrower and ours != theirs else trained


def mid_widths_of(network: DMSResNet) -> list[int]:
    """The width inside each block, first to last."""
    return [_inner(block)[0][0].out_channels for block in _blocks(network)]


def reestimate_batch_norms(network: nn.Module, batches: Iterable[Tensor | Sequence[Tensor]]) -> None:
    """Give batch norms the means and variances of these training batches; no weight changes.

    Args:
        network: The network, on the device of the batches; it stays in training or evaluation mode.
        batches: Images of shape (B, C, H, W), or sequences that begin with them.
    """
    update_bn(batches, network)


def _group(width: int) -> int:
    """How many filters of a layer go together: runtimes compute with channels in blocks, and save little in between.

    These have eight channels, or sixteen with AVX-512, where a `dmsresnet` of half the MACs takes less time with
    groups of sixteen than with eight. Where a layer is narrow, eight leave more to choose.
    """
    return 2 * GROUP if width >= WIDE else GROUP


def _blocks(network: DMSResNet) -> list[nn.Module]:
    return [block for stage in network.stages for block in stage]


def _inner(block: nn.Module) -> list[Inner]:
    """The block's convolutions but the last, each with its batch norm and the convolution that reads it."""
    convs = [module for module in block.residual if isinstance(module, nn.Conv2d)]
    norms = [module for module in block.residual if isinstance(module, nn.BatchNorm2d)]
    return list(zip(convs, norms, convs[1:], strict=False))


def _strengths(conv: nn.Conv2d, norm: nn.BatchNorm2d) -> Tensor:
    """How strong each filter of an inner convolution is, as a multiple of their mean; shape (filters,)."""
    norms = conv.weight.detach().flatten(1).norm(dim=1) * norm.weight.detach().abs()
    return norms / norms.mean().clamp(min=torch.finfo(norms.dtype).tiny)


def _keep(module: nn.Module, kept: Tensor, dim: int) -> None:
    """Leave a module those channels alone, in each of its parameters and buffers that has them."""
    for name, value in module.named_parameters(recurse=False):
        setattr(module, name, nn.Parameter(value.detach().index_select(dim, kept), value.requires_grad))
    for name, value in module.named_buffers(recurse=False):
        if value.ndim:  # not the counter of batches
            setattr(module, name, value.index_select(dim, kept))
