"""Stop on request: the current step is finished and checkpointed, so that the run can be resumed."""

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from fastai.callback.core import Callback, CancelFitException

from .. import processes
from .checkpoint import Checkpoint

__all__ = ["SIGNALS", "TIME_LIMIT", "TO_COMPILE", "StopOnRequest", "heeded", "name_of"]

TIME_LIMIT = "time limit"
LOOK = 0.5  # seconds after which several processes ask one another whether to stop
TO_COMPILE = 120.0  # seconds that the first step of a compiled fit may take; it cannot be stopped in the middle
BEGAN = time.monotonic()  # of the process, nearly
# Ctrl-C, a terminal that is closed, and what schedulers send before they kill; Windows has the first three alone.
NAMES = ("SIGINT", "SIGTERM", "SIGBREAK", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGXCPU")
SIGNALS = [getattr(signal, name) for name in NAMES if hasattr(signal, name)]


def name_of(number: int) -> str:
    """A signal's name; Ctrl-Break goes by that of Ctrl-C."""
    name = signal.Signals(number).name
    return "SIGINT" if name == "SIGBREAK" else name


def heeded() -> list[int]:
    """The signals that ask to stop: not those that whoever began this process has it ignore, as nohup does.

    SIGINT is heeded all the same, which scripts have their commands in the background ignore: it is sent on purpose.
    """
    return [n for n in SIGNALS if n == signal.SIGINT or signal.getsignal(n) is not signal.SIG_IGN]


class StopOnRequest(Callback):
    """End training on one of the signals `heeded`, at a deadline or when the process is left alone, after a checkpoint.

    Use `listening` round fit. A second signal has its usual effect, at once. Several processes stop together, whichever
    of them is asked to; torchrun, which kills what does not end, sends them signals once more on its own account.
    """

    order = 75  # after the checkpoint

    def __init__(self, checkpoint: Checkpoint, deadline: float | None = None, parent: int | None = None):
        """
        Args:
            checkpoint: The callback that writes the checkpoints.
            deadline: A time on the clock of `time.monotonic`.
            parent: Number of the process that has begun this one, and would tell it to stop; None: nobody would.
        """
        super().__init__()
        self.checkpoint, self.deadline, self.parent = checkpoint, deadline, parent
        self.noted = self.reason = None  # why this process has been asked, and why all stop
        self.steps, self.next, self.looked = 0, 1, time.monotonic()

    @contextmanager
    def listening(self) -> Iterator["StopOnRequest"]:
        """Take signals as requests to stop; only a process's main thread can."""
        signals = heeded() if threading.current_thread() is threading.main_thread() else ()
        before = {number: signal.signal(number, self._note) for number in signals}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.noted = name_of(number)
        if processes.count() > 1:
            return
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)

    def asked(self) -> bool:
        """Whether to stop; several processes agree on it, so that all have to call this."""
        if self.noted is None and self.deadline is not None and time.monotonic() > self.deadline:
            self.noted = TIME_LIMIT
        if self.noted is None and self.parent is not None and os.getppid() != self.parent:
            self.noted = name_of(signal.SIGTERM)  # which it would have sent, had it not been killed
        self.agree()
        return self.reason is not None

    def agree(self) -> None:
        """Have all processes stop for the same reason, if there is one, and look again after as many steps."""
        if processes.count() == 1:
            self.reason = self.reason or self.noted
            return
        now = time.monotonic()
        seconds = (now - self.looked) / max(1, self.steps)
        told = processes.gathered((self.noted, max(1, int(LOOK / max(seconds, 1e-6)))))
        self.reason = next((reason for reason, _ in told if reason is not None), None)
        self.steps, self.next, self.looked = 0, min(steps for _, steps in told), now

    def before_fit(self) -> None:
        """Stop at once if compiling would take longer than there is time.

        Not with half of the time limit left: then the next process would have no more, and would stop here as well.
        """
        if self.deadline is None or not hasattr(self.learn, "torch_compile"):
            return
        left, limit = self.deadline - time.monotonic(), self.deadline - BEGAN
        short = left < min(TO_COMPILE, limit / 2) and bool(self.learn.torch_compile.worth_compiling())
        if any(processes.gathered(short)):
            self.noted = self.reason = TIME_LIMIT
            raise CancelFitException

    def after_batch(self) -> None:
        if not self.learn.training:
            return
        self.steps += 1
        if (processes.count() == 1 or self.steps >= self.next) and self.asked():
            self.checkpoint.save_step()
            raise CancelFitException

    def after_epoch(self) -> None:
        if self.asked() and self.learn.epoch + 1 < self.learn.n_epoch:
            self.checkpoint.save_epoch()
            raise CancelFitException
