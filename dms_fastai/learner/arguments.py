"""Arguments of a Learner beside a recipe: which of its parts they take the place of, and which do not go together."""

from dataclasses import replace
from numbers import Real
from typing import Any

import torch
from fastai.callback.mixup import MixHandler
from torch import nn

from ..errors import UserError
from ..recipes import Recipe, all_keys, flat
from ..training.losses import DMSLoss

__all__ = [
    "check_kinds",
    "check_rate",
    "listed",
    "refuse_stock_mixers",
    "refuse_two_of_one",
    "refuse_without_effect",
    "with_own",
]

# Tables and keys of a recipe that an argument takes the place of.
REPLACES = {
    "arch": ("model",),  # a module; a name is one of the recipe's settings
    "pretrained": ("model.weights",),
    "loss_func": ("loss",),
    "opt_func": ("optimizer", "lookahead"),
    "lr": ("optimizer.lr",),
    "wd": ("optimizer.weight_decay",),
}
# Tables of a recipe that a Learner has no use for, and what to do.
LOADED = "the DataLoaders have their own; give {name}={value!r} to load_data"
WITHOUT_EFFECT = {"data": LOADED, "augment": LOADED, "budget": "only a command fits a recipe to a budget; leave it out"}
NAMES = {"batch_size": "bs"}  # of load_data's arguments, where they are not those of the recipe


def check_kinds(arch: Any, loss_func: Any, opt_func: Any) -> None:
    """Raise a UserError for what looks like a network, a loss or an optimiser of fastai's, and is none."""
    if arch is not None and not isinstance(arch, (str, nn.Module)):
        raise UserError(f"arch is {_named(arch)}; give the name of a timm architecture, or a module that is built")
    if isinstance(loss_func, type):
        raise UserError(f"loss_func is {_named(loss_func)}; give an instance, {loss_func.__name__}()")
    kind = opt_func if isinstance(opt_func, type) else type(opt_func)
    if issubclass(kind, torch.optim.Optimizer):
        wrapped = f"partial(OptimWrapper, opt=torch.optim.{kind.__name__})"
        raise UserError(f"opt_func is torch's {kind.__name__}; give one of fastai's, or {wrapped}")


def refuse_two_of_one(given: dict[str, Any], settings: dict[str, Any] | None) -> None:
    """Raise a UserError if an argument takes the place of a key of `settings`, or of another argument.

    Args:
        given: Arguments by the names in `REPLACES`; None if not given.
        settings: Values by dotted key.
    """
    if given["arch"] is not None and given["pretrained"]:
        raise UserError("pretrained is for an architecture by its name; a module of your own has its weights already")
    for name, places in REPLACES.items():
        for key in settings or {}:
            if given[name] is not None and any(f"{key}.".startswith(f"{place}.") for place in places):
                raise UserError(f"{name} takes the place of {key!r} in settings; leave out one of the two")
    if isinstance(given["loss_func"], DMSLoss):  # which has alpha, T and the rest of its own
        for key in flat(settings or {}):
            if key.startswith("distill.") and key != "distill.size":
                raise UserError(f"loss_func takes the place of {key!r} in settings; give it to DMSLoss")


def refuse_without_effect(settings: dict[str, Any] | None) -> None:
    """Raise a UserError if a key of `settings`, all of which a recipe has, would change nothing in a Learner."""
    for key, value in flat(settings or {}).items():
        table, _, name = key.partition(".")
        if table in WITHOUT_EFFECT and key in all_keys():  # others are older names of what is elsewhere now
            why = WITHOUT_EFFECT[table].format(name=NAMES.get(name, name), value=value)
            raise UserError(f"{key} is {value!r} in settings, which has no effect here: {why}")


def with_own(recipe: Recipe, network: nn.Module | None, lr: float | slice | None, wd: float | None) -> Recipe:
    """The recipe with what the caller has in place of its own: a network's class, learning rate and weight decay.

    Raises:
        UserError: The network has no parameters to train, or the recipe begins from weights of another; a value out of
            range.
    """
    if network is not None:
        name = type(network).__name__
        if recipe.model.weights is not None:
            raise UserError(
                f"recipe {recipe.name!r} begins from {recipe.model.weights}, and {name} has its own weights"
            )
        if not any(p.requires_grad for p in network.parameters()):
            raise UserError(f"{name} has no parameters to train")
        recipe = replace(recipe, model=replace(recipe.model, name=name, drop_rate=0.0, args=None))
    rates = [] if lr is None else check_rate(lr)
    if wd is not None and not (_is_number(wd) and wd >= 0):
        raise UserError(f"wd is {wd!r}; it must be a number, at least 0")
    own = {"lr": float(rates[-1])} if rates else {}
    own |= {} if wd is None else {"weight_decay": float(wd)}
    return replace(recipe, optimizer=replace(recipe.optimizer, **own)) if own else recipe


def refuse_stock_mixers(cbs: list) -> None:
    """Raise a UserError if fastai's own MixUp or CutMix is given: it swaps the loss for one that knows no teacher."""
    for cb in cbs:
        kind = cb if isinstance(cb, type) else type(cb)
        if issubclass(kind, MixHandler):
            raise UserError(f"fastai's own {kind.__name__} swaps the loss; take {kind.__name__} of dms_fastai")


def check_rate(lr: float | slice) -> list[float]:
    """The lowest and the highest of a slice of learning rates; a single rate alone.

    Raises:
        UserError: That is no learning rate.
    """
    if not isinstance(lr, slice):
        rates = [lr]
    elif lr.stop is None:
        raise UserError(f"lr is {lr}; a slice needs the rate of the last group, such as slice(1e-4, 1e-2)")
    else:
        rates = [rate for rate in (lr.start, lr.stop) if rate is not None]
    if not all(_is_number(rate) and rate > 0 for rate in rates):
        raise UserError(f"lr is {lr!r}; it must be a number above 0, or a slice of two")
    return rates


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def listed(cbs: Any) -> list:
    """Callbacks or metrics, one, several or None, as a list."""
    return [] if cbs is None else list(cbs) if isinstance(cbs, (list, tuple)) or hasattr(cbs, "map") else [cbs]


def _named(thing: Any) -> str:
    kind = "class" if isinstance(thing, type) else type(thing).__name__
    return f"the {kind} {getattr(thing, '__name__', thing)}"
