"""DropBlock: what it blanks, and a rate that follows the learning rate, in any fit, compiled or resumed."""

import onnxruntime
import pytest
import timm
import torch
from fastai.callback.core import Callback
from fastai.learner import load_learner
from torch import nn
from torch._dynamo.testing import CompileCounter

from dms_fastai import DMSLoss, DropBlockSchedule, UserError, dms_learner, export_model, load_data, load_recipe
from dms_fastai.models.dropblock import DropBlock
from tests.conftest import quiet
from tests.test_mixup import stock_learner
from tests.test_speed import FromTheSecondStepToTheLast, Waits


class Net(nn.Sequential):
    """A small network with two DropBlocks."""

    def __init__(self):
        steps = [(nn.Conv2d(i, o, 3, stride=2, padding=1), nn.ReLU(), DropBlock()) for i, o in ((3, 8), (8, 8))]
        super().__init__(*steps[0], *steps[1], nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10))


class Rates(Callback):
    """Notes learning rate and DropBlock rates of every training step."""

    order, run_valid = 100, False

    def __init__(self):
        super().__init__()
        self.lrs, self.rates = [], []

    def before_batch(self):
        self.lrs.append(self.learn.opt.hypers[-1]["lr"])
        self.rates.append([m.rate for m in self.learn.model.modules() if isinstance(m, DropBlock)])


def blanked(seeds):
    """By hand: a seed blanks itself and its right, lower and lower-right neighbours."""
    gone = torch.zeros_like(seeds)
    height, width = seeds.shape[-2:]
    for image, i, j in seeds.nonzero().tolist():
        gone[image, i : min(i + 2, height), j : min(j + 2, width)] = True
    return gone


def test_a_seed_blanks_a_square_in_all_channels():
    block, x = DropBlock(0.3).train(), torch.rand(6, 4, 7, 5) + 1
    torch.manual_seed(3)
    out = block(x)
    torch.manual_seed(3)
    gone = blanked(torch.rand(6, 1, 7, 5)[:, 0] < 0.3 / 4)
    kept = (~gone)[:, None].expand_as(x)
    assert 0 < gone.float().mean() < 0.5
    torch.testing.assert_close(out, torch.where(kept, x * kept.numel() / kept.sum(), 0.0))


def test_the_rate_is_about_the_share_that_is_blanked():
    x = torch.ones(500, 1, 16, 16)
    gone = (DropBlock(0.1).train()(x) == 0).float()
    assert gone[:, :, 1:, 1:].mean() == pytest.approx(1 - (1 - 0.1 / 4) ** 4, abs=0.005)
    assert gone[:, :, 0, 0].mean() == pytest.approx(0.1 / 4, abs=0.02)  # only its own seed reaches the corner


def test_nothing_is_blanked_in_evaluation_or_at_a_rate_of_0():
    x = torch.randn(2, 3, 8, 8)
    assert torch.equal(DropBlock(0.9).eval()(x), x)
    assert torch.equal(DropBlock().train()(x), x)
    assert DropBlock(1.0).train()(torch.ones(1, 2, 1, 1)).isfinite().all()


def test_it_leaves_no_trace_in_weights_and_can_be_scripted():
    net = Net()
    assert not any("rate" in name for name in net.state_dict())
    scripted, x = torch.jit.script(net.eval()), torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(scripted(x), net(x))
    exported = torch.export.export(net, (x,)).module()
    torch.testing.assert_close(exported(x), net(x))


def test_another_rate_is_not_another_compilation():
    counter, block, x = CompileCounter(), DropBlock().train(), torch.ones(8, 2, 16, 16)
    compiled = torch.compile(block, backend=counter, dynamic=False, fullgraph=True)
    shares = []
    for rate in torch.linspace(0, 0.9, 20).tolist():
        block.rate = rate
        shares.append((compiled(x) == 0).float().mean().item())
    assert counter.frame_count == 1
    assert shares[0] == 0
    assert shares[-1] > 0.4


def learner(cbs, dls=None):
    dls = load_data("digits", bs=256) if dls is None else dls
    settings = {"drop_block.highest": 0.2, "schedule.name": "cosine"}
    return quiet(dms_learner(dls, "se", arch=Net(), settings=settings, cbs=cbs))


def test_the_rate_follows_the_learning_rate():
    rates = Rates()
    learn = learner([rates])
    learn.fit_recipe(3, 0.05)
    for lr, (first, second) in zip(rates.lrs, rates.rates, strict=True):
        assert first == second == pytest.approx(0.2 * (1 - lr / 0.05), abs=1e-6)
    assert rates.rates[0][0] == 0
    assert rates.rates[-1][0] > 0.18


def test_in_one_cycle_the_rate_is_0_at_the_top():
    rates = Rates()
    learn = stock_learner(DMSLoss(), [DropBlockSchedule(), rates], n=80)
    learn.model = Net()
    learn.fit_one_cycle(4, 0.3)  # neither the Learner's learning rate nor the first of the cycle
    of_step = dict(zip(rates.lrs, rates.rates, strict=True))
    assert of_step[max(of_step)][0] == pytest.approx(0, abs=2e-3)
    assert rates.rates[0][0] == pytest.approx(0.1 * (1 - 1 / 25), abs=1e-4)
    assert rates.rates[-1][0] == pytest.approx(0.1, abs=2e-3)


def test_without_a_schedule_it_stays_0():
    rates = Rates()
    learn = stock_learner(DMSLoss(), [DropBlockSchedule(), rates])
    learn.model = Net()
    learn.fit(2, 0.1)
    assert {rate for pair in rates.rates for rate in pair} == {0.0}


def test_the_second_half_of_a_fit_has_the_rates_that_the_whole_had():
    whole, rest = Rates(), Rates()
    learner([whole]).fit_recipe(4)
    learner([rest]).fit_recipe(4, start_epoch=2)
    assert rest.rates == whole.rates[len(whole.rates) // 2 :]


def test_nothing_waits_for_the_device():
    waits = Waits()
    learner([], dls=load_data("digits", bs=64)).fit_recipe(1, cbs=FromTheSecondStepToTheLast(waits))
    assert waits.seen == []


@pytest.mark.parametrize("kind", ["onnx", "pt2", "pkl"])
def test_a_trained_network_can_be_exported(tmp_path, kind):
    learn, file = learner([], dls=load_data("digits", bs=719)), tmp_path / f"net.{kind}"
    learn.fit_recipe(1)
    images = load_data("digits").valid_ds.images[:4]
    if kind == "pkl":
        learn.path = tmp_path
        learn.export(file.name)
    else:
        export_model(learn, file)
    expected = learn.get_preds(dl=learn.dls.test_dl(list(images.permute(0, 2, 3, 1).numpy())))[0]
    torch.testing.assert_close(answers(file, images), expected, rtol=1e-3, atol=1e-3)


def answers(file, images):
    """What an exported network says of uint8 images: probabilities."""
    if file.suffix == ".onnx":
        session = onnxruntime.InferenceSession(file)
        return torch.from_numpy(session.run(None, {session.get_inputs()[0].name: images.numpy()})[0])
    if file.suffix == ".pt2":
        return torch.export.load(file).module()(images)
    learn = quiet(load_learner(file))
    return learn.get_preds(dl=learn.dls.test_dl(list(images.permute(0, 2, 3, 1).numpy())))[0]


def test_a_network_without_it_is_refused():
    with pytest.raises(UserError) as error:
        quiet(dms_learner(load_data("digits", bs=256), "se", settings={"drop_block": True})).fit_recipe(1)
    assert "DMSResNet has no DropBlock" in error.value.message
    learn = stock_learner(DMSLoss(), [DropBlockSchedule()])
    learn.model = timm.create_model("test_dmsresnet")
    with pytest.raises(UserError, match="--set drop_block=false"):
        learn.fit(1)
    assert load_recipe("se").drop_block is None


def test_in_half_precision_the_scale_is_finite_however_many_positions_there_are():
    module = DropBlock(0.1).train()
    torch.manual_seed(0)
    whole = module(torch.ones(300, 4, 16, 16))
    torch.manual_seed(0)
    half = module(torch.ones(300, 4, 16, 16).half())
    torch.testing.assert_close(half.float(), whole, rtol=1e-3, atol=0)


def test_after_a_fit_the_modules_have_their_own_rates_again():
    learn = learner([])
    blocks = [module for module in learn.model.modules() if isinstance(module, DropBlock)]
    for block in blocks:
        block.rate = 0.05
    learn.fit_recipe(1)
    assert [block.rate for block in blocks] == [0.05] * len(blocks)
