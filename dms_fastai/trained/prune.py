"""A recipe that prunes, with the network that results from it."""

from dataclasses import replace

from ..errors import UserError
from ..models.dmsresnet import DMSResNet
from ..models.prune import widths_within
from ..models.weights import load_weights
from ..recipes import Recipe
from .load import find_file

__all__ = ["pruned"]

OWN = ("drop_rate", "img_size", "mid_widths")  # arguments in a card that are not taken over from it


def pruned(recipe: Recipe) -> Recipe:
    """The recipe with the network that its [prune] leaves of `model.weights`; as it is if it says already, or has none.

    Raises:
        UserError: There are no weights, or not of one of this package's residual networks; or they cannot be pruned to
            such a share.
    """
    args, source = recipe.model.args or {}, recipe.model.weights
    if recipe.prune is None or "mid_widths" in args:
        return recipe
    if source is None:
        raise UserError(f"recipe {recipe.name!r} prunes a trained network; give model.weights, a finished run's folder")
    file = find_file(source, trust=False)
    if file is None or file.suffix != ".safetensors":
        raise UserError(f"{source} cannot be pruned; give a run's folder, or a .safetensors file of this package")
    network, card = load_weights(file)
    if not isinstance(network, DMSResNet):
        raise UserError(f"only this package's residual networks can be pruned; {source} holds a {card.arch}")
    args = {key: value for key, value in card.args.items() if key not in OWN} | args
    args["mid_widths"] = widths_within(network, recipe.prune.macs, card.shape)
    weights = None if recipe.prune.from_scratch else source
    return replace(recipe, model=replace(recipe.model, name=card.arch, args=args, weights=weights))
