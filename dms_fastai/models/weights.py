"""Weights on disk: safetensors files that also describe the model and the images that it expects."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import nn

from ..errors import UserError
from ..files import whole

__all__ = ["ModelCard", "load_weights", "save_weights", "shipped_weights"]

KEY = "dms_fastai"


@dataclass(frozen=True)
class ModelCard:
    """What it takes to build a model again and to feed it images.

    Attributes:
        arch: Name of the timm entry.
        args: Further arguments that it was built with.
        vocab: Names of the classes, in the order of the logits.
        mean, std: What pixels (0...1) are normalised with, a value for each channel.
        size: Height and width of the training images.
    """

    arch: str
    vocab: list[str]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    size: int
    args: dict[str, Any] = field(default_factory=dict)

    def build(self) -> nn.Module:
        """The model, with fresh weights, in evaluation mode."""
        return timm.create_model(self.arch, num_classes=len(self.vocab), **self.args).eval()


def save_weights(model: nn.Module, card: ModelCard, file: Path, dtype: torch.dtype = torch.float32) -> None:
    """Write the model's state and its card, whole or not at all; floating-point numbers as `dtype`."""
    state = {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}
    state = {name: value.to(dtype) if value.is_floating_point() else value for name, value in state.items()}
    with whole(file) as partial:
        partial.write_bytes(save(state, {KEY: json.dumps(asdict(card))}))


def load_weights(file: Path) -> tuple[nn.Module, ModelCard]:
    """The model in a file of `save_weights`, on the CPU in evaluation mode, and its card. Runs no code from the file.

    Raises:
        UserError: The file is missing, damaged, or not one of `save_weights`.
    """
    try:
        with safe_open(file, "pt") as opened:
            metadata = opened.metadata() or {}
            state = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        card = ModelCard(**json.loads(metadata[KEY]))
        model = card.build()
        model.load_state_dict(
            {name: value.to(torch.float32) if value.is_floating_point() else value for name, value in state.items()}
        )
    except FileNotFoundError:
        raise UserError(f"no such file: {file}; a run writes its weights when it finishes") from None
    except KeyError:
        raise UserError(f"{file} does not say what model it holds; it was not written by dms_fastai") from None
    except (OSError, SafetensorError, ValueError, TypeError, RuntimeError) as error:
        raise UserError(f"{file} cannot be loaded ({str(error).splitlines()[0]}); train it again") from None
    return model, card


def shipped_weights(name: str) -> Path | None:
    """The weights that come with this package for a timm entry, such as "dmsresnet": their file; None if none do."""
    cfg = timm.get_pretrained_cfg(name) if timm.is_model(name) else None
    return Path(cfg.file) if cfg is not None and cfg.file else None
