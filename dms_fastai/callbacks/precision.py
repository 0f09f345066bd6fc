"""bf16 where the hardware has it."""

import torch
from fastai.callback.core import Callback

__all__ = ["Precision", "has_bf16"]


def has_bf16(device: torch.device) -> bool:
    """Whether `device` multiplies bf16 matrices in hardware, so that autocast gains speed."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        return torch.backends.mkldnn.is_available() and torch.cpu._is_avx512_bf16_supported()
    return False


class Precision(Callback):
    """Run the model in bf16 autocast where `has_bf16` says so. bf16 has float32's range: no gradient scaling is needed.

    Autocast ends with the prediction, which is float32 again for losses and metrics.
    """

    order = 11  # after fastai's own mixed precision, which goes first where somebody asks for it
    autocast = None
    _stateattrs = ("autocast",)

    def before_batch(self) -> None:
        self.release()
        device = self.learn.xb[0].device
        if has_bf16(device) and not torch.is_autocast_enabled(device.type):
            self.autocast = torch.autocast(device.type, torch.bfloat16)
            self.autocast.__enter__()

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
