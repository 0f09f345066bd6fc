"""`dms_learner` as one who knows fastai expects it: groups of parameters, networks and functions of one's own."""

import math
from functools import partial
from types import SimpleNamespace

import numpy as np
import onnxruntime
import pytest
import timm
import torch
from fastai.callback import mixup as fastai_mixup
from fastai.callback.core import Callback
from fastai.callback.hook import hook_output
from fastai.callback.preds import MCDropoutCallback
from fastai.callback.progress import ShowGraphCallback
from fastai.callback.tracker import EarlyStoppingCallback, SaveModelCallback
from fastai.learner import load_learner
from fastai.losses import CrossEntropyLossFlat, LabelSmoothingCrossEntropyFlat
from fastai.metrics import F1Score, error_rate, top_k_accuracy
from fastai.optimizer import Adam, OptimWrapper
from torch import nn

from dms_fastai import DMSLoss, EarlyStopping, UserError, dms_learner, load_data, load_recipe, load_teacher
from dms_fastai.export import export_model, predict_files
from dms_fastai.models.groups import body_and_head
from dms_fastai.models.weights import save_weights
from dms_fastai.runs.checkpoint import Checkpoint
from tests.conftest import quiet
from tests.test_runs import dms  # noqa: F401  (a fixture)


@pytest.fixture(scope="module")
def few():
    """The digits in batches of 256: a few steps an epoch."""
    return load_data("digits", bs=256)


class Own(nn.Module):
    """A network as people write them, without anything of timm's."""

    def __init__(self, classes=10):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 3, stride=2), nn.BatchNorm2d(8)
        self.last = nn.Linear(8, classes)

    def forward(self, x):
        return self.last(self.norm(self.conv(x)).relu().mean((2, 3)))


class Rates(Callback):
    """Keeps the learning rate of each group in each step, and which weights had a gradient."""

    run_valid = False

    def before_fit(self):
        self.seen, self.trained = [], []

    def before_step(self):
        self.seen.append([hypers["lr"] for hypers in self.learn.opt.hypers])
        self.trained.append({name for name, p in self.learn.model.named_parameters() if p.grad is not None})


def refused(call, *words):
    with pytest.raises(UserError) as error:
        call()
    assert "\n" not in error.value.message
    for word in words:
        assert word in error.value.message


def moved(learn, fit):
    """The names of the parameters that a fit changes."""
    before = {name: p.detach().clone() for name, p in learn.model.named_parameters()}
    fit()
    return {name for name, p in learn.model.named_parameters() if not torch.equal(p, before[name])}


# Groups of parameters


@pytest.mark.parametrize("settings", [None, {"optimizer.wd_bn_bias": False}, {"lookahead.k": 2}, {"sam.rho": 0.05}])
@pytest.mark.parametrize("recipe", ["se", "fast"])
def test_frozen_weights_stay_and_the_head_learns(few, recipe, settings):
    learn = quiet(dms_learner(few, recipe, arch="dmsresnet_tiny_plain", settings=settings))
    learn.fit(1)  # momenta, which must not move what is frozen later
    norms = {f"{name}.{kind}" for name, m in learn.model.named_modules() if isinstance(m, nn.BatchNorm2d)
             for kind in ("weight", "bias")}  # fmt: skip
    everything = {name for name, _ in learn.model.named_parameters()}
    learn.freeze()
    assert moved(learn, lambda: learn.fit_one_cycle(1)) == {"fc.weight", "fc.bias"} | norms
    learn.unfreeze()
    assert moved(learn, lambda: learn.fit_one_cycle(1, slice(1e-3, 1e-2))) == everything


def test_each_group_has_the_rate_of_a_slice(few):
    learn = quiet(dms_learner(few, "se", cbs=Rates(), lr=slice(1e-4, 1e-2)))
    learn.fit(1)
    np.testing.assert_allclose(learn.rates.seen[0], [1e-4, 1e-2])
    learn.fit(1, slice(2e-2))
    np.testing.assert_allclose(learn.rates.seen[-1], [2e-3, 2e-2])
    learn.fit_one_cycle(2, slice(1e-4, 1e-2))
    np.testing.assert_allclose(np.max(learn.rates.seen, 0), [1e-4, 1e-2], rtol=0.1)
    for lr, expected in ((None, [1e-4, 1e-2]), (slice(3e-3, 3e-1), [3e-3, 3e-1])):
        learn.fit_recipe(2, lr)
        seen = np.array(learn.rates.seen)
        np.testing.assert_allclose(seen[:, 0] / seen[:, 1], 1e-2)
        np.testing.assert_allclose(seen.max(0), expected, rtol=0.1)
    assert learn.recipe.optimizer.lr == 1e-2
    refused(lambda: learn.fit_recipe(1, slice(0.0, 0.1)), "above 0")


def test_fine_tune_trains_the_head_first_and_then_all(few):
    learn = quiet(dms_learner(few, "se", cbs=Rates()))
    frozen = []
    fit = learn.fit_one_cycle

    def fitting(*args, **kwargs):
        fit(*args, **kwargs)
        frozen.append(("conv1.weight" not in learn.rates.trained[0], np.max(learn.rates.seen, 0)))

    learn.fit_one_cycle = fitting
    learn.fine_tune(1, base_lr=0.02, freeze_epochs=1)
    (first, head), (then, rates) = frozen
    assert (first, then) == (True, False)
    assert head[1] > 0.018
    np.testing.assert_allclose(rates, [1e-4, 1e-2], rtol=0.1)


@pytest.mark.parametrize(
    ("name", "args", "head"),
    [
        ("dmsresnet_tiny", {}, {"fc.weight", "fc.bias"}),
        ("resnet18", {}, {"fc.weight", "fc.bias"}),
        ("convnext_atto", {}, {"head.fc.weight", "head.fc.bias"}),
        (
            "deit_tiny_distilled_patch16_224",
            {"depth": 1, "embed_dim": 48},
            {f"{head}.{kind}" for head in ("head", "head_dist") for kind in ("weight", "bias")},
        ),
    ],
)
def test_the_last_group_is_timms_classifier(name, args, head):
    network = timm.create_model(name, num_classes=10, **args)
    body, last = body_and_head(network)
    names = {id(p): name for name, p in network.named_parameters()}
    assert {names[id(p)] for p in last} == head
    assert [id(p) for p in (*body, *last)] == sorted((id(p) for p in (*body, *last)), key=list(names).index)
    assert len(body) + len(last) == len(names)


def test_a_network_of_one_group_says_so_instead_of_freezing_nothing(few):
    for learn in (dms_learner(few, "se", arch=Own()), dms_learner(few, "se", splitter=lambda m: list(m.parameters()))):
        refused(learn.freeze, "one group", "splitter=")
        refused(lambda learn=learn: learn.fine_tune(1), "splitter=")
        learn.unfreeze()
    split = dms_learner(few, "se")
    split.freeze_to(1)
    for n in (2, -2, 7):
        refused(lambda n=n: split.freeze_to(n), f"group {n}", "2 groups")


def test_a_splitter_of_ones_own(few):
    def three(network):
        return [list(part.parameters()) for part in (network.conv, network.norm, network.last)]

    learn = quiet(dms_learner(few, "se", arch=Own(), splitter=three, cbs=Rates()))
    learn.freeze_to(-1)
    assert moved(learn, lambda: learn.fit(1)) == {"norm.weight", "norm.bias", "last.weight", "last.bias"}
    learn.unfreeze()
    learn.fit_one_cycle(1, slice(1e-4, 1e-2))
    np.testing.assert_allclose(np.max(learn.rates.seen, 0), [1e-4, 1e-3, 1e-2], rtol=0.1)


def test_groups_do_not_change_what_a_recipe_trains(few):
    """Body and head in two groups, and all in one, to the last bit."""

    def trained(recipe, **kwargs):
        torch.manual_seed(0)
        learn = quiet(dms_learner(few, recipe, settings={"clip.value": 0.1, "lookahead.k": 2}, **kwargs))
        learn.fit_recipe(2)
        return list(learn.model.state_dict().values())

    for recipe in ("se", "fast"):
        pairs = zip(trained(recipe), trained(recipe, splitter=lambda m: list(m.parameters())), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)


def test_a_checkpoint_with_other_groups_is_refused_in_a_line(few, tmp_path):
    """As an earlier version wrote it: all parameters in one group."""
    learn = quiet(dms_learner(few, "se", splitter=lambda m: list(m.parameters())))
    keeping = Checkpoint(tmp_path, SimpleNamespace(rows=[]), every=100)
    learn.fit(1, cbs=keeping)
    assert keeping.files()
    refused(lambda: Checkpoint(tmp_path, SimpleNamespace(rows=[])).resume(dms_learner(few, "se")), "--restart")


# Networks of one's own


def test_a_network_of_ones_own_trains_and_leaves(few, teacher, tmp_path):
    own = Own()
    learn = quiet(dms_learner(few, "kd", teacher=teacher, arch=own, path=tmp_path))
    assert learn.model is own
    assert moved(learn, lambda: learn.fit_recipe(1)) == {name for name, _ in own.named_parameters()}
    pixels = np.random.default_rng(0).integers(0, 256, (4, 3, 8, 8), dtype=np.uint8)
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (learn.card.mean, learn.card.std))
    with torch.no_grad():
        expected = own.eval()((torch.tensor(pixels) / 255 - mean) / std).softmax(1)
    session = onnxruntime.InferenceSession(export_model(learn, tmp_path / "own.onnx"))
    np.testing.assert_allclose(session.run(None, {"pixels": pixels})[0], expected, atol=1e-5)
    program = torch.export.load(export_model(learn, tmp_path / "own.pt2")).module()
    torch.testing.assert_close(program(torch.tensor(pixels)), expected, atol=1e-5, rtol=0)
    learn.export("own.pkl")
    loaded = load_learner(tmp_path / "own.pkl")
    assert all(torch.equal(a, b) for a, b in zip(own.parameters(), loaded.model.parameters(), strict=True))
    assert predict_files(tmp_path / "own.pkl", [], trust=True)[0] == list(few.vocab)
    file = tmp_path / "own.safetensors"
    refused(lambda: save_weights(learn.model, learn.card, file), "own.safetensors", "architecture", "Own", ".onnx")
    assert not file.exists()


def test_a_network_of_ones_own_stays_as_it_is_until_it_is_trained(few):
    own = Own()
    own.norm.eval()
    before = {name: value.clone() for name, value in own.state_dict().items()}
    dms_learner(few, load_recipe("se"), arch=own)
    assert (own.training, own.norm.training) == (True, False)
    assert all(torch.equal(value, before[name]) for name, value in own.state_dict().items())


class Pair(Own):
    def forward(self, x):
        return super().forward(x), x


@pytest.mark.parametrize(
    ("kwargs", "words"),
    [
        ({"arch": Own(7)}, ("Own", "(1, 7)", "10 logits")),
        ({"arch": Pair()}, ("Pair", "a tuple", "10 logits")),
        ({"arch": nn.Conv2d(3, 10, 9)}, ("Conv2d does not take images of 8x8 pixels",)),
        ({"arch": nn.Flatten()}, ("Flatten", "no parameters")),
        ({"arch": Own}, ("the class Own", "built")),
        ({"arch": timm.models.resnet18}, ("the function resnet18", "name")),
        ({"arch": Own(), "settings": {"model.drop_rate": 0.1}}, ("arch", "'model.drop_rate'")),
        ({"arch": Own(), "pretrained": True}, ("pretrained", "own")),
        ({"arch": "dmsresnet", "pretrained": True, "settings": {"model.weights": "x"}}, ("'model.weights'",)),
        ({"recipe": load_recipe("se"), "pretrained": True}, ("pretrained", "Recipe")),
        ({"recipe": load_recipe("se", settings={"model.weights": "timm"}), "arch": Own()}, ("begins from timm", "Own")),
        ({"lr": 0.1, "settings": {"optimizer.lr": 0.2}}, ("lr", "'optimizer.lr'")),
        ({"wd": 0.1, "settings": {"optimizer.weight_decay": 0.2}}, ("wd", "'optimizer.weight_decay'")),
        ({"opt_func": Adam, "settings": {"optimizer.nesterov": True}}, ("opt_func", "'optimizer.nesterov'")),
        ({"opt_func": Adam, "settings": {"lookahead": True}}, ("opt_func", "'lookahead'")),
        ({"opt_func": torch.optim.AdamW}, ("torch's AdamW", "OptimWrapper")),
        ({"loss_func": nn.CrossEntropyLoss}, ("the class CrossEntropyLoss", "CrossEntropyLoss()")),
        ({"loss_func": DMSLoss(), "settings": {"loss.label_smoothing": 0.1}}, ("loss_func", "'loss.label_smoothing'")),
        ({"loss_func": DMSLoss(), "settings": {"distill.alpha": 0.5}}, ("loss_func", "'distill.alpha'", "DMSLoss")),
        ({"loss_func": DMSLoss(), "settings": {"distill": {"T": 2.0}}}, ("loss_func", "'distill.T'")),
        ({"settings": {"augment.flip": 0.5}}, ("augment.flip is 0.5", "no effect", "flip=0.5 to load_data")),
        ({"settings": {"data": {"batch_size": 64}}}, ("data.batch_size is 64", "bs=64 to load_data")),
        ({"settings": {"budget.minutes": 5.0}}, ("budget.minutes is 5.0", "no effect", "leave it out")),
        ({"settings": {"augment.flp": 0.5}}, ("augment.flp", "augment.flip")),
        ({"lr": 0.0}, ("lr is 0.0",)),
        ({"lr": slice(-1.0, 0.1)}, ("above 0",)),
        ({"wd": -0.1}, ("wd is -0.1",)),
    ],
)
def test_what_does_not_go_together_is_said(few, kwargs, words):
    refused(lambda: dms_learner(few, **{"recipe": "se", **kwargs}), *words)


# What a Learner takes


@pytest.mark.parametrize(
    "opt_func",
    [Adam, partial(Adam, lr=2e-3), partial(OptimWrapper, opt=torch.optim.AdamW)],
    ids=["Adam", "lr", "torch"],
)
def test_optimisers_of_fastai_and_torch(few, opt_func):
    learn = quiet(dms_learner(few, "se", opt_func=opt_func, wd=0.03, cbs=Rates()))
    learn.fit_recipe(1)
    assert [hypers["wd"] for hypers in learn.opt.hypers] == [0.03, 0.03]
    highest = 2e-3 if isinstance(opt_func, partial) and "lr" in opt_func.keywords else 1e-3
    np.testing.assert_allclose(np.max(learn.rates.seen, 0), highest, rtol=0.1)
    learn.freeze()
    assert "conv1.weight" not in moved(learn, lambda: learn.fit_one_cycle(1))


def test_rate_decay_and_momenta_are_the_learners(few):
    learn = quiet(dms_learner(few, "se", lr=0.02, wd=0.03, moms=(0.8, 0.7, 0.8), cbs=Rates()))
    assert (learn.recipe.optimizer.lr, learn.recipe.optimizer.weight_decay) == (0.02, 0.03)
    learn.create_opt()
    w, p = learn.model.fc.weight.detach().clone(), learn.model.fc.weight
    for each in learn.model.parameters():
        each.grad = torch.full_like(each, 0.5)
    learn.opt.step()
    torch.testing.assert_close(p, w - 0.02 * (0.5 + 0.03 * w))  # the first step of SGD with L2 decay
    learn.opt.zero_grad()
    learn.fit_one_cycle(1, 0.01)
    assert max(learn.recorder.hps["mom"]) == pytest.approx(0.8)
    learn.fit_recipe(2)
    assert np.max(learn.rates.seen) == pytest.approx(0.02, rel=0.02)


def test_another_loss_and_what_a_teacher_adds_to_it(few, teacher):
    settings = {"mixup": False, "distill.alpha": 0.6, "distill.T": 3.0}
    kwargs = {"teacher": teacher, "arch": "dmsresnet_tiny", "settings": settings | {"bf16": False}}

    def losses(loss_func):
        torch.manual_seed(0)
        learn = quiet(dms_learner(few, "kd", loss_func=loss_func, **kwargs))
        learn.fit(1)
        return torch.stack(learn.recorder.losses)

    torch.testing.assert_close(losses(CrossEntropyLossFlat()), losses(None), rtol=1e-4, atol=1e-5)
    smooth = quiet(dms_learner(few, "mixup", loss_func=LabelSmoothingCrossEntropyFlat()))
    smooth.fit_recipe(1)
    pred, targets = smooth.get_preds(act=nn.Identity())
    expected = nn.functional.cross_entropy(pred, targets, label_smoothing=0.1)
    assert smooth.validate()[0] == pytest.approx(expected.item(), rel=1e-2)


def test_fastais_metrics_are_monitored_by_their_names(few, tmp_path):
    metrics = [error_rate, F1Score(average="macro"), partial(top_k_accuracy, k=2)]
    names = ["error_rate", "f1_score", "top_k_accuracy"]
    best = [SaveModelCallback(monitor=name, fname=name) for name in names]
    stop = [EarlyStoppingCallback(monitor=name, patience=9) for name in names]
    learn = quiet(dms_learner(few, "se", metrics=metrics, path=tmp_path))
    learn.fit_recipe(3, cbs=best + stop)
    recorded = list(learn.recorder.metric_names[1:])
    for callback, name, better in zip(best, names, (min, max, max), strict=True):
        column = recorded.index(f"valid_{name}")
        assert callback.best == better(row[column] for row in learn.recorder.values)
        assert (tmp_path / "models" / f"{name}.pth").is_file()
    pred, targets = learn.get_preds()
    found = dict(zip(["loss", *names], learn.validate(), strict=True))
    assert found["error_rate"] == pytest.approx((pred.argmax(1) != targets).float().mean().item(), abs=1e-6)
    in_two = (pred.topk(2).indices == targets[:, None]).any(1).float().mean().item()
    assert found["top_k_accuracy"] == pytest.approx(in_two, abs=1e-6)


# Names and weights


def test_a_tag_chooses_weights_or_is_refused(few):
    tagged = "dmsresnet.fast_kd2_cifar10"
    refused(
        lambda: dms_learner(few, "se", arch=tagged), tagged, "model.weights=timm", "pretrained=True", "take dmsresnet"
    )
    refused(lambda: dms_learner(few, "se", arch="dmsresnet.nonsense", pretrained=True), "nonsense")
    expected = timm.create_model("dmsresnet", pretrained=True).state_dict()
    for arch in (tagged, "dmsresnet"):
        learn = dms_learner(few, "se", arch=arch, pretrained=True)
        assert learn.recipe.model.weights == "timm"
        assert all(torch.equal(value, expected[name]) for name, value in learn.model.state_dict().items())


def test_a_tag_on_the_command_line(dms):  # noqa: F811
    code, out, err = dms("run", "se", "--arch", "dmsresnet.fast_kd2_cifar10", "--epochs", 1, "--out", "x")
    assert code == 2
    assert "model.weights=timm" in out + err


@pytest.mark.parametrize("plain", ["", "_plain"])
def test_the_smallest_network_under_both_its_names(plain):
    def built(name):
        torch.manual_seed(0)
        return timm.create_model(name + plain, num_classes=7, drop_rate=0.1)

    new, old = built("dmsresnet_tiny"), built("test_dmsresnet")
    assert str(new) == str(old)
    assert all(torch.equal(a, b) for a, b in zip(new.state_dict().values(), old.state_dict().values(), strict=True))
    assert load_recipe("baseline", arch="dmsresnet_tiny").model.name == "dmsresnet_tiny_plain"


# --- What fastai also does outside a fit


@pytest.fixture(scope="module")
def tuned(few):
    learn = quiet(dms_learner(few, "finetune", arch="dmsresnet_tiny", settings={"model.weights": None}))
    learn.fit_recipe(2)
    return learn


def test_fine_tuning_takes_part_in_fits_alone(few, tuned, tmp_path):
    fresh = quiet(dms_learner(few, "finetune", arch="dmsresnet_tiny", settings={"model.weights": None}))
    assert len(fresh.validate()) == 2  # before there is an optimiser
    assert fresh.get_preds()[0].shape == (len(few.valid_ds), 10)
    fresh.freeze()
    frozen = fresh.opt.frozen_idx
    fresh.validate()
    assert fresh.opt.frozen_idx == frozen > 0
    tuned.path = tmp_path
    tuned.export("tuned.pkl")
    pixels = np.zeros((8, 8, 3), np.uint8)
    assert load_learner(tmp_path / "tuned.pkl").predict(pixels)[0] in few.vocab


def test_a_recipe_that_fine_tunes_leaves_fastais_method(tuned):
    tuned.fine_tune(1)
    assert tuned.fine_tuning.frozen == ()


def test_predictions_with_an_average_are_those_of_the_learners_own_network(few):
    learn = quiet(dms_learner(few, "se", arch="dmsresnet_tiny", settings={"ema.decay": 0.9, "model.drop_rate": 0.5}))
    learn.fit(1, 0.01)
    one, other = (learn.get_preds(cbs=MCDropoutCallback())[0] for _ in range(2))
    assert not torch.equal(one, other)
    with hook_output(learn.model.global_pool) as hook:
        learn.validate()
    assert hook.stored is not None
    assert f"{sum(p.numel() for p in learn.model.parameters()):,}" in learn.summary()


def test_predictions_of_training_images_are_in_their_order_however_batches_are_drawn():
    dls = load_data("digits", bs=256, balance=True)
    learn = quiet(dms_learner(dls, "se", arch="dmsresnet_tiny"))
    assert torch.equal(learn.get_preds(ds_idx=0)[1], dls.train_ds.labels)


@pytest.mark.parametrize(
    "watcher", [lambda: SaveModelCallback(), lambda: EarlyStoppingCallback("accuracy"), lambda: EarlyStopping(3)]
)
def test_a_validation_outside_a_fit_is_no_epoch(few, watcher, tmp_path):
    watching = watcher()
    learn = quiet(dms_learner(few, "se", arch="dmsresnet_tiny", cbs=watching, path=tmp_path))
    before = learn.validate()
    learn.fit_recipe(1)
    best = watching.best
    assert np.isfinite(best)
    assert len(learn.validate()) == len(before) == 2
    assert watching.best == best
    assert watching in learn.cbs


def test_a_network_that_a_learner_has_trained_teaches_in_its_normalisation():
    mean, std = (0.5, 0.4, 0.3), (0.25, 0.2, 0.3)
    dls = load_data("digits", bs=256, mean=mean, std=std)
    learn = dms_learner(dls, "se", arch="dmsresnet_tiny")
    for source in (learn, learn.model):
        found = load_teacher(source)
        assert (found.mean, found.std) == (mean, std)
    assert timm.create_model("dmsresnet_tiny").pretrained_cfg["mean"] != mean


@pytest.mark.parametrize("mixer", [fastai_mixup.MixUp, fastai_mixup.CutMix])
def test_fastais_mixers_are_refused_wherever_they_come_from(few, mixer):
    refused(lambda: dms_learner(few, "se", arch="dmsresnet_tiny").fit(1, 0.01, cbs=mixer()), "swaps the loss")
    own = dict(loss_func=CrossEntropyLossFlat(), arch="dmsresnet_tiny")
    mixed = dms_learner(few, "se", settings={"mixup.alpha": 1.0}, **own)
    refused(lambda: quiet(mixed).fit(1, 0.01, cbs=mixer()), "would mix the same batch")


def test_a_graph_of_another_column_is_refused(few):
    learn = dms_learner(few, "se", arch="dmsresnet_tiny", cbs=ShowGraphCallback())
    refused(lambda: learn.fit(1, 0.01), "ShowGraphCallback", "plot_loss")


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda dls: load_data("digits", mean=(0.5, 0.5, "a")), "three numbers"),
        (lambda dls: load_data("digits", mean=0.5), "three numbers"),
        (lambda dls: load_data("digits", mean=(0.5, 0.5, math.nan)), "three numbers"),
        (lambda dls: load_data("digits", std=(0.5, 0.5, 0.0)), "those of std above 0"),
        (lambda dls: load_data("digits", device="foo"), "device is 'foo'"),
        (lambda dls: dms_learner(dls, "se", lr=[1e-3, 1e-2]), "lr is [0.001, 0.01]"),
        (lambda dls: dms_learner(dls, "se", lr="a"), "lr is 'a'"),
        (lambda dls: dms_learner(dls, "se", lr=slice(None)), "a slice needs the rate of the last group"),
        (lambda dls: dms_learner(dls, "se", wd="a"), "wd is 'a'"),
        (lambda dls: dms_learner(dls, "se").fit_recipe(1, [1e-3]), "lr is [0.001]"),
        (lambda dls: dms_learner(dls, "se").fit_recipe(1, slice(1e-4, None)), "a slice needs"),
        (lambda dls: dms_learner(dls, "se").fit_recipe(1, start_epoch=-1), "start_epoch is -1"),
    ],
)
def test_arguments_that_mean_nothing_are_said(few, call, words):
    refused(lambda: call(few), words)


@pytest.mark.parametrize("kind", [list, np.array, torch.tensor])
def test_statistics_come_as_people_have_them(kind):
    found = load_data("digits", bs=256, mean=kind([0.5, 0.25, 0.5]), std=kind([0.25, 0.5, 0.5])).train
    assert (found.mean, found.std) == ((0.5, 0.25, 0.5), (0.25, 0.5, 0.5))


def test_a_misspelt_argument_of_load_data_is_named():
    for given, words in (({"flp": 0.5}, "did you mean 'flip'"), ({"batch_tfms": []}, "load_data has no batch_tfms")):
        with pytest.raises(UserError, match=words):
            load_data("digits", **given)


def test_epochs_are_a_whole_number(dls):
    learn = dms_learner(dls, "se", arch="test_dmsresnet")
    for epochs in ("3", 0, 1.5):
        with pytest.raises(UserError, match="epochs is"):
            learn.fit_recipe(epochs)
