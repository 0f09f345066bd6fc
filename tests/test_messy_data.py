"""Folders, tables and deep pixels that could be taken for others: read right, or refused, and never in silence."""

import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dms_fastai import UserError, load_data
from dms_fastai.data import decoded
from dms_fastai.data.images import read_image, read_pixels
from dms_fastai.data.sources import load_splits
from dms_fastai.evaluate import split_images
from dms_fastai.export.calibrate import sets_of
from dms_fastai.models.card import ModelCard
from dms_fastai.models.dmsresnet import MEAN, STD
from dms_fastai.models.weights import load_weights
from dms_fastai.predict import image_files
from tests.test_data import COLOURS, make_folder, make_npz
from tests.test_own_folder import FEW
from tests.test_runs import dms  # noqa: F401  (a fixture)
from tests.test_sources import classes, colours, grey_folder, said, write_table


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DMS_FASTAI_CACHE", str(tmp_path / "cache"))


def put(root, *files, pixels=None):
    """Image files; grey of one value each, if these are given."""
    for index, file in enumerate(files):
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        value = 10 * index if pixels is None else pixels[index]
        kind = np.uint8 if value < 256 and isinstance(value, int) else np.uint16
        Image.fromarray(np.full((8, 8), value, kind)).save(root / file)
    return root


def card(*vocab, white=None):
    return ModelCard("test_dmsresnet", list(vocab), MEAN, STD, (3, 8, 8), white=white)


# Splits and classes


def test_a_class_that_is_called_as_a_split_is(tmp_path):
    root = put(tmp_path / "v", *(f"{name}/{i}.png" for name in ("bus", "car", "train") for i in range(3)))
    hint = "if 'train' and 'bus' are classes, put all of them into one folder, train/"
    with pytest.raises(UserError, match=hint):
        load_data(root, size=8, classes=["bus", "car", "train"])
    with pytest.raises(UserError, match=hint):
        load_data(root, size=8)
    root = put(tmp_path / "w", "valid/0.png", "invalid/0.png")
    with pytest.raises(UserError, match=r"no folder 'train'.*; if 'valid' and 'invalid' are classes"):
        load_data(root, size=8)
    root = put(tmp_path / "u", "train/0.png", "train/1.png", "scans/0.png")
    assert len(load_data(root, size=8, bs=1, valid=0.5, classes=["a", "b"]).train_ds) == 1, "train/ has no labels"


def test_classes_lie_as_deep_in_test_as_in_train(tmp_path):
    root = put(tmp_path / "c", "train/animals/cat/0.png", "train/animals/dog/0.png", "test/animals/cat/1.png")
    test = load_splits(root, 8)["test"]
    assert classes(test) == ["cat"]
    root = put(tmp_path / "d", "train/cat/2020/0.png", "train/dog/2020/0.png", *(f"test/cat/{y}/0.png" for y in "12"))
    assert classes(load_splits(root, 8)["test"]) == ["cat", "cat"]


@pytest.mark.parametrize("inside", ["test", "colours"])
def test_a_zip_is_read_as_its_folder(tmp_path, inside):
    root = make_folder(tmp_path / "colours", ("test",))
    with zipfile.ZipFile(tmp_path / "c.zip", "w") as opened:
        for file in root.rglob("*.png"):
            opened.write(file, file.relative_to(root if inside == "test" else tmp_path))
    test = split_images(tmp_path / "c.zip", None, None, card(*COLOURS))
    assert (test.split, colours(test)) == ("test", classes(test))


def test_a_zip_of_one_class_is_read_as_its_folder(tmp_path):
    put(tmp_path, "a/0.png", "a/1.png")
    shutil.make_archive(tmp_path / "z", "zip", tmp_path, "a")
    assert classes(split_images(tmp_path / "z.zip", "train", None, card("a", "b"))) == ["a", "a"]


def test_an_image_beside_the_folders_of_a_zip_is_no_class(tmp_path):
    make_folder(tmp_path / "in" / "colours")
    put(tmp_path / "in" / "colours", "cover.png")
    shutil.make_archive(tmp_path / "c", "zip", tmp_path / "in")
    assert len(load_splits(tmp_path / "c.zip", 8)["train"]) == 12
    assert len(split_images(tmp_path / "c.zip", None, None, card(*COLOURS))) == 12
    shutil.rmtree(tmp_path / "in")
    put(tmp_path / "in", "photos/0.png", "photos/1.png")
    shutil.make_archive(tmp_path / "p", "zip", tmp_path / "in")
    flat = load_splits(tmp_path / "p.zip", 8, classes=["a", "b"])["train"]
    assert (flat.files, flat.labelled) == (["0.png", "1.png"], 0)


def test_images_without_labels_come_once(tmp_path):
    root = put(tmp_path / "e", "0.png", "1.png", "2.png", "unlabelled/3.png", "unlabelled/4.png")
    (root / "unlabelled" / "5.heic").touch()
    splits = load_splits(root, 8, classes=["a", "b"])
    assert splits["train"].files == ["0.png", "1.png", "2.png"]
    unlabelled, words = said(lambda: splits["unlabelled"])
    assert unlabelled.files == ["3.png", "4.png"]
    assert "1 file skipped, because Pillow does not read such files here: .heic (1)" in words


def test_predict_passes_over_what_training_does(tmp_path):
    put(tmp_path / "p", "cat/1.png", "cat/@eaDir/1.png/THUMB.png", "__MACOSX/cat/2.png")
    assert list(image_files([str(tmp_path / "p")])) == [tmp_path / "p" / "cat" / "1.png"]


def test_long_names_are_cached(tmp_path):
    root = put(tmp_path / ("p" * 200) / ("q" * 200), "train/a/0.png", "train/b/0.png")
    assert len(load_splits(root, 8)["train"]) == 2
    assert list((tmp_path / "cache").glob("*.pixels"))


def test_an_archive_that_nowhere_can_be_unpacked(tmp_path, monkeypatch):
    make_folder(tmp_path / "colours")
    shutil.make_archive(tmp_path / "c", "zip", tmp_path / "colours")
    monkeypatch.setenv("DMS_FASTAI_CACHE", "/proc/nowhere")
    with pytest.raises(UserError, match=r"c.zip cannot be unpacked into /proc/nowhere .*set DMS_FASTAI_CACHE"):
        load_splits(tmp_path / "c.zip", 8)


# Tables


def test_rows_that_mean_other_files_of_a_name_are_refused(tmp_path):
    root = put(tmp_path / "g", "1.png", "2.png")
    table = write_table(tmp_path / "t.csv", [("a/1.png", "cat"), ("b/1.png", "cat"), ("a/2.png", "dog")])
    with pytest.raises(UserError, match=r"line 3: b/1.png is .*g/1.png, and so is a/1.png in a line before"):
        load_splits(root, 8, table)
    again = write_table(tmp_path / "t.csv", [("a/1.png", "cat"), ("1", "cat"), ("x\\a\\1.png", "cat"), ("2", "dog")])
    assert load_splits(root, 8, again)["train"].files == ["1.png", "2.png"]


def test_rows_of_test_images_do_not_label_training_images(tmp_path):
    root = put(tmp_path / "s", "train/1.png", "train/2.png")
    table = write_table(tmp_path / "t.csv", [("test/1.png", "cat"), ("test/2.png", "dog")])
    with pytest.raises(UserError, match=r"line 2: .*train has no image 'test/1.png'"):
        load_splits(root / "train", 8, table)
    both = write_table(tmp_path / "t.csv", [("s/train/1.png", "cat"), ("s/train/2.png", "dog")])
    assert classes(load_splits(root / "train", 8, both)["train"]) == ["cat", "dog"]


def test_a_column_that_counts_rows_is_not_taken_for_files(tmp_path):
    root = put(tmp_path / "h", *(f"{index}.png" for index in range(4)))
    rows = [(index, f"{3 - index}.png", "cat" if index < 2 else "dog") for index in range(4)]
    read = load_splits(root, 8, write_table(tmp_path / "t.csv", rows, ("id", "image_name", "label")))["train"]
    assert dict(zip(read.files, classes(read), strict=True)) == {f"{3 - i}.png": label for i, _, label in rows}
    with pytest.raises(UserError, match=r"'0' in the column 'id' and '3\.png' in 'photo'; call the right one 'file'"):
        load_splits(root, 8, write_table(tmp_path / "t.csv", rows, ("id", "photo", "label")))
    numbers = [(i, 3 - i, y) for i, _, y in rows]  # of which each is an image's name without its ending
    few = load_splits(root, 8, write_table(tmp_path / "t.csv", numbers, ("id", "fold", "y")))
    assert classes(few["train"]) == ["cat", "cat", "dog", "dog"]


def test_labels_that_say_that_there_is_none(tmp_path):
    root = put(tmp_path / "n", *(f"{index}.png" for index in range(4)))
    rows = [("0", "NaN"), ("1", "dog"), ("2", "nan"), ("3", "cat"), (" ", "")]
    splits, words = said(lambda: load_splits(root, 8, write_table(tmp_path / "t.csv", rows)))
    assert "line 2: 'NaN' is taken for the name of a class, in 2 rows in all" in words
    assert len(splits["train"]) == 4, "a blank row is none"


def test_labels_that_are_no_whole_numbers(tmp_path):
    labels = np.arange(30) % 3 / 2
    with pytest.raises(UserError, match=r"float64 \(30,\), with NaN or fractions; give whole numbers"):
        load_splits(make_npz(tmp_path / "a.npz", train_labels=labels))["train"]


# What a trained network is measured on


def test_the_table_of_a_run_does_not_label_other_images(dms, tmp_path):  # noqa: F811
    """They are in another folder of the same name."""
    put(tmp_path / "a" / "images", *(f"{i}.png" for i in range(8)))
    put(tmp_path / "b" / "images", *(f"train/{'dark' if i % 2 else 'light'}/{i}.png" for i in range(8)))
    table = write_table(tmp_path / "a.csv", [(f"{i}.png", "light" if i % 2 else "dark") for i in range(8)])
    assert dms("run", "se", "--data", "a/images", "--labels", table, "--set", "data.size=8", *FEW)[0] == 0
    run = Path("artifacts/images/se/seed0")
    code, out, err = dms("evaluate", run, "--data", "a/images", "--split", "train")
    assert (code, "the run was trained on images of images" in err) == (0, True)
    right = float(out.split("accuracy: ")[1].split(" %")[0])
    code, out, err = dms("evaluate", run, "--data", "b/images", "--split", "train")
    assert (code, "the run was trained" in err) == (0, False)
    assert float(out.split("accuracy: ")[1].split(" %")[0]) == pytest.approx(100 - right)
    own = load_weights(run / "model.safetensors")[1]
    for data, dark in (("a/images", "0.png"), ("b/images", "1.png")):  # and so int8 is measured
        sets = sets_of(run, own, data, False)
        names = {Path(f).name: c for s in (sets.train, sets.valid) for f, c in zip(s.files, classes(s), strict=True)}
        assert (len(names), names[dark]) == (8, "dark")


def test_what_a_run_has_held_out_is_known_where_the_images_have_moved(dms, tmp_path):  # noqa: F811
    put(tmp_path / "a" / "images", *(f"{name}/{i}.png" for name in ("dark", "light") for i in range(8)))
    assert dms("run", "se", "--data", "a/images", "--set", "data.size=8", *FEW)[0] == 0
    shutil.move(tmp_path / "a", tmp_path / "b")
    code, out, _ = dms("evaluate", "artifacts/images/se/seed0", "--data", "b/images")
    assert (code, "of 4 images: images, held out" in out) == (0, True)
    put(tmp_path / "b" / "images", "dark/more.png", "dark/most.png")
    code, _, err = dms("evaluate", "artifacts/images/se/seed0", "--data", "b/images")
    assert (code, "neither test nor val images" in err) == (2, True)


def test_what_was_read_for_a_training_is_not_read_again(dms, tmp_path, monkeypatch):  # noqa: F811
    make_folder(tmp_path / "colours", size=(8, 8))
    read = []
    original = decoded._decode
    monkeypatch.setattr(decoded, "_decode", lambda listing, *a: read.append(listing.root.name) or original(listing, *a))
    args = ("run", "se", "--data", "colours", "--set", "data.size=8", *FEW[:-4])
    assert dms(*args)[0] == 0
    assert sorted(read) == ["test", "train"]
    run = "artifacts/colours/se/seed0"
    for split in ("test", "train"):
        assert dms("evaluate", run, "--data", "colours", "--split", split)[0] == 0
    assert dms(*args, "--seed", 1)[0] == 0
    assert len(read) == 2


def test_to_measure_on_test_images_no_others_are_read(tmp_path, monkeypatch):
    root = make_folder(tmp_path / "colours")
    (root / "train" / "red" / "0.png").write_text("no image")
    files = sorted(str(file.relative_to(tmp_path / "colours")) for file in root.rglob("*.png"))
    table = write_table(
        tmp_path / "t.csv", [(f, f.split("/")[1], f.split("/")[0]) for f in files], ("file", "y", "split")
    )
    read = []
    original = decoded._decode
    monkeypatch.setattr(
        decoded, "_decode", lambda listing, *a: read.append(len(listing.files)) or original(listing, *a)
    )
    for labels in (None, table):
        test = split_images(root, None, labels, card(*COLOURS))
        assert (test.split, colours(test)) == ("test", classes(test))
    assert read == [12, 12]
    with pytest.raises(UserError, match=r"red/0.png is not an image"):
        split_images(root, "train", None, card(*COLOURS))


@pytest.mark.parametrize(("white", "expected"), [(4095.0, [31, 56]), (None, [125, 225])])
def test_deep_pixels_are_measured_as_they_are_classified(tmp_path, white, expected):
    """500 and 900 of 4,095, or of 1,023, which is what each of the two suggests itself."""
    root = put(tmp_path / "y", "test/a/0.png", "test/b/0.png", pixels=[500, 900])
    test = split_images(root, None, None, card("a", "b", white=white))
    assert test.images[:, 0, 0, 0].tolist() == expected
    assert [int(read_pixels(file, (3, 8, 8), white)[0, 0, 0]) for file in test.items] == expected
    arrays = np.stack([np.full((8, 8), value, np.uint16) for value in (500, 900)])
    np.savez(tmp_path / "y.npz", test_images=arrays, test_labels=[0, 1], class_names=["a", "b"])
    assert (
        split_images(tmp_path / "y.npz", None, None, card("a", "b", white=white)).images[:, 0, 0, 0].tolist()
        == expected
    )


def test_deep_test_images_of_byte_training_images_are_scaled_alone(tmp_path):
    root = put(
        tmp_path / "x", "train/a/0.png", "train/b/0.png", "test/a/0.png", "test/b/0.png", pixels=[9, 200, 900, 60000]
    )
    splits = load_splits(root, 8)
    assert splits["train"].white is None
    test, words = said(lambda: splits["test"])
    assert test.images[:, 0, 0, 0].tolist() == [int(read_image(file, 8)[0, 0, 0]) for file in test.items] == [225, 234]
    assert "2 grey images of other pixels than bytes, which no training image has, are scaled by their own" in words
    assert load_splits(root, 8)["test"].images[:, 0, 0, 0].tolist() == [225, 234], "from the cache"


def test_what_goes_beyond_the_white_of_training_is_said(tmp_path):
    put(tmp_path, "z.png", pixels=[60000])
    pixels, words = said(lambda: read_pixels(tmp_path / "z.png", (3, 8, 8), 1023.0))
    assert (int(pixels.min()), "z.png: pixels above 1023 become white, as it is white in training" in words) == (
        255,
        True,
    )
    Image.fromarray(np.full((8, 8), 100, np.float32)).save(tmp_path / "f.tif")
    with pytest.raises(UserError, match=r"f.tif: pixels run to about 255, and those of training to 1; give one range"):
        read_pixels(tmp_path / "f.tif", (3, 8, 8), 1.0)
    with pytest.raises(UserError, match="give one range"):
        read_image(np.full((8, 8), 200, np.float32), 8, 1.0)
    mask = np.ones((9, 28, 28), bool)
    splits = load_splits(
        make_npz(tmp_path / "m.npz", train_images=np.full((30, 28, 28), 255, np.uint16), test_images=mask)
    )
    with pytest.raises(UserError, match="test_images: pixels run to about 1, and those of training to 255"):
        splits["test"]


def test_a_dark_image_in_decimal_numbers_is_none_of_another_range(tmp_path):
    root = grey_folder(tmp_path / "grey", (255.0, 128.0, 1.0, 0.5), 32)
    assert load_splits(root, 8)["train"].images.amax((1, 2, 3)).tolist() == [255, 1, 128, 0]
    assert read_image(np.full((8, 8), 0.9, np.float32), 8, 255.0).max() == 1
