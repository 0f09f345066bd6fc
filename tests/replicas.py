"""What test_processes.py trains in one process and in two: `torchrun --nproc-per-node 2 -m tests.replicas FOLDER`."""

import sys
import warnings
from pathlib import Path

import torch
from fastai.callback.core import Callback
from torch import distributed, nn

from dms_fastai import dms_learner, join_processes, load_data
from dms_fastai.random_states import seed_everything
from tests.conftest import quiet

SMALL = {"model.name": "test_dmsresnet", "model.drop_rate": 0.0, "bf16": False, "sync_bn": True}
CASES = {
    "plain": ("se", {"cutout.size": 0.25, "trivial_augment": True}),
    "taught, mixed": ("kd", {"mixup.per": "sample", "erasing.prob": 0.5}),
    "taught, kept answers": ("kd", {"fixed_views.count": 1}),
    "ema": ("kd", {"mixup": False, "mixup_or_cutmix.share": 0.5, "ema.decay": 0.9, "affine.shift": 0.1}),
    "sam": ("se", {"sam.rho": 0.05, "lookahead.k": 3, "clip.value": 0.1, "rand_augment.num_ops": 1}),
}
OWN = {"feature_distill.weight": 0.5, "model.drop_rate": 0.2, "sync_bn": False}  # draws and statistics of each process


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


def trained(recipe, settings, double=True):
    """The loss of each step of two epochs, what was recorded of them, and the weights at the end."""
    seed_everything(3)
    dls, losses, teacher = load_data("digits", bs=64, flip=0.5, alternate=True), Losses(), None
    dls.loaders[0] = dls.train.new(dls.train_ds.subset(torch.arange(400)))
    if recipe == "kd":
        teacher = dms_learner(dls, "se", settings=SMALL).model
        teacher = AnyType(teacher) if double else teacher
    learn = quiet(dms_learner(dls, recipe, teacher, settings=SMALL | settings, cbs=losses))
    if double:
        learn.model.double()  # as torch's default makes the images; in float64 the order of a sum matters little
        if recipe == "kd":
            learn.teacher_distill.teacher.model.double()
    learn.fit_recipe(2)
    weights = {name: value.clone() for name, value in learn.model.state_dict().items()}
    return {"losses": losses.seen, "values": [list(values) for values in learn.recorder.values], "weights": weights}


def main(folder):
    assert join_processes() == 2
    found = {name: trained(*case) for name, case in CASES.items()}
    torch.set_default_dtype(torch.float32)
    found["own"] = trained("kd", OWN, double=False)
    torch.save(found, folder / f"{distributed.get_rank()}.pt")


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_default_dtype(torch.float64)
    main(Path(sys.argv[1]))
