"""Many runs: a command reads its data once, and `plan` gives its stages as commands of their own."""

import threading

import pytest
import torch
from PIL import Image

from dms_fastai.data import decoded, sets
from dms_fastai.data.imageset import ImageSet
from dms_fastai.runs import plan as plan_module
from tests.test_runs import dms  # noqa: F401  (a fixture)

TINY = ("--arch", "test_dmsresnet", "--set", "data.batch_size=256", "--epochs", 1, "--device", "cpu")
TINY_TEACHER = ("--set", "teacher.model.name=test_dmsresnet")


# Read once


@pytest.fixture
def images(tmp_path):
    """A folder of two classes, with images without labels."""
    for split, count in (("train/a", 8), ("train/b", 8), ("test/a", 2), ("test/b", 2), ("val/a", 2), ("unlabelled", 4)):
        for number in range(count):
            file = tmp_path / "images" / split / f"{number}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (8, 8), (20 * number + 20, 99, len(split))).save(file)
    return tmp_path / "images"


@pytest.fixture
def counted(monkeypatch):
    """How often data are opened, image files are listed and decoded, and images are hashed."""
    counts = dict.fromkeys(("load_splits", "_stamp", "_decode", "_digest"), 0)

    def count(owner, name):
        original = getattr(owner, name)

        def counting(*args, **kwargs):
            counts[name] += 1
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, name, counting)

    for owner in (sets, plan_module):
        count(owner, "load_splits")
    for owner, name in ((decoded, "_stamp"), (decoded, "_decode"), (ImageSet, "_digest")):
        count(owner, name)
    return counts


def test_a_command_reads_its_data_once_for_all_stages_and_seeds(dms, images, counted, tmp_path):  # noqa: F811
    more = (*TINY, "--data", images, "--set", "data.size=8")
    assert dms("run", "se", "kd", "--seeds", "0,1", *more, *TINY_TEACHER)[0] == 0
    # train, test and unlabelled: each is listed, decoded and hashed, and val, which nobody asks for, is not
    assert counted == {"load_splits": 1, "_stamp": 3, "_decode": 3, "_digest": 3}

    (tmp_path / "own.toml").write_text('extends = "se"\n[data]\nvalid = "val"\n')
    counted.update(dict.fromkeys(counted, 0))
    assert dms("run", "se", "own.toml", *more, "--out", "x")[0] == 0
    assert counted == {"load_splits": 1, "_stamp": 3, "_decode": 1, "_digest": 3}  # train, test and val


def test_processes_that_begin_together_decode_once(images, counted):
    """Threads stand for processes: the lock is on an open file, of which each has its own."""
    listing = decoded.Listing(images / "train", [f"a/{n}.png" for n in range(8)], [0] * 8, ["a"])
    found, begin = [], threading.Barrier(4)

    def read():
        begin.wait()
        found.append(decoded.decoded_image_set(listing, 8).images)

    threads = [threading.Thread(target=read) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert counted["_decode"] == 1
    assert len(found) == 4
    assert all(torch.equal(images, found[0]) for images in found)
