"""Every callback of the package works alone, in a Learner that is fastai's own."""

import inspect
import pkgutil
from importlib import import_module

import pytest
import timm
import torch
import torch.nn.functional as F
from fastai.callback.core import Callback
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat
from fastai.metrics import accuracy
from torch import nn

from dms_fastai import (
    BF16,
    EMA,
    DropBlockSchedule,
    FeatureDistill,
    FineTune,
    TeacherDistill,
    callbacks,
    load_teacher,
)
from dms_fastai.models.dropblock import DropBlock
from dms_fastai.models.groups import body_and_head
from dms_fastai.trained.network import Teacher
from dms_fastai.training.parts import PARTS
from tests.conftest import quiet
from tests.test_mixup import stock_learner


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


class Stop(Callback):
    """Interrupt the fit at the second event of a kind."""

    order = 99

    def __init__(self, event):
        super().__init__()
        self.count = 0
        setattr(self, event, self.interrupt)

    def interrupt(self):
        self.count += 1
        if self.count == 2:
            raise KeyboardInterrupt


def in_eval_mode(model, x):
    with torch.no_grad():
        return model.eval()(x)


@pytest.mark.parametrize("event", ["before_batch", "after_pred", "after_loss", "after_step", "before_validate"])
def test_callbacks_of_an_interrupted_stock_fit_leave_nothing_behind(event):
    learn, teacher = stock_learner(F.cross_entropy, []), timm.create_model("test_dmsresnet")
    learn.splitter, model = body_and_head, learn.model
    given = [FineTune(1), EMA(0.9), BF16(), TeacherDistill(teacher), FeatureDistill(), Stop(event)]
    with pytest.raises(KeyboardInterrupt):
        learn.fit(3, 0.1, cbs=given)
    assert learn.model is model
    assert all(p.requires_grad for p in model.parameters())
    assert not any(hooks for module in model.modules() for hooks in (module._forward_pre_hooks, module._forward_hooks))
    assert not torch.is_autocast_enabled("cpu")
    before = [p.clone() for p in model.parameters()]
    learn.fit(1, 0.1)
    assert not any(map(torch.equal, before, model.parameters()))


def test_after_an_interrupt_a_stock_learner_asks_the_teacher_as_it_is_now():
    teacher, heard = timm.create_model("test_dmsresnet"), []
    stop = Stop("after_step")
    hear = Callback(after_pred=lambda cb: heard.append((cb.learn.xb[0], cb.learn.teacher_distill.logits)))
    hear.order = 50
    as_it_is = Teacher(teacher, (0.0,) * 3, (1.0,) * 3)  # sees the images as they are
    learn = stock_learner(F.cross_entropy, [TeacherDistill(as_it_is), stop])
    with pytest.raises(KeyboardInterrupt):
        learn.fit(2)
    learn.remove_cb(stop)
    taught = learn.teacher_distill.teacher.model
    with torch.no_grad():
        taught.get_classifier().bias += 5
    learn.fit(1, cbs=hear)
    x, logits = heard[0]
    torch.testing.assert_close(logits, in_eval_mode(taught, x), atol=1e-4, rtol=1e-4)


def test_after_an_interrupt_features_of_another_teacher_are_distilled():
    stop = Stop("after_step")
    teacher, other = (timm.create_model("test_dmsresnet") for _ in range(2))
    learn = stock_learner(F.cross_entropy, [TeacherDistill(teacher), FeatureDistill(), stop])
    with pytest.raises(KeyboardInterrupt):
        learn.fit(2)
    learn.remove_cb(stop)
    learn.teacher_distill.teacher = load_teacher(other)
    learn.fit(1)
    assert not any(module._forward_pre_hooks for module in learn.model.modules())
