"""EMA against an average by hand, in what is validated, in what is left, and over a run that is cut short."""

import pytest
import torch
from fastai.callback.core import Callback, CancelFitException
from fastai.callback.tracker import EarlyStoppingCallback, SaveModelCallback

from dms_fastai import EMA, UserError, dms_learner, load_data
from dms_fastai.runs import checkpoint, stage
from tests.conftest import quiet
from tests.test_mixup import stock_learner
from tests.test_runs import dms, same_run, weights  # noqa: F401  (dms is a fixture)


class Weights(Callback):
    """Keep the raw weights after every step, in float64, and what validation was done with."""

    order = 50

    def __init__(self):
        super().__init__()
        self.steps, self.validated = [], []

    def after_step(self):
        self.steps.append({k: v.double().clone() for k, v in self.learn.model.state_dict().items()})

    def after_validate(self):
        self.validated.append({k: v.clone() for k, v in self.learn.model.state_dict().items()})


class BeforeEMA(Weights):
    """The same, while validation's model is still in place."""

    order = 7


def by_hand(first, steps, decay, every=1, epoch=1):
    """`epoch`: how many steps one has; after its last step, the weights are averaged in any case."""
    average, since = {k: v.double() for k, v in first.items()}, 0
    for n, state in enumerate(steps, start=1):
        since += 1
        if since == every or n % epoch == 0:
            d, since = min(decay, (1 + n) / (10 + n)) ** since, 0
            average = {k: d * average[k] + (1 - d) * v for k, v in state.items()}
    return average


@pytest.mark.parametrize(("decay", "every"), [(0.9, 1), (0.2, 1), (0.9, 2), (0.9, 100)])
def test_the_average_is_the_one_by_hand(decay, every):
    spy = BeforeEMA()
    learn = stock_learner(torch.nn.functional.cross_entropy, [EMA(decay, every), spy])
    first = {k: v.clone() for k, v in learn.model.state_dict().items()}
    learn.fit(3)
    expected = by_hand(first, spy.steps, decay, every, epoch=len(learn.dls.train))
    left = learn.model.state_dict()
    for key, value in expected.items():
        if left[key].is_floating_point():
            torch.testing.assert_close(left[key].double(), value, rtol=1e-4, atol=1e-6)
    for key, value in spy.validated[-1].items():
        assert torch.equal(value, left[key]), key
    assert any(not torch.equal(spy.steps[-1][key].float(), left[key]) for key in left if "running" in key)


def test_weights_that_are_shared_are_averaged_once():
    learn = stock_learner(torch.nn.functional.cross_entropy, [EMA(0.5), spy := BeforeEMA()])
    learn.model.stages[0][0].residual[3] = learn.model.stages[0][0].residual[0]
    name = "stages.0.0.residual.0.weight"
    first = {name: learn.model.state_dict()[name].clone()}
    learn.fit(2, 0.1)
    expected = by_hand(first, [{name: step[name]} for step in spy.steps], 0.5, 1)[name]
    torch.testing.assert_close(learn.model.state_dict()[name].double(), expected, rtol=1e-4, atol=1e-6)


def test_training_goes_on_with_the_raw_weights():
    alone, beside = Weights(), Weights()
    for spy, more in ((alone, []), (beside, [EMA(0.9)])):
        torch.manual_seed(0)
        stock_learner(torch.nn.functional.cross_entropy, [*more, spy]).fit(2)
    for a, b in zip(alone.steps, beside.steps, strict=True):
        assert all(torch.equal(a[key], b[key]) for key in a)


class Stop(Callback):
    order = 60

    def after_batch(self):
        if self.learn.training and self.learn.train_iter == 4:
            raise CancelFitException


def test_a_fit_that_is_cut_short_leaves_the_average():
    spy = Weights()
    learn = stock_learner(torch.nn.functional.cross_entropy, [EMA(0.9), spy, Stop()])
    first = {k: v.clone() for k, v in learn.model.state_dict().items()}
    learn.fit(3)
    for key, value in by_hand(first, spy.steps, 0.9).items():
        if first[key].is_floating_point():
            torch.testing.assert_close(learn.model.state_dict()[key].double(), value, rtol=1e-4, atol=1e-6)


def test_what_was_best_is_what_is_kept(tmp_path):
    """fastai's callbacks, which look at the end of an epoch, meet the weights that were validated."""
    stop = EarlyStoppingCallback(min_delta=100)  # which no loss falls by: in the second epoch
    for keeper, epoch in ((SaveModelCallback(), "best"), (stop, "last")):
        torch.manual_seed(0)
        learn = stock_learner(torch.nn.functional.cross_entropy, [EMA(0.9), keeper])
        learn.path = tmp_path
        learn.fit(4, 3e-3)
        losses = [values[1] for values in learn.recorder.values]
        learn.remove_cb(keeper)
        assert learn.validate()[0] == pytest.approx(min(losses) if epoch == "best" else losses[-1])
    assert len(losses) == 2


class CallOff(Callback):
    order = -1

    def before_fit(self):
        raise CancelFitException


def test_a_fit_that_is_called_off_changes_nothing():
    learn = stock_learner(torch.nn.functional.cross_entropy, [EMA(0.9), CallOff()])
    first = {k: v.clone() for k, v in learn.model.state_dict().items()}
    learn.fit(1)
    assert all(torch.equal(v, first[k]) for k, v in learn.model.state_dict().items())


class Interrupt(Callback):
    def after_validate(self):
        raise KeyboardInterrupt


def test_after_an_interrupt_training_goes_on_with_what_the_optimizer_knows():
    interrupt = Interrupt()
    learn = stock_learner(torch.nn.functional.cross_entropy, [EMA(0.9), interrupt])
    with pytest.raises(KeyboardInterrupt):
        learn.fit(1)
    learn.remove_cb(interrupt)
    before = [p.clone() for p in learn.model.parameters()]
    learn.fit(1)
    known = [p for p, *_ in learn.opt.all_params()]
    assert all(a is b for a, b in zip(learn.model.parameters(), known, strict=True))
    assert all(not torch.equal(a, b) for a, b in zip(before, learn.model.parameters(), strict=True))


def test_an_interrupted_validation_leaves_the_weights_that_are_trained(dls):
    learn = quiet(dms_learner(dls, "se", settings={"ema.decay": 0.9}, cbs=Interrupt()))
    network = learn.model
    with pytest.raises(KeyboardInterrupt):
        learn.fit(1)
    assert learn.model is network
    assert learn.ema.average is None


def test_a_run_that_was_cut_goes_on_with_its_average(dms, tmp_path):  # noqa: F811
    args = ("run", "se", "--epochs", 3, "--set", "ema.decay=0.9", "--set", "data.batch_size=256", "--device", "cpu")
    assert dms(*args, "--out", "whole")[0] == 0
    for _ in range(7):
        assert dms(*args, "--out", "pieces", "--time-limit", "0.001s")[0] == 75
    assert dms(*args, "--out", "pieces")[0] == 0
    whole, pieces = (tmp_path / name / "se" / "seed0" for name in ("whole", "pieces"))
    same_run(whole, pieces)
    assert dms("run", "se", *args[2:4], *args[6:], "--out", "raw")[0] == 0
    raw = weights(tmp_path / "raw" / "se" / "seed0")
    assert any(not torch.equal(value, raw[name]) for name, value in weights(whole).items())


def test_a_run_that_was_cut_before_it_was_exported_exports_its_average(dms, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setattr(checkpoint, "SHARE", 1e9)  # a checkpoint after every epoch, the last one too
    args = ("run", "se", "--epochs", 2, "--set", "ema.decay=0.9", "--set", "data.batch_size=256", "--device", "cpu")
    assert dms(*args, "--out", "whole")[0] == 0
    with monkeypatch.context() as patch:
        patch.setattr(stage, "export_run", lambda *_: (_ for _ in ()).throw(OSError("the disk is full")))
        assert dms(*args, "--out", "pieces")[0] == 2
    assert dms(*args, "--out", "pieces")[0] == 0
    same_run(*(tmp_path / name / "se" / "seed0" for name in ("whole", "pieces")))


def test_it_is_what_is_exported(tmp_path):
    learn = quiet(dms_learner(load_data("digits", bs=128), "se", settings={"ema.decay": 0.95}))
    learn.fit_recipe(4)
    recorded = learn.recorder.values[-1][-1]
    assert learn.validate()[1] == pytest.approx(recorded)
    learn.path = tmp_path
    learn.export("x.pkl")


@pytest.mark.parametrize("make", [lambda: EMA(0), lambda: EMA(1), lambda: EMA(0.9, every=0)])
def test_values_that_cannot_be(make):
    with pytest.raises(UserError):
        make()


def test_batches_are_counted_and_not_averaged():
    learn = quiet(dms_learner(load_data("digits", bs=256, device="cpu"), "baseline", arch="test_dmsresnet"))
    learn.fit(2, 0.1, cbs=EMA())
    counters = [b for name, b in learn.model.named_buffers() if name.endswith("num_batches_tracked")]
    assert {int(counter) for counter in counters} == {2 * len(learn.dls.train)}
