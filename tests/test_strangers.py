"""Files of strangers: reading one runs no code, fetches and writes nothing, and says in a line what is wrong."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import timm
import torch
from fastai.callback.mixup import CutMix as StockCutMix
from fastai.callback.mixup import MixUp as StockMixUp
from PIL import Image
from safetensors.torch import save
from timm.models import _registry as registry

from dms_fastai import UserError, dms_learner, load_data, load_recipe, load_teacher
from dms_fastai.models.build import Model
from dms_fastai.models.card import ModelCard
from dms_fastai.models.weights import KEY, load_weights, save_weights
from tests.conftest import quiet
from tests.test_runs import dms, same_run  # noqa: F401  (a fixture)

ROOT = Path(__file__).parent.parent

CARD = {
    "arch": "test_dmsresnet",
    "vocab": [str(i) for i in range(10)],
    "mean": [0.5] * 3,
    "std": [0.25] * 3,
    "size": 8,
    "args": {"drop_rate": 0.1},
}


@pytest.fixture
def write(tmp_path):
    """A file of weights with a card in which some fields are others."""
    state = timm.create_model("test_dmsresnet").state_dict()

    def write(**fields):
        card = {key: value for key, value in {**CARD, **fields}.items() if value is not LEFT_OUT}
        file = tmp_path / "model.safetensors"
        file.write_bytes(save(state, {KEY: json.dumps(card)}))
        return file

    return write


LEFT_OUT = object()


def test_a_sound_card_is_read(write):
    model, card = load_weights(write())
    assert card.args == {"drop_rate": 0.1}
    assert not model.training


@pytest.mark.parametrize(
    "args",
    [
        {"pretrained": True},
        {"pretrained": True, "pretrained_cfg": {"url": "http://localhost/x", "file": "/etc/passwd"}},
        {"pretrained": True, "pretrained_cfg_overlay": {"file": "x.pth"}},
        {"checkpoint_path": "x.pth"},
        {"pretrained": True, "cache_dir": "there"},
    ],
    ids=str,
)
def test_what_chooses_weights_is_never_read_from_a_card(write, args, monkeypatch, tmp_path):
    """Cards of earlier versions may have it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("torch.hub.load_state_dict_from_url", lambda *_, **__: pytest.fail("fetched"))
    (tmp_path / "x.pth").write_bytes(b"a pickle")
    file = write(args=args)
    before = sorted(tmp_path.rglob("*"))
    _, card = load_weights(file)
    assert card.args == {}
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    "fields",
    [
        {"args": {"features_only": True}},
        {"args": {"depths": [10_000_000, 1, 1]}},
        {"args": {"depths": [[1] * 100] * 100}},
        {"args": {"depths": list(range(100))}},
        {"args": {"widths": [16, 32, float("nan")]}},
        {"args": {"widths": [16, 32]}},
        {"args": {"depths": [-1, 1, 1]}},
        {"args": {"nosuch": 1}},
        {"args": {"x" * 1000: 1}},
        {"args": [1]},
        {"args": None},
        {"arch": "hf-hub:timm/resnet18"},
        {"arch": "local-dir:/tmp"},
        {"arch": "../resnet18"},
        {"arch": "test_dmsresnet.tag"},
        {"arch": 3},
        {"arch": "resnet1001"},
        {"vocab": "0123456789"},
        {"vocab": []},
        {"vocab": ["a"] * 10},
        {"vocab": [1, 2]},
        {"vocab": LEFT_OUT},
        {"mean": [0.5]},
        {"mean": ["x"] * 3},
        {"std": [0.0] * 3},
        {"std": [float("inf")] * 3},
        {"std": None},
        {"size": "8"},
        {"size": 10**9},
        {"size": 0},
        {"size": True},
        {"more": 1},
    ],
    ids=str,
)
def test_a_card_that_is_not_is_refused_in_a_line_and_at_once(write, fields, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("urllib.request.urlopen", lambda *_: pytest.fail("fetched"))
    monkeypatch.setattr("torch.hub.load_state_dict_from_url", lambda *_, **__: pytest.fail("fetched"))
    file = write(**fields)
    before, began = sorted(tmp_path.rglob("*")), time.monotonic()
    with pytest.raises(UserError) as error:
        load_weights(file)
    assert time.monotonic() - began < 5
    assert str(file) in error.value.message
    assert "\n" not in error.value.message
    assert len(error.value.message) < 500
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("content", ["", "{", "3", "[]", "null", '{"arch": "test_dmsresnet"}'])
def test_what_is_no_card_is_refused(tmp_path, content):
    file = tmp_path / "model.safetensors"
    file.write_bytes(save({"x": torch.zeros(1)}, {KEY: content}))
    with pytest.raises(UserError, match=r"model\.safetensors"):
        load_weights(file)


@pytest.mark.parametrize(
    "args", [{"pretrained": True}, {"checkpoint_path": "x.pth"}, {"pretrained_cfg": {"file": "x"}}, {"cache_dir": "."}]
)
def test_start_weights_are_a_key_of_their_own(args):
    with pytest.raises(UserError, match=r"model\.weights"):
        quiet(dms_learner(load_data("digits"), "se", settings={"model.args": args}))


@pytest.mark.parametrize(
    ("arch", "args"),
    [
        ("test_plain_cnn", {"hidden": 9000}),
        ("dmsresnet", {"depths": (22, 22, 22), "widths": (8, 8, 8), "mid_widths": [8] * 66}),
    ],
)
def test_what_no_file_could_be_read_with_is_refused_before_anything_is_trained(tmp_path, arch, args):
    last = list(args)[-1]
    with pytest.raises(UserError, match=rf"model\.args\.{last} is .*, with which no file of weights can be read; numb"):
        Model(arch, args=args).create(10, (3, 32, 32))
    card = ModelCard(arch, ["a", "b"], (0.5,), (0.25,), (3, 32, 32), args)
    with pytest.raises(UserError, match=r"x\.safetensors could not be read again \('args' of its card is"):
        save_weights(torch.nn.Linear(1, 1), card, tmp_path / "x.safetensors")
    assert not list(tmp_path.iterdir())


def test_an_object_builds_a_network_that_no_file_can_name(tmp_path):
    args = {"act_layer": torch.nn.ReLU6}
    model = Model("test_resnet", args=args).create(2, (3, 32, 32))
    assert any(isinstance(module, torch.nn.ReLU6) for module in model.modules())
    with pytest.raises(UserError, match=r"x\.safetensors could not be read again"):
        save_weights(
            model, ModelCard("test_resnet", ["a", "b"], (0.5,), (0.25,), (3, 32, 32), args), tmp_path / "x.safetensors"
        )


def test_a_run_that_began_from_given_weights_opens_without_them(dms, tmp_path):  # noqa: F811
    args = ("--epochs", 1, "--set", "data.batch_size=256")
    assert dms("run", "se", *args, "--out", "first")[0] == 0
    more = ("run", "se", *args, "--set", "model.weights=first/se/seed0", "--set", "optimizer.lr=1e-6")
    assert dms(*more, "--out", "x")[0] == 0
    first, second = (load_weights(tmp_path / name / "se" / "seed0" / "model.safetensors") for name in ("first", "x"))
    before, after = (model.fc.weight for model, _ in (first, second))
    torch.testing.assert_close(after, before, atol=1e-3, rtol=0)
    (tmp_path / "first").rename(tmp_path / "gone")
    assert "weights" not in second[1].args
    assert load_recipe(tmp_path / "x" / "se" / "seed0" / "recipe.toml").model.weights == "first/se/seed0"
    assert load_teacher(tmp_path / "x" / "se" / "seed0").vocab == [str(i) for i in range(10)]
    assert dms(*more, "--out", "x")[0] == 0  # is finished
    code, _, err = dms(*more, "--out", "y")
    assert code == 2
    assert "first/se/seed0" in err


def test_weights_of_other_classes_keep_all_but_the_classifier(tmp_path, write):
    few = timm.create_model("test_dmsresnet", num_classes=3)
    file = tmp_path / "three.safetensors"
    save_weights(few, ModelCard("test_dmsresnet", ["a", "b", "c"], (0.5,) * 3, (0.25,) * 3, (3, 8, 8)), file)
    learn = dms_learner(load_data("digits"), "se", settings={"model.weights": str(file)})
    assert torch.equal(learn.model.conv1.weight, few.conv1.weight)
    assert learn.model.fc.weight.shape[0] == 10
    with pytest.raises(UserError, match="other network"):
        dms_learner(load_data("digits"), "se", arch="dmsresnet", settings={"model.weights": str(file)})


# Weights that are no numbers


def test_weights_that_become_nan_in_the_last_step_are_not_kept(dms, tmp_path, monkeypatch):  # noqa: F811
    """The last loss is of the weights before that step, and is as good as ever."""
    from dms_fastai.training.optimizers import GroupedOptimWrapper

    step, steps = GroupedOptimWrapper.step, []

    def breaking(self, closure=None):
        step(self, closure)
        steps.append(1)
        if len(steps) == 2 * 5:  # five steps an epoch
            self.opt.param_groups[0]["params"][0].data.fill_(float("nan"))

    args = ("run", "se", "--epochs", 2, "--set", "data.batch_size=256", "--device", "cpu")
    assert dms(*args, "--out", "whole")[0] == 0
    with monkeypatch.context() as patch:
        patch.setattr(GroupedOptimWrapper, "step", breaking)
        code, _, err = dms(*args, "--out", "x")
    assert len(steps) == 10
    assert code == 2
    assert "weights are NaN or infinite in epoch 2" in err
    folder = tmp_path / "x" / "se" / "seed0"
    assert not (folder / "model.safetensors").exists()
    assert dms(*args, "--out", "x")[0] == 0  # from the first epoch's checkpoint
    same_run(folder, tmp_path / "whole" / "se" / "seed0")


def test_a_validation_loss_that_is_nan_ends_a_run(dms, tmp_path, monkeypatch):  # noqa: F811
    from dms_fastai.learner.recorder import LazyLoss

    with monkeypatch.context() as patch:
        patch.setattr(LazyLoss, "value", property(lambda self: float("nan")))
        code, _, err = dms("run", "se", "--epochs", 2, "--out", "x", "--set", "data.batch_size=256")
    assert code == 2
    assert "the validation loss is nan in epoch 1" in err
    json.loads((tmp_path / "x" / "se" / "seed0" / "run.json").read_text(), parse_constant=pytest.fail)


def test_a_teacher_without_numbers_is_said(teacher):
    broken = timm.create_model("test_dmsresnet")
    broken.fc.bias.data.fill_(float("nan"))
    with pytest.raises(UserError, match="the teacher's weights are NaN"):
        dms_learner(load_data("digits", bs=256), "kd", teacher=broken)


@pytest.mark.parametrize("stock", [StockMixUp, StockCutMix, StockMixUp(0.4)], ids=str)
def test_fastais_own_mixup_is_refused(stock):
    with pytest.raises(UserError, match="of dms_fastai"):
        dms_learner(load_data("digits"), "se", cbs=stock)


# Folders that hold more than a run


def test_a_lock_that_is_a_link_leaves_its_target_alone(dms, tmp_path):  # noqa: F811
    folder = tmp_path / "x" / "se" / "seed0"
    folder.mkdir(parents=True)
    (tmp_path / "precious").write_text("all I have")
    (folder / ".lock").symlink_to(tmp_path / "precious")
    code, _, err = dms("run", "se", "--epochs", 1, "--out", "x")
    assert code == 2
    assert ".lock is a link" in err
    assert (tmp_path / "precious").read_text() == "all I have"


def test_only_what_is_a_runs_is_swept_away(dms, tmp_path):  # noqa: F811
    folder = tmp_path / "x" / "se" / "seed0"
    folder.mkdir(parents=True)
    mine = [folder / "notes.partial", folder / "thesis.txt.12.partial", folder / "deep" / "run.json.7.partial"]
    left = [folder / "run.json.99.partial", folder / "checkpoint" / "00001-0000000-abc.pt.5.partial"]
    for file in (*mine, *left):
        file.parent.mkdir(exist_ok=True)
        file.write_text("")
    (folder / "recipe.toml").write_text('name = "a cake"')  # no run's
    assert dms("run", "se", "--epochs", 1, "--out", "x", "--restart", "--set", "data.batch_size=256")[0] == 0
    assert all(file.exists() for file in mine)
    assert not any(file.exists() for file in left)


@pytest.mark.parametrize(("number", "code"), [("SIGHUP", 129), ("SIGUSR1", 138), ("SIGUSR2", 140), ("SIGXCPU", 152)])
def test_other_signals_end_a_run_as_sigterm_does(dms, tmp_path, monkeypatch, number, code):  # noqa: F811
    from dms_fastai.runs.checkpoint import Checkpoint

    args = ("run", "se", "--epochs", 2, "--out", "x", "--set", "data.batch_size=256")
    before_train = Checkpoint.before_train

    def signalled(self):
        before_train(self)
        os.kill(os.getpid(), getattr(signal, number))

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoint, "before_train", signalled)
        stopped, out, _ = dms(*args)
    assert stopped == code
    assert f"stopped ({number})" in out
    assert dms(*args)[0] == 0


def test_a_reader_that_has_had_enough_is_no_error():
    done = subprocess.run(
        f"{sys.executable} -m dms_fastai recipes | head -1", shell=True, capture_output=True, text=True, cwd=ROOT
    )
    assert done.stderr == ""
    assert len(done.stdout.splitlines()) == 1


def test_weights_of_a_network_that_somebody_has_registered_ask_for_that(dms, tmp_path):  # noqa: F811
    """A run of it can be reported without; its weights need the module that registers it."""
    name = "dmsresnet_of_a_stranger"

    def made(pretrained=False, **kwargs):
        return timm.create_model("test_dmsresnet", **{k: v for k, v in kwargs.items() if k != "pretrained_cfg"})

    made.__name__, made.__module__ = name, "dms_fastai.models.dmsresnet"
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(registry._model_entrypoints, name, made)
        args = ["run", "se", "--arch", name, "--epochs", 1, "--set", "data.batch_size=700", "--device", "cpu"]
        assert dms(*args, "--out", "x")[0] == 0
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    code, _, err = dms("predict", "x/se/seed0", "a.png")
    assert (code, "import the module that registers it, in a command by DMS_FASTAI_IMPORT" in err) == (2, True)
    code, out, _ = dms("report", "x", "--out", "r")
    assert (code, "left out" in out) == (0, False)


def test_a_command_imports_the_module_that_registers_a_network(tmp_path):
    (tmp_path / "my_nets.py").write_text(
        "from timm.models import register_model\nfrom torch import nn\n\n\n@register_model\n"
        "def my_net(pretrained=False, num_classes=10, in_chans=3, **kwargs):\n"
        "    model = nn.Sequential(nn.Conv2d(in_chans, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), "
        "nn.Linear(8, num_classes))\n    model.num_classes = num_classes\n    return model\n"
    )
    command = [sys.executable, "-m", "dms_fastai", "run", "se", "--arch", "my_net", "--epochs", "1", "--device", "cpu"]
    for modules, code, words in (("my_nets", 0, "my_net"), ("my_netts", 2, "No module named 'my_netts'")):
        done = subprocess.run(
            command, cwd=tmp_path, capture_output=True, text=True, env={**os.environ, "DMS_FASTAI_IMPORT": modules}
        )
        assert (done.returncode, words in done.stdout + done.stderr) == (code, True), done.stderr
