"""bf16 where the hardware has it, and TF32 where float32 stays."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch
from torch import nn

from ..training.onednn import Float32, is_depthwise
from ..training.parts import order_of
from .releasing import Releasing

__all__ = ["BF16", "fast_kernels", "has_bf16"]


@cache
def has_bf16(device: torch.device) -> bool:
    """Whether `device` multiplies bf16 matrices in hardware, so that autocast gains speed."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        return torch.backends.mkldnn.is_available() and torch.cpu._is_avx512_bf16_supported()
    return False


@contextmanager
def fast_kernels(device: torch.device | str | None) -> Iterator[None]:
    """On a GPU, multiply float32 matrices in TF32 and use the fastest convolution kernels, until the block ends."""
    cudnn = torch.backends.cudnn
    if device is None or torch.device(device).type != "cuda":
        yield
        return
    precision, benchmark = torch.get_float32_matmul_precision(), cudnn.benchmark
    torch.set_float32_matmul_precision("high")
    cudnn.benchmark = not cudnn.deterministic
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(precision)
        cudnn.benchmark = benchmark


class BF16(Releasing):
    """Run the model in bf16 autocast if `has_bf16`. bf16 has float32's range: no gradient scaling is needed.

    Autocast ends with the prediction, which is float32 again for losses and metrics. On a CPU, convolutions with
    `training.onednn.needs_float32` are computed in float32.
    """

    order = order_of("bf16")
    autocast, exact = None, ()
    _stateattrs = ("autocast", "exact")

    def before_fit(self) -> None:
        super().before_fit()
        device = next(self.learn.model.parameters()).device
        if device.type == "cpu" and has_bf16(device):
            convs = [module for module in self.learn.model.modules() if isinstance(module, nn.Conv2d)]
            unusual = [conv for conv in convs if max(conv.stride + conv.dilation) > 1 or is_depthwise(conv)]
            self.exact = tuple(map(Float32, unusual))

    def before_batch(self) -> None:
        self.leave()
        device = self.learn.xb[0].device
        if has_bf16(device) and not torch.is_autocast_enabled(device.type):
            self.autocast = self.context(device)
            self.autocast.__enter__()

    def context(self, device: torch.device) -> torch.autocast:
        """An autocast to bf16, switched off if `device` has no bf16."""
        return torch.autocast(device.type, torch.bfloat16, enabled=has_bf16(device))

    def after_pred(self) -> None:
        if self.autocast is not None:
            self.leave()
            self.learn.pred = self.learn.pred.float()

    def after_cancel_batch(self) -> None:
        self.leave()

    def leave(self) -> None:
        """Leave autocast. A Learner calls this if an exception ends a batch without an event."""
        if self.autocast is not None:
            self.autocast.__exit__(None, None, None)
            self.autocast = None

    def release(self) -> None:
        """Leave the model as it was."""
        self.leave()
        for hooks in self.exact:
            hooks.remove()
        self.exact = ()
