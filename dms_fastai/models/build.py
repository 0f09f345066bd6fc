"""A recipe's network, built for its data."""

import copy
import reprlib
from dataclasses import dataclass
from typing import Any

import timm
import torch
from fastai.torch_core import no_random
from torch import nn

from ..errors import UserError, reason_of
from ..settings import Momentum, checked
from .card import BOUNDS, START_WEIGHTS, channels_of, unreadable

__all__ = ["Model", "described", "needs_more_than_one", "try_network"]


@checked
@dataclass(frozen=True)
class Model:
    """An architecture of timm.

    Attributes:
        name: Name of the timm entry.
        drop_rate: Probability of dropout, where the architecture has it.
        args: Further arguments of the entry, such as `widths = [32, 64, 128]`.
        weights: What to begin from: "timm" for timm's pretrained weights, a run's folder, or a .safetensors, .pth or
            .pt file of the same network. A classifier of another size begins anew. Images get the normalisation of
            these weights and, if the data set has no size of its own, their size.
    """

    name: str = "dmsresnet"
    drop_rate: Momentum = 0.0
    args: dict[str, Any] | None = None
    weights: str | None = None

    def create(self, num_classes: int, shape: tuple[int, int, int]) -> nn.Module:
        """The network for `num_classes` classes with fresh weights, laid out channels last.

        Args:
            num_classes: How many logits it gives an image.
            shape: Channels, height and width of the images. The network is tried on one.

        Raises:
            UserError: The architecture does not take the `args`, or such images; a file of weights could not be read
                with them; or its name has the tag of weights that nobody asked for.
        """
        bare, _, tag = self.name.partition(".")
        if tag and self.weights is None:
            raise UserError(
                f"{self.name} names the weights {tag!r}, and training would begin without; for them, add --set "
                f"model.weights=timm (pretrained=True in Python); for fresh ones, take {bare}"
            )
        args = channels_of(shape) | (self.args or {})
        for key in START_WEIGHTS:
            if key in args:
                raise UserError(f"model.args.{key} chooses weights to begin from; say that with model.weights")
        if key := unreadable(args):
            raise UserError(
                f"model.args.{key} is {reprlib.repr(args[key])}, with which no file of weights can be read; {BOUNDS}"
            )
        try:
            sized = args | self.args_for(shape)
            built = timm.create_model(self.name, num_classes=num_classes, drop_rate=self.drop_rate, **sized)
        except Exception as error:  # an architecture may raise anything; its arguments are the user's
            raise UserError(f"{self.name} cannot be built with model.args {args}: {reason_of(error)}") from None
        size = "--set data.size=N"
        if "img_size" not in sized:
            size = f"--set model.args.img_size={shape[1]} if it has that, {size}"
        try_network(built, self.name, num_classes, shape, f"try {size}, or another architecture")
        return built.to(memory_format=torch.channels_last)

    def args_for(self, shape: tuple[int, int, int]) -> dict[str, Any]:
        """`args`; with `img_size`, if the architecture is built for one size of images and takes no others.

        Args:
            shape: Channels, height and width of the images.
        """
        args, size = self.args or {}, tuple(shape[1:])
        cfg = timm.get_pretrained_cfg(self.name)
        fixed = cfg is not None and cfg.fixed_input_size and tuple(cfg.input_size[1:]) != size
        if not fixed or any("img_size" in key for key in args):
            return args
        with no_random(reproducible=False), torch.no_grad(), torch.device("meta"):
            try:
                timm.create_model(self.name, **channels_of(shape), **args).eval()(torch.zeros(1, *shape))
            except Exception:  # an architecture may raise anything
                return {**args, "img_size": size[0] if size[0] == size[1] else list(size)}
        return args


def try_network(network: nn.Module, name: str, num_classes: int, shape: tuple[int, int, int], hint: str) -> None:
    """Raise a UserError if a network does not turn an image of `shape` (C, H, W) into `num_classes` logits.

    Args:
        network: It stays in training or evaluation mode, as it is.
        name: What the error calls it.
        num_classes: How many logits it has to give.
        shape: Channels, height and width of the images.
        hint: What to do if it does not take them.
    """
    training = modules_in_training(network)
    device = next((value.device for value in network.state_dict().values()), "cpu")
    try:
        with torch.no_grad():
            logits = network.eval()(torch.zeros(1, *shape, device=device))
    except Exception as error:  # a network may raise anything
        raise UserError(f"{name} does not take {described(shape)} ({reason_of(error)}); {hint}") from None
    finally:
        for module in training:
            module.training = True
    given = tuple(logits.shape) if isinstance(logits, torch.Tensor) else f"a {type(logits).__name__}"
    if given != (1, num_classes):
        raise UserError(f"{name} gives {given} for an image, not {num_classes} logits; take another architecture")


def modules_in_training(network: nn.Module) -> list[nn.Module]:
    """Which of its modules are in training mode. A frozen TorchScript module has no mode."""
    return [module for module in network.modules() if getattr(module, "training", False)]


def described(shape: tuple[int, ...]) -> str:
    """A shape (C, H, W) in words: "images of 24x48 pixels" if they are in colour."""
    if len(shape) != 3:
        return f"inputs of shape {tuple(shape)}"
    pixels = f"images of {shape[1]}x{shape[2]} pixels"
    return pixels if shape[0] == 3 else f"{pixels} and {shape[0]} channel{'s' if shape[0] > 1 else ''}"


def needs_more_than_one(model: nn.Module, shape: tuple[int, ...]) -> bool:
    """Whether a network cannot be trained on a batch of one image of `shape`: a batch norm sees one value a channel."""
    tried = copy.deepcopy(model).train()
    device = next(tried.parameters()).device
    try:
        with no_random(reproducible=False), torch.no_grad():
            tried(torch.zeros(1, *shape, device=device))
    except ValueError as error:
        return "more than 1 value per channel" in str(error)
    return False
