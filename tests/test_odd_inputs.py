"""Data sets as people really have them: with logs and links among the images, mixed ranges of pixels, odd tables."""

import io
import os
import tarfile
import unicodedata
import zipfile

import numpy as np
import pytest
from PIL import Image

from dms_fastai import UserError, load_data
from dms_fastai.data.images import read_image
from dms_fastai.data.sources import load_splits, split_by_class
from dms_fastai.evaluate import evaluate_model
from dms_fastai.export import predict_files
from dms_fastai.runs.lock import locked
from tests.test_data import COLOURS, make_folder, make_npz
from tests.test_own_folder import FEW, binary  # noqa: F401  (a fixture)
from tests.test_runs import dms  # noqa: F401  (a fixture)
from tests.test_sources import classes, colours, grey_folder, said, write_table

# Folders


@pytest.mark.parametrize("name", ["report.md", "run.json", "recipe.toml", "notes.log"])
def test_a_class_may_hold_notes(tmp_path, name):
    root = make_folder(tmp_path / "colours")
    (root / "train" / "red" / name).write_text("notes")
    splits = load_splits(root, 8)
    assert (len(splits["train"]), colours(splits["train"])) == (12, classes(splits["train"]))


def test_two_links_to_one_folder_are_two_classes_and_a_link_back_is_none(tmp_path):
    root = make_folder(tmp_path / "colours", ("train",)) / "train"
    (root / "crimson").symlink_to(root / "red")
    (root / "red" / "back").symlink_to(root)
    split = load_splits(root, 8)["train"]
    assert list(split.vocab) == ["blue", "crimson", "green", "red"]
    assert len(split) == 16


def test_what_lies_empty_beside_a_class_own_images_is_no_class(tmp_path):
    root = make_folder(tmp_path / "colours")
    (root / "train" / "red" / "thumbs").mkdir()
    (root / "train" / "@eaDir").mkdir()
    (root / "train" / "blue" / "@eaDir").mkdir()
    assert colours(load_splits(root, 8)["train"]) == ["blue"] * 4 + ["green"] * 4 + ["red"] * 4


def test_runs_side_by_side_in_the_folder_of_the_images(dms, binary, monkeypatch):  # noqa: F811
    """Their logs are there before any of their results."""
    monkeypatch.chdir(binary)
    code, _, err = dms("run", "se", "mixup", "--data", ".", "--at-once", 2, *FEW)
    assert (code, "holds no images" in err) == (0, False)
    (binary / "artifacts" / "binary" / "tune" / "se").mkdir(parents=True)
    (binary / "artifacts" / "binary" / "tune" / "se" / "trials.log").write_text("")
    with locked(binary / "artifacts" / "binary" / "kd" / "seed0"):  # as a run does before it opens its images
        assert len(load_splits(binary, 8)["train"]) == 24


def test_a_readme_beside_the_only_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("DMS_FASTAI_CACHE", str(tmp_path / "cache"))
    root = make_folder(tmp_path / "colours")
    with zipfile.ZipFile(tmp_path / "c.zip", "w") as opened:
        opened.writestr("README.txt", "of colours")
        for file in root.rglob("*.png"):
            opened.write(file, file.relative_to(tmp_path))
    splits = load_splits(tmp_path / "c.zip", 8)
    assert colours(splits["test"]) == classes(splits["test"])


def test_a_table_of_features_beside_images_is_not_their_data_set(tmp_path):
    root = make_folder(tmp_path / "colours")
    (root / "features-train.parquet").write_bytes(b"none of ours")
    assert len(load_splits(root, 8)["train"]) == 12


def test_holding_out_leaves_an_image_of_each_class():
    import torch

    taken, rest = split_by_class(torch.tensor([0, 1, 2, 2, 2, 2]), 0.8, seed=0)
    assert (taken.tolist(), sorted(rest.tolist())[:2], len(rest)) == ([i for i in range(2, 6) if i in taken], [0, 1], 3)


# Archives


def test_links_in_a_tar_are_what_they_lead_to(tmp_path, monkeypatch):
    monkeypatch.setenv("DMS_FASTAI_CACHE", str(tmp_path / "cache"))
    root = make_folder(tmp_path / "colours")
    (root / "train" / "red" / "0.png").unlink()
    os.link(root / "train" / "red" / "1.png", root / "train" / "red" / "0.png")
    (root / "train" / "red" / "s.png").symlink_to("1.png")
    (root / "train" / "red" / "away.png").symlink_to("/etc/hostname")
    with tarfile.open(tmp_path / "c.tar", "w") as opened:
        opened.add(root, "colours")
    splits, words = said(lambda: load_splits(tmp_path / "c.tar", 8))
    assert colours(splits["train"]).count("red") == 5
    assert "the link colours/train/red/away.png is skipped; tar -h packs what links lead to" in words


def test_links_in_a_zip_are_said(tmp_path, monkeypatch):
    monkeypatch.setenv("DMS_FASTAI_CACHE", str(tmp_path / "cache"))
    root = make_folder(tmp_path / "colours")
    with zipfile.ZipFile(tmp_path / "c.zip", "w") as opened:
        for file in root.rglob("*.png"):
            opened.write(file, file.relative_to(root))
        link = zipfile.ZipInfo("train/red/link.png")
        link.external_attr = 0o120777 << 16
        opened.writestr(link, "0.png")
    splits, words = said(lambda: load_splits(tmp_path / "c.zip", 8))
    assert "the link train/red/link.png is skipped" in words
    assert len(splits["train"]) == 12


# Pixels


@pytest.mark.parametrize(
    ("train", "test"),
    [
        (lambda x: x.astype(np.uint16) * 16, lambda x: x / 255),
        (lambda x: x.astype(np.float32), lambda x: x / 255),
        (lambda x: x / 255, lambda x: x.astype(np.float32)),
    ],
)
def test_splits_in_different_ranges_are_refused(tmp_path, train, test):
    with np.load(make_npz(tmp_path / "x.npz")) as arrays:
        changes = {"train_images": train(arrays["train_images"]), "test_images": test(arrays["test_images"])}
    with pytest.raises(UserError, match=r"test_images: pixels run to about .*; give one range"):
        load_data(make_npz(tmp_path / "y.npz", **changes), device="cpu")


def test_whole_numbers_beside_shares_are_what_they_were(tmp_path):
    with np.load(make_npz(tmp_path / "x.npz")) as arrays:
        plain = arrays["test_images"]
        changes = {"train_images": arrays["train_images"] / 255, "test_images": plain.astype(np.int32)}
    dls = load_data(make_npz(tmp_path / "y.npz", **changes), device="cpu")
    assert (dls.valid_ds.images.permute(0, 2, 3, 1).numpy() == plain).all()


def test_pixels_that_are_clipped_are_said(tmp_path):
    root = grey_folder(tmp_path / "grey", (4000, 3000))
    (root / "train").rename(root / "test")
    grey_folder(root, (900, 700))
    _, words = said(lambda: load_data(root, bs=2, size=8, device="cpu"))
    assert "pixels above 1023, which is white in train, become white in 2 images, such as a/0.png" in words
    images = {"train_images": np.full((4, 8, 8), 900, np.uint16), "test_images": np.full((4, 8, 8), 4000, np.uint16)}
    labels = {"train_labels": np.arange(4) % 2, "test_labels": np.arange(4) % 2}
    _, words = said(lambda: load_data(make_npz(tmp_path / "y.npz", **images, **labels), device="cpu"))
    assert "test_images: pixels above 1023 become white, as it is white in train" in words


def test_transparency_of_sixteen_bits_and_of_a_palette_is_white(tmp_path):
    grey = np.zeros((8, 8), np.uint16)
    grey[:, 4:] = 40_000
    Image.fromarray(grey).save(tmp_path / "grey.png", transparency=0)
    found = read_image(tmp_path / "grey.png")
    assert (found[0, 0, 0], found[0, 0, 7]) == (255, 40_000 >> 8)
    coloured = Image.new("RGB", (8, 8), (3, 3, 3))
    coloured.info["transparency"] = (1000, 1000, 1000)  # as Pillow gives it of 16 bits a channel
    assert read_image(coloured).unique().tolist() == [255]
    clear = Image.new("RGBA", (8, 8), (9, 9, 9, 0)).quantize(4)
    assert read_image(clear).unique().tolist() == [255]


def test_an_array_of_no_images_at_all(tmp_path):
    with pytest.raises(UserError, match="train_images"):
        load_data(make_npz(tmp_path / "x.npz", train_images=np.array(3)))


# Labels


def test_labels_that_are_one_in_composed_letters(tmp_path):
    both = ["e\u0301", "\u00e9", "a", "b", "a", "b"]
    file = make_npz(tmp_path / "x.npz", train_labels=np.array(both * 5), test_labels=np.array(both[:3] * 3))
    dls = load_data(file, device="cpu")
    assert list(dls.vocab) == ["a", "b", "\u00e9"]
    assert dls.train_ds.counts.tolist() == [10, 10, 10]


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        (["file,label", "0.png,cat, black", "1.png,dog"], "line 2: the row is longer than the first; use quotes"),
        (["file,label,label", "0.png,a,b", "1.png,b,a"], "has the column 'label' more than once"),
    ],
)
def test_tables_that_would_be_read_wrong(tmp_path, lines, words):
    make_folder(tmp_path / "colours")
    (tmp_path / "t.csv").write_text("\n".join(lines))
    with pytest.raises(UserError, match=words):
        load_splits(tmp_path / "colours", 8, labels=tmp_path / "t.csv")


def test_blanks_and_empty_columns_in_a_table(tmp_path):
    root = make_folder(tmp_path / "colours", ("train",))
    lines = ["id, label"] + [f'train/{name}/{i}, "{name}, x",' for name in COLOURS for i in range(4)]
    (tmp_path / "t.csv").write_text("\n".join(lines))
    split = load_splits(root, 8, labels=tmp_path / "t.csv")["train"]
    assert [name.removesuffix(", x") for name in classes(split)] == colours(split)


def test_a_table_finds_files_however_their_letters_are_composed(tmp_path):
    (tmp_path / "d").mkdir()
    names = {unicodedata.normalize("NFD", f"\u00e9{i}.png"): f"\u00e9{i}.png" for i in range(4)}
    for name in names:
        Image.new("RGB", (8, 8)).save(tmp_path / "d" / name)
    table = write_table(tmp_path / "t.csv", [(name, "ab"[i % 2]) for i, name in enumerate(names.values())])
    assert len(load_splits(tmp_path / "d", 8, labels=table)["train"]) == 4


def write_parquet(file, labels):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    content = io.BytesIO()
    Image.new("RGB", (8, 8)).save(content, "PNG")
    file.parent.mkdir(parents=True, exist_ok=True)
    images = pyarrow.array([{"bytes": content.getvalue()}] * len(labels))
    parquet.write_table(pyarrow.table({"image": images, "label": pyarrow.array(labels)}), file)


@pytest.mark.parametrize("labels", [[0.0, 1.0, 1.0, 0.0], [False, True, True, False], [0, 1, 1, 0], [-1, 0, 1, 1, 0]])
def test_labels_of_any_type_in_parquet(tmp_path, monkeypatch, labels):
    monkeypatch.setenv("DMS_FASTAI_CACHE", str(tmp_path / "cache"))
    write_parquet(tmp_path / "d" / "train-0.parquet", labels)
    write_parquet(tmp_path / "d" / "._train-0.parquet", labels)
    write_parquet(tmp_path / "d" / "test-0.parquet", [0, 1])
    splits = load_splits(tmp_path / "d", 8)
    assert classes(splits["train"]) == ["0", "1", "1", "0"]
    assert classes(splits["test"]) == ["0", "1"]


def test_parquet_that_is_no_single_data_set(tmp_path, monkeypatch):
    monkeypatch.setenv("DMS_FASTAI_CACHE", str(tmp_path / "cache"))
    write_parquet(tmp_path / "d" / "full" / "train-0.parquet", [0, 1])
    write_parquet(tmp_path / "d" / "small" / "train-0.parquet", [0, 1])
    with pytest.raises(UserError, match=r"full and .*small both have parquet files of 'train'"):
        load_splits(tmp_path / "d", 8)
    write_parquet(tmp_path / "e" / "train-0.parquet", [[0], [1]])
    with pytest.raises(UserError, match=r"has the label \[0\]; give text or a whole number"):
        load_splits(tmp_path / "e", 8)


@pytest.mark.parametrize("head", ["sep=;\r\n", "\r\n\r\n", ";;\n", "SEP=;\n\n"])
def test_what_spreadsheets_write_before_the_columns(tmp_path, head):
    root = make_folder(tmp_path / "colours")
    files = sorted((root / "train").rglob("*.png"))
    rows = "".join(f"{file.parent.name};train\\{file.parent.name}\\{file.name}\r\n" for file in files)
    table = tmp_path / "t.csv"
    table.write_bytes((head + "label;file, as exported;file\r\n").encode() + rows.replace(";", ";x, y;").encode())
    train = load_splits(root, 8, labels=table)["train"]
    assert colours(train) == classes(train)
    assert len(train) == len(files)
    table.write_bytes((head + "label;file\r\n" + rows + "red\r\n").encode())
    with pytest.raises(UserError, match=rf"t.csv, line {head.count(chr(10)) + 1 + len(files) + 1}: the row is shorter"):
        load_splits(root, 8, labels=table)


def test_folders_in_a_zip_of_windows(tmp_path):
    root = make_folder(tmp_path / "colours")
    with zipfile.ZipFile(tmp_path / "c.zip", "w") as opened:
        for file in sorted(root.rglob("*.png")):
            opened.write(file, str(file.relative_to(root)).replace("/", "\\"))
    train = load_splits(tmp_path / "c.zip", 8)["train"]
    assert (len(train), colours(train)) == (12, classes(train))


# What a trained network is measured on


@pytest.fixture
def trained(dms, binary):  # noqa: F811
    assert dms("run", "se", "--data", "binary", *FEW)[0] == 0
    return binary.parent / "artifacts" / "binary" / "se" / "seed0"


def test_test_images_alone_are_enough_to_measure_on(dms, trained, binary):  # noqa: F811
    other = binary.parent / "other"
    other.mkdir()
    binary.rename(other / "test")
    code, out, _ = dms("evaluate", trained, "--data", other)
    assert (code, "of 24 images: other, test" in out) == (0, True)
    (other / "test" / "light").rename(other / "light")
    code, out, _ = dms("evaluate", trained, "--data", other)
    assert (code, "of 12 images: other, test" in out) == (0, True)
    table = write_table(other.parent / "t.csv", [("1.png", "dark", "test")], ("file", "label", "split"))
    code, out, _ = dms("evaluate", trained, "--data", other / "test" / "dark", "--labels", table)
    assert (code, "of 1 images: dark, test" in out) == (0, True)
    code, _, err = dms("run", "se", "--data", other, *FEW)
    assert (code, "has no folder 'train'" in err) == (2, True)
    code, _, err = dms("run", "kd", "--data", other, "--teacher", trained, *FEW)
    assert (code, "has no folder 'train'" in err) == (2, True)


def test_arrays_of_test_images_alone_are_enough_to_measure_on(dms, tmp_path):  # noqa: F811
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (24, 8, 8, 3), dtype=np.uint8), np.arange(24) % 3
    test = {"test_images": images, "test_labels": labels}
    np.savez(tmp_path / "all.npz", train_images=images, train_labels=labels, **test)
    assert dms("run", "se", "--data", "all.npz", *FEW)[0] == 0
    run, some = tmp_path / "artifacts" / "all" / "se" / "seed0", tmp_path / "some.npz"
    whole = {found.name: found.right for found in evaluate_model(run, tmp_path / "all.npz").classes}
    for kept in ([0, 1, 2], [0, 2], [2]):
        there = np.isin(labels, kept)
        np.savez(some, test_images=images[there], test_labels=labels[there])
        code, out, err = dms("evaluate", run, "--data", some)
        assert (code, f"of {8 * len(kept)} images: some, test" in out, err) == (0, True, "")
        found = evaluate_model(run, some).classes
        assert {each.name: each.right for each in found} == {str(label): whole[str(label)] for label in kept}
    code, _, err = dms("run", "se", "--data", some, *FEW)
    assert (code, "has no 'train_images'; it has test_images, test_labels" in err) == (2, True)
    np.savez(some, test_images=images, test_labels=labels + 1)
    code, _, err = dms("evaluate", run, "--data", some)
    assert (code, "'3'" in err) == (2, True)


def test_a_network_taught_on_images_without_labels_is_measured_on_those_with(dms, trained, binary):  # noqa: F811
    other = binary.parent / "other"
    (other / "train").mkdir(parents=True)
    for index, file in enumerate(sorted(binary.rglob("*.png"))):
        (other / "train" / f"{index}.png").write_bytes(file.read_bytes())
    code, _, err = dms("evaluate", trained, "--data", other, "--split", "train")
    assert (code, "has no labels in its split 'train'; give --labels with a table of them" in err) == (2, True)
    binary.rename(other / "test")
    code, out, _ = dms("evaluate", trained, "--data", other)
    assert (code, "of 24 images: other, test" in out) == (0, True)
    pytest.importorskip("onnxruntime")
    weights = (trained / "model.safetensors").rename(other.parent / "w.safetensors")  # apart from what it has held out
    code, _, err = dms("export", weights, "a.int8.onnx", "--data", other, "--tolerance", 100)
    assert code == 0, err
    assert dms("bench", "a.int8.onnx", "--data", other)[0] == 0


def test_predicting_one_file_takes_its_path(trained, binary):  # noqa: F811
    file = next(binary.rglob("*.png"))
    assert predict_files(trained, str(file))[1].shape == (1, 2)
    assert predict_files(trained, file)[1].shape == (1, 2)


def test_means_that_are_not_three(binary):  # noqa: F811
    for given in ({"mean": (0.5, 0.5)}, {"std": (0, 0, 0)}):
        with pytest.raises(UserError, match="give three numbers of each, those of std above 0"):
            load_data(binary, valid=0.25, **given)
