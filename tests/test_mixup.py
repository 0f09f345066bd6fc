"""MixUp: pairs, lambda, and nothing left behind in the Learner."""

import pytest
import timm
import torch
from fastai.callback.core import Callback, CancelBatchException, CancelFitException
from fastai.data.core import DataLoaders
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat
from fastai.metrics import accuracy
from fastai.optimizer import SGD
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from dms_fastai import CutMix, DMSLoss, MixUp, UserError
from tests.conftest import quiet


class Spy(Callback):
    """Keep what the model saw and what the loss was given, behind everything else that changes a batch."""

    order = 40

    def __init__(self):
        super().__init__()
        self.seen, self.after = [], []

    def before_batch(self):
        self.seen.append((self.learn.training, self.learn.xb[0].clone(), self.learn.yb))

    def after_batch(self):
        self.after.append((self.learn.training, self.learn.yb, float(self.learn.loss.detach())))


def stock_learner(loss_func, cbs, n=20, bs=8, drop_last=False, metrics=None):
    """A stock fastai Learner over images whose every pixel is their class: 0 to 9."""
    y = torch.arange(n) % 10
    x = y.float().view(-1, 1, 1, 1).expand(-1, 3, 8, 8).contiguous()
    train = DataLoader(TensorDataset(x, y), bs, shuffle=True, drop_last=drop_last)
    model = timm.create_model("test_dmsresnet")
    dls = DataLoaders(train, DataLoader(TensorDataset(x, y), bs), device=torch.device("cpu"))
    return quiet(Learner(dls, model, loss_func, opt_func=SGD, lr=0.01, cbs=cbs, metrics=metrics))


def test_images_and_labels_are_mixed_by_the_same_pairs_and_lambda():
    spy = Spy()
    stock_learner(DMSLoss(), [MixUp(), spy]).fit(3)
    training = [(x, yb) for is_training, x, yb in spy.seen if is_training]
    assert len(training) == 9
    for x, (y_a, y_b, lam) in training:
        assert lam.shape == ()
        torch.testing.assert_close(x[:, 0, 0, 0], lam * y_a + (1 - lam) * y_b)
        assert sorted(y_a.tolist()) == sorted(y_b.tolist())
    assert len({float(yb[2]) for _, yb in training}) == 9


def test_validation_sees_plain_images_and_labels():
    spy = Spy()
    stock_learner(DMSLoss(), [MixUp(), spy]).fit(1)
    for x, yb in [(x, yb) for is_training, x, yb in spy.seen if not is_training]:
        assert len(yb) == 1
        assert torch.equal(x[:, 0, 0, 0], yb[0].float())


def test_one_lambda_a_sample():
    spy = Spy()
    stock_learner(DMSLoss(), [MixUp(per="sample"), spy]).fit(1)
    x, (y_a, y_b, lam) = next((x, yb) for is_training, x, yb in spy.seen if is_training)
    assert lam.shape == (8,)
    torch.testing.assert_close(x[:, 0, 0, 0], lam * y_a + (1 - lam) * y_b)


@settings(max_examples=15, deadline=None)
@given(st.floats(0.2, 5.0))
def test_lambda_has_the_moments_of_its_beta(alpha):
    """Mean 1/2 and variance 1 / (4 (2 alpha + 1)); one lambda a sample gives a sample of them at once."""
    torch.manual_seed(0)
    lam = MixUp(alpha, per="sample").draw(40_000, torch.device("cpu"))
    assert lam.mean().item() == pytest.approx(0.5, abs=0.01)
    assert lam.var().item() == pytest.approx(1 / (4 * (2 * alpha + 1)), rel=0.05)
    assert 0 <= lam.min()
    assert lam.max() <= 1


def test_any_other_loss_gives_the_same_training():
    def losses(loss_func):
        torch.manual_seed(3)
        spy = Spy()
        stock_learner(loss_func, [MixUp(), spy]).fit(2)
        return torch.tensor([loss for _, _, loss in spy.after])

    torch.testing.assert_close(losses(DMSLoss()), losses(CrossEntropyLossFlat()))


def test_metrics_and_later_callbacks_see_the_first_label_alone():
    spy = Spy()
    learn = stock_learner(DMSLoss(), [MixUp(), spy], metrics=accuracy)
    learn.recorder.train_metrics = True
    learn.fit(1)
    assert all(len(yb) == 1 for _, yb, _ in spy.after)
    assert 0 <= learn.recorder.values[-1][1] <= 1


@pytest.mark.parametrize("stop", [CancelBatchException, CancelFitException, RuntimeError])
def test_an_interrupt_leaves_nothing_behind(stop):
    class Interrupt(Callback):
        order = 30

        def after_pred(self):
            if self.learn.training:
                raise stop("enough")

    loss = DMSLoss()
    learn = stock_learner(loss, [MixUp()], metrics=accuracy)
    learn.recorder.train_metrics = True
    interrupt = Interrupt()
    learn.add_cb(interrupt)
    if stop is RuntimeError:
        with pytest.raises(RuntimeError):
            learn.fit(1)
    else:
        learn.fit(1)
    learn.remove_cb(interrupt)
    assert learn.loss_func is loss
    learn.fit(1)
    assert torch.isfinite(torch.as_tensor(learn.recorder.values[-1][0]))


def test_a_last_batch_of_one():
    learn = stock_learner(DMSLoss(), [MixUp()], n=17)
    learn.model = nn.Sequential(nn.Flatten(), nn.Linear(192, 10))
    learn.fit(1)
    assert torch.isfinite(torch.as_tensor(learn.recorder.values[-1][0]))


def test_class_weights_keep_their_scale():
    """With weights that are all alike the loss is that without weights."""
    args = torch.randn(16, 10), torch.randint(0, 10, (16,))
    y_b = args[1][torch.randperm(16)]
    lam = torch.tensor(0.3)
    torch.testing.assert_close(DMSLoss(weight=torch.full((10,), 7.0))(*args, y_b, lam), DMSLoss()(*args, y_b, lam))


@pytest.mark.parametrize("alpha", [0, -1, float("nan")])
def test_alpha_must_be_above_0(alpha):
    with pytest.raises(UserError, match="alpha"):
        MixUp(alpha)


def test_images_with_several_targets_are_not_mixed():
    learn = stock_learner(lambda pred, y, z: torch.nn.functional.cross_entropy(pred, y), MixUp())
    learn.add_cb(Two())
    with pytest.raises(UserError, match="MixUp mixes one target of each image, and these batches have 2"):
        learn.fit(1)


class Two(Callback):
    order, run_valid = -9, False

    def before_batch(self):
        self.learn.yb = (*self.learn.yb, self.learn.yb[0])


def test_what_cannot_work_is_said():
    with pytest.raises(UserError, match="'pixel'"):
        MixUp(per="pixel")
    with pytest.raises(UserError) as error:
        stock_learner(CrossEntropyLossFlat(), [MixUp(per="sample")]).fit(1)
    assert "DMSLoss" in error.value.message
    with pytest.raises(UserError) as error:
        stock_learner(DMSLoss(), [MixUp(), CutMix()]).fit(1)
    assert "MixUp and CutMix would mix the same batch" in error.value.message
