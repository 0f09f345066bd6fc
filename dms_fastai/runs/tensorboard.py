"""A run's epochs for TensorBoard."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastai.callback.core import Callback

from ..names import check_tensorboard
from .history import History

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

__all__ = ["TensorBoard", "write_epochs"]


class TensorBoard(Callback):
    """Write what each epoch's row of the history says as TensorBoard's scalars.

    A resumed run writes a further file with all epochs; what an earlier file has is not shown any more.
    """

    order = 56  # after the history

    def __init__(self, folder: Path, history: History):
        """
        Args:
            folder: Where the files go.
            history: The history of the same fit.

        Raises:
            UserError: TensorBoard is not installed.
        """
        check_tensorboard()
        self.folder, self.history = folder, history

    def before_fit(self) -> None:
        self.writer = _writer(self.folder)
        for row in self.history.rows:
            _write(self.writer, row)

    def after_epoch(self) -> None:
        _write(self.writer, self.history.rows[-1])
        self.writer.flush()

    def after_fit(self) -> None:
        self.writer.close()


def write_epochs(rows: Iterable[Mapping[str, Any]], folder: Path) -> None:
    """Write the epochs of a run that has finished.

    Raises:
        UserError: TensorBoard is not installed.
    """
    check_tensorboard()
    with _writer(folder) as writer:
        for row in rows:
            _write(writer, row)


def _writer(folder: Path) -> "SummaryWriter":
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(folder), purge_step=1)


def _write(writer: "SummaryWriter", row: Mapping[str, Any]) -> None:
    for name, value in row.items():
        split, _, rest = name.partition("_")
        tag = f"{rest}/{split}" if split in ("train", "valid") else name
        if name != "epoch" and value is not None:
            writer.add_scalar(tag, value, int(row["epoch"]))
