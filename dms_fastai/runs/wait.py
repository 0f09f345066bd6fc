"""Wait for what another process trains."""

import time
from collections.abc import Callable

from ..errors import TryAgainError, UserError
from ..run_folder import RunFolder

__all__ = ["Patience", "UnfinishedError", "wait_for"]

LOOK, SAY = 0.5, 60.0  # seconds between two looks, and between two lines about what has changed


class UnfinishedError(UserError):
    """A teacher has not finished, and this command is not to train it.

    Attributes:
        folder: Of the teacher's run.
    """

    def __init__(self, folder: RunFolder):
        super().__init__(
            f"the teacher in {folder.path} has not finished; train it first, or add --wait if another process does"
        )
        self.folder = folder


class Patience:
    """Called again and again with what is waited for, it says so, and lets a moment pass."""

    def __init__(self, say: Callable[[str], None], deadline: float | None = None):
        """
        Args:
            say: Prints a line.
            deadline: On the clock of `time.monotonic`; None: there is none.
        """
        self.say, self.deadline = say, deadline
        self.said, self.when = "", 0.0

    def __call__(self, what: str) -> None:
        """Wait for a moment.

        Raises:
            TryAgainError: The deadline has passed.
        """
        now = time.monotonic()
        if self.deadline is not None and now > self.deadline:
            raise TryAgainError(f"time limit: {what}; the same command goes on waiting")
        if not self.said or (what != self.said and now - self.when > SAY):
            self.say(f"waiting: {what}")
            self.said, self.when = what, now
        left = LOOK if self.deadline is None else self.deadline - now
        time.sleep(min(LOOK, max(left, 0.01)))


def wait_for(folder: RunFolder, patience: Patience) -> None:
    """Return when a run has finished.

    Raises:
        TryAgainError: The deadline has passed.
    """
    while not folder.finished:
        patience(f"{folder.path} has not finished{_progress(folder)}")


def _progress(folder: RunFolder) -> str:
    try:
        facts = folder.facts()
    except UserError:
        return ""
    return f" ({facts.status}, epoch {facts.epochs_done}/{facts.epochs})"
