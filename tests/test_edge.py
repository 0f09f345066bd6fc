"""`run edge`: from a teacher to int8 files of a pruned student, in one command that resumes like any other."""

import io
import json
import shutil
from contextlib import redirect_stdout

import onnxruntime
import pytest

from dms_fastai import UserError, load_data, load_recipe
from dms_fastai.cli import app
from dms_fastai.data import Data
from dms_fastai.edge import check_student
from dms_fastai.models.prune import mid_widths_of
from dms_fastai.models.weights import load_weights
from dms_fastai.run_folder import RunFolder
from dms_fastai.runs.stop import StopOnRequest
from tests.test_plan import TINY_TEACHER
from tests.test_runs import dms, same_run  # noqa: F401  (a fixture)

TINY = ("--arch", "test_dmsresnet", "--set", "data.batch_size=700", "--epochs", 1, "--device", "cpu")  # two steps
ARGS = ("run", "edge", *TINY, *TINY_TEACHER, "--set", "prune.macs=0.7")
FILES = [f"{run}{ending}" for run in ("kd", "kd-macs70") for ending in (".onnx", ".int8.onnx")]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of the runs of a command that ran to its end, and what it printed."""
    folder, said = tmp_path_factory.mktemp("edge"), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(said):
        patch.chdir(folder)
        patch.setattr("dms_fastai.export.measure.SECONDS", 0.0)
        app([*map(str, ARGS), "--out", "x"], standalone_mode=False)
    return folder / "x", said.getvalue()


def table(out):
    """The rows of the last table: name, ending, MB, MACs, accuracy, times."""
    lines = [line.split() for line in out.splitlines()]
    return [words for words in lines if len(words) > 1 and words[1].endswith(".onnx")]


def exported(folder):
    return {file.name: file for file in folder.rglob("*.onnx")}


def test_one_command_ends_with_a_table_of_files(dms, whole):  # noqa: F811
    folder, out = whole
    rows, files = table(out), exported(folder)
    assert sorted(files) == sorted(FILES)
    assert [row[0] + row[1] for row in rows] == FILES
    dense, pruned = (RunFolder(folder / name / "seed0") for name in ("kd", "kd-macs70"))
    valid = load_data("digits").valid_ds
    for name, row in zip(FILES, rows, strict=True):
        session = onnxruntime.InferenceSession(files[name])
        [found] = session.run(None, {"pixels": valid.images.numpy()})
        assert float(row[5]) == pytest.approx(100 * (found.argmax(1) == valid.labels.numpy()).mean(), abs=0.3)
        assert float(row[2]) == round(files[name].stat().st_size / 1e6, 2)
    (network, _), (narrow, _) = (load_weights(folder.weights) for folder in (dense, pruned))
    assert sum(mid_widths_of(narrow)) < sum(mid_widths_of(network))
    assert pruned.facts().macs <= 0.7 * dense.facts().macs
    assert (pruned.facts().teacher, dense.recipe().prune) == ("x/kd/seed0", None)
    before = {file: file.stat().st_mtime_ns for file in [*files.values(), dense.weights, pruned.weights]}
    code, again, _ = dms(*ARGS, "--out", folder)
    assert code == 0
    assert table(again) == rows
    assert "epoch 1/" not in again
    assert before == {file: file.stat().st_mtime_ns for file in before}
    [figures] = folder.rglob("edge.json")
    for damaged in ("{", "[1]", "[{}]"):
        figures.write_text(damaged)
        code, again, _ = dms(*ARGS, "--out", folder)
        assert (code, [row[:6] for row in table(again)]) == (0, [row[:6] for row in rows])
    code, out, _ = dms(*ARGS, "--out", folder, "--dry-run")
    assert (code, out.count("finished")) == (0, 2)


def test_a_command_that_is_stopped_after_every_step_ends_the_same(dms, whole, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setattr("dms_fastai.edge.files_of", lambda *args: [])  # which depend on the weights alone
    stops = 0
    while (code := dms(*ARGS, "--out", "parts", "--time-limit", "0.001s")[0]) == 75:
        stops += 1
    assert code == 0
    assert stops >= 3  # in the teacher, its student and the pruned one
    for run in ("teacher", "kd", "kd-macs70"):
        same_run(whole[0] / run / "seed0", tmp_path / "parts" / run / "seed0")


def test_a_signal_in_the_last_step_of_a_run_ends_the_command(dms, whole, tmp_path, monkeypatch):  # noqa: F811
    """Of the student, and of the pruned one, whose files would follow; the same command does what is left."""
    monkeypatch.setattr("dms_fastai.edge.files_of", lambda *args: [])
    shutil.copytree(whole[0] / "teacher", tmp_path / "last" / "teacher")
    after_epoch = StopOnRequest.after_epoch

    def told(stop):
        stop.noted = "SIGTERM"
        after_epoch(stop)

    with monkeypatch.context() as patch:
        patch.setattr(StopOnRequest, "after_epoch", told)
        for run in ("kd", "kd-macs70"):
            code, out, _ = dms(*ARGS, "--out", "last")
            assert (code, "stopped (SIGTERM)" in out, "learner: " in out) == (143, True, run != "kd")
            assert RunFolder(tmp_path / "last" / run / "seed0").finished
    assert dms(*ARGS, "--out", "last")[0] == 0


def test_a_plan_ends_with_what_the_others_do_not_do(dms):  # noqa: F811
    planned = json.loads(dms("plan", "edge", "--seeds", "0,1", "--out", "x", "--set", "prune.macs=0.7", "--json")[1])
    assert [command["folder"] for command in planned] == [
        f"x/{run}/seed{seed}" for seed in (0, 1) for run in ("teacher", "kd", "kd-macs70")
    ]
    assert [command["after"] for command in planned] == [[], [1], [2], [], [4], [5]]
    for command in planned[2::3]:
        assert "--only" not in command["command"]
        assert command["command"].startswith("dms-fastai run edge --data digits --out x --set prune.macs=0.7 --seed")
        assert command["command"].endswith("--wait")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--arch resnet18", "only this package's residual networks can be pruned, not resnet18"),
        ("--set prune.macs=0.01", "prune.macs is 0.01, and the narrowest blocks still have"),
        ("--set prune.mac=0.5", "unknown recipe key 'prune.mac': did you mean 'prune.macs'?"),
        ("--set prune.macs=2", "prune.macs is 2"),
        ("--budget 2m", "edge has no budget"),
        ("--from dmsresnet", "--from is for one recipe"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_trained(dms, tmp_path, words, said):  # noqa: F811
    code, _, err = dms("run", "edge", *words.split())
    assert (code, err.count("\n")) == (2, 1), err
    assert said in err
    assert not list(tmp_path.iterdir())


def test_a_missing_package_is_said_before_anything_is_trained(dms, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setattr("dms_fastai.export.formats.find_spec", lambda name: None if name == "onnxruntime" else name)
    code, _, err = dms("run", "edge")
    assert (code, err.count("\n")) == (2, 1), err
    assert "kd.int8.onnx needs more packages: pip install onnx onnxscript onnxruntime" in err
    assert not list(tmp_path.iterdir())


def test_a_student_whose_pruned_self_no_file_could_name_is_refused_before_anything_is_trained(monkeypatch):
    monkeypatch.setattr("dms_fastai.edge.widths_within", lambda *_: [8] * 66)
    with pytest.raises(UserError, match=r"model\.args\.mid_widths is .*, with which no file of weights can be read"):
        check_student(load_recipe("kd", "digits", "test_dmsresnet"), Data().open("digits"), 0.5)
