"""The weights of a run's best epoch, kept beside those of its last one."""

from pathlib import Path

from fastai.callback.core import Callback
from safetensors import SafetensorError, safe_open

from ..models.weights import save_weights
from ..run_folder import RunFolder
from .history import History

__all__ = ["KeepBest", "describe_best"]

CHOSEN = "chosen on the images that it was validated on"


class KeepBest(Callback):
    """Write the weights of every epoch whose validation accuracy is the highest so far.

    The file says in its header which epoch that was, how accurate, and how it was chosen. An epoch is compared with all
    before it, those without this callback among them.
    """

    order = 56  # before the checkpoint (70): a resumed run never skips an epoch that was to be written

    def __init__(self, folder: RunFolder, history: History):
        super().__init__()
        self.file, self.history = folder.best, history

    def before_fit(self) -> None:
        before = [row["valid_accuracy"] for row in self.history.rows]
        self.highest = max([float(_notes(self.file).get("valid_accuracy", "-inf")), *before])

    def after_epoch(self) -> None:
        recorder = self.learn.recorder
        recorded = dict(zip(recorder.metric_names[1:], recorder.values[-1], strict=False))
        accuracy = recorded["valid_accuracy"]
        if accuracy > self.highest:
            self.highest = accuracy
            notes = {"epoch": str(self.learn.epoch + 1), "valid_accuracy": repr(accuracy), "chosen": CHOSEN}
            save_weights(self.learn.model, self.learn.card, self.file, notes=notes)


def describe_best(folder: RunFolder) -> str:
    """One line about the weights of a run's best epoch."""
    notes = _notes(folder.best)
    if not notes:
        return f"none in {folder.path}, whose best epoch was trained without --keep-best; --restart trains it again"
    return f"{folder.best}, epoch {notes['epoch']}, {100 * float(notes['valid_accuracy']):.2f} %: {notes['chosen']}"


def _notes(file: Path) -> dict[str, str]:
    """What the header of a file of `KeepBest` says; nothing if there is no sound file."""
    try:
        with safe_open(file, "pt") as opened:
            return opened.metadata() or {}
    except (OSError, SafetensorError):
        return {}
