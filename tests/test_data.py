"""Sources, the cache of decoded folders, batched augmentation and the loader."""

import os
import shutil

import numpy as np
import pytest
import torch
from fastai.data.load import DataLoader
from PIL import Image

from dms_fastai import UserError, load_data
from dms_fastai.data import decoded as decoded_module
from dms_fastai.data.augment import Cropper, Crops, affine, normalize
from dms_fastai.data.images import read_image, resize
from dms_fastai.data.sources import load_splits, split_by_class

COLOURS = {"blue": (0, 0, 255), "green": (0, 255, 0), "red": (255, 0, 0)}


def make_folder(root, splits=("train", "test"), each=4, size=(20, 12)):
    for split in splits:
        for label, colour in COLOURS.items():
            for index in range(each):
                file = root / split / label / f"{index}.png"
                file.parent.mkdir(parents=True, exist_ok=True)
                Image.new("RGB", size, colour).save(file)
    return root


def make_npz(file, **changes):
    rng = np.random.default_rng(0)
    arrays = {
        "train_images": rng.integers(0, 256, (30, 28, 28, 3), dtype=np.uint8),
        "train_labels": np.arange(30) % 3,
        "test_images": rng.integers(0, 256, (9, 28, 28, 3), dtype=np.uint8),
        "test_labels": np.arange(9) % 3,
    }
    arrays |= changes
    np.savez(file, **{key: value for key, value in arrays.items() if value is not None})
    return file


# Sources


def test_digits_are_scikit_learns_split_by_class():
    splits = load_splits("digits")
    assert [len(splits[s]) for s in ("train", "test")] == [1438, 359]
    assert splits["train"].images.shape == (1438, 3, 8, 8)
    assert splits["train"].images.max() == 255
    shares = splits["test"].labels.bincount() / torch.cat([s.labels for s in splits.values()]).bincount()
    assert (shares - 0.2).abs().max() < 0.005
    assert torch.equal(load_splits("digits")["test"].images, splits["test"].images)
    assert load_splits("digits", 16)["train"].images.shape[-1] == 16


def test_a_folder_is_read_square_at_the_size_asked_for(tmp_path):
    splits = load_splits(make_folder(tmp_path / "colours"), 16)
    assert splits["train"].vocab == ["blue", "green", "red"]
    assert splits["test"].images.shape == (12, 3, 16, 16)
    for image, label in splits["test"]:
        assert image[:, 8, 8].tolist() == list(COLOURS[splits["test"].vocab[label]])


@pytest.mark.parametrize("name", ["test", "valid", "val"])
def test_the_held_out_folder_has_any_of_three_names(tmp_path, name):
    dls = load_data(make_folder(tmp_path / "colours", ("train", name)), bs=4, device="cpu")
    assert len(dls.valid_ds) == 12


def test_classes_may_lie_deeper_and_other_files_are_passed_over(tmp_path):
    root = make_folder(tmp_path / "nested" / "x", ("train",)).parent
    (root / "train").mkdir()
    (root / "x" / "train").rename(root / "train" / "coarse")
    (root / "train" / "README.txt").write_text("hello")
    (root / "train" / "coarse" / "red" / ".hidden.png").write_bytes(b"")
    (root / "train" / "coarse" / "red" / "Thumbs.db").write_bytes(b"")
    assert load_splits(root, 8)["train"].vocab == ["blue", "green", "red"]
    assert len(load_splits(root, 8)["train"]) == 12


def test_a_folder_is_decoded_once_and_again_when_it_changes(tmp_path, monkeypatch):
    root, decoded = make_folder(tmp_path / "colours"), []
    monkeypatch.setenv("DMS_FASTAI_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(decoded_module, "read_image", lambda *a: decoded.append(a) or read_image(*a))

    def count():
        decoded.clear()
        dict(load_splits(root, 8))
        return len(decoded)

    assert count() == 24
    assert count() == 0
    file = root / "train" / "red" / "0.png"
    Image.new("RGB", (20, 12), (250, 1, 2)).save(file)
    os.utime(file, (1, 1))
    assert count() == 12  # the split that changed
    assert load_splits(root, 8)["train"].images[8, :, 4, 4].tolist() == [250, 1, 2]
    file.unlink()
    assert count() == 11
    Image.new("RGB", (20, 12)).save(root / "test" / "red" / "new.png")
    assert count() == 13
    next(decoded_module.cache_dir().glob("colours-train-8-*")).write_bytes(b"damaged")
    assert count() == 11


def test_an_unwritable_cache_is_no_error(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("DMS_FASTAI_CACHE", str(tmp_path / "file"))
    assert len(load_splits(make_folder(tmp_path / "colours"), 8)["train"]) == 12


def test_npz_with_and_without_names(tmp_path):
    names = np.array(["ape", "bee", "cow"])
    splits = load_splits(make_npz(tmp_path / "a.npz", class_names=names))
    assert splits["train"].vocab == ["ape", "bee", "cow"]
    assert splits["train"].images.shape == (30, 3, 28, 28)
    assert load_splits(make_npz(tmp_path / "b.npz"))["train"].vocab == ["0", "1", "2"]


def test_npz_of_grey_images_with_labels_in_a_column(tmp_path):
    """As MedMNIST has them."""
    grey = np.random.default_rng(0).integers(0, 256, (30, 28, 28), dtype=np.uint8)
    file = make_npz(tmp_path / "m.npz", train_images=grey, train_labels=(np.arange(30) % 3)[:, None])
    images = load_splits(file, 14)["train"].images
    assert images.shape == (30, 3, 14, 14)
    assert torch.equal(images[:, 0], images[:, 2])


def test_held_out_images_are_chosen_by_seed_and_class():
    labels = torch.arange(100) % 5
    held, rest = split_by_class(labels, 0.2, 7)
    assert sorted([*held.tolist(), *rest.tolist()]) == list(range(100))
    assert labels[held].bincount().tolist() == [4] * 5
    assert torch.equal(held, split_by_class(labels, 0.2, 7)[0])
    assert not torch.equal(held, split_by_class(labels, 0.2, 8)[0])
    dls = load_data("digits", valid=0.1, seed=3, device="cpu")
    assert len(dls.valid_ds) == pytest.approx(0.1 * 1438, abs=5)
    assert len(dls.train_ds) + len(dls.valid_ds) == 1438
    assert dls.valid_ds.split_idx == 1


# Images


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA", "P", "1", "CMYK", "I;16", "I", "F", "YCbCr", "HSV"])
def test_images_of_any_mode(mode):
    pixels = read_image(Image.new("L", (30, 20), 200).convert("RGB").convert(mode) if mode not in ("I;16", "I", "F")
                          else Image.fromarray(np.full((20, 30), 51200, np.uint16)) if mode == "I;16"
                          else Image.new(mode, (30, 20), 51200 if mode == "I" else 200), 16)  # fmt: skip
    assert pixels.shape == (3, 16, 16)
    assert pixels.dtype == torch.uint8
    assert (pixels.float().mean() - 200).abs() < 3


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_what_is_transparent_is_white(mode, tmp_path):
    icon = Image.new("RGBA", (16, 16), (0, 0, 0, 0))  # black on nothing, where nothing is black, too
    icon.paste((0, 0, 0, 255), (0, 0, 16, 8))
    icon.convert(mode).save(tmp_path / "icon.png")
    pixels = read_image(tmp_path / "icon.png")
    assert pixels[:, :8].max() == 0
    assert pixels[:, 8:].min() == 255


@pytest.mark.parametrize(("mode", "values"), [("I", (0, 51, 255)), ("F", (0.0, 0.2, 1.0)), ("F", (0.0, 51.0, 255.0))])
def test_grey_of_many_bits_keeps_its_range(mode, values, tmp_path):
    image = Image.new(mode, (3, 3))
    for x, value in enumerate(values):
        image.paste(value, (x, 0, x + 1, 3))
    image.save(tmp_path / "grey.tif")
    assert read_image(tmp_path / "grey.tif")[0, 0].tolist() == [0, 51, 255]


def test_a_turned_photograph_is_set_upright(tmp_path):
    image = Image.new("RGB", (16, 16), "black")
    image.paste((255, 255, 255), (0, 0, 16, 8))
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    image.save(tmp_path / "turned.jpg", exif=exif)
    assert read_image(tmp_path / "turned.jpg")[0, 12, 8] > 200


def test_arrays_and_tensors_are_images_too():
    array = np.random.default_rng(0).integers(0, 256, (12, 10, 3), dtype=np.uint8)
    expected = torch.from_numpy(array).permute(2, 0, 1)
    assert torch.equal(read_image(array), expected)
    assert torch.equal(read_image(expected), expected)
    assert torch.equal(read_image(array[..., 0])[2], expected[0])
    assert torch.equal(read_image(array[..., ::-1]), expected.flip(0))  # OpenCV's order, turned round
    assert torch.equal(read_image(array.astype(np.float32)), expected)
    assert torch.equal(read_image((array / 255).astype(np.float32)), expected)
    assert torch.equal(read_image(array.astype(np.uint16) * 257), expected)


def test_resizing_keeps_the_middle():
    wide = torch.zeros(1, 3, 10, 30, dtype=torch.uint8)
    wide[..., 10:20] = 100
    assert (resize(wide, 10) == 100).all()
    assert (resize(wide, 5) == 100).all()


def test_labels_must_be_known_and_complete(dls):
    image = dls.valid_ds.images[0]
    for items, words in (([(image, "x")], "'x'"), ([(image, 10)], "10"), ([(image, 1), image], "2 images")):
        with pytest.raises(UserError, match=words):
            dls.test_dl(items)


def test_a_digest_tells_images_and_labels_apart(dls):
    images = dls.valid_ds
    every = torch.arange(len(images))
    assert images.digest() == images.subset(every).digest()
    assert images.digest() != images.subset(every.flip(0)).digest()


# Augmentation


@pytest.mark.parametrize("flip", [0.0, 1.0])
def test_every_crop_is_one_of_the_padded_image(flip):
    images = torch.randint(1, 256, (5, 3, 8, 10), dtype=torch.uint8)
    padded = np.pad(images.numpy(), ((0, 0), (0, 0), (2, 2), (2, 2)))
    if flip:
        padded = padded[..., ::-1]
    index = torch.randint(0, 5, (200,))
    crops, places = Cropper(images, Crops(pad=0.2, flip=flip)).take(index), set()
    assert crops.is_contiguous(memory_format=torch.channels_last)
    for crop, i in zip(crops.numpy(), index.tolist(), strict=True):
        found = [
            (t, left)
            for t in range(5)
            for left in range(5)
            if (padded[i, :, t : t + 8, left : left + 10] == crop).all()
        ]
        assert len(found) == 1
        places.update(found)
    assert len(places) == 25


def test_flips_are_as_frequent_as_asked_for():
    images = torch.arange(8, dtype=torch.uint8).expand(10, 3, 8, 8)
    cropper = Cropper(images, Crops(pad=0.0, flip=0.25))
    flipped = cropper.take(torch.zeros(4000, dtype=torch.long))[:, 0, 0, 0] == 7
    assert flipped.float().mean().item() == pytest.approx(0.25, abs=0.03)


def test_without_border_and_mirror_a_crop_is_the_image():
    images = torch.randint(0, 256, (5, 3, 9, 7), dtype=torch.uint8)
    index = torch.tensor([4, 0, 0, 3])
    assert torch.equal(Cropper(images).take(index), images[index])
    assert len(Cropper(images[:0]).take(index[:0])) == 0


def test_normalisation_in_float64():
    x = torch.randint(0, 256, (4, 3, 8, 8), dtype=torch.uint8)
    mean, std = (0.49, 0.48, 0.45), (0.2, 0.1, 0.3)
    m, s = (np.array(v).reshape(1, 3, 1, 1) for v in (mean, std))
    value = normalize(x, *affine(mean, std, 8, torch.device("cpu")))
    np.testing.assert_allclose(value.numpy(), (x.numpy().astype(np.float64) / 255 - m) / s, rtol=1e-5, atol=1e-5)
    assert value.is_contiguous(memory_format=torch.channels_last)


# The loader


def test_batches_are_plain_tensors_that_hold_every_image_once(dls):
    loader = dls.train.new(drop_last=False, crops=Crops(pad=0.0, flip=0.0))
    batches = list(loader)
    x = torch.cat([x for x, _ in batches])
    assert type(x) is torch.Tensor
    assert len(x) == len(dls.train_ds)
    assert len(batches) == len(loader)
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (loader.mean, loader.std))
    pixels = (x * std + mean).mul(255).round().to(torch.uint8)
    as_bytes = sorted(p.numpy().tobytes() for p in pixels)
    assert as_bytes == sorted(p.numpy().tobytes() for p in dls.train_ds.images)


def test_an_epoch_is_a_new_order_and_validation_is_not(dls):
    orders = [torch.cat([y for _, y in dls.train]) for _ in range(2)]
    assert not torch.equal(*orders)
    torch.testing.assert_close(torch.cat([y for _, y in dls.valid]), dls.valid_ds.labels)
    assert torch.equal(dls.valid.one_batch()[0], dls.valid.one_batch()[0])
    assert len(dls.train) == 1438 // 64


def test_the_same_seed_gives_the_same_batches(dls):
    def batches():
        torch.manual_seed(5)
        return torch.cat([x for x, _ in dls.train])

    assert torch.equal(batches(), batches())


def test_one_batch_of_a_batch_size_larger_than_the_data(tmp_path):
    dls = load_data(make_folder(tmp_path / "colours"), bs=1000, size=8, device="cpu")
    assert [len(x) for x, _ in dls.train] == [12]


def test_it_is_a_fastai_loader(dls):
    assert isinstance(dls.train, DataLoader)
    assert dls.c == 10
    assert dls.vocab == [str(i) for i in range(10)]
    assert dls.n_inp == 1
    assert [str(category) for _, category in dls.valid._pre_show_batch(dls.valid.one_batch())[2]] == [
        dls.vocab[i] for i in dls.valid_ds.labels[:9]
    ]


# Refusals


@pytest.mark.parametrize(
    ("kwargs", "words"),
    [
        ({"data": "cifar1O"}, "did you mean 'cifar10'"),
        ({"data": "digits", "bs": 0}, "batch_size is 0"),
        ({"data": "digits", "size": 4}, "at least 8"),
        ({"data": "digits", "valid": 1.5}, "valid is 1.5"),
        ({"data": "digits", "flip": 2}, "flip is 2"),
        ({"data": "digits", "pad": -1}, "pad is -1"),
        ({"data": "digits", "valid": "train"}, "'train'"),
        ({"data": "digits", "valid": 0.0001}, "one side empty"),
    ],
)
def test_settings_that_cannot_be(kwargs, words):
    with pytest.raises(UserError, match=words):
        load_data(**kwargs)


def test_no_network_names_the_folder_to_fill(tmp_path, monkeypatch):
    from dms_fastai.data import sources

    def offline(url, data):
        raise OSError("Name or service not known")

    monkeypatch.setattr(sources, "untar_data", offline)
    monkeypatch.setattr(sources, "fastai_path", lambda _: tmp_path)
    with pytest.raises(UserError) as error:
        load_data("cifar10")
    assert str(tmp_path / "cifar10") in error.value.message
    assert "Name or service not known" in error.value.message
    make_folder(tmp_path / "cifar10", size=(32, 32))
    assert load_data("cifar10", bs=4).train_ds.name == "cifar10"


def spoil(root, what):
    if what == "no train":
        (root / "train").rename(root / "learning")
    elif what == "one class":
        for label in ("blue", "green"):
            for split in ("train", "test"):
                for file in (root / split / label).iterdir():
                    file.unlink()
                (root / split / label).rmdir()
    elif what == "empty":
        for file in sorted((root / "train").rglob("*"), reverse=True):
            file.rmdir() if file.is_dir() else file.unlink()
    elif what == "empty class":
        for file in (root / "train" / "red").iterdir():
            file.unlink()
    elif what == "no image":
        (root / "train" / "red" / "2.png").write_text("not an image")
    elif what == "cut off":
        file = root / "test" / "red" / "1.png"
        file.write_bytes(file.read_bytes()[:40])
    elif what == "strange class":
        (root / "test" / "red").rename(root / "test" / "purple")
    elif what == "empty test":
        shutil.rmtree(root / "test")
        (root / "test").mkdir()
    elif what == "no test":
        (root / "test").rename(root / "other")


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("no train", "no folder 'train'"),
        ("one class", "only the class 'red'"),
        ("empty", "no class folders"),
        ("empty class", "red holds no images"),
        ("no image", "2.png is not an image"),
        ("cut off", "1.png is not an image"),
        ("strange class", "'purple'"),
        ("no test", "valid=0.1"),
        ("empty test", "valid=0.1"),
    ],
)
def test_folders_that_cannot_be_trained_on(tmp_path, what, words):
    root = make_folder(tmp_path / "colours")
    spoil(root, what)
    with pytest.raises(UserError) as error:
        load_data(root, size=8)
    assert words in error.value.message
    assert "\n" not in error.value.message


def test_all_files_that_are_no_images_are_named_at_once(tmp_path):
    root = make_folder(tmp_path / "colours", each=8)
    bad = sorted(str(file.relative_to(root / "train")) for file in (root / "train").glob("*/[0-6].png"))
    for name in bad:
        (root / "train" / name).write_text("no")
    with pytest.raises(UserError) as error:
        load_data(root)
    assert f"{bad[0]} is not an image" in error.value.message
    named = ", ".join(bad[1:11])
    assert error.value.message.endswith(
        f"; {len(bad) - 1} more in {root / 'train'} cannot be read either: {named}, ..."
    )


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"train_labels": np.arange(30) % 3 - 1}, "train_labels has -1"),
        ({"class_names": np.array(["a", "b"])}, "train_labels has 2, out of range for 2 classes"),
        ({"test_labels": np.arange(9) % 2 + 5, "class_names": np.array(["a", "b", "c"])}, "test_labels has 5"),
        ({"train_labels": np.arange(30) / 2}, "give whole numbers"),
        ({"train_labels": np.arange(29) % 3}, "30 images and 29 labels"),
        ({"train_labels": None}, "has no 'train_labels'"),
        ({"test_labels": None}, "without test_labels"),
        ({"train_images": np.full((30, 28, 28, 3), "x")}, "<U1"),
        ({"train_images": np.zeros((30, 28, 28, 5), np.uint8)}, "(28, 28, 5)"),
        ({"train_labels": np.zeros(30, int), "test_labels": np.zeros(9, int)}, "at least 2"),
        ({"class_names": np.array([print, 1], dtype=object)}, "plain arrays"),
        ({"class_names": np.array(["a", "b", "a"])}, "'a' more than once"),
    ],
)
def test_npz_files_that_cannot_be_trained_on(tmp_path, changes, words):
    with pytest.raises(UserError) as error:
        load_data(make_npz(tmp_path / "bad.npz", **changes))
    assert words in error.value.message


def test_a_file_that_is_no_npz(tmp_path):
    (tmp_path / "bad.npz").write_text("no")
    (tmp_path / "data.csv").write_text("no")
    with pytest.raises(UserError, match="cannot be read"):
        load_data(tmp_path / "bad.npz")
    with pytest.raises(UserError, match="neither a folder nor"):
        load_data(tmp_path / "data.csv")
