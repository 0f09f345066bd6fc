"""The report: its arithmetic against known values, its files against the runs, and what it makes of broken ones."""

import io
import json
import math
import os
import random
import re
import shutil
import subprocess
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image
from rich.console import Console

from dms_fastai import UserError, dms_learner, load_data
from dms_fastai.clock import clock
from dms_fastai.errors import Notice
from dms_fastai.report import page
from dms_fastai.report.plots import DARK, LIGHT, PLOTS, draw, drawing
from dms_fastai.report.plots.classes import class_accuracies, classes
from dms_fastai.report.plots.confusion import confusion_matrix
from dms_fastai.report.plots.cost import apart
from dms_fastai.report.plots.curves import by_epoch, curves
from dms_fastai.report.plots.drawing import looks, lowest
from dms_fastai.report.plots.reliability import reliability
from dms_fastai.report.rows import sections
from dms_fastai.report.shipped import shipped
from dms_fastai.report.statistics import binomial, calibrate, over_seeds, paired_images
from dms_fastai.report.tables import mistake_cells, notes, table
from dms_fastai.run_folder import Run, RunFolder, find_runs
from dms_fastai.runs.lock import locked
from dms_fastai.runs.plan import Opened, plan
from dms_fastai.runs.predictions import read_predictions, write_predictions
from dms_fastai.runs.stage import run_stage
from dms_fastai.runs.wanted import Wanted
from dms_fastai.terminal import Terminal
from tests.conftest import quiet
from tests.test_runs import dms  # noqa: F401  (a fixture)

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Two stages of two seeds each, and one stage of a single seed, on digits."""
    out = tmp_path_factory.mktemp("runs")
    for recipe, seeds in (("baseline", (0, 1)), ("se", (0, 1)), ("mixup", (1,))):
        wanted = Wanted((recipe,), seeds=seeds, out=out, epochs=2, settings={"data.batch_size": 256})
        opened = Opened("digits")
        assert all(run_stage(stage, opened).finished for stage in plan(wanted, opened))
    return out


@pytest.fixture
def runs(trained, tmp_path):
    """A copy of them, to be damaged."""
    return shutil.copytree(trained, tmp_path / "artifacts")


@pytest.fixture
def rough(monkeypatch):
    """Plots of a few pixels, each drawn once, for tests of what is around them."""
    draw, drawn = page.draw, {}

    def once(plot, section, theme):
        if (plot.name, section.data) not in drawn:
            drawn[plot.name, section.data] = draw(plot, section, theme)
        return drawn[plot.name, section.data]

    monkeypatch.setattr(drawing, "DPI", 20)
    monkeypatch.setattr(page, "draw", once)


def shows(text, mean, sd):
    """Whether a table has a mean, and its standard deviation in the next cell."""
    return re.search(rf"\b{mean:.2f}\D+\b{sd:.2f}\b", text) is not None


def last(folder):
    return Run.read(folder).facts.last.valid_accuracy


# --- arithmetic


def test_the_interval_over_seeds_is_students():
    estimate = over_seeds([0.1, 0.2, 0.3])  # the 97.5 % point of t with 2 degrees of freedom is 4.302653
    assert (estimate.mean, estimate.sd, estimate.n, estimate.over) == (
        pytest.approx(0.2),
        pytest.approx(0.1),
        3,
        "seeds",
    )
    assert estimate.high - estimate.mean == pytest.approx(4.302653 * 0.1 / math.sqrt(3), rel=1e-6)
    assert estimate.mean - estimate.low == pytest.approx(estimate.high - estimate.mean)


def test_the_interval_of_one_seed_is_wilsons():
    estimate = binomial(0.8, 100)
    assert (estimate.low, estimate.high) == (pytest.approx(0.7112, abs=1e-4), pytest.approx(0.8666, abs=1e-4))
    assert binomial(1.0, 50).high == pytest.approx(1.0)


def test_the_difference_on_the_same_images_counts_those_where_they_disagree():
    right, before = np.zeros(100, bool), np.zeros(100, bool)
    right[:20], before[10:16] = True, True  # 14 only now, none only before
    estimate = paired_images(right, before)
    error = math.sqrt((14 - 14**2 / 100) / 100**2)
    assert estimate.mean == pytest.approx(0.14)
    assert estimate.high - estimate.mean == pytest.approx(1.959964 * error, rel=1e-6)


def test_calibration_of_a_classifier_that_is_too_sure():
    probabilities = np.array([[0.9, 0.1]] * 4 + [[0.3, 0.7]] * 2)
    labels = np.array([0, 0, 1, 1, 1, 0])
    found = calibrate(np.log(probabilities), probabilities.argmax(1), labels)
    assert found.ece == pytest.approx((4 * abs(0.5 - 0.9) + 2 * abs(0.5 - 0.7)) / 6)
    assert found.nll == pytest.approx(-np.log([0.9, 0.9, 0.1, 0.1, 0.7, 0.3]).mean())
    assert found.confidence == pytest.approx([0.7, 0.9])
    assert found.accuracy == pytest.approx([0.5, 0.5])


def test_labels_keep_their_distance_and_stay_near():
    spots = [(1.0, y, "", "") for y in (5.0, 5.1, 5.2, 9.0)] + [(100.0, 5.1, "", "")]
    places = apart(spots, 1.0)
    assert all(b - a >= 0.99 for a, b in pairwise(places[:4]))
    assert places[3:] == [9.0, 5.1]
    assert sum(places[:3]) == pytest.approx(15.3)


# --- runs


def test_predictions_are_those_that_validation_counted(trained):
    for folder in sorted(trained.glob("*/seed*")):
        p = read_predictions(folder / "predictions.npz")
        assert p.right.mean() == pytest.approx(last(folder), abs=1e-6)
        wrong = np.flatnonzero(~p.right)
        assert set(p.mistakes) <= set(wrong)
        assert len(p.mistakes) == min(24, len(wrong))
        assert p.images.shape == (len(p.mistakes), 8, 8, 3)
        sure = p.log_probabilities[p.mistakes].max(1)
        assert (np.diff(sure) <= 1e-2).all()
        assert np.trace(confusion_matrix([p])) == p.right.sum()


def test_probabilities_too_small_for_the_file_stay_finite(trained, tmp_path):
    learn = quiet(dms_learner(load_data("digits"), "se"))
    with torch.no_grad():
        learn.model.fc.weight.mul_(1e9)
    write_predictions(learn, tmp_path / "predictions.npz")
    assert np.isfinite(np.load(tmp_path / "predictions.npz")["log_probabilities"]).all()


def test_a_finished_run_without_predictions_gets_them_by_the_same_command(dms, runs):  # noqa: F811
    folder = runs / "se" / "seed1"
    before = read_predictions(folder / "predictions.npz")
    (folder / "predictions.npz").unlink()
    again = ("--epochs", 2, "--set", "data.batch_size=256", "--out", runs, "--seed", 1, "--device", "cpu")
    assert dms("run", "se", *again)[0] == 0
    after = read_predictions(folder / "predictions.npz")
    assert (after.predicted == before.predicted).all()
    assert np.allclose(after.log_probabilities, before.log_probabilities, atol=0.05)


def test_rows_are_recipes_and_differences_are_of_shared_seeds(trained):
    (section,) = sections(find_runs([trained])[0])
    assert [(row.label, row.seeds) for row in section.rows] == [
        ("ResNet", [0, 1]),
        ("+ SE", [0, 1]),
        ("+ SE + MixUp", [1]),
    ]
    seeds = [[last(trained / recipe / f"seed{s}") for s in (0, 1)] for recipe in ("baseline", "se")]
    gain, over_images = (d.estimate for d in section.differences)
    assert gain.mean == pytest.approx(np.mean(seeds[1]) - np.mean(seeds[0]))
    assert (gain.n, gain.over) == (2, "seeds")
    assert over_images.mean == pytest.approx(last(trained / "mixup" / "seed1") - seeds[1][1], abs=1e-6)
    assert (over_images.n, over_images.over) == (1, "images")


def test_a_recipe_written_before_a_key_was_thought_of_is_the_same_recipe(runs):
    file = runs / "se" / "seed0" / "recipe.toml"
    lines = [line for line in file.read_text().splitlines() if not line.startswith(("label_smoothing", "border"))]
    assert len(lines) == len(file.read_text().splitlines()) - 2
    file.write_text("\n".join(lines))
    (section,) = sections(find_runs([runs])[0])
    assert [row.seeds for row in section.rows] == [[0, 1], [0, 1], [1]]
    file.write_text(f"{file.read_text()}\n[model]")  # twice, which TOML does not have: who knows what it was
    (section,) = sections(find_runs([runs])[0])
    assert [row.seeds for row in section.rows] == [[0, 1], [0], [1], [1]]


def test_trials_of_a_search_are_no_results(dms, runs, rough):  # noqa: F811
    """Not of a folder that holds results, too; of the search's own, they are all that there is."""
    search = runs / "digits" / "tune" / "se"
    for number in ("001", "002"):
        shutil.copytree(runs / "se" / "seed0", search / number / "se" / "seed0")
    (search / "trials.log").touch()
    with pytest.warns(Notice, match=f"2 trials of a search left out; to show them: dms-fastai report {search}"):
        found, problems = find_runs([runs])
    assert len(found) == 5
    assert not problems
    assert len(find_runs([search])[0]) == 2
    assert len(find_runs([search / "001"])[0]) == 1
    with pytest.warns(Notice):
        assert len(find_runs([runs, search])[0]) == 7
    code, out, err = dms("report", "artifacts", "--out", "r")
    assert (code, err) == (
        0,
        "dms-fastai: 2 trials of a search left out; to show them: dms-fastai report artifacts/digits/tune/se\n",
    )
    assert "+ SE (1)" not in out


def rewrite(folder, **facts):
    file = folder / "run.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | facts))


def test_runs_that_began_from_other_weights_of_a_name_are_no_seeds_of_one(runs):
    for seed, digest in ((0, "a" * 16), (1, "b" * 16)):
        rewrite(runs / "se" / f"seed{seed}", begun_from="model.safetensors", begun_digest=digest)
    found, _ = find_runs([runs])
    [section] = sections(found)
    assert [len(row.runs) for row in section.rows if row.title == "+ SE"] == [1, 1]
    for seed in (0, 1):
        rewrite(runs / "se" / f"seed{seed}", begun_digest="a" * 16, teacher=f"t/seed{seed}", teacher_digest=str(seed))
    [section] = sections(find_runs([runs])[0])
    assert [row.seeds for row in section.rows if row.title == "+ SE"] == [[0, 1]], "each has a teacher of its own"
    for seed in (0, 1):
        rewrite(runs / "se" / f"seed{seed}", teacher="t.safetensors")
    [section] = sections(find_runs([runs])[0])
    assert [len(row.runs) for row in section.rows if row.title == "+ SE"] == [1, 1]


def test_rows_that_were_measured_on_other_images_are_named(runs):
    [section] = sections(find_runs([runs])[0])
    assert "Measured on" not in " ".join(notes(section.rows))
    rewrite(runs / "mixup" / "seed1", valid="held out")
    [section] = sections(find_runs([runs])[0])
    said = " ".join(notes(section.rows))
    assert "Measured on held-out training images: + SE + MixUp." in said
    assert "Measured on the test images: ResNet, + SE." in said


def test_a_student_is_put_beside_itself_without_its_teacher(runs):
    for seed in (0, 1):
        rewrite(runs / "se" / f"seed{seed}", recipe="kd", title="KD", teacher=f"t/seed{seed}")
        rewrite(runs / "baseline" / f"seed{seed}", recipe="kd-alone", title="KD, no teacher", model="test_dmsresnet")
        rewrite(runs / "se" / f"seed{seed}", model="test_dmsresnet")
    [section] = sections(find_runs([runs])[0])
    assert ("KD", "KD, no teacher") in [(each.row.title, each.base.title) for each in section.differences]


def test_a_seed_that_was_cut_does_not_count_beside_those_that_were_not(runs):
    shutil.copytree(runs / "se" / "seed1", runs / "se" / "seed2")
    rewrite(runs / "se" / "seed2", seed=2)
    figures = {"epoch": 1, "train_loss": 2.0, "train_accuracy": 0.1, "valid_loss": 2.0, "valid_accuracy": 0.12}
    cut_short = {"status": "interrupted", "epochs_done": 1, "last": figures, "best": figures}
    for seed, seconds, pflop in ((0, 60.0, 3.0), (1, 1.0, 0.1), (2, 80.0, 5.0)):
        work = {"student": pflop, "teacher": 0.0, "total": pflop}
        rewrite(runs / "se" / f"seed{seed}", seconds=seconds, train_pflop=work)
    rewrite(runs / "se" / "seed1", **cut_short)
    (section,) = sections(find_runs([runs])[0])
    assert (section.rows[1].seconds, section.rows[1].train_pflop) == (70, 4)
    se, gain = section.rows[1], section.differences[0].estimate
    assert se.seeds == [0, 1, 2]
    assert se.accuracy.mean == pytest.approx(np.mean([last(runs / "se" / f"seed{s}") for s in (0, 2)]))
    assert "n = 2)" in notes(section.rows)[1]
    assert gain.n == 1  # seed 0 alone has both
    rewrite(runs / "se" / "seed0", **cut_short)
    rewrite(runs / "se" / "seed2", **cut_short)
    (section,) = sections(find_runs([runs])[0])
    assert section.rows[1].accuracy.mean == pytest.approx(0.12)
    assert "+ SE" not in [d.row.title for d in section.differences]  # the baseline has come further


def test_what_is_no_seed_of_a_recipe_is_a_row_of_its_own(runs):
    shutil.copytree(runs / "se" / "seed0", runs / "se" / "seed0_before")
    (section,) = sections(find_runs([runs])[0])
    rows = {row.note: row.seeds for row in section.rows if row.title == "+ SE"}
    assert rows == {f"{runs}/se/seed0_before": [0], f"{runs}/se/seed0": [0, 1]}
    shutil.rmtree(runs / "se" / "seed0_before")
    rewrite(runs / "se" / "seed1", data_digest=["other", "images"])
    (section,) = sections(find_runs([runs])[0])
    assert [row.seeds for row in section.rows if row.title == "+ SE"] == [[0], [1]]
    assert [d.estimate and d.estimate.n for d in section.differences] == [1, 1]  # + SE to ResNet, and so is MixUp


def test_a_stage_is_compared_with_that_of_its_own_network(runs):
    for recipe in ("baseline", "se"):
        shutil.copytree(runs / recipe, runs / "wide" / recipe)
        for folder in (runs / "wide" / recipe).glob("seed*"):
            name = "wide_plain" if recipe == "baseline" else "wide"
            rewrite(folder, model=name, started="2000-01-01T00:00:00+00:00")
            text = (folder / "recipe.toml").read_text()
            (folder / "recipe.toml").write_text(re.sub('name = "test_dmsresnet.*"', 'name = "resnet18"', text))
    (section,) = sections(find_runs([runs])[0])
    pairs = {(d.row.first.model, d.base.first.model) for d in section.differences if d.row.title == "+ SE"}
    assert pairs == {("test_dmsresnet", "test_dmsresnet_plain"), ("wide", "wide_plain")}


def test_another_network_is_no_step_of_the_ablation(runs):
    for folder in (runs / "se").glob("seed*"):
        rewrite(folder, model="mobilenetv3_small_050")
    (section,) = sections(find_runs([runs])[0])
    pairs = [(d.row.title, d.base.title) for d in section.differences]
    assert pairs == [("+ SE + MixUp", "ResNet")]


def test_what_tells_rows_apart_is_said_once(runs):
    lr, momentum = ("lr = 0.1", "lr = 0.05"), ("momentum = 0.9", "momentum = 0.8")
    for name, changes in (("a", [lr]), ("b", [lr, momentum])):
        text = (shutil.copytree(runs / "mixup", runs / name) / "seed1" / "recipe.toml").read_text()
        for change in changes:
            assert change[0] in text
            text = text.replace(*change)
        (runs / name / "seed1" / "recipe.toml").write_text(text)
    (section,) = sections(find_runs([runs])[0])
    told = [(row.label, row.note) for row in section.rows if row.title == "+ SE + MixUp"]
    assert [label for label, _ in told] == [f"+ SE + MixUp ({number})" for number in (1, 2, 3)]
    assert {note for _, note in told} == {f"lr {lr}, momentum {m}" for lr, m in ((0.1, 0.9), (0.05, 0.9), (0.05, 0.8))}
    assert [f"({number}) {note}" for number, (_, note) in enumerate(told, start=1)] == notes(section.rows)[-3:]


def test_a_part_that_others_lack_is_named_and_speed_is_no_difference(runs):
    changes = {
        "compiled": "\n[compile]\nsteps = 0\n",
        "cut": "\n[cutmix]\n",
        "rare": "\n[cutmix]\nalpha = 0.2\n",
        "blanked": "\n[cutout]\nsize = 0.375\n",
    }
    for name, more in changes.items():
        for folder in shutil.copytree(runs / "se", runs / name).glob("seed*"):
            recipe = folder / "recipe.toml"
            text = re.sub(r"\[compile\]\n(\w+ = .*\n)*", "", recipe.read_text())
            recipe.write_text(text + more)
    shutil.rmtree(runs / "se")  # of which "compiled" is a copy
    (section,) = sections(find_runs([runs])[0])
    told = {row.runs[0].folder.path.parent.name: row.note for row in section.rows if row.title == "+ SE"}
    assert told == {
        "compiled": "",
        "cut": "cutmix, alpha 1.0",
        "rare": "cutmix, alpha 0.2",
        "blanked": "cutout, size 0.375",
    }


def test_students_of_several_teachers_are_compared_with_the_same_network_alone(runs):
    for name, teacher, more in (
        ("alone", None, ""),
        ("large", "large/seed0", "\n[distill]\nalpha = 0.5\n"),
        ("wide", "wide/seed0", "\n[distill]\nalpha = 0.9\n"),
    ):
        for folder in shutil.copytree(runs / "se", runs / name / "kd").glob("seed*"):
            rewrite(folder, recipe="kd", title="KD", teacher=teacher)
            recipe = folder / "recipe.toml"
            recipe.write_text(recipe.read_text().replace('name = "se"', 'name = "kd"') + more)
    (section,) = sections(find_runs([runs])[0])
    row = {row.first.teacher: row for row in section.rows if row.title == "KD"}
    assert row[None].note == "without a teacher"
    assert row["large/seed0"].note == "taught by large/seed0, alpha 0.5"
    assert row["wide/seed0"].note == "taught by wide/seed0, alpha 0.9"
    bases = {d.row.first.teacher: d.base for d in section.differences if d.row.title == "KD"}
    assert bases["large/seed0"] is bases["wide/seed0"] is row[None]
    assert bases[None].title == "+ SE + MixUp"  # which kd extends


def test_the_band_is_the_standard_deviation_of_the_table(runs):
    (section,) = sections(find_runs([runs])[0])
    _, _, sd = by_epoch(section.rows[1], "valid_accuracy")
    assert sd[-1] == pytest.approx(section.rows[1].accuracy.sd)
    assert by_epoch(section.rows[2], "valid_accuracy")[2].tolist() == [0, 0]


def test_a_class_without_images_is_not_the_hardest(runs):
    (section,) = sections(find_runs([runs])[0])
    p = section.rows[1].predictions[0][0]
    kept = p.labels != 3
    few = replace(p, log_probabilities=p.log_probabilities[kept], predicted=p.predicted[kept], labels=p.labels[kept])
    found = class_accuracies(SimpleNamespace(predictions=([few], [])))
    assert np.flatnonzero(np.isnan(found)).tolist() == [3]
    assert found[4] == pytest.approx(p.right[p.labels == 4].mean())


def test_every_file_of_the_report_opens_and_says_what_the_runs_say(dms, runs, tmp_path):  # noqa: F811
    code, out, _ = dms("report")
    assert code == 0
    both = [last(runs / "se" / f"seed{s}") for s in (0, 1)]
    mean, sd = 100 * np.mean(both), 100 * np.std(both, ddof=1)
    assert shows(out, mean, sd)
    assert "digits, seeds 0, 1" in out
    assert "2 shared seeds" in out
    page, text = (tmp_path / "report" / name for name in ("index.html", "report.md"))
    for file in (page, text):
        assert shows(file.read_text(), mean, sd)
    assert not re.search(r"""(src|href|url)\s*=?\s*["'(]+(?!data:)""", page.read_text())
    images = {file.stem.removeprefix("digits-"): file for file in (tmp_path / "report").glob("*.png")}
    assert images.keys() == {plot.name for plot in PLOTS}
    for name, file in images.items():
        with Image.open(file) as image:
            assert min(image.size) > 300
            assert len(image.convert("RGB").getcolors(1_000_000)) > 20
            if name == "ablation":
                assert json.loads(image.info["Description"])["+ SE"][0] == pytest.approx(np.mean(both), abs=1e-6)
        assert f"({file.name})" in text.read_text()


@pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium to open the page in")
@pytest.mark.parametrize(("scheme", "theme"), [(0, DARK), (1, LIGHT)])
def test_a_browser_without_a_network_shows_the_plots_in_both_themes(dms, runs, tmp_path, scheme, theme):  # noqa: F811
    assert dms("report")[0] == 0
    shot = tmp_path / "shot.png"
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--window-size=1100,1500"]
    flags += ["--host-resolver-rules=MAP * ~NOTFOUND", f"--blink-settings=preferredColorScheme={scheme}"]
    page = tmp_path / "report" / "index.html"
    command = [CHROMIUM, *flags, f"--user-data-dir={tmp_path / 'user'}", f"--screenshot={shot}", page.as_uri()]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    with Image.open(shot) as image:
        colours = {colour: count for count, colour in image.convert("RGB").getcolors(10_000_000)}
    bright = theme is LIGHT
    assert (sum(max(colours, key=colours.get)) > 3 * 128) == bright
    dots = tuple(int(theme.colours[1][i : i + 2], 16) for i in (1, 3, 5))
    assert colours.get(dots, 0) > 50


@pytest.mark.parametrize("width", [80, 200])
def test_the_table_in_a_terminal_has_every_number_whole(runs, width):
    rewrite(runs / "mixup" / "seed1", model="vit_small_patch14_reg4_dinov2.lvd142m", parameters=123_456_789, epochs=200)
    (section,) = sections(find_runs([runs])[0])
    out = io.StringIO()
    Terminal(file=out, width=width).print(table(section))
    text = out.getvalue()
    assert max(map(len, text.splitlines())) <= width
    assert "…" not in text
    head, rows = text.split("─\n")
    columns = ("stage", "network", "parameters", "epochs", "accuracy", "best*", "time")
    assert [name for name in columns if name not in head] == []
    for row in section.rows:
        accuracy = row.accuracy
        assert f"{row.first.parameters:,}" in rows
        assert (
            shows(rows, 100 * accuracy.mean, 100 * accuracy.sd) if accuracy.sd else f"{100 * accuracy.mean:.2f}" in rows
        )


# --- whose runs


def test_the_runs_of_the_package_are_those_that_git_has_and_nobody_has_changed(runs, monkeypatch):
    git = ["git", "-C", str(runs), "-c", "user.name=x", "-c", "user.email=x"]
    subprocess.run([*git, "init", "-q"], check=True)
    monkeypatch.setattr("dms_fastai.report.shipped.ROOT", runs)
    assert shipped() == set()
    subprocess.run([*git, "add", "baseline", "se"], check=True)
    subprocess.run([*git, "commit", "-qm", "x"], check=True)
    rewrite(runs / "se" / "seed1", seconds=1.5)
    assert shipped() == {(runs / folder).resolve() for folder in ("baseline/seed0", "baseline/seed1", "se/seed0")}
    monkeypatch.setattr("dms_fastai.report.shipped.ROOT", runs / "nowhere")
    assert shipped() == set()


def test_ones_own_runs_come_first_and_those_of_the_package_are_folded(dms, runs, rough, tmp_path, monkeypatch):  # noqa: F811
    for folder, data, year in (
        ("mixup/seed1", "mine", 2001),
        ("se/seed1", "yours", 2002),
        ("se/seed0", "digits", 2000),
    ):
        rewrite(runs / folder, data=data, started=f"{year}-01-01T00:00:00+00:00")
    theirs = {(runs / folder).resolve() for folder in ("baseline/seed0", "baseline/seed1")}
    found = sections(find_runs([runs])[0], theirs)
    assert [(s.data, s.shipped) for s in found] == [(d, d == "x") for d in ("yours", "mine", "digits")] + [
        ("digits", True)
    ]
    monkeypatch.setattr("dms_fastai.report.shipped.shipped", lambda: theirs)
    code, out, _ = dms("report")
    assert code == 0
    assert "ResNet" not in out
    assert "runs that came with the package: 2" in out
    html, text = ((tmp_path / "report" / name).read_text() for name in ("index.html", "report.md"))
    own, folded = html.split("<details>")
    assert re.findall("<h2>([a-z]+), seed", own) == ["yours", "mine", "digits"]
    assert re.findall("<h2>([a-z]+), seed", folded) == ["digits"]
    assert "ResNet" in folded[: folded.index("</details>")]
    assert "ResNet" not in own
    assert re.findall("## ([a-z]+), seed", text) == ["yours", "mine", "digits", "digits"]
    assert "digits-ablation.png" in text
    assert "digits-shipped-ablation.png" in text
    monkeypatch.setattr("dms_fastai.report.shipped.shipped", lambda: {f.resolve() for f in runs.glob("*/seed*")})
    assert "ResNet" in dms("report")[1]
    assert "<details>" not in (tmp_path / "report" / "index.html").read_text()


# --- many rows


def test_an_axis_leaves_out_a_few_rows_that_are_far_below():
    assert lowest([(95, 96), (96, 97), (9, 11)]) == 95
    assert lowest([(95, 96), (96, 97), (9, 11), (40, 41)]) == 9  # they are half of the rows
    assert lowest([(95, 96), (96, 97), (97, 98), (9, 11), (40, 41)]) == 95
    assert lowest([(70, 80), (75, 85), (60, 65)]) == 60  # not far
    assert lowest([(95, 96), (10, 11)]) == 10
    assert lowest([(95, 96)]) == 95


def test_no_two_of_many_rows_look_alike(trained):
    (section,) = sections(find_runs([trained])[0])
    many = replace(section, rows=[section.rows[0]] * 48)
    for theme in (LIGHT, DARK):
        found = [look for _, look in looks(many, theme)]
        assert len({(look.colour, look.line) for look in found}) == 48
        assert len({(look.colour, look.marker) for look in found}) == 48


def test_a_long_legend_takes_nothing_from_the_axes(trained):
    (section,) = sections(find_runs([trained])[0])
    row = section.rows[1]
    titled = [replace(run, facts=replace(run.facts, title="a long title, word by word " * 3)) for run in row.runs]
    many = replace(section, rows=[replace(row, runs=titled)] * 20)
    for plot in (curves, reliability, classes):
        heights = []
        for rows in (section, many):
            drawn = plot(rows, LIGHT)
            FigureCanvasAgg(drawn).draw()
            heights.append(drawn.axes[0].get_window_extent().height / drawn.dpi)
        (legend,) = drawn.legends
        assert heights[1] > 0.9 * heights[0], plot
        box = legend.get_window_extent()
        assert 0 <= box.x0 < box.x1 <= drawn.bbox.width
        assert all("\n" in text.get_text() for text in legend.get_texts())


# --- what is broken


def cut(file):
    file.write_bytes(file.read_bytes()[:-20])


def test_broken_folders_are_named_and_the_rest_is_reported(dms, runs, tmp_path):  # noqa: F811
    cut(runs / "baseline" / "seed0" / "run.json")
    (runs / "baseline" / "seed1" / "metrics.csv").unlink()
    cut(runs / "se" / "seed0" / "predictions.npz")
    squeezed = runs / "se" / "seed1" / "predictions.npz"
    squeezed.write_bytes(squeezed.read_bytes()[:60] + b"\xff" * 40 + squeezed.read_bytes()[100:])
    (runs / "se" / "seed1" / "metrics.csv").write_text("epoch,valid_accuracy\n1,much\n")
    (runs / "lost").mkdir()
    (runs / "lost" / "metrics.csv").write_text("epoch\n1\n")
    running = runs / "mixup" / "seed1" / "run.json"
    facts = json.loads(running.read_text())
    running.write_text(json.dumps(facts | {"status": "running", "epochs_done": 1}))
    (runs / "odd").mkdir()
    (runs / "odd" / "run.json").write_text(json.dumps({k: v for k, v in facts.items() if k != "seed"}))
    (runs / "list").mkdir()
    (runs / "list" / "run.json").write_text("[]")
    code, out, err = dms("report")
    assert (code, err) == (0, "")
    text = (tmp_path / "report" / "report.md").read_text()
    for words in (
        "baseline/seed0/run.json is damaged",
        "baseline/seed1/metrics.csv is missing",
        "se/seed0/predictions.npz is damaged",
        "se/seed1/metrics.csv is damaged",
        "se/seed1/predictions.npz is damaged",
        "lost holds no run: it has no run.json",
        "mixup/seed1: interrupted, epoch 1/2",
        "odd/run.json is damaged: 'seed' is None",
        "list/run.json is damaged",
    ):
        assert words in text, words
    assert "left out: " in out
    for file in ("baseline/seed1/metrics.csv is missing", "se/seed0/predictions.npz is damaged: it is no .npz file"):
        assert file in " ".join(out.split())
    assert "+ SE + MixUp [seed 1 interrupted, epoch 1/2]" in text


JSON_JUNK = [
    *(None, True, -1, 0, 0.5, 10**30, 10**400, 1e308, float("nan"), float("-inf"), "", "7", "[/]", "[red]", "_x", "\n"),
    *("<script>\x1b[31m\u202e", "\ud800", "x" * 3000, [], {}, [[]], {"a": {"b": [1]}}),
]


@pytest.mark.parametrize("value", JSON_JUNK, ids=lambda v: repr(v)[:20])
def test_each_fact_may_be_nonsense(runs, value):
    folder = runs / "se" / "seed0"
    told = json.loads((folder / "run.json").read_text())
    for key in [*told, "last.valid_accuracy", "last.valid_loss", "best.epoch"]:
        facts = json.loads(json.dumps(told))
        inner, _, outer = key.rpartition(".")
        (facts[inner] if inner else facts)[outer] = value
        (folder / "run.json").write_text(json.dumps(facts))
        found, problems = find_runs([runs])
        assert len(found) + len(problems) == 5
        assert all("se/seed0/run.json is damaged" in problem.what for problem in problems)
        assert ("ResNet", [0, 1]) in [(row.label, row.seeds) for section in sections(found) for row in section.rows]


@pytest.mark.parametrize("content", [b"[" * 100_000, b"\xff\x00", b"", b"[]", b"3", b'"finished"', b"{}"])
def test_what_is_no_json_is_damaged(tmp_path, content):
    (tmp_path / "run.json").write_bytes(content)
    with pytest.raises(UserError, match="is damaged"):
        RunFolder(tmp_path).facts()


METRICS = """epoch,lr,train_loss,train_accuracy,valid_loss,valid_accuracy,seconds,images_per_second
1,0.1,2.0,0.2,2.1,0.3,1.0,100.0
2,0.1,1.0,0.4,1.1,0.5,1.0,100.0
"""


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda text: text[:-1], "cut short"),
        (lambda text: text[:-30], "cut short"),
        (lambda text: "", "cut short"),
        (lambda text: text[: text.index("\n2") + 1], "1 of 2 epochs"),
        (lambda text: text[: text.index("\n") + 1], "0 of 2 epochs"),
        (lambda text: text.replace("\n2,", "\n3,"), "row 2 is not that of epoch 2"),
        (lambda text: "".join(sorted(text.splitlines(keepends=True), reverse=True)[i] for i in (0, 1, 2)), "row 1"),
        (lambda text: text.replace("valid_loss", "loss"), "'valid_loss' is None"),
        (lambda text: text.replace(",2.1,", ",,"), "'valid_loss' is None"),
        (lambda text: text.replace(",2.1,", ","), "shorter"),
        (lambda text: text.replace("0.3", "much"), "much"),
        (lambda text: text.replace("0.3", "3"), "'valid_accuracy' is 3.0"),
        (lambda text: text.replace("0.3", "nan"), "'valid_accuracy' is nan"),
        (lambda text: text.replace("2.1", "1e300"), "'valid_loss' is 1e+300"),
        (lambda text: "\0\x01" + text, "is damaged"),
    ],
)
def test_a_damaged_history_costs_its_own_curve(runs, change, words):
    file = runs / "mixup" / "seed1" / "metrics.csv"
    file.write_text(METRICS)
    (section,) = sections(find_runs([runs])[0])
    assert section.problems == []
    assert [row["valid_accuracy"] for row in section.rows[2].epochs[0][0]] == [0.3, 0.5]
    file.write_text(change(METRICS))
    (section,) = sections(find_runs([runs])[0])
    assert len(section.rows[2].epochs[0]) == 0
    assert len(section.rows[1].epochs[0]) == 2
    (problem,) = section.problems
    assert "mixup/seed1/metrics.csv is damaged" in problem.what
    assert words in problem.what


@pytest.mark.parametrize("loss", ["nan", "inf", "-inf", "3e38"])
def test_a_loss_that_is_no_number_leaves_a_gap_in_its_curve(runs, loss):
    (runs / "mixup" / "seed1" / "metrics.csv").write_text(METRICS.replace("1.1", loss))
    figures = {"epoch": 2, "train_loss": 1.0, "train_accuracy": 0.4, "valid_accuracy": 0.5}
    rewrite(runs / "mixup" / "seed1", last=figures | {"valid_loss": float(loss)})
    found, problems = find_runs([runs])
    (section,) = sections(found)
    assert problems == section.problems == []
    _, mean, sd = by_epoch(section.rows[2], "valid_loss")
    assert mean[0] == pytest.approx(2.1)
    assert np.isnan([mean[1], sd[1]]).all() == (loss != "3e38")
    assert section.rows[2].accuracy.mean == 0.5
    curves = next(plot for plot in PLOTS if plot.name == "curves")
    assert Image.open(io.BytesIO(draw(curves, section, LIGHT))).format == "PNG"


@pytest.mark.parametrize(
    "change",
    [
        lambda p: p.update(more=p["labels"]),
        lambda p: p.pop("vocab"),
        lambda p: p.update(labels=p["labels"].astype(float)),
        lambda p: p.update(labels=p["labels"] + 1),
        lambda p: p.update(predicted=p["predicted"] - 100),
        lambda p: p.update(mistakes=p["mistakes"] + 1000),
        lambda p: p.update(mistakes=np.array(0)),
        lambda p: p.update(images=p["images"][..., :1]),
        lambda p: p.update(images=p["images"].astype(np.float32)),
        lambda p: p.update(vocab=np.arange(10)),
        lambda p: p.update(log_probabilities=np.full_like(p["log_probabilities"], np.nan)),
        lambda p: p.update(log_probabilities=p["log_probabilities"] + 100),
        lambda p: p.update(files=np.array(["one"])),
        lambda p: p.update({key: p[key][:9] for key in ("log_probabilities", "predicted", "labels")}),
        lambda p: p.update({key: value[:0] for key, value in p.items()}),
    ],
)
def test_damaged_predictions_cost_their_own_row_of_the_plots(runs, change):
    file = runs / "se" / "seed1" / "predictions.npz"
    arrays = dict(np.load(file))
    change(arrays)
    np.savez_compressed(file, **arrays)
    (section,) = sections(find_runs([runs])[0])
    assert [len(row.predictions[0]) for row in section.rows] == [2, 1, 1]
    (problem,) = section.problems
    assert "se/seed1/predictions.npz is" in problem.what


def test_seeds_with_other_classes_are_not_added_up(runs):
    file = runs / "se" / "seed1" / "predictions.npz"
    arrays = dict(np.load(file))
    np.savez_compressed(file, **(arrays | {"vocab": arrays["vocab"][::-1]}))
    (section,) = sections(find_runs([runs])[0])
    assert [problem.what for problem in section.problems] == [f"{file} has other classes than another seed's"]


@pytest.mark.parametrize(
    "content", [b"=", b"\xff", b'extends = "nowhere"', b"x = " + b"[" * 5000, b"[optimizer]\nlr = -1"]
)
def test_a_broken_recipe_is_said(runs, content):
    (runs / "mixup" / "seed1" / "recipe.toml").write_bytes(content)
    (section,) = sections(find_runs([runs])[0])
    assert [row.label for row in section.rows] == ["ResNet", "+ SE", "+ SE + MixUp"]
    (problem,) = section.problems
    assert problem.folder == runs / "mixup" / "seed1"


def damage(chance, folder):
    """Change a file of a run's folder: a value, or some bytes."""
    file = folder / chance.choice(["run.json"] * 4 + ["metrics.csv", "predictions.npz", "recipe.toml"])
    if file.name == "run.json" and chance.random() < 0.7:
        facts = json.loads(file.read_text())
        table = facts[chance.choice(["last", "best"])] if chance.random() < 0.3 else facts
        table[chance.choice(sorted(table))] = chance.choice(JSON_JUNK)
        file.write_text(json.dumps(facts))
        return
    content = bytearray(file.read_bytes())
    if chance.random() < 0.3:
        del content[chance.randrange(len(content)) :]
    for _ in range(min(chance.choice([1, 3, 30]), len(content))):
        content[chance.randrange(len(content))] = chance.randrange(256)
    file.write_bytes(content)


def test_two_hundred_damaged_folders_leave_the_report_of_the_others(dms, runs, rough, tmp_path):  # noqa: F811
    chance, good = random.Random(0), runs / "se" / "seed0"
    for index in range(200):
        weights = shutil.ignore_patterns("*.pkl", "*.safetensors", "*.png")
        damage(chance, shutil.copytree(good, runs / f"damaged{index}" / "seed0", ignore=weights))
    found, problems = find_runs([runs])
    assert len(found) + len(problems) == 205
    assert 50 < len(problems) < 150
    code, out, err = dms("report")
    assert (code, err) == (0, "")
    both = [100 * last(runs / "se" / f"seed{s}") for s in (0, 1)]
    html = (tmp_path / "report" / "index.html").read_text()
    for text in (out, html, (tmp_path / "report" / "report.md").read_text()):
        assert shows(text, np.mean(both), np.std(both, ddof=1))
        assert all(c == "\n" or c.isprintable() for c in text)
        assert text is out or "<script>" not in text
    damages = [damage for section in sections(found) for damage in section.damages]
    assert out.count("left out: ") == len(problems) + len(damages) > len(problems)


def test_a_run_whose_process_is_dead_is_not_running(runs):
    folder = runs / "mixup" / "seed1"
    rewrite(folder, status="running", epochs_done=1)
    with locked(folder):
        (section,) = sections(find_runs([runs])[0])
        assert section.problems[-1].what == "running, epoch 1/2"
    files = sorted(folder.iterdir())
    (folder / ".lock").write_text("process 1 on a machine that was switched off")
    (section,) = sections(find_runs([runs])[0])
    assert section.problems[-1].what == "interrupted, epoch 1/2"
    (folder / ".lock").unlink()
    (section,) = sections(find_runs([runs])[0])
    assert section.problems[-1].what == "interrupted, epoch 1/2"
    assert sorted(folder.iterdir()) == files  # a report writes nothing there


@pytest.mark.parametrize(("error", "what"), [(PermissionError, "running"), (FileNotFoundError, "interrupted")])
def test_a_lock_that_cannot_be_opened_ends_no_report(runs, monkeypatch, error, what):
    folder, there = runs / "mixup" / "seed1", os.open
    rewrite(folder, status="running", epochs_done=1)
    (folder / ".lock").touch()

    def refuse(file, *args, **kwargs):
        if Path(file).name == ".lock":
            raise error("not that one")
        return there(file, *args, **kwargs)

    monkeypatch.setattr("dms_fastai.runs.lock.os.open", refuse)
    (section,) = sections(find_runs([runs])[0])
    assert section.problems[-1].what == f"{what}, epoch 1/2"


def test_mistakes_are_named_where_the_images_have_files(trained, tmp_path):
    learn = quiet(dms_learner(load_data("digits"), "se"))
    images = learn.dls.valid_ds
    images.files = [f"{images.vocab[label]}/<{index}>\x1b.png" for index, label in enumerate(images.labels)]
    write_predictions(learn, tmp_path / "predictions.npz")
    p = read_predictions(tmp_path / "predictions.npz")
    assert p.files.tolist() == images.files
    section = SimpleNamespace(headline=SimpleNamespace(predictions=([p], [])))
    rows = mistake_cells(section)
    assert len(rows) == 24
    for index, (file, said, sure, true) in zip(p.mistakes, rows, strict=True):
        assert file == rf"{true}/<{index}>\x1b.png"
        assert (said, true) == (p.vocab[p.predicted[index]], str(images.vocab[images.labels[index]]))
        assert float(sure) == pytest.approx(100 * np.exp(p.log_probabilities[index].max()), abs=0.6)
    old = read_predictions(trained / "se" / "seed0" / "predictions.npz")
    assert old.files is None
    assert mistake_cells(SimpleNamespace(headline=SimpleNamespace(predictions=([old], [])))) == []


def test_runs_that_have_not_begun_to_learn_are_no_trouble(dms, runs, tmp_path):  # noqa: F811
    for folder in runs.glob("*/seed*"):
        facts = json.loads((folder / "run.json").read_text())
        del facts["last"], facts["best"]
        (folder / "run.json").write_text(json.dumps(facts | {"status": "running", "epochs_done": 0}))
        (folder / "metrics.csv").unlink()
    assert dms("report")[0] == 0
    assert "interrupted, epoch 0/2" in (tmp_path / "report" / "report.md").read_text()


def test_names_that_mean_something_elsewhere_are_only_names(dms, tmp_path):  # noqa: F811
    """Class names and data sets with rich's brackets, matplotlib's dollars, Markdown's bars and HTML's tags."""
    names = ["a $b", "[red]c_d^e$", "<b>|x|"]
    digits, arrays = load_data("digits"), {"class_names": np.array(names)}
    for split, images in (("train", digits.train_ds), ("test", digits.valid_ds)):
        arrays[f"{split}_images"] = images.images[:90].permute(0, 2, 3, 1).numpy()
        arrays[f"{split}_labels"] = images.labels[:90].numpy() % 3
    np.savez(tmp_path / "<i>[bold]$x.npz", **arrays)
    code, out, err = dms("run", "se", "--data", "<i>[bold]$x.npz", "--epochs", 1, "--arch", "test_dmsresnet")
    assert code == 0
    assert all(line.startswith("dms-fastai: + SE: ") for line in err.splitlines())
    assert "<i>[bold]$x, seed 0" in out
    code, out, err = dms("report")
    assert (code, err) == (0, "")
    page = (tmp_path / "report" / "index.html").read_text()
    assert "<h2>&lt;i&gt;[bold]$x, seed 0</h2>" in page
    images = list((tmp_path / "report").glob("*.png"))
    assert len(images) == len(PLOTS)
    assert all(f"({image.name})" in (tmp_path / "report" / "report.md").read_text() for image in images)


def test_rows_of_one_title_are_told_apart(dms, runs):  # noqa: F811
    for name, change in (("lr", ("--set", "optimizer.lr=0.05")), ("again", ())):
        args = ("--epochs", 2, "--set", "data.batch_size=256", "--device", "cpu", "--out", runs / name, *change)
        assert dms("run", "mixup", "--seed", 1, *args)[0] == 0
    (section,) = sections(find_runs([runs])[0])
    told = {row.note for row in section.rows if row.title == "+ SE + MixUp"}
    assert told == {"lr 0.05", *(f"lr 0.1, {runs / f}" for f in ("mixup", "again/mixup"))}


def test_several_seeds_in_one_command(dms, tmp_path):  # noqa: F811
    args = ("run", "se", "--seeds", "3,5", "--epochs", 1, "--set", "data.batch_size=256", "--device", "cpu")
    code, out, _ = dms(*args)
    assert code == 0
    assert "digits, seeds 3, 5" in out
    each = [last(tmp_path / "artifacts" / "digits" / "se" / f"seed{s}") for s in (3, 5)]
    assert shows(out, 100 * np.mean(each), 100 * np.std(each, ddof=1))
    assert dms(*args)[1].count("epoch 1/1") == 0  # finished before


@pytest.mark.parametrize(
    ("seeds", "words"), [("0,0", "the same seed twice"), ("a", "write 0,1,2"), ("", "write 0,1,2")]
)
def test_bad_seeds(dms, seeds, words):  # noqa: F811
    code, _, err = dms("run", "se", "--seeds", seeds)
    assert code == 2
    assert words in err


def test_the_table_of_several_seeds_is_whole_in_80_columns():
    [section] = sections(find_runs([Path(__file__).parent.parent / "artifacts" / "cifar10-cpu"])[0])
    console = Console(width=80, file=io.StringIO())
    console.print(table(section))
    lines = console.file.getvalue().splitlines()
    for row in section.rows:
        assert any(line.startswith(row.label) and line.rstrip().endswith(f" {clock(row.seconds)}") for line in lines)


def test_a_narrow_terminal_has_fewer_columns_and_all_stages(runs):
    [section] = sections(find_runs([runs])[0])
    for width in (40, 50, 80):
        file = io.StringIO()
        Console(file=file, width=width).print(table(section, width))
        for row in section.rows:
            stage, accuracy = row.label.split()[0], f"{100 * row.accuracy.mean:.2f}"
            lines = file.getvalue().splitlines()
            assert any(line.startswith(stage) and accuracy in line for line in lines), (width, row.label)
        assert ("best*" in file.getvalue()) == ("* the best epoch" in file.getvalue()) == (width == 80)


def test_a_student_without_its_teacher_is_not_the_one_that_is_looked_at(runs):
    [section] = sections(find_runs([runs])[0])
    *_, se, mixup = section.rows
    assert section.headline is mixup
    for run in mixup.runs:
        told = json.loads(run.folder.facts_file.read_text())
        run.folder.facts_file.write_text(json.dumps({**told, "recipe": "mixup-alone"}))
    [section] = sections(find_runs([runs])[0])
    assert section.headline.label == se.label
