"""`dms_learner`: model, data, loss, callbacks and optimiser of a recipe, put together into a fastai Learner."""

from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
from fastai.callback.core import CancelEpochException
from fastai.callback.schedule import ParamScheduler
from fastai.data.core import DataLoaders
from fastai.learner import CastToTensor
from torch import Tensor, nn

from .callbacks import (
    EMA,
    SAM,
    ClipGradValue,
    CutMix,
    Cutout,
    MixUp,
    MixUpOrCutMix,
    Precision,
    TeacherDistill,
    TorchCompile,
    TrivialAugment,
)
from .callbacks.precision import fast_kernels
from .callbacks.recorder import Recorder, accuracy, lazy
from .data.imageset import ImageSet
from .data.loader import BatchLoader, statistics
from .errors import UserError
from .events import EventLearner
from .losses import DMSLoss
from .models.weights import ModelCard
from .optim import sgd
from .recipes import Recipe, load_recipe
from .schedule import cosine_annealing, one_cycle

__all__ = ["DMSLearner", "build_model", "dms_learner"]


class DMSLearner(EventLearner):
    """A fastai Learner that knows its recipe: everything that a Learner does, and `fit_recipe`."""

    recipe: Recipe
    first_epoch = 0

    def fit_recipe(self, epochs: int | None = None, lr: float | None = None, **kwargs: Any) -> None:
        """Train by the recipe's schedule.

        Args:
            epochs: In place of the recipe's.
            lr: Highest learning rate, in place of the recipe's.
            kwargs: Further arguments of `fit`, such as `cbs` and `start_epoch`.
        """
        schedule = self.recipe.schedule
        epochs = schedule.epochs if epochs is None else epochs
        lr = self.recipe.optimizer.lr if lr is None else lr
        if epochs < 1 or not lr > 0:
            raise UserError(f"epochs is {epochs} and lr is {lr}; they must be at least 1 and above 0")
        if schedule.name == "one-cycle":
            m = self.recipe.optimizer.momentum
            swing = min(0.05, m, (1 - m) / 2)  # 0.95, 0.85, 0.95 round 0.9: fastai's own cycle
            scheds = {
                "lr": partial(one_cycle, lr / 25, lr, lr / 1e5),
                "mom": partial(one_cycle, m + swing, m - swing, m + swing),
            }
        else:
            scheds = {"lr": partial(cosine_annealing, lr, epochs if schedule.step == "epoch" else None)}
        self.fit(epochs, lr, cbs=[ParamScheduler(scheds), *_listed(kwargs.pop("cbs", None))], **kwargs)

    def fit(self, n_epoch: int, *args: Any, start_epoch: int = 0, **kwargs: Any) -> None:
        """`Learner.fit`, whose skipped epochs leave no trace in the recorder."""
        self.first_epoch = start_epoch
        try:
            with fast_kernels(getattr(self.dls, "device", None)):
                super().fit(n_epoch, *args, **kwargs)
        finally:
            if isinstance(getattr(self, "recorder", None), Recorder):
                self.recorder.fetch()  # after an exception as well, when no event is sent
            if hasattr(self, "torch_compile"):
                self.torch_compile.release()

    def _do_fit(self) -> None:
        for epoch in range(self.first_epoch, self.n_epoch):
            self.epoch = epoch
            if isinstance(self.dls.train, BatchLoader):
                self.dls.train.passes = epoch  # whatever has been drawn to be looked at
            self._with_events(self._do_epoch, "epoch", CancelEpochException)

    def all_batches(self) -> None:
        self.n_iter = len(self.dl)
        for i, b in enumerate(self.dl, getattr(self.dl, "first_batch", 0)):  # not 0 in an epoch that goes on
            self.one_batch(i, b)

    def one_batch(self, i: int, b: tuple) -> None:
        try:
            super().one_batch(i, b)
        finally:
            if hasattr(self, "precision"):
                self.precision.release()  # what ends a batch by an exception sends no event

    def _set_device(self, b: tuple) -> tuple:
        """The batch where the model is, as plain tensors; what fastai searches every batch for, seldom with need."""
        device = next(self.model.parameters()).device
        if all(type(t) is Tensor and t.device == device for t in b):
            return b
        return tuple(t.as_subclass(Tensor) if isinstance(t, Tensor) else t for t in super()._set_device(b))

    @property
    def card(self) -> ModelCard:
        """What the model is and what pictures it expects, to be saved beside its weights."""
        mean, std = statistics(self.dls)
        model, data = self.recipe.model, self.dls.train_ds
        size = data.size if isinstance(data, ImageSet) else self.dls.one_batch()[0].shape[-1]
        args = {"drop_rate": model.drop_rate, **model.args}
        return ModelCard(model.name, [str(v) for v in self.dls.vocab], mean, std, size, args)


def dms_learner(
    dls: DataLoaders,
    recipe: str | Path | Recipe = "kd",
    teacher: Any = None,
    arch: str | None = None,
    settings: dict[str, Any] | None = None,
    cbs: Any = None,
    metrics: Any = accuracy,
    path: str | Path | None = None,
) -> DMSLearner:
    """A fastai Learner for a recipe. `fit_recipe` trains it; every other method of a Learner works as well.

    Args:
        dls: Of `load_data`, or fastai's own. Their batch size and augmentation are used as they are.
        recipe: Name, path to a .toml file, or a `Recipe`; a name or path gets what the recipe changes for this data.
        teacher: For recipes that distil: a model, a Learner, a run's folder, a .safetensors or .pkl file, "timm:NAME".
        arch: Architecture in place of the recipe's; any timm entry.
        settings: Recipe values by dotted key, such as {"optimizer.lr": 0.05}.
        cbs: Further callbacks.
        metrics: As fastai has them; they are also measured in training.
        path: Where the Learner saves and exports; the current folder otherwise.

    Raises:
        UserError: An unknown recipe, key or architecture, a value out of range, a teacher that is missing or does
            not fit.
    """
    if not isinstance(recipe, Recipe):
        own = isinstance(dls.train_ds, ImageSet)  # fastai's Datasets have any attribute that one asks for
        recipe = load_recipe(recipe, dls.train_ds.name if own else "", arch, settings)
    elif arch or settings:
        raise UserError("arch and settings are for recipes by name; a Recipe says all of that itself")
    learn = DMSLearner(
        dls,
        build_model(recipe, dls.c, dls.train_ds.size if isinstance(dls.train_ds, ImageSet) else None),
        loss_func=_loss(recipe),
        opt_func=partial(sgd, settings=recipe.optimizer, lookahead=recipe.lookahead),
        lr=recipe.optimizer.lr,
        cbs=[*_callbacks(recipe, teacher), *_listed(cbs)],
        metrics=[lazy(metric) for metric in _listed(metrics)],
        path=path,
    )
    learn.recipe = recipe
    learn.remove_cbs([learn.recorder, CastToTensor])
    return learn.add_cb(Recorder())


def build_model(recipe: Recipe, num_classes: int, size: int | None = None) -> nn.Module:
    """The recipe's network for `num_classes` classes, laid out channels last.

    Args:
        recipe: Its `model` is built.
        num_classes: How many logits it gives a picture.
        size: Height and width of the pictures that it is to take, one of which it is tried on; None: it is not tried.

    Raises:
        UserError: The architecture does not take the recipe's `model.args`, or such pictures.
    """
    model = recipe.model
    try:
        built = timm.create_model(model.name, num_classes=num_classes, drop_rate=model.drop_rate, **model.args)
    except Exception as error:  # whatever an architecture raises, what it was given is the user's
        raise UserError(f"{model.name} cannot be built with model.args {model.args}: {_reason(error)}") from None
    if size is not None:
        _try_on(built, model.name, size, num_classes)
    return built.to(memory_format=torch.channels_last)


def _try_on(model: nn.Module, name: str, size: int, num_classes: int) -> None:
    """Raise a UserError where a picture of `size` pixels does not come out as `num_classes` logits."""
    hint = f"try --set model.args.img_size={size} if it has that, --set data.size=N, or another architecture"
    try:
        with torch.no_grad():
            shape = tuple(model.eval()(torch.zeros(1, 3, size, size)).shape)
    except Exception as error:  # as above
        raise UserError(f"{name} does not take pictures of {size}x{size} pixels ({_reason(error)}); {hint}") from None
    finally:
        model.train()
    if shape != (1, num_classes):
        raise UserError(f"{name} gives {shape} for a picture, not {num_classes} logits; take another architecture")


def _reason(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0].rstrip(".")


def _loss(recipe: Recipe) -> DMSLoss:
    distill = {} if recipe.distill is None else vars(recipe.distill)
    return DMSLoss(label_smoothing=recipe.label_smoothing, **distill)


def _callbacks(recipe: Recipe, teacher: Any) -> list:
    callbacks = [Precision(recipe.precision)]
    if recipe.compile != "never":
        callbacks.append(TorchCompile() if recipe.compile == "auto" else TorchCompile(steps=0))
    if recipe.augment.trivial:
        callbacks.append(TrivialAugment())
    if recipe.augment.cutout:
        callbacks.append(Cutout(recipe.augment.cutout))
    if recipe.mixup is not None or recipe.cutmix is not None:
        callbacks.append(_mixing(recipe))
    if recipe.ema is not None:
        callbacks.append(EMA(recipe.ema.decay, recipe.ema.every))
    if recipe.optimizer.sam is not None:
        callbacks.append(SAM(recipe.optimizer.sam))
    if recipe.optimizer.clip_value is not None:
        callbacks.append(ClipGradValue(recipe.optimizer.clip_value))
    if recipe.distill is not None:
        if teacher is None:
            raise UserError(
                f"recipe {recipe.name!r} needs a teacher; give teacher= a Learner, a model or a run's folder"
            )
        callbacks.append(TeacherDistill(teacher))
    elif teacher is not None:
        raise UserError(f"recipe {recipe.name!r} does not distil; leave the teacher out, or take 'kd'")
    return callbacks


def _mixing(recipe: Recipe) -> MixUp:
    mixup, cutmix = recipe.mixup, recipe.cutmix
    if cutmix is None:
        return MixUp(mixup.alpha, mixup.per)
    if mixup is None:
        return CutMix(cutmix.alpha)
    if mixup.per != "batch":
        raise UserError(f"mixup.per is {mixup.per!r}; beside CutMix it must be 'batch'")
    return MixUpOrCutMix(mixup.alpha, cutmix.alpha, cutmix.share)


def _listed(cbs: Any) -> list:
    return [] if cbs is None else list(cbs) if isinstance(cbs, (list, tuple)) or hasattr(cbs, "map") else [cbs]
