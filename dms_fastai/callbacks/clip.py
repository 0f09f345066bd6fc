"""Clipping of gradient values."""

import torch
from fastai.callback.core import Callback

from ..errors import UserError

__all__ = ["ClipGradValue"]


class ClipGradValue(Callback):
    """Clip every gradient's every element to +-`clip_value`, as the authors' code does."""

    order = 11

    def __init__(self, clip_value: float = 0.1):
        super().__init__()
        if not clip_value > 0:
            raise UserError(f"clip_value is {clip_value}; it must be above 0")
        self.clip_value = clip_value

    def before_step(self) -> None:
        torch.nn.utils.clip_grad_value_(self.learn.model.parameters(), self.clip_value)
