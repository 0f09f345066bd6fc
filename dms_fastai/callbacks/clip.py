"""Clipping of gradient values."""

import torch
from fastai.callback.core import Callback

from ..settings import Positive, checked
from ..training.parts import order_of

__all__ = ["ClipGradValue"]


@checked
class ClipGradValue(Callback):
    """Clip every element of every gradient to +-`value`, as the authors' code does."""

    order = order_of("clip")

    def __init__(self, value: Positive = 0.1):
        """
        Args:
            value: Largest absolute value that an element keeps.

        Raises:
            UserError: A value out of range.
        """
        super().__init__()
        self.value = value

    def before_step(self) -> None:
        torch.nn.utils.clip_grad_value_(self.learn.model.parameters(), self.value)
