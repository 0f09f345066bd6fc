"""`dms_learner`: the parts of a recipe, put together into a fastai Learner."""

import io
import warnings
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from fastai.callback.core import CancelEpochException
from fastai.callback.mixup import MixHandler
from fastai.callback.schedule import ParamScheduler
from fastai.data.core import DataLoaders
from fastai.learner import CastToTensor
from fastai.torch_core import rank_distrib
from torch import Tensor, nn

from ..callbacks.bf16 import fast_kernels
from ..data.imageset import ImageSet
from ..data.loader import BatchLoader, vocabulary
from ..errors import UserError
from ..files import whole
from ..models.build import needs_more_than_one
from ..models.card import ModelCard
from ..recipes import Recipe, load_recipe
from ..schema import load
from ..trained import Inputs, begin_from, check_teacher, inputs_of
from ..training.losses import check_class_weights
from ..training.optimizers import optimizer
from ..training.parts import PARTS
from .events import EventLearner
from .memory import Trimmer
from .portable import PORTABLE
from .recorder import Recorder, accuracy, lazy

__all__ = ["DMSLearner", "dms_learner"]


class DMSLearner(EventLearner):
    """A fastai Learner that has a recipe, and `fit_recipe` to train by it."""

    recipe: Recipe
    first_epoch = 0
    exported_inputs: Inputs | None = None  # of an exported Learner, which has no images any more

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
        """`Learner.fit`, whose skipped epochs leave no trace in the recorder.

        Raises:
            UserError: The images, their classes, the batches or the loss's class weights do not fit the model.
        """
        inputs = inputs_of(self.dls)
        check_class_weights(self.loss_func, self.dls.c)
        _check_batches(self.dls.train, self.model, inputs)
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
        model, dls = self.recipe.model, self.dls
        there = len(dls.train_ds) or self.exported_inputs is None
        inputs = inputs_of(dls) if there else self.exported_inputs
        args = {"drop_rate": model.drop_rate, **(model.args or {})}
        vocab = vocabulary(dls) or [str(index) for index in range(dls.c)]
        white = getattr(dls.train_ds, "white", None)
        return ModelCard(model.name, vocab, inputs.mean, inputs.std, inputs.shape, args, white)

    def export(self, fname: str | Path = "export.pkl", pickle_module: Any = PORTABLE, pickle_protocol: int = 2) -> None:
        """`Learner.export`, whole or not at all, and without the folders of this machine."""
        if rank_distrib():
            return
        self._end_cleanup()
        exported = {
            "dls": self.dls.new_empty(),
            "opt": None,
            "path": Path(),
            "model_dir": Path(self.model_dir).name,
            "recipe": self.recipe.without_folders(),
            "exported_inputs": inputs_of(self.dls) if len(self.dls.train_ds) else self.exported_inputs,
        }
        exported["dls"].path = Path()
        file, buffer, own = Path(self.path) / fname, io.BytesIO(), {name: getattr(self, name) for name in exported}
        try:
            vars(self).update(exported)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # PyTorch's, that the model is not checked
                torch.save(self, buffer, pickle_module=pickle_module, pickle_protocol=pickle_protocol)
        finally:
            vars(self).update(own)
        with whole(file) as partial_file:
            partial_file.write_bytes(buffer.getbuffer())


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
        UserError: DataLoaders of anything but images with one class each, an unknown recipe, key or architecture, a
            value out of range, a teacher or weights to begin from that are missing or do not fit.
    """
    inputs = inputs_of(dls)
    if not isinstance(recipe, Recipe):
        own = isinstance(dls.train_ds, ImageSet)  # fastai's Datasets have any attribute that one asks for
        recipe = load_recipe(recipe, dls.train_ds.name if own else "", arch, settings)
    elif arch or settings:
        raise UserError("arch and settings are for recipes by name; change the Recipe itself instead")
    _refuse_stock_mixers(_listed(cbs))
    lookahead = None if recipe.lookahead is None else recipe.lookahead.build()
    model = recipe.model.build().create(dls.c, inputs.shape)
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
    if recipe.distill is not None:
        check_teacher(learn.teacher_distill.teacher, dls.c, inputs, vocabulary(dls))
    learn.recipe = recipe
    learn.remove_cbs([learn.recorder, CastToTensor])
    return learn.add_cb(Recorder())


def _check_batches(loader: Any, model: nn.Module, inputs: Inputs) -> None:
    """Raise a UserError if there are no batches, or one of one image, of which a batch norm cannot learn."""
    images, bs = getattr(loader, "n", None), getattr(loader, "bs", None)
    if images is None or bs is None:  # torch's loader, or one of unknown length
        return
    if not len(loader):
        raise UserError(f"{images} training images make no batch of {bs}; take a smaller batch size")
    last = bs if loader.drop_last or not images % bs else images % bs
    if 1 in (bs, last) and needs_more_than_one(model, inputs.shape):
        what = "batches are" if bs == 1 else f"{images} images in batches of {bs} leave a last batch"
        raise UserError(f"{what} of one image, too few for a batch norm of this model; take another batch size")


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
