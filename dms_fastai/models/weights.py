"""Weights on disk: safetensors files that also describe the model and the images that it expects."""

from collections.abc import Mapping
from pathlib import Path

import timm
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import nn

from ..errors import UserError, reason_of
from ..files import whole
from ..names import is_architecture
from .card import ModelCard, UnregisteredError, read_card

__all__ = ["all_finite", "card_in", "load_weights", "save_weights", "shipped_weights"]

KEY = "dms_fastai"


def save_weights(
    model: nn.Module,
    card: ModelCard,
    file: Path,
    dtype: torch.dtype = torch.float32,
    notes: Mapping[str, str] | None = None,
) -> None:
    """Write the model's state and its card, whole or not at all; floating-point numbers as `dtype`.

    `notes` are further entries of the file's header, which change nothing.

    Raises:
        UserError: The card names no architecture of timm, from which the file could be read again, or something that
            `read_card` refuses.
    """
    if not is_architecture(card.arch):
        raise UserError(
            f"{file} would have to name an architecture of timm, and {card.arch} is none; export a .pkl, .onnx or .pt2"
        )
    try:
        read_card(told := card.to_json())
    except (TypeError, ValueError) as error:
        raise UserError(f"{file} could not be read again ({reason_of(error)}); export a .pkl, .onnx or .pt2") from None
    state = {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}
    state = {name: value.to(dtype) if value.is_floating_point() else value for name, value in state.items()}
    with whole(file) as partial:
        partial.write_bytes(save(state, {**(notes or {}), KEY: told}))


def load_weights(file: Path) -> tuple[nn.Module, ModelCard]:
    """The model in a file of `save_weights`, on the CPU in evaluation mode, and its card. Runs no code from the file.

    Raises:
        UserError: The file is missing, damaged, not one of `save_weights`, or holds NaN or infinity.
    """
    try:
        with safe_open(file, "pt") as opened:
            metadata = opened.metadata() or {}
            state = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        card = read_card(metadata[KEY])
    except FileNotFoundError:
        raise UserError(f"no such file: {file}; a run writes its weights when it finishes") from None
    except KeyError:
        raise UserError(f"{file} does not say what model it holds; it was not written by dms_fastai") from None
    except (OSError, SafetensorError, ValueError, RuntimeError) as error:
        raise _unreadable(file, error) from None
    try:
        with torch.device("meta"):  # shapes alone: whatever the card asks for takes no memory
            _compare(card.build(), state)
        model = card.build()
        model.load_state_dict(
            {name: value.to(torch.float32) if value.is_floating_point() else value for name, value in state.items()}
        )
        if not all_finite(model):
            raise ValueError("its weights are NaN or infinite")
    except Exception as error:  # an architecture may raise anything
        raise _unreadable(file, error) from None
    return model, card


def card_in(file: Path) -> ModelCard | None:
    """The card in a .safetensors file, whose tensors are not read; None if another program wrote the file.

    Raises:
        UserError: The file or the card is damaged.
    """
    try:
        with safe_open(file, "pt") as opened:
            metadata = opened.metadata() or {}
        return read_card(metadata[KEY]) if KEY in metadata else None
    except (OSError, SafetensorError, ValueError, RuntimeError) as error:
        raise _unreadable(file, error) from None


def all_finite(model: nn.Module) -> bool:
    """Whether every weight and statistic is a finite number; one wait for the device."""
    values = (t for t in model.state_dict().values() if isinstance(t, torch.Tensor) and not t.is_quantized)
    floats = [t.detach() for t in values if t.is_floating_point() and t.numel()]
    return bool(torch.stack(torch._foreach_norm(floats, float("inf"))).isfinite().all()) if floats else True


def _compare(model: nn.Module, state: dict[str, torch.Tensor]) -> None:
    """Raise a ValueError where a state is another model's."""
    ours, theirs = ({name: tuple(v.shape) for name, v in tensors.items()} for tensors in (model.state_dict(), state))
    for name in sorted(ours.keys() | theirs.keys()):
        if ours.get(name) != theirs.get(name):
            raise ValueError(f"{name} is {theirs.get(name)} in the file and {ours.get(name)} in the model of its card")


def _unreadable(file: Path, error: Exception) -> UserError:
    """The error for a file of weights, with what to do about it."""
    then = "train it again with --restart"
    if isinstance(error, UnregisteredError):
        then = "if it is your own, import the module that registers it, in a command by DMS_FASTAI_IMPORT"
    return UserError(f"{file} cannot be loaded ({reason_of(error)}); {then}")


def shipped_weights(name: str) -> Path | None:
    """The weights that come with this package for a timm entry, such as "dmsresnet": their file; None if none do."""
    cfg = timm.get_pretrained_cfg(name) if timm.is_model(name) and "." not in name else None
    return Path(cfg.file) if cfg is not None and cfg.file else None
