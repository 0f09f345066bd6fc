"""`dms_learner`: the parts of a recipe, put together into a fastai Learner."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from fastai.callback.core import CancelEpochException
from fastai.callback.mixup import MixHandler
from fastai.callback.schedule import ParamScheduler
from fastai.data.core import DataLoaders
from fastai.learner import CastToTensor
from torch import Tensor

from ..callbacks.bf16 import fast_kernels
from ..data.imageset import ImageSet
from ..data.loader import BatchLoader, statistics
from ..errors import UserError
from ..models.card import ModelCard
from ..recipes import Recipe, load_recipe
from ..schema import load
from ..trained import begin_from
from ..training.optimizers import optimizer
from ..training.parts import PARTS
from .events import EventLearner
from .memory import Trimmer
from .recorder import Recorder, accuracy, lazy

__all__ = ["DMSLearner", "dms_learner"]


class DMSLearner(EventLearner):
    """A fastai Learner that has a recipe, and `fit_recipe` to train by it."""

    recipe: Recipe
    first_epoch = 0

    def fit_recipe(self, epochs: int | None = None, lr: float | None = None, **kwargs: Any) -> None:
        """Train by the recipe's schedule.

        Args:
            epochs: Number of epochs, in place of the recipe's.
            lr: Highest learning rate, in place of the recipe's.
            kwargs: Further arguments of `fit`, such as `cbs` and `start_epoch`.
        """
        recipe = self.recipe
        epochs = recipe.schedule.epochs if epochs is None else epochs
        lr = recipe.optimizer.lr if lr is None else lr
        if epochs < 1 or not lr > 0:
            raise UserError(f"epochs is {epochs} and lr is {lr}; epochs must be at least 1, and lr above 0")
        schedule = replace(recipe.schedule, epochs=epochs).build()
        scheduler = ParamScheduler(schedule.hypers(lr, recipe.optimizer.momentum))
        self.fit(epochs, lr, cbs=[scheduler, *_listed(kwargs.pop("cbs", None))], **kwargs)

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
        trimmer = Trimmer()
        for epoch in range(self.first_epoch, self.n_epoch):
            self.epoch = epoch
            if isinstance(self.dls.train, BatchLoader):
                self.dls.train.passes = epoch  # not counting batches drawn for display
            self._with_events(self._do_epoch, "epoch", CancelEpochException)
            trimmer.trim()

    def all_batches(self) -> None:
        self.n_iter = len(self.dl)
        for i, b in enumerate(self.dl, getattr(self.dl, "first_batch", 0)):  # not 0 in a resumed epoch
            self.one_batch(i, b)

    def one_batch(self, i: int, b: tuple) -> None:
        try:
            super().one_batch(i, b)
        finally:
            if hasattr(self, "bf16"):
                self.bf16.release()  # an exception that ends a batch sends no event

    def _set_device(self, b: tuple) -> tuple:
        """The batch on the model's device, as plain tensors, without fastai's search through it where not needed."""
        device = next(self.model.parameters()).device
        if all(type(t) is Tensor and t.device == device for t in b):
            return b
        return tuple(t.as_subclass(Tensor) if isinstance(t, Tensor) else t for t in super()._set_device(b))

    @property
    def card(self) -> ModelCard:
        """What the model is and what images it expects, to be saved with its weights."""
        mean, std = statistics(self.dls)
        model, data = self.recipe.model, self.dls.train_ds
        size = data.size if isinstance(data, ImageSet) else self.dls.one_batch()[0].shape[-1]
        args = {"drop_rate": model.drop_rate, **(model.args or {})}
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
    begun: bool = False,
) -> DMSLearner:
    """A fastai Learner for a recipe. `fit_recipe` trains it; every other method of a Learner works as well.

    Args:
        dls: DataLoaders of `load_data`, or fastai's own. Their batch size and augmentation are used as they are.
        recipe: A name, the path to a .toml file, or a `Recipe`. A name or path includes the recipe's changes for these
            data, `[on.NAME]`.
        teacher: For recipes that distil: a model, a Learner, a run's folder, a .safetensors or .pkl file, "timm:NAME".
        arch: Architecture in place of the recipe's; any timm entry.
        settings: Recipe values by dotted key, such as {"optimizer.lr": 0.05}.
        cbs: Further callbacks.
        metrics: As in fastai; they are also measured in training.
        path: Where the Learner saves and exports; the current folder by default.
        begun: Leave the weights fresh where the recipe begins from trained ones: others will be put in their place.

    Raises:
        UserError: An unknown recipe, key or architecture, a value out of range, a teacher or weights to begin from
            that are missing or do not fit.
    """
    if not isinstance(recipe, Recipe):
        own = isinstance(dls.train_ds, ImageSet)  # fastai's Datasets have any attribute that one asks for
        recipe = load_recipe(recipe, dls.train_ds.name if own else "", arch, settings)
    elif arch or settings:
        raise UserError("arch and settings are for recipes by name; change the Recipe itself instead")
    _refuse_stock_mixers(_listed(cbs))
    lookahead = None if recipe.lookahead is None else recipe.lookahead.build()
    size = dls.train_ds.size if isinstance(dls.train_ds, ImageSet) else None
    model = recipe.model.build().create(dls.c, size)
    if recipe.model.weights is not None and not begun:
        begin_from(model, recipe.model.weights, recipe.model.name)
    learn = DMSLearner(
        dls,
        model,
        loss_func=recipe.loss.build(**(vars(recipe.distill.build()) if recipe.distill else {})),
        opt_func=partial(optimizer, settings=recipe.optimizer.build(), lookahead=lookahead),
        lr=recipe.optimizer.lr,
        cbs=[*_callbacks(recipe, teacher), *_listed(cbs)],
        metrics=[lazy(metric) for metric in _listed(metrics)],
        path=path,
    )
    learn.recipe = recipe
    learn.remove_cbs([learn.recorder, CastToTensor])
    return learn.add_cb(Recorder())


def _refuse_stock_mixers(cbs: list) -> None:
    """Raise a UserError if fastai's own MixUp or CutMix is given: it swaps the loss for one that knows no teacher."""
    for cb in cbs:
        kind = cb if isinstance(cb, type) else type(cb)
        if issubclass(kind, MixHandler):
            raise UserError(f"fastai's own {kind.__name__} swaps the loss; take {kind.__name__} of dms_fastai")


def _callbacks(recipe: Recipe, teacher: Any) -> list:
    """The recipe's callbacks. Only `TeacherDistill` needs more than its table: the teacher."""
    if recipe.distill is None and teacher is not None:
        raise UserError(f"recipe {recipe.name!r} does not distil; leave the teacher out, or take 'kd'")
    if recipe.distill is not None and teacher is None:
        raise UserError(f"recipe {recipe.name!r} needs a teacher; give teacher= a Learner, a model or a run's folder")
    there = [part for part in PARTS if part.order is not None and getattr(recipe, part.table) is not None]
    return [load(part.at)(teacher) if part.settings else getattr(recipe, part.table).build() for part in there]


def _listed(cbs: Any) -> list:
    return [] if cbs is None else list(cbs) if isinstance(cbs, (list, tuple)) or hasattr(cbs, "map") else [cbs]
