"""What people bring in Python: it is read right, or refused in a line before anything is trained or written."""

import errno
import json
import pickletools
import zipfile
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import timm
import torch
from fastai.callback.tracker import EarlyStoppingCallback, ReduceLROnPlateau, SaveModelCallback
from fastai.data.block import CategoryBlock, DataBlock, MultiCategoryBlock, RegressionBlock
from fastai.data.core import DataLoaders
from fastai.data.transforms import Normalize, RandomSplitter, get_image_files, parent_label
from fastai.learner import Learner, load_learner
from fastai.losses import CrossEntropyLossFlat
from fastai.vision.augment import Brightness, CropPad, RandomResizedCrop, Resize, ResizeMethod
from fastai.vision.core import PILImageBW, TensorImage
from fastai.vision.data import ImageBlock, ImageDataLoaders
from fasttransform import Transform
from PIL import Image
from torch import nn

from dms_fastai import DMSLoss, Teacher, UserError, dms_learner, ensemble, load_data, load_teacher
from dms_fastai.data.loader import statistics
from dms_fastai.errors import Notice
from dms_fastai.export import export_model, open_model, predict_files
from dms_fastai.export.formats import open_exported
from dms_fastai.models.card import ModelCard, read_card
from dms_fastai.models.weights import load_weights, save_weights
from dms_fastai.runs import guards
from tests.conftest import quiet
from tests.test_data import make_folder
from tests.test_runs import dms  # noqa: F401  (a fixture)


@pytest.fixture(scope="module")
def colours(tmp_path_factory):
    """A folder of 12 images of each of two classes, 30x40 pixels."""
    root = tmp_path_factory.mktemp("colours")
    for label, level in {"dark": 30, "light": 220}.items():
        (root / label).mkdir()
        for index in range(12):
            Image.new("RGB", (40, 30), (level, level, level - index)).save(root / label / f"{index}.png")
    return root


def block(root, *blocks, get_y=parent_label, item_tfms=None, batch_tfms=None, bs=4):
    made = DataBlock(
        blocks, get_items=get_image_files, get_y=get_y, splitter=RandomSplitter(0.25, seed=0), item_tfms=item_tfms,
        batch_tfms=batch_tfms,
    )  # fmt: skip
    return made.dataloaders(root, bs=bs, num_workers=0, device="cpu")


def tiny(in_chans=3, classes=2):
    return timm.create_model("test_dmsresnet", num_classes=classes, in_chans=in_chans)


def several(file):
    return [parent_label(file)]


def number(file):
    return float(len(file.name))


def refused(call, *words):
    with pytest.raises(UserError) as error:
        call()
    assert "\n" not in error.value.message
    for word in words:
        assert word in error.value.message


# Targets


def test_other_targets_than_one_class_are_refused(colours):
    size = Resize(16)
    labels = block(colours, ImageBlock, MultiCategoryBlock, get_y=several, item_tfms=size)
    refused(lambda: dms_learner(labels, "se", arch="test_dmsresnet"), "one label an image", "float32 of shape (1, 2)")
    value = block(colours, ImageBlock, RegressionBlock, get_y=number, item_tfms=size)
    refused(lambda: dms_learner(value, "se", arch="test_dmsresnet"), "one label an image")
    pairs = [(torch.rand(3, 16, 16), torch.eye(2)[i % 2]) for i in range(8)]
    one_hot = DataLoaders.from_dsets(pairs, pairs, bs=4, num_workers=0, device="cpu")
    refused(lambda: dms_learner(one_hot, "se", arch="test_dmsresnet"), "one label an image")
    for no_loaders in ("digits", pairs, None):
        refused(lambda data=no_loaders: dms_learner(data, "se"), type(no_loaders).__name__, "DataLoaders")


# Batches


class Pooled(nn.Module):
    """A batch norm over one value of each channel."""

    def __init__(self):
        super().__init__()
        self.norm, self.fc = nn.BatchNorm1d(3), nn.Linear(3, 2)

    def forward(self, x):
        return self.fc(self.norm(x.mean((2, 3))))


def test_a_batch_of_one_image_is_refused_where_a_batch_norm_needs_more(colours):
    def learner(bs, drop_last):
        dls = block(colours, ImageBlock, CategoryBlock, item_tfms=Resize(16), bs=bs)
        dls.train.drop_last = drop_last
        learn = quiet(dms_learner(dls, "se", arch="test_dmsresnet"))
        learn.model = Pooled()
        return learn

    refused(lambda: learner(1, True).fit(1), "batch norm")
    refused(lambda: learner(17, False).fit(1), "18 images in batches of 17", "batch norm")
    learn = learner(17, True)
    before = learn.model.norm.running_mean.clone()
    random = torch.get_rng_state()
    learn.fit(0)
    assert torch.equal(torch.get_rng_state(), random)
    assert torch.equal(learn.model.norm.running_mean, before)
    learn.fit(1)
    refused(lambda: learner(99, True).fit(1), "make no batch of 99")


# Class weights of any loss


@pytest.mark.parametrize("loss", [nn.CrossEntropyLoss, CrossEntropyLossFlat, DMSLoss])
def test_class_weights_in_float64_train_and_those_of_other_classes_are_refused(dls, loss):
    learn = quiet(dms_learner(dls, "se"))
    learn.loss_func = loss(weight=torch.ones(10, dtype=torch.float64))
    learn.fit(1)
    learn.loss_func = loss(weight=torch.ones(7, dtype=torch.float64))
    refused(lambda: learn.fit(1), "7", "10")


# Teachers


class Gives(nn.Module):
    def __init__(self, what, classes=10):
        super().__init__()
        self.what, self.fc = what, nn.Linear(3, classes)

    def forward(self, x):
        return self.what(self.fc(x.mean((2, 3))))


class Flat(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(3 * 32 * 32, 10)

    def forward(self, x):
        return self.fc(x.flatten(1))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (
            lambda: Teacher(timm.create_model("vit_tiny_patch16_224", num_classes=10)),
            ("VisionTransformer", "8x8", "224", "distill.size"),
        ),
        (Flat, ("Flat", "8x8")),
        (lambda: tiny(1, 10), ("DMSResNet", "8x8", "channels")),
        (lambda: Gives(lambda z: (z, z)), ("Gives", "tuple")),
        (lambda: Gives(lambda z: {"logits": z}), ("Gives", "dict")),
        (lambda: Gives(lambda z: z, 7), ("7", "10")),
        (lambda: Gives(lambda z: z[:, :, None]), ("(2, 10, 1)",)),
        (lambda: [Gives(lambda z: z), Flat()], ("Flat", "8x8")),
    ],
)
def test_a_teacher_that_does_not_fit_is_refused_when_the_learner_is_made(dls, make, words):
    refused(lambda: dms_learner(dls, "kd", teacher=make()), *words)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_of_other_precision_teach_in_float32(dls, dtype):
    model = tiny(3, 10).eval()
    half = timm.create_model("test_dmsresnet").eval()
    half.load_state_dict(model.state_dict())
    half.to(dtype)
    x = torch.randn(4, 3, 8, 8)
    taught = load_teacher(half)
    assert {p.dtype for p in half.parameters()} == {dtype}
    torch.testing.assert_close(taught.model(x), model(x), atol=0.1, rtol=0.1)
    quiet(dms_learner(dls, "kd", teacher=half)).fit(1)


@pytest.mark.parametrize("name", ["fc.weight", "bn1.running_var"])
def test_weights_that_are_no_numbers_are_neither_taught_nor_exported(dls, tmp_path, name):
    broken = tiny(3, 10)
    broken.state_dict()[name].view(-1)[0] = float("inf")
    refused(lambda: load_teacher(broken), "NaN or infinite")
    refused(lambda: ensemble([tiny(3, 10), broken]), "NaN or infinite")
    refused(lambda: dms_learner(dls, "kd", teacher=Teacher(broken)), "NaN or infinite")
    learn = dms_learner(dls, "se", settings={"ema.decay": 0.9})
    learn.model.load_state_dict(broken.state_dict())
    refused(lambda: export_model(learn, tmp_path / "x.pt2"), "NaN or infinite")
    save_weights(
        broken,
        ModelCard("test_dmsresnet", list("0123456789"), (0.5,) * 3, (0.5,) * 3, (3, 8, 8)),
        tmp_path / "x.safetensors",
    )
    refused(lambda: export_model(tmp_path / "x.safetensors", tmp_path / "x.pt2"), "x.safetensors", "NaN or infinite")
    refused(lambda: predict_files(tmp_path / "x.safetensors", []), "NaN or infinite")
    assert [f.name for f in tmp_path.iterdir()] == ["x.safetensors"]


# What callbacks monitor


def test_callbacks_monitor_by_fastais_names(dls, tmp_path):
    def fit(*cbs):
        learn = quiet(dms_learner(dls, "se", path=tmp_path))
        learn.fit_recipe(2, cbs=list(cbs))
        return learn

    best = SaveModelCallback(monitor="accuracy")
    learn = fit(best, EarlyStoppingCallback(monitor="train_loss", patience=9), ReduceLROnPlateau(monitor="valid_loss"))
    column = list(learn.recorder.metric_names[1:]).index("valid_accuracy")
    assert best.best == max(row[column] for row in learn.recorder.values)
    fit(EarlyStoppingCallback(monitor="valid_accuracy", patience=9))
    refused(lambda: fit(SaveModelCallback(monitor="f1")), "'f1'", "train_loss", "valid_accuracy")


# Sizes and channels


def onnx_of(source, file, images):
    session = onnxruntime.InferenceSession(export_model(source, file, trust=True))
    return session.run(["probabilities"], {"pixels": images})[0], session.get_inputs()[0].shape


def test_images_that_are_not_square(colours, tmp_path):
    wide = ImageDataLoaders.from_folder(
        colours, valid_pct=0.25, seed=0, bs=4, num_workers=0, device="cpu", item_tfms=Resize((24, 48)),
        batch_tfms=Normalize.from_stats((0.5, 0.4, 0.3), (0.25, 0.5, 0.2), cuda=False),
    )  # fmt: skip
    learn = quiet(dms_learner(wide, "se", arch="test_dmsresnet", path=tmp_path))
    learn.fit_recipe(1)
    assert learn.card.shape == (3, 24, 48)
    pixels = np.random.default_rng(0).integers(0, 256, (3, 3, 24, 48), dtype=np.uint8)
    x = (pixels / 255 - np.array([0.5, 0.4, 0.3]).reshape(1, 3, 1, 1)) / np.array([0.25, 0.5, 0.2]).reshape(1, 3, 1, 1)
    with torch.no_grad():
        expected = learn.model.eval()(torch.tensor(x, dtype=torch.float32)).softmax(1)
    learn.export("wide.pkl")
    save_weights(learn.model, learn.card, tmp_path / "wide.safetensors")
    found, shape = onnx_of(tmp_path / "wide.pkl", tmp_path / "x.onnx", pixels)
    assert shape == ["batch", 3, 24, 48]
    np.testing.assert_allclose(found, expected, atol=1e-5)
    files = [tmp_path / f"{index}.png" for index in range(3)]
    for file, image in zip(files, pixels, strict=True):
        Image.fromarray(image.transpose(1, 2, 0)).save(file)
    np.testing.assert_allclose(predict_files(tmp_path / "wide.safetensors", files)[1], expected, atol=1e-5)


def test_grey_images(colours, tmp_path):
    dls = block(colours, ImageBlock(PILImageBW), CategoryBlock, item_tfms=Resize(16))
    learn = quiet(dms_learner(dls, "se", arch="test_dmsresnet", path=tmp_path))
    learn.fit_recipe(1)
    assert (learn.card.shape, learn.card.mean) == ((1, 16, 16), (0.0,))
    student = quiet(dms_learner(dls, "kd", teacher=learn, arch="test_dmsresnet"))
    student.fit(1)
    save_weights(learn.model, learn.card, tmp_path / "grey.safetensors")
    assert load_weights(tmp_path / "grey.safetensors")[0].conv1.in_channels == 1
    pixels = np.random.default_rng(0).integers(0, 256, (2, 1, 16, 16), dtype=np.uint8)
    with torch.no_grad():
        expected = learn.model.cpu().eval()(torch.tensor(pixels / 255, dtype=torch.float32)).softmax(1)
    found, shape = onnx_of(learn, tmp_path / "grey.onnx", pixels)
    assert shape == ["batch", 1, 16, 16]
    np.testing.assert_allclose(found, expected, atol=1e-5)
    Image.fromarray(pixels[0, 0]).save(tmp_path / "0.png")
    np.testing.assert_allclose(
        predict_files(tmp_path / "grey.safetensors", [tmp_path / "0.png"])[1], expected[:1], atol=1e-5
    )


def test_cards_of_before_have_one_size():
    told = {"arch": "test_dmsresnet", "vocab": ["a", "b"], "mean": [0.5] * 3, "std": [0.2] * 3, "size": 8, "args": {}}
    assert read_card(json.dumps(told)).shape == (3, 8, 8)
    assert read_card(json.dumps(told | {"args": {"in_chans": 1}})).shape == (1, 8, 8)
    del told["size"]
    for shape in ([3, 8], [3, 0, 8], [3, 8, "8"], 8, [True, 8, 8], [3, 8, 10**9]):
        with pytest.raises(ValueError, match="'shape' of its card"):
            read_card(json.dumps(told | {"shape": shape}))


# Learners of stock fastai


def test_a_stock_learner_leaves_with_its_size_and_normalisation(colours, tmp_path):
    normal = Normalize.from_stats((0.485, 0.456, 0.406), (0.229, 0.224, 0.225), cuda=False)
    dls = block(colours, ImageBlock, CategoryBlock, item_tfms=Resize((16, 24)), batch_tfms=normal)
    learn = quiet(Learner(dls, tiny(), CrossEntropyLossFlat(), path=tmp_path))
    learn.fit(1)
    learn.export("stock.pkl")
    pixels = np.random.default_rng(0).integers(0, 256, (3, 3, 16, 24), dtype=np.uint8)
    files = [tmp_path / f"{index}.png" for index in range(3)]
    for file, image in zip(files, pixels, strict=True):
        Image.fromarray(image.transpose(1, 2, 0)).save(file)
    expected, _ = learn.get_preds(dl=dls.test_dl(files))
    for source in (learn, tmp_path / "stock.pkl"):
        found, shape = onnx_of(source, tmp_path / "stock.onnx", pixels)
        assert shape == ["batch", 3, 16, 24]
        np.testing.assert_allclose(found, expected, atol=1e-4)
    vocab, probabilities = predict_files(tmp_path / "stock.pkl", files, trust=True)
    assert vocab == ["dark", "light"]
    np.testing.assert_allclose(probabilities, expected, atol=1e-5)


def test_a_stock_learner_with_parts_of_images_is_shown_what_it_has_seen(colours, tmp_path):
    dls = block(colours, ImageBlock, CategoryBlock, item_tfms=RandomResizedCrop(16))
    learn = quiet(Learner(dls, tiny(), CrossEntropyLossFlat(), path=tmp_path))
    files = [tmp_path / f"{index}.png" for index in range(3)]
    smooth = np.random.default_rng(0).integers(0, 256, (3, 4, 6, 3), dtype=np.uint8)
    for file, image in zip(files, smooth, strict=True):
        Image.fromarray(image).resize((96, 96), Image.Resampling.BICUBIC).save(file)
    expected, _ = learn.get_preds(dl=dls.test_dl(files))
    with pytest.warns(Notice, match="squeezes or pads longer images"):
        file = export_model(learn, tmp_path / "x.onnx")
    assert open_exported(file).card("x").middle == pytest.approx(16 / 24)
    np.testing.assert_allclose(predict_files(file, files)[1], expected, atol=0.01)


class Changed(Transform):
    def __init__(self, change):
        super().__init__()
        self.change = change

    def encodes(self, x: TensorImage):
        return self.change(x)


def grey_of(x):
    return x.float().mean(1, keepdim=True).to(x.dtype).expand(-1, 3, -1, -1)


class Darker(Transform):
    def encodes(self, x: TensorImage):
        return x / 2


def test_a_stock_learner_that_cannot_leave_is_said(colours, tmp_path):
    def export(*blocks, **kwargs):
        dls = block(colours, *blocks, **kwargs)
        learn = Learner(dls, tiny(), dls.loss_func, path=tmp_path)
        learn.export("x.pkl")
        for source in (learn, tmp_path / "x.pkl"):
            refused(partial(export_model, source, tmp_path / "x.onnx", trust=True), words)
        assert not (tmp_path / "x.onnx").exists()

    words = "not of one label an image"
    export(ImageBlock, MultiCategoryBlock, get_y=several, item_tfms=Resize(16))
    words = "no vocab"
    export(ImageBlock, RegressionBlock, get_y=number, item_tfms=Resize(16))
    image = next(iter(get_image_files(colours)))
    refused(lambda: predict_files(tmp_path / "x.pkl", [image], trust=True), words)
    words = "more than resize and normalise"
    for changes in (Darker(), Changed(lambda x: x.flip(-1)), Changed(lambda x: x.flip(1)), Changed(grey_of)):
        export(ImageBlock, CategoryBlock, item_tfms=Resize(16), batch_tfms=changes)
    export(ImageBlock, CategoryBlock, item_tfms=CropPad(16))
    dls = block(colours, ImageBlock, CategoryBlock)
    Learner(dls, tiny(), CrossEntropyLossFlat(), path=tmp_path).export("x.pkl")
    refused(lambda: export_model(tmp_path / "x.pkl", tmp_path / "x.onnx", trust=True), "one size")


# Full disks, and what a file keeps of this machine


def full(self, content):
    raise OSError(errno.ENOSPC, "No space left on device", str(self))


@pytest.mark.parametrize("suffix", [".onnx", ".pt2"])
def test_an_export_to_a_full_disk_is_one_line(dms, teacher, tmp_path, monkeypatch, suffix):  # noqa: F811
    save_weights(teacher.model, teacher.card, tmp_path / "model.safetensors")
    monkeypatch.setattr(Path, "write_bytes", full)
    code, _, err = dms("export", "model.safetensors", f"x{suffix}")
    assert code == 2
    assert "No space left on device" in err
    assert err.count("\n") == 1
    assert [f.name for f in tmp_path.iterdir()] == ["model.safetensors"]


def test_a_disk_that_fills_as_the_learner_is_written(dms, tmp_path, monkeypatch):  # noqa: F811
    args = ("run", "se", "--epochs", 1, "--out", "x", "--set", "data.batch_size=256")
    write = Path.write_bytes

    def filling(self, content):
        return (full if "learner" in self.name else write)(self, content)

    with monkeypatch.context() as patch:
        patch.setattr(
            Path, "write_bytes", lambda self, content: (full if "learner" in self.name else write)(self, content)
        )
        code, _, err = dms(*args)
    folder = tmp_path / "x" / "se" / "seed0"
    assert code == 2
    assert "No space left on device" in err
    assert json.loads((folder / "run.json").read_text())["status"] == "interrupted"
    assert not (folder / "learner.pkl").exists()
    assert not list(folder.rglob("*.partial"))
    assert dms(*args)[0] == 0
    assert json.loads((folder / "run.json").read_text())["status"] == "finished"


def test_an_export_that_fails_leaves_the_learner_as_it_was(dls, tmp_path, monkeypatch):
    learn = quiet(dms_learner(dls, "se", path=tmp_path))
    learn.fit(1)
    before = (learn.dls, learn.opt, learn.path, learn.recipe)
    monkeypatch.setattr(torch, "save", lambda *_, **__: full(tmp_path, b""))
    with pytest.raises(OSError, match="No space"):
        learn.export("x.pkl")
    assert all(a is b for a, b in zip(before, (learn.dls, learn.opt, learn.path, learn.recipe), strict=True))
    assert not list(tmp_path.iterdir())


def test_a_learner_keeps_no_folder_of_this_machine(colours, teacher, tmp_path):
    save_weights(teacher.model, teacher.card, tmp_path / "teacher.safetensors")
    stock = ImageDataLoaders.from_folder(
        colours, valid_pct=0.25, seed=0, bs=4, num_workers=0, device="cpu", item_tfms=Resize(16)
    )
    own = load_data(colours, size=16, bs=4, valid=0.25)
    for dls in (stock, own):
        learn = quiet(dms_learner(dls, "se", arch="dmsresnet", path=tmp_path / "secret"))
        learn.model_dir = tmp_path / "secret" / "models"
        learn.recipe = replace(learn.recipe, teacher=str(tmp_path / "teacher.safetensors"))
        learn.path.mkdir(exist_ok=True)
        learn.export("x.pkl")
        content = zipfile.ZipFile(learn.path / "x.pkl").read("archive/data.pkl")
        texts = [arg for _, arg, _ in pickletools.genops(content) if isinstance(arg, str)]
        for name in (tmp_path.name, colours.parent.name, "secret", "site-packages"):
            assert not [text for text in texts if name in text]
        assert str(Path(guards.__file__).parents[2]) not in " ".join(texts)
        assert learn.path == tmp_path / "secret"
        loaded = load_learner(learn.path / "x.pkl")
        assert (loaded.path, loaded.model_dir, loaded.dls.path) == (Path(), "models", Path())
        image = next(iter(get_image_files(colours)))
        torch.testing.assert_close(quiet(loaded).predict(image)[2], learn.predict(image)[2], atol=1e-3, rtol=0)


# Other machines


@pytest.mark.parametrize(("attribute", "value"), [("get_num_threads", 977), ("has_bf16", True)])
def test_a_run_resumed_with_other_arithmetic_says_so(dms, tmp_path, monkeypatch, attribute, value):  # noqa: F811
    args = ("run", "se", "--epochs", 2, "--out", "x", "--set", "data.batch_size=256", "--device", "cpu")
    assert dms(*args, "--time-limit", "0.001s")[0] == 75
    where = torch if attribute == "get_num_threads" else guards
    was = getattr(where, attribute)(*(() if where is torch else (torch.device("cpu"),)))
    with monkeypatch.context() as patch:
        patch.setattr(where, attribute, lambda *_: value if value != was else not value)
        patch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
        code, _, err = dms(*args)
        assert code == 2
        assert "without --deterministic" in err
        patch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: False)
        code, out, _ = dms(*args)
    assert code == 0
    assert "resumed with different arithmetic" in out
    assert ("threads" if where is torch else "bf16") in out


def test_a_run_resumed_with_the_same_arithmetic_says_nothing(dms):  # noqa: F811
    args = ("run", "se", "--epochs", 2, "--out", "x", "--set", "data.batch_size=256", "--device", "cpu")
    assert dms(*args, "--time-limit", "0.001s")[0] == 75
    code, out, _ = dms(*args)
    assert code == 0
    assert "arithmetic" not in out


def test_normalize_of_fastai_is_that_of_all_loaders_and_no_other_transform_is_taken():
    dls, stats = load_data("digits", bs=64, device="cpu"), ((0.5,) * 3, (0.25,) * 3)
    x, _ = dls.valid.one_batch()
    pixels = dls.valid.decode((x,))[0].as_subclass(torch.Tensor)
    with pytest.warns(Notice, match=r"images are normalised with mean=\(0.5, 0.5, 0.5\)"):
        dls.add_tfms([Normalize.from_stats(*stats, cuda=False)], "after_batch")
    torch.testing.assert_close(dls.valid.one_batch()[0], (pixels - 0.5) / 0.25, atol=1e-5, rtol=1e-5)
    assert statistics(dls) == stats
    with pytest.raises(UserError, match="has no mean and std here"):
        dls.add_tfms([Normalize()], "after_batch")
    with pytest.raises(UserError, match="Brightness would not be called"):
        dls.add_tfms([Brightness()], "after_batch")


def test_a_folder_in_which_a_learner_has_saved_weights_is_read(tmp_path):
    make_folder(tmp_path, ["."])
    (tmp_path / "models").mkdir()
    assert load_data(tmp_path, size=8, valid=0.25).c == 3
    (tmp_path / "models" / "mine.pth").write_bytes(b"weights")
    assert load_data(tmp_path, size=8, valid=0.25).c == 3
    (tmp_path / "models" / "notes.txt").write_text("no image")
    with pytest.raises(UserError, match="models holds no images"):
        load_data(tmp_path, size=8, valid=0.25)


def inverted(x: TensorImage):
    return 1 - x


@pytest.mark.parametrize(
    ("item", "batch", "says"),
    [
        (Resize(16), [], None),
        (Resize(16), [inverted], "do more than resize and normalise"),
        (CropPad(16), [], "do more than resize and normalise"),
        (Resize(16, ResizeMethod.Squish), [], "squeezes or pads"),
    ],
)
def test_what_fastais_transforms_do_is_seen_when_a_dms_learner_is_exported(tmp_path, item, batch, says):
    make_folder(tmp_path / "images", ["train", "test"])
    dls = ImageDataLoaders.from_folder(
        tmp_path / "images", valid="test", bs=4, num_workers=0, item_tfms=item, batch_tfms=batch
    )
    learn = quiet(dms_learner(dls, "se", arch="test_dmsresnet"))
    if says is None:
        file = export_model(learn, tmp_path / "x.onnx")
        images = sorted((tmp_path / "images" / "test").rglob("*.png"))
        _, found = predict_files(file, images)
        expected = learn.get_preds(dl=dls.test_dl(images))[0]
        torch.testing.assert_close(found, expected, atol=0.02, rtol=0)
    elif "more" in says:
        with pytest.raises(UserError, match=says):
            export_model(learn, tmp_path / "x.onnx")
    else:
        with pytest.warns(Notice, match=says):
            export_model(learn, tmp_path / "x.onnx")


def test_predict_gives_probabilities_whatever_the_loss(tmp_path):
    make_folder(tmp_path / "images", ["train", "test"])
    dls = ImageDataLoaders.from_folder(tmp_path / "images", valid="test", bs=4, num_workers=0, item_tfms=Resize(16))
    learn = quiet(Learner(dls, timm.create_model("test_dmsresnet", num_classes=3), nn.CrossEntropyLoss()))
    images = sorted((tmp_path / "images" / "test").rglob("*.png"))
    logits = learn.get_preds(dl=dls.test_dl(images))[0]
    learn.export(tmp_path / "learner.pkl")
    _, found = predict_files(tmp_path / "learner.pkl", images, trust=True)
    torch.testing.assert_close(found, logits.softmax(1))


def test_a_file_that_cannot_be_written_is_refused_before_the_network_is_traced(tmp_path):
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(UserError, match="is no folder"):
        export_model("dmsresnet_mini", tmp_path / "file" / "x.onnx")


def test_an_exported_learner_over_images_of_one_size_is_opened_as_before(tmp_path):
    make_folder(tmp_path / "images", ["train", "test"], size=(16, 16))
    dls = ImageDataLoaders.from_folder(tmp_path / "images", valid="test", bs=4, num_workers=0)
    learn = quiet(dms_learner(dls, "se", arch="test_dmsresnet"))
    learn.export(tmp_path / "learner.pkl")
    _, card = open_model(load_learner(tmp_path / "learner.pkl"))
    assert card.to_json() == open_model(learn)[1].to_json()
