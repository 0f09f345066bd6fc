"""What is written to be read: the tutorial runs as it stands, and the README quotes what the report says."""

import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dms_fastai.models.dmsresnet import PRETRAINED
from dms_fastai.recipes import all_keys
from dms_fastai.report.page import write_report
from dms_fastai.report.rows import sections
from dms_fastai.report.statistics import paired_images
from dms_fastai.run_folder import Run, RunFolder, find_runs
from dms_fastai.runs.predictions import read_predictions
from docs.build import CELL, TUTORIAL, cells

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "docs" / "results"
REPORTED = {  # folders of runs, and where their reports are
    "cifar10-cpu": RESULTS,
    "cifar10-h200": RESULTS / "h200",
    "cifar10-cpu-students": RESULTS / "students",
}
README = (ROOT / "README.md").read_text()
DETAILS = (ROOT / "docs" / "results.md").read_text()


def test_the_tutorial_runs_to_a_student_that_has_left():
    text = TUTORIAL.read_text()
    ran = list(cells(text))
    assert len(ran) == len(CELL.findall(text)) == 10
    names = ran[-1].names
    shares = [float(share) for cell in ran for share in re.findall(r"right on ([\d.]+)%", cell.printed)]
    assert len(shares) == 2
    assert min(shares) > 90
    assert names["name"] in names["dls"].vocab
    drawn = [number for number, cell in enumerate(ran, start=1) if cell.figures]
    shown = {int(number) for number in re.findall(r"\(images/tutorial-(\d+)[-\d]*\.png\)", text)}
    assert shown == set(drawn)
    printed = [number for number, cell in enumerate(ran, start=1) if cell.printed]
    assert len(printed) == text.count("```text")


@pytest.mark.parametrize("file", sorted(PRETRAINED.glob("*.json")), ids=lambda f: f.stem)
def test_the_readme_says_how_good_the_trained_networks_are(file):
    facts = json.loads(file.read_text())
    [line] = [line for line in README.splitlines() if line.startswith(f"| `{facts['model']}`, ")]
    assert f"| {facts['parameters']:,} |" in line
    assert f"**{100 * facts['test_accuracy']:.2f}**" in line


@pytest.mark.parametrize("group", ["dmsresnet", "teachers", "devices/half"])
def test_the_results_are_those_of_the_runs(group):
    files = sorted((ROOT / "artifacts" / f"cifar10-cpu-{group}").rglob("run.json"))
    assert len(files) >= 2
    for file in files:
        facts = Run.read(file.parent).facts
        folder = file.relative_to(ROOT / "artifacts" / f"cifar10-cpu-{group}").parts[0]
        [line] = [line for line in DETAILS.splitlines() if line.endswith(f"| `{folder}` |")]
        assert f"| {100 * facts.last.valid_accuracy:.2f} |" in line
        if facts.train_pflop is not None:  # which the first runs do not say
            assert f"| {float(f'{facts.train_pflop.total:.2g}'):g} |" in line


@pytest.mark.parametrize("place", ["h200/kd", "h200-taught/fast-kd", "h200-taught/fast-kd-mixup"])
def test_what_the_shipped_network_taught_is_said(place):
    [file] = (ROOT / "artifacts" / f"cifar10-{place}").rglob("run.json")
    facts = Run.read(file.parent).facts
    work, accuracy = float(f"{facts.train_pflop.total:.2g}"), facts.last.valid_accuracy
    assert f"| {facts.epochs} | {work:g} | {100 * accuracy:.2f} | `cifar10-{place}` |" in DETAILS
    assert facts.teacher == "dmsresnet"


def test_what_two_teachers_say_together_is_said():
    runs = sorted((ROOT / "artifacts" / "cifar10-h200-teachers").rglob("seed*"))
    one, two = (f"{100 * Run.read(run).facts.last.valid_accuracy:.2f}" for run in runs)
    kept = [np.load(run / "predictions.npz") for run in runs]
    mean = sum(each["log_probabilities"].astype(float) for each in kept)  # a softmax away from the logits' mean
    both = (mean.argmax(1) == kept[0]["labels"]).mean()
    assert f"{one} and {two} % in\nthe last epoch" in DETAILS
    assert f"the mean of their logits {100 * both:.2f} %" in DETAILS


def test_what_three_more_epochs_gained_is_said():
    [file] = (ROOT / "artifacts" / "cifar10-cpu-again").rglob("run.json")
    [before] = (ROOT / "artifacts" / "cifar10-h200" / "fast" / "kd").rglob("run.json")
    again, first = (Run.read(each.parent).facts for each in (file, before))
    found = paired_images(*(read_predictions(each.parent / "predictions.npz").right for each in (file, before)))
    gained = "{:+.2f} ({:+.2f} to {:+.2f})".format(*(100 * each for each in (found.mean, found.low, found.high)))
    text = " ".join(DETAILS.split())
    assert f"it ends at {100 * again.last.valid_accuracy:.2f} %, {gained} points" in text
    epochs = ", ".join(f"{100 * row['valid_accuracy']:.2f}" for row in RunFolder(file.parent).rows())
    assert f"the first training: {epochs}." in text
    taught = ("cifar10-h200-teachers/fast/teacher/seed0", "cifar10-h200/fast-mixup/fast/seed0")
    kept = [np.load(ROOT / "artifacts" / each / "predictions.npz") for each in taught]
    mean = sum(each["log_probabilities"].astype(float) for each in kept)
    assert f"that have {100 * (mean.argmax(1) == kept[0]['labels']).mean():.2f} % together" in text
    assert f"after {again.train_pflop.student + first.train_pflop.student:.3g} PFLOP of its own" in text


def test_what_two_teachers_gained_is_said():
    [file] = (ROOT / "artifacts" / "cifar10-cpu-two-teachers").rglob("run.json")
    [before] = (ROOT / "artifacts" / "cifar10-h200" / "fast" / "kd").rglob("run.json")
    facts, rows = Run.read(file.parent).facts, RunFolder(file.parent).rows()
    assert (facts.epochs_done, facts.last) == (47, facts.best)
    found = paired_images(*(read_predictions(each.parent / "predictions.npz").right for each in (file, before)))
    gained = "{:+.2f} ({:+.2f} to {:+.2f})".format(*(100 * each for each in (found.mean, found.low, found.high)))
    text, accuracy = " ".join(DETAILS.split()), f"{100 * rows[-1]['valid_accuracy']:.2f}"
    assert f"It ends at **{accuracy} %** in the last epoch" in text
    assert f"That is {gained} points above the student of one teacher" in text
    work = facts.train_pflop
    assert f"Its own work is {work.student:.3g} PFLOP, {work.total:.3g} with the teachers' answers" in text
    assert work.student < 8
    taught = ("cifar10-h200-teachers/fast/teacher/seed0", "cifar10-h200/fast-mixup/fast/seed0")
    runs = [Run.read(ROOT / "artifacts" / each).facts for each in taught]
    assert f"the teachers themselves took {sum(each.train_pflop.total for each in runs):.2g}." in text
    one, two = (f"{100 * each.last.valid_accuracy:.2f}" for each in runs)
    assert f"above ({one} %), and `fast` with MixUp ({two} %), whose mean logits have 96.59 %" in text
    assert f"| **{accuracy}** |" in README


@pytest.mark.parametrize("file", [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))], ids=lambda f: f.name)
def test_links_and_images_are_there(file):
    for target in re.findall(r"\]\(([^)#]+)", file.read_text()):
        assert target.startswith("https://") or (file.parent / target).exists(), target


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    """Fresh reports of the committed runs."""
    found = {}
    for name in REPORTED:
        found[name] = tmp_path_factory.mktemp(name)
        runs, problems = find_runs([ROOT / "artifacts" / name])
        write_report(sections(runs), problems, found[name])
    return found


@pytest.mark.parametrize("name", REPORTED)
def test_the_results_are_those_of_the_committed_runs(reports, name):
    report, kept_in = reports[name], REPORTED[name]
    assert f"dms-fastai report artifacts/{name} --out {kept_in.relative_to(ROOT)}" in DETAILS
    assert (kept_in / "report.md").read_text() == (report / "report.md").read_text()
    for file in sorted(report.glob("*.png")):
        with Image.open(file) as fresh, Image.open(kept_in / file.name) as kept:
            assert json.loads(kept.info["Description"]) == json.loads(fresh.info["Description"]), file.name
            assert kept.size == fresh.size


def test_the_readme_quotes_the_report(reports):
    text = (reports["cifar10-h200"] / "report.md").read_text()
    table = text[text.index("| stage") : text.index("\n\n", text.index("| stage"))]
    assert table in README
    assert "(docs/results/h200/cifar10-ablation.png)" in README


@pytest.mark.parametrize(("name", "count"), [("cifar10-cpu", 5), ("cifar10-h200", 1)])
def test_the_details_quote_the_differences(reports, name, count):
    text = (reports[name] / "report.md").read_text()
    differences = [line for line in text.splitlines() if re.search(r" points, (3 shared seeds|one seed)", line)]
    assert len(differences) == count
    for line in differences:
        assert re.search(r"[+-]\d+\.\d\d \([^)]*\)", line).group() in DETAILS


def test_the_other_systems_stand_in_the_results_as_they_ran():
    folder, text = ROOT / "artifacts" / "cifar10-cpu-table1", DETAILS
    found = sorted(folder.rglob("run.json"))
    assert len(found) == 3
    for file in found:
        facts = json.loads(file.read_text())
        last, place = facts["last"], file.parent.parent.relative_to(folder).as_posix()
        figures = f"{facts['train_pflop']['total']:.2f} | {last['train_loss']:.3f} | {last['valid_loss']:.3f}"
        assert f"| {figures} | {100 * last['valid_accuracy']:.2f} | `{place}` |" in text
        assert last["train_loss"] < math.log(10)
        assert facts["epochs_done"] == 1


def test_every_key_of_a_recipe_is_explained():
    text = (ROOT / "docs" / "recipes.md").read_text()
    assert [key for key in all_keys() if not re.search(rf"`\[?{re.escape(key)}\b", text)] == []


def test_ratios_of_the_data_path_are_those_of_the_committed_benchmark():
    told = json.loads((ROOT / "artifacts" / "benchmarks" / "data_path.json").read_text())
    text = (ROOT / "docs" / "speed.md").read_text()
    ours, theirs = told["figures"]["ours"], told["figures"]["torchvision"]
    assert (
        f"{theirs['median']:,.0f} with torchvision | {ours['median']:,.0f} | {ours['ratio_median']:.0f} times" in text
    )
    for found in told["augmentations"].values():
        ratio = "{ratio_median:.1f} ({ratio_min:.1f} to {ratio_max:.1f})".format(**found["ours"])
        assert f"| {ratio} |" in text
