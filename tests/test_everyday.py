"""What a training on one's own images meets every day: rare classes, an early end, TensorBoard, and other folders."""

import os
import shutil
from itertools import count

import numpy as np
import pytest
import timm
import torch
from fastai.learner import load_learner
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dms_fastai import EarlyStopping, UserError, dms_learner, load_data, names
from dms_fastai.data.loader import balanced
from dms_fastai.errors import Notice
from dms_fastai.models.grad_cam import grad_cam
from dms_fastai.models.weights import load_weights
from dms_fastai.report.published import TABLE_1
from dms_fastai.report.rows import sections
from dms_fastai.run_folder import Run, RunFolder, find_runs
from dms_fastai.runs import threads
from dms_fastai.runs.predictions import read_predictions
from dms_fastai.runs.stop import StopOnRequest
from dms_fastai.runs.threads import Load
from dms_fastai.runs.wanted import Wanted
from tests.test_runs import dms, figures  # noqa: F401  (the first is a fixture)

# --- rare classes


@pytest.mark.parametrize("counts", [[90, 9, 1], [5, 5, 5], [1, 0, 7], [2, 3]])
def test_classes_come_equally_often(counts):
    labels = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    drawn = balanced(labels)
    assert len(drawn) == len(labels)
    there = [count for count in counts if count]
    per_class = labels[drawn].bincount(minlength=len(counts)).tolist()
    assert max(n for n, c in zip(per_class, counts, strict=True) if c) - len(labels) // len(there) <= 1
    assert min(n for n, c in zip(per_class, counts, strict=True) if c) >= len(labels) // len(there)
    for c in range(len(counts)):  # every image of a class as often as any other, up to one
        own = (labels == c).nonzero().flatten()
        times = [(drawn == index).sum().item() for index in own]
        assert not times or max(times) - min(times) <= 1


def test_a_balanced_loader_draws_rare_images_more_often(tmp_path):
    for split, name, images in (("train", "many", 60), ("train", "few", 4), ("test", "many", 2), ("test", "few", 2)):
        folder = tmp_path / "d" / split / name
        folder.mkdir(parents=True)
        for number in range(images):
            Image.new("L", (8, 8), 40 * (name == "few") + number).save(folder / f"{number}.png")
    dls = load_data(tmp_path / "d", bs=32, size=8, balance=True)
    seen = torch.cat([y for _, y in dls.train])
    assert seen.bincount().tolist() == [32, 32]
    assert torch.cat([y for _, y in dls.valid]).tolist() == [0, 0, 1, 1]  # as they are


# --- an early end


def stopping(dls, **kwargs):
    learn = dms_learner(dls, "se", arch="test_dmsresnet", cbs=EarlyStopping(**kwargs))
    return learn


def test_training_ends_when_validation_no_longer_improves(dls):
    learn = stopping(dls, patience=2)
    with learn.no_bar(), learn.no_logging():
        learn.fit(12, 1e-12)  # no step moves a weight
    losses = [values[2] for values in learn.recorder.values]
    best = int(np.argmin(losses))
    assert len(losses) < 12
    assert len(losses) == best + 3
    assert learn.early_stopping.stopped


def test_an_early_end_is_the_same_after_a_resume(dms, tmp_path, monkeypatch):  # noqa: F811
    args = ("run", "se", "--epochs", 9, "--set", "early_stopping.patience=3", "--set", "optimizer.lr=1e-12")
    assert dms(*args, "--out", "whole")[0] == 0
    whole = Run.read(tmp_path / "whole" / "se" / "seed0")
    assert whole.finished
    assert 4 <= whole.facts.epochs_done < 9
    done = whole.facts.epochs_done
    steps = count(1)
    monkeypatch.setattr(StopOnRequest, "asked", lambda stop: _stops(stop, next(steps) == 23 * (done - 2) + 5))
    assert dms(*args, "--out", "parts")[0] == 75  # in the epoch before the last but one, two of which have been waited
    parts = Run.read(tmp_path / "parts" / "se" / "seed0")
    assert parts.facts.epochs_done == done - 2
    assert dms(*args, "--out", "parts")[0] == 0
    assert figures(parts.folder.path) == figures(whole.folder.path)
    code, out, _ = dms("report", "whole")
    assert code == 0
    assert f" {done} " in out


def _stops(stop, now):
    stop.reason = "time limit" if now else None
    return now


# --- TensorBoard


def test_the_epochs_can_be_seen_in_tensorboard(dms, tmp_path):  # noqa: F811
    args = ("run", "se", "--epochs", 2, "--tensorboard")
    assert dms(*args, "--time-limit", "0.001s")[0] == 75
    assert dms(*args)[0] == 0
    folder = RunFolder(tmp_path / "artifacts" / "digits" / "se" / "seed0")
    check_events(folder)
    for more in (("--at-once", 2), ()):  # also of a run that has finished without
        shutil.rmtree(folder.tensorboard)
        assert f"its epochs are in {folder.tensorboard.relative_to(tmp_path)}" in dms(*args, *more)[1]
        check_events(folder)
    assert "its epochs are in" not in dms(*args)[1]


def test_a_missing_tensorboard_is_said_before_anything_else(dms, monkeypatch):  # noqa: F811
    find = names.find_spec
    monkeypatch.setattr(names, "find_spec", lambda name: None if name == "tensorboard" else find(name))
    code, out, err = dms("run", "se", "--tensorboard")
    assert (code, out) == (2, "")
    assert "pip install tensorboard" in err


def check_events(folder):
    """TensorBoard's are those of metrics.csv."""
    events = EventAccumulator(str(folder.tensorboard))
    events.Reload()
    written = [(event.step, event.value) for event in events.Scalars("accuracy/valid")]
    expected = [(row["epoch"], row["valid_accuracy"]) for row in folder.rows()]
    assert written == [(step, pytest.approx(value, abs=1e-6)) for step, value in expected]


# --- where a network looks


def test_grad_cam_finds_the_corner_that_decides():
    """A network whose class is the mean of the lower right quarter: nothing else may be bright."""

    class Corner(torch.nn.Module):
        num_features = 2

        def forward_features(self, x):
            return torch.nn.functional.avg_pool2d(x[:, :2], 4)

        def forward_head(self, features):
            seen = features[:, :, 1, 1]
            return torch.stack([seen[:, 0], -seen[:, 0]], 1)

    x = torch.rand(3, 3, 8, 8)
    x[:, 0] += 1
    maps = grad_cam(Corner(), x, torch.zeros(3, dtype=torch.long))
    pooled = torch.nn.functional.avg_pool2d(x[:, :1], 4)[:, 0]
    expected = pooled / pooled.amax((1, 2), keepdim=True)  # the channel's weight is a number, which drops out
    assert torch.allclose(maps, expected)
    assert grad_cam(Corner(), x, torch.ones(3, dtype=torch.long)).abs().max() == 0  # it only speaks against


def test_grad_cam_of_a_linear_head_is_its_weights_times_the_features():
    network = timm.create_model("test_dmsresnet", num_classes=10).eval()
    x, classes = torch.randn(4, 3, 32, 32), torch.tensor([1, 3, 3, 9])
    with torch.no_grad():
        features = network.forward_features(x)
        raw = torch.einsum("bc,bchw->bhw", network.fc.weight[classes], features).clamp(min=0)
    expected = raw / raw.amax((1, 2), keepdim=True).clamp(min=1e-30)
    assert torch.allclose(grad_cam(network.train(), x, classes), expected, atol=1e-5)
    assert network.training


def test_a_network_without_a_feature_map_has_no_regions():
    assert grad_cam(torch.nn.Linear(3, 2), torch.zeros(1, 3), torch.zeros(1, dtype=torch.long)) is None


def test_a_run_keeps_where_it_looked_in_its_mistakes(dms, tmp_path):  # noqa: F811
    assert dms("run", "se", "--epochs", 1)[0] == 0
    kept = read_predictions(tmp_path / "artifacts" / "digits" / "se" / "seed0" / "predictions.npz")
    assert len(kept.mistakes)
    assert kept.regions.shape == (len(kept.mistakes), 2, 2)
    assert kept.regions.max() == 255


# --- other folders


def shades(folder, shade):
    for split in ("train", "test"):
        for name in ("dark", "light"):
            (folder / split / name).mkdir(parents=True)
            for number in range(6):
                Image.new("L", (8, 8), shade + number + 90 * (name == "light")).save(
                    folder / split / name / f"{number}.png"
                )
    return folder


def test_two_folders_of_one_name_share_nothing(dms, tmp_path):  # noqa: F811
    one, other = shades(tmp_path / "a" / "pets", 10), shades(tmp_path / "b" / "pets", 40)
    args = ("--epochs", 1, "--set", "data.size=8", "--set", "data.batch_size=4")
    for data in (one, other):
        assert dms("run", "se", "--data", data, *args)[0] == 0
    assert dms("run", "baseline", "--data", other, *args)[0] == 0
    roots = sorted(path.name for path in (tmp_path / "artifacts").iterdir())
    assert len(roots) == 2
    assert roots[0] == "pets"
    assert roots[1].startswith("pets-")
    assert sorted(p.name for p in (tmp_path / "artifacts" / roots[1]).iterdir()) == ["baseline", "se"]
    code, out, _ = dms("run", "se", "--data", one, *args)  # each finds its own again
    assert (code, "epoch 1/1" in out) == (0, False)
    found, _ = find_runs([tmp_path / "artifacts"])
    assert sorted(len(section.rows) for section in sections(found)) == [1, 2]
    assert len({section.data for section in sections(found)}) == 2


def test_a_folder_called_like_a_known_data_set_is_another(dms, tmp_path):  # noqa: F811
    assert dms("run", "se", "--epochs", 1)[0] == 0
    data = shades(tmp_path / "digits", 10)
    assert Wanted(("se",), data=data).root.name.startswith("digits-")
    assert Wanted(("se",), data="digits").root.name == "digits"
    shutil.rmtree(tmp_path / "digits")


@pytest.mark.parametrize(
    ("option", "beside"),
    [
        (("--arch", "test_dmsresnet_plain"), "se-test_dmsresnet_plain"),
        (("--set", "data.size=16"), "se-16px"),
        (("--set", "data.size=16", "--arch", "test_dmsresnet_plain"), "se-test_dmsresnet_plain-16px"),
    ],
)
def test_another_network_or_size_lies_beside(dms, tmp_path, option, beside):  # noqa: F811
    root = tmp_path / "artifacts" / "digits"
    for further in ((), option, option):
        code, _, err = dms("run", "se", "--epochs", 1, *further)
        assert code == 0, err
    assert sorted(path.name for path in root.iterdir()) == sorted(["se", beside])
    started = Run.read(root / "se" / "seed0").facts.started
    assert dms("run", "se", "--epochs", 1)[0] == 0
    assert Run.read(root / "se" / "seed0").facts.started == started
    code, _, err = dms("run", "se", "--epochs", 2)
    assert code == 2
    assert "schedule.epochs 1 -> 2" in err


def test_a_value_out_of_range_is_refused():
    with pytest.raises(UserError, match="EarlyStopping's patience is 0"):
        EarlyStopping(0)


# --- other processes


@pytest.mark.skipif(not threads.STAT.exists(), reason="Linux alone tells")
def test_free_cores_are_those_that_others_leave(monkeypatch, tmp_path):
    """On two cores, in two seconds: others take all of one and half of the other, and this process a quarter of it."""
    tick = os.sysconf("SC_CLK_TCK")
    stat = tmp_path / "stat"
    monkeypatch.setattr(threads, "STAT", stat)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 3})
    clock = iter([100.0, 102.0, 102.0])
    monkeypatch.setattr(threads.time, "monotonic", lambda: next(clock))
    own = iter([7.0, 7.5])
    monkeypatch.setattr(threads.time, "process_time", lambda: next(own))

    def told(first, second):
        rows = [f"cpu{core} {' '.join(str(int(tick * s)) for s in row)} 0 0" for core, row in ((0, first), (3, second))]
        stat.write_text("\n".join(["cpu 9 9 9 9", "cpu1 1 1 1 1 1 1 1 1 0 0", *rows, "intr 5"]))

    told((1, 1, 1, 50, 5, 0, 0, 0), (2, 0, 0, 40, 0, 0, 0, 0))
    load = threads.Load()
    told((1, 3, 1, 50, 5, 0, 0, 0), (3.5, 0, 0, 40.25, 0.25, 0, 0, 0))
    assert load.free() == pytest.approx(0.25 + 0.25)  # idle, and waiting or its own


def test_a_system_that_does_not_tell_leaves_all_threads(monkeypatch, tmp_path):
    monkeypatch.setattr(threads, "STAT", tmp_path / "none")
    assert threads.Load().free() is None
    (tmp_path / "none").write_text("cpu0 0 0 0 0 0 0 0 0 0 0\n")
    assert threads.Load().free() is None


@pytest.mark.parametrize(
    ("free", "most", "threads_"), [(None, 8, 8), (7.6, 8, 8), (7.4, 8, 7), (0.1, 2, 1), (1.2, 2, 1), (9.0, 4, 4)]
)
def test_every_thread_has_a_core_to_itself(free, most, threads_):
    assert threads.fitting(free, most) == threads_


def test_a_resumed_run_keeps_its_threads(dms, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.delenv("OMP_NUM_THREADS")
    before = torch.get_num_threads()
    try:
        for free, code in ((0.2, 75), (8.0, 0)):
            monkeypatch.setattr(Load, "free", lambda load, free=free: free)
            torch.set_num_threads(2)
            limit = ("--time-limit", "0.001s") if code else ()
            found, out, err = dms("run", "se", "--epochs", 1, *limit)
            assert found == code, err
            assert ("computing with 1 thread" in out) == (code == 75)
            assert Run.read(tmp_path / "artifacts" / "digits" / "se" / "seed0").facts.threads == 1
            assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)


# --- the work of a training


def test_a_run_says_what_work_it_was(dms, tmp_path):  # noqa: F811
    """By hooks on every convolution and linear layer, and by the steps: 22 of 64 images, two epochs."""
    args = ("run", "kd", "--epochs", 2, "--arch", "test_dmsresnet", "--set", "teacher.model.name=test_plain_cnn")
    assert dms(*args, "--set", "data.size=16", "--out", "r")[0] == 0

    def counted(name):
        network, seen = timm.create_model(name, num_classes=10).eval(), []
        for module in network.modules():
            if isinstance(module, (torch.nn.Conv2d, torch.nn.Linear)):
                module.register_forward_hook(lambda m, _, y: seen.append(m.weight[0].numel() * y[0].numel()))
        network(torch.zeros(1, 3, 16, 16))
        return sum(seen)

    facts = Run.read(tmp_path / "r" / "kd" / "seed0").facts
    student, teacher, images = counted("test_dmsresnet"), counted("test_plain_cnn"), 2 * 22 * 64
    assert facts.macs == student
    assert facts.train_pflop.student == pytest.approx(6 * student * images / 1e15, rel=1e-5)
    assert facts.train_pflop.teacher == pytest.approx(2 * teacher * images / 1e15, rel=1e-5)
    assert facts.train_pflop.total == pytest.approx(facts.train_pflop.student + facts.train_pflop.teacher, rel=1e-5)
    assert Run.read(tmp_path / "r" / "teacher" / "seed0").facts.train_pflop.teacher == 0


def test_published_systems_cost_what_their_epochs_do():
    [plain, cct, hcgnet, dmsresnet] = TABLE_1["cifar10"]
    assert cct.train_pflop == pytest.approx(6 * 1.1816e9 * 310 * 50_000 / 1e15, rel=1e-3)
    assert dmsresnet.train_pflop == pytest.approx(0.2396 * 200, rel=1e-3)
    assert hcgnet.train_pflop > cct.train_pflop > dmsresnet.train_pflop
    assert plain.train_pflop > hcgnet.train_pflop


# --- a finished run, and images that change


def test_a_finished_run_is_kept_until_another_has_finished_in_its_place(dms, tmp_path):  # noqa: F811
    args = ("run", "se", "--epochs", 1)
    folder = tmp_path / "artifacts" / "digits" / "se" / "seed0"
    assert dms(*args)[0] == 0
    before = (folder / "model.safetensors").read_bytes()
    again = (*args, "--restart", "--set", "optimizer.lr=0.05")
    assert dms(*again, "--time-limit", "0.001s")[0] == 75
    assert not (folder / "model.safetensors").exists()
    assert (folder / "replaced" / "model.safetensors").read_bytes() == before
    assert dms(*again, "--time-limit", "0.001s")[0] == 75  # nothing finished is lost by a second one
    assert (folder / "replaced" / "model.safetensors").read_bytes() == before
    found, problems = find_runs([tmp_path / "artifacts"])
    assert len(found) == 1
    assert not problems
    assert dms(*args, "--set", "optimizer.lr=0.05")[0] == 0
    assert (folder / "model.safetensors").read_bytes() != before
    assert not (folder / "replaced").exists()


def test_what_is_somebody_elses_in_a_runs_folder_stays(dms, tmp_path):  # noqa: F811
    args = ("run", "se", "--epochs", 1, "--set", "data.batch_size=512")
    folder = tmp_path / "artifacts" / "digits" / "se" / "seed0"
    mine = [folder / "notes.txt", folder / "thesis" / "a.tex"]
    assert dms(*args)[0] == 0
    for file in mine:
        file.parent.mkdir(exist_ok=True)
        file.write_text("mine")
    (folder / "se.int8.onnx").write_text("what edge has made of the run")
    assert dms(*args, "--restart", "--time-limit", "0.001s")[0] == 75
    assert dms(*args, "--restart")[0] == 0  # of a finished run, and of one that was stopped
    assert all(file.read_text() == "mine" for file in mine)
    assert not (folder / "se.int8.onnx").exists()


def test_a_restart_that_is_stopped_says_what_stays_as_it_is(dms):  # noqa: F811
    args = ("run", "baseline", "se", "--epochs", 1, "--set", "data.batch_size=512")
    assert dms(*args)[0] == 0
    code, out, _ = dms(*args, "--restart", "--time-limit", "0.001s")
    assert code == 75
    assert "resumes from there, but trains no finished run again: for se, --only NAME --restart" in out
    assert dms(*args)[0] == 0
    assert dms(*args, "--only", "se", "--restart")[0] == 0


def test_a_key_that_is_foreign_names_its_file(dms, tmp_path):  # noqa: F811
    args = ("run", "se", "--epochs", 1, "--set", "data.batch_size=512")
    assert dms(*args)[0] == 0
    file = tmp_path / "artifacts" / "digits" / "se" / "seed0" / "recipe.toml"
    file.write_text(file.read_text().replace("lr =", "foo = 1\nlr ="))
    code, _, err = dms(*args)
    assert (code, "seed0/recipe.toml: unknown recipe key 'optimizer.foo'" in err) == (2, True)


def test_a_student_without_its_teacher_may_be_all_that_a_command_trains(dms):  # noqa: F811
    few = (
        "--epochs",
        1,
        "--set",
        "data.batch_size=512",
        "--set",
        "teacher.model.name=test_dmsresnet",
        "--device",
        "cpu",
    )
    args = ("run", "kd", "--compare", *few)
    code, out, _ = dms(*args, "--only", "kd-alone")
    assert (code, "kd-alone/seed0/learner.pkl" in out.replace("\\", "/")) == (0, True)
    assert dms(*args, "--at-once", 2)[0] == 0


def test_a_class_that_nothing_validates_is_named(tmp_path):
    data = shades(tmp_path / "d", 10)
    (data / "train" / "new").mkdir()
    Image.new("L", (8, 8), 200).save(data / "train" / "new" / "1.png")
    with pytest.warns(Notice, match="no images to validate on of new; the accuracy says nothing about that"):
        load_data(data, size=8)


def test_a_report_tells_runs_on_other_images_apart(dms, tmp_path):  # noqa: F811
    data = shades(tmp_path / "pets", 10)
    args = ("run", "se", "--data", data, "--epochs", 1, "--set", "data.size=8", "--set", "data.batch_size=4")
    assert dms(*args, "--out", "a")[0] == 0
    Image.new("L", (8, 8), 33).save(data / "train" / "dark" / "more.png")
    assert dms(*args, "--out", "b")[0] == 0
    [section] = sections(find_runs([tmp_path / "a", tmp_path / "b"])[0])
    assert sorted(row.note for row in section.rows) == [
        "12 training images of 2 classes",
        "13 training images of 2 classes",
    ]


def test_a_data_set_that_is_mistyped_may_be_a_folder_here(dms, tmp_path):  # noqa: F811
    shades(tmp_path / "pets", 10)
    code, _, err = dms("run", "se", "--data", "petz")
    assert (code, "did you mean 'pets'?" in err) == (2, True)


def test_what_a_finished_run_has_lost_is_written_again(dms, tmp_path):  # noqa: F811
    args = ("run", "se", "--epochs", 1, "--set", "data.batch_size=512")
    assert dms(*args)[0] == 0
    folder = RunFolder(tmp_path / "artifacts" / "digits" / "se" / "seed0")
    lost = (folder.learner, folder.predictions, folder.curves)
    before = folder.weights.read_bytes()
    known = read_predictions(folder.predictions).right
    for path in lost:
        path.unlink()
    code, out, _ = dms(*args)
    assert (code, all(f"{path.name} was missing, and has been written again" in out for path in lost)) == (0, True)
    assert all(path.is_file() for path in lost)
    assert folder.weights.read_bytes() == before
    assert (read_predictions(folder.predictions).right == known).all()
    model, _ = load_weights(folder.weights)
    again = load_learner(folder.learner).model.state_dict()
    assert all(torch.equal(value, again[name]) for name, value in model.state_dict().items())
    assert "written again" not in dms(*args)[1]


def test_damaged_weights_of_a_finished_run_are_named_and_trained_again_by_restart(dms, tmp_path):  # noqa: F811
    args = ("run", "se", "--epochs", 1, "--set", "data.batch_size=512")
    assert dms(*args)[0] == 0
    folder = RunFolder(tmp_path / "artifacts" / "digits" / "se" / "seed0")
    folder.weights.write_bytes(folder.weights.read_bytes()[:5000])
    code, _, err = dms(*args)
    assert (code, "model.safetensors cannot be loaded" in err, "train it again with --restart" in err) == (
        2,
        True,
        True,
    )
    assert dms(*args, "--restart")[0] == 0
    assert dms("evaluate", folder.path)[0] == 0


@pytest.mark.parametrize("unfinished", [False, True])
def test_weights_and_checkpoints_of_an_unknown_run_are_not_trained_over(dms, tmp_path, unfinished):  # noqa: F811
    args = ("run", "se", "--epochs", 1, "--set", "data.batch_size=512")
    code = dms(*args, *(("--checkpoint-steps", 1, "--time-limit", "0.001s") if unfinished else ()))[0]
    assert code == (75 if unfinished else 0)
    folder = RunFolder(tmp_path / "artifacts" / "digits" / "se" / "seed0")
    folder.facts_file.unlink()
    kept = {path: path.read_bytes() for path in folder.path.rglob("*") if path.is_file()}
    code, _, err = dms(*args)
    assert (code, "no run.json that says what run it is of" in err, "or --restart" in err) == (2, True, True)
    assert {path: path.read_bytes() for path in folder.path.rglob("*") if path.is_file()} == kept
    recipe = folder.recipe_file.read_bytes()
    folder.recipe_file.unlink()  # now nothing says that it is a run's
    code, _, err = dms(*args, "--restart")
    assert (code, "give --out another folder\n" in err) == (2, True)
    folder.recipe_file.write_bytes(recipe)
    assert dms(*args, "--restart")[0] == 0
    assert folder.finished
