"""Groups of parameters, body and head, which a Learner freezes and trains at rates of their own."""

from torch import nn

__all__ = ["body_and_head", "classifiers"]


def classifiers(network: nn.Module) -> list[nn.Module]:
    """The modules that give a timm network's logits, mostly one; none if the network does not say which."""
    found = network.get_classifier() if hasattr(network, "get_classifier") else None
    several = found if isinstance(found, (tuple, list)) else [found]
    return [module for module in several if isinstance(module, nn.Module)]


def body_and_head(network: nn.Module) -> list[list[nn.Parameter]]:
    """A splitter for a Learner: all parameters, in two groups of which the classifier is the last.

    One group if the network does not say what its classifier is. Parameters that need no gradient are among them: they
    may be frozen for now.
    """
    head = {id(p) for module in classifiers(network) for p in module.parameters()}
    groups = [[p for p in network.parameters() if (id(p) in head) is last] for last in (False, True)]
    return [group for group in groups if group]
