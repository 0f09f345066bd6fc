"""Callbacks that change a Learner while it trains, and leave it as it was."""

from abc import ABC, abstractmethod

from fastai.callback.core import Callback
from fastai.learner import Learner

__all__ = ["Releasing"]


class Releasing(Callback, ABC):
    """A callback whose `release` undoes what it has changed, however a fit ends.

    It is called when a fit ends; before the next one, for fastai sends no event if an exception ended the last; and
    when the callback leaves its Learner, as fastai has those leave that were given to `fit`, after an exception, too.
    """

    def before_fit(self) -> None:
        self.release()

    def after_fit(self) -> None:
        self.release()

    @abstractmethod
    def release(self) -> None:
        """Leave the Learner as it was; there may be nothing to do."""

    @property
    def learn(self) -> Learner | None:
        return vars(self).get("learn")

    @learn.setter
    def learn(self, learn: Learner | None) -> None:
        if learn is None and self.learn is not None:
            self.release()
        vars(self)["learn"] = learn
