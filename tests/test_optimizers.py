"""Muon, AdamW, Nesterov's step, exemption from decay and the linear schedule, by arithmetic and in runs."""

import copy

import numpy as np
import pytest
import timm
import timm.optim.muon
import torch
from fastai.learner import load_learner
from torch import nn

from dms_fastai import UserError, dms_learner, load_data
from dms_fastai.training import muon
from dms_fastai.training.muon import COEFFICIENTS, StackedMuon
from dms_fastai.training.optimizers import OPTIMIZERS, SGD, AdamW, Lookahead, Muon, optimizer, parameters_called
from dms_fastai.training.schedules import triangle
from tests.conftest import quiet
from tests.test_runs import dms, same_run  # noqa: F401  (a fixture)


def one_step(settings, param, grad):
    opt = optimizer([param], settings.lr, settings)
    param.grad = grad.clone()
    opt.step()
    return opt


def test_a_weight_may_get_its_first_gradient_late():
    """By hand: its first step is its gradient, and the other goes on with its momentum."""
    early, late = (torch.nn.Parameter(torch.zeros(2)) for _ in range(2))
    opt = optimizer([early, late], 1.0, SGD(lr=1.0, momentum=0.5, weight_decay=0.0))
    early.grad = torch.ones(2)
    opt.step()
    late.grad = torch.full((2,), 3.0)
    opt.step()
    opt.step()
    assert early.tolist() == [-(1 + 1.5 + 1.75)] * 2
    assert late.tolist() == [-(3 + 4.5)] * 2


def test_nesterov_looks_ahead():
    """The first step by hand: v = g, and the step is lr (g + 0.9 v)."""
    p = torch.nn.Parameter(torch.zeros(3))
    one_step(SGD(lr=0.1, weight_decay=0.0, nesterov=True), p, torch.tensor([1.0, -2.0, 0.5]))
    np.testing.assert_allclose(p.detach(), [-0.19, 0.38, -0.095], rtol=1e-6)
    with pytest.raises(UserError, match="needs a momentum"):
        SGD(momentum=0.0, nesterov=True).over([{"params": [p]}], 0.1)


def test_muon_moves_a_convolution_by_an_orthogonal_matrix():
    """The step has the gradient's singular vectors, and singular values near lr whatever the gradient's are."""
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(16, 8, 3, 3, generator=generator)
    grad = 1e-3 * torch.randn(16, 8, 3, 3, generator=generator)
    p = torch.nn.Parameter(start.clone())
    one_step(Muon(lr=0.1, weight_decay=0.5, steps=5), p, grad)
    step = (start * (1 - 0.1 * 0.5) - p.detach()).reshape(16, -1).double()
    u, _, vt = torch.linalg.svd(grad.reshape(16, -1).double(), full_matrices=False)
    inside = u.T @ step @ vt.T
    assert inside.diagonal().min() > 0.1 * 0.6
    assert inside.diagonal().max() < 0.1 * 1.4
    assert (inside - inside.diagonal().diag()).abs().max() < 0.1 * 0.05  # the iteration runs in bf16
    assert (step - u @ inside @ vt).abs().max() < 0.1 * 0.01


class StackedAnywhere(StackedMuon):
    def stacks(self, p):
        return p.grad is not None and bool(self.state[p].get("use_muon"))


@pytest.mark.parametrize(
    ("layout", "near"),  # in bf16, another order of the columns gives other last digits
    [(torch.contiguous_format, {"rtol": 1e-4, "atol": 1e-5}), (torch.channels_last, {"rtol": 1e-3, "atol": 1e-4})],
)
def test_a_stack_of_matrices_moves_as_each_alone(layout, near):
    """As a GPU moves them, against timm's: all of a network's parameters, with some that get no gradient."""
    settings = dict(lr=0.06, weight_decay=0.05, momentum=0.9, nesterov=True, ns_steps=3)
    settings |= dict(ns_coefficients=COEFFICIENTS, adjust_lr_fn="original", fallback_lr_scale=0.1)
    torch.manual_seed(0)
    network = timm.create_model("dmsresnet_mini").to(memory_format=layout)
    both = [copy.deepcopy(network) for _ in range(2)]
    one, stacked = (
        made(net.parameters(), **settings) for made, net in zip((timm.optim.Muon, StackedAnywhere), both, strict=True)
    )
    pairs = list(zip(*(net.parameters() for net in both), strict=True))
    for step in range(4):
        for number, (p, q) in enumerate(pairs):
            grad = None if number == step else torch.randn_like(p)  # in the layout of p
            p.grad, q.grad = grad, None if grad is None else grad.clone()
        one.step(), stacked.step()
        assert all((p.grad is None) == (q.grad is None) for p, q in pairs)
    for (name, start), (p, q) in zip(network.named_parameters(), pairs, strict=True):
        assert not torch.equal(start, q), name
        torch.testing.assert_close(q, p, **near)
    assert stacked.state_dict()["state"].keys() == one.state_dict()["state"].keys()


def test_a_matrix_that_is_alone_joins_the_smallest_stack_that_holds_it():
    shapes = [(4, 9), (8, 72), (8, 72), (16, 144), (8, 64), (16, 144), (16, 160), (17, 20)]
    assert muon.stacks_of(shapes) == {(8, 72): [0, 1, 2, 4], (16, 144): [3, 5], (16, 160): [6], (17, 20): [7]}


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_updates_have_the_strides_of_what_they_move(layout):
    """torch adds many tensors at once only where their strides are the same."""
    convolutions = [torch.randn(8, *rest) for rest in [(4, 3, 3), (4, 3, 3), (2, 3, 3), (8, 1, 1), (1, 3, 3)]]
    updates = [x.to(memory_format=layout) for x in convolutions] + [torch.randn(3, 20), torch.randn(20, 3)]
    moved = muon.orthogonal(updates, 5)
    assert [x.stride() for x in moved] == [x.stride() for x in updates]
    for move, update in zip(moved, updates, strict=True):
        u, _, vt = torch.linalg.svd(update.flatten(1), full_matrices=False)
        inside = u.T @ move.flatten(1) @ vt.T
        assert 0.6 < inside.diagonal().min() <= inside.diagonal().max() < 1.4
        assert (inside - inside.diagonal().diag()).abs().max() < 0.05


@pytest.mark.parametrize(("device", "stacked"), [("cpu", {2}), ("meta", {3})])
def test_matrices_move_in_stacks_where_they_are_and_not_where_they_were(device, stacked, monkeypatch):
    """fastai makes the optimiser first, and then moves the model to the GPU; "meta" stands for one."""
    dimensions, zeropower = set(), muon.zeropower_via_newtonschulz

    def spy(matrices, *args, **kwargs):
        dimensions.add(matrices.ndim)
        return zeropower(matrices, *args, **kwargs)

    network = timm.create_model("test_dmsresnet")
    here = list(network.parameters())
    opt = optimizer(here, 0.06, Muon())
    there = dict(zip(here, network.to(device).parameters(), strict=True))
    for group in opt.opt.param_groups:  # as they are on a GPU: the same parameters
        group["params"] = [there[p] for p in group["params"]]
    for step in range(2):  # timm's first step is for all
        for p in network.parameters():
            p.grad = torch.ones_like(p)
        if step == 1:
            for module in (timm.optim.muon, muon):
                monkeypatch.setattr(module, "zeropower_via_newtonschulz", spy)
        opt.step()
    assert dimensions == stacked


def test_muon_leaves_norms_to_nadam_at_a_rate_of_its_own():
    p = torch.nn.Parameter(torch.ones(4))
    opt = one_step(Muon(lr=0.1, weight_decay=0.5, rest=0.1), p, torch.tensor([1e-3, -5.0, 2.0, -1.0]))
    # Adam's first step is lr times the sign, NAdam's a little more; norms do not decay.
    steps = (1 - p.detach()) * torch.tensor([1.0, -1.0, 1.0, -1.0])
    assert steps.min() > 0.009
    assert steps.max() < 0.025
    opt.set_hyper("mom", 0.5)
    assert opt.hypers[0]["mom"] == 0.5
    assert {group["momentum"] for group in opt.opt.param_groups} == {0.5}
    assert {group["betas"] for group in opt.opt.param_groups} == {(0.9, 0.95)}


def test_the_linear_schedule_is_a_triangle(dls):
    assert [triangle(2.0, 0.2, pct) for pct in (0, 0.1, 0.2, 0.6, 1)] == pytest.approx([0, 1, 2, 1, 0])
    learn = quiet(dms_learner(dls, "fast"))
    learn.fit_recipe(2)
    steps, rates, lr = 2 * len(dls.train), learn.recorder.hps["lr"], learn.recipe.optimizer.lr
    assert max(rates) <= lr
    assert rates[steps // 10] == pytest.approx(lr * (steps // 10) / steps / 0.2)
    assert rates[-1] == pytest.approx(lr / steps / 0.8, rel=1e-3)


def small_network():
    torch.manual_seed(0)
    body = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return nn.Sequential(body, nn.Linear(8, 5))


def trained(model, opt, steps=5):
    """The parameters after a few steps along random gradients."""
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        for p in model.parameters():
            p.grad = torch.randn(p.shape, generator=generator)
        opt.step()
    return [p.detach() for p in model.parameters()]


def test_adamw_is_torchs_with_groups():
    """Body and head at rates of their own; norms and biases without decay."""
    ours, theirs = small_network(), small_network()
    settings = AdamW(lr=0.02, momentum=0.8, beta2=0.95, eps=1e-6, weight_decay=0.5)
    groups = [list(ours[0].parameters()), list(ours[1].parameters())]
    opt = optimizer(groups, slice(0.002, 0.02), settings)
    plain = torch.optim.AdamW(
        [
            {"params": [theirs[0][0].weight], "lr": 0.002},
            {"params": [theirs[0][0].bias, *theirs[0][1].parameters()], "lr": 0.002, "weight_decay": 0},
            {"params": [theirs[1].weight]},
            {"params": [theirs[1].bias], "weight_decay": 0},
        ],
        lr=0.02,
        betas=(0.8, 0.95),
        eps=1e-6,
        weight_decay=0.5,
        foreach=False,
        fused=False,
    )
    for a, b in zip(trained(ours, opt), trained(theirs, plain), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)
    opt.set_hyper("mom", 0.6)
    assert {group["betas"] for group in opt.opt.param_groups} == {(0.6, 0.95)}
    assert opt.hypers[0] == {"lr": pytest.approx(0.002), "mom": 0.6, "wd": 0.5}


@pytest.mark.parametrize("kind", OPTIMIZERS.values())
@pytest.mark.parametrize("wd_bn_bias", [True, False])
def test_what_no_decay_names_stays_where_no_gradient_moves_it(kind, wd_bn_bias):
    model = small_network()
    settings = kind(lr=0.1, weight_decay=0.5, wd_bn_bias=wd_bn_bias, no_decay=("0.0.weight", "1.bias"))
    named = parameters_called(settings.no_decay, model)
    assert [id(p) for p in named] == [id(model[0][0].weight), id(model[1].bias)]
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    opt = optimizer(list(model.parameters()), 0.1, settings, undecayed=named)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    opt.step()
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == ({"1.weight", "0.0.bias", "0.1.weight"} if wd_bn_bias else {"1.weight"})  # 0.1.bias is 0


def test_names_of_parameters_may_be_the_last_parts():
    model = nn.ModuleDict({"blocks": small_network(), "conv": nn.Conv2d(3, 8, 3)})
    assert len(parameters_called(["bias"], model)) == 4
    assert [p.shape for p in parameters_called(["1.weight", "conv.weight"], model)] == [(8,), (5, 8), (8, 3, 3, 3)]
    assert [p.shape for p in parameters_called(["1.weight"], model["blocks"])] == [(5, 8)]  # a whole name
    for name in ("ias", "conv", "onv.weight", "conv.weight.x"):
        with pytest.raises(UserError, match=f"unknown parameter in optimizer.no_decay '{name}'"):
            parameters_called([name], model)


def test_a_learner_exempts_what_the_recipe_names(dls, tmp_path):
    with pytest.raises(UserError, match=r"no_decay 'fc.wieght': did you mean 'fc.weight'"):
        dms_learner(dls, "se", settings={"optimizer.no_decay": ["fc.wieght"]})
    learn = quiet(dms_learner(dls, "se", settings={"optimizer.no_decay": ["fc.weight"]}, path=tmp_path))
    learn.export("own.pkl")
    for each in (learn, load_learner(tmp_path / "own.pkl"), copy.deepcopy(learn)):
        each.create_opt()
        free = [p for group in each.opt.opt.param_groups if group["weight_decay"] == 0 for p in group["params"]]
        assert [p.shape for p in free] == [learn.model.fc.weight.shape]
        assert free[0] is each.model.fc.weight
        assert len(each.opt.hypers) == 2


def test_without_the_option_the_groups_are_those_of_before(dls):
    sgd, adamw = (dms_learner(dls, "se", settings={"optimizer.name": name}) for name in ("sgd", "adamw"))
    for learn, halves in ((sgd, 1), (adamw, 2)):
        learn.create_opt()
        assert len(learn.opt.opt.param_groups) == 2 * halves
    free = [p for group in adamw.opt.opt.param_groups[1::2] for p in group["params"]]
    assert {p.ndim for p in free} == {1}
    assert {p.ndim for group in adamw.opt.opt.param_groups[::2] for p in group["params"]} == {2, 4}


RATES = {"sgd": 0.05, "muon": 0.05, "adamw": 0.01}


@pytest.fixture(params=[(name, slow) for name in RATES for slow in (False, True)], ids=str)
def learner(dls, request, tmp_path):
    """A Learner with each optimiser, with and without Lookahead."""
    name, slow = request.param
    settings = {"optimizer.name": name, "optimizer.lr": RATES[name], "optimizer.weight_decay": 0.01, "lookahead": slow}
    settings["optimizer.no_decay"] = ["fc.weight"]
    return quiet(dms_learner(dls, "se", settings=settings, path=tmp_path))


def test_fastais_methods_work_with_every_optimiser(learner):
    def weights():
        return [p.detach().clone() for p in learner.model.parameters() if p.ndim > 1]

    before, rate = weights(), RATES[learner.recipe.optimizer.name]
    assert learner.lr_find(num_it=20, show_plot=False).valley > 0
    assert all(map(torch.equal, weights(), before))
    learner.freeze_to(-1)
    learner.fit_one_cycle(1, rate)
    assert [torch.equal(*pair) for pair in zip(weights(), before, strict=True)].count(False) == 1  # the classifier's
    learner.unfreeze()
    learner.fit_one_cycle(1, slice(rate / 10, rate))
    assert learner.opt.hypers[0]["lr"] == pytest.approx(learner.opt.hypers[1]["lr"] / 10)
    losses = learner.recorder.losses
    assert np.mean(losses[-5:]) < np.mean(losses[:5])
    assert not any(map(torch.equal, weights(), before))


def test_a_saved_optimiser_goes_on_as_if_it_had_not_been(learner):
    learner.fit_one_cycle(1)
    learner.save("here")

    def next_step():
        torch.manual_seed(1)
        for p in learner.model.parameters():
            p.grad = torch.randn(p.shape)
        learner.opt.step()
        return [p.detach().clone() for p in learner.model.parameters()]

    once = next_step()
    next_step()
    learner.create_opt()
    learner.load("here")
    assert all(torch.equal(a, b) for a, b in zip(once, next_step(), strict=True))


def test_one_cycle_moves_the_first_beta_and_leaves_the_second(dls):
    settings = {"optimizer.name": "adamw", "optimizer.lr": 0.01, "schedule.name": "one-cycle"}
    learn = quiet(dms_learner(dls, "se", settings=settings))
    learn.fit_recipe(2)
    ours, rates = learn.recorder.hps["mom"], learn.recorder.hps["lr"]
    assert {group["betas"][1] for group in learn.opt.opt.param_groups} == {0.999}
    learn.fit_one_cycle(2, 0.01)
    assert ours == pytest.approx(learn.recorder.hps["mom"], abs=1e-6)
    assert rates == pytest.approx(learn.recorder.hps["lr"], abs=1e-6)


def test_lookahead_is_around_adamw():
    """By hand, under a constant gradient: AdamW's steps are lr each, and timm's slow weight begins at the fifth."""
    p = nn.Parameter(torch.zeros(1))
    opt = optimizer([p], 0.1, AdamW(lr=0.1, weight_decay=0.0, eps=1e-12), Lookahead(k=5, alpha=0.5))
    for _ in range(11):
        p.grad = torch.ones(1)
        opt.step()
    assert p.item() == pytest.approx(-0.5 - 0.5 * 0.5 - 0.1, rel=1e-4)


def test_a_stopped_run_with_muon_ends_as_one_without_interruption(dms, tmp_path):  # noqa: F811
    args = ("run", "fast", "--epochs", 2, "--device", "cpu", "--checkpoint-steps", 2)
    assert dms(*args, "--out", "whole")[0] == 0
    while (code := dms(*args, "--out", "pieces", "--time-limit", "0.3s")[0]) == 75:
        pass
    assert code == 0
    same_run(tmp_path / "whole" / "fast" / "seed0", tmp_path / "pieces" / "fast" / "seed0")


def test_an_average_is_not_drawn_back_by_lookahead():
    """To what the slow weights were before the fit left the average in their place."""
    settings = {"lookahead.k": 3, "ema.decay": 0.9, "optimizer.momentum": 0.0, "optimizer.weight_decay": 0.0}
    dls = load_data("digits", bs=256, device="cpu")
    learn = quiet(dms_learner(dls, "se", arch="test_dmsresnet", settings=settings))
    learn.fit(2, 0.1)
    average = learn.model.fc.weight.clone()
    learn.fit(1, 1e-9)
    torch.testing.assert_close(learn.model.fc.weight, average, rtol=0, atol=1e-6)


def test_weights_that_are_loaded_are_not_drawn_back_by_lookahead(tmp_path):
    settings = {"lookahead.k": 3, "optimizer.momentum": 0.0, "optimizer.weight_decay": 0.0}
    dls = load_data("digits", bs=256, device="cpu")
    learn = quiet(dms_learner(dls, "se", arch="test_dmsresnet", settings=settings, path=tmp_path))
    learn.fit(1, 0.1)
    learn.save("early", with_opt=False)
    early = learn.model.fc.weight.clone()
    learn.fit(2, 0.1)
    assert not torch.allclose(learn.model.fc.weight, early, atol=1e-3)
    learn.load("early", with_opt=False)
    learn.fit(1, 1e-9)
    torch.testing.assert_close(learn.model.fc.weight, early, rtol=0, atol=1e-6)
