"""The weights that come with the package: offline, in timm and on the command line, as good as their card says."""

import hashlib
import json
import os
import pickle
from pathlib import Path

import pytest
import timm
import torch
from fastai.data.external import URLs, fastai_path
from PIL import Image
from safetensors import safe_open

from dms_fastai import UserError, load_data, load_teacher
from dms_fastai.export import predict_files
from dms_fastai.models.dmsresnet import PRETRAINED
from dms_fastai.release import card_text
from tests.test_runs import dms  # noqa: F401  (a fixture)

NAMES = sorted(file.stem for file in PRETRAINED.glob("*.safetensors"))


def cifar10():
    """CIFAR-10 where a run would find it or CIFAR10 says it is; downloads nothing."""
    places = [fastai_path("data") / Path(URLs.CIFAR).stem]
    if "CIFAR10" in os.environ:
        places.insert(0, Path(os.environ["CIFAR10"]))
    return next((place for place in places if place.exists()), None)


@pytest.fixture
def facts(name):
    return json.loads((PRETRAINED / f"{name}.json").read_text())


def test_there_are_weights():
    assert any(name.startswith("dmsresnet.") for name in NAMES)
    assert {name.split(".")[0] for name in NAMES} <= set(timm.list_models(module="dmsresnet"))


@pytest.mark.parametrize("name", NAMES)
def test_timm_loads_what_is_in_the_file(name):
    model = timm.create_model(name, pretrained=True).eval()
    with safe_open(PRETRAINED / f"{name}.safetensors", "pt") as file:
        state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    assert all(value.dtype == torch.float16 for value in state.values() if value.is_floating_point())
    for key, value in model.state_dict().items():
        assert torch.equal(value, state[key].to(value.dtype)), key
    assert (PRETRAINED / f"{name}.safetensors").stat().st_size < 10e6
    assert name in timm.list_models(pretrained=True, module="dmsresnet")


def test_the_head_and_the_stem_adapt_to_other_data():
    model = timm.create_model("dmsresnet", pretrained=True, num_classes=7, in_chans=1)
    whole = timm.create_model("dmsresnet", pretrained=True)
    assert torch.equal(model.stages[0][0].residual[0].weight, whole.stages[0][0].residual[0].weight)
    assert model(torch.randn(2, 1, 32, 32)).shape == (2, 7)


def test_they_teach_and_know_their_classes():
    teacher = load_teacher("timm:dmsresnet")
    assert teacher.vocab[:3] == ["airplane", "automobile", "bird"]
    assert pickle.loads(pickle.dumps(teacher.model)).num_classes == 10


def test_predict_takes_the_name(dms, tmp_path):  # noqa: F811
    Image.new("RGB", (40, 40), (30, 90, 200)).save(tmp_path / "blue.png")
    code, out, _ = dms("predict", "dmsresnet", "blue.png")
    assert code == 0
    assert "blue.png: " in out
    assert any(name in out for name in load_teacher("timm:dmsresnet").vocab)
    code, _, err = dms("predict", "dmsresnet_lite", "blue.png")
    assert code == 2
    assert "no model at dmsresnet_lite" in err
    vocab, probabilities = predict_files(Path("dmsresnet"), [tmp_path / "blue.png"])
    assert len(vocab) == 10
    assert torch.isclose(probabilities.sum(), torch.tensor(1.0))
    with pytest.raises(UserError, match="no model at resnet18"):
        predict_files(Path("resnet18"), [tmp_path / "blue.png"])


@pytest.mark.parametrize("name", NAMES)
def test_the_card_says_what_was_measured(name, facts):
    card = (PRETRAINED / f"{name}.md").read_text()
    assert card == card_text(name, facts)
    assert f"**{100 * facts['test_accuracy']:.2f} %**" in card
    assert f"{facts['epochs']} epochs" in card
    mean = sum(facts["class_accuracy"].values()) / 10  # the test set has as many images of each class
    assert mean == pytest.approx(facts["test_accuracy"], abs=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_the_claimed_accuracy_is_found_again(name, facts):
    """On the test images whose bytes have the smallest hashes; rounding may tip one at the border of two classes."""
    if cifar10() is None:
        pytest.skip("CIFAR-10 is not at hand: neither in fastai's data folder nor where CIFAR10 says")
    test = load_data(cifar10(), device="cpu").valid_ds
    hashes = [hashlib.blake2b(image.numpy().tobytes(), digest_size=8).hexdigest() for image in test.images]
    sample = sorted(range(len(test)), key=hashes.__getitem__)[: facts["sample"]]
    if hashes[sample[-1]] != facts["sample_last_hash"]:
        pytest.skip(f"{cifar10()} has other test images than CIFAR-10")
    model = timm.create_model(name, pretrained=True).eval()
    mean, std = (torch.tensor(model.pretrained_cfg[key]).view(3, 1, 1) for key in ("mean", "std"))
    right = 0
    with torch.inference_mode():
        for some in torch.tensor(sample).split(100):
            x = (test.images[some].float() / 255 - mean) / std
            right += int((model(x).argmax(1) == test.labels[some]).sum())
    assert abs(right - facts["sample_correct"]) <= 1
