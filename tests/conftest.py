"""What several tests share: digits in loaders, a trained teacher, and a cache folder of the session's own."""

import os

# What a test expects to the last digit is a CPU's; tests/test_gpu.py has what only a GPU can show, and says how.
if not os.environ.get("DMS_FASTAI_TEST_GPU"):
    os.environ["CUDA_VISIBLE_DEVICES"] = ""

import matplotlib
import pytest
import torch
from fastai.callback.progress import ProgressCallback
from hypothesis import settings

from dms_fastai import dms_learner, load_data

matplotlib.use("agg")

# The number of threads decides the last bits of a training; it is not to depend on what else the machine does.
os.environ.setdefault("OMP_NUM_THREADS", str(torch.get_num_threads()))

# The same examples in every run, so that a failure is the change's; `--hypothesis-profile=default` looks for new ones.
settings.load_profile("ci")


@pytest.fixture(autouse=True, scope="session")
def own_cache(tmp_path_factory):
    """Decoded folders go to a folder that ends with the session."""
    patch = pytest.MonkeyPatch()
    patch.setenv("DMS_FASTAI_CACHE", str(tmp_path_factory.mktemp("cache")))
    yield
    patch.undo()


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture
def dls():
    """The digits, 8x8, in batches of 64."""
    return load_data("digits", bs=64)


@pytest.fixture
def ahead(monkeypatch):
    """Augmentation goes the way that it goes on a GPU."""
    for name in ("data.operations", "callbacks.erasing"):
        monkeypatch.setattr(f"dms_fastai.{name}.runs_ahead", lambda device: True)


@pytest.fixture(params=["cpu", "ahead"])
def both_ways(request):
    """Augmentation as a CPU does it, and as a GPU does."""
    if request.param == "ahead":
        request.getfixturevalue("ahead")


@pytest.fixture(scope="session")
def teacher():
    """A Learner that has seen the digits for eight epochs: a teacher for tests that do not ask for a very good one."""
    torch.manual_seed(0)
    learn = quiet(dms_learner(load_data("digits", bs=64), "se"))
    learn.fit_recipe(epochs=8)
    return learn


def quiet(learn):
    """The Learner without its progress bar."""
    learn.remove_cb(ProgressCallback)
    learn.logger = print
    return learn
