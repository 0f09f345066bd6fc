"""`dms_learner`: the parts of a recipe, put together into a fastai Learner."""

import io
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from fastai.callback.core import CancelEpochException
from fastai.callback.schedule import ParamScheduler
from fastai.callback.tracker import TrackerCallback
from fastai.data.core import DataLoaders
from fastai.learner import CastToTensor, defaults
from fastai.torch_core import to_detach
from torch import Tensor, nn

from .. import processes
from ..callbacks.bf16 import fast_kernels
from ..callbacks.progressive_resize import ProgressiveResize
from ..data.imageset import ImageSet
from ..data.loader import BatchLoader, ImageLoaders, statistics, unlabelled_images, vocabulary
from ..errors import UserError, notice
from ..files import whole
from ..models.build import needs_more_than_one, try_network
from ..models.card import ModelCard
from ..models.groups import body_and_head
from ..models.staged import StagedNet
from ..recipes import Recipe, load_recipe
from ..schema import load
from ..settings import Count, convert
from ..trained import Inputs, answers, begin_from, check_teacher, expected_by, inputs_of, load_teacher, pruned
from ..trained.inputs import seen_of, shortest
from ..training.losses import DMSLoss, check_class_weights
from ..training.onednn import strided_convolutions
from ..training.optimizers import GroupedOptimWrapper, optimizer, parameters_called
from ..training.parts import PARTS
from .arguments import (
    check_kinds,
    check_rate,
    listed,
    refuse_stock_mixers,
    refuse_two_of_one,
    refuse_without_effect,
    with_own,
)
from .events import EventLearner
from .memory import Trimmer
from .portable import PORTABLE
from .recorder import Recorder, accuracy, lazy
from .replicate import replication

__all__ = ["DMSLearner", "dms_learner"]


class DMSLearner(EventLearner):
    """A fastai Learner that has a recipe, and `fit_recipe` to train by it."""

    recipe: Recipe
    first_epoch = 0
    exported_inputs: Inputs | None = None  # of an exported Learner, which has no images any more
    made_hypers: dict[str, list[float]] | None = None  # by fastai's name, one a group of parameters

    def fit_recipe(self, epochs: int | None = None, lr: float | slice | None = None, **kwargs: Any) -> None:
        """Train by the recipe's schedule.

        Args:
            epochs: Number of epochs, in place of the recipe's.
            lr: Highest learning rate, in place of the recipe's; a slice gives each group of parameters its own, as in
                `fit_one_cycle`.
            kwargs: Further arguments of `fit`, such as `cbs` and `start_epoch`.
        """
        recipe = self.recipe
        epochs = recipe.schedule.epochs if epochs is None else epochs
        lr = self.lr if lr is None else lr
        epochs = convert(epochs, Count, "epochs")
        check_rate(lr)
        schedule = replace(recipe.schedule, epochs=epochs).build()
        if self.opt is None:
            self.create_opt()
        for name, values in (self.made_hypers or {}).items():  # fit_one_cycle and the like may have left others
            self.opt.set_hyper(name, values)
        scheduler = ParamScheduler(schedule.hypers(self._rates(lr), recipe.optimizer.momentum))
        self.fit(epochs, lr, cbs=[scheduler, *listed(kwargs.pop("cbs", None))], **kwargs)

    def create_opt(self) -> None:
        """`Learner.create_opt`, which remembers momentum and weight decay of each group for `fit_recipe`."""
        super().create_opt()
        hypers = self.opt.hypers
        self.made_hypers = {name: [group[name] for group in hypers] for name in ("mom", "wd") if name in hypers[0]}

    def _rates(self, lr: float | slice) -> float | np.ndarray:
        """A learning rate as it is; a slice as one rate a group of parameters."""
        if not isinstance(lr, slice):
            return lr
        self.opt.set_hyper("lr", lr)
        return np.array([hypers["lr"] for hypers in self.opt.hypers])

    def freeze_to(self, n: int) -> None:
        """Freeze the groups of parameters before group n, as fastai does; batch norms go on learning.

        Args:
            n: The first group to train. 0 trains all; a negative number counts from the last.

        Raises:
            UserError: There is no such group, or none before it.
        """
        if self.opt is None:
            self.create_opt()
        groups = len(self.opt.param_lists)
        if not -groups < n < groups:
            several = f"{groups} groups" if groups > 1 else "one group"
            raise UserError(
                f"nothing to freeze up to group {n}: {type(self.model).__name__} has {several} of parameters; give "
                f"splitter= a function that returns a list of parameters for each group"
            )
        super().freeze_to(n)
        for p in self.model.parameters():
            if not p.requires_grad:
                p.grad = None  # fastai's optimisers leave zeros, and would go on to decay the weight

    def fit(
        self,
        n_epoch: int,
        lr: Any = None,
        wd: float | None = None,
        cbs: Any = None,
        reset_opt: bool = False,
        start_epoch: int = 0,
    ) -> None:
        """`Learner.fit`, whose skipped epochs leave no trace in the recorder. All processes that have joined share it.

        Raises:
            UserError: The images, their classes, the batches or the loss's class weights do not fit the model.
        """
        inputs = inputs_of(self.dls)
        check_class_weights(self.loss_func, self.dls.c)
        if unlabelled_images(self.dls) and not hasattr(self, "teacher_distill"):
            raise UserError("some training images have no label; they need a teacher, whose callback is not there")
        if not 0 <= start_epoch <= n_epoch:
            raise UserError(f"start_epoch is {start_epoch}; it must be 0 to {n_epoch}, the number of epochs")
        _check_batches(self.dls.train, self.model, inputs)
        if isinstance(self.loss_func, DMSLoss):
            refuse_stock_mixers([*self.cbs, *listed(cbs)])
        self.first_epoch = start_epoch
        with self.added_cbs([*replication(), *listed(cbs)]):  # not by fastai: they have to be there to be released
            try:
                with fast_kernels(getattr(self.dls, "device", None)), strided_convolutions(self.model):
                    super().fit(n_epoch, lr, wd, reset_opt=reset_opt)
            finally:
                if isinstance(getattr(self, "recorder", None), Recorder):
                    self.recorder.fetch()  # after an exception as well, when no event is sent
                for callback in self.cbs:
                    if hasattr(type(callback), "release"):
                        callback.release()

    def load(self, file: Any, device: Any = None, **kwargs: Any) -> Any:
        """`Learner.load`, after which Lookahead does not draw the weights back to those before."""
        if isinstance(self.opt, GroupedOptimWrapper):
            self.opt.forget_slow_weights()
        return super().load(file, device, **kwargs)

    def validate(self, ds_idx: int = 1, dl: Any = None, cbs: Any = None) -> Any:
        """`Learner.validate`, of which nothing takes note that watches the epochs of a fit."""
        with self.removed_cbs([cb for cb in self.cbs if isinstance(cb, TrackerCallback)]):
            return super().validate(ds_idx, dl, cbs)

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
                self.bf16.leave()  # an exception that ends a batch sends no event

    def _set_device(self, b: tuple) -> tuple:
        """The batch on the model's device, as plain tensors, without fastai's search through it where not needed."""
        device = next(self.model.parameters()).device
        if all(type(t) is Tensor and t.device == device for t in b):
            return b
        return tuple(t.as_subclass(Tensor) if isinstance(t, Tensor) else t for t in super()._set_device(b))

    def to_detach(self, b: Any, cpu: bool = True, gather: bool = True) -> Any:
        """As in fastai, but what this process has alone: fastai gathers where WORLD_SIZE is set, whoever has set it."""
        return to_detach(b, cpu, gather=False)

    def distrib_ctx(self, *args: Any, **kwargs: Any) -> NoReturn:
        """fastai's way to several processes, which is none for this Learner.

        Raises:
            UserError: Says which is.
        """
        raise UserError(
            "distrib_ctx() is fastai's way to several processes; here, begin the script with "
            "dms_fastai.join_processes(), start it with torchrun, and leave distrib_ctx() out"
        )

    to_distributed = distrib_ctx

    @property
    def card(self) -> ModelCard:
        """What the model is and what images it expects, to be saved with its weights."""
        model, dls = self.recipe.model, self.dls
        there = len(dls.train_ds) or self.exported_inputs is None
        inputs = inputs_of(dls) if there else self.exported_inputs
        args = {"drop_rate": model.drop_rate, **model.build().args_for(inputs.shape)}
        vocab = vocabulary(dls) or [str(index) for index in range(dls.c)]
        note = self.model.note if isinstance(self.model, StagedNet) else None
        return ModelCard(model.name, vocab, inputs.mean, inputs.std, inputs.shape, args, note=note, **seen_of(dls))

    def export(self, fname: str | Path = "export.pkl", pickle_module: Any = PORTABLE, pickle_protocol: int = 2) -> None:
        """`Learner.export`, whole or not at all, and without the folders of this machine."""
        if not processes.is_first():
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
    arch: str | nn.Module | None = None,
    settings: dict[str, Any] | None = None,
    cbs: Any = None,
    metrics: Any = accuracy,
    path: str | Path | None = None,
    *,
    fresh: bool = False,
    pretrained: bool = False,
    loss_func: Callable | None = None,
    opt_func: Callable | None = None,
    lr: float | slice | None = None,
    wd: float | None = None,
    moms: tuple[float, float, float] = (0.95, 0.85, 0.95),
    splitter: Callable[[nn.Module], list] = body_and_head,
) -> DMSLearner:
    """A fastai Learner for a recipe. `fit_recipe` trains it; every other method of a Learner works as well.

    `loss_func`, `opt_func`, `lr`, `wd`, `moms` and `splitter` are as in `Learner`; some take the place of a part of the
    recipe.

    Args:
        dls: DataLoaders of `load_data`, or fastai's own. Their batch size and augmentation are used as they are. Their
            images without labels take part if the recipe distils.
        recipe: A name, the path to a .toml file, or a `Recipe`. A name or path includes the recipe's changes for these
            data, `[on.NAME]`.
        teacher: For recipes that distil: a model, a Learner, a run's folder, a .safetensors or .pkl file, "timm:NAME".
        arch: Architecture in place of the recipe's: any timm entry, or a module of your own that gives logits, in place
            of all of the recipe's [model].
        settings: Recipe values by dotted key, such as {"optimizer.lr": 0.05}. Those of [data] and [augment] are for
            `load_data`.
        cbs: Further callbacks.
        metrics: As in fastai; they are also measured in training.
        path: Where the Learner saves and exports; by default the path of the DataLoaders, which is the current folder
            for those of `load_data`, and that of the images for most of fastai's.
        fresh: Leave the weights fresh where the recipe begins from trained ones: others will be put in their place.
        pretrained: Begin from timm's weights; short for settings={"model.weights": "timm"}.
        loss_func: In place of [loss]; a `DMSLoss` also of [distill], except for its size. MixUp, CutMix and a teacher
            work with it, too, as they do in any Learner.
        opt_func: In place of [optimizer] and [lookahead]. Where it is given without `lr`, that is fastai's 0.001. The
            recipe's schedule still has the momentum of [optimizer].
        lr: Highest learning rate, in place of optimizer.lr; a slice gives each group of parameters its own.
        wd: Weight decay, in place of optimizer.weight_decay.
        moms: Momenta of `fit_one_cycle`; `fit_recipe` has the recipe's.
        splitter: Groups of parameters, to freeze and to train at different rates: body and head by default, where the
            model has timm's `get_classifier`.

    Raises:
        UserError: DataLoaders of anything but images with one class each, an unknown recipe, key or architecture, a
            value out of range, a teacher or weights to begin from that are missing or do not fit, two arguments for one
            thing, or one without effect.
    """
    inputs = inputs_of(dls)
    check_kinds(arch, loss_func, opt_func)
    module, name = (arch, None) if isinstance(arch, nn.Module) else (None, arch)
    given = {"arch": module, "pretrained": pretrained or None, "loss_func": loss_func, "opt_func": opt_func}
    refuse_two_of_one({**given, "lr": lr, "wd": wd}, settings)
    if not isinstance(recipe, Recipe):
        own = isinstance(dls.train_ds, ImageSet)  # fastai's Datasets have any attribute that one asks for
        if pretrained:
            settings = {**(settings or {}), "model.weights": "timm"}
        recipe = load_recipe(recipe, dls.train_ds.name if own else "", name, settings)
        refuse_without_effect(settings)
    elif name or settings or pretrained:
        raise UserError("arch, settings and pretrained are for recipes by name; change the Recipe itself instead")
    recipe = with_own(recipe if module is not None else pruned(recipe), module, lr, wd)
    refuse_stock_mixers(listed(cbs))
    if module is not None:
        try_network(module, recipe.model.name, dls.c, inputs.shape, "give a network that does")
    else:
        module = recipe.model.build().create(dls.c, inputs.shape)
        if recipe.model.weights is not None and not fresh:
            begin_from(module, recipe.model.weights, recipe.model.name)
            _note_other_statistics(dls, recipe)
    distilling = dict(vars(recipe.distill.build())) if recipe.distill else {}
    size = distilling.pop("size", None)
    larger = isinstance(dls.train_ds, ImageSet) and dls.train_ds.seen is not None
    if loss_func is None:
        loss_func = recipe.loss.build(**distilling)
    if opt_func is None:
        lookahead = None if recipe.lookahead is None else recipe.lookahead.build()
        undecayed = parameters_called(recipe.optimizer.no_decay, module)
        opt_func = partial(optimizer, settings=recipe.optimizer.build(), lookahead=lookahead, undecayed=undecayed)
        usual = recipe.optimizer.lr
    else:
        usual = getattr(opt_func, "keywords", {}).get("lr", defaults.lr)
    if isinstance(dls, ImageLoaders):
        dls, teacher = _with_unlabelled(dls, recipe, teacher, loss_func)
    learn = DMSLearner(
        dls,
        module,
        loss_func=loss_func,
        opt_func=opt_func,
        lr=usual if lr is None else lr,
        splitter=splitter,
        cbs=[  # where the images are larger, for a teacher, one makes the student's of them, whole from the beginning
            *_callbacks(recipe, teacher, {"size": size} | ({} if isinstance(loss_func, DMSLoss) else distilling)),
            *([ProgressiveResize(1.0, 0.0, 0.0)] if larger and recipe.progressive_resize is None else []),
            *listed(cbs),
        ],
        metrics=[lazy(metric) for metric in listed(metrics)],
        path=path,
        wd=wd,
        moms=moms,
    )
    if recipe.distill is not None:
        teaching = learn.teacher_distill.teacher
        check_teacher(teaching, dls.c, inputs, vocabulary(dls))
        if larger and teaching.largest <= dls.train_ds.size:
            held, seen = dls.train_ds.held_size, teaching.largest or dls.train_ds.size
            notice(f"the images are held at {held} pixels for a teacher, and this one sees {seen}; set distill.size")
    if recipe.progressive_resize is not None:
        for shape in sorted(recipe.progressive_resize.build().shapes(inputs.shape)):
            try_network(module, recipe.model.name, dls.c, shape, "raise progressive_resize.smallest")
    _keep_statistics(module, inputs)
    learn.recipe = recipe
    learn.remove_cbs([learn.recorder, CastToTensor])
    return learn.add_cb(Recorder())


def _with_unlabelled(dls: ImageLoaders, recipe: Recipe, teacher: Any, loss_func: Callable) -> tuple[ImageLoaders, Any]:
    """The images of a Learner, and its teacher. One that distils also trains on images without labels.

    If the images to validate on have no labels, they get the teacher's answers in their place.

    Raises:
        UserError: No training image has a label, and the recipe does not distil.
    """
    if recipe.distill is None:
        if not dls.train_ds.labelled:
            raise UserError(f"no training image has a label, and recipe {recipe.name!r} does not distil; take 'kd'")
        if dls.unlabelled is not None:
            notice(f"{len(dls.unlabelled):,} images without labels are not used: they need a teacher")
        return dls, teacher
    if teacher is None:  # which is an error, told later
        return dls, teacher
    if not isinstance(loss_func, DMSLoss):
        if dls.unlabelled is not None:
            notice(f"{len(dls.unlabelled):,} images without labels are not used: they need loss_func=DMSLoss()")
        return dls, teacher
    if not dls.valid_ds.labelled:
        teacher = load_teacher(teacher)
        check_teacher(teacher, dls.c, inputs_of(dls), vocabulary(dls))
        dls = dls.validated_by(answers(teacher, dls.valid))
    return dls.with_unlabelled(), teacher


def _keep_statistics(module: nn.Module, inputs: Inputs) -> None:
    """Have timm's `pretrained_cfg` say how the images are normalised that the network is trained on."""
    cfg = getattr(module, "pretrained_cfg", None)
    if isinstance(cfg, dict) and inputs.mean is not None:
        module.pretrained_cfg = cfg | {"mean": tuple(inputs.mean), "std": tuple(inputs.std)}


def _note_other_statistics(dls: DataLoaders, recipe: Recipe) -> None:
    """Say so if images are normalised otherwise than those that the weights to begin from were trained on."""
    expected = expected_by(recipe.model.weights, recipe.model.name)
    ours, theirs = statistics(dls), (expected.mean, expected.std)
    one, other = (np.hstack([*map(shortest, each)]) for each in (ours, theirs))
    if len(one) != len(other) or not np.allclose(one, other, atol=1e-4):
        notice(
            f"the weights expect images normalised with mean={_rounded(theirs[0])} and std={_rounded(theirs[1])}, and "
            f"these have {_rounded(ours[0])} and {_rounded(ours[1])}; give load_data the weights' own"
        )


def _rounded(values: tuple[float, ...]) -> tuple[float, ...]:
    return tuple(round(value, 4) for value in values)


def _check_batches(loader: Any, model: nn.Module, inputs: Inputs) -> None:
    """Raise a UserError if there are no batches, or one of one image, of which a batch norm cannot learn."""
    images, bs = getattr(loader, "n", None), getattr(loader, "bs", None)
    if images is None or bs is None:  # torch's loader, or one of unknown length
        return
    if not len(loader):
        raise UserError(f"{images} training images make no batch of {bs}; take a smaller batch size")
    bs = processes.rows_of(bs)
    images //= processes.count()
    last = bs if loader.drop_last or not images % bs else images % bs
    if 1 in (bs, last) and needs_more_than_one(model, inputs.shape):
        what = "batches are" if bs == 1 else f"{images} images in batches of {bs} leave a last batch"
        raise UserError(f"{what} of one image, too few for a batch norm of this model; take another batch size")


def _callbacks(recipe: Recipe, teacher: Any, teaching: dict[str, Any]) -> list:
    """The recipe's callbacks. Only `TeacherDistill` needs more: the teacher and, in `teaching`, its arguments."""
    if recipe.distill is None and teacher is not None:
        raise UserError(f"recipe {recipe.name!r} does not distil; leave the teacher out, or take 'kd'")
    if recipe.distill is not None and teacher is None:
        raise UserError(f"recipe {recipe.name!r} needs a teacher; give teacher= a Learner, a model or a run's folder")
    there = [(part, getattr(recipe, part.table)) for part in PARTS if part.order is not None]
    there = [(part, table) for part, table in there if table is not None]
    return [load(part.at)(teacher, **teaching) if part.settings else table.build() for part, table in there]
