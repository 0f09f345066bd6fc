"""What test_processes.py trains in one process and in several: `torchrun -m tests.replicas FOLDER`."""

import sys
import warnings
from pathlib import Path

import torch
from torch import nn
from fastai.callback.core import Callback

from dms_fastai import dms_learner, join_processes, load_data
from dms_fastai.random_states import seed_everything
from tests.conftest import quiet

PLAIN = {"model.name": "test_dmsresnet", "model.drop_rate": 0.0, "bf16": False, "sync_bn": True}
CASES = {
    "plain": ("se", {"augment.alternate": True, "cutout.size": 0.25, "trivial_augment": True}),
    "mixed, taught": ("kd", {"mixup.per": "sample", "erasing.prob": 0.5}),
    "ema": ("kd", {"mixup": False, "mixup_or_cutmix.share": 0.5, "ema.decay": 0.9, "affine.shift": 0.1}),
    "sam": ("se", {"sam.rho": 0.05, "lookahead.k": 3, "clip.value": 0.1, "rand_augment.num_ops": 1}),
}


class Double(Callback):
    """float64 for all that is computed, in which the order of a sum matters little."""

    order = 1.4  # once the batch has been drawn

    def before_batch(self):
        self.learn.xb = tuple(x.double() for x in self.learn.xb)


class Losses(Callback):
    order, run_valid = 55, False

    def __init__(self):
        self.seen = []

    def after_batch(self):
        self.seen.append(self.learn.loss.item())


class AnyType(nn.Module):
    """A network that takes images of any type: `load_teacher` makes it one of float32, and tries it."""

    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, x):
        return self.network(x.to(next(self.parameters()).dtype))


def learner(recipe, settings, *cbs):
    seed_everything(3)
    dls = load_data("digits", bs=64)
    teacher = None
    if recipe == "kd":
        teacher = dms_learner(dls, "se", settings=PLAIN).model
        teacher = AnyType(teacher)
    learn = quiet(dms_learner(dls, recipe, teacher, settings=PLAIN | settings, cbs=[Double(), *cbs]))
    learn.model.double()
    if recipe == "kd":
        learn.teacher_distill.teacher.model.double()
    return learn


def trained(recipe, settings):
    """The loss of each of some steps, what was recorded of two epochs, and the weights at the end."""
    losses = Losses()
    learn = learner(recipe, settings, losses)
    learn.fit_recipe(2)
    weights = {name: value.clone() for name, value in learn.model.state_dict().items()}
    return {"losses": losses.seen, "values": [list(values) for values in learn.recorder.values], "weights": weights}


def main(folder):
    number = join_processes()
    assert number == 2
    rank = torch.distributed.get_rank()
    for name, (recipe, settings) in CASES.items():
        torch.save(trained(recipe, settings), folder / f"{name}-{rank}.pt")


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_default_dtype(torch.float64)
    main(Path(sys.argv[1]))
