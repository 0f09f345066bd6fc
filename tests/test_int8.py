"""Files in int8: what is computed in integers, what stays in float, what is refused, and how files are compared."""

import json
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper
from PIL import Image
from torch import nn

from dms_fastai import UserError, bench, dms_learner, load_data
from dms_fastai.bench import _told_apart
from dms_fastai.data import Sets
from dms_fastai.evaluate import evaluate_model, split_images
from dms_fastai.export import calibrate, export_model, export_run, formats, open_model, predict_files
from dms_fastai.export.calibrate import Calibration, sets_of
from dms_fastai.export.classifier import traced
from dms_fastai.export.formats import FORMATS, Exported, open_exported
from dms_fastai.export.int8 import float_nodes, name_global_pools
from dms_fastai.export.measure import Answers, milliseconds
from dms_fastai.models.card import ModelCard
from dms_fastai.run_folder import RunFolder
from tests.test_runs import dms  # noqa: F401  (a fixture)

HERE = [ending for ending, written in FORMATS.items() if all(map(find_spec, written.packages))]


@pytest.fixture(scope="module")
def files(teacher, tmp_path_factory):
    """A trained network in every format that can be written here, by ending, and under "run" its folder."""
    folder = tmp_path_factory.mktemp("exported")
    export_run(teacher, RunFolder(folder))
    return {"run": folder} | {ending: export_model(teacher, folder / f"digits{ending}") for ending in HERE}


@pytest.fixture(scope="module")
def valid():
    """The validation images: uint8, shape (N, 3, 8, 8), and their labels."""
    images = load_data("digits").valid_ds
    return images.images.numpy(), images.labels.numpy()


def run_onnx(file, images):
    return onnxruntime.InferenceSession(file).run(["probabilities"], {"pixels": images})[0]


@pytest.mark.parametrize(("ending", "off"), [(".onnx", 1e-4), (".pt2", 1e-4), (".int8.onnx", 0.2)])
def test_every_format_gives_the_answers_of_predict_in_its_own_runtime(files, valid, tmp_path, ending, off):
    images = valid[0][::40]
    paths = [tmp_path / f"{index}.png" for index in range(len(images))]
    for path, image in zip(paths, images, strict=True):
        Image.fromarray(image.transpose(1, 2, 0)).save(path)
    vocab, expected = predict_files(files["run"], paths)
    opened = open_exported(files[ending], trust=True)
    assert (opened.vocab, opened.shape) == (vocab, (3, 8, 8))
    np.testing.assert_allclose(opened.classify(images), expected, atol=off)


def test_all_convolutions_but_those_of_squeeze_and_excitation_compute_in_integers(teacher, files, tmp_path):
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED  # on any processor
    options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    onnxruntime.InferenceSession(files[".int8.onnx"], options, providers=["CPUExecutionProvider"])
    nodes = onnx.load(tmp_path / "optimised.onnx").graph.node
    in_float = [node for node in nodes if "Conv" in node.op_type and node.op_type != "QLinearConv"]
    assert sorted(node.input[1] for node in in_float) == ["se.fc1.weight", "se.fc2.weight"]
    convolutions = sum(isinstance(module, nn.Conv2d) for module in teacher.model.modules())
    assert sum(node.op_type == "QLinearConv" for node in nodes) == convolutions - 2
    assert sum(node.op_type == "QLinearGlobalAveragePool" for node in nodes) == 2
    assert sum(node.op_type == "Softmax" for node in nodes) == 1


def test_int8_agrees_with_float_and_gives_probabilities(files, valid):
    images, labels = valid
    before, after = (run_onnx(files[ending], images) for ending in (".onnx", ".int8.onnx"))
    assert np.abs(after.sum(1) - 1).max() < 1e-3
    assert (before.argmax(1) == after.argmax(1)).mean() > 0.98
    assert (after.argmax(1) == labels).mean() > (before.argmax(1) == labels).mean() - 0.005
    assert files[".int8.onnx"].stat().st_size < 0.5 * files[".onnx"].stat().st_size


def test_two_products_fit_into_16_bits_as_processors_without_vnni_add_them(files):
    """These multiply a byte of an activation by a weight, twice, and cut the sum at 32,767."""
    graph = onnx.load(files[".int8.onnx"]).graph
    weights = [onnx.numpy_helper.to_array(each) for each in graph.initializer if each.data_type == TensorProto.INT8]
    matrices = [each.astype(int) for each in weights if each.ndim > 1]
    assert max(2 * 255 * abs(each).max() for each in matrices) < 2**15


def test_int8_takes_and_says_what_float_does(files):
    before, after = (onnxruntime.InferenceSession(files[ending]) for ending in (".onnx", ".int8.onnx"))
    for side in ("get_inputs", "get_outputs"):
        [ours], [theirs] = getattr(before, side)(), getattr(after, side)()
        assert (ours.name, ours.type, ours.shape) == (theirs.name, theirs.type, theirs.shape)
    ours, theirs = (session.get_modelmeta().custom_metadata_map for session in (before, after))
    assert json.loads(theirs.pop("calibration")) == {"data": "digits", "images": 200, "seed": 0}
    assert ours == theirs
    assert json.loads(ours["classes"]) == [str(digit) for digit in range(10)]


def test_the_images_to_calibrate_with_are_drawn_alike_from_all_classes(teacher):
    sets = sets_of(teacher, open_model(teacher)[1], None, False)
    before = torch.get_rng_state()
    chosen = Calibration(sets, 100).chosen
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(1)
    assert torch.equal(chosen, Calibration(sets, 100).chosen)
    train = {image.numpy().tobytes(): int(label) for image, label in zip(*sets.train[:], strict=True)}
    assert {train[image.numpy().tobytes()] for image in chosen} == set(range(10))


def node(op, inputs, output):
    return helper.make_node(op, inputs.split(), [output], name=f"{op}-{output}")


def in_float(nodes):
    """The outputs, one letter each, of those nodes of a classifier that stay in float."""
    pixels = helper.make_tensor_value_info("pixels", TensorProto.UINT8, ["batch", 3, 8, 8])
    last = helper.make_tensor_value_info(nodes[-1].output[0], TensorProto.FLOAT, None)
    return "".join(name[-1] for name in float_nodes(helper.make_graph(nodes, "", [pixels], [last])))


def test_what_stays_in_float_is_told_by_its_place():
    nodes = [
        node("Cast", "pixels", "a"),
        node("Mul", "a scale", "b"),  # the normalisation
        node("Conv", "b w1", "c"),
        node("Sigmoid", "c", "d"),
        node("Mul", "c d", "e"),  # an activation, and no gate
        node("GlobalAveragePool", "e", "f"),
        node("Conv", "f w2", "g"),
        node("HardSigmoid", "g", "h"),
        node("Mul", "h e", "i"),  # squeeze-and-excitation, factors the other way round
        node("Conv", "i w3", "j"),
        node("Relu", "j", "k"),
        node("Add", "k i", "l"),
        node("GlobalAveragePool", "l", "m"),
        node("Flatten", "m", "n"),
        node("Gemm", "n w4", "o"),
        node("Softmax", "o", "p"),
    ]
    assert in_float(nodes) == "abghp"


@pytest.mark.parametrize(
    ("shape", "axes", "keepdims", "pools"),
    [
        ([None, 3, 4, 4], [2, 3], 1, True),
        ([None, 3, 4, 4], [-1, -2], 1, True),
        ([None, 3, 4, 4], [2, 3], 0, False),  # without its two axes of one
        ([None, 3, 4, 4], [1, 2], 1, False),
        ([None, 3, 4, 4], [3], 1, False),
        ([None, 3, 2, 2, 4], [2, 3], 1, False),
    ],
)
def test_means_over_height_and_width_are_the_pools_that_they_are(shape, axes, keepdims, pools):
    before = [node("Relu", "pixels", "x"), node("ReduceMean", "x axes", "y"), node("Relu", "y", "z")]
    before[1].attribute.append(helper.make_attribute("keepdims", keepdims))
    pixels, z = (helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name in ("pixels", "z"))
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)
    constants = [helper.make_tensor("axes", TensorProto.INT64, [len(axes)], axes)]
    graph = helper.make_graph(before, "", [pixels], [z], constants, value_info=[x])
    images = np.random.default_rng(0).normal(size=[2, *shape[1:]]).astype(np.float32)
    name_global_pools(graph)
    graph.output[0].type.tensor_type.ClearField("shape")
    [answer] = run_graph(graph, images)
    np.testing.assert_allclose(answer, images.clip(0).mean(tuple(axes), keepdims=bool(keepdims)), rtol=1e-5)
    assert [each.op_type for each in graph.node] == ["Relu", "GlobalAveragePool" if pools else "ReduceMean", "Relu"]
    assert [each.name for each in graph.initializer] == ([] if pools else ["axes"])


def run_graph(graph, pixels):
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    return onnxruntime.InferenceSession(model.SerializeToString()).run(None, {"pixels": pixels})


def test_squeeze_and_excitation_that_asks_for_the_images_shape_is_no_less_one():
    nodes = [
        node("Conv", "pixels w1", "a"),
        node("GlobalAveragePool", "a", "b"),
        node("Shape", "pixels", "c"),
        node("Reshape", "b c", "d"),
        node("Gemm", "d w2", "e"),
        node("Expand", "e c", "f"),
        node("Mul", "a f", "g"),
        node("Conv", "g w3", "h"),
    ]
    assert set("def") <= set(in_float(nodes))


class Scaled(nn.Module):
    """A network with a parameter that is called as the normalisation's."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor([0.5, 1.0, 2.0]).view(1, 3, 1, 1))
        self.conv, self.head = nn.Conv2d(3, 16, 3, 2), nn.Linear(16, 4)

    def forward(self, x):
        return self.head(self.conv(x * self.scale).relu().mean((2, 3)))


def test_a_network_may_call_its_weights_as_the_normalisation_does():
    torch.manual_seed(0)
    own = ModelCard("net", list("abcd"), (0.5, 0.4, 0.3), (0.25, 0.2, 0.3), (3, 16, 16), {})
    images = np.random.default_rng(0).integers(0, 256, (64, 3, 16, 16), dtype=np.uint8)
    network = Scaled().eval()
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (own.mean, own.std))
    expected = network((torch.from_numpy(images) / 255 - mean) / std).softmax(1).detach()
    for content in FORMATS[".int8.onnx"].quantize(*traced(network, own), images):
        [answer] = onnxruntime.InferenceSession(content).run(None, {"pixels": images})
        np.testing.assert_allclose(answer, expected, atol=0.02)


def test_what_loses_too_much_is_refused(dms, files, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setattr(Calibration, "chosen", torch.zeros(4, 3, 8, 8, dtype=torch.uint8))  # which show no range
    code, out, err = dms("export", files["run"], "digits.int8.onnx", "--data", "digits")
    assert code == 2
    assert err.startswith("dms-fastai: error: digits.int8.onnx is not written: in int8, accuracy falls from 9")
    assert err.count("\n") == 1
    assert [line.split()[0] for line in out.splitlines()[3:5]] == ["float", "int8"]  # what it loses is shown
    assert not list(tmp_path.iterdir())
    code, out, err = dms("export", files["run"], "digits.int8.onnx", "--data", "digits", "--tolerance", 100)
    assert (code, err) == (0, "")
    assert out.endswith(f"digits.int8.onnx: {(tmp_path / 'digits.int8.onnx').stat().st_size / 1e3:.1f} kB\n")


def test_what_loses_as_much_as_it_may_is_written(dls, monkeypatch):
    """50 of 10,000 images are half a point, whatever the difference of two floats is."""

    def quantized(right):
        rows = [SimpleNamespace(answers=SimpleNamespace(accuracy=each / 10_000)) for each in (8_579, right)]
        monkeypatch.setattr(calibrate, "_compare", lambda *_: rows)
        written = SimpleNamespace(quantize=lambda *_: (b"large", b"small"))
        own = ModelCard("net", [str(digit) for digit in range(10)], (0.5,) * 3, (0.25,) * 3, (3, 8, 8))
        return Calibration(Sets(dls.train_ds, dls.valid_ds)).quantize(None, {}, written, own, Path("x.int8.onnx"))

    assert quantized(8_529) == b"small"
    with pytest.raises(UserError, match=r"from 85.79 to 85.28 %.*--tolerance 0.51"):
        quantized(8_528)


@pytest.mark.parametrize("ending", HERE)
def test_predict_and_evaluate_take_an_exported_file(files, valid, tmp_path, ending):
    Image.fromarray(valid[0][7].transpose(1, 2, 0)).save(tmp_path / "7.png")
    vocab, [found] = predict_files(files[ending], [tmp_path / "7.png"], trust=True)
    assert vocab[found.argmax()] == vocab[valid[1][7]]
    np.testing.assert_allclose(found, open_exported(files[ending], True).classify(valid[0][7:8])[0], atol=1e-6)
    before, after = (evaluate_model(source, "digits", trust=True) for source in (files["run"], files[ending]))
    assert after.accuracy == pytest.approx(before.accuracy, abs=0.005)
    assert after.loss == pytest.approx(before.loss, abs=0.005)
    with pytest.raises(UserError, match="has been exported already"):
        export_model(files[ending], tmp_path / "again.onnx")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("dmsresnet x.int8.onnx", "no images to calibrate with: dmsresnet does not say which; give --data"),
        ("dmsresnet x.int8.onnx --data digit", "unknown data set"),
        ("dmsresnet x.onnx --data digits", "--data is for int8, and x.onnx is not; call it x.int8.onnx"),
        ("dmsresnet x.onnx --calibrate 50", "--calibrate is for int8, and x.onnx is not; call it x.int8.onnx"),
        ("dmsresnet x.pte --tolerance 0", "--tolerance is for int8, and x.pte is not; call it x.int8.pte, or leave"),
        ("dmsresnet x.int8.tflite", "the formats are .onnx, .int8.onnx, .pt2, .pte or .int8.pte"),
    ],
)
def test_what_int8_lacks_is_said_in_a_line(dms, words, said):  # noqa: F811
    code, _, err = dms("export", *words.split())
    assert (code, err.count("\n")) == (2, 1)
    assert said in err


@pytest.mark.parametrize(
    ("name", "given", "said"),
    [
        ("x.onnx", {"data": "digits"}, "data is for int8, and .*x.onnx is not; call it x.int8.onnx, or leave data out"),
        ("x.onnx", {"tolerance": 0.0}, "tolerance is for int8"),
        ("x.int8.onnx", {"calibrate": 0}, "calibrate is 0; it must be at least 1"),
        ("x.int8.onnx", {"calibrate": -1}, "calibrate is -1; it must be at least 1"),
        ("x.int8.onnx", {"tolerance": float("nan")}, "tolerance is nan; it must be a finite number"),
    ],
)
def test_what_int8_is_not_made_with_is_refused(dls, tmp_path, name, given, said):
    with pytest.raises(UserError, match=said):
        export_model(dms_learner(dls, "se", arch="test_dmsresnet"), tmp_path / name, **given)
    assert not list(tmp_path.iterdir())


def test_a_missing_runtime_is_named_with_the_extra(teacher, files, tmp_path, monkeypatch):
    monkeypatch.setattr(formats, "find_spec", lambda name: None if name == "onnxruntime" else name)
    for act in (lambda: export_model(teacher, tmp_path / "x.int8.onnx"), lambda: open_exported(files[".onnx"])):
        with pytest.raises(UserError, match=r"pip install .*onnxruntime, or 'dms-fastai\[edge\]'"):
            act()
    assert not list(tmp_path.iterdir())


# Files beside one another


def foreign(file):
    pixels, out = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 3, 8, 8]) for name in "xy")
    onnx.save(helper.make_model(helper.make_graph([node("Relu", "x", "y")], "", [pixels], [out])), file)


def cut(file, whole):
    file.write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("nowhere.onnx", "no such file: nowhere.onnx"),
        ("x.txt", "x.txt cannot be run; the formats are"),
        ("empty.onnx", "empty.onnx cannot be run"),
        ("cut.onnx", "cut.onnx cannot be run"),
        ("cut.int8.onnx", "cut.int8.onnx cannot be run"),
        ("cut.pt2", "cut.pt2 cannot be run"),
        ("empty.pt2", "loading empty.pt2 may run code in it"),
        ("foreign.onnx", "foreign.onnx does not name its classes; it was not written by dms-fastai export"),
    ],
)
def test_what_cannot_be_run_is_said_in_a_line(dms, files, tmp_path, name, said):  # noqa: F811
    file = tmp_path / name
    if name.startswith("cut"):
        cut(file, files[name.removeprefix("cut")])
    elif name.startswith("foreign"):
        foreign(file)
    elif not name.startswith("nowhere"):
        file.touch()
    code, _, err = dms("bench", name, *(["--trust-pickle"] if name == "cut.pt2" else []))
    assert (code, err.count("\n")) == (2, 1), err
    assert said in err


def test_bench_puts_files_beside_one_another(dms, files, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setattr("dms_fastai.export.measure.SECONDS", 0.0)
    monkeypatch.setenv("COLUMNS", "200")
    given = [files[ending] for ending in HERE]
    code, out, err = dms(
        "bench", *given, "--data", "digits", "--arch", "test_dmsresnet_plain", "--png", "new/plot.png", "--trust-pickle"
    )
    assert (code, err) == (0, "")
    rows = [line.split() for line in out.splitlines()[2 : 3 + len(HERE)]]
    assert [row[0] for row in rows] == [*(file.name for file in given), "test_dmsresnet_plain"]
    assert {row[2] for row in rows[:-1]} == {"0.7"}  # a sixteenth of the 11.1 M at 32 pixels
    assert all(float(row[3]) > 90 for row in rows[:-1])
    assert rows[-1][3] == "untrained"
    with Image.open(tmp_path / "new" / "plot.png") as image:
        assert image.width > 500
    code, _, err = dms("bench", *given, "--png", "plot.png")
    assert (code, err.count("\n")) == (2, 1)


def test_files_of_one_name_are_told_apart_by_their_folders():
    files = [Path(file) for file in ("a/seed0/kd.onnx", "a/seed1/kd.onnx", "/b/seed1/kd.onnx", "x.onnx", "a/y/x.onnx")]
    assert _told_apart(files) == ["seed0/kd.onnx", "a/seed1/kd.onnx", "b/seed1/kd.onnx", "x.onnx", "y/x.onnx"]
    assert _told_apart([*files[:1], *files[:1]]) == ["kd.onnx"] * 2  # the same file


def test_images_are_read_once_for_files_that_see_them_alike(monkeypatch):
    read = []
    monkeypatch.setattr(bench, "split_images", lambda *args: read.append(args[3].middle) or split_images(*args))
    zero = Exported(lambda x: np.eye(10)[np.zeros(len(x), int)], (3, 8, 8), {"classes": json.dumps(list("0123456789"))})
    cards = [zero.card("x.onnx"), zero.card("y.onnx"), replace(zero.card("z.onnx"), middle=0.5)]
    share = (load_data("digits").valid_ds.labels == 0).double().mean().item()
    assert bench._accuracies([zero] * 3, cards, "digits") == pytest.approx([share] * 3)
    assert read == [1.0, 0.5]


def test_an_untrained_network_is_made_for_the_images_whatever_its_name_is_tagged(monkeypatch):
    """timm's test_vit takes images of 160 pixels, and has no weights of this tag."""
    made = []
    monkeypatch.setattr(bench, "content_of", lambda model, *_: made.append(model) or b"")
    bench._untrained("test_vit.nosuch", Exported(None, (3, 64, 64), {"classes": '["a", "b"]'}))
    assert made[0](torch.zeros(1, 3, 64, 64)).shape == (1, 2)


def test_contenders_take_turns():
    called = []
    a, b = (Exported(lambda x, n=n: called.append((n, len(x))), (3, 4, 4), {}) for n in "ab")
    times = milliseconds([a, b], 2)
    assert called == [("a", 2), ("b", 2)] * (len(called) // 2)
    assert [len(each) for each in times] == [len(called) // 2 - 1] * 2


def test_answers_by_hand():
    found = Answers(np.array([[0.5, 0.25], [0.125, 0.875], [1.0, 0.0]]), np.array([1, 1, 1]))
    assert found.accuracy == pytest.approx(1 / 3)
    assert found.nll == pytest.approx((np.log(4) + np.log(8 / 7) - np.log(1e-12)) / 3)
    assert found.sum_error == 0.25
    assert found.agreement(Answers(np.array([[0, 1], [0, 1], [1, 0]]), found.labels)) == pytest.approx(2 / 3)
