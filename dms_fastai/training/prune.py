"""What share of a trained network is to be left by pruning."""

from dataclasses import dataclass

from ..settings import Fraction, checked

__all__ = ["Prune"]


@checked
@dataclass(frozen=True)
class Prune:
    """Train the network that `model.weights` holds with narrower blocks, which `model.args.mid_widths` then lists.

    Attributes:
        macs: Multiply-accumulates that are left, as a share of those of the network.
        from_scratch: Whether to begin with fresh weights, for comparison: the network has the same blocks.
    """

    macs: Fraction = 0.5
    from_scratch: bool = False
