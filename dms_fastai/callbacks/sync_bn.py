"""Batch norms over the whole batch, where several processes train."""

import torch
from timm.layers import convert_sync_batchnorm
from torch import Tensor, distributed, nn
from torch.nn.modules.batchnorm import _BatchNorm

from .. import processes
from ..errors import UserError
from ..training.equations import widened
from ..training.parts import order_of
from .releasing import Releasing

__all__ = ["SyncBN"]


class SyncBN(Releasing):
    """Have batch norms normalise the batch of all processes, and not each process its own images.

    In one process there is nothing to do. On GPUs these are torch's `SyncBatchNorm`. Outside a fit, the model has the
    modules that it came with.
    """

    order = order_of("sync_bn")
    network: nn.Module | None = None
    replaced: tuple[tuple[str, nn.Module], ...] = ()
    _stateattrs = ("network", "replaced")

    def before_fit(self) -> None:
        super().before_fit()
        if processes.count() == 1:
            return
        self.network = self.learn.model
        device = next(self.network.parameters()).device
        named = self.network.named_modules(remove_duplicate=False)
        self.replaced = tuple((name, module) for name, module in named if isinstance(module, _BatchNorm))
        for name, module in self.replaced:
            self.network.set_submodule(name, synchronised(module, device))

    def release(self) -> None:
        """Leave the model as it was."""
        for name, module in self.replaced:
            self.network.set_submodule(name, module)
        self.network, self.replaced = None, ()


def synchronised(norm: _BatchNorm, device: torch.device) -> nn.Module:
    """A batch norm over all processes, with the weights and the statistics of another."""
    if device.type != "cpu":
        return convert_sync_batchnorm(norm)
    if type(norm) not in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d):
        raise UserError(f"on a CPU, sync_bn knows torch's batch norms alone, and not {type(norm).__name__}")
    found = HostSyncBatchNorm(norm.num_features, norm.eps, norm.momentum, norm.affine, norm.track_running_stats)
    for name, value in (*norm.named_parameters(), *norm.named_buffers()):
        setattr(found, name, value)
    return found.train(norm.training)


class HostSyncBatchNorm(_BatchNorm):
    """What torch's `SyncBatchNorm`, which is for GPUs alone, is on a CPU."""

    def _check_input_dim(self, x: Tensor) -> None:
        """Any number of dimensions will do."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        given, x = x.dtype, widened(x)  # bf16 would round the statistics
        others = [axis for axis in range(x.ndim) if axis != 1]
        n = x.numel() // x.shape[1] * processes.count()
        mean = Sum.apply(x.sum(others)) / n
        centred = x - _as_rows(mean, x)
        variance = Sum.apply((centred**2).sum(others)) / n
        if self.track_running_stats:
            self.note(mean.detach(), variance.detach() * n / (n - 1))
        x = centred * _as_rows((variance + self.eps).rsqrt(), x)
        x = x if self.weight is None else x * _as_rows(self.weight, x) + _as_rows(self.bias, x)
        return x.to(given)

    def note(self, mean: Tensor, variance: Tensor) -> None:
        """Move the running statistics towards those of a batch."""
        self.num_batches_tracked += 1
        share = 1 / self.num_batches_tracked.item() if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean.to(self.running_mean), share)
        self.running_var.lerp_(variance.to(self.running_var), share)


def _as_rows(values: Tensor, x: Tensor) -> Tensor:
    """A value for each channel of `x`, (B, C, ...)."""
    return values.view(1, -1, *[1] * (x.ndim - 2))


class Sum(torch.autograd.Function):
    """The sum over all processes; so is its gradient."""

    @staticmethod
    def forward(ctx, own: Tensor) -> Tensor:
        total = own.clone()
        distributed.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        return Sum.forward(ctx, gradient)
