"""A recipe's network, built for its data."""

from dataclasses import dataclass
from typing import Any

import timm
import torch
from torch import nn

from ..errors import UserError
from ..settings import Momentum, checked
from .card import START_WEIGHTS

__all__ = ["Model"]


@checked
@dataclass(frozen=True)
class Model:
    """An architecture of timm.

    Attributes:
        name: Name of the timm entry.
        drop_rate: Probability of dropout, where the architecture has it.
        args: Further arguments of the entry, such as `widths = [32, 64, 128]`.
        weights: What to begin from: "timm" for timm's pretrained weights, a run's folder or a .safetensors file of the
            same network. A classifier of another size begins anew.
    """

    name: str = "dmsresnet"
    drop_rate: Momentum = 0.0
    args: dict[str, Any] | None = None
    weights: str | None = None

    def create(self, num_classes: int, size: int | None = None) -> nn.Module:
        """The network for `num_classes` classes with fresh weights, laid out channels last.

        Args:
            num_classes: How many logits it gives an image.
            size: Height and width of the images. The network is tried on one of this size; None: it is not tried.

        Raises:
            UserError: The architecture does not take the `args`, or such images.
        """
        args = self.args or {}
        for key in START_WEIGHTS:
            if key in args:
                raise UserError(f"model.args.{key} chooses weights to begin from; say that with model.weights")
        try:
            built = timm.create_model(self.name, num_classes=num_classes, drop_rate=self.drop_rate, **args)
        except Exception as error:  # an architecture may raise anything; its arguments are the user's
            raise UserError(f"{self.name} cannot be built with model.args {args}: {_reason(error)}") from None
        if size is not None:
            self._try_on(built, size, num_classes)
        return built.to(memory_format=torch.channels_last)

    def _try_on(self, built: nn.Module, size: int, num_classes: int) -> None:
        """Raise a UserError if the network does not turn an image of `size` pixels into `num_classes` logits."""
        name = self.name
        hint = f"try --set model.args.img_size={size} if it has that, --set data.size=N, or another architecture"
        try:
            with torch.no_grad():
                shape = tuple(built.eval()(torch.zeros(1, 3, size, size)).shape)
        except Exception as error:  # as above
            raise UserError(f"{name} does not take images of {size}x{size} pixels ({_reason(error)}); {hint}") from None
        finally:
            built.train()
        if shape != (1, num_classes):
            raise UserError(f"{name} gives {shape} for an image, not {num_classes} logits; take another architecture")


def _reason(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0].rstrip(".")
