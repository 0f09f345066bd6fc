"""Networks of timm with their pretrained weights: from timm's cache or, once, from the network."""

import socket
import urllib.request
from urllib.parse import urlsplit

import timm
from huggingface_hub import constants, try_to_load_from_cache
from timm.models import PretrainedCfg
from torch import nn

from ..errors import UserError, reason_of, unknown

__all__ = ["pretrained_cfg", "timm_model"]

FILES = ("model.safetensors", "pytorch_model.bin")  # that timm looks for on the hub, in this order


def pretrained_cfg(name: str) -> PretrainedCfg:
    """What timm knows of an architecture's pretrained weights; its defaults, if it knows nothing.

    Args:
        name: NAME or NAME.TAG.

    Raises:
        UserError: There is no such architecture, or it has no weights of this tag.
    """
    if not timm.is_model(name.split(".")[0]):
        raise unknown("timm model", name, timm.list_models())
    try:
        return timm.get_pretrained_cfg(name) or PretrainedCfg()
    except RuntimeError as error:  # no such tag
        raise UserError(f"timm:{name}: {error}") from None


def timm_model(name: str, then: str | None = None) -> nn.Module:
    """A network with its pretrained weights.

    Args:
        name: NAME or NAME.TAG.
        then: What to do with a file of weights that was downloaded elsewhere; the error without a network ends in it.

    Raises:
        UserError: There is no such network, it has no weights, or they are not here and cannot be downloaded.
    """
    cfg = pretrained_cfg(name)
    if not cfg.has_weights:
        raise UserError(f"timm has no weights of {name!r}; take a network of timm.list_models(pretrained=True)")
    files = [cfg.hf_hub_filename] if cfg.hf_hub_filename else FILES
    there = (try_to_load_from_cache(cfg.hf_hub_id, file) for file in files) if cfg.hf_hub_id else ()
    cached = next((file for file in there if isinstance(file, str)), None)
    more = {}
    try:
        if cfg.hf_hub_id and not cfg.file and _unreachable(constants.ENDPOINT):  # the hub's client tries for a minute
            if cached is None:
                raise OSError(f"{constants.ENDPOINT} cannot be reached")
            more = {"pretrained_cfg_overlay": {"file": cached}}
        return timm.create_model(name, pretrained=True, **more)
    except Exception as error:  # the hub's client may raise whatever its libraries raise
        address = f"{constants.ENDPOINT}/{cfg.hf_hub_id}/resolve/main/{files[0]}" if cfg.hf_hub_id else cfg.url
        way = f"download {address} elsewhere, and {then}" if then else f"copy a cache with them to {constants.HF_HOME}"
        raise UserError(f"timm's weights of {name!r} are not at hand ({reason_of(error)}); {way}") from None


def _unreachable(address: str) -> bool:
    """Whether there is no network to an address: its name has no number, and no proxy would ask for it."""
    if urllib.request.getproxies():
        return False
    try:
        return not socket.getaddrinfo(urlsplit(address).hostname, None)
    except OSError:
        return True
