"""An early end of training that no longer makes the network better."""

from typing import Any, Literal

from fastai.callback.core import CancelFitException
from fastai.callback.tracker import TrackerCallback

from ..settings import Count, checked
from ..training.parts import order_of

__all__ = ["EarlyStopping"]


@checked
class EarlyStopping(TrackerCallback):
    """End the training once validation has not improved for a number of epochs.

    fastai's `EarlyStoppingCallback`, whose count survives a resume. The weights are those of the last epoch. The
    schedule is not shortened, so that a network that stops early has not seen the small learning rates of its end.
    """

    order = order_of("early_stopping")
    stopped = False
    saved: dict[str, Any] | None = None

    def __init__(self, patience: Count = 10, monitor: Literal["loss", "accuracy"] = "loss"):
        """
        Args:
            patience: Epochs without an improvement after which training ends.
            monitor: What is to improve in validation.

        Raises:
            UserError: A value out of range.
        """
        super().__init__("valid_loss" if monitor == "loss" else monitor)
        self.patience = patience

    def before_fit(self) -> None:
        super().before_fit()
        self.stopped, self.waited = False, 0
        if self.saved is not None:
            self.best, self.waited, self.saved = self.saved["best"], self.saved["waited"], None

    def after_epoch(self) -> None:
        super().after_epoch()
        self.waited = 0 if self.new_best else self.waited + 1
        if self.waited >= self.patience:
            self.stopped = True
            raise CancelFitException

    def state(self) -> dict[str, Any]:
        """What `restore` needs to go on counting."""
        return {"best": float(self.best), "waited": self.waited}

    def restore(self, saved: dict[str, Any]) -> None:
        """Have the next fit resume with a saved count."""
        self.saved = saved
