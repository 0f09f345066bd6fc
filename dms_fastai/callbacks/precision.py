"""bf16 where the hardware has it, and TF32 where float32 stays."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch
from fastai.callback.core import Callback

from ..errors import UserError

__all__ = ["Precision", "fast_kernels", "has_bf16"]


@cache
def has_bf16(device: torch.device) -> bool:
    """Whether `device` multiplies bf16 matrices in hardware, so that autocast gains speed."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        return torch.backends.mkldnn.is_available() and torch.cpu._is_avx512_bf16_supported()
    return False


@contextmanager
def fast_kernels(device: torch.device | None) -> Iterator[None]:
    """On a GPU, multiply float32 matrices in TF32 and time convolution kernels to take the fastest; then as before."""
    cudnn = torch.backends.cudnn
    if device is None or device.type != "cuda":
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


class Precision(Callback):
    """Run the model in bf16 autocast where `has_bf16` says so. bf16 has float32's range: no gradient scaling is needed.

    Autocast ends with the prediction, which is float32 again for losses and metrics.
    """

    order = 11  # after fastai's own mixed precision, which goes first where somebody asks for it
    autocast = None
    _stateattrs = ("autocast",)

    def __init__(self, precision: str = "auto"):
        """
        Args:
            precision: "auto", or "float32" to leave it at that on any hardware.

        Raises:
            UserError: Another word.
        """
        super().__init__()
        if precision not in ("auto", "float32"):
            raise UserError(f"precision is {precision!r}; it must be 'auto' or 'float32'")
        self.precision = precision

    def before_batch(self) -> None:
        self.release()
        device = self.learn.xb[0].device
        if self.wanted(device) and not torch.is_autocast_enabled(device.type):
            self.autocast = self.context(device)
            self.autocast.__enter__()

    def wanted(self, device: torch.device) -> bool:
        return self.precision == "auto" and has_bf16(device)

    def context(self, device: torch.device) -> torch.autocast:
        """Autocast to bf16 where it is wanted and `device` has it, or switched off."""
        return torch.autocast(device.type, torch.bfloat16, enabled=self.wanted(device))

    def after_pred(self) -> None:
        if self.autocast is not None:
            self.release()
            self.learn.pred = self.learn.pred.float()

    def after_cancel_batch(self) -> None:
        self.release()

    def release(self) -> None:
        """Leave autocast. A Learner calls this when a batch ends by an exception that is no event."""
        if self.autocast is not None:
            self.autocast.__exit__(None, None, None)
            self.autocast = None
