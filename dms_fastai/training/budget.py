"""How long a training may take: batch size, epochs and network are then chosen to fit."""

from dataclasses import dataclass

from ..settings import Positive, checked

__all__ = ["Budget"]


@checked
@dataclass(frozen=True)
class Budget:
    """The time in which a student and its teacher, if that is trained, too, are to be trained.

    Attributes:
        minutes: Minutes for the two together, for each seed.
        fitted: Whether the recipe has what was chosen already.
    """

    minutes: Positive = 5.0
    fitted: bool = False
