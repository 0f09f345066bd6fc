"""Every callback of the package works alone, in a Learner that is fastai's own."""

import inspect
import pkgutil
from importlib import import_module

import pytest
import timm
import torch
from fastai.callback.core import Callback
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat
from fastai.metrics import accuracy
from torch import nn

from dms_fastai import DropBlockSchedule, FeatureDistill, FineTune, TeacherDistill, callbacks
from dms_fastai.models.dropblock import DropBlock
from dms_fastai.models.groups import body_and_head
from dms_fastai.training.parts import PARTS
from tests.conftest import quiet


def found():
    """The callbacks that the folder defines."""
    for module in pkgutil.iter_modules(callbacks.__path__):
        names = vars(import_module(f"{callbacks.__name__}.{module.name}"))
        for value in names.values():
            defined = inspect.isclass(value) and value.__module__ == names["__name__"]
            if defined and issubclass(value, Callback) and not inspect.isabstract(value):
                yield value


FOUND = list(found())


@pytest.mark.parametrize("callback", FOUND, ids=lambda c: c.__name__)
def test_it_works_alone_in_a_stock_learner(callback, dls):
    torch.manual_seed(0)
    needs = {"teacher": timm.create_model("test_dmsresnet")}
    given = [needs[p.name] for p in inspect.signature(callback).parameters.values() if p.name in needs]
    model = timm.create_model("test_dmsresnet")
    if callback is DropBlockSchedule:
        model = nn.Sequential(DropBlock(), model)
    beside = [TeacherDistill(timm.create_model("test_dmsresnet"), alpha=0.0)] if callback is FeatureDistill else []
    groups = {"splitter": body_and_head} if callback is FineTune else {}
    cbs = [callback(*given), *beside]
    learn = quiet(Learner(dls, model, CrossEntropyLossFlat(), lr=0.01, metrics=accuracy, cbs=cbs, **groups))
    first = [p.detach().clone() for p in model.parameters()]
    learn.fit(2)
    assert learn.recorder.values[-1][0] < 2.3  # below that of a guess among ten
    assert any(not torch.equal(p, q) for p, q in zip(learn.model.parameters(), first, strict=True))
    again, _ = learn.get_preds()
    assert again.isfinite().all()


def test_they_are_those_of_the_list_of_parts():
    listed = {part.at for part in PARTS if part.order is not None}
    assert listed == {f"{c.__module__.removeprefix('dms_fastai.')}:{c.__name__}" for c in FOUND}


def test_the_list_gives_each_its_order():
    orders = {part.at.split(":")[1]: part.order for part in PARTS}
    assert all(callback.order == orders[callback.__name__] for callback in FOUND)
