"""What pruning leaves of a network, before it is trained on."""

from collections.abc import Iterator
from itertools import islice

from torch import nn

from ..callbacks.bf16 import fast_kernels
from ..data.augment import at_size
from ..learner import DMSLearner
from ..models.macs import macs
from ..models.prune import reestimate_batch_norms
from ..models.weights import load_weights
from ..random_states import get_random_states, set_random_states
from ..trained import find_file

__all__ = ["after_pruning"]

BATCHES = 16  # of training images, for the batch norms


def after_pruning(learn: DMSLearner) -> Iterator[str]:
    """Re-estimate the batch norms of a pruned network on training images, and say what is left of it, in lines.

    Without this, a pruned network guesses. Training does not need it, for it takes each batch's own statistics.
    """
    recipe, shape = learn.recipe, learn.dls.train_ds.shape
    if recipe.prune.from_scratch:
        yield f"{_amount(learn.model, shape)}, with fresh weights"
        return
    dense, _ = load_weights(find_file(recipe.model.weights, trust=False))
    share = macs(learn.model, shape) / macs(dense, shape)
    yield f"{_amount(learn.model, shape)}, {100 * share:.1f} % of the MACs; before, {_amount(dense, shape)}"
    states, device = get_random_states(), learn.dls.device
    learn.model.to(device)
    with fast_kernels(device):
        batches = (at_size(batch[0], shape[1:]) for batch in islice(learn.dls.train, BATCHES))  # a teacher's are larger
        reestimate_batch_norms(learn.model, batches)
        with learn.no_bar(), learn.no_logging():
            _, accuracy, *_ = learn.validate()
    set_random_states(states)
    what = "agreement with the teacher" if learn.dls.valid_ds.by_teacher else "accuracy"
    yield f"{what} {100 * accuracy:.2f} % after pruning, with batch norms re-estimated and before any training"


def _amount(network: nn.Module, shape: tuple[int, ...]) -> str:
    parameters = sum(p.numel() for p in network.parameters())
    return f"{macs(network, shape) / 1e6:,.4g} M MACs and {parameters:,} parameters"
