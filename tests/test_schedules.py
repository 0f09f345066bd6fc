"""Each schedule against the arithmetic of torch, timm and fastai, and as a Learner follows it."""

import math
from itertools import accumulate

import matplotlib.pyplot as plt
import numpy as np
import pytest
import timm.scheduler
import torch
from fastai.callback.schedule import SchedCos

from dms_fastai import UserError, dms_learner, load_recipe
from dms_fastai.training.schedules import SCHEDULES, SGDR, FlatCosine, Step, WarmupCosine
from tests.conftest import quiet

CCT = WarmupCosine(310, warmup_epochs=10, warmup_lr=1e-5, lr_min=1e-5, cooldown_epochs=10, step="epoch")


def rate_of(schedule, lr=0.1):
    return schedule.hypers(lr, 0.9)["lr"]


def by_epoch(schedule, lr=0.1):
    """The learning rate in the first batch of each epoch."""
    return [rate_of(schedule, lr)(epoch / schedule.epochs) for epoch in range(schedule.epochs)]


def by_batch(schedule, steps, lr=0.1):
    """The learning rate in each batch, as fastai counts: anew in each epoch, and there by a sum."""
    rates = []
    for epoch in range(schedule.epochs):
        pct = epoch / schedule.epochs
        for _ in range(steps):
            rates.append(rate_of(schedule, lr)(pct))
            pct += 1.0 / (steps * schedule.epochs)
    return np.array(rates)


def of_torch(kind, epochs, *args, lr=0.1, **kwargs):
    """The learning rate in each epoch by one of torch's schedulers."""
    opt = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr)
    scheduler, rates = kind(opt, *args, **kwargs), []
    for _ in range(epochs):
        rates.append(opt.param_groups[0]["lr"])
        opt.step()
        scheduler.step()
    return rates


def test_warm_up_and_cool_down_are_those_of_cct():
    ours = by_epoch(CCT, 5.5e-4)
    warm = [1e-5 + t * 5.4e-5 for t in range(10)]
    curve = [1e-5 + (5.5e-4 - 1e-5) * (1 + math.cos(math.pi * t / 300)) / 2 for t in range(10, 300)]
    assert ours == pytest.approx([*warm, *curve, *[1e-5] * 10], rel=0, abs=1e-12)
    assert ours[10] == pytest.approx(5.485e-4, abs=5e-8)
    opt = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], 5.5e-4)
    theirs = timm.scheduler.CosineLRScheduler(opt, 300, lr_min=1e-5, warmup_t=10, warmup_lr_init=1e-5)
    assert ours == pytest.approx([theirs._get_lr(t)[0] for t in range(310)], rel=0, abs=1e-12)


def test_warm_up_by_the_batch():
    """Between two epochs of timm's, timm's own with the batch as its unit of time."""
    schedule, steps = WarmupCosine(12, warmup_epochs=3, warmup_lr=0.01, lr_min=0.002, cooldown_epochs=2), 7
    opt = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], 0.1)
    theirs = timm.scheduler.CosineLRScheduler(opt, 10 * steps, lr_min=0.002, warmup_t=3 * steps, warmup_lr_init=0.01)
    assert by_batch(schedule, steps) == pytest.approx([theirs._get_lr(t)[0] for t in range(12 * steps)], abs=1e-9)


def test_cycles_are_torchs_warm_restarts_and_come_again():
    """HCGNet's 1,260 epochs: six cycles of doubled length, twice."""
    cycles = (10, 20, 40, 80, 160, 320)
    half = of_torch(torch.optim.lr_scheduler.CosineAnnealingWarmRestarts, 630, 10, 2)
    for epochs in (630, 1260):
        ours = by_epoch(SGDR(epochs, cycles, "epoch"))
        assert ours == pytest.approx(half * (epochs // 630), rel=0, abs=1e-12)
    starts = [epoch for epoch, rate in enumerate(ours) if rate == 0.1]
    assert starts == [0, 10, 30, 70, 150, 310, 630, 640, 660, 700, 780, 940]
    assert ours[629] == ours[1259] == pytest.approx(2.4e-6, abs=5e-8)


@pytest.mark.parametrize("cycles", [(1, 2, 4), (7,), (3, 1)])
def test_a_restart_falls_on_an_epochs_first_batch_and_on_no_other(cycles):
    """Whatever a quotient or a sum has lost; the curve between is fastai's."""
    epochs, steps = 7 * sum(cycles), 37
    ours = by_batch(SGDR(epochs, cycles), steps)
    theirs = [SchedCos(0.1, 0.0)(i / (length * steps)) for length in cycles for i in range(length * steps)]
    assert ours == pytest.approx(np.tile(theirs, 7), rel=0, abs=1e-9)
    assert np.flatnonzero(ours == 0.1).tolist() == [steps * e for e in accumulate((0, *(cycles * 7)[:-1]))]
    whole = by_batch(SGDR(epochs, cycles, "epoch"), steps).reshape(epochs, steps)
    assert (whole == ours[::steps, None]).all()
    assert rate_of(SGDR(epochs, cycles))(1.0) == 0  # training ends with a cycle


def test_steps_are_torchs():
    theirs = of_torch(torch.optim.lr_scheduler.MultiStepLR, 49, [1, 8, 32], gamma=0.2)
    for milestones in ((1, 8, 32), (1 / 49, 8 / 49, 32 / 49)):
        ours = by_batch(Step(49, milestones, 0.2), 37)
        assert ours == pytest.approx(np.repeat(theirs, 37), rel=1e-12)


def test_a_flat_cosine_is_fastais(dls):
    learn = quiet(dms_learner(dls, "se"))
    learn.fit_flat_cos(2, 0.01, pct_start=0.6)
    theirs = [float(np.ravel(rate)[-1]) for rate in learn.recorder.hps["lr"]]
    assert by_batch(FlatCosine(2, 0.6), len(dls.train), 0.01) == pytest.approx(theirs, rel=1e-4)


CASES = {
    "cosine": {},
    "one-cycle": {},
    "linear": {},
    "warmup-cosine": {"warmup_epochs": 1, "warmup_lr": 0.01, "lr_min": 0.001, "cooldown_epochs": 1},
    "sgdr": {"cycles": (1, 2)},
    "flat-cosine": {"flat": 0.5},
    "step": {"milestones": (1, 2)},
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_learner_follows_it_and_fastai_draws_it(dls, name):
    own = {f"schedule.{key}": value for key, value in CASES[name].items()}
    settings = {"schedule.name": name, "schedule.epochs": 3, "optimizer.lr": 0.05, **own}
    learn = quiet(dms_learner(dls, "se", settings=settings))
    learn.fit_recipe()
    schedule = SCHEDULES[name](3, **CASES[name])
    assert learn.recorder.hps["lr"] == pytest.approx(by_batch(schedule, len(dls.train), 0.05), abs=1e-9)
    assert ("mom" in learn.recorder.hps) is (name == "one-cycle")
    learn.recorder.plot_sched(["lr"])
    (line,) = plt.gca().lines
    assert line.get_ydata() == pytest.approx(learn.recorder.hps["lr"])
    plt.close("all")


@pytest.mark.parametrize("name", SCHEDULES)
def test_each_group_of_parameters_has_a_rate_of_its_own(name):
    schedule, rates = SCHEDULES[name](3, **CASES[name]), np.array([0.02, 0.1])
    for pct in (0.0, 0.1, 0.4, 0.7, 0.9):
        apart = [rate_of(schedule, float(rate))(pct) for rate in rates]
        assert rate_of(schedule, rates)(pct) == pytest.approx(apart, rel=1e-12)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"name": "sgdr", "cycles": [10, 20, 40, 80], "epochs": 45}, "one ends after 10, 30, 70 or 150 epochs"),
        ({"name": "sgdr", "cycles": [10, 20], "epochs": 3}, "schedule.epochs is 3, in the middle of a cycle"),
        ({"name": "sgdr", "cycles": [10, 20], "epochs": 65}, "one ends after 70 or 90 epochs"),
        ({"name": "sgdr", "cycles": []}, "schedule.cycles is []; it must be not empty"),
        ({"name": "sgdr", "cycles": [10, 0]}, "with each number at least 1"),
        ({"name": "sgdr", "cycles": 10}, "schedule.cycles is 10; it must be a list of whole numbers"),
        ({"name": "sgdr", "cycles": [10.0]}, "it must be a list of whole numbers"),
        ({"name": "sgdr", "cycles": [True]}, "it must be a list of whole numbers"),
        ({"name": "step", "milestones": [100, 200]}, "which a training of 200 epochs does not reach"),
        ({"name": "step", "milestones": [0.5, 100]}, "either whole epochs or shares"),
        ({"name": "step", "milestones": [150, 100]}, "it must be rising"),
        ({"name": "step", "milestones": ["half"]}, "it must be a list of numbers"),
        ({"name": "step", "gamma": 0}, "schedule.gamma is 0; it must be above 0"),
        ({"name": "warmup-cosine", "epochs": 5}, "leaves nothing of 5 epochs to the cosine"),
        ({"name": "warmup-cosine", "epochs": 20, "cooldown_epochs": 15}, "cooldown_epochs is 15"),
        ({"name": "warmup-cosine", "lr_min": 0.2}, "schedule.lr_min is 0.2, above the learning rate, 0.1"),
        ({"name": "warmup-cosine", "warmup_lr": 0.2}, "schedule.warmup_lr is 0.2, above the learning rate"),
        ({"name": "cosine", "cycles": [10]}, "schedule.cycles is a setting of 'sgdr', not of 'cosine'"),
        ({"name": "flat-cosine", "flat": 1.0}, "schedule.flat is 1.0"),
    ],
)
def test_what_does_not_fit_together_is_refused_with_the_recipe(settings, words):
    with pytest.raises(UserError) as error:
        load_recipe("se", settings={f"schedule.{key}": value for key, value in settings.items()})
    assert words in error.value.message
    assert "\n" not in error.value.message


def test_a_length_that_does_not_fit_is_refused_when_training_begins(dls):
    learn = quiet(dms_learner(dls, "se", settings={"schedule.name": "sgdr", "schedule.cycles": [2, 3]}))
    with pytest.raises(UserError, match="one ends after 2 or 5 epochs"):
        learn.fit_recipe(3)
    learn = quiet(dms_learner(dls, "se", settings={"schedule.name": "warmup-cosine", "schedule.lr_min": 0.01}))
    with pytest.raises(UserError, match=r"lr_min is 0.01, above the learning rate, 0.001"):
        learn.fit_recipe(lr=slice(0.001, 0.1))


@pytest.mark.parametrize("name", ["sgdr", "step"])
def test_a_list_survives_being_written(name, tmp_path):
    settings = {"schedule.name": name, "schedule.epochs": 30, "optimizer.no_decay": ["bias"]}
    settings |= {"schedule.cycles": [10, 20]} if name == "sgdr" else {"schedule.milestones": [10, 20]}
    recipe = load_recipe("se", settings=settings)
    (tmp_path / "own.toml").write_text(recipe.to_toml())
    again = load_recipe(tmp_path / "own.toml")
    assert again.schedule == recipe.schedule
    assert again.optimizer == recipe.optimizer
