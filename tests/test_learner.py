"""`dms_learner`: a real fastai Learner, with everything that one can do, by every recipe."""

import csv
import subprocess
import sys
import warnings
from functools import partial
from types import SimpleNamespace

import matplotlib.pyplot as plt
import numpy as np
import pytest
import timm
import torch
from fastai.callback.core import Callback, CancelFitException
from fastai.callback.hook import ActivationStats
from fastai.callback.progress import CSVLogger, ProgressCallback
from fastai.callback.schedule import lr_find  # noqa: F401  (patches Learner)
from fastai.callback.tracker import EarlyStoppingCallback, SaveModelCallback
from fastai.callback.training import GradientAccumulation
from fastai.data.transforms import Normalize
from fastai.interpret import ClassificationInterpretation
from fastai.learner import Learner, load_learner
from fastai.losses import CrossEntropyLossFlat
from fastai.optimizer import SGD
from fastai.vision.data import ImageDataLoaders
from PIL import Image
from torch import nn

from dms_fastai import (
    EMA,
    SAM,
    DMSLoss,
    FixedViews,
    TeacherDistill,
    UserError,
    dms_learner,
    load_data,
    load_recipe,
)
from dms_fastai.callbacks.bf16 import BF16
from dms_fastai.training.onednn import strided_convolutions
from dms_fastai.training.schedules import cosine_annealing
from tests.conftest import quiet


@pytest.fixture(scope="module")
def student(teacher):
    """A distilled student in a Learner. Tests leave its weights as they are."""
    torch.manual_seed(0)
    learn = quiet(dms_learner(load_data("digits", bs=64), "kd", teacher=teacher))
    learn.fit_recipe(epochs=8)
    return learn


def test_it_is_a_learner_that_learns(student):
    assert isinstance(student, Learner)
    assert student.recorder.metric_names == [
        "epoch", "train_loss", "train_cross_entropy", "train_distillation", "train_accuracy",
        "valid_loss", "valid_accuracy", "time",
    ]  # fmt: skip
    assert student.recorder.values[-1][5] > 0.8


def test_real_digits_are_learnt_by_teacher_and_student():
    """The recipes' own settings, a third of their epochs: both must be good at real images, not only improve."""
    dls = load_data("digits", bs=64)
    torch.manual_seed(0)
    good = quiet(dms_learner(dls, "mixup"))
    good.fit_recipe(epochs=14)
    pupil = quiet(dms_learner(dls, "kd", teacher=good))
    pupil.fit_recipe(epochs=14)
    assert good.validate()[1] > 0.96
    assert pupil.validate()[1] > 0.96


def test_lr_find_suggests_a_rate_and_leaves_the_weights(student):
    before = [p.clone() for p in student.model.parameters()]
    suggestion = student.lr_find(num_it=30, show_plot=False)
    assert 1e-7 < suggestion.valley < 10
    assert all(torch.equal(p, q) for p, q in zip(before, student.model.parameters(), strict=True))


def test_fit_one_cycle(dls, teacher):
    learn = quiet(dms_learner(dls, "kd", teacher=teacher))
    learn.fit_one_cycle(2, 0.1)
    assert len(learn.recorder.values) == 2
    assert learn.recorder.hps["lr"][-1] < 1e-3


def test_after_other_fits_the_recipe_has_its_own_momentum_and_decay(dls):
    class Hypers(Callback):
        order, run_valid = 100, False

        def after_batch(self):
            seen.append({name: self.learn.opt.hypers[-1][name] for name in ("mom", "wd")})

    settings = {"schedule.name": "cosine"}  # which leaves the momentum alone
    seen, learn = [], quiet(dms_learner(dls, "se", arch="test_dmsresnet", settings=settings))
    learn.fit_one_cycle(1, 0.1, wd=0.3)
    learn.fit_recipe(1, cbs=Hypers())
    assert {(hypers["mom"], hypers["wd"]) for hypers in seen} == {(0.9, 5e-4)}
    seen.clear()
    learn.fit_recipe(1, cbs=Hypers(), wd=0.1)
    assert {hypers["wd"] for hypers in seen} == {0.1}


@pytest.mark.parametrize("make", [lambda t: EMA(0.9), lambda t: SAM(), TeacherDistill, lambda t: FixedViews(2)])
def test_what_a_learner_can_have_once_is_refused_twice(dls, teacher, make):
    cbs = [make(teacher), make(teacher)]
    learn = quiet(dms_learner(dls, "se", arch="test_dmsresnet", cbs=cbs))
    with pytest.raises(UserError, match=f"has {type(cbs[0]).__name__} twice"):
        learn.fit_recipe(1)


def test_predictions_come_in_order_and_agree_with_validate(student):
    probabilities, targets = student.get_preds()
    torch.testing.assert_close(probabilities.sum(1), torch.ones(len(targets)), atol=1e-4, rtol=0)
    assert torch.equal(targets, student.dls.valid_ds.labels)
    accuracy = (probabilities.argmax(1) == targets).float().mean().item()
    assert accuracy == pytest.approx(student.validate()[1], abs=1e-6)
    everything = student.get_preds(ds_idx=0)
    assert torch.equal(everything[1], student.dls.train_ds.labels)
    losses = student.get_preds(with_loss=True)[2]
    expected = -probabilities[torch.arange(len(targets)), targets].log()
    torch.testing.assert_close(losses, expected, atol=1e-3, rtol=1e-3)


def test_tta_averages_augmented_predictions(student):
    averaged, targets = student.tta(n=2)
    plain, _ = student.get_preds()
    assert averaged.shape == plain.shape
    assert not torch.equal(averaged, plain)
    assert (averaged.argmax(1) == targets).float().mean() > 0.8
    assert torch.equal(student.get_preds()[0], plain)  # augmentation is off again


def test_images_can_be_shown(student):
    student.dls.show_batch(max_n=9)
    assert len(plt.gcf().axes) == 9
    assert plt.gcf().axes[0].get_title() in student.dls.vocab
    plt.close("all")
    student.show_results(max_n=4)
    assert len([axes for axes in plt.gcf().axes if axes.get_title()]) == 4
    plt.close("all")
    student.recorder.plot_loss()
    student.recorder.plot_sched()
    plt.close("all")


def test_mixed_images_are_shown_with_both_labels_and_their_shares(student):
    random = torch.get_rng_state()
    student.mix_up.show_batch(max_n=4)
    grid = [axes for axes in plt.gcf().axes if axes.get_title()]
    assert len(grid) == 4
    torch.set_rng_state(random)
    loader = student.dls.train
    x, y_a = loader.one_batch()
    mixed, y_b, lam = student.mix_up.pair(x, y_a)
    for index, axes in enumerate(grid):
        (share_a, a), (share_b, b) = (line.split() for line in axes.get_title().split("\n"))
        assert (a, b) == tuple(student.dls.vocab[y[index]] for y in (y_a, y_b))
        assert float(share_a) == pytest.approx(lam.item(), abs=0.006)
        assert float(share_a) + float(share_b) == pytest.approx(1, abs=0.011)
        shown = torch.from_numpy(np.asarray(axes.images[0].get_array())).float()
        expected = loader.decode((mixed[index : index + 1],))[0][0].permute(1, 2, 0)
        torch.testing.assert_close(shown, torch.Tensor(expected), atol=1e-3, rtol=0)
    plt.close("all")


def test_fastais_loggers_log_what_the_recorder_has(teacher, tmp_path):
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    from fastai.callback.tensorboard import TensorBoardCallback
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    loggers = [TensorBoardCallback(tmp_path, trace_model=False), CSVLogger(tmp_path / "history.csv")]
    learn = quiet(dms_learner(load_data("digits", bs=256), "kd", teacher=teacher, cbs=loggers))
    learn.fit_recipe(epochs=2)
    events = EventAccumulator(str(tmp_path)).Reload()
    values = [list(row) for row in learn.recorder.values]
    names = list(learn.recorder.metric_names[1:-1])
    assert [event.value for event in events.Scalars("valid_accuracy")] == pytest.approx(
        [row[names.index("valid_accuracy")] for row in values]
    )
    steps = {event.step: event.value for event in events.Scalars("train_loss")}
    assert steps[len(learn.recorder.losses)] == pytest.approx(learn.recorder.losses[-1].item())
    rates = [event.value for event in events.Scalars("lr_0")]
    assert max(rates) == pytest.approx(max(learn.recorder.lrs))
    with (tmp_path / "history.csv").open() as file:
        logged = list(csv.DictReader(file))
    assert [float(row["valid_accuracy"]) for row in logged] == pytest.approx(
        [row[names.index("valid_accuracy")] for row in values]
    )


def test_interpretation(student):
    interpretation = ClassificationInterpretation.from_learner(student)
    matrix = interpretation.confusion_matrix()
    assert matrix.sum() == len(student.dls.valid_ds)
    probabilities, targets = student.get_preds()
    assert np.trace(matrix) == (probabilities.argmax(1) == targets).sum().item()
    interpretation.plot_top_losses(4)
    plt.close("all")
    interpretation.plot_confusion_matrix()
    plt.close("all")
    losses, _ = interpretation.top_losses(3)
    worst = -probabilities[torch.arange(len(targets)), targets].log()
    torch.testing.assert_close(losses, worst.topk(3).values, atol=1e-3, rtol=1e-3)
    assert interpretation.most_confused() is not None


def test_fastais_own_dataloaders_will_do(dls, tmp_path):
    for split, images in (("train", dls.train_ds), ("valid", dls.valid_ds)):
        for index, (pixels, label) in enumerate(zip(images.images[:96], images.labels[:96], strict=True)):
            file = tmp_path / split / str(int(label)) / f"{index}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(file)
    normal = Normalize.from_stats((0.5,) * 3, (0.25,) * 3)
    stock = ImageDataLoaders.from_folder(tmp_path, valid="valid", bs=32, num_workers=0, batch_tfms=normal)
    teaching = quiet(dms_learner(stock, "se", arch="test_dmsresnet"))
    teaching.fit_recipe(1)
    learn = quiet(dms_learner(stock, "kd", teacher=teaching, arch="test_dmsresnet", settings={"augment.trivial": True}))
    learn.fit_recipe(2)
    assert (learn.card.shape, learn.card.mean) == ((3, 8, 8), (0.5,) * 3)
    learn.path = tmp_path
    learn.export("x.pkl")
    assert learn.predict(file)[0] == load_learner(tmp_path / "x.pkl").predict(file)[0]


@pytest.fixture
def digit(dls, tmp_path):
    """A file with the first digit of the test images, its label, and the image itself."""
    pixels, label = dls.valid_ds[0]
    image = Image.fromarray(pixels.permute(1, 2, 0).numpy())
    image.save(tmp_path / "digit.png")
    return tmp_path / "digit.png", int(label), image


def test_predict_on_a_file_an_image_and_an_array(student, digit):
    file, label, image = digit
    probability, targets = student.get_preds()
    for item in (file, str(file), image, np.array(image)):
        category, index, probabilities = student.predict(item)
        assert category == student.dls.vocab[index]
        torch.testing.assert_close(probabilities, probability[0], atol=1e-2, rtol=0)
    assert targets[0] == label


def test_test_dl_with_and_without_labels(student, digit):
    file, label, _ = digit
    assert student.get_preds(dl=student.dls.test_dl([file] * 3))[0].shape == (3, 10)
    labelled = student.dls.test_dl([(file, label), (file, str(label))])
    assert student.get_preds(dl=labelled)[1].tolist() == [label, label]


def test_test_dl_labels_files_by_their_folders(student, digit, tmp_path):
    _, label, image = digit
    (tmp_path / "7").mkdir()
    image.save(tmp_path / "7" / "x.png")
    loader = student.dls.test_dl([tmp_path / "7" / "x.png", (str(tmp_path / "7" / "x.png"), label)], with_labels=True)
    assert student.get_preds(dl=loader)[1].tolist() == [7, label]
    (tmp_path / "7").rename(tmp_path / "seven")
    with pytest.raises(UserError, match="label 'seven' is none of the 10 classes"):
        student.dls.test_dl([tmp_path / "seven" / "x.png"], with_labels=True)


def test_an_exported_learner_predicts_the_same_in_another_process(student, digit, tmp_path):
    file, _, _ = digit
    student.export(tmp_path / "kd.pkl")
    expected = student.predict(file)
    code = (
        "import sys, warnings; warnings.simplefilter('ignore')\n"
        "from fastai.learner import load_learner\n"
        "learn = load_learner(sys.argv[1])\n"
        "with learn.no_bar(): category, index, probabilities = learn.predict(sys.argv[2])\n"
        "print(category, *probabilities.tolist())\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "kd.pkl", file], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    category, *probabilities = done.stdout.split()[-11:]
    assert category == expected[0]
    torch.testing.assert_close(torch.tensor([float(p) for p in probabilities]), expected[2], atol=1e-3, rtol=0)


def test_a_loaded_learner_can_be_trained_further(student, tmp_path):
    student.export(tmp_path / "kd.pkl")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loaded = quiet(load_learner(tmp_path / "kd.pkl"))
    loaded.dls = student.dls
    loaded.teacher_distill.teacher = student.teacher_distill.teacher
    loaded.fit(1)
    assert loaded.validate()[1] > 0.5


def test_exporting_does_not_disturb_training(dls, tmp_path):
    def train(export):
        torch.manual_seed(0)
        learn = quiet(dms_learner(dls, "se"))
        learn.fit(1, 0.01)
        if export:
            learn.export(tmp_path / "se.pkl")
        learn.fit(1, 0.01)
        return learn.model.fc.weight

    assert torch.equal(train(True), train(False))


def test_the_cosine_of_equation_and_epoch():
    lrs = [cosine_annealing(0.1, None, pct) for pct in (0, 0.25, 0.5, 1)]
    assert lrs == pytest.approx([0.1, 0.1 * (1 + 0.5**0.5) / 2, 0.05, 0.0])
    assert cosine_annealing(0.1, 4, 0.49) == pytest.approx(cosine_annealing(0.1, None, 0.25))


def test_fit_recipe_follows_the_schedule(dls):
    def rates(**schedule):
        learn = quiet(dms_learner(dls, "se", settings={f"schedule.{k}": v for k, v in schedule.items()}))
        learn.fit_recipe()
        return learn.recorder.hps["lr"]

    smooth = rates(name="cosine", epochs=2)
    steps = len(dls.train)
    assert smooth == pytest.approx([0.05 * (1 + np.cos(np.pi * i / (2 * steps))) for i in range(2 * steps)])
    stepped = rates(name="cosine", epochs=2, step="epoch")
    assert stepped == pytest.approx([0.1] * steps + [0.05] * steps)
    cycle = rates(name="one-cycle", epochs=2)
    assert max(cycle) == pytest.approx(0.1, rel=0.01)
    assert cycle[0] == pytest.approx(0.1 / 25)


def test_sgd_is_torchs_with_l2_decay():
    """Two steps on one weight by hand: v = 0.9 v + (g + 5e-4 w), w = w - 0.1 v."""
    learn = dms_learner(load_data("digits", bs=64), "se", settings={"schedule.name": "cosine"})
    learn.create_opt()
    p = learn.model.fc.weight
    w, v = p.detach().double().numpy().copy(), 0.0
    for gradient in (0.3, -0.2):
        p.grad = torch.full_like(p, gradient)
        learn.opt.step()
        v = 0.9 * v + (gradient + 5e-4 * w)
        w = w - 0.1 * v
    np.testing.assert_allclose(p.detach().numpy(), w, rtol=1e-5, atol=1e-7)


def test_lookahead_moves_the_slow_weights_every_k_steps(dls):
    learn = dms_learner(dls, "se", settings={"lookahead.k": 3, "lookahead.alpha": 0.5, "optimizer.weight_decay": 0.0})
    learn.create_opt()
    p, start = learn.model.fc.bias, learn.model.fc.bias.detach().clone()
    learn.opt.set_hypers(mom=0.0)
    seen = []
    for _ in range(6):
        p.grad = torch.ones_like(p)
        learn.opt.step()
        seen.append((start - p.detach()).mean().item())
    # Fast weights move 0.1 a step. The slow copy is first taken at step 3.
    assert seen[:2] == pytest.approx([0.1, 0.2])
    assert seen[4] - seen[2] == pytest.approx(0.2)
    assert seen[5] == pytest.approx(seen[2] + 0.15)


def test_gradients_are_clipped_by_value(dls):
    class Largest(Callback):
        order = 12  # behind the clipping

        def before_step(self):
            self.learn.largest = max(p.grad.abs().max().item() for p in self.learn.model.parameters())

    for clip, bound in ((1e-3, 1e-3), (None, None)):
        learn = quiet(dms_learner(dls, "se", settings={"optimizer.clip_value": clip} if clip else None, cbs=Largest()))
        learn.fit(1)
        assert learn.largest == pytest.approx(bound) if clip else learn.largest > 1e-3


@pytest.mark.parametrize("stop", [KeyboardInterrupt, RuntimeError, CancelFitException])
def test_autocast_never_outlives_a_batch(dls, stop, monkeypatch):
    monkeypatch.setattr("dms_fastai.callbacks.bf16.has_bf16", lambda device: True)

    class Stop(Callback):
        order = 20

        def before_batch(self):
            raise stop("now")

    learn = quiet(dms_learner(dls, "se", cbs=Stop()))
    if stop is CancelFitException:
        learn.fit(1)
    else:
        with pytest.raises(stop):
            learn.fit(1)
    assert not torch.is_autocast_enabled("cpu")
    assert learn.bf16.autocast is None


@pytest.mark.parametrize("there", [True, False])
def test_the_model_runs_in_bf16_where_the_processor_has_it(dls, monkeypatch, there):
    monkeypatch.setattr("dms_fastai.callbacks.bf16.has_bf16", lambda device: there)
    seen = []

    class See(Callback):
        def after_pred(self):
            seen.append(self.learn.pred.dtype)

    quiet(dms_learner(dls, "se", cbs=See())).fit(1)
    assert set(seen) == {torch.bfloat16 if there else torch.float32}
    seen.clear()
    learn = dms_learner(dls, "se", cbs=See())
    learn.remove_cb(BF16)
    quiet(learn).fit(1)
    assert set(seen) == {torch.float32}


# Kind of convolution, and side of its input: those that a CPU's library computes wrong or slowly in bf16, and others.
CONVOLUTIONS = [
    ({"kernel_size": 3, "stride": 2, "padding": 1}, 1, True),
    ({"kernel_size": 3, "stride": 2, "padding": 1}, 2, False),
    ({"kernel_size": 1, "stride": 2}, 1, False),
    ({"kernel_size": 3, "padding": 2, "dilation": 2, "groups": 24}, 32, True),
    ({"kernel_size": 3, "padding": 2, "dilation": 2, "groups": 12}, 32, True),
    ({"kernel_size": 3, "padding": 2, "dilation": 2}, 32, True),
    ({"kernel_size": 3, "padding": 1, "groups": 12}, 32, False),
    ({"kernel_size": 3, "padding": 1, "groups": 24}, 8, True),
]


@pytest.mark.parametrize(("kind", "side", "exact"), CONVOLUTIONS)
def test_convolutions_that_bf16_does_no_good_are_computed_in_float32(dls, monkeypatch, kind, side, exact):
    monkeypatch.setattr("dms_fastai.callbacks.bf16.has_bf16", lambda device: True)
    conv, seen = nn.Conv2d(24, 24, bias=False, **kind), []
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(24, 10))
    model = nn.Sequential(nn.Conv2d(3, 24, 1), nn.AdaptiveAvgPool2d(side), conv, head)
    conv.register_forward_hook(lambda module, inputs, y: seen.append(y))

    class Compare(Callback):
        order, run_valid = 39, False

        def after_backward(self):
            assert (seen[-1].dtype == torch.float32) is exact
            assert conv.weight.grad.isfinite().all()

    learn = quiet(Learner(dls, model, CrossEntropyLossFlat(), cbs=[BF16(), Compare()]))
    learn.fit(1)
    assert not conv._forward_pre_hooks
    assert len(conv._forward_hooks) == 1  # this test's
    assert not torch.is_autocast_enabled("cpu")


@pytest.mark.parametrize("bf16", [True, False])
def test_shortcuts_of_few_channels_do_not_end_the_process(tmp_path, bf16):
    """oneDNN writes past a buffer there, in images of 56 pixels and more; it must be tried in a process of its own."""
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (64, 112, 112, 3), dtype=np.uint8), np.arange(64) % 2
    np.savez(tmp_path / "x.npz", train_images=images, train_labels=labels, test_images=images, test_labels=labels)
    code = f"""
from dms_fastai import dms_learner, load_data
settings = {{"model.args": {{"widths": [4, 8, 16]}}, {"" if bf16 else '"bf16": False'}}}
learn = dms_learner(load_data({str(tmp_path / "x.npz")!r}, bs=16), "se", arch="dmsresnet", settings=settings)
learn.fit_recipe(epochs=2)
strided = [m for m in learn.model.modules() if max(getattr(m, "stride", (1,))) > 1]
print("hooks", sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in strided), {{m.stride for m in strided}})
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "hooks 0 {(2, 2)}" in done.stdout


@pytest.mark.parametrize("stride", [2, (1, 3)])
def test_strided_convolutions_compute_the_same_without_their_stride(stride):
    conv, images = nn.Conv2d(8, 24, 1, stride), torch.randn(4, 8, 15, 16, requires_grad=True)
    step = (stride, stride) if isinstance(stride, int) else stride
    there, weights = images.detach()[:, :, :: step[0], :: step[1]].double(), conv.weight.detach()[:, :, 0, 0].double()
    upstream = torch.randn(4, 24, *there.shape[2:])
    with strided_convolutions(nn.Sequential(conv)):
        y = conv(images)
    assert conv.stride == step
    assert not conv._forward_pre_hooks
    close = partial(torch.testing.assert_close, rtol=1e-5, atol=1e-5)
    close(y.double(), torch.einsum("oc,bchw->bohw", weights, there) + conv.bias.view(-1, 1, 1))
    y.backward(upstream)
    close(conv.weight.grad[:, :, 0, 0].double(), torch.einsum("bohw,bchw->oc", upstream.double(), there))
    seen = torch.zeros(15, 16, dtype=torch.bool)
    seen[:: step[0], :: step[1]] = True
    assert torch.equal(images.grad.abs().sum((0, 1)) > 0, seen)


def test_a_strided_convolution_that_fails_keeps_its_stride():
    conv = nn.Conv2d(8, 24, 1, 2)
    with pytest.raises(RuntimeError), strided_convolutions(conv):
        conv(torch.randn(1, 7, 8, 8))
    assert conv.stride == (2, 2)


def test_an_exception_leaves_no_hooks_on_the_model(dls, monkeypatch):
    monkeypatch.setattr("dms_fastai.callbacks.bf16.has_bf16", lambda device: True)

    class Stop(Callback):
        def after_step(self):
            raise KeyboardInterrupt

    learn = quiet(dms_learner(dls, "se", cbs=Stop()))
    with pytest.raises(KeyboardInterrupt):
        learn.fit(1)
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in learn.model.modules())


def test_fastais_own_callbacks_go_on_working(dls, teacher, tmp_path):
    learn = quiet(dms_learner(dls, "kd", teacher=teacher, path=tmp_path))
    statistics = ActivationStats(modules=[learn.model.conv1])
    learn.fit_recipe(
        epochs=3,
        cbs=[SaveModelCallback(monitor="valid_loss"), EarlyStoppingCallback(monitor="valid_loss", patience=5),
             CSVLogger(), statistics],
    )  # fmt: skip
    assert (tmp_path / "models" / "model.pth").is_file()
    assert len((tmp_path / "history.csv").read_text().splitlines()) == 4
    assert len(statistics.stats) == 3 * len(dls.train)
    learn.save("again")
    learn.load("again")


def test_gradients_can_be_accumulated(dls, teacher):
    """fastai's accumulation scales the whole loss, the teacher's part too, with either kind of loss."""

    class Norm(Callback):
        def before_step(self):
            self.learn.norms.append(torch.stack([p.grad.norm() for p in self.learn.model.parameters()]).norm().item())

    def norms(loss_func, **kwargs):
        torch.manual_seed(0)
        cbs = [TeacherDistill(teacher, **kwargs), GradientAccumulation(256), Norm()]
        learn = quiet(Learner(dls, timm.create_model("test_dmsresnet"), loss_func, opt_func=SGD, lr=1e-6, cbs=cbs))
        learn.norms = []
        learn.fit(1)
        return torch.tensor(learn.norms)

    ours = norms(DMSLoss(0.7, 3.0))
    torch.testing.assert_close(ours, norms(CrossEntropyLossFlat(), alpha=0.7, T=3.0), rtol=1e-3, atol=1e-4)


def test_the_progress_bar_works(dls, capsys):
    learn = dms_learner(dls, "se")
    assert isinstance(learn.progress, ProgressCallback)
    learn.fit_recipe(epochs=1)
    assert "valid_accuracy" in capsys.readouterr().out


def test_any_timm_architecture_and_any_recipe_object(dls):
    learn = quiet(dms_learner(dls, load_recipe("mixup", "digits", arch="resnet10t")))
    learn.fit(1)
    assert type(learn.model).__module__ == "timm.models.resnet"


@pytest.mark.parametrize(
    ("kwargs", "words"),
    [
        ({"recipe": "kd"}, "'kd' needs a teacher"),
        ({"recipe": "se", "teacher": torch.nn.Linear(1, 1)}, "does not distil"),
        ({"recipe": "sse"}, "did you mean 'se'"),
        ({"recipe": "se", "arch": "dmsresnet99"}, "unknown model"),
        ({"recipe": "se", "settings": {"model.args": {"width": 3}}}, "cannot be built"),
        ({"recipe": "se", "arch": "vit_tiny_patch16_224"}, "actual input size); try --set data.size=N, or another"),
        ({"recipe": "se", "arch": "vgg11"}, "does not take images of 8x8 pixels"),
        ({"recipe": load_recipe("se"), "arch": "dmsresnet"}, "recipes by name"),
    ],
)
def test_what_cannot_be_built_is_said(dls, kwargs, words):
    with pytest.raises(UserError) as error:
        dms_learner(dls, **kwargs)
    assert words in error.value.message


def test_what_a_cpu_needs_is_left_out_elsewhere():
    """On a GPU, hooks on strided convolutions would be in the way of compiling; "meta" stands for one."""
    callback, network = BF16(), timm.create_model("test_dmsresnet").to("meta")
    callback.learn = SimpleNamespace(model=network)
    callback.before_fit()
    assert callback.exact == ()
    assert not any(module._forward_pre_hooks for module in network.modules())
