"""One's own images: what fits a budget, what settings reach teacher and student, and the student without a teacher."""

import time
from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
from torch import nn

from dms_fastai import ProgressiveResize, Teacher, UserError, load_recipe
from dms_fastai.data import Data, Sets
from dms_fastai.errors import Notice
from dms_fastai.models.macs import macs
from dms_fastai.run_folder import Figures, Run, RunFolder
from dms_fastai.runs import budget, plan
from dms_fastai.runs.advice import teacher_advice
from dms_fastai.runs.budget import fitted
from dms_fastai.runs.estimate import Estimate, estimate
from dms_fastai.runs.wanted import Wanted
from dms_fastai.runs.work import share_of_whole
from tests.test_runs import dms  # noqa: F401  (a fixture)

RUN = Run.read(next((Path(__file__).parent.parent / "artifacts").rglob("cpu/kd/seed0/run.json")).parent)


def wanted(**settings):
    return Wanted(("kd",), settings=settings.pop("settings"), **settings)


def test_settings_of_the_data_reach_the_teacher():
    both = wanted(settings={"data.batch_size": 32, "augment.flip": 0.25, "bf16": False, "optimizer.lr": 0.3})
    [student] = both.resolved()
    teacher = both.teacher_of(student)
    assert (student.data.batch_size, student.augment.flip, student.bf16, student.optimizer.lr) == (32, 0.25, None, 0.3)
    assert (teacher.data.batch_size, teacher.augment.flip, teacher.bf16, teacher.optimizer.lr) == (32, 0.25, None, 0.03)


def test_settings_may_be_for_the_teacher_alone():
    both = wanted(
        settings={"teacher.optimizer.lr": 0.2, "teacher.data.batch_size": 16, "teacher.model.name": "resnet18"}
    )
    [student] = both.resolved()
    teacher = both.teacher_of(student)
    assert (teacher.optimizer.lr, teacher.data.batch_size, teacher.model.name) == (0.2, 16, "resnet18")
    assert (student.optimizer.lr, student.data.batch_size, student.model.name) == (0.1, 64, "test_dmsresnet")


@pytest.mark.parametrize(
    ("recipe", "settings", "words"),
    [
        ("se", {"teacher.optimizer.lr": 0.2}, "teacher.optimizer.lr is for a teacher that is trained"),
        ("kd", {"teacher.optimizer.lrr": 0.2}, "unknown recipe key 'optimizer.lrr'"),
        ("kd", {"teacher.optimizer.lr": -1}, "optimizer.lr is -1"),
    ],
)
def test_settings_for_a_teacher_that_cannot_be(recipe, settings, words):
    with pytest.raises(UserError) as error:
        Wanted((recipe,), settings=settings).resolved()
    assert words in error.value.message


def test_a_student_is_compared_with_itself_without_a_teacher():
    student, alone = wanted(settings={}, compare=True).resolved()
    assert (alone.name, alone.distill, alone.teacher) == ("kd-alone", None, None)
    assert alone.title.endswith("no teacher")
    rest = {name for name in vars(student) if getattr(student, name) != getattr(alone, name)}
    assert rest == {"name", "title", "teacher", "distill"}
    with pytest.raises(UserError, match="none of these recipes distils"):
        Wanted(("se",), compare=True).resolved()


def test_a_budget_chooses_what_fits_and_a_resume_keeps_it(dms, tmp_path):  # noqa: F811
    args = ("run", "small/kd", "--data", "digits", "--budget", "3s", "--device", "cpu")
    code, _, err = dms(*args, "--time-limit", "0.001s")
    assert code == 75, err
    teacher = tmp_path / "artifacts" / "digits" / "small" / "seed0"
    begun = (teacher / "recipe.toml").read_text()
    chosen = RunFolder(teacher).recipe()
    assert chosen.data.batch_size == 128  # 1,438 images are more than 8 batches of them
    code, _, err = dms(*args)
    assert code == 0, err
    assert (teacher / "recipe.toml").read_text() == begun
    student = RunFolder(teacher.parents[1] / "small" / "kd" / "seed0")
    assert student.recipe().budget.minutes == 0.05
    assert student.finished


@pytest.mark.parametrize(
    ("seconds", "name", "widths", "epochs"),
    [
        (1000, "dmsresnet", None, 100),  # as many epochs as fit
        (10_000, "dmsresnet", None, 200),  # but not more than are of use
        (999, "dmsresnet", [32, 64, 128], 200),  # 99 epochs of ten steps are fewer than a thousand steps
        (240, "test_dmsresnet", None, 200),
        (2, "test_dmsresnet", None, 4),
    ],
)
def test_the_largest_network_that_trains_enough_epochs_is_chosen(monkeypatch, seconds, name, widths, epochs):
    """An epoch takes 10, 2.5 and 0.5 seconds with the three networks, from the largest to the smallest."""

    def known(recipe, sets, device, teacher=None):
        epoch = 0.5 if recipe.model.name == "test_dmsresnet" else 2.5 if recipe.model.args else 10
        return Estimate(parameters=1, macs=1, steps=10, step_seconds=epoch / 10, epoch_seconds=epoch)

    monkeypatch.setattr(budget, "estimate", known)
    recipe, sets = load_recipe("fast", "cifar10"), Data().open("digits")
    chosen, _ = fitted(recipe, sets, torch.device("cpu"), seconds, set(), None)
    assert (chosen.model.name, (chosen.model.args or {}).get("widths")) == (name, widths)
    assert chosen.schedule.epochs == epochs
    taught, _ = fitted(recipe, sets, torch.device("cpu"), seconds, {"model.name"}, known(recipe, sets, None))
    assert taught.schedule.epochs == max(1, min(200, int(seconds / (10 * 4 / 3))))  # with the teacher's forward passes


@pytest.mark.parametrize("own", ["test_dmsresnet", "resnet18"])
def test_in_place_of_a_network_comes_only_a_faster_one(monkeypatch, own):
    seconds = {"test_dmsresnet": 50.0, "resnet18": 1.0, "dmsresnet": 100.0}
    known = lambda recipe, *_: Estimate(1, 1, 10, 1.0, seconds[recipe.model.name])  # noqa: E731
    monkeypatch.setattr(budget, "estimate", known)
    sets = Data().open("digits")
    chosen, _ = fitted(load_recipe("fast", "digits", own), sets, torch.device("cpu"), 20, set(), None)
    assert chosen.model.name == own


def test_epochs_that_do_not_fit_are_trained_and_said(monkeypatch):
    monkeypatch.setattr(budget, "estimate", lambda *_: Estimate(1, 1, 10, 1.0, 10.0))
    sets, given = Data().open("digits"), {"schedule.epochs", "model.name"}
    with pytest.warns(Notice, match=r"2 epochs fit into 0:20, and 20 are asked for"):
        chosen, _ = fitted(load_recipe("fast", "digits"), sets, torch.device("cpu"), 20, given, None)
    assert chosen.schedule.epochs == 20


def test_what_does_not_fit_into_memory_is_not_chosen(monkeypatch):
    def known(recipe, *_):
        if recipe.model.name == "dmsresnet":
            raise torch.OutOfMemoryError("out of memory")
        return Estimate(1, 1, 10, 1.0, 1.0)

    monkeypatch.setattr(budget, "estimate", known)
    recipe, sets = load_recipe("fast", "cifar10"), Data().open("digits")
    assert fitted(recipe, sets, torch.device("cpu"), 200, set(), None)[0].model.name == "test_dmsresnet"
    with pytest.raises(UserError, match="do not fit into memory"):
        fitted(recipe, sets, torch.device("cpu"), 200, {"model.name"}, None)


def test_a_finished_run_is_not_taken_for_one_with_other_settings(dms, tmp_path):  # noqa: F811
    args = ("run", "small", "--data", "digits", "--budget", "1s", "--device", "cpu", "--out", "x")
    assert dms(*args)[0] == 0
    assert dms(*args)[0] == 0
    code, _, err = dms(*args, "--epochs", 123)
    assert code == 2
    assert "schedule.epochs" in err
    assert "-> 123" in err
    repeated = tmp_path / "x" / "small" / "seed0" / "recipe.toml"
    assert dms("run", repeated, "--data", "digits", "--device", "cpu", "--out", "y")[0] == 0  # chooses nothing anew
    again = tmp_path / "y" / "small" / "seed0" / "recipe.toml"
    assert again.read_text() == repeated.read_text()


def test_a_teacher_gets_half_of_the_budget_whatever_the_order(monkeypatch, tmp_path):
    seen = {}

    def known(recipe, sets, device, seconds, given, before):
        seen[recipe.name] = seconds
        return replace(recipe, budget=replace(recipe.budget, fitted=True)), Estimate(1, 1, 1, 1.0, 1.0)

    monkeypatch.setattr(plan, "fitted", known)

    def planned(*recipes):
        seen.clear()
        wanted = Wanted(recipes, out=tmp_path, settings={"model.name": "test_dmsresnet"})
        return [(s.recipe.name, s.recipe.budget.fitted) for s in plan.plan(wanted, plan.Opened("digits"))]

    assert planned("small/kd") == [("small", True), ("small/kd", True)]
    assert seen == {"small": 120.0, "small/kd": 120.0}
    assert planned("small/kd", "small") == planned("small", "small/kd") == [("small", True), ("small/kd", True)]
    assert seen == {"small": 120.0, "small/kd": 240.0}


def test_a_students_budget_counts_its_teacher_whatever_has_been_begun(monkeypatch, tmp_path):
    seen = {}

    def known(recipe, sets, device, seconds, given, before):
        seen[recipe.name] = (seconds, before and before.step_seconds)
        return replace(recipe, budget=replace(recipe.budget, fitted=True)), Estimate(1, 1, 1, 7.0, 1.0)

    monkeypatch.setattr(plan, "fitted", known)
    monkeypatch.setattr(plan, "estimate", lambda *args: Estimate(1, 1, 1, 9.0, 1.0))

    def planned(*recipes, **more):
        seen.clear()
        plan.plan(
            Wanted(recipes, out=tmp_path, settings={"model.name": "test_dmsresnet"}, **more), plan.Opened("digits")
        )
        return seen

    assert planned("small", "small/kd") == {"small": (120, None), "small/kd": (240, 7)}
    assert planned("kd", teacher="small") == {"small": (120, None)}  # kd has no budget to share
    assert planned("small/kd") == {"small": (120, None), "small/kd": (120, 7)}
    asked = Wanted(("small/kd",), out=tmp_path, settings={"model.name": "test_dmsresnet"})
    [first, _] = plan.plan(asked, plan.Opened("digits"))
    first.folder.path.mkdir(parents=True)
    first.folder.recipe_file.write_text(first.recipe.to_toml())
    monkeypatch.setattr(RunFolder, "begun", property(lambda folder: folder.recipe_file.is_file()))
    assert planned("small/kd") == {"small/kd": (120, 9)}  # it was stopped while its teacher was trained


def test_what_the_command_sets_is_not_chosen(tmp_path):
    sets = Data(8).open("digits")
    recipe = load_recipe("small", "digits", None, {"data.batch_size": 64, "schedule.epochs": 7})
    fixed = {"data.batch_size", "schedule.epochs"}
    chosen, _ = fitted(recipe, sets, torch.device("cpu"), 0.5, fixed, None)
    assert (chosen.data.batch_size, chosen.schedule.epochs) == (64, 7)
    few = Sets(sets.train.subset(torch.arange(90)), sets.valid)
    chosen, found = fitted(recipe, few, torch.device("cpu"), 3600, set(), None)
    assert (chosen.data.batch_size, chosen.schedule.epochs, found.steps) == (8, 200, 11)
    assert chosen.budget.fitted


def test_an_estimate_is_of_the_network_that_is_trained():
    sets, recipe = Data(64).open("digits"), load_recipe("se", "digits", "test_dmsresnet")
    state = torch.get_rng_state()
    found = estimate(recipe, sets, torch.device("cpu"))
    assert torch.equal(torch.get_rng_state(), state)
    assert found.parameters == 56_587
    assert found.steps == 1438 // 64
    macs = []

    def count(module, _, output):
        weights = module.weight[0].numel()
        macs.append(weights * output[0].numel())

    network = timm.create_model("test_dmsresnet", num_classes=10).eval()
    for module in network.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            module.register_forward_hook(count)
    network(torch.zeros(1, 3, 8, 8))
    assert found.macs == sum(macs)
    assert 0 < found.step_seconds < found.epoch_seconds


def test_a_recipe_that_stops_early_can_be_estimated():
    settings = {"early_stopping.monitor": "accuracy", "data.batch_size": 512}  # the estimate takes several epochs
    recipe = load_recipe("se", "digits", "test_dmsresnet", settings)
    assert estimate(recipe, Data(512).open("digits"), torch.device("cpu")).steps == 2


def test_a_recipe_that_takes_features_can_be_estimated_before_its_teacher_is_trained():
    recipe = load_recipe("kd", "digits", "test_dmsresnet", {"feature_distill": True})
    assert estimate(recipe, Data(64).open("digits"), torch.device("cpu")).steps == 22


def test_growing_images_take_their_share_of_the_work():
    network, resize = timm.create_model("test_dmsresnet", num_classes=10).eval(), ProgressiveResize(0.5, 0.5, 0.5)
    half, whole = (macs(network, (3, side, side)) for side in (16, 32))
    assert share_of_whole(network, resize, (3, 32, 32), steps=10, epochs=4) == pytest.approx((half + whole) / 2 / whole)


def test_an_estimate_of_kept_answers_has_the_teacher_in_the_views_alone(tmp_path, monkeypatch):
    monkeypatch.setenv("DMS_FASTAI_CACHE", str(tmp_path))

    class Slow(nn.Module):
        def forward(self, x):
            time.sleep(0.05)
            return torch.zeros(len(x), 10)

    settings = {"fixed_views.count": 1, "data.batch_size": 128, "schedule.epochs": 40}
    recipe = load_recipe("kd", "digits", "test_dmsresnet", settings)
    found = estimate(recipe, Data(128).open("digits"), torch.device("cpu"), Teacher(Slow()))
    assert found.teacher_seconds > 0.05
    assert not list(tmp_path.glob("answers-*"))
    took = Estimate(56_587, 1, steps=10, step_seconds=0.5, epoch_seconds=6.0, teacher_seconds=0.4)
    monkeypatch.setattr(budget, "estimate", lambda *args: took)
    chosen, _ = fitted(recipe, Data(128).open("digits"), torch.device("cpu"), 26.0, {"model.name"}, Teacher(Slow()))
    assert chosen.schedule.epochs == 11  # one of 6 seconds, and ten of 2


@pytest.mark.parametrize("recipe", ["table1/cct", "table1/hcgnet"])
def test_a_schedule_that_takes_few_numbers_of_epochs_can_be_estimated(recipe):
    found = estimate(load_recipe(recipe, "digits"), Data(64).open("digits"), torch.device("cpu"))
    assert found.steps == 22


def test_an_estimate_has_the_time_of_a_teacher_that_is_there():
    class Slow(nn.Module):
        def forward(self, x):
            time.sleep(0.05)
            return torch.zeros(len(x), 10)

    sets, recipe = Data(64).open("digits"), load_recipe("kd", "digits", "test_dmsresnet")
    found = estimate(recipe, sets, torch.device("cpu"), Teacher(Slow()))
    assert found.step_seconds > 0.05
    assert found.epoch_seconds > 22 * 0.05
    assert found.parameters == 56_587


def test_a_dry_run_says_what_would_be_trained_and_trains_nothing(dms, tmp_path):  # noqa: F811
    code, out, err = dms("run", "kd", "--set", "teacher.model.name=test_dmsresnet", "--dry-run", "--device", "cpu")
    assert code == 0, err
    assert "digits: 1,438 training images of 10 classes, 139 to 146 of each; 359 to validate on (test); 8x8" in out
    assert "56,587" in out
    assert "in all on cpu" in out
    assert not list(tmp_path.iterdir())


def test_a_teacher_below_its_student_is_said():
    def facts(accuracy, title="KD"):
        last = Figures(epoch=3, train_loss=1.0, train_accuracy=0.5, valid_loss=1.0, valid_accuracy=accuracy)
        return replace(RUN.facts, title=title, epochs=3, epochs_done=3, last=last)

    assert teacher_advice(facts(0.9), facts(0.95)) == []
    [line] = teacher_advice(facts(0.9), facts(0.8))
    assert line.startswith("KD: its teacher has 80.00 % after 3 epochs, less than the student, 90.00 %")


def test_a_time_and_the_epochs_that_fit_into_it_are_counted_alike():
    took = Estimate(1, 1, steps=10, step_seconds=0.375, epoch_seconds=4.0, teacher_seconds=0.125)
    assert took.forward_seconds == 0.125
    assert took.seconds(5) == 20.0
    assert took.seconds(5, views=2) == 2 * 4.0 + 3 * 2.75  # without ten times the teacher's eighth of a second
    assert took.seconds(5, views=2, later=0.25) == 2 * 6.5 + 3 * 2.75
    assert took.seconds(5, views=9) == 20.0
    assert took.epochs_in(0.1, views=1) == 1
    for views, later in ((None, 0.0), (2, 0.0), (2, 0.25), (9, 0.0)):
        for epochs in (1, 2, 3, 5):
            needed = took.seconds(epochs, views, later)
            assert took.epochs_in(needed, views, later) == epochs
            assert took.epochs_in(needed - 0.01, views, later) == max(1, epochs - 1)
