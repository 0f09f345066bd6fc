"""Files that are damaged, dangerous or not what they say, and disks that fill: one clear line, and nothing lost."""

import errno
import os
import pickle
import re
import subprocess
import sys
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dms_fastai import DMSLoss, UserError, dms_learner, load_data, load_teacher
from dms_fastai.export import export_run, predict_files
from dms_fastai.run_folder import RunFolder
from dms_fastai.runs import checkpoint
from dms_fastai.runs.history import History
from tests.conftest import quiet
from tests.test_runs import dms, same_run, weights  # noqa: F401  (dms is a fixture)

try:
    import resource
except ImportError:  # Windows
    resource = None

SHORT = ("run", "mixup", "--device", "cpu", "--epochs", 3, "--set", "data.batch_size=256")


@pytest.fixture
def cut(dms, tmp_path):  # noqa: F811
    """The folder of a run that was stopped twice in the middle of epochs, and the same run from end to end."""
    assert dms(*SHORT, "--out", "whole")[0] == 0
    for _ in range(2):
        assert dms(*SHORT, "--out", "x", "--time-limit", "0.001s")[0] == 75
    return tmp_path / "x" / "mixup" / "seed0", tmp_path / "whole" / "mixup" / "seed0"


def damage(file, how):
    content = file.read_bytes()
    middle = len(content) // 2
    file.write_bytes(
        {
            "truncated": content[:middle],
            "one bit": content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :],
            "empty": b"",
        }[how]
    )


@pytest.mark.parametrize("how", ["truncated", "one bit", "empty"])
def test_a_damaged_checkpoint_gives_way_to_the_one_before(dms, cut, how):  # noqa: F811
    folder, whole = cut
    first, last = sorted((folder / "checkpoint").glob("*.pt"))
    damage(last, how)
    code, out, _ = dms(*SHORT, "--out", "x")
    assert code == 0
    assert f"{last.name} is damaged; resuming from the one before" in out
    assert "resuming after epoch 0 of 3, step 1" in out
    same_run(folder, whole)
    assert first != last


def test_a_damaged_checkpoint_is_not_kept_in_place_of_a_sound_one(dms, cut):  # noqa: F811
    folder, _ = cut
    _, last = sorted((folder / "checkpoint").glob("*.pt"))
    damage(last.rename(last.with_name(last.name.replace("-0000002-", "-0000004-"))), "one bit")
    assert dms(*SHORT, "--out", "x", "--time-limit", "0.001s")[0] == 75  # after step 2
    files = sorted((folder / "checkpoint").glob("*.pt"))
    assert len(files) == 2
    assert all(checkpoint.read(file) is not None for file in files)


def test_with_all_checkpoints_damaged_nothing_is_overwritten(dms, cut):  # noqa: F811
    folder, _ = cut
    for file in (folder / "checkpoint").glob("*.pt"):
        damage(file, "truncated")
    before = {p.name: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    code, _, err = dms(*SHORT, "--out", "x")
    assert code == 2
    assert "all checkpoints in" in err
    assert "--restart" in err
    assert {p.name: p.read_bytes() for p in folder.rglob("*") if p.is_file()} == before
    assert dms(*SHORT, "--out", "x", "--restart")[0] == 0


def test_a_checkpoint_of_another_recipe_is_refused(dms, cut, tmp_path):  # noqa: F811
    folder, _ = cut
    assert dms("run", "se", *SHORT[2:], "--out", "x", "--time-limit", "0.001s")[0] == 75
    for file in (tmp_path / "x" / "se" / "seed0" / "checkpoint").glob("*.pt"):
        file.rename(folder / "checkpoint" / file.name.replace("00000-", "00001-", 1))
    code, _, err = dms(*SHORT, "--out", "x")
    assert code == 2
    assert "belongs to a run of another recipe" in err


def test_a_checkpoint_with_code_inside_is_not_run(tmp_path, dls):
    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "exploded"),)

    content = pickle.dumps(Bomb(), protocol=2)
    file = tmp_path / f"00001-0000000-{checkpoint.digest(content)}.pt"
    file.write_bytes(content)
    with pytest.raises(Exception):  # noqa: B017, PT011  (whatever torch says of it)
        checkpoint.Checkpoint(tmp_path, History(tmp_path / "metrics.csv")).resume(dms_learner(dls, "se"))
    assert not (tmp_path / "exploded").exists()


def test_other_code_does_not_go_on_with_a_run(dms, cut, monkeypatch):  # noqa: F811
    folder, whole = cut
    with monkeypatch.context() as patch:
        patch.setattr("dms_fastai.runs.machine.metadata.version", lambda name: "0.0.1")
        code, _, err = dms(*SHORT, "--out", "x")
        assert code == 2
        assert "of other code" in err
        assert f"torch {torch.__version__.split('+')[0]}" in err
        assert "-> 0.0.1" in err
        assert dms(*SHORT, "--out", "whole")[0] == 0  # a finished run is only read
    assert dms(*SHORT, "--out", "x")[0] == 0
    same_run(folder, whole)


def test_a_changed_recipe_is_refused_in_the_first_epoch_too(dms, cut):  # noqa: F811
    code, _, err = dms(*SHORT, "--out", "x", "--set", "optimizer.lr=0.05")
    assert code == 2
    assert "optimizer.lr 0.1 -> 0.05" in err


def test_a_full_disk_keeps_the_last_checkpoint(dms, cut, monkeypatch):  # noqa: F811
    folder, whole = cut
    kept = {p.name: p.read_bytes() for p in (folder / "checkpoint").iterdir()}
    write, writes = Path.write_bytes, []

    def filling(self, content):
        if self.suffix == ".partial" and ".pt" in self.name:
            write(self, bytes(content)[:1000])
            writes.append(self)
            raise OSError(errno.ENOSPC, "No space left on device", str(self))
        return write(self, content)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", filling)
        code, _, err = dms(*SHORT, "--out", "x")
    assert writes
    assert code == 2
    assert "No space left on device" in err
    assert "the same command resumes" in err
    assert "Traceback" not in err
    assert {p.name: p.read_bytes() for p in (folder / "checkpoint").iterdir()} == kept
    assert dms(*SHORT, "--out", "x")[0] == 0
    same_run(folder, whole)


def test_a_loss_that_is_no_number_ends_the_run(dms, tmp_path):  # noqa: F811
    code, _, err = dms("run", "se", "--epochs", 3, "--out", "x", "--set", "optimizer.lr=1e30")
    assert code == 2
    assert "the loss is nan in epoch 1" in err
    assert "learning rate" in err
    assert "--set optimizer.lr=1e+29" in err
    folder = tmp_path / "x" / "se" / "seed0"
    assert not (folder / "model.safetensors").exists()
    assert not list(folder.rglob("*.pt"))
    assert "interrupted" in dms("report", "x")[1]


def test_a_loss_that_breaks_later_leaves_the_last_good_checkpoint(dms, tmp_path, monkeypatch):  # noqa: F811
    from dms_fastai.training.losses import DMSLoss

    forward, calls = DMSLoss.forward, []

    def breaking(self, pred, *targets, **kwargs):
        calls.append(1)
        return forward(self, pred, *targets, **kwargs) * (float("inf") if len(calls) > 40 else 1.0)

    with monkeypatch.context() as patch:
        patch.setattr(DMSLoss, "forward", breaking)
        code, _, err = dms("run", "se", "--epochs", 4, "--out", "x", "--checkpoint-steps", 5)
    assert code == 2
    assert "in epoch 2" in err
    assert dms("run", "se", "--epochs", 4, "--out", "x")[0] == 0
    assert dms("run", "se", "--epochs", 4, "--out", "y")[0] == 0
    same_run(tmp_path / "x" / "se" / "seed0", tmp_path / "y" / "se" / "seed0")


def test_too_little_memory_names_a_smaller_batch(dms, monkeypatch):  # noqa: F811
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")

    monkeypatch.setattr(DMSLoss, "forward", full)
    code, _, err = dms("run", "se", "--out", "x")
    assert code == 2
    assert "batches of 64 images do not fit" in err
    assert "data.batch_size=32" in err


# Pickles


@pytest.fixture
def exported(tmp_path, dls):
    learn = quiet(dms_learner(dls, "se"))
    learn.fit(1)
    folder = tmp_path / "run"
    folder.mkdir()
    export_run(learn, RunFolder(folder))
    return folder


def test_no_pickle_is_loaded_without_trust(dms, exported, tmp_path):  # noqa: F811
    alone = tmp_path / "alone.pkl"
    (exported / "learner.pkl").rename(alone)
    image = tmp_path / "p.png"
    Image.new("RGB", (8, 8)).save(image)
    for command in (("predict", alone, image), ("run", "kd", "--teacher", alone, "--epochs", 1, "--out", "x")):
        code, _, err = dms(*command)
        assert code == 2
        assert "is a pickle" in err
        assert "--trust-pickle" in err
        assert dms(*command, "--trust-pickle")[0] == 0
    with pytest.raises(UserError, match="is a pickle"):
        load_teacher(alone)
    assert load_teacher(alone, trust=True).vocab == [str(i) for i in range(10)]


def test_beside_a_pickle_the_weights_are_read_instead(exported, tmp_path, monkeypatch):
    image = tmp_path / "p.png"
    Image.new("RGB", (8, 8), "white").save(image)
    monkeypatch.setattr(pickle, "Unpickler", lambda *_: pytest.fail("unpickled"))
    monkeypatch.setattr("dms_fastai.trained.load.load_learner", lambda *_: pytest.fail("unpickled"))
    names, shares = predict_files(exported / "learner.pkl", [image])
    again, same = predict_files(exported, [image])
    assert names == again
    assert torch.equal(shares, same)
    assert load_teacher(exported / "learner.pkl").digest == load_teacher(exported).digest


def test_what_is_read_instead_of_a_pickle_is_said(dms, exported, tmp_path):  # noqa: F811
    Image.new("RGB", (8, 8)).save(tmp_path / "p.png")
    code, out, err = dms("predict", exported / "learner.pkl", tmp_path / "p.png")
    assert code == 0
    assert "p.png: " in out
    assert f"reading {exported / 'model.safetensors'} in place of learner.pkl" in err
    assert dms("predict", exported / "learner.pkl", tmp_path / "p.png", "--trust-pickle")[2] == ""


def test_a_pickle_of_something_else(tmp_path):
    file = tmp_path / "x.pkl"
    file.write_bytes(pickle.dumps({"not": "a learner"}))
    with pytest.raises(UserError, match="cannot be loaded as a fastai Learner"):
        load_teacher(file, trust=True)


# Data


def test_objects_in_an_npz_are_never_unpickled(dms, tmp_path):  # noqa: F811
    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "exploded"),)

    np.savez(tmp_path / "d.npz", train_images=np.array([Bomb()], dtype=object), train_labels=np.zeros(1, int))
    code, _, err = dms("run", "se", "--data", "d.npz")
    assert code == 2
    assert "cannot be read as an .npz file of plain arrays" in err
    assert not (tmp_path / "exploded").exists()


def image_folder(root, names=("a", "b")):
    for split, count in (("train", 3), ("test", 1)):
        for name in names:
            (root / split / name).mkdir(parents=True)
            for index in range(count):
                Image.new("RGB", (12, 12), (40 * index, 90, 10)).save(root / split / name / f"{index}.png")
    return root


def bomb(file):
    """A PNG of a few bytes that says it is 30,000 pixels square."""
    header = (30_000).to_bytes(4, "big") * 2 + bytes([1, 0, 0, 0, 0])
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(b"\0" * 100)), (b"IEND", b""))
    body = b"".join(len(d).to_bytes(4, "big") + k + d + zlib.crc32(k + d).to_bytes(4, "big") for k, d in chunks)
    file.write_bytes(b"\x89PNG\r\n\x1a\n" + body)


def broken(file):
    Image.effect_noise((64, 64), 50).save(file)
    file.write_bytes(file.read_bytes()[:800])


@pytest.mark.parametrize(
    "spoil",
    [
        broken,
        bomb,
        lambda file: file.write_bytes(b""),
        lambda file: file.write_text("not an image"),
        lambda file: file.symlink_to(file),
        lambda file: file.symlink_to(file.with_name("nowhere.png")),
    ],
    ids=["truncated", "bomb", "empty", "text", "loop", "nowhere"],
)
def test_a_bad_image_is_named(dms, tmp_path, spoil):  # noqa: F811
    root = image_folder(tmp_path / "images")
    spoil(root / "train" / "b" / "bad.png")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        code, _, err = dms("run", "se", "--data", root)
    assert code == 2
    assert str(root / "train" / "b" / "bad.png") in err
    assert "remove or replace it" in err
    assert err.count("\n") == 1


@pytest.mark.parametrize("kind", ["animated.gif", "cmyk.jpg", "deep.png", "palette.png", "mask.png", "ünï 漢字 🙂.png"])
def test_an_unusual_image_is_read(tmp_path, kind):
    root = image_folder(tmp_path / "images")
    file = root / "train" / "b" / kind
    if kind == "animated.gif":
        frames = [Image.new("P", (9, 9), i) for i in range(3)]
        frames[0].save(file, save_all=True, append_images=frames[1:])
    elif kind == "deep.png":
        Image.fromarray(np.full((9, 9), 40_000, np.uint16)).save(file)
    else:
        mode = {"cmyk.jpg": "CMYK", "palette.png": "P", "mask.png": "1"}.get(kind, "RGB")
        Image.new(mode, (9, 9)).save(file)
    assert len(load_data(root, size=8).train_ds) == 7


def test_links_to_folders_are_followed_and_loops_are_not(tmp_path):
    root = image_folder(tmp_path / "images")
    (root / "train" / "b" / "back").symlink_to(root / "train", target_is_directory=True)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    Image.new("RGB", (9, 9)).save(elsewhere / "c.png")
    for split in ("train", "test"):
        (root / split / "c").symlink_to(elsewhere, target_is_directory=True)
    dls = load_data(root, size=8)
    assert list(dls.vocab) == ["a", "b", "c"]
    assert len(dls.train_ds) == 7


def test_an_empty_class_is_named(dms, tmp_path):  # noqa: F811
    root = image_folder(tmp_path / "images")
    (root / "train" / "vide").mkdir()
    code, _, err = dms("run", "se", "--data", root)
    assert code == 2
    assert "vide holds no images; fill it or remove it" in err


@pytest.mark.skipif(resource is None, reason="this system has no limit on the size of a file")
def test_a_limit_on_files_names_the_file_and_what_is_finished_is_kept(tmp_path):
    command = [sys.executable, "-m", "dms_fastai", "run", "se", "--epochs", "1", "--set", "data.batch_size=512"]
    done = subprocess.run(
        command,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000)),
    )
    assert done.returncode == 2
    assert re.search(r"File too large: '\S+\.pt'; what was finished is kept: make room or raise", done.stderr)
    again = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
