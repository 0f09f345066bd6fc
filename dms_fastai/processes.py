"""Several processes that train one network: how they join, and what they agree on.

torchrun starts them, and torch.distributed carries what they tell one another. Without torchrun there is one process,
which is the first, and to which all of this changes nothing. torch is imported only to join.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from .errors import TryAgainError, UserError

if TYPE_CHECKING:
    from torch import nn

__all__ = [
    "alone",
    "count",
    "first_to_tell",
    "from_first",
    "gathered",
    "in_order",
    "is_first",
    "join_processes",
    "leave",
    "lost_another",
    "rank",
    "replicated",
    "rows_of",
    "share",
    "started",
    "together",
]

VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # some schedulers set one of them, torchrun all
PATIENCE = timedelta(days=1)  # while the first one waits for a folder, or decodes images
GONE = ("Connection closed by peer", "Connection reset by peer", "Broken pipe")  # what gloo says of a process that died

_store: Any = None  # what the processes met at
_size, _rank, _alone = 1, 0, False


class OtherProcessError(UserError):
    """A UserError of another process, which tells it."""


class OtherTryAgainError(OtherProcessError, TryAgainError):
    """A TryAgainError of another process."""


def started() -> bool:
    """Whether torchrun has started this process beside others."""
    return all(name in os.environ for name in VARIABLES) and os.environ["WORLD_SIZE"] != "1"


def join_processes(device: str = "auto") -> int:
    """Join the processes that torchrun has started; each takes the GPU of its number. Without torchrun, do nothing.

    From then on, every `fit` of this package's Learners is one fit of all of them.

    Args:
        device: "cpu" leaves the GPUs alone.

    Returns:
        How many processes there are.

    Raises:
        UserError: There are more of them on this machine than GPUs, or they do not find one another.
    """
    global _store, _size, _rank
    if not started() or _store is not None:
        return _size
    import torch
    from torch import distributed

    if device != "cpu" and torch.cuda.is_available():
        local, gpus = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
        if local >= gpus:
            raise UserError(
                f"there are more processes than the {gpus} GPU{'s' * (gpus > 1)} of this machine; start torchrun with "
                f"--nproc-per-node {gpus}, or train with --device cpu"
            )
        torch.cuda.set_device(local)
    try:
        _store, _rank, _size = next(distributed.rendezvous("env://"))
        distributed.init_process_group(store=_store, rank=_rank, world_size=_size, timeout=PATIENCE)
    except (distributed.DistError, ValueError) as error:
        where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise UserError(f"the processes do not find one another at {where}: {error}") from None
    return _size


def leave() -> None:
    """End what `join_processes` began, when all have come to the end."""
    global _store, _size, _rank
    if _store is not None:
        from torch import distributed

        distributed.destroy_process_group()
        _store, _size, _rank = None, 1, 0


def count() -> int:
    """How many processes train together."""
    return 1 if _alone else _size


def rank() -> int:
    """The number of this process among them, from 0."""
    return 0 if _alone else _rank


def is_first() -> bool:
    """Whether this is the process that writes and shows: number 0, or the only one."""
    return _rank == 0


@contextmanager
def alone() -> Iterator[None]:
    """Until the block ends, this process does without the others, as if there were none."""
    global _alone
    before, _alone = _alone, True
    try:
        yield
    finally:
        _alone = before


def share(n: int) -> slice:
    """Which of `n` rows are this process's: all shares together are all rows in order, each once."""
    size, place = count(), rank()
    return slice(place * n // size, (place + 1) * n // size)


def rows_of(batch: int, size: int | None = None) -> int:
    """How many images of a batch each of `size` processes has; None: of those that train together.

    Raises:
        UserError: They cannot share it evenly.
    """
    size = count() if size is None else size
    if batch % size:
        below = batch // size * size
        raise UserError(
            f"{size} processes cannot share a batch of {batch} images evenly; data.batch_size is that of all of them: "
            f"--set data.batch_size={below or size}"
        )
    return batch // size


def replicated(module: "nn.Module") -> "nn.Module":
    """A module beside the network whose gradients are means over all processes, too; itself, if there is one."""
    if count() == 1:
        return module
    from torch.nn.parallel import DistributedDataParallel

    return DistributedDataParallel(module)


def gathered(value: Any) -> list[Any]:
    """What every process gives for `value`, in their order. All have to call it."""
    if count() == 1:
        return [value]
    from torch import distributed

    told: list[Any] = [None] * _size
    distributed.all_gather_object(told, value)
    return told


def from_first(make: Callable[[], Any]) -> Any:
    """What `make` gives in the first process, for all of them; a UserError there is one of all."""
    if count() == 1:
        return make()
    made, error = None, None
    if is_first():
        try:
            with alone():
                made = make()
        except UserError as found:
            error = found
    _settle(error)
    return gathered(made)[0]


@contextmanager
def together() -> Iterator[None]:
    """A UserError that one of the processes raises in this block ends it in all of them."""
    error = None
    try:
        yield
    except UserError as found:
        if count() == 1:
            raise
        error = found
    _settle(error)


@contextmanager
def in_order() -> Iterator[None]:
    """As `together`; the others begin the block when the first process has ended it."""
    if not is_first():
        _settle(None)
    with together():
        yield
    if is_first():
        _settle(None)


def _settle(error: UserError | None) -> None:
    """Raise the error in the process that has it, and another one in those that have none."""
    if count() == 1:
        return
    told = gathered(None if error is None else (error.message, isinstance(error, TryAgainError)))
    if error is not None:
        raise error
    for message, again in filter(None, told):
        raise (OtherTryAgainError if again else OtherProcessError)(message)


def first_to_tell() -> bool:
    """Whether this process is the one to tell what ended them all: the first that asks, and once.

    Before they have joined, all find the same, and number 0 tells it.
    """
    if _store is None:
        return not started() or os.environ["RANK"] == "0"
    with suppress(RuntimeError):  # who held the store has left
        return _store.add("told", 1) == 1
    return False


def lost_another(error: BaseException) -> bool:
    """Whether an error says that another process has ended without a word to the others."""
    return _size > 1 and isinstance(error, RuntimeError) and any(words in str(error) for words in GONE)
