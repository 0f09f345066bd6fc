"""One training by several processes, each with its rows of every batch: torch's DistributedDataParallel."""

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from fastai.callback.core import Callback
from fastai.callback.schedule import LRFinder
from fastai.learner import AvgMetric
from torch import Tensor, distributed, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.parallel import DistributedDataParallel

from .. import processes
from ..callbacks.mixup import MixUp
from ..callbacks.sync_bn import HostSyncBatchNorm
from ..data.loader import BatchLoader
from ..errors import UserError
from ..random_states import get_random_states, set_random_states

__all__ = ["replication"]


def replication() -> list[Callback]:
    """The callbacks of a fit by several processes; none, if there is one.

    All draw the same numbers: the order of the images, crops, partners, lambda. Each makes the whole batch and keeps
    its own rows, so that a batch is what it is in one process. After each step, all hold the same bits: weights,
    statistics of batch norms, loss.
    """
    return [] if processes.count() == 1 else [Rows(), Sums(), Replicate()]


class Rows(Callback):
    """Begin with the same weights and random states everywhere, and keep this process's rows of each batch."""

    order, run_valid = 1.5, False  # after all that changes or mixes the whole batch, before the student's resize (2)

    def before_fit(self) -> None:
        if any(isinstance(cb, LRFinder) for cb in self.learn.cbs):  # whose weights one process alone saves and loads
            raise UserError("lr_find() is for one process; call it without torchrun, and give the rate to the Learner")
        for loader in self.learn.dls.loaders:
            if not isinstance(loader, BatchLoader):
                kind = type(loader).__name__
                raise UserError(f"several processes train on the DataLoaders of load_data alone, and here is a {kind}")
        for metric in self.learn.metrics:
            if not isinstance(metric, AvgMetric):
                raise UserError(f"several processes add up means over images, and the metric {metric.name!r} is none")
        loader = self.learn.dls.train
        processes.rows_of(loader.bs)
        if not loader.drop_last:
            processes.rows_of(loader.n % loader.bs)
        set_random_states(processes.gathered(get_random_states())[0])
        for value in self.learn.model.state_dict().values():
            distributed.broadcast(value, 0)

    def before_batch(self) -> None:
        learn, n = self.learn, len(self.learn.xb[0])
        learn.xb, learn.yb = own_rows(learn.xb, n), own_rows(learn.yb, n)
        for mixer in learn.cbs:
            if isinstance(mixer, MixUp):
                mixer.second = own_rows(mixer.second, n)


def own_rows(values: Iterable[Tensor], n: int) -> tuple[Tensor, ...]:
    """This process's rows of what has a row for each of `n` images, and the rest as it is."""
    rows = processes.share(n)
    return tuple(value[rows] if value.ndim and len(value) == n else value for value in values)


class Sums(Callback):
    """Have all processes record the same: the mean of their losses in every step, and sums of an epoch's metrics.

    Running statistics of batch norms are averaged in the same message, where each process has its own. Of the images to
    validate on, each process sees a part, whose sums are added up once.
    """

    order, run_valid = 49, False  # before Recorder (50)
    validating: BatchLoader | None = None
    _stateattrs = ("validating",)

    def before_train(self) -> None:
        norms = [m for m in self.learn.model.modules() if isinstance(m, _NormBase) and m.training]
        own = [m for m in norms if m.track_running_stats and not isinstance(m, (nn.SyncBatchNorm, HostSyncBatchNorm))]
        self.statistics = [value for norm in own for value in (norm.running_mean, norm.running_var)]

    def after_backward(self) -> None:  # which needs the statistics as they were
        self.learn.loss = self.learn.loss.detach().mean()
        mean_of_all([self.learn.loss, *self.statistics])

    def after_train(self) -> None:
        self.add_up(self.learn.recorder.summed)

    def before_validate(self) -> None:
        self.validating = self.learn.dl
        self.validating.part = processes.share(self.validating.n)

    def after_validate(self) -> None:
        self.release()
        self.add_up([self.learn.recorder.loss, *self.learn.metrics])

    def release(self) -> None:
        """Have the loader give all images again. A Learner calls this if an exception ends a fit without an event."""
        if self.validating is not None:
            self.validating.part, self.validating = None, None

    def add_up(self, metrics: Iterable[Any]) -> None:
        """Put the sums over all processes in the place of the metrics' own."""
        summed = [metric for metric in metrics if hasattr(metric, "total")]
        own = [[float(metric.total), float(metric.count)] for metric in summed]
        sums = torch.tensor(own, dtype=torch.float64, device=next(self.learn.model.parameters()).device)
        distributed.all_reduce(sums)
        for metric, (total, images) in zip(summed, sums.tolist(), strict=True):
            metric.total, metric.count = total, images


def mean_of_all(values: list[Tensor]) -> None:
    """Put the means over all processes in the place of values, in one message."""
    flat = torch.cat([value.flatten() for value in values])
    distributed.all_reduce(flat)
    flat /= processes.count()
    for value, mean in zip(values, flat.split([value.numel() for value in values]), strict=True):
        value.copy_(mean.view_as(value))


class Replicate(Callback):
    """Train a replica in place of the network: torch reduces its gradients while they are computed."""

    order, run_valid = 80, False  # after all that freezes weights (62), compiles the network (6) or keeps it (70)
    network: nn.Module | None = None
    _stateattrs = ("network",)

    def before_train(self) -> None:
        self.put_back()  # if an exception ended the last epoch
        self.network = self.learn.model
        self.learn.model = Replica(self.network, lambda: (self.learn.epoch, self.learn.iter))

    def after_train(self) -> None:
        self.put_back()

    def after_cancel_epoch(self) -> None:
        self.put_back()

    def after_cancel_fit(self) -> None:
        self.put_back()

    def release(self) -> None:
        """Put the network back. A Learner calls this if an exception ends a fit without an event."""
        self.put_back()

    def put_back(self) -> None:
        if self.network is not None:
            self.learn.model, self.network = self.network, None


class Replica(DistributedDataParallel):
    """A network whose gradients are the means over all processes.

    What it draws, as in dropout, is the process's own, from a seed for each step. The random states stay as they were:
    the next batch is the same everywhere, and resumed by any number of processes.
    """

    def __init__(self, network: nn.Module, step: Callable[[], tuple[int, int]]):
        """
        Args:
            network: Equal in all processes.
            step: Gives the epoch, and the training step in it.
        """
        super().__init__(network, init_sync=False)
        self.step, self.place = step, next(network.parameters()).device

    def will_sync_module_buffers(self) -> bool:
        """Whether torch sends the buffers before each step: they are the same already."""
        return False

    def forward(self, *inputs: Tensor) -> Tensor:
        seeds = np.random.SeedSequence([torch.initial_seed(), *self.step(), processes.rank()])
        gpus = [self.place] if self.place.type == "cuda" else []
        with torch.random.fork_rng(devices=gpus, device_type="cuda"):
            torch.manual_seed(int(seeds.generate_state(1, np.uint64)[0]))
            return super().forward(*inputs)
