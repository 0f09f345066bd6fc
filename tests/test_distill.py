"""TeacherDistill: who may teach, what the teacher sees, and where it never goes."""

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
from fastai.callback import mixup as fastai
from fastai.callback.core import Callback, CancelFitException
from fastai.data.transforms import Normalize, parent_label
from fastai.learner import Learner, load_learner
from fastai.losses import CrossEntropyLossFlat
from fastai.metrics import accuracy
from fastai.optimizer import SGD
from fastai.vision.data import ImageDataLoaders
from fastai.vision.learner import vision_learner
from PIL import Image
from torch import nn
from torchvision.models import resnet18

from dms_fastai import (
    CutMix,
    DMSLoss,
    MixUp,
    Teacher,
    TeacherDistill,
    UserError,
    dms_learner,
    ensemble,
    load_data,
    load_teacher,
)
from dms_fastai.errors import Notice
from dms_fastai.export import export_run
from dms_fastai.models.card import ModelCard
from dms_fastai.models.fold import fold_batch_norms
from dms_fastai.models.weights import save_weights
from dms_fastai.run_folder import RunFolder
from dms_fastai.training.losses import dkd_divergence
from tests.conftest import quiet


class Witness(nn.Module):
    """A teacher that keeps what it was shown, and always says class 3. Its copies are itself: tests can ask it.

    What it is shown first, before training, is two black images.
    """

    def __init__(self, classes=10):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(classes))
        self.seen = []

    def __deepcopy__(self, memo):
        return self

    def forward(self, x):
        self.seen.append((x, self.training, torch.is_grad_enabled()))
        return nn.functional.one_hot(torch.full((len(x),), 3), len(self.bias)) * 8.0 + self.bias


class Images(Callback):
    """Keep what the student is shown."""

    order = 40

    def __init__(self):
        super().__init__()
        self.seen = []

    def before_batch(self):
        if self.learn.training:
            self.seen.append(self.learn.xb[0])


def stock(dls, cbs, loss_func=None, lr=0.01):
    model = timm.create_model("test_dmsresnet")
    return quiet(Learner(dls, model, loss_func or DMSLoss(), opt_func=SGD, lr=lr, cbs=cbs))


def test_the_teacher_sees_the_mixed_images_without_gradients_in_evaluation_mode(dls):
    witness, images = Witness(), Images()
    stock(dls, [TeacherDistill(witness), MixUp(), images]).fit(1)
    tried, *seen = witness.seen
    assert torch.equal(tried[0], torch.zeros(2, 3, 8, 8))
    assert len(seen) == len(images.seen) == len(dls.train)  # and not in validation
    for (x, training, grad), shown in zip(seen, images.seen, strict=True):
        assert torch.equal(x, shown)
        assert not training
        assert not grad
    assert witness.bias.grad is None


def test_the_student_learns_what_the_teacher_says(dls):
    """With alpha = 1 only the teacher counts; one that always says 3 makes a student that does."""
    learn = stock(dls, [TeacherDistill(Witness())], DMSLoss(alpha=1.0, T=1.0), lr=0.1)
    learn.fit(3)
    predictions, _ = learn.get_preds()
    assert (predictions.argmax(1) == 3).float().mean() > 0.99


@pytest.mark.parametrize("mixed", [False, True])
def test_any_other_loss_gives_the_same_training(dls, teacher, mixed):
    def losses(loss_func, **kwargs):
        torch.manual_seed(0)
        learn = stock(dls, [TeacherDistill(teacher, **kwargs), *([MixUp()] if mixed else [])], loss_func)
        learn.fit(1)
        return torch.stack(list(learn.recorder.losses))

    ours = losses(DMSLoss(alpha=0.7, T=3.0))
    theirs = losses(CrossEntropyLossFlat(), alpha=0.7, T=3.0)
    torch.testing.assert_close(ours[:2], theirs[:2])  # later steps magnify what float32 rounds
    torch.testing.assert_close(ours, theirs, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("mixer", [MixUp, CutMix])
def test_with_any_other_loss_a_mixed_image_has_two_true_classes(mixer):
    losses, teaching = [], {"alpha": 0.7, "T": 3.0, "divergence": "dkd"}
    for loss_func, kwargs in ((DMSLoss(**teaching), {}), (CrossEntropyLossFlat(), teaching)):
        torch.manual_seed(0)
        learn = stock(load_data("digits", bs=512), [TeacherDistill(Witness(), **kwargs), mixer()], loss_func)
        learn.fit(1)
        losses.append(torch.stack(list(learn.recorder.losses)))
    torch.testing.assert_close(*losses)


def test_two_places_for_one_setting_are_refused(dls, teacher):
    with pytest.raises(UserError) as error:
        stock(dls, [TeacherDistill(teacher, alpha=0.5)]).fit(1)
    assert "alpha given to TeacherDistill" in error.value.message


def test_the_lender_of_a_teacher_keeps_it_as_it_is(dls, teacher):
    before = {k: v.clone() for k, v in teacher.model.state_dict().items()}
    teacher.model.train()
    stock(dls, [TeacherDistill(teacher)]).fit(1)
    assert teacher.model.training
    assert all(p.requires_grad for p in teacher.model.parameters())
    assert all(torch.equal(before[k], v) for k, v in teacher.model.state_dict().items())


@pytest.mark.parametrize("mean", [(0.0, 0.0, 0.0), (0.485, 0.456, 0.406)])
def test_a_teacher_gets_its_own_normalisation(dls, mean):
    witness, images, std = Witness(), Images(), (1.0, 0.5, 0.25)
    stock(dls, [TeacherDistill(Teacher(witness, mean, std)), images]).fit(1)

    def pixels(x, m, s):
        m, s = (torch.tensor(v).view(1, 3, 1, 1) for v in (m, s))
        return x * s + m

    theirs = pixels(witness.seen[1][0], mean, std)
    torch.testing.assert_close(theirs, pixels(images.seen[0], dls.train.mean, dls.train.std))
    assert 0 <= theirs.min() + 1e-5
    assert theirs.max() <= 1 + 1e-5


def test_after_an_interrupt_a_teacher_sees_other_images_in_its_own_normalisation(dls):
    def interrupt(cb):
        raise KeyboardInterrupt

    witness, images, stop = Witness(), Images(), Callback(after_step=interrupt)
    learn = quiet(dms_learner(dls, "kd", Teacher(witness, (0.0,) * 3, (1.0,) * 3), cbs=[images, stop]))
    with pytest.raises(KeyboardInterrupt):
        learn.fit(1)
    learn.remove_cb(stop)
    learn.dls, std = load_data("digits", bs=512, mean=(0.5,) * 3, std=(0.25,) * 3), 0.25
    witness.seen.clear(), images.seen.clear()
    learn.fit(1)
    _, (x, *_), *_ = witness.seen  # the first are the black images that it is tried on
    torch.testing.assert_close(x, images.seen[0] * std + 0.5)


def predictions_of(source, x):
    taught = load_teacher(source)
    with torch.no_grad():
        return taught.model.eval()(x)


def test_every_kind_of_teacher_is_the_same_teacher(teacher, tmp_path):
    x = torch.randn(4, 3, 8, 8)
    expected = predictions_of(teacher, x)
    folder = tmp_path / "run"
    folder.mkdir()
    export_run(teacher, RunFolder(folder))
    for source in (teacher.model, folder, folder / "model.safetensors", folder / "learner.pkl", str(folder)):
        torch.testing.assert_close(predictions_of(source, x), expected)
    for source in (teacher, folder, folder / "learner.pkl"):
        taught = load_teacher(source)
        assert taught.vocab == [str(i) for i in range(10)]
        assert taught.mean == tuple(teacher.dls.train.mean)


@pytest.mark.parametrize(
    ("source", "words"),
    [("nowhere", "no teacher at nowhere"), ("nowhere.safetensors", "no such file"), ("nowhere.pkl", "no such Learner"),
     ("timm:dmsresnett", "did you mean 'dmsresnet'"), ("timm:dmsresnet50", "weights"), (3, "int is no teacher"),
     (", ".join(["timm:dmsresnett"] * 20), "did you mean 'dmsresnet'")],
)  # fmt: skip
def test_no_teacher_there(source, words):
    with pytest.raises(UserError, match=words):
        load_teacher(source)


def test_damaged_weights_are_no_teacher(tmp_path):
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"\x10" + b"\x00" * 40)
    with pytest.raises(UserError, match="cannot be loaded"):
        load_teacher(file)


def test_a_teacher_of_other_classes_is_refused_with_both(dls, tmp_path):
    mean, std = dls.train.mean, dls.train.std
    card = ModelCard("test_dmsresnet", ["zero", *map(str, range(1, 10))], mean, std, (3, 8, 8))
    save_weights(card.build(), card, tmp_path / "names.safetensors")
    with pytest.raises(UserError) as error:
        stock(dls, [TeacherDistill(tmp_path / "names.safetensors")]).fit(1)
    assert "'zero'" in error.value.message
    assert "'0'" in error.value.message
    with pytest.raises(UserError) as error:
        stock(dls, [TeacherDistill(timm.create_model("test_dmsresnet", num_classes=100))]).fit(1)
    assert "100" in error.value.message
    assert "10" in error.value.message
    with pytest.raises(UserError) as error:
        stock(dls, [TeacherDistill(Witness(7))]).fit(1)
    assert "7" in error.value.message


def test_an_exported_learner_leaves_its_teacher_behind(dls, teacher, tmp_path):
    big = timm.create_model("dmsresnet", num_classes=10)
    sizes = {}
    for name, teaching in {"kd": big, "mixup": None}.items():
        learn = quiet(dms_learner(dls, name, teacher=teaching, path=tmp_path))
        learn.fit_recipe(epochs=1)
        learn.export(f"{name}.pkl")
        sizes[name] = (tmp_path / f"{name}.pkl").stat().st_size
    assert sizes["kd"] == pytest.approx(sizes["mixup"], rel=0.01)

    loaded = load_learner(tmp_path / "kd.pkl")
    assert loaded.teacher_distill.teacher is None
    loaded.dls = dls
    with pytest.raises(UserError) as error:
        quiet(loaded).fit(1)
    assert "without its teacher" in error.value.message


def test_in_fastais_vision_learner_with_our_data(dls, teacher):
    """As the README has it: fastai infers the loss from the data."""
    cbs = [MixUp(0.4), TeacherDistill(teacher, alpha=0.9, T=4)]
    learn = quiet(vision_learner(dls, resnet18, pretrained=False, metrics=accuracy, cbs=cbs))
    learn.fine_tune(1)
    assert learn.recorder.values[-1][2] > 0.15


@pytest.fixture(scope="module")
def native_dls(tmp_path_factory):
    """Stock fastai DataLoaders, normalised with ImageNet's statistics, over four classes of plain colours."""
    root = tmp_path_factory.mktemp("colours")
    for label, colour in {"black": (0, 0, 0), "blue": (0, 0, 255), "green": (0, 255, 0), "red": (255, 0, 0)}.items():
        for index in range(12):
            file = root / label / f"{index}.png"
            file.parent.mkdir(exist_ok=True)
            Image.new("RGB", (16, 16), tuple(max(0, v - index) for v in colour)).save(file)
    files = sorted(Path(root).rglob("*.png"))
    stats = Normalize.from_stats((0.485, 0.456, 0.406), (0.229, 0.224, 0.225), cuda=False)
    return ImageDataLoaders.from_path_func(
        root, files, parent_label, valid_pct=0.25, seed=0, bs=8, num_workers=0, batch_tfms=stats, device="cpu"
    )


@pytest.mark.parametrize("mixer", [fastai.MixUp(0.4), fastai.CutMix(1.0)])
def test_beside_fastais_own_mixers_an_image_has_two_true_classes(native_dls, mixer):
    compared = []

    class Compare(Callback):
        order, run_valid = 6, False  # after TeacherDistill

        def before_train(self):
            self.plain = self.learn.loss_func  # with fastai's mixture in it

        def after_loss(self):
            learn, logits = self.learn, self.learn.teacher_distill.logits
            soft_a, soft_b = (dkd_divergence(learn.pred, logits, y, 4.0, 8.0, "none") for y in (*learn.yb, *mixer.yb1))
            soft = (mixer.lam * soft_a + (1 - mixer.lam) * soft_b).mean()
            torch.testing.assert_close(learn.loss, 0.5 * soft + 0.5 * self.plain(learn.pred, *learn.yb))
            compared.append(float((soft_a.mean() - soft).detach()))

    cbs = [mixer, TeacherDistill(Witness(4), alpha=0.5, T=4.0, divergence="dkd"), Compare()]
    model = timm.create_model("test_dmsresnet", num_classes=4)
    quiet(Learner(native_dls, model, CrossEntropyLossFlat(), opt_func=SGD, cbs=cbs)).fit(1)
    assert any(compared)


def test_in_a_stock_learner_with_stock_data(native_dls):
    """fastai's own loaders, normalisation and loss; the teacher's images are the student's, renormalised."""
    witness = Witness(4)
    cbs = [MixUp(0.4), TeacherDistill(Teacher(witness, (0.0,) * 3, (1.0,) * 3), alpha=0.5, T=4.0)]
    model = timm.create_model("test_dmsresnet", num_classes=4)
    learn = quiet(Learner(native_dls, model, CrossEntropyLossFlat(), opt_func=SGD, cbs=cbs))
    learn.fit(1)
    x = witness.seen[1][0]
    assert type(x) is torch.Tensor
    assert -1e-5 <= x.min()
    assert x.max() <= 1 + 1e-5


class Constant(nn.Module):
    """Says the same of every image, moved by the image's first pixel."""

    def __init__(self, logits):
        super().__init__()
        self.logits = nn.Parameter(torch.tensor(logits))

    def forward(self, x):
        return self.logits + x[:, 0, 0, :1]


def test_an_ensemble_is_the_mean_of_logits_or_of_probabilities():
    a, b = [1.0, 2.0, 0.0], [3.0, -1.0, 0.5]
    teachers = [Teacher(Constant(z), (0.5,) * 3, (0.25,) * 3, ["x", "y", "z"]) for z in (a, b)]
    x = torch.zeros(2, 3, 8, 8)
    found = ensemble(teachers)
    torch.testing.assert_close(found.model(x)[0], (torch.tensor(a) + torch.tensor(b)) / 2)
    mean = (torch.tensor(a).softmax(0) + torch.tensor(b).softmax(0)) / 2
    torch.testing.assert_close(ensemble(teachers, of="probabilities").model(x)[0].softmax(0), mean)
    assert (found.mean, found.vocab) == ((0.5,) * 3, ["x", "y", "z"])


def test_every_member_of_an_ensemble_gets_images_in_its_own_normalisation():
    first = Teacher(Constant([0.0, 0.0]), (0.5,) * 3, (0.25,) * 3)
    second = Teacher(Constant([0.0, 0.0]), (0.1,) * 3, (0.5,) * 3)
    pixel = 0.8
    x = torch.full((1, 3, 8, 8), (pixel - 0.5) / 0.25)
    expected = ((pixel - 0.5) / 0.25 + (pixel - 0.1) / 0.5) / 2
    assert ensemble([first, second]).model(x)[0, 0].item() == pytest.approx(expected)


def test_an_ensemble_teaches(dls, teacher, tmp_path):
    other = quiet(dms_learner(dls, "se"))
    for number, learn in enumerate((teacher, other)):
        (tmp_path / str(number)).mkdir()
        save_weights(learn.model, learn.card, tmp_path / str(number) / "model.safetensors")
    learn = quiet(dms_learner(dls, "kd", teacher=f"{tmp_path / '0'}, {tmp_path / '1'}"))
    learn.fit_recipe(1)
    x = torch.randn(4, 3, 8, 8)
    taught = learn.teacher_distill.teacher.model.eval()(x)
    expected = (teacher.model.eval()(x) + other.model.eval()(x)) / 2
    torch.testing.assert_close(taught, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("sources", "of", "words"),
    [
        ([], "logits", "at least one teacher"),
        ([Teacher(Constant([0.0, 1.0]))], "votes", "'logits' or 'probabilities'"),
        ([Teacher(Constant([0.0]), vocab=["a"]), Teacher(Constant([0.0]), vocab=["b"])], "logits", "class 0 is 'b'"),
        ([Teacher(Constant([0.0]), (0.5,), (1.0,)), Teacher(Constant([0.0]))], "logits", "normalised"),
    ],
)
def test_teachers_that_make_no_ensemble(sources, of, words):
    with pytest.raises(UserError, match=words):
        ensemble(sources, of)


def test_in_bf16_the_teacher_says_what_autocast_would_and_keeps_its_own_weights(dls, teacher, monkeypatch):
    monkeypatch.setattr("dms_fastai.callbacks.bf16.has_bf16", lambda device: True)

    class Compare(Callback):
        order, run_valid = 50, False  # behind the teacher, with what it has said

        def before_train(self):
            cb = self.learn.teacher_distill
            self.plain = fold_batch_norms(cb.teacher.model, (3, 8, 8))
            kinds = {m.weight.dtype for m in cb.network.modules() if isinstance(m, (nn.Conv2d, nn.Linear))}
            assert kinds == {torch.bfloat16}

        def after_loss(self):
            with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
                expected = self.plain(self.learn.xb[0])
            assert torch.equal(self.learn.teacher_distill.logits, expected)

    learn = quiet(dms_learner(dls, "kd", teacher=teacher, cbs=Compare()))
    learn.fit(1)
    assert all(p.dtype == torch.float32 for p in learn.teacher_distill.teacher.model.parameters())


class Normalising(nn.Module):
    """Normalises tensors, and would take other things, too: Python that a traced copy does not have."""

    def __init__(self, network):
        super().__init__()
        self.network, self.pretrained_cfg = network, {"mean": (0.0,) * 3, "std": (1.0,) * 3}

    def forward(self, x):
        return self.network((x - 0.4) / 0.2 if isinstance(x, torch.Tensor) else x)


def said_in_training(learn):
    """What the teacher says in the first step, and the images that it sees."""

    class Keep(Callback):
        order, run_valid = 50, False

        def after_loss(self):
            cb = self.learn.teacher_distill
            kept.append((cb.view().clone(), cb.logits.clone()))
            raise CancelFitException

    kept = []
    learn.fit(1, cbs=Keep())
    return kept[0]


@pytest.mark.parametrize("several", [False, True])
def test_the_teacher_that_is_asked_is_the_one_that_was_given(dls, several):
    given = Normalising(timm.create_model("test_dmsresnet", num_classes=10)).eval()
    for module in given.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean)
    teachers = [given, copy.deepcopy(given)] if several else given
    learn = quiet(dms_learner(dls, "kd", teacher=teachers, settings={"bf16": False}))
    x, logits = said_in_training(learn)
    with torch.no_grad():
        torch.testing.assert_close(logits, given(x), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kind", ["script", "trace", "frozen", "quantised"])
def test_networks_that_are_compiled_or_quantised_teach(dls, kind):
    network = timm.create_model("test_dmsresnet", num_classes=10).eval()
    make = {
        "script": torch.jit.script,
        "trace": lambda network: torch.jit.trace(network, torch.zeros(2, 3, 8, 8)),
        "frozen": lambda network: torch.jit.freeze(torch.jit.script(network)),
        "quantised": lambda network: torch.ao.quantization.quantize_dynamic(network, {nn.Linear}),
    }
    learn = quiet(dms_learner(dls, "kd", teacher=make[kind](network), settings={"bf16": False}))
    x, logits = said_in_training(learn)
    with torch.no_grad():
        torch.testing.assert_close(logits, network(x), rtol=0.05, atol=0.05)


def test_probabilities_are_no_logits(dls):
    network = timm.create_model("test_dmsresnet", num_classes=10)
    with pytest.raises(UserError, match="the teacher, Sequential, gives probabilities"):
        dms_learner(dls, "kd", teacher=nn.Sequential(network, nn.Softmax(1)))
    dms_learner(dls, "kd", teacher=nn.Sequential(network, nn.LogSoftmax(1)))


def test_a_module_that_does_not_say_how_its_images_are_normalised_is_told_of(dls):
    network = nn.Sequential(nn.Flatten(), nn.Linear(192, 10))
    with pytest.warns(Notice, match="does not say how its images are normalised"):
        dms_learner(dls, "kd", teacher=network)
    with pytest.raises(UserError, match=r"give the others as Teacher\(model, mean, std\)"):
        ensemble([network, timm.create_model("test_dmsresnet")])
    ensemble([Teacher(network, (0.5,), (0.2,)), timm.create_model("test_dmsresnet")])


def test_every_member_of_an_ensemble_has_the_classes_of_the_others(dls, teacher):
    bare, named = timm.create_model("test_dmsresnet", num_classes=10), load_teacher(teacher)
    assert ensemble([bare, named]).vocab == named.vocab
    other = replace(named, vocab=named.vocab[::-1])
    for members in ([bare, other], [other, bare]):
        with pytest.raises(UserError, match="class 0 is '9' to the teacher"):
            dms_learner(dls, "kd", teacher=members)
