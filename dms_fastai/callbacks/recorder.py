"""fastai's recorder, for losses and metrics that stay on the device until somebody reads them.

fastai moves its own to the CPU every batch, and on a GPU each move waits for all the work before it.
"""

from collections.abc import Callable
from typing import Any

import torch
from fastai import learner as fastai
from fastai.learner import AvgLoss, AvgMetric, AvgSmoothLoss, Metric
from fastai.torch_core import num_distrib
from torch import Tensor

__all__ = ["LazyLoss", "LazyMetric", "LazySmoothLoss", "Recorder", "accuracy", "lazy", "to_cpu"]


class Recorder(fastai.Recorder):
    """`fastai.learner.Recorder` that measures the metrics in training, too, and waits for nothing."""

    def __init__(self):
        super().__init__(train_metrics=True)
        self.smooth_loss, self.loss = LazySmoothLoss(), LazyLoss()

    def after_batch(self) -> None:
        learn = self.learn
        if not learn.training or not len(learn.yb):
            super().after_batch()
            return
        self.smooth_loss.accumulate(learn)
        for metric in learn.metrics:
            metric.accumulate(learn)
        learn.smooth_loss = self.smooth_loss.value
        self.losses.append(learn.smooth_loss)
        self.lrs.append(learn.opt.hypers[-1]["lr"])

    def fetch(self) -> None:
        """The losses so far to the CPU, in one copy."""
        self.losses = to_cpu(getattr(self, "losses", []))


def accuracy(pred: Tensor, y: Tensor) -> Tensor:
    """Share of the logits (B, C) whose largest is that of the class y, shape (B,)."""
    return (pred.argmax(dim=1) == y).float().mean()


class LazySmoothLoss(AvgSmoothLoss):
    """`AvgSmoothLoss`, added up where the loss is."""

    def accumulate(self, learn: Any) -> None:
        self.count += 1
        loss = learn.loss.detach().mean()
        self.val = torch.lerp(loss, self.val.to(loss.device, non_blocking=True), self.beta)


class LazyLoss(AvgLoss):
    """`AvgLoss`, added up where the loss is."""

    def accumulate(self, learn: Any) -> None:
        if num_distrib() > 1:  # fastai's own gathers what the other processes have
            super().accumulate(learn)
            return
        n = len(learn.yb[0])
        self.total += learn.loss.detach().mean() * n
        self.count += n


class LazyMetric(AvgMetric):
    """`AvgMetric`, added up where the predictions are."""

    def accumulate(self, learn: Any) -> None:
        if num_distrib() > 1:
            super().accumulate(learn)
            return
        n = len(learn.yb[0])
        value: Tensor | float = self.func(learn.pred, *learn.yb)
        self.total += (value.detach() if isinstance(value, Tensor) else value) * n
        self.count += n


def lazy(metric: Callable | Metric) -> Metric:
    """A function of (predictions, targets) as a lazy metric, the mean over the batches; a `Metric` stays what it is."""
    if isinstance(metric, type):
        metric = metric()
    return metric if isinstance(metric, Metric) else LazyMetric(metric)


def to_cpu(losses: list[Tensor]) -> list[Tensor]:
    """Losses without dimensions on the CPU, where they can be plotted and saved; in one copy, those still elsewhere."""
    elsewhere = [index for index, loss in enumerate(losses) if loss.device.type != "cpu"]
    if not elsewhere:
        return losses
    losses = list(losses)
    for index, loss in zip(elsewhere, torch.stack([losses[i] for i in elsewhere]).cpu(), strict=True):
        losses[index] = loss
    return losses
