"""Trained weights to begin from: where they are, which images they expect, and how they get into a fresh network."""

import hashlib
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path

import timm
import torch
from torch import Tensor, nn

from ..data.stored import CHANNELS
from ..errors import UserError
from ..models.groups import classifiers
from ..models.prune import as_narrow_as
from ..models.weights import card_in, load_weights
from .load import find_file
from .pretrained import pretrained_cfg, timm_model

__all__ = ["Expected", "begin_from", "digest_of", "expected_by", "origin_of"]

STATES = (".pth", ".pt", ".bin", ".tar")  # files of torch.save; Hugging Face's are .bin, timm's may be .pth.tar

State = dict[str, Tensor]


@dataclass(frozen=True)
class Expected:
    """The images that trained weights expect.

    Attributes:
        mean, std: What pixels (0...1) were normalised with, a value for each channel.
        size: Height and width of the images that they were trained on, in pixels.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    size: int


def expected_by(source: str, arch: str) -> Expected:
    """The images that weights expect, without reading them: as their card says or, without a card, timm's for `arch`.

    Args:
        source, arch: As in `begin_from`. A file that is not there is no error here.

    Raises:
        UserError: The file is damaged, or `arch` has no weights of its tag.
    """
    file = None if source == "timm" else _file(source)
    card = card_in(file) if file is not None and file.suffix == ".safetensors" and file.is_file() else None
    if card is not None:
        return Expected(tuple(card.mean), tuple(card.std), max(card.shape[1:]))
    cfg = pretrained_cfg(arch)
    return Expected(tuple(cfg.mean), tuple(cfg.std), max(cfg.input_size[1:]))


def origin_of(source: str, arch: str) -> str:
    """What to call weights in a run's facts: "timm:NAME.TAG", or the source itself."""
    if source != "timm":
        return source
    tag = pretrained_cfg(arch).tag
    return f"timm:{arch.split('.')[0]}" + (f".{tag}" if tag else "")


def digest_of(source: str) -> str | None:
    """A hash of the file of weights that a source stands for; None if there is none, as for "timm"."""
    file = None if source == "timm" else _file(source)
    if file is None or not file.is_file():
        return None
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()[:16]


def begin_from(model: nn.Module, source: str, arch: str) -> None:
    """Put trained weights into a fresh model; a classifier of another size begins anew. Runs no code from a file.

    It begins with small weights, as `torch.nn.Linear` does. Some networks of timm have a classifier of a few classes
    begin with weights so large that its logits drown what the body knows.

    Args:
        model: Of the architecture `arch`. Where its blocks are narrower inside than those of this package's weights, it
            gets their strongest filters.
        source: "timm" for timm's pretrained weights; a run's folder; or a file: a .safetensors, or a .pth or .pt with
            tensors alone, under the names that timm has or, as far as timm converts them, others have. If the weights
            are of another size of images, a table of positions is resampled.
        arch: Name of the timm entry.

    Raises:
        UserError: There are no such weights, they are damaged or NaN, they need code, or they are another network's.
    """
    state, ours = _for_channels(_adapted(_state(source, arch, model), model), arch, model), model.state_dict()
    if other := _differing(state, model):
        theirs, own = _shape(state, other[0]), _shape(ours, other[0])
        raise UserError(
            f"the weights at {source} are of another network than {arch}: {other[0]} is {theirs or 'missing'} there "
            f"and {own or 'missing'} here; give {_what_they_are_of(source, arch)}"
        )
    fitting = {name: state[name] for name in ours if _shape(state, name) == _shape(ours, name)}
    model.load_state_dict(fitting, strict=False)
    for head in classifiers(model):
        if _is_fresh(head, fitting, model):
            head.reset_parameters()


def _is_fresh(head: nn.Module, fitting: State, model: nn.Module) -> bool:
    """Whether a linear classifier of the model has got none of the weights that fit."""
    name = next(name for name, module in model.named_modules() if module is head)
    return isinstance(head, nn.Linear) and f"{name}.weight" not in fitting


def _file(source: str) -> Path | None:
    """The file of weights that a source stands for; None if it stands for none."""
    path = Path(source).expanduser()
    if path.suffix in STATES:
        return path
    found = find_file(path, trust=False)
    return found if found is not None and found.suffix == ".safetensors" else None


def _what_they_are_of(source: str, arch: str) -> str:
    """What to give so that the network is the one that weights are of."""
    file = None if source == "timm" else _file(source)
    card = card_in(file) if file is not None and file.suffix == ".safetensors" else None
    if card is not None and card.arch != arch:
        return f"--arch {card.arch}"
    if card is None or "mid_widths" not in card.args:
        return "--arch the network that they are of"
    return f"--set model.args.mid_widths='{card.args['mid_widths']}', for they are of a pruned one"


def _state(source: str, arch: str, model: nn.Module) -> State:
    if source == "timm":
        return timm_model(arch, "give it as --set model.weights=FILE").state_dict()
    file = _file(source)
    if file is None:
        raise UserError(
            f"model.weights is {source!r}; give 'timm', a run's folder, or a .safetensors, .pth or .pt file"
        )
    if not file.is_file():
        raise UserError(f"no such file: {file}; a run writes its weights when it finishes")
    if file.suffix == ".safetensors" and card_in(file) is not None:
        return as_narrow_as(model, load_weights(file)[0]).state_dict()
    return _foreign(file)


def _foreign(file: Path) -> State:
    """The state in a file that another program wrote, in float32."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's, of how a pickle was written
            state = timm.models.load_state_dict(str(file))
    except Exception:  # a damaged file may raise anything
        if calls := _calls(file):
            raise UserError(
                f"{file} is a pickle that would run code ({', '.join(calls[:3])}); where you trust it, save the "
                f"tensors alone: torch.save(model.state_dict(), FILE)"
            ) from None
        raise UserError(
            f"{file} cannot be loaded as weights: it is damaged, or holds more than tensors; save these alone: "
            f"torch.save(model.state_dict(), FILE)"
        ) from None
    if not state or not all(isinstance(value, Tensor) for value in state.values()):
        found = ", ".join(map(str, list(state)[:4])) or "nothing"
        raise UserError(
            f"{file} holds not weights alone, but {found}; save them with torch.save(model.state_dict(), FILE)"
        )
    state = {name: value.float() if value.is_floating_point() else value for name, value in state.items()}
    if not all(value.isfinite().all() for value in state.values() if value.is_floating_point()):
        raise UserError(f"the weights at {file} are NaN or infinite; take others")
    return state


def _calls(file: Path) -> list[str]:
    """What a pickle would call, beside what tensors need."""
    try:
        return sorted(torch.serialization.get_unsafe_globals_in_checkpoint(str(file)))
    except Exception:  # it is no pickle
        return []


def _adapted(state: State, model: nn.Module) -> State:
    """A state under the model's names, its table of positions resampled to the model's size, where timm knows how."""
    adapt = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)  # timm's name for it
    if adapt is None or not _differing(state, model):
        return state
    try:
        return adapt(dict(state), model)
    except Exception:  # as of weights of another network
        return state


def _for_channels(state: State, arch: str, model: nn.Module) -> State:
    """A state of images in colour for a network of another number of channels, as timm converts it; others stay."""
    first = pretrained_cfg(arch).first_conv
    name = f"{first}.weight"
    if not isinstance(first, str) or name not in state or (ours := model.state_dict().get(name)) is None:
        return state
    if ours.ndim != 4 or ours.shape[1] == state[name].shape[1] or state[name].shape[1] != CHANNELS:
        return state
    return {**state, name: timm.models.adapt_input_conv(ours.shape[1], state[name])}


def _differing(state: State, model: nn.Module) -> list[str]:
    """The names, outside the classifier, under which state and model have other tensors."""
    ours, heads = model.state_dict(), classifiers(model)
    head = [name for name, module in model.named_modules() if module in heads]
    other = sorted(name for name in ours.keys() | state.keys() if _shape(ours, name) != _shape(state, name))
    counters = ("num_batches_tracked",)  # which old files do not have
    return [name for name in other if name.rpartition(".")[0] not in head and not name.endswith(counters)]


def _shape(state: State, name: str) -> tuple[int, ...] | None:
    return tuple(state[name].shape) if name in state else None
