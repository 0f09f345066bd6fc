"""Models that leave for other runtimes: the same probabilities there, from nothing but the file."""

import json
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import timm
import torch
from fastai.learner import Learner
from fastai.losses import MSELossFlat
from PIL import Image
from torch import nn

from dms_fastai import UserError, dms_learner, load_data
from dms_fastai.bench import _accuracies
from dms_fastai.evaluate import evaluate_model
from dms_fastai.export import classifier, classify, export_model, export_run, formats, open_model, predict_files
from dms_fastai.export.formats import Exported, open_exported
from dms_fastai.models.card import ModelCard
from dms_fastai.run_folder import RunFolder
from tests.conftest import quiet
from tests.test_runs import dms  # noqa: F401  (a fixture)


@pytest.fixture(scope="module")
def folder(teacher, tmp_path_factory):
    """A trained Learner's run."""
    folder = tmp_path_factory.mktemp("run")
    export_run(teacher, RunFolder(folder))
    return folder


@pytest.fixture(scope="module")
def examples(tmp_path_factory):
    """Three files, called as what they show, and the same images as other runtimes have them: uint8, (3, 3, 8, 8)."""
    digits = load_data("digits").valid_ds
    images, folder = digits.images[[0, 100, 200]].numpy(), tmp_path_factory.mktemp("images")
    files = [folder / f"{digits.vocab[digits.labels[i]]}.png" for i in (0, 100, 200)]
    for file, image in zip(files, images, strict=True):
        Image.fromarray(image.transpose(1, 2, 0)).save(file)
    return files, images


def run_onnx(file, images):
    session = onnxruntime.InferenceSession(file)
    return session.run(["probabilities"], {"pixels": images})[0], session


def test_onnx_gives_predictions_from_pixels(folder, examples, tmp_path):
    files, images = examples
    written = export_model(folder, tmp_path / "new" / "kd.onnx")
    onnx.checker.check_model(onnx.load(written), full_check=True)
    probabilities, session = run_onnx(written, images)
    vocab, expected = predict_files(folder, files)
    np.testing.assert_allclose(probabilities, expected, atol=1e-5)
    assert [vocab[i] for i in probabilities.argmax(1)] == [file.stem for file in files]
    assert json.loads(session.get_modelmeta().custom_metadata_map["classes"]) == vocab
    assert (session.get_inputs()[0].shape, session.get_outputs()[0].shape) == (["batch", 3, 8, 8], ["batch", 10])
    alone, _ = run_onnx(written, images[1:2])  # any number of images
    np.testing.assert_allclose(alone, probabilities[1:2], atol=1e-5)
    assert not [node.op_type for node in onnx.load(written).graph.node if "Norm" in node.op_type]  # folded away
    assert [path.name for path in written.parent.iterdir()] == ["kd.onnx"]


def test_pt2_runs_where_this_package_is_not(folder, examples, tmp_path):
    files, images = examples
    written = export_model(folder, tmp_path / "kd.pt2")
    np.save(tmp_path / "images.npy", images)
    code = (
        "import json, sys, numpy, torch\n"
        "classes = {'classes.json': ''}\n"
        "model = torch.export.load(sys.argv[1], extra_files=classes).module()\n"
        "out = model(torch.from_numpy(numpy.load('images.npy'))).tolist()\n"
        "assert not {'dms_fastai', 'timm', 'fastai'} & sys.modules.keys()\n"
        "print(json.dumps([json.loads(classes['classes.json']), out]))\n"
    )
    done = subprocess.run([sys.executable, "-c", code, written], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    classes, out = json.loads(done.stdout)
    vocab, expected = predict_files(folder, files)
    assert classes == vocab
    np.testing.assert_allclose(out, expected, atol=1e-5)


def test_a_learner_leaves_as_it_is(teacher, folder, examples, tmp_path):
    _, images = examples
    before = {name: value.clone() for name, value in teacher.model.state_dict().items()}
    modes = [module.training for module in teacher.model.modules()]
    from_learner, _ = run_onnx(export_model(teacher, tmp_path / "a.onnx"), images)
    from_pickle, _ = run_onnx(export_model(folder / "learner.pkl", tmp_path / "b.onnx", trust=True), images)
    from_folder, _ = run_onnx(export_model(folder, tmp_path / "c.onnx"), images)
    np.testing.assert_array_equal(from_learner, from_folder)
    np.testing.assert_array_equal(from_pickle, from_folder)
    assert modes == [module.training for module in teacher.model.modules()]
    assert all(torch.equal(value, before[name]) for name, value in teacher.model.state_dict().items())


@pytest.mark.parametrize("suffix", [".onnx", ".pt2"])
def test_the_file_keeps_no_path_of_this_machine(folder, tmp_path, suffix):
    content = export_model(folder, tmp_path / f"kd{suffix}").read_bytes()
    assert str(Path(classifier.__file__).parent).encode() not in content
    assert b"site-packages" not in content


def test_many_images_are_predicted_a_few_at_a_time(folder, examples, monkeypatch):
    files = [*examples[0], *examples[0]]
    together = predict_files(folder, files)[1]
    monkeypatch.setattr(classify, "BATCH", 4)
    torch.testing.assert_close(predict_files(folder, iter(files))[1], together)


def test_what_cannot_be_written_is_said(folder, dls, tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"the formats are \.onnx, \.int8\.onnx, \.pt2, \.pte or \.int8\.pte"):
        export_model(folder, tmp_path / "kd.tflite")
    with pytest.raises(UserError, match="not of one label an image"):
        export_model(Learner(dls, timm.create_model("test_dmsresnet"), MSELossFlat()), tmp_path / "kd.onnx")
    with pytest.raises(UserError, match="no model at"):
        export_model(tmp_path / "nowhere", tmp_path / "kd.onnx")
    monkeypatch.setattr(formats, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install onnx onnxscript"):
        export_model(folder, tmp_path / "kd.onnx")
    assert not list(tmp_path.iterdir())


def test_the_command(dms, folder, tmp_path):  # noqa: F811
    code, out, _ = dms("export", folder, "kd.pt2")
    assert code == 0
    assert out == f"kd.pt2: {(tmp_path / 'kd.pt2').stat().st_size / 1e3:.1f} kB\n"
    code, _, err = dms("export", folder, "kd.bin")
    assert code == 2
    assert err.count("\n") == 1


class Brightness(nn.Module):
    """Logits of "dark" and "bright": the second's is the greater where the mean of the pixels, 0...1, is above 0.5."""

    def forward(self, x):
        mean = x.mean((1, 2, 3))
        return torch.stack([torch.zeros_like(mean), 8 * (mean - 0.5)], 1)


def sees_the_middle_of_12_bits(file):
    """A file of `Brightness`, for 8 pixels of the middle half of images in which 4095 is white."""
    images = {"white": 4095.0, "middle": 0.5}
    card = ModelCard("brightness", ["dark", "bright"], (0.0,) * 3, (1.0,) * 3, (3, 8, 8), **images)
    file.write_bytes(classifier.content_of(Brightness(), card, file.suffix))
    return file


def framed(file, inside, frame):
    """An image of 64 pixels with a frame that is more than half of it, and of which the middle half has nothing."""
    pixels = np.full((64, 64), frame, np.uint16)
    pixels[12:52, 12:52] = inside
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(file)
    return file


@pytest.mark.parametrize("ending", [".onnx", ".pt2", ".pte"])
def test_a_file_is_shown_what_its_network_has_seen(tmp_path, ending):
    if ending == ".pte":
        pytest.importorskip("executorch", reason="executorch, of the extra of this name, is not installed")
    file, image = sees_the_middle_of_12_bits(tmp_path / f"x{ending}"), framed(tmp_path / "x.png", 512, 1000)
    _, [probabilities] = predict_files(file, [image], trust=True)
    assert probabilities[1] == pytest.approx(1 / (1 + np.exp(-8 * (32 / 255 - 0.5))), abs=1e-4)


def test_evaluate_and_bench_show_a_file_what_its_network_has_seen(tmp_path):
    images = tmp_path / "images"
    for split in ("train", "test"):
        framed(images / split / "dark" / "0.png", 512, 4095)
        framed(images / split / "bright" / "0.png", 3584, 0)
    file = sees_the_middle_of_12_bits(tmp_path / "x.pt2")
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        found = evaluate_model(file, images, trust=True)
    assert found.accuracy == 1
    assert found.loss == pytest.approx(np.log([1 + np.exp(8 * (d / 255 - 0.5)) for d in (32, 31)]).mean(), abs=1e-4)
    assert not [each for each in said if "is white here" in str(each.message)]
    exported = open_exported(file, trust=True)
    assert _accuracies([exported], [exported.card(file.name)], images) == [1]


@pytest.mark.parametrize("images", [{"middle": "0"}, {"middle": "2"}, {"white": "-1"}, {"white": '"255"'}], ids=str)
def test_a_file_cannot_say_that_its_images_are_what_none_are(images):
    exported = Exported(lambda x: x, (3, 8, 8), {"classes": '["a", "b"]', **images})
    with pytest.raises(ValueError, match=f"'{next(iter(images))}' of its card is"):
        exported.card("x.onnx")


def test_a_stock_learner_says_what_its_images_are(dls):
    learn = Learner(dls, timm.create_model("test_dmsresnet"))
    dls.train_ds.white, dls.valid_ds.middle = 4095.0, 0.875
    for source in (learn, quiet(dms_learner(dls, "se"))):
        _, card = open_model(source)
        assert (card.white, card.middle) == (4095.0, 0.875)
