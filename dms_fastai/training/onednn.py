"""Convolutions that oneDNN, which computes on a CPU, gets wrong or slowly in training, and ways round them."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

__all__ = ["Float32", "is_depthwise", "needs_float32", "strided_convolutions"]

VECTOR = 16  # channels that oneDNN computes at once, on processors with AVX-512; 8 with AVX2


def needs_float32(module: nn.Conv2d, x: torch.Tensor) -> bool:
    """Whether a convolution of `x` is wrong or slow in bf16.

    Parts of the weights' gradient are left as whatever the memory held: where they see only the border, because the
    stride is larger than the image, and with dilation. Of some ten thousand kinds of convolutions, in memory that was
    filled with NaN before, all that went wrong are such. Of channels alone, bf16 is also up to 13 times slower.
    """
    strides_too_far = min(x.shape[-2:]) < max(module.stride) and max(module.kernel_size) > 1
    return strides_too_far or max(module.dilation) > 1 or is_depthwise(module)


def is_depthwise(module: nn.Conv2d) -> bool:
    """Whether a convolution is of each channel alone."""
    return module.groups == module.in_channels > 1


@contextmanager
def strided_convolutions(model: nn.Module) -> Iterator[None]:
    """Have strided 1x1 convolutions of few channels drop the pixels that they skip, until the block ends.

    Where images are channels last, the gradient of such a convolution's weights is computed in a buffer that is too
    short (oneDNN's issue 6035). From images of about 56 pixels on, that ends the process, or changes what lies behind
    the buffer. Without the stride there is no buffer; the results are the same.
    """
    ways = [Unstrided(module) for module in model.modules() if _overruns(module)]
    try:
        yield
    finally:
        for way in ways:
            way.remove()


def _overruns(module: nn.Module) -> bool:
    return (
        isinstance(module, nn.Conv2d)
        and module.in_channels < VECTOR
        and max(module.stride) > 1
        and set(module.kernel_size) == {1}
        and module.padding in ((0, 0), "valid")
    )


class WayRound:
    """Hooks around the forward pass of a convolution, until `remove`."""

    def __init__(self, module: nn.Conv2d):
        self.handles = (
            module.register_forward_pre_hook(self.enter),
            module.register_forward_hook(self.leave, always_call=True),
        )

    def enter(self, module: nn.Conv2d, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...] | None:
        raise NotImplementedError

    def leave(self, module: nn.Conv2d, *_: Any) -> None:
        raise NotImplementedError

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()


class Float32(WayRound):
    """Has a convolution leave autocast on a CPU where `needs_float32` says so, and only there."""

    def __init__(self, module: nn.Conv2d):
        super().__init__(module)
        self.autocast: torch.autocast | None = None

    def enter(self, module: nn.Conv2d, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...] | None:
        x = inputs[0]
        if x.device.type != "cpu" or not torch.is_autocast_enabled("cpu") or not needs_float32(module, x):
            return None
        self.autocast = torch.autocast("cpu", enabled=False)
        self.autocast.__enter__()
        return (x.float(), *inputs[1:])

    def leave(self, module: nn.Conv2d, *_: Any) -> None:
        if self.autocast is not None:
            self.autocast.__exit__(None, None, None)
            self.autocast = None


class Unstrided(WayRound):
    """Has a convolution of images on a CPU see only the pixels that its stride does not skip."""

    def __init__(self, module: nn.Conv2d):
        super().__init__(module)
        self.stride = module.stride

    def enter(self, module: nn.Conv2d, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...] | None:
        x = inputs[0]
        if x.device.type != "cpu":
            return None
        down, across = self.stride
        module.stride = (1, 1)
        return (x[..., ::down, ::across], *inputs[1:])

    def leave(self, module: nn.Conv2d, *_: Any) -> None:
        module.stride = self.stride
