"""1x1 convolutions of few channels that skip pixels: on a CPU, their gradients need another way."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

__all__ = ["strided_convolutions"]

VECTOR = 16  # channels that oneDNN computes at once, on processors with AVX-512; 8 with AVX2


@contextmanager
def strided_convolutions(model: nn.Module) -> Iterator[None]:
    """Have strided 1x1 convolutions of few channels drop the pixels that they skip, until the block ends.

    Where images are channels last, oneDNN computes the gradient of such a convolution's weights in a buffer that is too
    short (its issue 6035). From images of about 56 pixels on, that ends the process, or changes what lies behind the
    buffer. Without the stride there is no buffer; the results are the same.
    """
    hooks = [Unstrided(module) for module in model.modules() if _is_affected(module)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _is_affected(module: nn.Module) -> bool:
    return (
        isinstance(module, nn.Conv2d)
        and module.in_channels < VECTOR
        and max(module.stride) > 1
        and set(module.kernel_size) == {1}
        and module.padding in ((0, 0), "valid")
    )


class Unstrided:
    """Has a convolution of images on a CPU see only the pixels that its stride does not skip."""

    def __init__(self, module: nn.Conv2d):
        self.stride = module.stride
        self.handles = (
            module.register_forward_pre_hook(self.enter),
            module.register_forward_hook(self.leave, always_call=True),
        )

    def enter(self, module: nn.Conv2d, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...] | None:
        x = inputs[0]
        if x.device.type != "cpu":
            return None
        down, across = self.stride
        module.stride = (1, 1)
        return (x[..., ::down, ::across], *inputs[1:])

    def leave(self, module: nn.Conv2d, *_: Any) -> None:
        module.stride = self.stride

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()
