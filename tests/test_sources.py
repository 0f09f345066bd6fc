"""What people bring as data: layouts of folders, arrays of any type, tables, archives; read right, or refused."""

import csv
import io
import json
import os
import pickle
import shutil
import struct
import tarfile
import time
import unicodedata
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from fastai.interpret import ClassificationInterpretation
from PIL import Image
from PIL.PngImagePlugin import PngImageFile

from dms_fastai import UserError, dms_learner, load_data
from dms_fastai.data import archive, images, sources
from dms_fastai.data.images import read_image
from dms_fastai.data.sources import load_splits
from dms_fastai.errors import Notice
from dms_fastai.files import whole
from tests.conftest import quiet
from tests.test_data import COLOURS, make_folder, make_npz
from tests.test_runs import dms  # noqa: F401  (a fixture)


def said(action):
    """What an action gives, and the notices that it says."""
    with pytest.warns() as record:
        result = action()
    return result, "\n".join(str(w.message) for w in record if issubclass(w.category, Notice))


def colours(split):
    """The classes of a set's images by their colour, in order."""
    names = {colour: name for name, colour in COLOURS.items()}
    return [names[tuple(image[:, 4, 4].tolist())] for image in split.images]


def classes(split):
    return [split.vocab[label] for label in split.labels]


# Folders


@pytest.mark.parametrize(
    ("before", "after"), [("train", "Train"), ("test", "Test"), ("test", "validation"), ("test", "VALID")]
)
def test_names_of_splits_are_found_in_any_case(tmp_path, before, after):
    root = make_folder(tmp_path / "colours")
    (root / before).rename(root / after)
    dls = load_data(root, bs=4, size=8, device="cpu")
    assert (len(dls.train_ds), len(dls.valid_ds)) == (12, 12)


def test_folders_of_classes_alone_are_for_training(tmp_path):
    root = make_folder(tmp_path / "colours", ("train",)) / "train"
    dls = load_data(root, bs=4, size=8, valid=0.25, device="cpu")
    assert (len(dls.train_ds), len(dls.valid_ds)) == (9, 3)
    with pytest.raises(UserError, match=r"valid=0\.1"):
        load_data(root)


def test_a_test_folder_without_labels_gives_way_to_validation(tmp_path):
    root = make_folder(tmp_path / "colours", ("train", "valid"))
    (root / "test").mkdir()
    Image.new("RGB", (8, 8)).save(root / "test" / "0001.png")
    dls, words = said(lambda: load_data(root, bs=4, size=8, device="cpu"))
    assert dls.valid_ds.split == "val"
    assert "test has no images in class folders" in words


def test_a_split_that_is_not_used_is_not_read(tmp_path):
    root = make_folder(tmp_path / "colours")
    (root / "valid" / "purple").mkdir(parents=True)
    (root / "valid" / "purple" / "bad.png").write_text("no image")
    assert len(load_data(root, bs=4, size=8, device="cpu").valid_ds) == 12
    with pytest.raises(UserError, match="purple"):
        load_data(root, bs=4, size=8, valid="val")
    file = make_npz(tmp_path / "a.npz", val_images=np.zeros((3, 5)), val_labels=np.array([9.5]))
    assert len(load_data(file, bs=4, device="cpu").valid_ds) == 9


def test_two_folders_of_one_split_are_named(tmp_path):
    root = make_folder(tmp_path / "colours", ("train", "valid", "val"))
    with pytest.raises(UserError, match="both 'val' and 'valid'"):
        load_data(root)


@pytest.mark.parametrize("inner", ["images", "x/y"])
def test_the_class_is_where_the_folders_differ(tmp_path, inner):
    root = make_folder(tmp_path / "colours")
    for folder in [*root.glob("train/*"), *root.glob("test/*")]:
        (folder / inner).mkdir(parents=True)
        for file in folder.glob("*.png"):
            file.rename(folder / inner / file.name)
    splits = load_splits(root, 8)
    assert splits["train"].vocab == ["blue", "green", "red"]
    assert colours(splits["test"]) == classes(splits["test"])


@pytest.mark.parametrize(
    ("places", "named"),
    [
        (("a/1.png", "b/1.png", "b/more/1.png"), ("train/a", "train/b/more")),
        (("a/1.png", "b/images/1.png"), ("train/a", "train/b/images")),
        (("a/front/1.png", "a/back/1.png", "b/front/1.png", "b/back/1.png"), ("train/a/back", "train/b/back")),
    ],
)
def test_folders_that_could_both_be_classes_are_named(tmp_path, places, named):
    for place in places:
        file = tmp_path / "train" / place
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(file)
    with pytest.raises(UserError) as error:
        load_data(tmp_path, valid=0.5)
    assert all(f"{tmp_path / name} " in error.value.message for name in named)


def test_composed_and_decomposed_names_are_one(tmp_path):
    root = make_folder(tmp_path / "colours")
    (root / "train" / "red").rename(root / "train" / unicodedata.normalize("NFC", "rögrön"))
    (root / "test" / "red").rename(root / "test" / unicodedata.normalize("NFD", "rögrön"))
    splits = load_splits(root, 8)
    assert list(splits["train"].vocab) == list(splits["test"].vocab) == ["blue", "green", "rögrön"]
    assert len(splits["test"]) == 12


def test_classes_in_groups_are_read_and_said(tmp_path):
    for place in ("animals/cat", "animals/dog", "vehicles/car"):
        (tmp_path / "train" / place).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / "train" / place / "1.png")
    split, words = said(lambda: load_splits(tmp_path, 8)["train"])
    assert split.vocab == ["car", "cat", "dog"]
    assert "the classes are the innermost folders, such as animals/cat and vehicles/car" in words


def test_a_name_that_is_not_utf8_is_escaped(tmp_path):
    root = make_folder(tmp_path / "colours")
    for split in ("train", "test"):
        os.rename(root / split / "red", os.fsencode(root / split) + b"/caf\xe9")
    assert load_splits(root, 8)["train"].vocab == ["blue", "caf\\xe9", "green"]


def test_files_that_are_passed_over_are_counted(tmp_path):
    root = make_folder(tmp_path / "colours")
    for index in range(3):
        (root / "train" / "red" / f"{index}.npy").write_bytes(b"")
    Image.new("RGB", (8, 8)).save(root / "train" / "loose.png")
    _, words = said(lambda: load_splits(root, 8)["train"])
    assert "3 files skipped" in words
    assert ".npy (3)" in words
    assert "loose.png is in no class folder" in words


def test_a_class_whose_files_are_no_images_says_their_endings(tmp_path):
    root = make_folder(tmp_path / "colours")
    for file in (root / "train" / "red").iterdir():
        file.rename(file.with_suffix(".raw"))
    with pytest.raises(UserError, match=r"red holds no images \(files with other endings: \.raw \(4\)\)"):
        load_data(root)


def test_a_folder_that_cannot_be_listed_is_an_error(tmp_path, monkeypatch):
    root, scandir = make_folder(tmp_path / "colours"), os.scandir

    def refusing(path):
        if os.fspath(path).endswith("red"):
            raise PermissionError(13, "Permission denied", os.fspath(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refusing)
    with pytest.raises(UserError, match=r"red cannot be listed \(Permission denied\)"):
        load_data(root)


def test_folders_that_change_places_make_the_cache_stale(tmp_path):
    root = make_folder(tmp_path / "colours")
    for file in root.rglob("*.png"):
        Image.new("RGB", (20, 12), COLOURS[file.parent.name]).save(file, compress_level=0)  # all of one size
    for file in root.rglob("*"):
        os.utime(file, (1, 1))
    assert colours(load_splits(root, 8)["train"]) == classes(load_splits(root, 8)["train"])
    train = root / "train"
    for a, b in (("red", "x"), ("blue", "red"), ("x", "blue")):
        (train / a).rename(train / b)
    for file in root.rglob("*"):
        os.utime(file, (1, 1))
    split = load_splits(root, 8)["train"]
    swapped = {"red": "blue", "blue": "red", "green": "green"}
    assert [swapped[name] for name in colours(split)] == classes(split)


def test_a_pipe_among_the_images_is_named(tmp_path):
    root = make_folder(tmp_path / "colours")
    os.mkfifo(root / "train" / "red" / "pipe.png")
    with pytest.raises(UserError, match=r"pipe\.png is not an image that can be read \(it is a pipe"):
        load_data(root)


def test_an_interruption_ends_the_decoding(tmp_path, monkeypatch):
    """Ctrl-C comes while the first images are decoded; hundreds of others are not."""
    root = make_folder(tmp_path / "colours", each=200)
    seen = []

    def interrupted(*args):
        seen.append(args)
        raise KeyboardInterrupt

    monkeypatch.setattr("dms_fastai.data.decoded.open_image", interrupted)
    with pytest.raises(KeyboardInterrupt):
        load_splits(root, 8)["train"]
    assert len(seen) <= 64


def test_large_images_are_decoded_one_at_a_time(tmp_path, monkeypatch):
    root = make_folder(tmp_path / "colours", ("train",), each=8, size=(40, 40))
    at_once, most, load = [], [], PngImageFile.load

    def counted(self):
        at_once.append(self)
        most.append(len(at_once))
        time.sleep(0.002)
        at_once.pop()
        return load(self)

    monkeypatch.setattr(PngImageFile, "load", counted)
    monkeypatch.setattr(images, "LARGE", 1000)
    assert colours(load_splits(root, 8)["train"]) == sorted(list(COLOURS) * 8)
    assert set(most) == {1}


def test_images_of_too_many_pixels_are_refused_before_they_are_decoded(tmp_path, monkeypatch):
    Image.new("1", (300, 200)).save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 25_000)
    monkeypatch.setattr(PngImageFile, "load", None)
    with pytest.raises(UserError, match="exceeds limit of 50000 pixels"):
        read_image(tmp_path / "a.png")


def test_what_killed_processes_have_left_is_removed_in_time(tmp_path, monkeypatch):
    monkeypatch.setenv("DMS_FASTAI_CACHE", str(tmp_path / "cache"))
    (tmp_path / "cache").mkdir()
    old, new, foreign = (tmp_path / "cache" / name for name in ("a.1.partial", "b.2.partial", "mine.partial"))
    for file in (old, new, foreign):
        file.write_bytes(b"")
    os.utime(old, (1, 1))
    os.utime(foreign, (1, 1))
    load_splits(make_folder(tmp_path / "colours"), 8)["train"]
    assert not old.exists()
    assert new.exists()
    assert foreign.exists()
    left, other = tmp_path / "[a].onnx.7.partial", tmp_path / "b.onnx.7.partial"
    for file in (left, other):
        file.write_bytes(b"")
        os.utime(file, (1, 1))
    with whole(tmp_path / "[a].onnx") as partial:
        partial.write_bytes(b"")
    assert not left.exists()
    assert other.exists()


# Pixels


def grey_folder(root, values, bits=16):
    """Grey images, one for each value, of two classes; half of each image is black."""
    for index, value in enumerate(values):
        file = root / "train" / "ab"[index % 2] / f"{index}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.zeros((8, 8), np.uint16 if bits == 16 else np.float32)
        pixels[:, 4:] = value
        Image.fromarray(pixels).save(file if bits == 16 else file.with_suffix(".tif"))
    return root


@pytest.mark.parametrize(
    ("values", "bits", "expected"),
    [
        ((4095, 4000, 64, 0), 16, (255, 250, 4, 0)),  # 12 of 16 bits
        ((1023, 512, 100, 0), 16, (255, 128, 25, 0)),  # 10 of 16 bits
        ((65535, 4095, 512, 256), 16, (255, 15, 2, 1)),
        ((200, 100, 30, 0), 16, (200, 100, 30, 0)),  # bytes in 16 bits
        ((1.02, 0.5, 0.1, -0.02), 32, (255, 128, 26, 0)),  # a little out of range
        ((255.0, 128.0, 1.0, 0.5), 32, (255, 128, 1, 0)),  # dark images among bright ones have the scale of all
    ],
)
def test_grey_of_many_bits_has_one_scale(tmp_path, values, bits, expected):
    split = load_splits(grey_folder(tmp_path / "grey", values, bits), 8)["train"]
    found = {Path(file).stem: image[0, 0, 7].item() for file, image in zip(split.files, split.images, strict=True)}
    assert [found[str(index)] for index in range(4)] == list(expected)
    assert split.images[..., 0].max() == 0


def test_the_scale_is_said_and_kept(tmp_path):
    """For the test images, a dark image that is predicted alone, and the model's card."""
    root = grey_folder(tmp_path / "grey", (4095, 2048, 64, 0))
    (root / "train").rename(root / "x")
    grey_folder(root, (4095, 2048, 4000, 16))
    (root / "x").rename(root / "test")
    dls, words = said(lambda: load_data(root, bs=2, size=8, device="cpu"))
    assert "4095 becomes 255" in words
    dark = root / "test" / "a" / "2.png"
    assert dls.valid_ds.images[dls.valid_ds.files.index("a/2.png")].max() == 4
    assert dls.test_dl([dark]).dataset.images.max() == 4
    assert read_image(dark).max() == 64  # alone, it looks like a byte


@pytest.mark.parametrize(
    ("value", "words"),
    [(np.nan, "NaN or infinite"), (-2.0, "normalised"), (1e6, "run from 0 to 1e+06")],
)
def test_decimal_numbers_that_are_no_pixels(tmp_path, value, words):
    root = grey_folder(tmp_path / "grey", (0.5, value), bits=32)
    with pytest.raises(UserError) as error:
        load_splits(root, 8)["train"]
    assert words in error.value.message
    assert "1.tif" in error.value.message


@pytest.mark.parametrize(
    ("convert", "expected"),
    [
        (lambda x: x / 255, 1.0),
        (lambda x: (x / 255).astype(np.float32), 1.0),
        (lambda x: x.astype(np.uint16) * 257, 65535.0),
        (lambda x: x.astype(np.int64), 255.0),
        (lambda x: x.astype(np.float16), 255.0),
        (lambda x: x[:, ::-1, ::-1][:, ::-1, ::-1], None),
        (lambda x: np.asfortranarray(x), None),
    ],
)
def test_pixels_of_any_type(tmp_path, convert, expected):
    right = load_splits(make_npz(tmp_path / "right.npz"))
    with np.load(tmp_path / "right.npz") as arrays:
        changes = {name: convert(arrays[name]) for name in ("train_images", "test_images")}
    splits = load_splits(make_npz(tmp_path / "other.npz", **changes))
    assert torch.equal(splits["train"].images, right["train"].images)
    assert torch.equal(splits["test"].images, right["test"].images)
    assert splits["train"].white == expected


def test_masks_and_dark_images_are_no_secret(tmp_path):
    mask = np.zeros((30, 8, 8), bool)
    mask[:, 2:5] = True
    splits = load_splits(make_npz(tmp_path / "mask.npz", train_images=mask))
    assert splits["train"].images.max() == 255
    _, words = said(lambda: load_data(make_npz(tmp_path / "dark.npz", train_images=mask.astype(np.uint8)), bs=4))
    assert "the brightest pixel of all training images is 1 of 255" in words


def test_test_images_of_another_size_are_resized_and_said(tmp_path):
    pixels = np.full((9, 40, 50, 3), 7, np.uint8)
    dls, words = said(lambda: load_data(make_npz(tmp_path / "a.npz", test_images=pixels), bs=4, device="cpu"))
    assert dls.valid_ds.images.shape == (9, 3, 28, 28)
    assert "40x50" in words


def test_images_with_unreadable_exif_are_read():
    turned = struct.pack("<2sHIHHHI4sI", b"II", 42, 8, 1, 0x0112, 2, 4, b"six", 0)  # the orientation as a text
    file = io.BytesIO()
    Image.new("RGB", (6, 4), (9, 8, 7)).save(file, "PNG", exif=b"Exif\0\0" + turned)
    assert read_image(file.getvalue())[:, 0, 0].tolist() == [9, 8, 7]


@pytest.mark.parametrize("kind", [RuntimeError, MemoryError, KeyError, IndexError, struct.error, AssertionError])
def test_whatever_a_decoder_raises_is_named(tmp_path, monkeypatch, kind):
    Image.new("RGB", (6, 4)).save(tmp_path / "a.png")

    def broken(self):
        raise kind()

    monkeypatch.setattr("PIL.PngImagePlugin.PngImageFile.load", broken)
    with pytest.raises(UserError, match=r"a\.png is not an image that can be read \(.+\)"):
        read_image(tmp_path / "a.png")


# Labels


@pytest.mark.parametrize(
    ("labels", "vocab"),
    [
        (lambda x: x.astype(float), ["0", "1", "2"]),
        (lambda x: x.astype(np.uint8)[:, None], ["0", "1", "2"]),
        (lambda x: np.array(["ape", "bee", "cow"])[x], ["ape", "bee", "cow"]),
        (lambda x: np.array([b"ape", b"bee", b"cow"])[x], ["ape", "bee", "cow"]),
        (lambda x: np.array([7, 500, 30_000])[x], ["7", "500", "30000"]),
        (lambda x: x + 1, ["1", "2", "3"]),
    ],
)
def test_labels_of_any_type(tmp_path, labels, vocab):
    changes = {"train_labels": labels(np.arange(30) % 3), "test_labels": labels(np.arange(9) % 3)}
    splits = load_splits(make_npz(tmp_path / "a.npz", **changes))
    assert list(splits["train"].vocab) == vocab
    assert splits["train"].labels.tolist() == [i % 3 for i in range(30)]
    assert splits["test"].labels.tolist() == [i % 3 for i in range(9)]


@pytest.mark.parametrize("names", [np.array([b"ape", b"bee", b"cow"]), np.array([["ape"], ["bee"], ["cow"]])])
def test_names_of_classes_of_any_type(tmp_path, names):
    assert load_splits(make_npz(tmp_path / "a.npz", class_names=names))["train"].vocab == ["ape", "bee", "cow"]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"train_labels": np.array([0, 1, 2**32 - 1] * 10)}, "4294967295, which is the number of no class"),
        ({"train_labels": np.array([0, 1, 2**64 - 1] * 10, np.uint64)}, "18446744073709551615"),
        ({"train_labels": np.array([0.0, 1.0, np.nan] * 10)}, "give whole numbers"),
        ({"train_labels": np.eye(3)[np.arange(30) % 3]}, "float64 (30, 3); give whole numbers or names"),
        ({"test_labels": np.array([0, 1, 5] * 3)}, "test_labels has 5, a class that train does not have"),
        ({"class_names": np.array("ape")}, "has one class"),
    ],
)
def test_labels_that_are_none(tmp_path, changes, words):
    start = time.monotonic()
    with pytest.raises(UserError) as error:
        load_data(make_npz(tmp_path / "bad.npz", **changes))
    assert words in error.value.message
    assert time.monotonic() - start < 10


def test_classes_without_images_are_said(tmp_path):
    names = np.array(["ape", "bee", "cow", "dog", "elk"])
    _, words = said(lambda: load_splits(make_npz(tmp_path / "a.npz", class_names=names))["train"])
    assert "no training image is of class 'dog' and 1 more" in words


# Files of arrays


def test_kerass_mnist(tmp_path):
    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 256, (40, 28, 28), dtype=np.uint8), np.arange(40, dtype=np.uint8) % 10
    np.savez(tmp_path / "mnist.npz", x_train=x[:30], y_train=y[:30], x_test=x[30:], y_test=y[30:])
    splits = load_splits(tmp_path / "mnist.npz")
    assert (splits["train"].images[:, 1].numpy() == x[:30]).all()
    assert splits["test"].labels.tolist() == y[30:].tolist()


def test_a_single_array_is_no_npz(tmp_path):
    np.save(tmp_path / "a.npy", np.zeros(3))
    (tmp_path / "a.npy").rename(tmp_path / "a.npz")
    with pytest.raises(UserError, match=r"is a single array \(\.npy\)"):
        load_data(tmp_path / "a.npz")


def claiming(file, shape, method):
    """An .npz file whose training images claim a shape that their bytes do not fill."""
    header = io.BytesIO()
    facts = {"descr": "|u1", "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(header, facts)
    make_npz(file, train_images=None)
    with zipfile.ZipFile(file, "a", method) as opened:
        opened.writestr("train_images.npy", header.getvalue() + bytes(1000))
    return file


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
@pytest.mark.parametrize("shape", [(2**40, 32, 32, 3), (10**30, 3), (30, 28, 28, 3)])
def test_arrays_that_claim_more_than_there_is(tmp_path, shape, method):
    with pytest.raises(UserError) as error:
        load_data(claiming(tmp_path / "big.npz", shape, method))
    assert "train_images" in error.value.message
    assert "\n" not in error.value.message


def cifar_arrays(n, classes, seed):
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (n, 3072), dtype=np.uint8), rng.integers(0, classes, n)


def write_cifar(root, kind):
    """A small CIFAR-10 or -100 in the authors' layout; gives the training pixels and labels."""
    classes = 100 if "100" in kind else 10
    names = [f"class{i}" for i in range(classes)]
    files = ["train"] if classes == 100 else [f"data_batch_{i}" for i in range(1, 6)]
    test = "test" if classes == 100 else "test_batch"
    root.mkdir()
    kept = []
    for seed, name in enumerate([*files, test]):
        pixels, labels = cifar_arrays(20, classes, seed)
        kept.append((pixels, labels))
        if kind.endswith("bin"):
            coarse = np.zeros((20, classes // 100), np.uint8)
            rows = np.concatenate([coarse, labels[:, None].astype(np.uint8), pixels], 1)
            (root / f"{name}.bin").write_bytes(rows.tobytes())
        else:
            key = "fine_labels" if classes == 100 else "labels"
            table = {b"data": pixels, key.encode(): labels.tolist(), b"filenames": [b"x"] * 20}
            (root / name).write_bytes(pickle.dumps(table, protocol=2))
    if kind.endswith("bin"):
        (root / ("fine_label_names.txt" if classes == 100 else "batches.meta.txt")).write_text(
            "\n".join(names) + "\n\n"
        )
    else:
        key = "fine_label_names" if classes == 100 else "label_names"
        (root / ("meta" if classes == 100 else "batches.meta")).write_bytes(pickle.dumps({key: names}, protocol=2))
    return kept[:-1]


@pytest.mark.parametrize("kind", ["cifar-10-bin", "cifar-100-bin", "cifar-10-py", "cifar-100-py"])
def test_cifar_as_its_authors_distribute_it(tmp_path, kind):
    kept = write_cifar(tmp_path / kind, kind)
    splits, words = said(lambda: dict(load_splits(tmp_path / kind)))
    pixels, labels = (np.concatenate(arrays) for arrays in zip(*kept, strict=True))
    assert (splits["train"].images.numpy().reshape(len(pixels), -1) == pixels).all()
    assert splits["train"].labels.tolist() == labels.tolist()
    assert splits["test"].vocab[7] == "class7"
    assert f"has {len(pixels)} images" in words


def test_a_cifar_that_is_not_complete(tmp_path):
    write_cifar(tmp_path / "bin", "cifar-10-bin")
    file = tmp_path / "bin" / "data_batch_3.bin"
    file.write_bytes(file.read_bytes()[:-5])
    with pytest.raises(UserError, match=r"data_batch_3\.bin is damaged"):
        load_data(tmp_path / "bin")
    file.unlink()
    with pytest.raises(UserError, match=r"has no data_batch_3\.bin; it is not complete"):
        load_data(tmp_path / "bin")


def test_a_pickled_cifar_runs_no_code(tmp_path):
    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "exploded"),)

    write_cifar(tmp_path / "py", "cifar-10-py")
    (tmp_path / "py" / "data_batch_1").write_bytes(pickle.dumps({b"data": Bomb(), b"labels": [1]}))
    with pytest.raises(UserError, match=r"it would call (posix|nt)\.mkdir"):
        load_data(tmp_path / "py")
    assert not (tmp_path / "exploded").exists()


# Tables and archives


def write_table(file, rows, header=("file", "label"), **options):
    with file.open("w", newline="", encoding="utf-8") as opened:
        table = csv.writer(opened, **options)
        table.writerows([header, *rows])
    return file


@pytest.mark.parametrize(
    ("header", "name", "options"),
    [
        (("file", "label"), lambda p: p.name, {}),
        (("id", "category"), lambda p: p.stem, {}),  # as Kaggle has it
        (("Label", "Filename"), lambda p: f"x/{p.name}", {"delimiter": ";"}),
        (("image_path", "class"), lambda p: p.name, {"delimiter": "\t"}),
    ],
)
def test_a_table_labels_images(tmp_path, header, name, options):
    root, rows = tmp_path / "images", []
    (root / "x").mkdir(parents=True)
    for index, (label, colour) in enumerate(list(COLOURS.items()) * 4):
        file = root / "x" / f"p{index}.png"
        Image.new("RGB", (8, 8), colour).save(file)
        rows.append((name(file), label) if header[0] != "Label" else (label, name(file)))
    Image.new("RGB", (8, 8)).save(root / "x" / "unnamed.png")
    file = write_table(tmp_path / "train.csv", rows, header, **options)
    splits, words = said(lambda: load_splits(root, 8, file))
    assert colours(splits["train"]) == classes(splits["train"])
    assert len(splits["train"]) == 12
    assert "1 images are not in train.csv" in words


def test_a_table_with_paths_never_takes_a_file_of_another_folder(tmp_path):
    root = tmp_path / "images"
    for file in ("a/1.png", "b/1.png", "b/2.png", "c/d/3.png"):
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(root / file)

    def files(*names):
        table = write_table(tmp_path / "t.csv", [(name, "xy"[index % 2]) for index, name in enumerate(names)])
        return load_splits(root, 8, table)["train"].files

    assert files("a/1.png", "images/b/1.png", "b/2", "d/3.png") == ["a/1.png", "b/1.png", "b/2.png", "c/d/3.png"]
    assert files("/old/images/b/1", "./2.png") == ["b/1.png", "b/2.png"]
    for name in ("a/2.png", "a/2", "c/3.png", "images/d/1.png"):
        with pytest.raises(UserError, match=rf"line 3: .* has no image '{name}'"):
            files("a/1.png", name)


def test_a_table_may_have_splits(dms, tmp_path):  # noqa: F811
    root, rows = tmp_path / "images", []
    root.mkdir()
    for index, (label, colour) in enumerate(list(COLOURS.items()) * 8):
        Image.new("RGB", (8, 8), colour).save(root / f"p{index}.png")
        rows.append((f"p{index}.png", label, "train" if index < 18 else "test"))
    write_table(tmp_path / "t.csv", rows, ("file", "label", "split"))
    args = ("--data", root, "--labels", "t.csv", "--arch", "test_dmsresnet", "--epochs", 1)
    code, _, err = dms("run", "se", *args)
    assert code == 0, err
    facts = json.loads((tmp_path / "artifacts/images/se/seed0/run.json").read_text())
    assert (facts["training_images"], facts["validation_images"]) == (18, 6)


@pytest.mark.parametrize(
    ("rows", "header", "words"),
    [
        ([("0.png", "a"), ("nowhere.png", "b")], ("file", "label"), "line 3: "),
        ([("0.png", "a")], ("file", "label"), "one class"),
        ([("0.png", "a")], ("x", "y"), "has the columns x, y; one of them must be file"),
        ([("0.png", "a", "b"), ("0.png", "b", "b")], ("file", "label", "other"), "'b' here, and 'a' in a line before"),
        ([("0.png", "a", "dev")], ("file", "label", "split"), "split is 'dev'"),
        ([], ("file", "label"), "has no rows"),
        ([("0.png", "a"), ("1.png", "")], ("file", "label"), "line 3: 1.png has no label"),
        (
            [("0.png", "a", "train"), ("0.png", "a", "test")],
            ("file", "label", "split"),
            "line 3: 0.png is in two splits",
        ),
    ],
)
def test_tables_that_cannot_be_used(tmp_path, rows, header, words):
    root = tmp_path / "images"
    root.mkdir()
    for index in range(2):
        Image.new("RGB", (8, 8)).save(root / f"{index}.png")
    with pytest.raises(UserError) as error:
        load_splits(root, 8, write_table(tmp_path / "t.csv", rows, header))
    assert words in error.value.message


@pytest.mark.parametrize("ending", [".zip", ".tar", ".tar.gz"])
@pytest.mark.parametrize("top", ["", "colours"])
def test_archives_are_unpacked_once(tmp_path, monkeypatch, ending, top):
    monkeypatch.setenv("DMS_FASTAI_CACHE", str(tmp_path / "cache"))
    root = make_folder(tmp_path / "colours")
    kind = {".zip": "zip", ".tar": "tar", ".tar.gz": "gztar"}[ending]
    base = str(tmp_path / "packed")
    file = shutil.make_archive(base, kind, root.parent, top) if top else shutil.make_archive(base, kind, root)
    splits = load_splits(file, 8)
    assert colours(splits["test"]) == classes(splits["test"])
    assert splits["test"].name == "packed"
    monkeypatch.setattr(archive, "_unpack", None)
    assert len(load_splits(file, 8)["train"]) == 12


@pytest.mark.parametrize("spoil", [lambda b: b[: len(b) // 2], lambda b: b"", lambda b: b"no archive"])
@pytest.mark.parametrize("kind", ["zip", "gztar"])
def test_archives_that_cannot_be_unpacked_leave_nothing(tmp_path, monkeypatch, kind, spoil):
    monkeypatch.setenv("DMS_FASTAI_CACHE", str(tmp_path / "cache"))
    file = Path(shutil.make_archive(str(tmp_path / "packed"), kind, make_folder(tmp_path / "colours")))
    file.write_bytes(spoil(file.read_bytes()))
    with pytest.raises(UserError, match="cannot be unpacked"):
        load_data(file)
    assert not [path for path in (tmp_path / "cache" / "unpacked").iterdir() if path.is_dir()]


def test_an_archive_writes_nothing_outside(tmp_path, monkeypatch):
    monkeypatch.setenv("DMS_FASTAI_CACHE", str(tmp_path / "cache"))
    with tarfile.open(tmp_path / "evil.tar", "w") as opened:
        info = tarfile.TarInfo("../../../escaped.png")
        opened.addfile(info, io.BytesIO(b""))
    with pytest.raises(UserError, match="cannot be unpacked"):
        load_data(tmp_path / "evil.tar")
    assert not list(tmp_path.rglob("escaped.png"))


def test_parquet_files_of_hugging_face(tmp_path, monkeypatch):
    pyarrow = pytest.importorskip("pyarrow")
    monkeypatch.setenv("DMS_FASTAI_CACHE", str(tmp_path / "cache"))
    from pyarrow import parquet

    names = ["red", "blue", "green"]
    rows = []
    for index in range(12):
        content = io.BytesIO()
        Image.new("RGB", (8, 8), COLOURS[names[index % 3]]).save(content, "PNG")
        rows.append({"image": {"bytes": content.getvalue(), "path": None}, "label": index % 3})
    features = {"image": {"_type": "Image"}, "label": {"names": names, "_type": "ClassLabel"}}
    noted = {"huggingface": json.dumps({"info": {"features": features}})}
    table = pyarrow.Table.from_pylist(rows).replace_schema_metadata(noted)
    (tmp_path / "d" / "data").mkdir(parents=True)
    parquet.write_table(table, tmp_path / "d" / "data" / "train-00000-of-00001.parquet")
    test = tmp_path / "d" / "data" / "test-00000-of-00001.parquet"
    unlabelled = table.slice(0, 6).set_column(1, "label", pyarrow.array([0, 1, 2, 0, 1, -1]))
    parquet.write_table(unlabelled.replace_schema_metadata(noted), test)
    splits = load_splits(tmp_path / "d", 8)
    assert (len(splits["train"]), len(splits["test"])) == (12, 5)
    assert colours(splits["train"]) == classes(splits["train"])
    parquet.write_table(table.slice(0, 3), test)  # is read again
    assert len(load_splits(tmp_path / "d", 8)["test"]) == 3
    monkeypatch.setattr("dms_fastai.data.decoded.open_image", None)  # and nothing else is
    assert {name: len(split) for name, split in load_splits(tmp_path / "d", 8).items()} == {"train": 12, "test": 3}


# Downloads


def fake_download(tmp_path, monkeypatch):
    """fastai's address of CIFAR-10 as an archive on this disk; gives fastai's folder of data."""
    root = make_folder(tmp_path / "cifar10", each=8)
    (tmp_path / "fastai" / "archive").mkdir(parents=True)
    (tmp_path / "fastai" / "data").mkdir()
    file = shutil.make_archive(str(tmp_path / "fastai" / "archive" / "cifar10"), "gztar", tmp_path, "cifar10")
    Path(file).rename(tmp_path / "fastai" / "archive" / "cifar10.tgz")
    shutil.rmtree(root)
    monkeypatch.setattr(sources, "fastai_path", lambda what: tmp_path / "fastai" / what)
    monkeypatch.setitem(sources.IMAGES, "cifar10", 48)

    def untar(url, data):
        shutil.unpack_archive(tmp_path / "fastai" / "archive" / "cifar10.tgz", data, "gztar")
        return data / "cifar10"

    monkeypatch.setattr(sources, "untar_data", untar)
    return tmp_path / "fastai" / "data"


def test_a_download_is_there_as_a_whole_or_not_at_all(tmp_path, monkeypatch):
    data = fake_download(tmp_path, monkeypatch)
    whole = sources.untar_data

    def killed(url, data):
        folder = whole(url, data)
        shutil.rmtree(folder / "train" / "red")
        raise KeyboardInterrupt

    monkeypatch.setattr(sources, "untar_data", killed)
    with pytest.raises(KeyboardInterrupt):
        load_splits("cifar10", 8)
    assert not (data / "cifar10").exists()
    (data / ".cifar10.partial" / "cifar10" / "train").mkdir(parents=True)  # and one that was killed outright
    monkeypatch.setattr(sources, "untar_data", whole)
    assert len(load_splits("cifar10", 8)["train"]) == 24
    assert not (data / ".cifar10.partial").exists()


def test_what_another_program_unpacks_is_not_taken_for_the_whole(tmp_path, monkeypatch):
    data = fake_download(tmp_path, monkeypatch)
    make_folder(data / "cifar10", each=3)
    with pytest.raises(UserError, match="has 18 of the 48 files"):
        load_data("cifar10")
    shutil.rmtree(data / "cifar10")
    assert len(load_splits("cifar10", 8)["train"]) == 24


# Names of files


def test_the_files_of_images_are_kept(tmp_path):
    dls = load_data(make_folder(tmp_path / "colours"), bs=4, size=8, device="cpu")
    learn = quiet(dms_learner(dls, "se", arch="test_dmsresnet"))
    found = ClassificationInterpretation.from_learner(learn)
    _, index, items = found.top_losses(3, items=True)
    assert list(items) == [dls.valid_ds.items[i] for i in index]
    assert all(item.is_file() for item in items)
    _, _, targets, _, _ = found[index.tolist()]
    assert [dls.vocab[t] for t in targets] == [item.parent.name for item in items]
    assert [item.parent.name for item in dls.train_ds.items] == classes(dls.train_ds)  # ImageClassifierCleaner's


def test_held_out_images_keep_their_files(tmp_path):
    root = make_folder(tmp_path / "colours", ("train",))
    dls = load_data(root, bs=4, size=8, valid=0.5, device="cpu")
    assert sorted([*dls.train_ds.items, *dls.valid_ds.items]) == sorted(root.rglob("*.png"))
    assert [file.parent.name for file in dls.valid_ds.items] == classes(dls.valid_ds)


def test_home_is_found(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    make_folder(tmp_path / "colours")
    assert load_data("~/colours", bs=4, size=8, device="cpu").train_ds.name == "colours"


@pytest.mark.parametrize("size", [100_000, 10_000_000])
def test_images_that_memory_cannot_hold_are_refused_before_they_are_made(size):
    with pytest.raises(UserError, match=f"GB at {size} pixels, .* give a smaller --set data.size"):
        load_splits("digits", size)["train"]
