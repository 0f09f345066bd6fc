"""Callbacks of which a Learner can have one."""

from fastai.callback.core import Callback

from ..errors import UserError

__all__ = ["refuse_twin"]


def refuse_twin(callback: Callback) -> None:
    """Refuse another callback of the same kind beside this one, in whose work it would be.

    Raises:
        UserError: The Learner has two.
    """
    kind = type(callback)
    if sum(type(other) is kind for other in callback.learn.cbs) > 1:
        raise UserError(f"this Learner has {kind.__name__} twice; remove one: learn.cbs shows all, the recipe's, too")
