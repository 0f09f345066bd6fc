"""Other ways to train the same network on the same images, as their own users would write them."""

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from fastai.callback.core import Callback, CancelFitException
from fastai.callback.mixup import MixUp
from fastai.data.transforms import Normalize
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat
from fastai.metrics import accuracy
from fastai.optimizer import SGD
from fastai.vision.augment import CropPad, Flip, RandomCrop
from fastai.vision.data import ImageDataLoaders
from timm.data import Mixup
from timm.loss import SoftTargetCrossEntropy
from timm.optim import Lookahead
from timm.task import LogitDistillationTask
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import ImageFolder

from benchmarks.common import Stopwatch
from dms_fastai.models.dmsresnet import MEAN, STD

ALPHA, T, LR, MOMENTUM, WEIGHT_DECAY = 0.95, 6.0, 0.1, 0.9, 5e-4


class LapCallback(Callback):
    """Tell a stopwatch of every training step, and end the fit with its last one."""

    order = 1000  # after everything that belongs to the step

    def __init__(self, stopwatch: Stopwatch):
        super().__init__()
        self.stopwatch = stopwatch

    def after_batch(self) -> None:
        if self.learn.training and self.stopwatch.lap():
            raise CancelFitException


class PlainKD(Callback):
    """Knowledge distillation as it is written in most notebooks."""

    def __init__(self, teacher: nn.Module):
        super().__init__()
        self.teacher = teacher.eval()

    def after_loss(self) -> None:
        if not self.training:
            return
        with torch.no_grad():
            logits = self.teacher(*self.xb)
        self.learn.loss_grad = ALPHA * soft_loss(self.pred, logits) + (1 - ALPHA) * self.learn.loss_grad
        self.learn.loss = self.learn.loss_grad.clone()


def soft_loss(pred: Tensor, logits: Tensor) -> Tensor:
    soft = F.kl_div(F.log_softmax(pred / T, dim=1), F.softmax(logits / T, dim=1), reduction="batchmean")
    return soft * T * T


def stock_learner(dls: Any, model: nn.Module, teacher: nn.Module | None, mixup: bool) -> Learner:
    """A fastai Learner with fastai's own parts."""
    cbs = [*([MixUp(1.0)] if mixup else []), *([PlainKD(teacher)] if teacher is not None else [])]
    opt_func = partial(SGD, mom=MOMENTUM, wd=WEIGHT_DECAY)
    return Learner(dls, model, CrossEntropyLossFlat(), opt_func=opt_func, lr=LR, cbs=cbs, metrics=accuracy)


def stock_fastai(
    folder: Path, model: nn.Module, teacher: nn.Module | None, stopwatch: Stopwatch, batch_size: int, size: int
) -> None:
    """`ImageDataLoaders.from_folder`, float32."""
    dls = ImageDataLoaders.from_folder(
        folder,
        train="train",
        valid="test",
        bs=batch_size,
        item_tfms=[CropPad(size + size // 4), RandomCrop(size)],
        batch_tfms=[Flip(), Normalize.from_stats(MEAN, STD)],
        device=stopwatch.device,
    )
    learn = stock_learner(dls, model, teacher, mixup=teacher is not None)
    with learn.no_bar(), learn.no_logging():
        learn.fit_one_cycle(1, LR, cbs=LapCallback(stopwatch))


def torch_loader(folder: Path, batch_size: int, size: int) -> DataLoader:
    """torchvision's transforms, image by image, in worker processes."""
    transform = transforms.Compose(
        [
            transforms.RandomCrop(size, size // 8),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize(MEAN, STD),
        ]
    )
    return DataLoader(
        ImageFolder(folder / "train", transform),
        batch_size,
        shuffle=True,
        num_workers=2,
        drop_last=True,
        pin_memory=torch.cuda.is_available(),
    )


def authors_way(
    folder: Path, model: nn.Module, teacher: nn.Module | None, stopwatch: Stopwatch, batch_size: int, size: int
) -> None:
    """A plain loop in float32: SGD inside Lookahead, every gradient value clipped, MixUp's lambda from NumPy."""
    device = stopwatch.device
    base = torch.optim.SGD(model.parameters(), LR, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY)
    optimizer = Lookahead(base, alpha=0.5, k=5)
    for x, y in torch_loader(folder, batch_size, size):
        x, y = x.to(device), y.to(device)
        if teacher is None:
            loss = F.cross_entropy(model(x), y)
        else:
            lam, shuffle = np.random.beta(1.0, 1.0), torch.randperm(len(x), device=device)
            x = lam * x + (1 - lam) * x[shuffle]
            with torch.no_grad():
                logits = teacher(x)
            pred = model(x)
            hard = lam * F.cross_entropy(pred, y) + (1 - lam) * F.cross_entropy(pred, y[shuffle])
            loss = ALPHA * soft_loss(pred, logits) + (1 - ALPHA) * hard
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_value_(model.parameters(), 0.1)
        optimizer.step()
        if stopwatch.lap():
            return


def timm_way(
    folder: Path,
    model: nn.Module,
    teacher: nn.Module | None,
    stopwatch: Stopwatch,
    batch_size: int,
    size: int,
    bf16: bool = False,
) -> None:
    """A bare loop around a timm network, with timm's `LogitDistillationTask` and `Mixup` where there is a teacher; in
    bf16 and channels last where asked for.
    """
    device = stopwatch.device
    if teacher is None:

        def loss_of(x: Tensor, y: Tensor) -> Tensor:
            return F.cross_entropy(model(x), y)
    else:
        mix, hard = Mixup(mixup_alpha=1.0, label_smoothing=0.0, num_classes=10), SoftTargetCrossEntropy()
        options = {"task_loss_weight": 1 - ALPHA, "temperature": T, "device": device, "verbose": False}
        task = LogitDistillationTask(model, teacher, hard, **options).train()

        def loss_of(x: Tensor, y: Tensor) -> Tensor:
            return task(*mix(x, y))["loss"]

    layout = torch.channels_last if bf16 else torch.contiguous_format
    for network in (model, teacher):
        if network is not None:
            network.to(memory_format=layout)
    optimizer = torch.optim.SGD(model.parameters(), LR, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY)
    for x, y in torch_loader(folder, batch_size, size):
        x, y = x.to(device, memory_format=layout), y.to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            loss = loss_of(x, y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if stopwatch.lap():
            return
