"""Exported files where torch is not classify as `predict` does. Damaged and foreign ones are refused in a line."""

import json
import re
import subprocess
import sys
from copy import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from onnx import TensorProto, helper
from PIL import Image
from torch import nn

from dms_fastai import UserError
from dms_fastai.export import export_model, export_run, predict_files
from dms_fastai.run_folder import RunFolder
from tests.test_runs import dms  # noqa: F401  (a fixture)

SCRIPT = Path(__file__).parent / "classify_alone.py"


@pytest.fixture(scope="module")
def folder(teacher, tmp_path_factory):
    """A trained Learner's run."""
    folder = tmp_path_factory.mktemp("run")
    export_run(teacher, RunFolder(folder))
    return folder


def test_numpy_and_onnxruntime_alone_classify_as_predict_does(folder, tmp_path):
    """Images of several sizes, in colour and grey, which both have to bring to 8x8 pixels in colour."""
    rng, images = np.random.default_rng(0), []
    for index, shape in enumerate([(8, 8, 3), (13, 8, 3), (40, 61, 3), (9, 9), (5, 7, 3)] * 2):
        pixels = np.kron(rng.integers(0, 256, shape), np.ones((2, 2) + (1,) * (len(shape) - 2))).astype(np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{index}.png")
        images.append(tmp_path / f"{index}.png")
    for name in ("x.onnx", "x.int8.onnx"):
        file = export_model(folder, tmp_path / name, data="digits" if "int8" in name else None)
        command = [sys.executable, "-I", SCRIPT, file, *images]
        done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        classes, probabilities = json.loads(done.stdout)
        vocab, expected = predict_files(file, images)
        assert classes == vocab
        np.testing.assert_allclose(probabilities, expected, atol=1e-4)
        if name == "x.onnx":
            np.testing.assert_allclose(probabilities, predict_files(folder, images)[1], atol=1e-4)


def test_the_script_refuses_what_a_device_need_not_have(tmp_path):
    code = f"import runpy, sys; runpy.run_path({str(SCRIPT)!r}); import torch"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert "ModuleNotFoundError: torch is not for this machine" in done.stderr


def an_onnx(shape, kind=TensorProto.UINT8, classes=None, inputs=1):
    """An ONNX file of another program: the mean of its images."""
    x = [helper.make_tensor_value_info(f"x{i}", kind, shape) for i in range(inputs)]
    nodes = [
        helper.make_node("Cast", ["x0"], ["f"], to=TensorProto.FLOAT),
        helper.make_node("ReduceMean", ["f"], ["y"], keepdims=0),
    ]
    graph = helper.make_graph(nodes, "", x, [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)])
    model.ir_version = 10
    if classes is not None:
        helper.set_model_props(model, {"classes": classes})
    return model.SerializeToString()


def a_pt2(file, module, *args):
    torch.export.save(torch.export.export(module, args), file)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("empty.onnx", "empty.onnx cannot be run: "),
        ("text.onnx", "text.onnx cannot be run: "),
        ("other.onnx", "other.onnx does not name its classes; it was not written by dms-fastai export"),
        ("size.onnx", "size.onnx does not take images of one size; it was not written by dms-fastai export"),
        ("flat.onnx", "flat.onnx does not take images of one size; it was not written by dms-fastai export"),
        ("float.onnx", "float.onnx cannot be run: "),
        ("two.onnx", "two.onnx cannot be run: "),
        ("names.onnx", "names.onnx cannot be run: "),
        ("mean.onnx", "mean.onnx does not give a probability for each of its 2 classes"),
        ("text.pt2", "text.pt2 cannot be run: "),
        ("state.pt2", "state.pt2 cannot be run: "),
        ("other.pt2", "other.pt2 does not name its classes; it was not written by dms-fastai export"),
        ("two.pt2", "two.pt2 does not name its classes; it was not written by dms-fastai export"),
        ("folder.onnx", "no such file: folder.onnx"),
        ("folder.pt2", "no such file: folder.pt2"),
    ],
)
def test_damaged_and_foreign_files_are_said_in_a_line(dms, tmp_path, name, said):  # noqa: F811
    file, images = tmp_path / name, ["batch", 3, 8, 8]
    contents = {
        "empty.onnx": b"",
        "text.onnx": b"no model",
        "text.pt2": b"no model",
        "other.onnx": an_onnx(images),
        "size.onnx": an_onnx(["batch", 3, "height", "width"], classes='["a", "b"]'),
        "flat.onnx": an_onnx(["batch", 192], classes='["a", "b"]'),
        "float.onnx": an_onnx(images, TensorProto.FLOAT, '["a", "b"]'),
        "two.onnx": an_onnx(images, classes='["a", "b"]', inputs=2),
        "names.onnx": an_onnx(images, classes="a, b"),
        "mean.onnx": an_onnx(images, classes='["a", "b"]'),
    }
    if name in contents:
        file.write_bytes(contents[name])
    elif name.startswith("folder"):
        file.mkdir()
    elif name == "state.pt2":
        torch.save({"weight": torch.ones(2)}, file)
    elif name == "other.pt2":
        a_pt2(file, nn.Flatten(), torch.ones(1, 3, 8, 8))
    else:
        a_pt2(file, nn.Bilinear(2, 2, 2), torch.ones(1, 2), torch.ones(1, 2))
    Image.new("RGB", (8, 8)).save(tmp_path / "0.png")
    for words in (("bench", name), ("predict", name, "0.png"), ("evaluate", name, "--data", "digits")):
        code, _, err = dms(*words, "--trust-pickle")
        assert (code, err.count("\n")) == (2, 1), err
        assert said in err
    code, _, err = dms("export", name, "new.onnx", "--trust-pickle")
    assert (code, err.count("\n")) == (2, 1), err
    assert not (tmp_path / "new.onnx").exists()


class Untraceable(nn.Module):
    """A network whose path depends on the values of its images."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(192, 10))

    def forward(self, x):
        return self.body(x) if x.mean() > 0 else self.body(-x)


@pytest.mark.parametrize("ending", [".onnx", ".int8.onnx", ".pt2"])
def test_an_untraceable_network_is_said_in_a_line(teacher, tmp_path, ending):
    learn = copy(teacher)
    learn.model = Untraceable()
    with pytest.raises(UserError, match=f"cannot be written as {re.escape(ending)}: ") as raised:
        export_model(learn, tmp_path / f"x{ending}")
    assert "\n" not in raised.value.message
    assert not list(tmp_path.iterdir())
