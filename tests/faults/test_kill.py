"""A run killed at any moment and gone on with ends as if nothing had happened, bit for bit."""

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from dms_fastai import load_data
from dms_fastai.files import LOCK
from dms_fastai.runs.lock import held
from tests.test_runs import FILES, figures, same_run

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork")


class Zygote:
    """Starts commands at once; `zygote.py` has imported everything."""

    def __init__(self):
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.faults.zygote"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self.process.stdout.readline() == "ready\n"

    def start(self, cwd, *args):
        order = {"args": [str(a) for a in args], "cwd": str(cwd), "log": str(cwd / "log.txt")}
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())

    def end(self):
        return int(self.process.stdout.readline())

    def run(self, cwd, *args):
        self.start(cwd, *args)
        return self.end()

    def close(self):
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()


@pytest.fixture(scope="module")
def zygote():
    born = Zygote()
    yield born
    born.close()


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A few digits: a run of them takes seconds."""
    file = tmp_path_factory.mktemp("data") / "few.npz"
    digits, arrays = load_data("digits"), {}
    for split, images in (("train", digits.train_ds), ("test", digits.valid_ds)):
        arrays[f"{split}_images"] = images.images[:320].permute(0, 2, 3, 1).numpy()
        arrays[f"{split}_labels"] = images.labels[:320].numpy()
    np.savez(file, **arrays)
    return file


@pytest.fixture(scope="module")
def command(data, tmp_path_factory):
    """`run kd` with a teacher to train, Lookahead in the student, and a checkpoint every third step."""
    recipes = tmp_path_factory.mktemp("recipes")
    teacher, student = recipes / "master.toml", recipes / "pupil.toml"
    small = '[model]\nname = "test_dmsresnet"\n[data]\nbatch_size = 32\n[schedule]\nepochs = 3\n'
    teacher.write_text(f'extends = "mixup"\n{small}')
    student.write_text(f'extends = "kd"\nteacher = "{teacher}"\n{small}[lookahead]\nk = 4\n')
    return ["run", student, "--data", data, "--device", "cpu", "--checkpoint-steps", "3", "--out", "x"]


@pytest.fixture(scope="module")
def uninterrupted(zygote, command, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    began = time.monotonic()
    assert zygote.run(folder, *command) == 0, (folder / "log.txt").read_text()
    return folder, time.monotonic() - began


def same_end(folder, whole):
    for stage in ("master", "pupil"):
        same_run(whole / "x" / stage / "seed0", folder / "x" / stage / "seed0")
        assert len(figures(folder / "x" / stage / "seed0")) == 3
        left = {p.name for p in (folder / "x" / stage / "seed0").iterdir()}
        assert left - {LOCK} == FILES  # killed between its last word and its lock, a finished run keeps the lock's file
        assert not held(folder / "x" / stage / "seed0")


def kill_when(zygote, pid, condition, timeout):
    """SIGKILL as soon as `condition` holds, or after `timeout`; the exit code."""
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline and not condition():
        time.sleep(0.0005)
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
    return zygote.end()


def test_killed_at_random_moments(zygote, command, uninterrupted, tmp_path):
    whole, seconds = uninterrupted
    chance, kills = random.Random(0), 0
    for campaign in range(20):
        folder = tmp_path / str(campaign)
        folder.mkdir()
        code = None
        while code != 0:
            pid = zygote.start(folder, *command)
            code = kill_when(zygote, pid, lambda: False, chance.uniform(0.1, 0.7) * seconds)
            kills += code == -signal.SIGKILL
            assert code in (0, -signal.SIGKILL), (folder / "log.txt").read_text()
        same_end(folder, whole)
        if kills >= 20:
            break
    assert kills >= 20


OTHERS = {
    "adamw, sgdr": """
[optimizer]
name = "adamw"
lr = 0.01
no_decay = ["fc.weight"]
[schedule]
name = "sgdr"
cycles = [1, 2]
""",
    "muon, one-cycle": """
[optimizer]
name = "muon"
lr = 0.05
[schedule]
name = "one-cycle"
""",
}


@pytest.mark.parametrize("parts", OTHERS)
def test_killed_with_another_optimiser_and_schedule(zygote, data, tmp_path, parts):
    recipe, folder = tmp_path / "own.toml", tmp_path / "pieces"
    small = '[model]\nname = "test_dmsresnet"\n[data]\nbatch_size = 32\n'
    recipe.write_text(f'extends = "se"\n{small}{OTHERS[parts]}epochs = 3\n')
    command = ["run", recipe, "--data", data, "--device", "cpu", "--checkpoint-steps", "1", "--out"]
    assert zygote.run(tmp_path, *command, "whole") == 0, (tmp_path / "log.txt").read_text()
    kills = 0
    while kills < 4:
        pid, seen = zygote.start(tmp_path, *command, folder), checkpoints(folder)
        code = kill_when(zygote, pid, lambda seen=seen: len(checkpoints(folder) - seen) >= 2, 60)
        if code != -signal.SIGKILL:
            break
        kills += 1
    assert kills
    assert zygote.run(tmp_path, *command, folder) == 0, (tmp_path / "log.txt").read_text()
    same_run(tmp_path / "whole" / "own" / "seed0", folder / "own" / "seed0")
    assert len(figures(folder / "own" / "seed0")) == 3


def checkpoints(folder):
    return set(folder.glob("own/seed0/checkpoint/*.pt"))


@pytest.mark.parametrize("stage", ["master", "pupil"])
def test_killed_while_a_checkpoint_is_written(zygote, command, uninterrupted, tmp_path, stage):
    place, hits = tmp_path / "x" / stage / "seed0" / "checkpoint", 0
    for attempt in range(12):
        pid = zygote.start(tmp_path, *command)
        time.sleep(0.02 * attempt)
        seen = []

        def writing(seen=seen):
            seen[:] = place.glob("*.partial") if place.is_dir() else []
            return bool(seen)

        code = kill_when(zygote, pid, writing, 60)
        hits += bool(seen) and code == -signal.SIGKILL
        assert code in (0, -signal.SIGKILL), (tmp_path / "log.txt").read_text()
        if code == 0 or hits == 4:
            break
    assert hits >= 2
    assert zygote.run(tmp_path, *command) == 0, (tmp_path / "log.txt").read_text()
    same_end(tmp_path, uninterrupted[0])


def test_killed_between_the_stages_and_before_the_end(zygote, command, uninterrupted, tmp_path):
    master, pupil = (tmp_path / "x" / stage / "seed0" for stage in ("master", "pupil"))
    for condition in (
        (master / "model.safetensors").exists,
        (master / "learner.pkl").exists,
        (master / "curves.png").exists,
        pupil.exists,
        (pupil / "model.safetensors").exists,
        (pupil / "curves.png").exists,
    ):
        pid = zygote.start(tmp_path, *command)
        code = kill_when(zygote, pid, condition, 60)
        assert code in (0, -signal.SIGKILL), (tmp_path / "log.txt").read_text()
    assert zygote.run(tmp_path, *command) == 0, (tmp_path / "log.txt").read_text()
    same_end(tmp_path, uninterrupted[0])


def test_killed_after_the_last_word(zygote, command, uninterrupted, tmp_path):
    """Before the checkpoints were removed, of the teacher and of its student."""
    shutil.copytree(uninterrupted[0] / "x", tmp_path / "x")
    for stage in ("master", "pupil"):
        (tmp_path / "x" / stage / "seed0" / "checkpoint").mkdir()
        (tmp_path / "x" / stage / "seed0" / "checkpoint" / "00003-0000000-0123456789abcdef.pt").write_bytes(b"old")
    assert zygote.run(tmp_path, *command) == 0, (tmp_path / "log.txt").read_text()
    same_end(tmp_path, uninterrupted[0])


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_told_to_stop_it_loses_nothing(zygote, command, uninterrupted, tmp_path, number, code):
    pupil = tmp_path / "x" / "pupil" / "seed0" / "metrics.csv"
    pid = zygote.start(tmp_path, *command)
    while not pupil.exists():
        time.sleep(0.001)
    os.kill(pid, number)
    assert zygote.end() == code, (tmp_path / "log.txt").read_text()
    log = (tmp_path / "log.txt").read_text()
    assert f"stopped ({number.name})" in log
    assert "the same command resumes from there" in log
    assert zygote.run(tmp_path, *command) == 0
    assert "resuming after epoch" in (tmp_path / "log.txt").read_text()
    same_end(tmp_path, uninterrupted[0])


def test_two_at_once(zygote, command, tmp_path):
    """The second is refused with the first one's number; a dead one is in nobody's way."""
    second = Zygote()
    pid = zygote.start(tmp_path, *command)
    while not (tmp_path / "x" / "master" / "seed0" / "metrics.csv").exists():
        time.sleep(0.001)
    assert second.run(tmp_path, *command) == 2
    assert f"is in use by process {pid} on " in (tmp_path / "log.txt").read_text()
    os.kill(pid, signal.SIGKILL)
    zygote.end()
    assert (tmp_path / "x" / "master" / "seed0" / ".lock").exists()
    assert second.run(tmp_path, *command) == 0, (tmp_path / "log.txt").read_text()
    assert not (tmp_path / "x" / "master" / "seed0" / ".lock").exists()
    second.close()
