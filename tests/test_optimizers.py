"""Muon, Nesterov's step and the linear schedule, by arithmetic and in runs."""

import numpy as np
import pytest
import torch

from dms_fastai import UserError, dms_learner
from dms_fastai.training.optimizers import SGD, Muon, optimizer
from dms_fastai.training.schedules import triangle
from tests.conftest import quiet
from tests.test_runs import dms, same_run  # noqa: F401  (a fixture)


def one_step(settings, param, grad):
    opt = optimizer([param], settings.lr, settings)
    param.grad = grad.clone()
    opt.step()
    return opt


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
    steps, rates = 2 * len(dls.train), learn.recorder.hps["lr"]
    assert max(rates) <= 0.1
    assert rates[steps // 10] == pytest.approx(0.1 * (steps // 10) / steps / 0.2)
    assert rates[-1] == pytest.approx(0.1 / steps / 0.8, rel=1e-3)


def test_fastais_methods_work_with_muon(dls):
    learn = quiet(dms_learner(dls, "fast"))
    assert learn.lr_find(show_plot=False).valley > 0
    learn.fit_one_cycle(2, slice(0.02, 0.1))
    assert learn.recorder.final_record[-1] > 0.5


def test_a_stopped_run_with_muon_ends_as_one_without_interruption(dms, tmp_path):  # noqa: F811
    args = ("run", "fast", "--epochs", 2, "--device", "cpu", "--checkpoint-steps", 2)
    assert dms(*args, "--out", "whole")[0] == 0
    while (code := dms(*args, "--out", "pieces", "--time-limit", "0.3s")[0]) == 75:
        pass
    assert code == 0
    same_run(tmp_path / "whole" / "fast" / "seed0", tmp_path / "pieces" / "fast" / "seed0")
