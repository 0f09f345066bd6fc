"""A Learner whose events have little overhead."""

from collections.abc import Callable
from functools import partial
from typing import Any

from fastai.callback.core import Callback, event
from fastai.learner import Learner

__all__ = ["EventLearner"]

# The events of every batch; a callback may skip them in training or in validation.
EVENTS_OF_A_BATCH = {
    "before_batch", "after_pred", "after_loss", "before_backward", "after_cancel_backward", "after_backward",
    "before_step", "after_cancel_step", "after_step", "after_cancel_batch", "after_batch",
}  # fmt: skip
Listener = tuple[Callback, Callable[[], Any]]


class EventLearner(Learner):
    """A Learner that remembers which callbacks listen to which event of a batch.

    fastai sorts all callbacks and asks each of them, at every event. Here, the list of listeners is made again only
    when a callback is added or removed, and at every event outside a batch. Exceptions of callbacks arrive unchanged.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        self._listening: dict[str, list[Listener]] = {}
        super().__init__(*args, **kwargs)

    def __call__(self, event_name: str | list[str]) -> None:
        """Send an event, or several, to the callbacks that listen to it, in order."""
        for name in [event_name] if isinstance(event_name, str) else event_name:
            of_a_batch = name in EVENTS_OF_A_BATCH
            listeners = self._listening.get(name) if of_a_batch else None
            if listeners is None:
                listeners = self._listeners(name)
            part = "run_train" if self.training else "run_valid"
            for callback, method in listeners:
                if callback.run and (not of_a_batch or getattr(callback, part)):
                    method()
            if name == event.after_fit:
                for callback in self.cbs:
                    callback.run = True  # a callback is switched off for one fit only

    def _listeners(self, name: str) -> list[Listener]:
        if name not in EVENTS_OF_A_BATCH:
            self._listening.clear()  # a callback may have been changed by hand
        found = [(cb, _method(cb, name)) for cb in self.cbs.sorted("order") if _listens(cb, name)]
        self._listening[name] = found
        return found

    def add_cb(self, cb: Callback | type[Callback]) -> "EventLearner":
        self._listening.clear()
        return super().add_cb(cb)

    def remove_cb(self, cb: Callback | type[Callback]) -> "EventLearner":
        self._listening.clear()
        return super().remove_cb(cb)

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"_listening": {}}


def _listens(callback: Callback, name: str) -> bool:
    """Whether a callback has its own method for an event; `hasattr` of the instance would ask its Learner, too."""
    return hasattr(type(callback), name) or name in vars(callback) or type(callback).__call__ is not Callback.__call__


def _method(callback: Callback, name: str) -> Callable[[], Any]:
    """What to call for an event: the callback's method, or its `__call__` if that handles all events."""
    return getattr(callback, name) if type(callback).__call__ is Callback.__call__ else partial(callback, name)
