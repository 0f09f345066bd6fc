"""SAM against its formula, and what it must leave alone."""

import pytest
import torch
from fastai.callback.core import Callback
from fastai.callback.fp16 import MixedPrecision
from fastai.callback.training import GradientAccumulation
from fastai.data.core import DataLoaders
from fastai.learner import Learner
from fastai.optimizer import SGD
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from dms_fastai import SAM, DMSLoss, MixUp, UserError, dms_learner
from dms_fastai.callbacks.sam import statistics_kept
from tests.conftest import quiet
from tests.test_mixup import stock_learner


def test_a_step_is_the_formulas():
    """Of least squares, whose gradient is known: x^T (x w - y) / n, here with torch's mean of squares twice that."""
    torch.manual_seed(0)
    x, y = torch.randn(12, 5), torch.randn(12, 1)
    data = DataLoader(TensorDataset(x, y), 12)
    model = nn.Linear(5, 1, bias=False)
    w, rho, lr = model.weight.detach().clone().T, 0.3, 0.1
    learn = quiet(
        Learner(DataLoaders(data, data, device=torch.device("cpu")), model, nn.MSELoss(), opt_func=SGD, cbs=SAM(rho))
    )
    learn.fit(3, lr, wd=0.0)
    for _ in range(3):
        g = 2 * x.T @ (x @ w - y) / 12
        w = w - lr * 2 * x.T @ (x @ (w + rho * g / g.norm()) - y) / 12
    torch.testing.assert_close(model.weight.T, w)


class Passes(Callback):
    """Counts how often the model is asked in training, and batch norms' batches."""

    order = 60

    def before_fit(self):
        self.asked = 0
        self.learn.model.register_forward_hook(self.count)

    def count(self, model, *_):
        self.asked += model.training


def test_running_statistics_are_those_of_the_first_pass():
    def fit(cbs):
        torch.manual_seed(0)
        passes = Passes()
        learn = stock_learner(DMSLoss(), [*cbs, passes], n=16, bs=8)
        learn.model.bn1.momentum = 0.3
        learn.fit(1, lr=0.0)
        return learn, passes.asked

    (plain, once), (sharp, twice) = fit([]), fit([SAM()])
    assert (once, twice) == (2, 4)
    for name, value in plain.model.state_dict().items():
        if "running" in name:
            torch.testing.assert_close(sharp.model.state_dict()[name], value, msg=name)
    assert sharp.model.bn1.momentum == 0.3


def test_the_whole_recipe_with_sam(dls, teacher):
    learn = quiet(dms_learner(dls, "kd", teacher=teacher, settings={"optimizer.sam": 0.05}))
    learn.fit_recipe(8)
    assert learn.validate()[1] > 0.9
    assert learn.sam.targets is None


def test_an_interrupt_of_the_second_pass_leaves_no_weights_uphill():
    learn = stock_learner(DMSLoss(), [SAM(rho=1.0)], n=8, bs=8)
    before, passes = [p.detach().clone() for p in learn.model.parameters()], []

    def interrupt(*_):
        passes.append(1)
        if len(passes) == 2:
            raise KeyboardInterrupt

    learn.model.register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        learn.fit(1)
    for weight, old in zip(learn.model.parameters(), before, strict=True):
        torch.testing.assert_close(weight, old, rtol=0, atol=1e-6)


class CPUMixedPrecision(MixedPrecision):
    """fastai's, which knows GPUs alone, for the CPU."""

    name = "mixed_precision"

    def __init__(self, dtype):
        super().__init__()
        self.dtype = dtype

    def before_fit(self):
        self.autocast, self.scales = torch.autocast("cpu", dtype=self.dtype), []
        self.learn.scaler = torch.amp.GradScaler("cpu", enabled=self.dtype == torch.float16)


def test_both_passes_have_fastais_precision():
    seen = []
    learn = stock_learner(DMSLoss(), [SAM(), CPUMixedPrecision(torch.bfloat16)], n=8, bs=8)
    learn.model.fc.register_forward_hook(lambda module, x, out: seen.append(out.dtype) if module.training else None)
    learn.fit(1)
    assert seen == [torch.bfloat16] * 2


def test_what_it_cannot_be_beside():
    with pytest.raises(UserError, match="above 0"):
        SAM(0)
    with pytest.raises(UserError, match="DMSLoss"):
        stock_learner(nn.CrossEntropyLoss(), [MixUp(), SAM()]).fit(1)
    with pytest.raises(UserError, match="larger batch"):
        stock_learner(DMSLoss(), [SAM(), GradientAccumulation(16)]).fit(1)
    with pytest.raises(UserError, match="to_bf16"):
        stock_learner(DMSLoss(), [SAM(), CPUMixedPrecision(torch.float16)]).fit(1)


def test_a_cumulative_batch_norm_counts_a_step_once():
    norm = nn.BatchNorm1d(3, momentum=None)
    norm(torch.randn(4, 3))
    with statistics_kept(norm):
        norm(torch.randn(4, 3))
    assert norm.num_batches_tracked == 1


def test_an_instance_norm_counts_a_step_once():
    norm = nn.InstanceNorm2d(2, track_running_stats=True)
    before = norm.running_mean.clone()
    with statistics_kept(norm):
        norm(torch.randn(4, 2, 5, 5) + 3)
    assert torch.equal(norm.running_mean, before)
    assert norm.momentum == 0.1
