"""More of what distillers use: features, standardised logits, alpha and T that change, alone and in runs."""

import numpy as np
import pytest
import timm
import torch
from fastai.callback.core import Callback, CancelStepException
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat
from torch import nn

from dms_fastai import (
    SAM,
    DMSLoss,
    FeatureDistill,
    TeacherDistill,
    UserError,
    dms_learner,
    ensemble,
    load_data,
    load_teacher,
)
from dms_fastai.callbacks.feature_distill import Pooled, feature_loss
from dms_fastai.training.equations import kd_divergence, standardized
from dms_fastai.training.losses import DKD, Distillation, Targets
from tests.conftest import quiet
from tests.test_runs import dms, same_run  # noqa: F401  (a fixture)

TINY = "test_dmsresnet"


class Spy(Callback):
    """Keeps the pieces of each training loss."""

    order, run_valid = 49, False

    def __init__(self):
        super().__init__()
        self.losses, self.settings = [], []

    def after_loss(self):
        self.losses.append({k: float(v) for k, v in getattr(self.learn.loss_func, "parts", {}).items()})
        self.losses[-1]["total"] = float(self.learn.loss.detach())
        if isinstance(self.learn.loss_func, DMSLoss):
            distillation = self.learn.loss_func.distillation.at(self.learn.loss_func.progress)
            self.settings.append((distillation.alpha, distillation.T))


# --- logits


def test_standardised_logits_have_mean_0_and_deviation_1_whatever_their_size():
    logits = torch.randn(5, 10, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = standardized(30 * logits + 4)
    assert found.mean(1).abs().max() < 1e-6
    assert ((found**2).mean(1) - 1).abs().max() < 1e-6
    torch.testing.assert_close(found, standardized(logits), atol=1e-6, rtol=0)
    assert standardized(torch.ones(2, 10)).abs().max() == 0  # no division by 0
    assert standardized(torch.ones(2, 3, dtype=torch.bfloat16)).dtype == torch.float32


def test_the_divergence_of_standardised_logits_does_not_see_their_scale():
    student, teacher = torch.randn(2, 6, 10, generator=torch.Generator().manual_seed(1))
    plain, standard = Distillation(0.9, 2.0), Distillation(0.9, 2.0, standardize=True)
    targets = Targets(torch.zeros(6, dtype=torch.long))
    assert standard.soft(5 * teacher + 3, teacher, targets) < 1e-6 < plain.soft(5 * teacher + 3, teacher, targets)
    by_hand = [(z - z.mean(1, keepdim=True)) / z.var(1, keepdim=True, correction=0).sqrt() for z in (student, teacher)]
    assert float(standard.soft(student, teacher, targets)) == pytest.approx(float(kd_divergence(*by_hand, T=2.0)), 1e-4)
    assert Distillation(divergence=DKD(), standardize=True).soft(student, teacher, targets).isfinite()


@pytest.mark.parametrize("settings", [{"standardize": True}, {"divergence": "dist"}])
def test_a_student_whose_head_begins_with_zeros_has_a_gradient_that_it_can_follow(settings):
    """Against that of logits that differ as fresh weights make them: with 1e-8 in place of it, 1e7 times that."""
    teacher, y = 3 * torch.randn(32, 10, generator=torch.Generator().manual_seed(0)), torch.zeros(32, dtype=torch.long)
    sizes = []
    for student in (torch.zeros(32, 10), torch.randn(32, 10, generator=torch.Generator().manual_seed(1))):
        student.requires_grad_()
        DMSLoss(alpha=1.0, T=4.0, **settings)(student, y, None, None, teacher).backward()
        sizes.append(float(student.grad.norm()))
    assert 0 < sizes[0] < 100 * sizes[1]


def test_two_standardised_logits_say_nothing(dms, tmp_path):  # noqa: F811
    with pytest.raises(UserError, match=r"any two logits \+1 and -1"):
        DMSLoss(standardize=True)(torch.randn(4, 2), torch.tensor([0, 1, 0, 1]), None, None, torch.randn(4, 2))
    images, labels = np.random.default_rng(0).integers(0, 256, (40, 8, 8, 3), np.uint8), np.arange(40) % 2
    np.savez(
        "two.npz",
        **{f"{part}_{k}": v for part in ("train", "test") for k, v in (("images", images), ("labels", labels))},
    )
    code, _, err = dms("run", "kd", "--data", "two.npz", "--arch", TINY, "--set", "distill.standardize=true")
    assert (code, err.count("\n")) == (2, 1)
    assert "distill.standardize would make any two logits" in err
    assert not list(tmp_path.rglob("run.json"))  # before the teacher is trained


def test_alpha_and_temperature_go_in_a_straight_line_from_start_to_end():
    distillation = Distillation(0.9, 6.0, alpha_end=0.1)
    assert not distillation.constant
    assert [round(distillation.at(p).alpha, 6) for p in (0.0, 0.25, 1.0)] == [0.9, 0.7, 0.1]
    assert {distillation.at(p).T for p in (0.0, 0.5, 1.0)} == {6.0}
    assert Distillation(T=6.0, T_end=2.0).at(0.5).T == 4.0
    assert Distillation(0.5).constant
    with pytest.raises(UserError, match="alpha_end is 2"):
        Distillation(alpha_end=2)


def test_a_run_whose_alpha_falls_goes_on_with_the_same_alpha(dms, tmp_path):  # noqa: F811
    args = ["run", "kd", "--arch", TINY, "--set", f"teacher.model.name={TINY}", "--epochs", 2, "--device", "cpu"]
    args += ["--set", "distill.alpha_end=0.2", "--set", "distill.T_end=2", "--set", "distill.standardize=true"]
    args += ["--set", "feature_distill.weight=0.5", "--checkpoint-steps", 3]
    assert dms(*args, "--out", "whole")[0] == 0
    while (code := dms(*args, "--out", "parts", "--time-limit", "0.5s")[0]) == 75:
        pass
    assert code == 0
    same_run(tmp_path / "whole" / "kd" / "seed0", tmp_path / "parts" / "kd" / "seed0")
    header = (tmp_path / "whole" / "kd" / "seed0" / "metrics.csv").read_text().splitlines()[0]
    assert "train_features" in header


def test_the_loss_is_weighted_by_the_alpha_of_the_moment():
    spy, settings = Spy(), {"distill.alpha_end": 0.0, "model.drop_rate": 0.0}
    learn = quiet(dms_learner(load_data("digits", bs=256), "kd", load_teacher(timm.create_model(TINY)), TINY, settings))
    learn.fit_recipe(2, cbs=spy)
    steps = len(spy.losses)
    for step, (losses, (alpha, T)) in enumerate(zip(spy.losses, spy.settings, strict=True)):
        assert alpha == pytest.approx(0.95 * (1 - step / steps))
        assert T == 6.0
        both = alpha * losses["distillation"] + (1 - alpha) * losses["cross_entropy"]
        assert losses["total"] == pytest.approx(both, rel=1e-5)


# --- features


@pytest.mark.parametrize("kind", ["cosine", "mse"])
def test_the_distance_of_features(kind):
    ours, theirs = torch.randn(2, 4, 7, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    if kind == "mse":
        expected = sum(((a - b) ** 2).mean() for a, b in zip(ours, theirs, strict=True)) / 4
    else:
        expected = sum(1 - a @ b / (a @ a).sqrt() / (b @ b).sqrt() for a, b in zip(ours, theirs, strict=True)) / 4
    assert float(feature_loss(ours, theirs, kind)) == pytest.approx(float(expected))


@pytest.mark.parametrize("name", [TINY, "test_vit", "test_convnext", "test_efficientnet", "test_cct", "resnet18"])
def test_features_are_what_the_classifier_is_given(name):
    size = {"img_size": 32} if name == "test_vit" else {}
    network = timm.create_model(name, num_classes=10, **size).eval()
    pooled, x = Pooled(network, network, "student"), torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        network(x)
        expected = network.forward_head(network.forward_features(x), pre_logits=True)
    torch.testing.assert_close(pooled.take(), expected)
    pooled.remove()
    assert not any(module._forward_pre_hooks for module in network.modules())


def learner(cbs, loss_func=None, n=256):
    network = timm.create_model(TINY)
    return quiet(Learner(load_data("digits", bs=n), network, loss_func or DMSLoss(), cbs=cbs))


class Watched(FeatureDistill):
    """Notes what it adds to each loss."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.added = []

    def after_loss(self):
        before = float(self.learn.loss.detach())
        super().after_loss()
        self.added.append(float(self.learn.loss) - before)


@pytest.mark.parametrize("loss", [DMSLoss, CrossEntropyLossFlat])
def test_in_a_stock_learner_the_student_comes_to_have_the_teachers_features(loss):
    teacher, features = timm.create_model("resnet10t", num_classes=10), Watched(10.0, lr=0.01)
    learn = learner([features, TeacherDistill(teacher, **({} if loss is DMSLoss else {"alpha": 0.5}))], loss())
    learn.fit(4, 0.01)
    assert 0 < sum(features.added[-5:]) < 0.7 * sum(features.added[:5])
    assert features.projection is features.adam is features.ours is None
    assert not any(module._forward_pre_hooks for module in learn.model.modules())


def test_features_have_their_weight_wherever_they_stand_in_the_list():
    """Of another loss, the teacher takes 1 - alpha; the features are no part of that."""
    student, teacher, losses = timm.create_model(TINY), timm.create_model("resnet10t", num_classes=10), []
    for order in (1, -1):
        torch.manual_seed(0)
        learn = learner([TeacherDistill(teacher, alpha=0.9), FeatureDistill(10.0)][::order], CrossEntropyLossFlat())
        learn.model.load_state_dict(student.state_dict())
        spy = Spy()
        learn.fit(1, 1e-6, cbs=spy)
        losses.append(spy.losses[0]["total"])
    assert losses[0] == pytest.approx(losses[1])


class Overflows(Callback):
    """fastai's `to_fp16()` on a CPU, with gradients that overflow in one step."""

    order, run_valid = 10, False

    def before_fit(self):
        self.learn.scaler, self.weights = torch.amp.GradScaler("cpu", init_scale=2.0**10), []

    def before_backward(self):
        factor = float("inf") if self.learn.iter == 1 else 1.0
        self.learn.loss_grad = self.learn.scaler.scale(self.learn.loss_grad) * factor

    def before_step(self):
        raise CancelStepException

    def after_step(self):
        self.weights.append(self.learn.feature_distill.projection.weight.detach().clone())
        self.learn.scaler.update()

    def after_batch(self):
        self.learn.opt.zero_grad()


def test_the_projection_leaves_out_a_step_whose_gradients_overflow():
    scaled = Overflows()
    learner([TeacherDistill(timm.create_model("resnet10t", num_classes=10)), FeatureDistill(), scaled]).fit(1)
    assert torch.equal(scaled.weights[0], scaled.weights[1])
    assert scaled.weights[-1].isfinite().all()
    assert not torch.equal(scaled.weights[1], scaled.weights[-1])


@pytest.mark.parametrize("nested", [False, True])
def test_an_ensemble_gives_the_features_of_all_its_members(nested):
    members = [timm.create_model(name, num_classes=10).eval() for name in (TINY, "resnet10t")]
    teacher = ensemble([members[0], ensemble(members[1:])] if nested else members)
    learn = learner([TeacherDistill(teacher), FeatureDistill()])
    widths = []

    class Width(Callback):
        order = 60

        def after_step(self):
            widths.append(tuple(learn.feature_distill.projection.weight.shape))

    learn.fit(1, cbs=Width())
    assert set(widths) == {(sum(m.num_features for m in members), learn.model.num_features)}


def test_an_exception_leaves_no_hooks_behind():
    class Stop(Callback):
        order = 70

        def after_step(self):
            raise KeyboardInterrupt

    learn = dms_learner(load_data("digits"), "kd", timm.create_model(TINY), TINY, {"feature_distill.weight": 1.0})
    with pytest.raises(KeyboardInterrupt):
        quiet(learn).fit_recipe(1, cbs=Stop())
    assert not any(module._forward_pre_hooks for module in learn.model.modules())
    assert learn.feature_distill.projection is None  # the next fit begins with another


def test_what_cannot_be_is_said_before_the_first_step():
    dls, teacher = load_data("digits"), timm.create_model(TINY)
    with pytest.raises(UserError, match="FeatureDistill needs a teacher"):
        learner([FeatureDistill()]).fit(1)
    net = nn.Sequential(nn.Flatten(), nn.Linear(192, 10))
    learn = quiet(Learner(dls, net, DMSLoss(), cbs=[TeacherDistill(teacher), FeatureDistill()]))
    with pytest.raises(UserError, match="the student, Sequential, does not say what its classifier is"):
        learn.fit(1)
    with pytest.raises(UserError, match="SAM's second pass"):
        learner([SAM(), TeacherDistill(teacher), FeatureDistill()]).fit(1)
    with pytest.raises(UserError, match="loss is 'l1'; it must be 'cosine' or 'mse'"):
        FeatureDistill(loss="l1")
