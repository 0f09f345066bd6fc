"""A fixed number of views of each image: the epochs' batches come again, whatever the seed of the run."""

from typing import Any

from ..random_states import get_random_states, seed_everything, set_random_states
from ..settings import Count, checked
from ..training.parts import order_of
from .releasing import Releasing
from .twins import refuse_twin

__all__ = ["FixedViews"]

STEPS = 10**6  # more than an epoch has: the seed of a step is view * STEPS + step


@checked
class FixedViews(Releasing):
    """Draw what makes a batch from a seed of its own: order, crops and whatever changes or mixes images.

    Epoch e has the batches of epoch e - count, and those of any other run with the same data and augmentation. So a
    teacher needs to be asked about each of them only once: `TeacherDistill` keeps what it says. What the network draws,
    as in dropout, is drawn as usual.
    """

    order, run_valid = order_of("fixed_views"), False
    network_states: dict[str, Any] | None = None
    saved: dict[str, Any] | None = None
    _stateattrs = ("network_states", "saved")

    def __init__(self, count: Count = 8):
        """
        Args:
            count: How many epochs have batches of their own.

        Raises:
            UserError: A value out of range.
        """
        super().__init__()
        self.count = count

    @property
    def view(self) -> int:
        """Which of the views the epoch has, from 0."""
        return self.learn.epoch % self.count

    def before_train(self) -> None:
        refuse_twin(self)
        if self.network_states is None:
            self.network_states, self.saved = self.saved or get_random_states(), None
        loader = self.learn.dls.train
        loader.passes = self.view  # which images are mirrored, where that alternates
        if hasattr(loader, "rng"):  # from which fastai's own loaders draw the order
            loader.rng.seed(self.view)
        self.seed(step=0)

    def before_batch(self) -> None:
        set_random_states(self.network_states)

    def after_batch(self) -> None:
        self.network_states = get_random_states()
        self.seed(self.learn.iter + 1)

    def after_train(self) -> None:
        self.release()

    def seed(self, step: int) -> None:
        """Seed what makes the batch of a step of this epoch; step 0 is also the order of the images."""
        seed_everything(self.view * STEPS + step)

    def release(self) -> None:
        """Go on with the network's random states."""
        if self.network_states is not None:
            set_random_states(self.network_states)
            self.network_states = None

    def state(self) -> dict[str, Any] | None:
        """What `restore` needs to resume the network's draws in the middle of an epoch."""
        return self.network_states or self.saved

    def restore(self, saved: dict[str, Any] | None) -> None:
        """Have the next fit resume with saved random states."""
        self.saved = saved
