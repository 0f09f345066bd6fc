"""What is seen while a run trains, and what is said of it at its end."""

import io
import math
import re
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from fastai.callback.core import Callback, CancelFitException
from fastai.callback.progress import ProgressCallback

from dms_fastai import dms_learner, load_recipe
from dms_fastai.run_folder import Facts, Figures, Run, RunFolder
from dms_fastai.runs import progress
from dms_fastai.runs.advice import advice, other_settings
from dms_fastai.runs.history import History
from dms_fastai.runs.progress import Ahead, RichProgress, ahead
from dms_fastai.terminal import Terminal
from tests.conftest import quiet
from tests.test_runs import dms  # noqa: F401  (a fixture)

SMALL = ("--arch", "test_dmsresnet", "--device", "cpu")


def watched(learn, file, epochs=2, terminal=False, to_come=None):
    """What a fit shows, without the codes that steer a terminal; and its history."""
    out = io.StringIO()
    console = Terminal(file=out, width=80, force_terminal=terminal)
    history = History(file)
    with RichProgress("a stage", history, console, to_come or Ahead()) as shown:
        quiet(learn).fit_recipe(epochs, cbs=[history, shown])
    return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", out.getvalue()), history.rows


# Lines and bar


def test_in_a_file_there_is_a_line_for_each_epoch_and_one_for_the_stage(dls, tmp_path):
    out, rows = watched(dms_learner(dls, "se"), tmp_path / "metrics.csv", 2)
    first, second, end = out.splitlines()
    for line, row in zip((first, second), rows, strict=True):
        assert line.startswith(f"a stage: epoch {row['epoch']}/2, train loss {row['train_loss']:.3f}, valid loss ")
        assert f"valid loss {row['valid_loss']:.3f}, accuracy {100 * row['valid_accuracy']:.2f} %, " in line
        assert "cross-entropy" not in line
    assert second.endswith(" images/s, 0:00 left")
    assert end.startswith(f"a stage: 2 epochs, accuracy {100 * rows[1]['valid_accuracy']:.2f} %, 0:")


@pytest.mark.parametrize("recipe", ["se", "kd"])
def test_in_a_terminal_the_lines_of_the_epochs_stay_above_a_bar_of_the_epoch(
    dls, teacher, tmp_path, monkeypatch, recipe
):
    monkeypatch.setattr(progress, "REFRESH_SECONDS", 0.0)
    learn = dms_learner(dls, recipe, teacher=teacher if recipe == "kd" else None)
    out, rows = watched(learn, tmp_path / "metrics.csv", 2, terminal=True)
    lines = [line.strip() for line in re.split(r"[\r\n]+", out)]
    parts = ["cross-entropy", "distillation"] if recipe == "kd" else []
    names = ["epoch", "train loss", *parts, "valid loss", "accuracy", "time"]
    assert [re.split("  +", line) for line in lines if line.startswith("epoch  ")] == [names]  # once
    keys = ["train_loss", *(f"train_{part.replace('-', '_')}" for part in parts), "valid_loss"]
    for row in rows:
        figures = [str(row["epoch"]), *(f"{row[key]:.3f}" for key in keys), f"{100 * row['valid_accuracy']:.2f} %"]
        assert [re.split("  +", line)[:-1] for line in lines].count(figures) == 1
    bars = [line for line in lines if re.match(r"epoch \d/2 .*train loss [\d.]+ [\d,]+ images/s \d+:\d\d left", line)]
    steps = len(dls.train)
    assert [sum(bar.startswith(f"epoch {epoch}/2") for bar in bars) >= steps for epoch in (1, 2)] == [True, True]
    assert lines.count("a stage") == 1
    assert any(line.startswith("a stage: 2 epochs, accuracy ") for line in lines)


def test_a_stage_that_is_stopped_is_not_said_to_be_finished(dls, tmp_path):
    class Stop(Callback):
        order = 75

        def after_epoch(self):
            raise CancelFitException

    out, rows = watched(dms_learner(dls, "se", cbs=Stop()), tmp_path / "metrics.csv", 2)
    assert len(rows) == 1
    assert len(out.splitlines()) == 1
    assert out.startswith("a stage: epoch 1/2, ")


@pytest.mark.parametrize(
    ("to_come", "words"),
    [
        (Ahead(), "1:05 left"),
        (Ahead(0, 1), "1:05 left + 1 stage"),
        (Ahead(0, 3), "1:05 left + 3 stages"),
        (Ahead(55), "1:05 left, in all 2:00"),
        (Ahead(3 * 3600, 2), "1:05 left, in all 3 h 01 + 2 stages"),
    ],
)
def test_the_time_left_is_that_of_the_stage_and_of_the_command(to_come, words):
    shown = RichProgress("a stage", SimpleNamespace(rows=[]), Terminal(file=io.StringIO()), to_come)
    assert shown.left(65) == words


def test_what_is_ahead_takes_as_long_as_the_same_recipe_took():
    def stage(name, seconds=0.0, finished=False):
        folder = SimpleNamespace(finished=finished, facts=lambda: SimpleNamespace(seconds=seconds))
        return SimpleNamespace(recipe=SimpleNamespace(name=name), folder=folder)

    done = [stage("se", 40.0, True), stage("kd", 60.0, True)]
    assert ahead([stage("mixup"), stage("se"), stage("kd"), stage("kd", 1.0, True)], done) == Ahead(100.0, 1)
    assert ahead([stage("kd", 1.0, True)], done, restart=True) == Ahead(60.0, 0)
    assert ahead([stage("se"), stage("kd")], []) == Ahead(0, 2)
    assert ahead([], done) == Ahead(0, 0)


def test_a_command_counts_its_stages(dms):  # noqa: F811
    args = ("run", "baseline", "se", "--seeds", "0,1", "--epochs", 1, *SMALL, "--set", "data.batch_size=256")
    code, out, _ = dms(*args)
    assert code == 0
    ends = [line.partition(" left")[2] for line in out.splitlines() if ": epoch 1/1" in line]
    assert ends[0] == " + 3 stages"
    assert ends[1] == " + 1 stage" or re.fullmatch(r", in all \d:\d\d \+ 1 stage", ends[1])
    assert [re.sub(r"\d:\d\d", "", end) for end in ends[1:]] == [", in all  + 1 stage", ", in all ", ""]


def test_a_learner_shows_fastais_own_bar(dls, capsys):
    learn = dms_learner(dls, "se")
    assert [type(cb) for cb in learn.cbs if isinstance(cb, ProgressCallback)] == [ProgressCallback]
    learn.fit_recipe(1)
    assert "train_loss" in capsys.readouterr().out


# Advice

FACTS = Facts(
    *("finished", "se", "+ SE", "m", 1, "digits", "test"),
    **{"validation_images": 100, "seed": 0, "epochs": 9, "started": "", "epochs_done": 9, "seconds": 1.0, "classes": 4},
)


def epochs(train, valid, accuracy=0.8):
    return [
        {"epoch": n, "train_loss": a, "valid_loss": b, "valid_accuracy": accuracy}
        for n, (a, b) in enumerate(zip(train, valid, strict=True), start=1)
    ]


FALLING = [2 * 0.8**n for n in range(12)]
WELL = epochs(FALLING, FALLING)


@pytest.mark.parametrize(
    ("rows", "steps", "largest", "others", "words"),
    [
        (WELL, 300, 0.25, 0, []),
        (epochs(FALLING[::-1], FALLING), 300, 0.25, 0, ["has diverged"]),
        (epochs(FALLING, FALLING, 0.25), 300, 0.3, 0, ["not better than chance, 25.00 %"]),
        (epochs(FALLING, FALLING, float(np.float32(0.6))), 300, 0.6, 0, ["the largest class every time"]),
        (epochs(FALLING, FALLING, 0.251), 300, 0.25, 0, []),
        (epochs(FALLING, FALLING, 0.7), 300, 0.7, 0, ["the largest class every time, 70.00 %"]),
        (epochs(FALLING, FALLING, 0.71), 300, 0.7, 0, []),
        (WELL, 299, 0.25, 0, ["299 training steps are few"]),
        (epochs(FALLING, FALLING, 0.96), 299, 0.25, 0, []),  # they were enough
        (epochs(FALLING, [1.0] * 8 + [1.0, 1.1, 1.2, 1.3]), 300, 0.25, 0, ["overfits"]),
        (epochs(FALLING, [1.0] * 8 + [1.0, 1.01, 1.0, 1.02]), 300, 0.25, 0, []),  # noise
        (epochs(FALLING, [0.5, 0.6, 0.7, 0.9, *FALLING[4:]]), 300, 0.25, 0, []),  # early
        (epochs([1.0] * 12, [1.0] * 8 + [1.0, 1.1, 1.2, 1.3]), 300, 0.25, 0, []),  # the training loss does not fall
        (epochs(FALLING[:8], [1, 1, 1, 1, 1, 1, 1, 2]), 300, 0.25, 0, []),  # too few epochs to tell
        (WELL, 300, 0.25, 2, ["same test images", "data.valid=0.1"]),
        (epochs([2.0, 9.0], [2.0, 9.0], 0.2), 10, 0.9, 1, ["diverged", "chance", "steps", "test images"]),
        (epochs([2.0], [math.nan], 0.5), 300, 0.25, 0, []),
        (epochs(FALLING, [math.nan] * 12, 0.5), 300, 0.25, 0, []),
        (epochs(FALLING, [*FALLING[:10], 1.0, math.inf], 0.5), 300, 0.25, 0, []),
    ],
)
def test_advice(rows, steps, largest, others, words):
    found = advice(FACTS, rows, steps, largest, others)
    assert all(line.startswith("+ SE: ") and "\n" not in line for line in found)
    if len(words) != 2 or others != 2:  # two words of one line
        assert len(found) == len(words)
    assert all(word in "; ".join(found) for word in words)
    held_out = advice(replace(FACTS, valid="valid"), rows, steps, largest, others)
    assert [line for line in found if "test images" not in line] == held_out


def test_chance_is_known_in_float32_as_accuracies_are_measured():
    for classes in range(2, 101):
        rows = epochs(FALLING, FALLING, float(np.float32(1 / classes)))
        assert "not better than chance" in advice(replace(FACTS, classes=classes), rows, 300, 0.0)[0]


def test_a_good_run_needs_no_advice(dms):  # noqa: F811
    assert dms("run", "se", "--epochs", 15, *SMALL)[::2] == (0, "")


def test_a_run_that_diverges_is_told_so(dms):  # noqa: F811
    clipped = ("--set", "optimizer.lr=1000", "--set", "clip.value=0.1")  # without it the run ends with NaN
    code, _, err = dms("run", "se", "--epochs", 4, *SMALL, *clipped)
    assert code == 0
    lines = err.splitlines()
    assert lines[0].startswith("dms-fastai: + SE: it has diverged: its training loss rose from ")
    assert all(line.startswith("dms-fastai: + SE: ") for line in lines)


def test_runs_chosen_on_the_test_images_are_told_once(dms, tmp_path):  # noqa: F811
    short = ("--epochs", 1, *SMALL, "--set", "data.batch_size=256")
    slower = ("--set", "optimizer.lr=0.05")
    err = dms("run", "se", *short, "--seeds", "0,1", "--out", "x")[2]
    assert "same test images" not in err  # seeds are no settings
    assert "same test images" not in dms("run", "baseline", *short, *slower, "--out", "x")[2]
    err = dms("run", "se", *short, *slower, "--seeds", "2,3", "--out", "x")[2]
    assert err.count("same test images") == 1
    assert "same test images" not in dms("run", "se", *short, *slower, "--seed", 4, "--out", "x")[2]
    err = dms("run", "se", *short, "--set", "optimizer.lr=0.02", "--out", "x/lower")[2]
    assert err.count("same test images") == 1
    run = Run.read(tmp_path / "x" / "lower" / "se" / "seed0")
    assert other_settings(run) == 5
    (tmp_path / "x" / "se" / "seed2" / "recipe.toml").write_text("=")
    (tmp_path / "x" / "se" / "seed3" / "run.json").write_text("{")
    assert other_settings(run) == 3


@pytest.mark.parametrize("name", ["se", "a/b", "**x", "[s]", "very/deep/name"])
def test_a_recipe_may_have_any_name(tmp_path, name):
    for lr in (0.1, 0.2):
        folder = RunFolder(tmp_path / name / f"seed{lr}")
        folder.path.mkdir(parents=True)
        figures = Figures(9, 1.0, 0.5, 1.0, 0.5)
        folder.write_facts(replace(FACTS, recipe=name, last=figures, best=figures))
        recipe = load_recipe("se", settings={"optimizer.lr": lr})
        folder.recipe_file.write_text(replace(recipe, name=name).to_toml())
    assert other_settings(Run.read(folder.path)) == 1
