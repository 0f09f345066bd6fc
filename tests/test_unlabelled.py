"""Images without labels: where they are found, what a loss makes of them, and who trains on them."""

import json
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image

from dms_fastai import DMSLoss, UserError, dms_learner, load_data
from dms_fastai.data.loader import balanced
from dms_fastai.data.sources import load_splits
from dms_fastai.training.losses import DKD, UNLABELLED
from tests.conftest import quiet
from tests.test_data import COLOURS, make_folder, make_npz
from tests.test_losses import log_softmax
from tests.test_runs import dms  # noqa: F401  (a fixture)
from tests.test_sources import said

FAST = ("--arch", "test_dmsresnet", "--epochs", "2", "--set", "data.batch_size=16", "--device", "cpu")
T = 3.0


def add_images(folder, count=5):
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(count):
        Image.new("RGB", (9, 9), (50 * index, 0, 200)).save(folder / f"{index}.png")


def digits_npz(file, labelled=160, **changes):
    """Digits, of whose training images the first few have labels."""
    splits = load_splits("digits")
    train, test = splits["train"], splits["test"]
    arrays = {
        "train_images": train.images[:labelled].numpy(),
        "train_labels": train.labels[:labelled].numpy(),
        "unlabelled_images": train.images[labelled:400].numpy(),
        "test_images": test.images[:90].numpy(),
        "test_labels": test.labels[:90].numpy(),
    }
    np.savez(file, **{key: value for key, value in (arrays | changes).items() if value is not None})
    return file


def network():
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 10))


# Sources


@pytest.mark.parametrize("name", ["unlabelled", "Unlabeled"])
def test_a_folder_beside_train_has_images_at_any_depth(tmp_path, name):
    root = make_folder(tmp_path / "colours")
    add_images(root / name, 2)
    add_images(root / name / "more" / "deep", 3)
    splits = load_splits(root, 8)
    assert len(splits["unlabelled"]) == 5
    assert splits["unlabelled"].labels.tolist() == [UNLABELLED] * 5
    assert splits["train"].vocab == ["blue", "green", "red"]
    dls = load_data(root, bs=4, size=8, device="cpu")
    assert (len(dls.train_ds), len(dls.valid_ds), len(dls.unlabelled)) == (12, 12, 5)
    assert len(dls.with_unlabelled().train_ds) == 17


def test_a_folder_beside_classes_is_no_class(tmp_path):
    root = make_folder(tmp_path / "colours", ("train",)) / "train"
    add_images(root / "unlabelled")
    splits = load_splits(root, 8)
    assert splits["train"].vocab == ["blue", "green", "red"]
    assert (len(splits["train"]), len(splits["unlabelled"])) == (12, 5)


def test_held_out_images_are_labelled_ones(tmp_path):
    root = make_folder(tmp_path / "colours")
    add_images(root / "unlabelled", 8)
    dls = load_data(root, bs=4, size=8, valid=0.25, device="cpu").with_unlabelled()
    assert dls.valid_ds.labels.tolist() == [0, 1, 2]
    assert Counter(dls.train_ds.labels.tolist()) == {0: 3, 1: 3, 2: 3, UNLABELLED: 8}


def test_a_table_labels_what_it_names_wherever_it_lies(tmp_path):
    make_folder(tmp_path / "all", ("train",))
    add_images(tmp_path / "all" / "unlabelled", 5)
    rows = [f"train/{colour}/{index}.png,{colour}" for colour in COLOURS for index in range(3)]
    table = tmp_path / "labels.csv"
    table.write_text("\n".join(["file,label", *rows, "unlabelled/4.png,red"]))
    splits, words = said(lambda: load_splits(tmp_path / "all", 8, table))
    assert (len(splits["train"]), len(splits["unlabelled"])) == (10, 4)
    assert "3 images are not in labels.csv, and are skipped" in words


@pytest.mark.parametrize("key", ["unlabelled_images", "unlabeled_images"])
def test_arrays_of_unlabelled_images(tmp_path, key):
    images = np.zeros((7, 28, 28), np.uint8)  # grey beside images in colour
    splits = load_splits(make_npz(tmp_path / "a.npz", **{key: images}))
    assert splits["unlabelled"].images.shape == (7, 3, 28, 28)
    assert splits["unlabelled"].labels.tolist() == [UNLABELLED] * 7


@pytest.mark.parametrize(
    ("images", "words"),
    [
        (np.zeros((7, 28, 28, 4), np.uint8), r"unlabelled_images: images have shape \(28, 28, 4\)"),
        (np.zeros((0, 28, 28), np.uint8), "unlabelled has 0 images"),
    ],
)
def test_arrays_that_cannot_be_used_are_refused_before_training(tmp_path, images, words):
    with pytest.raises(UserError, match=words):
        load_data(make_npz(tmp_path / "a.npz", unlabelled_images=images), device="cpu")


def test_folders_that_cannot_be_used_are_refused_before_training(tmp_path):
    root = make_folder(tmp_path / "colours")
    (root / "unlabelled").mkdir()
    with pytest.raises(UserError, match="unlabelled holds no images"):
        load_data(root, size=8)
    (root / "unlabelled" / "1.png").write_text("no image")
    with pytest.raises(UserError, match=r"unlabelled/1\.png is not an image"):
        load_data(root, size=8)


def test_balance_concerns_the_labelled_images_alone():
    labels = torch.tensor([0] * 9 + [1] * 3 + [UNLABELLED] * 5)
    order = balanced(labels)
    assert Counter(labels[order].tolist()) == {0: 6, 1: 6, UNLABELLED: 5}
    assert len(set(order[labels[order] == UNLABELLED].tolist())) == 5
    alone = torch.full((4,), UNLABELLED)
    assert sorted(balanced(alone).tolist()) == [0, 1, 2, 3]


# The loss


def partly(**options):
    loss = DMSLoss(alpha=0.7, T=T, **options)
    loss.partial = True
    return loss


def reference(z_s, z_t, sides, alpha=0.7, weight=None, smoothing=0.0):
    """The mean over images of alpha soft + (1 - alpha) hard, or of soft alone without a label, by each side's share."""
    n, c = z_s.shape
    log_s, log_t = log_softmax(z_s / T), log_softmax(z_t / T)
    kl = T**2 * (np.exp(log_t) * (log_t - log_s)).sum(1)
    logs, w, total = log_softmax(z_s), np.ones(c) if weight is None else weight, 0.0
    for y, share in sides:
        known = [i for i in range(n) if y[i] != UNLABELLED]
        mean_weight = np.mean([w[y[i]] for i in known]) if known else 1.0
        for i in range(n):
            if i not in known:
                total += share * kl[i]
                continue
            q = (1 - smoothing) * np.eye(c)[y[i]] + smoothing / c
            total += share * (alpha * kl[i] - (1 - alpha) * (w * q * logs[i]).sum() / mean_weight)
    return total / n


@pytest.mark.parametrize("weight", [None, np.array([0.5, 1.0, 2.0, 4.0])])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("y", [[1, UNLABELLED, 3, 0, UNLABELLED], [UNLABELLED] * 5, [1, 2, 3, 0, 0]])
def test_an_image_without_a_label_has_the_divergence_alone(weight, smoothing, mixed, y):
    rng = np.random.default_rng(0)
    z_s, z_t = rng.normal(0, 2, (2, 5, 4))
    y_a, y_b, lam = np.array(y), np.array(y)[[4, 2, 1, 3, 0]], 0.3
    loss = partly(label_smoothing=smoothing, weight=None if weight is None else weight.tolist())
    pred = torch.tensor(z_s, requires_grad=True)
    second = (torch.tensor(y_b), torch.tensor(lam, dtype=torch.float64)) if mixed else (None, None)
    found = loss(pred, torch.tensor(y_a), *second, torch.tensor(z_t))
    sides = [(y_a, lam), (y_b, 1 - lam)] if mixed else [(y_a, 1.0)]
    assert found.item() == pytest.approx(reference(z_s, z_t, sides, weight=weight, smoothing=smoothing), rel=1e-6)
    found.backward()
    assert pred.grad.isfinite().all()
    share = sum(share * np.mean(y != UNLABELLED) for y, share in sides)
    assert loss.parts["labelled"].item() == pytest.approx(share)


@pytest.mark.parametrize("divergence", ["kl", "dkd", "dist"])
def test_all_labelled_is_the_ordinary_loss(divergence):
    pred, logits, y = torch.randn(6, 4), torch.randn(6, 4), torch.tensor([0, 1, 2, 3, 0, 1])
    weight = [1.0, 2.0, 3.0, 4.0]
    ordinary = DMSLoss(alpha=0.7, T=T, divergence=divergence, weight=weight)(pred, y, y.flip(0), 0.4, logits)
    found = partly(divergence=divergence, weight=weight)(pred, y, y.flip(0), 0.4, logits)
    torch.testing.assert_close(found, ordinary)


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_other_reductions_weight_each_image(reduction):
    pred, logits, y = torch.randn(4, 3), torch.randn(4, 3), torch.tensor([0, UNLABELLED, 2, UNLABELLED])
    each = [partly()(pred[i : i + 1], y[i : i + 1], None, None, logits[i : i + 1]) for i in range(4)]
    wanted = torch.stack(each) if reduction == "none" else torch.stack(each).sum()
    torch.testing.assert_close(partly(reduction=reduction)(pred, y, None, None, logits), wanted)


def test_dkd_has_the_ordinary_divergence_for_an_image_without_a_label():
    pred, logits = torch.randn(2, 4), torch.randn(2, 4)
    both = partly(divergence=DKD(beta=2.0), reduction="none")(pred, torch.tensor([1, UNLABELLED]), None, None, logits)
    decoupled = DMSLoss(alpha=0.7, T=T, divergence=DKD(beta=2.0))(pred[:1], torch.tensor([1]), None, None, logits[:1])
    ordinary = DMSLoss(alpha=1.0, T=T)(pred[1:], torch.tensor([0]), None, None, logits[1:])
    torch.testing.assert_close(both, torch.stack([decoupled, ordinary]))


# Learners


def test_a_learner_that_distils_trains_on_all_images(tmp_path, teacher):
    dls = load_data(digits_npz(tmp_path / "few.npz"), bs=50, device="cpu")
    learn = quiet(dms_learner(dls, "kd", teacher=teacher, arch="test_dmsresnet"))
    assert len(learn.dls.train_ds) == 400
    assert len(learn.dls.train) == 8
    learn.fit_recipe(epochs=1)
    named = dict(zip(learn.recorder.metric_names[1:], learn.recorder.values[-1], strict=False))
    assert all(np.isfinite(value) for value in named.values() if isinstance(value, float))
    learn.dls.train.show_batch()  # has images without a name
    learn.mix_up.show_batch()


def test_training_accuracy_and_cross_entropy_are_those_of_labelled_images(tmp_path, teacher):
    dls = load_data(digits_npz(tmp_path / "few.npz"), bs=400, device="cpu", flip=0.0, pad=0.0)
    learn = quiet(dms_learner(dls, "cpu/kd", teacher=teacher, arch=network(), settings={"bf16": False}))
    model = {name: value.clone() for name, value in learn.model.state_dict().items()}
    learn.fit_recipe(epochs=1)  # one step, so that all figures are of the weights from before
    named = dict(zip(learn.recorder.metric_names[1:], learn.recorder.values[-1], strict=False))
    learn.model.load_state_dict(model)
    x, y = dls.train.load_batch(torch.arange(160))
    with torch.no_grad():
        logits = learn.model(x)
    assert named["train_accuracy"] == pytest.approx((logits.argmax(1) == y).float().mean().item())
    entropy = -log_softmax(logits.double().numpy())[np.arange(160), y.numpy()].mean()
    assert named["train_cross_entropy"] == pytest.approx(entropy, rel=1e-4)


def test_without_a_teacher_they_are_not_used(tmp_path, teacher):
    dls = load_data(digits_npz(tmp_path / "few.npz"), bs=50, device="cpu")
    learn, words = said(lambda: dms_learner(dls, "se", arch="test_dmsresnet"))
    assert len(learn.dls.train_ds) == 160
    assert "240 images without labels are not used: they need a teacher" in words
    other, words = said(
        lambda: dms_learner(dls, "kd", teacher, "test_dmsresnet", loss_func=torch.nn.CrossEntropyLoss())
    )
    assert len(other.dls.train_ds) == 160
    assert "they need loss_func=DMSLoss()" in words
    student = quiet(dms_learner(dls, "kd", teacher=teacher, arch="test_dmsresnet"))
    student.remove_cb(student.teacher_distill)
    with pytest.raises(UserError, match="some training images have no label"):
        student.fit(1)


def test_without_any_label_the_classes_are_given(tmp_path, teacher):
    file = digits_npz(tmp_path / "none.npz", train_labels=None, unlabelled_images=None, test_labels=None)
    with pytest.raises(UserError, match=r"has no 'train_labels'.*classes= in Python"):
        load_data(file, device="cpu")
    dls = load_data(file, bs=40, device="cpu", classes=[str(i) for i in range(10)])
    with pytest.raises(UserError, match="no training image has a label"):
        dms_learner(dls, "se", arch="test_dmsresnet")
    learn = dms_learner(dls, "kd", teacher=teacher, arch="test_dmsresnet")
    teacher.model.eval()
    with torch.no_grad():
        x, _ = dls.valid.load_batch(torch.arange(90))
        theirs = teacher.model(x).argmax(1)
    assert torch.equal(learn.dls.valid_ds.labels, theirs)
    assert learn.dls.valid_ds.by_teacher


# Runs


def facts(folder):
    return json.loads((folder / "run.json").read_text())


def test_a_student_uses_them_and_its_teacher_does_not(dms, tmp_path):  # noqa: F811
    file = digits_npz(tmp_path / "few.npz")
    command = ("run", "kd", "--data", file, *FAST, "--set", "teacher.model.name=test_dmsresnet")
    code, out, _ = dms(*command, "--dry-run")
    assert code == 0
    assert "160 training images of 10 classes" in out
    assert "and 240 without labels, for distillation alone" in " ".join(out.split())
    assert dms(*command)[0] == 0
    teacher, student = (facts(tmp_path / "artifacts" / "few" / name / "seed0") for name in ("teacher", "kd"))
    assert (teacher["training_images"], teacher.get("unlabelled_images")) == (160, None)
    assert (student["training_images"], student["unlabelled_images"]) == (160, 240)
    assert teacher["data_digest"] == student["data_digest"][:2]
    assert len(student["data_digest"]) == 3
    code, out, err = dms(*command)
    assert code == 0  # both are finished, on the same images
    digits_npz(file, unlabelled_images=np.zeros((9, 8, 8), np.uint8))
    code, _, err = dms(*command)
    assert (code, "on other images" in err) == (2, True)
    _, _, err = dms("run", "se", "--data", file, *FAST, "--dry-run")
    assert "its images without labels are not used: none of these recipes has a teacher" in err


def test_a_run_that_was_stopped_goes_on_as_if_it_had_not_been(dms, tmp_path, teacher):  # noqa: F811
    from dms_fastai.export import export_run
    from dms_fastai.run_folder import RunFolder

    file = digits_npz(tmp_path / "few.npz")
    (tmp_path / "teacher").mkdir()
    export_run(teacher, RunFolder(tmp_path / "teacher"))
    command = ("run", "kd", "--data", file, *FAST, "--teacher", tmp_path / "teacher" / "model.safetensors")
    assert dms(*command, "--out", "whole")[0] == 0
    assert dms(*command, "--out", "parts", "--checkpoint-steps", 7, "--time-limit", "0.01s")[0] == 75
    assert dms(*command, "--out", "parts")[0] == 0
    whole, parts = (facts(tmp_path / out / "kd" / "seed0")["last"] for out in ("whole", "parts"))
    assert whole == parts


@pytest.mark.parametrize("labelled_test", [True, False])
def test_a_folder_without_labels_has_its_teachers_classes(dms, tmp_path, labelled_test):  # noqa: F811
    root = make_folder(tmp_path / "colours")
    assert dms("run", "se", "--data", root, *FAST, "--set", "data.size=8", "--set", "data.batch_size=6")[0] == 0
    bare = tmp_path / "bare"
    add_images(bare / "train", 8)
    add_images(bare / "unlabelled", 4)
    if labelled_test:
        make_folder(bare, ("test",))
    else:
        add_images(bare / "test", 6)
    teacher = tmp_path / "artifacts" / "colours" / "se" / "seed0"
    command = ("run", "kd", "--data", bare, *FAST, "--set", "data.size=8", "--set", "data.batch_size=6")
    code, _, err = dms(*command)
    assert (code, "has no class folders" in err) == (2, True)
    code, out, err = dms(*command, "--teacher", teacher)
    assert code == 0, err
    told = facts(tmp_path / "artifacts" / "bare" / "kd" / "seed0")
    assert (told["training_images"], told["unlabelled_images"]) == (0, 12)
    assert told["agreement"] is not labelled_test
    assert told["classes"] == 3
    code, out, _ = dms("report", tmp_path / "artifacts" / "bare")
    page = (tmp_path / "report" / "report.md").read_text()
    assert code == 0
    assert ("ccuracy" in page) is labelled_test
    assert ("ccuracy" in out) is labelled_test
    assert ("agreement with the teacher" in page) is not labelled_test
    code, _, err = dms(*command, "--teacher", teacher, "--compare")
    assert (code, "no training image has a label" in err) == (2, True)


def test_a_class_that_the_teacher_does_not_know_is_named(tmp_path):
    add_images(tmp_path / "train")
    make_folder(tmp_path, ("test",))
    with pytest.raises(UserError, match="has a class 'green' that the teacher does not know"):
        load_data(tmp_path, size=8, classes=["blue", "red"])


def test_validated_training_images_are_the_labelled_ones(tmp_path, teacher):
    dls = load_data(digits_npz(tmp_path / "few.npz"), bs=50, device="cpu", flip=0.0, pad=0.0)
    learn = quiet(dms_learner(dls, "cpu/kd", teacher=teacher, arch=network(), settings={"bf16": False}))
    for trained in (False, True):
        if trained:
            learn.fit_recipe(epochs=1)
        x, y = dls.train.load_batch(torch.arange(160))
        with torch.no_grad():
            logits = learn.model.eval()(x).double()
        loss, accuracy = learn.validate(0)
        assert accuracy == pytest.approx((logits.argmax(1) == y).double().mean().item())
        assert loss == pytest.approx(torch.nn.functional.cross_entropy(logits, y).item(), rel=1e-4)
