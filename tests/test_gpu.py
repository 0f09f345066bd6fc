"""What only a GPU can show: `DMS_FASTAI_TEST_GPU=1 pytest tests/test_gpu.py`, which takes two minutes on one."""

import copy
import io
import json

import pytest
import timm
import torch
from fastai.callback.core import Callback
from rich.console import Console
from torch._dynamo.utils import counters

from dms_fastai import dms_learner, load_data
from dms_fastai.runs.profile import StepProfile
from dms_fastai.training.optimizers import Muon, optimizer
from tests.conftest import quiet
from tests.test_runs import dms, same_run  # noqa: F401  (a fixture)

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")

COMPILED = {"compile.steps": 0}
EVERYTHING = {"optimizer.sam": 0.05, "ema.decay": 0.99, "cutmix.share": 0.5, "augment.trivial": True}


class Strict(Callback):
    """Raises an error where a step of a warm epoch waits for the GPU."""

    order, run_valid = 2000, False

    def after_batch(self):
        inside = 10 < self.learn.iter < len(self.learn.dls.train) - 2
        torch.cuda.set_sync_debug_mode("error" if inside else "default")

    def after_train(self):
        torch.cuda.set_sync_debug_mode("default")


@pytest.fixture
def digits():
    yield load_data("digits", bs=64, device="cuda")
    torch.cuda.set_sync_debug_mode("default")


def learner(digits, recipe, teacher=None, **settings):
    torch.manual_seed(0)
    return quiet(dms_learner(digits, recipe, teacher=teacher, settings=settings))


def losses(learn, epochs=2, cbs=None):
    learn.fit_recipe(epochs, cbs=cbs)
    return torch.stack([loss.cpu() for loss in learn.recorder.losses])


@pytest.mark.parametrize("compiled", [{"compile": False}, COMPILED])
@pytest.mark.parametrize("more", [{}, EVERYTHING])
def test_a_training_epoch_never_waits_for_a_gpu(digits, teacher, compiled, more):
    assert losses(learner(digits, "kd", teacher, **compiled, **more), cbs=Strict()).isfinite().all()


@pytest.mark.parametrize("graphs", [True, False])
@pytest.mark.parametrize("recipe", ["se", "kd"])
def test_compiled_training_is_eager_training(digits, teacher, recipe, graphs):
    """The first steps; later ones drift apart as any two orders of adding up do."""
    settings = {"model.drop_rate": 0.0, "optimizer.lr": 0.01}
    taught = teacher if recipe == "kd" else None
    eager = losses(learner(digits, recipe, taught, compile=False, **settings))
    counters.clear()
    compiled = losses(learner(digits, recipe, taught, **COMPILED, **settings, **{"compile.graphs": graphs}))
    assert counters["stats"]["unique_graphs"] >= 2
    assert not counters["graph_break"]
    torch.testing.assert_close(compiled, eager, rtol=0.02, atol=1e-3)


def test_smaller_images_are_compiled_too(digits):
    settings = {
        "progressive_resize.smallest": 0.5,
        "progressive_resize.grow_at": 0.0,
        "progressive_resize.full_at": 0.5,
    }
    assert losses(learner(digits, "fast", **COMPILED, **settings)).isfinite().all()


def test_matrices_that_move_together_move_as_on_a_cpu():
    """Muon has a way of its own on a GPU, where bf16's sums have another order, too."""
    torch.manual_seed(0)
    here = timm.create_model("dmsresnet_mini")
    there = copy.deepcopy(here).cuda()
    settings = Muon(lr=0.06, weight_decay=0.05, momentum=0.9)
    opts = [optimizer(list(net.parameters()), 0.06, settings) for net in (here, there)]
    for _ in range(3):
        for p, q in zip(here.parameters(), there.parameters(), strict=True):
            p.grad = torch.randn(p.shape)
            q.grad = p.grad.cuda()
        for opt in opts:
            opt.step()
    for p, q in zip(here.parameters(), there.parameters(), strict=True):
        torch.testing.assert_close(q.cpu(), p, rtol=0.02, atol=2e-3)


def test_a_stopped_run_ends_as_one_without_interruption(dms, tmp_path):  # noqa: F811
    run = ["run", "fast", "--data", "digits", "--epochs", 3, "--deterministic", "--device", "cuda"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert dms(*run, "--out", whole)[0] == 0
    assert dms(*run, "--out", parts, "--time-limit", "0.1s", "--checkpoint-steps", 5)[0] == 75
    assert dms(*run, "--out", parts)[0] == 0
    same_run(whole / "fast" / "seed0", parts / "fast" / "seed0")


def test_a_gpu_is_no_busier_than_the_step_is_long(digits, teacher, tmp_path):
    with StepProfile(tmp_path, Console(file=io.StringIO())) as profile:
        learner(digits, "kd", teacher).fit(2, cbs=profile.edges)
    facts = json.loads((tmp_path / "step.json").read_text())
    assert 0 < facts["gpu_busy_milliseconds"] < sum(facts["milliseconds"].values())
