"""A folder of classes and nothing else: what has been held out is what is measured, wherever the command is given."""

import shutil

import numpy as np
import pytest
from PIL import Image

from dms_fastai.run_folder import RunFolder
from tests.test_runs import dms  # noqa: F401  (a fixture)

FEW = ("--arch", "test_dmsresnet", "--epochs", 1, "--device", "cpu")
FEW += tuple(word for key in ("data.valid=0.25", "data.batch_size=8") for word in ("--set", key))


@pytest.fixture
def binary(tmp_path):
    """Two classes of twelve images."""
    random = np.random.default_rng(0)
    for name in ("dark", "light"):
        (tmp_path / "binary" / name).mkdir(parents=True)
        for index in range(12):
            pixels = random.integers(0, 128, (8, 8, 3)) + 127 * (name == "light")
            Image.fromarray(pixels.astype(np.uint8)).save(tmp_path / "binary" / name / f"{index}.png")
    return tmp_path / "binary"


def test_a_run_is_evaluated_on_what_it_has_held_out(dms, binary):  # noqa: F811
    assert dms("run", "se", "--data", "binary", *FEW)[0] == 0
    run = RunFolder(binary.parent / "artifacts" / "binary" / "se" / "seed0")
    code, out, _ = dms("evaluate", run.path, "--data", "binary")
    last = run.rows()[-1]
    assert code == 0
    said = f"accuracy: {100 * last['valid_accuracy']:.2f} %, loss: {last['valid_loss']:.4f}"
    assert f"{said}, of 6 images: binary, held out" in out
    code, _, err = dms("evaluate", run.path, "--data", "binary", "--split", "train")
    assert (code, "trained on images of binary, train: that flatters it" in err) == (0, True)
    code, _, err = dms("export", run.path, "b.onnx")
    assert code == 0
    code, _, err = dms("bench", "b.onnx", "--data", "binary")
    assert (code, "binary has neither test nor val images; with evaluate, --split train" in err) == (2, True)
    shutil.copytree(binary, binary.parent / "other")
    code, out, _ = dms("evaluate", run.path, "--data", "other")  # the same images, of which it has held out the same
    assert (code, "of 6 images: other, held out" in out) == (0, True)
    shutil.copy(binary / "dark" / "0.png", binary.parent / "other" / "dark" / "more.png")
    code, _, err = dms("evaluate", run.path, "--data", "other")
    assert (code, "other has neither test nor val images" in err) == (2, True)


def test_images_that_are_there_twice_are_said_before_a_training(dms, tmp_path):  # noqa: F811
    random = np.random.default_rng(0)
    several = [Image.fromarray(random.integers(0, 256, (8, 8, 3), dtype=np.uint8)) for _ in range(8)]
    places = [f"train/{name}/{index}.png" for name in ("cat", "dog") for index in range(3)]
    places += ["test/cat/new.png", "test/dog/new.png"]
    copies = {"test/cat/copy.bmp": 1, "test/dog/copy.png": 0, "train/dog/copy.png": 2, "train/cat/copy.png": 0}
    for place, image in {
        **dict(zip(places, several, strict=True)),
        **{c: several[i] for c, i in copies.items()},
    }.items():
        file = tmp_path / "pets" / place
        file.parent.mkdir(parents=True, exist_ok=True)
        image.save(file)
    few = ("--arch", "test_dmsresnet", "--epochs", 1, "--set", "data.batch_size=4", "--set", "data.size=8")
    code, _, err = dms("run", "se", "--data", "pets", *few)
    assert code == 0
    trained, labels = (
        "pets: images to validate on that are training images, too: 2 of 4, such as pets/test/cat/copy.bmp, which is "
        "pets/train/cat/1.png; that flatters the accuracy",
        "pets: training images that are in another class, too: 1, such as pets/train/dog/copy.png, which is "
        "pets/train/cat/2.png",
    )
    assert trained in err
    assert labels in err
    code, _, err = dms("run", "se", "--data", "pets", *few)
    assert (code, "too: 2 of 4" in err) == (0, False)


def test_runs_and_reports_among_the_images_are_no_images(dms, binary, monkeypatch):  # noqa: F811
    monkeypatch.chdir(binary)
    assert dms("run", "se", "--data", ".", *FEW)[0] == 0
    assert dms("report")[0] == 0
    code, out, _ = dms("run", "se", "--data", ".", *FEW)
    assert (code, "epoch 1/1" in out) == (0, False)
    code, out, _ = dms("run", "se", "--data", ".", "--seed", 1, *FEW)
    facts = RunFolder(binary / "artifacts" / "binary" / "se" / "seed1").facts()
    assert (code, facts.classes, facts.training_images) == (0, 2, 18)


def test_the_learner_that_is_named_last_is_the_one_that_was_asked_for(dms, tmp_path):  # noqa: F811
    given = ("--arch", "test_dmsresnet", "--epochs", 1, "--set", "teacher.model.name=test_dmsresnet", "--device", "cpu")
    code, out, _ = dms("run", "kd", "--compare", "--set", "data.batch_size=512", *given)
    assert code == 0
    assert (tmp_path / "artifacts" / "digits" / "kd-alone" / "seed0" / "learner.pkl").is_file()
    assert out.split()[-1] == "artifacts/digits/kd/seed0/learner.pkl"


def test_a_table_of_labels_that_has_moved_is_given_again(dms, binary):  # noqa: F811
    home = binary.parent
    (home / "pictures").mkdir()
    lines = ["image,label"]
    for file in sorted(binary.rglob("*.png")):
        name = f"{file.parent.name}-{file.name}"
        shutil.copy(file, home / "pictures" / name)
        lines.append(f"{name},{file.parent.name}")
    (home / "table.csv").write_text("\n".join(lines))
    assert dms("run", "se", "--data", "pictures", "--labels", "table.csv", *FEW)[0] == 0
    code, out, _ = dms("evaluate", "artifacts/pictures/se/seed0", "--data", "pictures")
    assert (code, "of 6 images: pictures, held out" in out) == (0, True)
    (home / "table.csv").rename(home / "moved.csv")
    command = ("export", "artifacts/pictures/se/seed0", "p.int8.onnx", "--data", "pictures", "--tolerance", 100)
    code, _, err = dms(*command)
    assert (code, "table.csv cannot be read" in err) == (2, True)
    assert dms(*command, "--labels", "moved.csv")[0] == 0
    with_test = [f"{line},{'test' if index % 2 else 'train'}" for index, line in enumerate(lines[1:])]
    (home / "splits.csv").write_text("\n".join(["image,label,split", *with_test]))
    assert dms("bench", "p.int8.onnx", "--data", "pictures", "--labels", "splits.csv")[0] == 0
    assert "give --data as well" in dms("bench", "p.int8.onnx", "--labels", "splits.csv")[2]
    assert "of 12 images" in dms("evaluate", "p.int8.onnx", "--data", "pictures", "--labels", "splits.csv")[1]
    code, _, err = dms(*command[:2], "p.onnx", "--labels", "moved.csv")
    assert (code, "--labels is for int8, and p.onnx is not" in err) == (2, True)


def test_a_folder_that_is_called_as_a_data_set_is_said(dms, binary):  # noqa: F811
    binary.rename(binary.parent / "digits")
    code, out, err = dms("run", "se", "--data", "digits", "--dry-run", *FEW[:6])
    assert (code, "digits is the data set of that name; for the folder, give ./digits" in err) == (0, True)
    assert "1,438 training images" in out
    code, out, err = dms("run", "se", "--data", "./digits", "--dry-run", *FEW)
    assert (code, "of that name" in err, "18 training images" in out) == (0, False, True)


def test_splits_by_the_names_of_archives(dms, binary):  # noqa: F811
    for split in ("Training", "testing"):
        shutil.copytree(binary, binary.parent / "kaggle" / split)
    code, out, _ = dms("run", "se", "--data", "kaggle", *FEW[:6], "--dry-run")
    assert (code, "24 training images of 2 classes" in out, "24 to validate on (test)" in out) == (0, True, True)


def test_files_that_are_no_images_here_are_counted_where_images_are_classified(dms, binary):  # noqa: F811
    assert dms("run", "se", "--data", "binary", *FEW)[0] == 0
    (binary / "dark" / "phone.HEIC").write_bytes(b"...")
    code, _, err = dms("predict", "artifacts/binary/se/seed0", "binary/dark", "--csv", "p.csv")
    assert (code, "skipped, because Pillow does not read such files here: .heic (1)" in err) == (0, True)
    assert len((binary.parent / "p.csv").read_text().splitlines()) == 13


@pytest.mark.parametrize("encoding", ["utf-16", "utf-8-sig", "cp1252"])
def test_tables_as_spreadsheets_write_them(dms, binary, encoding):  # noqa: F811
    files = sorted(binary.rglob("*.png"))
    rows = [f"{file.relative_to(binary)}\t{'hell é' if file.parent.name == 'light' else 'dunkel'}" for file in files]
    table = binary.parent / "t.csv"
    table.write_bytes("\r\n".join(["file\tlabel", *rows]).encode(encoding))
    code, out, err = dms("run", "se", "--data", "binary", "--labels", table, *FEW, "--dry-run")
    if encoding == "cp1252":
        assert (code, "t.csv, line 14, is not in UTF-8; save it as CSV UTF-8" in err) == (2, True)
    else:
        assert (code, "18 training images of 2 classes" in out) == (0, True)
