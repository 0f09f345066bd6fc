"""fastai's recorder, with losses, their parts and metrics that stay on the device until somebody reads them.

fastai moves them to the CPU in every batch, and on a GPU each move waits for all the work before it.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from fastai import learner as fastai
from fastai.callback.progress import ShowGraphCallback
from fastai.callback.tracker import TrackerCallback
from fastai.learner import AvgLoss, AvgMetric, AvgSmoothLoss, Metric
from fastcore.foundation import L
from torch import Tensor

from .. import processes
from ..callbacks.distill import TeacherDistill
from ..callbacks.feature_distill import FeatureDistill
from ..data.loader import unlabelled_images
from ..errors import UserError
from ..training.losses import UNLABELLED, DMSLoss

__all__ = ["LazyLoss", "LazyMetric", "LazySmoothLoss", "LossPart", "Recorder", "accuracy", "lazy", "to_cpu"]


class Recorder(fastai.Recorder):
    """`fastai.learner.Recorder` that also measures the metrics in training, and does not wait for the device.

    With a teacher and a `DMSLoss`, each epoch's means of cross-entropy, distillation and features are recorded, too,
    without their weights.
    """

    partial = False  # whether some images of the batches have no label

    def __init__(self):
        super().__init__(train_metrics=True)
        self.smooth_loss, self.loss = LazySmoothLoss(), LazyLoss()
        self.parts = L()

    def before_fit(self) -> None:
        kinds = {"cross_entropy": TeacherDistill, "distillation": TeacherDistill, "features": FeatureDistill}
        named = [name for name, kind in kinds.items() if any(isinstance(cb, kind) for cb in self.learn.cbs)]
        self.parts = L(LossPart(name) for name in named if isinstance(self.learn.loss_func, DMSLoss))
        super().before_fit()
        if any(isinstance(cb, ShowGraphCallback) for cb in self.learn.cbs):  # it would draw another column
            raise UserError(
                "ShowGraphCallback draws each epoch's second value, here no validation loss; leave it out, and "
                "call learn.recorder.plot_loss() after the fit"
            )
        epoch, loss, *rest = self.metric_names
        self.metric_names = L(epoch, loss, *(f"train_{part.name}" for part in self.parts), *rest)
        for callback in self.learn.cbs:
            if isinstance(callback, TrackerCallback):
                self.name_monitored(callback)

    def name_monitored(self, callback: TrackerCallback) -> None:
        """Have a callback that monitors "accuracy", which fastai records in validation alone, monitor "valid_accuracy".

        Raises:
            UserError: It monitors what is not recorded.
        """
        names = [name for name in self.metric_names[1:] if name != "time"]
        if f"valid_{callback.monitor}" in names:
            callback.monitor = f"valid_{callback.monitor}"
        if callback.monitor not in names:
            kind = type(callback).__name__
            raise UserError(f"{kind} monitors {callback.monitor!r}; what is recorded: {', '.join(names)}")

    @property
    def _train_mets(self) -> L:
        smooth_loss, *metrics = super()._train_mets or [None]
        return L() if smooth_loss is None else L(smooth_loss, *self.parts, *metrics)

    def before_train(self) -> None:
        super().before_train()
        self.partial = unlabelled_images(self.learn.dls) > 0

    def before_validate(self) -> None:
        super().before_validate()
        dls, seen = self.learn.dls, getattr(self.learn.dl, "dataset", None)
        self.partial = unlabelled_images(dls) > 0 and seen is dls.train_ds

    def after_loss(self) -> None:
        if self.learn.training:
            for part in self.parts:
                part.accumulate(self.learn)

    def after_batch(self) -> None:
        learn = self.learn
        if not len(learn.yb):
            return
        if not learn.training:
            with labelled_alone(learn, self.partial):
                if len(learn.yb[0]):
                    super().after_batch()
            return
        self.smooth_loss.accumulate(learn)
        with labelled_alone(learn, self.partial):
            for metric in learn.metrics if len(learn.yb[0]) else ():
                metric.accumulate(learn)
        learn.smooth_loss = self.smooth_loss.value
        self.losses.append(learn.smooth_loss)
        self.lrs.append(learn.opt.hypers[-1]["lr"])

    def fetch(self) -> None:
        """Move the losses so far to the CPU, in one copy."""
        self.losses = to_cpu(getattr(self, "losses", []))

    def state(self) -> dict[str, Any]:
        """The records so far: every step's learning rate and loss, every epoch's values, the current epoch's sums.

        The sums are those of every process, so that all have to call this.
        """
        self.fetch()
        return {
            "lrs": [float(lr) for lr in self.lrs],
            "losses": torch.stack(self.losses),
            "iters": list(self.iters),
            "values": [list(values) for values in self.values],
            "smooth_loss": (self.smooth_loss.count, self.smooth_loss.val),
            "sums": processes.gathered([(_on_cpu(metric.total), _on_cpu(metric.count)) for metric in self.summed]),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Resume after the epochs of a `state`; the fit must have begun."""
        self.lrs, self.iters, self.losses = list(state["lrs"]), list(state["iters"]), list(state["losses"])
        self.values = [L(values) for values in state["values"]]
        self.smooth_loss.count, self.smooth_loss.val = state["smooth_loss"]

    def restore_sums(self, state: dict[str, Any], device: torch.device) -> None:
        """Resume after the steps of a `state`; the epoch must have begun. Any number of processes shares its sums."""
        own = state["sums"][processes.rank() :: processes.count()]
        for place, metric in enumerate(self.summed):
            metric.total = sum(torch.as_tensor(sums[place][0]).to(device) for sums in own)
            metric.count = sum(sums[place][1] for sums in own)
        self.learn.smooth_loss = self.smooth_loss.value

    @property
    def summed(self) -> list[Any]:
        """What adds up an epoch's training batches."""
        return [metric for metric in (*self.parts, *self.learn.metrics) if hasattr(metric, "total")]


@contextmanager
def labelled_alone(learn: Any, partial: bool) -> Iterator[None]:
    """Until the block ends, a batch has only the images that have a label, if it is `partial` and has others.

    To pick them waits for the device.
    """
    if not partial:
        yield
        return
    pred, yb = learn.pred, learn.yb
    labelled = yb[0] != UNLABELLED
    learn.pred, learn.yb = pred[labelled], (yb[0][labelled],)
    try:
        yield
    finally:
        learn.pred, learn.yb = pred, yb


def accuracy(pred: Tensor, y: Tensor) -> Tensor:
    """Share of the samples whose largest logit, of `pred` (B, C), is that of the true class, `y` (B,)."""
    return (pred.argmax(dim=1) == y).float().mean()


class LazySmoothLoss(AvgSmoothLoss):
    """`AvgSmoothLoss`, added up where the loss is."""

    def accumulate(self, learn: Any) -> None:
        self.count += 1
        loss = learn.loss.detach().mean()
        self.val = torch.lerp(loss, self.val.to(loss, non_blocking=True), self.beta)


class LazyLoss(AvgLoss):
    """`AvgLoss`, added up where the loss is."""

    def accumulate(self, learn: Any) -> None:
        n = len(learn.yb[0])
        self.total += learn.loss.detach().mean() * n
        self.count += n


class LazyMetric(AvgMetric):
    """`AvgMetric`, added up where the predictions are."""

    def accumulate(self, learn: Any) -> None:
        n = len(learn.yb[0])
        value: Tensor | float = self.func(learn.pred, *learn.yb)
        self.total += (value.detach() if isinstance(value, Tensor) else value) * n
        self.count += n


class LossPart(Metric):
    """The mean of a part of a `DMSLoss` over an epoch's training images, added up where the loss is.

    Cross-entropy is the mean over those that have a label.
    """

    def __init__(self, part: str):
        self.part = part
        self.reset()

    def reset(self) -> None:
        self.total, self.count = 0.0, 0

    def accumulate(self, learn: Any) -> None:
        n, parts = len(learn.yb[0]), learn.loss_func.parts
        self.total += parts[self.part].mean() * n
        self.count += n * parts["labelled"] if self.part == "cross_entropy" and "labelled" in parts else n

    @property
    def value(self) -> Any:
        return self.total / self.count if self.count else None

    @property
    def name(self) -> str:
        return self.part


def lazy(metric: Callable | Metric) -> Metric:
    """A function of (predictions, targets) as a `LazyMetric`; a `Metric` is given back unchanged."""
    if isinstance(metric, type):
        metric = metric()
    return metric if isinstance(metric, Metric) else LazyMetric(metric)


def _on_cpu(value: Any) -> Any:
    return value.cpu() if isinstance(value, Tensor) else value


def to_cpu(losses: list[Tensor]) -> list[Tensor]:
    """Scalar losses on the CPU, to be plotted and saved; those on another device are moved in one copy."""
    elsewhere = [index for index, loss in enumerate(losses) if loss.device.type != "cpu"]
    if not elsewhere:
        return losses
    losses = list(losses)
    for index, loss in zip(elsewhere, torch.stack([losses[i] for i in elsewhere]).cpu(), strict=True):
        losses[index] = loss
    return losses
