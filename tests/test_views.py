"""What a teacher sees: its student's images, at its own size, with the pixels that the data set has."""

import numpy as np
import pytest
import timm
import torch
from fastai.callback.core import Callback
from fastai.learner import Learner, load_learner
from fastai.losses import CrossEntropyLossFlat
from PIL import Image
from torch import nn

from dms_fastai import (
    CutMix,
    Cutout,
    MixUp,
    ProgressiveResize,
    RandomErasing,
    Teacher,
    TeacherDistill,
    UserError,
    dms_learner,
    ensemble,
    load_data,
    load_teacher,
)
from dms_fastai.data import Data, Sets, memory
from dms_fastai.errors import Notice
from dms_fastai.export.calibrate import SEED, Calibration
from dms_fastai.models.card import ModelCard
from dms_fastai.models.cct import checkpoint_filter_fn
from dms_fastai.models.dmsresnet import MEAN, STD
from dms_fastai.models.weights import load_weights, save_weights
from dms_fastai.run_folder import Run
from tests.conftest import quiet
from tests.test_runs import dms, same_run  # noqa: F401  (a fixture)

OWN, STUDENT = 48, 16  # pixels of the images and of the student's


@pytest.fixture(scope="session")
def photos(tmp_path_factory):
    """An .npz file of 24 images to train on and 8 to test on, 48x48, of two classes: noise, and noise with a disc."""
    rng, y, x = np.random.default_rng(0), *np.mgrid[:OWN, :OWN]
    arrays = {}
    for split, n in {"train": 24, "test": 8}.items():
        images = rng.integers(0, 160, (n, OWN, OWN, 3))
        labels = np.arange(n) % 2
        images[labels == 1] += 90 * ((x - 20) ** 2 + (y - 24) ** 2 < 144)[..., None]
        arrays |= {f"{split}_images": images.astype(np.uint8), f"{split}_labels": labels}
    file = tmp_path_factory.mktemp("photos") / "photos.npz"
    np.savez(file, **arrays)
    return file


def teacher_file(folder, arch, size, **args):
    """Weights of a teacher of two classes, as a run leaves them."""
    torch.manual_seed(0)
    card = ModelCard(arch, ["0", "1"], MEAN, STD, (3, size, size), args)
    save_weights(card.build(), card, folder / f"{arch}.safetensors")
    return folder / f"{arch}.safetensors"


class Witness(nn.Module):
    """A teacher of two classes that keeps what it was shown, but for the black images that it is tried on.

    Its copies are itself.
    """

    def __init__(self):
        super().__init__()
        self.bias, self.seen, self.num_classes = nn.Parameter(torch.zeros(2)), [], 2

    def __deepcopy__(self, memo):
        return self

    def forward(self, x):
        if x.abs().max() > 0:  # not the black images that a teacher is tried on
            self.seen.append(x)
        return self.bias.expand(len(x), 2)


class Student(Callback):
    """Keeps what the student is shown, in training and in validation."""

    order = 40

    def __init__(self):
        self.training_images, self.valid_shapes = [], set()

    def before_batch(self):
        if self.learn.training:
            self.training_images.append(self.learn.xb[0])
        else:
            self.valid_shapes.add(tuple(self.learn.xb[0].shape[1:]))


def resized(x, size):
    """Float images as Pillow resizes each of their channels."""
    channels = [Image.fromarray(c.numpy()).resize((size, size), Image.Resampling.BILINEAR) for c in x.flatten(0, 1)]
    return torch.from_numpy(np.stack([np.asarray(c) for c in channels])).view(*x.shape[:2], size, size)


@pytest.mark.parametrize("mixer", [MixUp, CutMix])
def test_what_the_teacher_sees_made_smaller_is_what_the_student_sees(photos, mixer):
    witness, student = Witness(), Student()
    dls = load_data(photos, bs=8, size=STUDENT, view=OWN)
    cbs = [Cutout(), mixer(), RandomErasing(1.0), student]
    taught = Teacher(witness, MEAN, STD, size=(OWN, OWN))
    learn = quiet(dms_learner(dls, "kd", taught, "test_dmsresnet", {"mixup": False}, cbs))
    learn.fit(2)
    assert len(witness.seen) == len(student.training_images) == 6
    for teachers, students in zip(witness.seen, student.training_images, strict=True):
        assert teachers.shape[1:] == (3, OWN, OWN)
        torch.testing.assert_close(students, resized(teachers, STUDENT), rtol=0, atol=1e-4)
    whole = load_data(photos, bs=8, size=OWN)
    unlike = witness.seen[0] - resized(resized(witness.seen[0], STUDENT), OWN)
    assert unlike.std() > 0.3 * next(iter(whole.valid))[0].std()  # real pixels: no enlarged image has them
    assert student.valid_shapes == {(3, STUDENT, STUDENT)}
    shown, _ = learn.get_preds(0)
    assert len(shown) == 24
    assert student.valid_shapes == {(3, STUDENT, STUDENT)}


def test_int8_is_calibrated_with_what_the_student_sees(photos):
    """Of the training images that a teacher sees larger."""
    larger = load_data(photos, bs=8, size=STUDENT, view=OWN)
    calibration = Calibration(Sets(larger.train_ds, larger.valid_ds), 5)
    order = torch.randperm(24, generator=torch.Generator().manual_seed(SEED))[:5]
    seen = resized(load_data(photos, bs=8, size=OWN).train_ds.images[order].float(), STUDENT)
    assert calibration.chosen.shape == (5, 3, STUDENT, STUDENT)
    torch.testing.assert_close(calibration.chosen.float(), seen, rtol=0, atol=1)


def test_without_larger_images_the_students_are_enlarged(dls):
    witness, student = Witness(), Student()
    witness.bias, witness.num_classes = nn.Parameter(torch.zeros(10)), 10
    witness.forward = lambda x: (witness.seen.append(x), witness.bias.expand(len(x), 10))[1]
    learn = quiet(dms_learner(dls, "kd", witness, settings={"distill.size": 24}, cbs=student))
    learn.fit(1)
    torch.testing.assert_close(witness.seen[-1], resized(student.training_images[-1], 24), rtol=0, atol=1e-4)


def test_a_small_student_has_a_teacher_that_sees_the_whole(photos):
    witness, student = Witness(), Student()
    settings = {"progressive_resize.smallest": 0.5, "mixup": False, "distill.size": 32}
    dls = load_data(photos, bs=8, size=STUDENT, view=OWN)
    learn = quiet(dms_learner(dls, "kd", Teacher(witness, MEAN, STD), "test_dmsresnet", settings, student))
    learn.fit_recipe(4)
    sides = [x.shape[-1] for x in student.training_images]
    assert sides == sorted(sides)
    assert (sides[0], sides[-1]) == (STUDENT // 2, STUDENT)
    assert {x.shape[-1] for x in witness.seen} == {32}
    assert sum(cb.name == "progressive_resize" for cb in learn.cbs) == 1


def test_images_are_held_as_large_as_they_came_and_no_larger_than_a_teacher_needs(photos, tmp_path):
    plain = Data(size=STUDENT).open(photos)
    for view, held in {8: STUDENT, STUDENT: STUDENT, 32: 32, OWN: OWN, 224: OWN}.items():
        found = Data(size=STUDENT).enlarged(plain, photos, view)
        assert (found.held_size, found.size) == (held, STUDENT)
        assert found.valid is plain.valid
        assert found.digest == plain.digest
    for index, size in enumerate((40, 50, 50, 60)):
        for name in "ab":
            file = tmp_path / "train" / name / f"{index}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (size, 2 * size), (30 * index, 50, 100)).save(file)
    kept = Data(size=STUDENT, valid=0.25)
    sets = kept.open(tmp_path)
    found = kept.enlarged(sets, tmp_path, 224)
    assert (found.held_size, len(found.train), len(found.valid)) == (
        50,
        6,
        2,
    )  # the shorter side of those in the middle
    assert found.train.files == sets.train.files
    digits = Data().open("digits")
    assert Data().enlarged(digits, "digits", 224) is digits


def test_a_vit_teaches_a_smaller_student_from_the_command_line(dms, photos, tmp_path):  # noqa: F811
    vit = teacher_file(tmp_path, "vit_tiny_patch16_224", OWN, img_size=OWN, depth=2)
    args = ["run", "kd", "--data", photos, "--arch", "test_dmsresnet", "--epochs", 2, "--device", "cpu"]
    args += ["--set", f"data.size={STUDENT}", "--set", "data.batch_size=8", "--set", "progressive_resize=true"]
    code, out, _ = dms(*args, "--teacher", vit, "--dry-run")
    assert code == 0
    assert "teacher at 48x48, " in out
    assert "training images are held at 48x48 pixels for the teacher, in 684.3 kB of memory" in " ".join(out.split())
    assert dms(*args, "--teacher", vit, "--out", "whole")[0] == 0
    assert dms(*args, "--teacher", vit, "--out", "parts", "--time-limit", "0.01s")[0] == 75
    assert dms(*args, "--teacher", vit, "--out", "parts")[0] == 0
    whole = tmp_path / "whole" / "kd" / "seed0"
    same_run(whole, tmp_path / "parts" / "kd" / "seed0")
    facts = Run.read(whole).facts
    assert facts.size == STUDENT
    assert facts.data_digest == Data(size=STUDENT).open(photos).digest
    assert load_weights(whole / "model.safetensors")[1].shape == (3, STUDENT, STUDENT)
    assert load_learner(whole / "learner.pkl").dls.train_ds.size == STUDENT
    tokens, width = (OWN // 16) ** 2 + 1, 192  # the attention's products are a thousandth of this
    macs = 9 * 3 * 16**2 * width + 2 * tokens * 12 * width**2
    assert facts.train_pflop.teacher == pytest.approx(2 * macs * 2 * 24 / 1e15, rel=0.02)


@pytest.mark.parametrize("arch", ["test_cct", "test_convnext", "test_efficientnet", "test_vit"])
def test_each_kind_of_network_teaches_at_its_own_size_or_at_another(photos, tmp_path, arch):
    fixed = {"img_size": 32} if arch in ("test_cct", "test_vit") else {}
    file = teacher_file(tmp_path, arch, 32, **fixed)
    for settings, sees in (({}, 32), ({"distill.size": OWN}, OWN)):
        dls = load_data(photos, bs=12, size=STUDENT, view=sees)
        learn = quiet(dms_learner(dls, "kd", file, "test_dmsresnet", settings))
        seen = []
        first = next(m for m in learn.teacher_distill.teacher.model.modules() if isinstance(m, nn.Conv2d))
        first.register_forward_hook(lambda m, args, y, seen=seen: seen.append(args[0].shape[-1]))
        learn.fit(1)
        assert set(seen) == {sees}


def test_a_table_of_positions_is_resampled_as_for_weights_of_another_size():
    for name in ("test_cct", "cct_7_3x1_sine"):
        ours = timm.create_model(name, num_classes=2, img_size=32).eval()
        theirs = timm.create_model(name, num_classes=2, img_size=24).eval()
        theirs.load_state_dict(checkpoint_filter_fn(ours.state_dict(), theirs))
        x = torch.randn(2, 3, 24, 24)
        torch.testing.assert_close(load_teacher(ours, size=24).model(x), theirs(x))
        assert ours.img_size == (32, 32)


def test_the_members_of_an_ensemble_see_their_own_sizes_and_normalisations(photos):
    small, large, none = Witness(), Witness(), Witness()
    inner = ensemble([Teacher(none, MEAN, STD), Teacher(small, (0.1,) * 3, (0.5,) * 3, size=(24, 24))], "probabilities")
    taught = ensemble([Teacher(large, MEAN, STD, size=(OWN, OWN)), inner])
    assert taught.sizes == [(OWN, OWN), None, (24, 24)]
    student = Student()
    dls = load_data(photos, bs=8, size=STUDENT, view=taught.largest)
    quiet(dms_learner(dls, "kd", taught, "test_dmsresnet", cbs=student)).fit(1)
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (MEAN, STD))
    for a, b, c, x in zip(large.seen, small.seen, none.seen, student.training_images, strict=True):
        torch.testing.assert_close(x, resized(a, STUDENT), rtol=0, atol=1e-4)
        torch.testing.assert_close(x, c, rtol=0, atol=1e-4)
        torch.testing.assert_close(b * 0.5 + 0.1, resized(a * std + mean, 24), rtol=0, atol=1e-4)
    assert ensemble([taught, inner]).at(40).sizes == [(40, 40)] * 5


def test_a_stock_learner_has_images_of_its_loaders_size_and_a_teacher_of_its_own(dls):
    witness, student = Witness(), Student()
    witness.bias, witness.num_classes = nn.Parameter(torch.zeros(10)), 10
    witness.forward = lambda x: (witness.seen.append(x), witness.bias.expand(len(x), 10))[1]
    model = timm.create_model("test_dmsresnet", num_classes=10)
    cbs = [TeacherDistill(Teacher(witness), size=12), MixUp(), student]
    quiet(Learner(dls, model, CrossEntropyLossFlat(), cbs=cbs)).fit(1)
    assert {x.shape[-1] for x in student.training_images} == {8}
    torch.testing.assert_close(witness.seen[-1], resized(student.training_images[-1], 12), rtol=0, atol=1e-4)


def test_larger_images_in_a_stock_learner_need_the_callback_that_makes_the_students(photos):
    dls, model = load_data(photos, bs=8, size=STUDENT, view=OWN), timm.create_model("test_dmsresnet", num_classes=2)
    teaching = TeacherDistill(Teacher(Witness(), size=(OWN, OWN)))
    with pytest.raises(UserError, match=r"larger than the student's 16 pixels.*add ProgressiveResize"):
        quiet(Learner(dls, model, CrossEntropyLossFlat(), cbs=teaching)).fit(1)
    student = Student()
    cbs = [teaching, ProgressiveResize(1.0, 0.0, 0.0), student]
    quiet(Learner(dls, model, CrossEntropyLossFlat(), cbs=cbs)).fit(1)
    assert {x.shape[-1] for x in student.training_images} == {STUDENT}


def test_a_module_that_takes_one_size_is_known_by_it(dls):
    vit = timm.create_model("vit_tiny_patch16_224", num_classes=10, img_size=32, depth=1)
    assert load_teacher(vit).size == (32, 32)
    quiet(dms_learner(dls, "kd", vit)).fit(1)
    assert load_teacher(timm.create_model("test_efficientnet", num_classes=10)).size is None
    assert load_teacher(dms_learner(load_data("digits", size=12), "se")).size == (12, 12)
    assert load_teacher("timm:dmsresnet").size == (32, 32)


class Flat(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(3 * 32 * 32, 2)

    def forward(self, x):
        return self.fc(x.flatten(1))


@pytest.mark.parametrize(
    ("make", "settings", "words"),
    [
        (Flat, {"distill.size": OWN}, ("Flat", "48x48", "the student's images of 16x16")),
        (lambda: Teacher(Flat(), size=(24, 24)), {}, ("24x24", "16x16", "distill.size")),
        (Flat, {"distill.size": 7}, ("distill.size is 7; it must be at least 8",)),
    ],
)
def test_a_size_that_a_teacher_cannot_take_is_refused_with_both(photos, make, settings, words):
    with pytest.raises(UserError) as error:
        dms_learner(load_data(photos, bs=8, size=STUDENT), "kd", make(), "test_dmsresnet", settings)
    assert all(word in error.value.message for word in words)
    assert "\n" not in error.value.message


def test_a_size_that_an_untrained_teacher_cannot_take_is_refused_before_training(dms, photos, tmp_path):  # noqa: F811
    args = ["run", "kd", "--data", photos, "--arch", "test_dmsresnet", "--epochs", 1, "--set", f"data.size={STUDENT}"]
    args += ["--set", "data.batch_size=8", "--device", "cpu"]
    code, _, err = dms(*args, "--set", "teacher.model.name=mixer_s32_224", "--set", "teacher.data.size=224", "--set",
                       "distill.size=96")  # fmt: skip
    assert code == 2
    assert "MlpMixer, does not take images of 96x96 pixels, made of the student's images of 16x16 pixels" in err
    assert not (tmp_path / "artifacts").exists()


def test_larger_images_than_memory_takes_stay_on_the_disk(dms, tmp_path, monkeypatch):  # noqa: F811
    """16 images of 48 pixels take 110,592 bytes, and the machine has 90,000."""
    rng = np.random.default_rng(0)
    for split, n in {"train": 8, "test": 2}.items():
        for name in "01":
            (tmp_path / "files" / split / name).mkdir(parents=True)
            for index in range(n):
                image = Image.fromarray(rng.integers(0, 256, (OWN, OWN, 3), dtype=np.uint8))
                image.save(tmp_path / "files" / split / name / f"{index}.png")
    monkeypatch.setattr(memory.os, "sysconf", lambda name: 300, raising=False)
    dls = load_data(tmp_path / "files", bs=8, size=STUDENT, view=OWN, device="cpu")
    assert (dls.train.where, dls.train.one_batch()[0].shape[2:]) == ("disk", (OWN, OWN))
    args = ["run", "kd", "--data", tmp_path / "files", "--arch", "test_dmsresnet", "--epochs", 1, "--device", "cpu"]
    args += ["--set", f"data.size={STUDENT}", "--set", "data.batch_size=8", "--dry-run"]
    code, out, err = dms(*args, "--teacher", teacher_file(tmp_path, "test_dmsresnet", OWN))
    assert code == 0, err
    assert "held at 48x48 pixels for the teacher, in 110.6 kB on the disk" in " ".join(out.split())


def test_a_teacher_that_is_trained_on_larger_images_shows_them_to_itself_later(dms, photos, tmp_path):  # noqa: F811
    args = ["run", "kd", "--data", photos, "--arch", "test_dmsresnet", "--epochs", 1, "--set", f"data.size={STUDENT}"]
    args += ["--set", "data.batch_size=8", "--device", "cpu", "--set", "teacher.model.name=test_dmsresnet"]
    args += ["--set", "teacher.data.size=32", "--out", tmp_path / "x"]
    code, out, _ = dms(*args, "--dry-run")
    assert code == 0
    assert "+ SE + MixUp + KD: teacher at 32x32, " in out
    assert dms(*args)[0] == 0
    [student] = (Run.read(f.parent).facts for f in (tmp_path / "x").glob("kd*/seed0/run.json"))
    [teacher] = (Run.read(f.parent).facts for f in (tmp_path / "x").glob("teacher*/seed0/run.json"))
    assert (student.size, teacher.size) == (STUDENT, 32)
    assert student.train_pflop.teacher == pytest.approx(teacher.train_pflop.student / 3)


def test_an_unused_view_is_said_and_a_picture_has_both(photos, dls):
    larger = load_data(photos, bs=8, size=STUDENT, view=OWN)
    with pytest.warns(Notice, match="held at 48 pixels for a teacher, and this one sees 16; set distill.size"):
        dms_learner(larger, "kd", Witness(), "test_dmsresnet")
    from matplotlib import pyplot as plt

    learn = dms_learner(larger, "kd", Witness(), "test_dmsresnet", {"distill.size": OWN})
    learn.teacher_distill.show_batch(3)
    shapes = [axes.images[0].get_array().shape[:2] for axes in plt.gcf().axes]
    assert shapes == [(STUDENT, STUDENT)] * 3 + [(OWN, OWN)] * 3
    plt.close("all")
