"""The command line and the folders that it writes, end to end on real digits."""

import csv
import gc
import itertools
import json
import os
import runpy
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import timm
import torch
from fastai.learner import Learner
from PIL import Image
from safetensors import safe_open

from dms_fastai import cli, load_data, load_recipe
from dms_fastai.models.card import ModelCard
from dms_fastai.models.weights import load_weights, save_weights
from dms_fastai.recipes import recipe_names
from dms_fastai.run_folder import RunFolder
from dms_fastai.runs import checkpoint, stage
from dms_fastai.runs import plan as plan_module

FILES = {
    "curves.png",
    "learner.pkl",
    "metrics.csv",
    "model.safetensors",
    "predictions.npz",
    "recipe.toml",
    "run.json",
}


@pytest.fixture
def dms(monkeypatch, capsys, tmp_path):
    """Run the command in an empty folder; gives the exit code and what was printed to either stream."""
    monkeypatch.chdir(tmp_path)

    def run(*args):
        monkeypatch.setattr(sys, "argv", ["dms-fastai", *map(str, args)])
        try:
            cli.main()
            code = 0
        except SystemExit as stop:
            code = stop.code or 0
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


def rows(folder):
    with (folder / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


def figures(folder):
    """The rows without what depends on the clock."""
    return [{k: v for k, v in row.items() if k not in ("seconds", "images_per_second")} for row in rows(folder)]


def weights(folder):
    with safe_open(folder / "model.safetensors", "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def same_run(one, other):
    assert figures(one) == figures(other)
    a, b = weights(one), weights(other)
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_kd_from_nothing_to_a_prediction(dms, tmp_path):
    code, out, _ = dms("run", "kd", "--data", "digits", "--epochs", 2, "--set", "model.drop_rate=0.05")
    assert code == 0
    student, teacher = (tmp_path / "artifacts" / "digits" / name / "seed0" for name in ("kd", "teacher"))
    assert {f.name for f in student.iterdir()} == {f.name for f in teacher.iterdir()} == FILES
    assert "Teacher: epoch 2/2" in out
    assert "+ SE + MixUp + KD: epoch 2/2" in out
    assert "chosen on the test set" in out

    facts = json.loads((student / "run.json").read_text())
    assert facts["status"] == "finished"
    assert facts["parameters"] == 56_587
    assert facts["last"]["valid_accuracy"] == float(rows(student)[-1]["valid_accuracy"])
    assert facts["best"]["valid_accuracy"] == max(float(row["valid_accuracy"]) for row in rows(student))
    assert f"{100 * facts['last']['valid_accuracy']:.2f} %" in out
    assert load_recipe(student / "recipe.toml").model.drop_rate == 0.05
    assert load_recipe(teacher / "recipe.toml").model.drop_rate == 0.1  # --set is not for the teacher
    assert Image.open(student / "curves.png").size[0] > 500

    # The figure in run.json is that of the weights: count it again by hand, in float32.
    model, card = load_weights(student / "model.safetensors")
    with torch.no_grad():
        right = [model(x).argmax(1) == y for x, y in load_data("digits", device="cpu").valid]
    accuracy = torch.cat(right).float().mean().item()
    assert accuracy == pytest.approx(facts["last"]["valid_accuracy"], abs=0.01)
    assert card.vocab == [str(i) for i in range(10)]

    began = time.monotonic()
    code, again, _ = dms("run", "kd", "--epochs", 2, "--set", "model.drop_rate=0.05")
    assert code == 0
    assert "epoch 1/2" not in again
    assert time.monotonic() - began < 5
    code, _, err = dms("run", "kd", "--epochs", 3, "--set", "model.drop_rate=0.05")
    assert code == 2
    assert "schedule.epochs 2 -> 3" in err
    assert dms("report")[1].count("Teacher") == 1

    image = tmp_path / "ünï 漢.png"
    Image.fromarray(load_data("digits").valid_ds.images[0].permute(1, 2, 0).numpy()).save(image)
    answers = {dms("predict", student / name, image)[1] for name in ("model.safetensors", "", "learner.pkl")}
    for answer in answers:
        assert answer.startswith(str(image))
        assert answer.count("%") == 3
    assert len({answer.split(": ")[1].split(" ")[0] for answer in answers}) == 1


def test_the_ablation_has_all_stages_and_one_teacher(dms, tmp_path):
    code, out, _ = dms("run", "ablation", "--epochs", 1, "--out", "there", "--seed", 5, "--set", "mixup.alpha=0.5")
    assert code == 0
    assert {p.parent.name for p in (tmp_path / "there").rglob("seed5")} == {"baseline", "se", "mixup", "teacher", "kd"}
    for word in ("ResNet", "+ SE", "+ SE + MixUp", "Teacher", "+ SE + MixUp + KD", "56,538"):
        assert word in out
    mixups = {n: load_recipe(tmp_path / "there" / n / "seed5" / "recipe.toml").mixup for n in ("se", "mixup", "kd")}
    assert mixups["se"] is None
    assert mixups["mixup"].alpha == mixups["kd"].alpha == 0.5


@pytest.mark.parametrize("share", [1, 1e-9])  # a checkpoint after every epoch, and after none but the first
def test_a_run_that_ran_out_of_time_goes_on_to_the_same_end(dms, tmp_path, monkeypatch, share):
    """Stopped in the middle of epochs and resumed, a run with MixUp, dropout, crops and Lookahead ends the same."""
    monkeypatch.setattr(checkpoint, "SHARE", share)
    args = ("run", "mixup", "--epochs", 3, "--set", "lookahead.k=3", "--set", "data.batch_size=256", "--device", "cpu")
    assert dms(*args, "--out", "whole")[0] == 0
    for done in (0, 0, 0, 0, 0, 1, 1):  # after each of the five steps of an epoch, after its validation, after a step
        code, out, _ = dms(*args, "--out", "pieces", "--time-limit", "0.001s")
        assert code == 75
        assert "stopped (time limit)" in out
        assert f"interrupted, epoch {done}/3" in out
    code, out, _ = dms("report", "pieces")
    assert "interrupted, epoch 1/3" in out
    code, out, _ = dms(*args, "--out", "pieces")
    assert code == 0
    assert "resuming after epoch 1 of 3, step 1" in out
    same_run(tmp_path / "whole" / "mixup" / "seed0", tmp_path / "pieces" / "mixup" / "seed0")
    assert not (tmp_path / "pieces" / "mixup" / "seed0" / "checkpoint").exists()


def test_a_run_that_was_stopped_goes_on_with_its_images_elsewhere(dms, tmp_path):
    args = ("run", "se", "--epochs", 1, "--set", "data.batch_size=512", "--device", "cpu")
    assert dms(*args, "--out", "whole")[0] == 0
    assert dms(*args, "--out", "moved", "--time-limit", "0.001s")[0] == 75
    code, out, _ = dms(*args, "--out", "moved", "--set", "data.where=disk")
    assert (code, "resuming after epoch 0 of 1, step 1" in out) == (0, True)
    whole, moved = (RunFolder(tmp_path / out / "se" / "seed0").weights for out in ("whole", "moved"))
    assert moved.read_bytes() == whole.read_bytes()


@pytest.mark.parametrize(
    ("share", "more", "after"), [(1e9, (), [1, 2, 3]), (1e-9, (), [1]), (1e-9, ("--checkpoint-steps", 9), [1, 2, 3])]
)
def test_epochs_shorter_than_their_checkpoints_go_without(dms, monkeypatch, share, more, after):
    written, save = [], checkpoint.Checkpoint._save
    monkeypatch.setattr(checkpoint, "SHARE", share)
    monkeypatch.setattr(checkpoint.Checkpoint, "_save", lambda self, *a: (written.append(a[:2]), save(self, *a)))
    assert dms("run", "se", "--epochs", 3, "--set", "data.batch_size=256", *more)[0] == 0
    assert written == [(epochs, 0) for epochs in after]


def test_ctrl_c_ends_cleanly_and_the_same_command_goes_on(dms, tmp_path):
    args = ["run", "se", "--epochs", "6", "--device", "cpu", "--out"]
    command = [sys.executable, "-m", "dms_fastai.cli", *args, "pieces"]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    seen = ""
    while "epoch 2/6" not in seen:
        line = process.stdout.readline()
        assert line, process.stderr.read()
        seen += line
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "stopped (SIGINT)" in out
    assert "the same command resumes" in out
    assert "Traceback" not in err
    assert dms(*args, "pieces")[0] == dms(*args, "whole")[0] == 0
    same_run(tmp_path / "whole" / "se" / "seed0", tmp_path / "pieces" / "se" / "seed0")


def test_a_request_that_meets_the_end_of_a_stage_ends_the_command(dms, tmp_path, monkeypatch):
    args = ("run", "ablation", "--epochs", 1, "--set", "data.batch_size=256", "--out", "x")
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.Checkpoint, "after_epoch", lambda self: signal.raise_signal(signal.SIGTERM))
        code, out, _ = dms(*args)
        assert code == 143
        assert "stopped (SIGTERM): ResNet, finished; the same command resumes from there" in out
        assert [path.name for path in (tmp_path / "x").iterdir()] == ["baseline"]
        assert dms(*args[:2], *args[2:6], "--out", "y")[0] == 143
        assert dms("run", "se", *args[2:6], "--out", "z")[0] == 0  # with nothing left there is nothing to stop
    assert "stopped_by" not in (tmp_path / "x" / "baseline" / "seed0" / "run.json").read_text()
    assert dms(*args)[0] == 0


def test_with_restart_it_is_another_command_that_goes_on(dms):
    code, out, _ = dms("run", "se", "--epochs", 3, "--restart", "--time-limit", "0.001s")
    assert code == 75
    assert "without --restart the same command resumes from there" in out


def test_a_run_says_after_every_epoch_how_far_it_is(dms, tmp_path, monkeypatch):
    seen, folder = [], tmp_path / "x" / "se" / "seed0"

    def look(self):
        facts = json.loads((folder / "run.json").read_text())
        seen.append((facts["status"], facts["epochs_done"], facts["last"]["epoch"], facts["seconds"] > 0))

    monkeypatch.setattr(checkpoint.Checkpoint, "after_epoch", look)
    assert dms("run", "se", "--epochs", 2, "--set", "data.batch_size=256", "--out", "x")[0] == 0
    assert seen == [("running", 1, 1, True), ("running", 2, 2, True)]


def test_a_stage_frees_what_the_one_before_held(dms, monkeypatch):
    alive, train = [], stage._Training.run
    monkeypatch.setattr(
        stage._Training,
        "run",
        lambda self: (alive.append(sum(isinstance(o, Learner) for o in gc.get_objects())), train(self))[1],
    )
    gc.collect()
    assert dms("run", "se", "--epochs", 1, "--set", "data.batch_size=256", "--seeds", "0,1,2", "--out", "x")[0] == 0
    assert alive == [alive[0]] * 3


def test_names_with_brackets_are_shown_as_they_are(dms, tmp_path):
    (tmp_path / "own.toml").write_text('extends = "se"\ntitle = "SE [/ours]"\n')
    args = ("run", "own.toml", "--epochs", 2, "--set", "data.batch_size=256", "--out", "m[/x]")
    assert dms(*args, "--time-limit", "0.001s")[0] == 75
    code, out, _ = dms(*args)
    assert code == 0
    assert "SE [/ours]: resuming" in out
    assert "learner: m[/x]/own/seed0/learner.pkl" in out
    code, out, _ = dms("report", "m[/x]", "--out", "n[bold]")
    assert code == 0
    assert "report: n[bold]/index.html" in out


def test_seeds_differ_and_repeat(dms, tmp_path):
    for out, seed in (("a", 1), ("b", 1), ("c", 2)):
        assert dms("run", "baseline", "--epochs", 1, "--seed", seed, "--out", out)[0] == 0
    same_run(*(tmp_path / out / "baseline" / "seed1" for out in ("a", "b")))
    assert figures(tmp_path / "a" / "baseline" / "seed1") != figures(tmp_path / "c" / "baseline" / "seed2")


def test_restart_throws_away_what_there_was(dms, tmp_path):
    assert dms("run", "se", "--epochs", 1, "--out", "x")[0] == 0
    assert dms("run", "se", "--epochs", 2, "--out", "x")[0] == 2
    assert dms("run", "se", "--epochs", 2, "--out", "x", "--restart")[0] == 0
    assert len(rows(tmp_path / "x" / "se" / "seed0")) == 2


def test_every_folder_is_checked_before_anything_is_trained(dms, tmp_path):
    assert dms("run", "mixup", "--epochs", 1, "--out", "x")[0] == 0
    code, out, err = dms("run", "ablation", "--epochs", 2, "--out", "x")
    assert code == 2
    assert "schedule.epochs 1 -> 2" in err
    assert "epoch 1/" not in out


def test_a_finished_run_teaches(dms, tmp_path):
    assert dms("run", "mixup", "--epochs", 1, "--out", "x")[0] == 0
    code, _, err = dms("predict", "x/mixup", "image.png")
    assert code == 2
    assert "x/mixup is no run, but holds some; give x/mixup/seed0" in err
    code, _, err = dms("run", "kd", "--teacher", "x/mixup")
    assert code == 2
    assert "x/mixup is no run, but holds some; give x/mixup/seed0" in err
    for source in ("x/mixup/seed0", "x/mixup/seed0/model.safetensors", "x/mixup/seed0/learner.pkl"):
        out = tmp_path / source.replace("/", "-")
        assert dms("run", "kd", "--epochs", 1, "--out", out, "--teacher", source)[0] == 0
        assert [p.name for p in out.iterdir()] == ["kd"]


def test_inside_a_runs_folder_it_is_a_dot(dms, tmp_path, monkeypatch):
    assert dms("run", "mixup", "--epochs", 1, "--out", "x")[0] == 0
    Image.new("RGB", (8, 8)).save(tmp_path / "image.png")
    expected = dms("predict", "x/mixup/seed0", "image.png")[1]
    monkeypatch.chdir(tmp_path / "x" / "mixup" / "seed0")
    code, out, _ = dms("predict", ".", "../../../image.png")
    assert (code, out.partition(": ")[2]) == (0, expected.partition(": ")[2])
    assert dms("run", "kd", "--epochs", 1, "--out", "k", "--teacher", ".,")[0] == 0


def test_a_teacher_of_other_images_is_not_taken_for_the_recipes(dms, tmp_path):
    def images(shade):
        for split, name in itertools.product(("train", "test"), ("a", "b")):
            folder = tmp_path / "shades" / split / name
            folder.mkdir(parents=True, exist_ok=True)
            for number in range(8):
                Image.new("L", (8, 8), shade + number + 100 * (name == "b")).save(folder / f"{number}.png")

    images(10)
    small = ("--data", "shades", "--epochs", 1, "--set", "data.size=8", "--out", "x")
    assert dms("run", "cpu/teacher", "--arch", "test_dmsresnet", *small)[0] == 0
    images(20)
    code, _, err = dms("run", "cpu/kd", *small)
    assert code == 2
    assert "x/cpu/teacher/seed0 holds a run on other images; give --out another folder, or --restart" in err


def test_other_images_and_another_teacher_are_refused_in_the_same_folder(dms, tmp_path):
    for name, kept in (("p", 64), ("q", 48)):
        (tmp_path / name).mkdir()
        digits = load_data("digits")
        arrays = {}
        for split, images in (("train", digits.train_ds), ("test", digits.valid_ds)):
            arrays[f"{split}_images"] = images.images[:kept].permute(0, 2, 3, 1).numpy()
            arrays[f"{split}_labels"] = images.labels[:kept].numpy()
        np.savez(tmp_path / name / "d.npz", **arrays)
    args = ("--arch", "test_dmsresnet", "--epochs", 1, "--out", "x")
    assert dms("run", "mixup", "--data", "p/d.npz", *args)[0] == 0
    code, _, err = dms("run", "mixup", "--data", "q/d.npz", *args)
    assert code == 2
    assert "other images" in err
    assert dms("run", "se", "--data", "p/d.npz", *args)[0] == 0
    assert dms("run", "kd", "--data", "p/d.npz", *args, "--teacher", "x/se/seed0")[0] == 0
    code, _, err = dms("run", "kd", "--data", "p/d.npz", *args, "--teacher", "x/mixup/seed0")
    assert code == 2
    assert "another teacher" in err


def test_a_teacher_is_shown_the_same_images(dms, tmp_path):
    args = ("run", "kd", "--epochs", 1, "--out", "x", "--set", "data.size=16", "--set", "data.valid=0.2")
    assert dms(*args)[0] == 0
    teacher = load_recipe(tmp_path / "x" / "teacher" / "seed0" / "recipe.toml")
    assert (teacher.data.size, teacher.data.valid) == (16, 0.2)
    shutil.rmtree(tmp_path / "x" / "kd")
    code, _, err = dms("run", "kd", "--epochs", 1, "--out", "x", "--set", "data.size=16")
    assert code == 2
    assert "data.valid 0.2 -> test" in err


def test_a_held_out_share_is_not_called_the_test_set(dms):
    code, out, _ = dms("run", "se", "--epochs", 1, "--set", "data.valid=0.1")
    assert code == 0
    assert "chosen on the validation images" in out


def test_the_lists(dms):
    code, out, _ = dms("recipes")
    assert code == 0
    assert all(name in out for name in recipe_names())
    code, out, _ = dms("models")
    assert code == 0
    for name in timm.list_models(module="dmsresnet"):
        assert name in out
    assert "4,697,742" in out


def make_bad_teacher(folder):
    card = ModelCard("test_dmsresnet", ["cat", "dog"], (0.5,) * 3, (0.5,) * 3, (3, 8, 8))
    save_weights(card.build(), card, folder / "cats.safetensors")


def make_bad_folders(folder):
    for path in ("empty/train", "one/train/cat", "one/test/cat", "bad/train/cat", "bad/train/dog", "bad/test/cat"):
        (folder / path).mkdir(parents=True)
        if "/c" in path or "/d" in path:
            Image.new("RGB", (8, 8)).save(folder / path / "0.png")
    (folder / "bad" / "train" / "dog" / "1.png").write_text("no image")


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ("run kdd", "unknown recipe 'kdd': did you mean 'kd'?"),
        ("run ablatoin", "did you mean 'ablation'?"),
        ("run kd --arch dmsresnt", "did you mean 'dmsresnet'?"),
        ("run kd --arch vit_tiny_patch16_224", "does not take images of 8x8"),
        ("run kd --set model.args.widths=[1]", "do not have the same length"),
        ("run kd --set name=../x", "without '..'"),
        ("run kd --data digit", "did you mean 'digits'?"),
        ("run kd --set schedule.epoch=3", "did you mean 'schedule.epochs'?"),
        ("run kd --set lr", "write table.key=value"),
        ("run kd --epochs 0", "schedule.epochs is 0"),
        ("run kd --schedule trapezoid", "'sgdr', 'flat-cosine' or 'step'"),
        ("run kd --set distill.alpha=1.5", "between 0 and 1"),
        ("run kd --set distill.T=0", "above 0"),
        ("run se --set distill.alpha=0.5", "without a teacher"),
        ("run kd --teacher cats.safetensors", "2 classes and the data have 10"),
        ("run kd --teacher nowhere", "no teacher at nowhere"),
        ("run kd --teacher gone.toml", "recipe 'kd' names the teacher 'gone.toml', and there is no such file"),
        ("run kd --teacher timm:resnet18", "know 1000 classes and the data have 10; train it"),
        ("run kd --set lr=0.1", "did you mean 'feature_distill.lr' or 'optimizer.lr'?"),
        ("predict cats.safetensors empty", "no images in empty"),
        ("run kd --teacher kd", "needs a teacher itself"),
        ("run ablation --teacher cats.safetensors", "2 classes and the data have 10"),
        ("run se --teacher cats.safetensors", "does not distil"),
        ("run se --set teacher=teacher", "does not distil"),
        ("run kd --device cuda", "no GPU"),
        ("run kd --device tpu", "auto, cpu, cuda or mps"),
        ("run se --time-limit 9", "90s, 9m or 2h"),
        ("run se --seed -1", "seed is -1"),
        ("run se --epochs 1 --out cats.safetensors", "cats.safetensors is no folder; give another --out"),
        ("run se --data empty", "no class folders"),
        ("run se --data one", "only the class 'cat'"),
        ("run se --data bad", "1.png is not an image"),
        ("run gone.toml", "no such recipe file"),
        ("predict gone.pkl x.png", "no such Learner"),
        ("predict gone x.png", "no model at gone"),
        ("predict cats.safetensors x.png", "no such image: x.png"),
        ("predict cats.safetensors cats.safetensors", "cats.safetensors is not an image"),
        ("report", "no such folder: artifacts"),
        ("report .", "no runs in ."),
    ],
)
def test_bad_input_is_one_clear_line_and_leaves_nothing(dms, tmp_path, args, words, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    make_bad_teacher(tmp_path)
    make_bad_folders(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    code, _, err = dms(*args.split())
    assert code == 2
    assert words in err
    assert err.count("\n") == 1
    assert "Traceback" not in err
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("more", [(), ("--at-once", 2)])
def test_folders_that_cannot_be_written_are_refused_before_anything_is_read(dms, tmp_path, monkeypatch, more):
    """Also the teacher's."""
    monkeypatch.setattr(plan_module, "load_splits", None)
    (tmp_path / "locked").mkdir()
    (tmp_path / "x" / "kd").mkdir(parents=True)
    (tmp_path / "x" / "teacher").touch()
    (tmp_path / "x" / "link").symlink_to("nothing")
    monkeypatch.setattr(os, "access", lambda path, mode: not mode & os.W_OK or path != tmp_path / "locked")
    for out, words in (
        (tmp_path / "locked", f"no permission to write to {tmp_path / 'locked'}; give another --out"),
        ("x", "x/teacher/seed0 cannot be written: x/teacher is no folder; give another --out"),
        ("x/link", "x/link is a link to nothing; give another --out"),
        ("x" * 300, "File name too long; give another --out"),
    ):
        code, said, err = dms("run", "kd", "--out", out, *more)
        assert (code, said) == (2, "")
        assert words in err
        assert err.count("\n") == 1


def test_the_package_is_a_command_too(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["dms_fastai", "predict", "nowhere", "image.png"])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_module("dms_fastai", run_name="__main__")
    assert stopped.value.code == 2
    assert capsys.readouterr().err.startswith("dms-fastai: error: no model at nowhere")
