"""Fine-tuning against fastai's freeze and unfreeze, its rates by hand, and over a run that is cut short."""

import math
from contextlib import suppress

import pytest
import timm
import torch
from fastai.callback.core import Callback
from fastai.learner import Learner
from fastai.optimizer import SGD, Adam
from torch import nn

from dms_fastai import FineTune, UserError, dms_learner, load_data, processes
from dms_fastai.callbacks import sync_bn
from dms_fastai.callbacks.sync_bn import HostSyncBatchNorm
from dms_fastai.errors import Notice
from dms_fastai.models.groups import body_and_head
from tests.conftest import quiet
from tests.test_runs import dms, same_run  # noqa: F401  (a fixture)

LR, SHARE = 0.02, 0.25
FEW = {"bf16": False, "model.drop_rate": 0.0, "optimizer.lr": LR}


def three_groups(model):
    """Stem and first stage, the other stages, and the head."""
    body, head = body_and_head(model)
    return [body[:10], body[10:], head]


def ours(splitter=body_and_head, cbs=None, **settings):
    torch.manual_seed(0)
    dls = load_data("digits", bs=512, device="cpu")
    return quiet(dms_learner(dls, "se", settings=FEW | settings, splitter=splitter, cbs=cbs))


def stock(opt_func, cbs=None, **more):
    torch.manual_seed(0)
    dls = load_data("digits", bs=512, device="cpu")
    model = timm.create_model("test_dmsresnet", num_classes=10)
    return quiet(Learner(dls, model, nn.CrossEntropyLoss(), opt_func, cbs=cbs, splitter=body_and_head, **more))


def state(learn):
    return {name: value.clone() for name, value in learn.model.state_dict().items()}


def as_fastai(learn):
    """An epoch of the head alone and one of all groups, by fastai's own means."""
    learn.freeze()
    learn.fit(1, slice(LR * SHARE, LR))
    learn.unfreeze()
    learn.fit(1, slice(LR * SHARE, LR))
    return state(learn)


def assert_same(one, other):
    assert all(torch.equal(value, other[name]) for name, value in one.items())


@pytest.mark.parametrize(
    ("splitter", "settings"),
    [
        (body_and_head, {"optimizer.weight_decay": 0.1}),
        (three_groups, {"optimizer.wd_bn_bias": False, "lookahead": True}),
        (three_groups, {"optimizer.name": "adamw"}),
        (body_and_head, {"optimizer.name": "muon"}),
    ],
)
def test_it_trains_as_fastais_freeze_and_unfreeze_do(splitter, settings):
    learn = ours(splitter, **settings, **{"fine_tune.freeze_epochs": 1, "fine_tune.body_lr": SHARE})
    learn.fit(2, LR)
    assert_same(state(learn), as_fastai(ours(splitter, **settings)))


@pytest.mark.parametrize("opt_func", [SGD, Adam])
def test_it_works_in_a_stock_learner_with_fastais_optimisers(opt_func):
    learn = stock(opt_func, FineTune(1, SHARE))
    learn.freeze()  # as vision_learner leaves it
    learn.fit(2, LR)
    assert_same(state(learn), as_fastai(stock(opt_func)))


class Rates(Callback):
    """Keep the rate of each group and the share of training that is done, of every step."""

    order, run_valid = 80, False

    def __init__(self):
        self.seen = []

    def after_batch(self):
        self.seen.append((self.learn.pct_train, [hypers["lr"] for hypers in self.learn.opt.hypers]))


def test_the_schedule_is_the_heads_and_the_body_has_a_share_of_it():
    rates = Rates()
    learn = ours(three_groups, rates, **{"fine_tune.body_lr": SHARE, "schedule.name": "cosine"})
    learn.fit_recipe(3)
    assert len(rates.seen) == 6
    for step, (_, (first, second, head)) in enumerate(rates.seen):
        assert head == pytest.approx(LR * (1 + math.cos(math.pi * step / 6)) / 2)
        assert (second, first) == pytest.approx((head / 2, head / 4))


@pytest.mark.parametrize("train_bn", [True, False])
def test_only_the_head_and_the_norms_learn_at_first(train_bn):
    learn = stock(SGD, FineTune(2, SHARE), train_bn=train_bn)
    norms = {
        f"{name}.{end}"
        for name, module in learn.model.named_modules()
        for end in ("weight", "bias")
        if isinstance(module, nn.BatchNorm2d)
    }
    first = state(learn)
    learn.fit(2, LR)
    parameters = {name for name, _ in learn.model.named_parameters()}
    moved = {name for name, value in state(learn).items() if name in parameters and not torch.equal(value, first[name])}
    assert moved == {"fc.weight", "fc.bias"} | (norms if train_bn else set())
    assert all(p.requires_grad for p in learn.model.parameters())


def test_what_never_learns_stays_so_and_an_interrupt_leaves_nothing_frozen():
    def interrupt(cb):
        raise KeyboardInterrupt

    learn = ours(cbs=(stop := Callback(after_batch=interrupt)), **{"fine_tune.freeze_epochs": 1})
    fixed = learn.model.conv1.weight.requires_grad_(False)
    before = fixed.clone()
    with pytest.raises(KeyboardInterrupt):
        learn.fit(2, LR)
    learn.remove_cb(stop)
    assert [name for name, p in learn.model.named_parameters() if not p.requires_grad] == ["conv1.weight"]
    learn.fine_tuning.freeze_epochs = 0
    first = learn.model.stages[0][0].residual[0].weight.clone()
    learn.fit(1, LR)
    assert torch.equal(fixed, before)
    assert not torch.equal(learn.model.stages[0][0].residual[0].weight, first)
    assert [name for name, p in learn.model.named_parameters() if not p.requires_grad] == ["conv1.weight"]
    assert learn.fine_tuning.frozen == ()


def test_a_run_that_is_stopped_after_every_step_ends_the_same(dms, tmp_path):  # noqa: F811
    """A student that is averaged: in the frozen epoch, at its end, and in the other one."""
    few = ("--set", "data.batch_size=700", "--device", "cpu")
    assert dms("run", "se", *few, "--epochs", 1, "--out", "t")[0] == 0
    args = ["run", "kd", *few, "--epochs", 2, "--teacher", "t/se/seed0", "--set", "fine_tune=true", "--set", "ema=true"]
    assert dms(*args, "--out", "whole")[0] == 0
    stops = 0
    while (code := dms(*args, "--out", "parts", "--time-limit", "0.001s")[0]) == 75:
        stops += 1
    assert (code, stops) == (0, 5)
    same_run(tmp_path / "whole" / "kd" / "seed0", tmp_path / "parts" / "kd" / "seed0")


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: FineTune(-1), "FineTune's freeze_epochs is -1; it must be 0 or more"),
        (lambda: FineTune(body_lr=0), "FineTune's body_lr is 0; it must be above 0 and at most 1"),
        (lambda: stock_of_one_group().fit(1), "Sequential has one group of parameters; give splitter="),
    ],
)
def test_what_cannot_be_is_refused(make, words):
    with pytest.raises(UserError) as error:
        make()
    assert words in error.value.message


def stock_of_one_group():
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 10))
    return quiet(Learner(load_data("digits", bs=512, device="cpu"), model, nn.CrossEntropyLoss(), cbs=FineTune()))


class Interrupt(Callback):
    order = 90

    def after_batch(self):
        raise KeyboardInterrupt


def test_callbacks_of_one_fit_leave_nothing_behind_after_an_interrupt():
    learn = quiet(dms_learner(load_data("digits", bs=256, device="cpu"), "baseline", arch="test_dmsresnet"))
    for given in ({"cbs": [FineTune(1), Interrupt()]}, {}):
        body = [p.clone() for p in learn.model.stages.parameters()]
        with suppress(KeyboardInterrupt):
            learn.fit(1, 0.1, **given)
        assert not any(isinstance(cb, (FineTune, Interrupt)) for cb in learn.cbs)
        assert all(p.requires_grad for p in learn.model.parameters())
    assert not any(map(torch.equal, body, learn.model.stages.parameters()))


def test_a_head_that_is_trained_alone_is_said(recwarn):
    learn = quiet(dms_learner(load_data("digits", bs=256, device="cpu"), "baseline", arch="test_dmsresnet"))
    learn.fit(2, 0.1, cbs=FineTune(1))
    assert not [each for each in recwarn if "head alone" in str(each.message)]
    with pytest.warns(Notice, match="the head alone is trained: freeze_epochs is 2, of 2"):
        learn.fit(2, 0.1, cbs=FineTune(2))


def test_a_slice_of_rates_that_is_not_used_is_told_of(recwarn):
    learn = ours(body_and_head, **{"fine_tune.freeze_epochs": 0})
    learn.fit_recipe(1, 0.1)
    assert not [each for each in recwarn if "slice" in str(each.message)]
    for fit in (lambda: learn.fit_recipe(1, slice(1e-3, 1e-1)), lambda: learn.fit_one_cycle(1, slice(1e-3, 1e-1))):
        with pytest.warns(Notice, match="times the head's learning rate, in place of those of the slice"):
            fit()


def test_norms_over_several_processes_of_a_frozen_body_go_on_learning(monkeypatch):
    learnt = []
    for several in (False, True):
        learn = ours(**{"sync_bn": True, "fine_tune.freeze_epochs": 1})
        learn.create_opt()
        learn.epoch, learn.n_epoch = 0, 2
        with monkeypatch.context() as patched:
            patched.setattr(processes, "count", lambda: 2 if several else 1)  # noqa: B023
            learn.sync_bn.before_fit()
        assert any(isinstance(module, HostSyncBatchNorm) for module in learn.model.modules()) is several
        learn.fine_tuning.before_train()
        learnt.append([name for name, p in learn.model.named_parameters() if p.requires_grad])
        learn.fine_tuning.release()
        learn.sync_bn.release()
    assert learnt[0] == learnt[1]
    assert len(learnt[0]) > 2, "more than the head's"


@pytest.mark.parametrize("mean", [0.0, 3.0, 5.0])
def test_norms_over_several_processes_take_statistics_in_float32(monkeypatch, mean):
    monkeypatch.setattr(sync_bn.distributed, "all_reduce", lambda total: None)  # of one process
    x = (mean + 0.05 * torch.randn(64, 4, 16, 16, generator=torch.Generator().manual_seed(0))).bfloat16()
    ours, torchs = HostSyncBatchNorm(4), nn.BatchNorm2d(4)
    with torch.autocast("cpu", torch.bfloat16):
        found = ours(x)
    expected = torchs(x.float())
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(ours.running_mean, torchs.running_mean, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(ours.running_var, torchs.running_var, rtol=1e-5, atol=1e-6)
    assert (found.float().mean((0, 2, 3)) - expected.mean((0, 2, 3))).abs().max() < 1e-3
