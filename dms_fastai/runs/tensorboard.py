"""A run's epochs for TensorBoard."""

from pathlib import Path
from typing import Any

from fastai.callback.core import Callback

from ..errors import UserError
from .history import History

__all__ = ["TensorBoard"]


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
        try:
            import tensorboard  # noqa: F401
        except ImportError:
            raise UserError("--tensorboard needs a package that is not installed: pip install tensorboard") from None
        self.folder, self.history = folder, history

    def before_fit(self) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(self.folder), purge_step=1)
        for row in self.history.rows:
            self.write(row)

    def after_epoch(self) -> None:
        self.write(self.history.rows[-1])
        self.writer.flush()

    def write(self, row: dict[str, Any]) -> None:
        for name, value in row.items():
            split, _, rest = name.partition("_")
            tag = f"{rest}/{split}" if split in ("train", "valid") else name
            if name != "epoch" and value is not None:
                self.writer.add_scalar(tag, value, row["epoch"])

    def after_fit(self) -> None:
        self.writer.close()
