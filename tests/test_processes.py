"""Several processes train one network: the same as one process, stopped together, refused together."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import torch

from dms_fastai import UserError, dms_learner, load_data, processes
from dms_fastai.run_folder import RunFolder
from dms_fastai.runs.predictions import read_predictions
from tests.conftest import quiet
from tests.replicas import CASES, OWN, trained
from tests.test_runs import same_run

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork")


@pytest.fixture(scope="module")
def replicas(tmp_path_factory):
    """What two processes of torchrun have found."""
    folder = tmp_path_factory.mktemp("replicas")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run([*command, "-m", "tests.replicas", folder], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.fixture
def float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("name", CASES)
def test_every_loss_is_that_of_one_process(replicas, float64, name):
    one = trained(*CASES[name])
    assert len(set(one["losses"])) == 12
    for two in (found[name] for found in replicas):
        assert two["losses"] == pytest.approx(one["losses"], abs=1e-9)
        assert np.array(two["values"]) == pytest.approx(np.array(one["values"]), abs=1e-6)  # accuracies are in float32
        for key, value in one["weights"].items():
            assert torch.allclose(two["weights"][key], value, rtol=0, atol=1e-9), key


def test_processes_with_draws_and_statistics_of_their_own_hold_the_same_weights(replicas):
    """Dropout, batch norms and the projection of features differ before they are averaged, and not afterwards."""
    first, second = (found["own"] for found in replicas)
    assert first["losses"] == second["losses"]
    assert first["values"] == second["values"]
    for key, value in first["weights"].items():
        assert torch.equal(second["weights"][key], value), key
    one = trained("kd", OWN | {"model.drop_rate": 0.0}, double=False)
    assert first["losses"][0] == pytest.approx(one["losses"][0], rel=0.2)  # they are of the same batch
    assert len(set(first["losses"])) == 12


# The command line


class Launcher:
    def __init__(self, log):
        self.log = log
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.launcher"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self.process.stdout.readline() == "ready\n"

    def ask(self, order):
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def start(self, cwd, *args, number=2):
        self.log.write_text("")
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        words = [str(arg) for arg in args]
        return self.ask({"start": words, "processes": number, "port": port, "cwd": str(cwd), "log": str(self.log)})

    def wait(self, pids):
        """The exit codes; what does not end is killed, as torchrun would."""
        timer = threading.Timer(60, lambda: [os.kill(pid, signal.SIGKILL) for pid in pids])
        timer.start()
        try:
            return self.ask({"wait": pids})
        finally:
            timer.cancel()

    def run(self, cwd, *args, number=2):
        return self.wait(self.start(cwd, *args, number=number))

    def lines(self):
        return [line for line in self.log.read_text().splitlines() if line.startswith("dms-fastai: ")]


@pytest.fixture(scope="module")
def launcher(tmp_path_factory):
    born = Launcher(tmp_path_factory.mktemp("log") / "log.txt")
    yield born
    born.process.stdin.close()
    born.process.wait()
    born.process.stdout.close()


@pytest.fixture(scope="module")
def command(tmp_path_factory):
    """A run of a few digits with dropout and an average of the weights, and a checkpoint every third step."""
    folder = tmp_path_factory.mktemp("data")
    digits, arrays = load_data("digits"), {}
    for split, images, n in (("train", digits.train_ds, 320), ("test", digits.valid_ds, 301)):
        arrays[f"{split}_images"] = images.images[:n].permute(0, 2, 3, 1).numpy()
        arrays[f"{split}_labels"] = images.labels[:n].numpy()
    np.savez(folder / "few.npz", **arrays)
    recipe = 'extends = "mixup"\n[model]\nname = "test_dmsresnet"\ndrop_rate = 0.1\n[data]\nbatch_size = 32\n'
    (folder / "own.toml").write_text(f"{recipe}[schedule]\nepochs = 24\n[ema]\ndecay = 0.9\n")
    return ["run", folder / "own.toml", "--data", folder / "few.npz", "--device", "cpu", "--checkpoint-steps", "3"]


@pytest.fixture(scope="module")
def whole(launcher, command, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    assert launcher.run(folder, *command, "--out", "x") == [0, 0], launcher.log.read_text()
    return folder / "x" / "own" / "seed0"


def started(launcher, cwd, args):
    """Two processes that have just written a checkpoint."""
    folder, deadline = cwd / "x" / "own" / "seed0" / "checkpoint", time.monotonic() + 60
    seen = set(folder.glob("*.pt"))
    pids = launcher.start(cwd, *args)
    while set(folder.glob("*.pt")) <= seen:
        assert time.monotonic() < deadline, launcher.log.read_text()
        time.sleep(0.001)
    return pids


def test_the_images_to_validate_on_are_shared_and_none_comes_twice(whole):
    folder = RunFolder(whole)
    facts, found, row = folder.facts(), read_predictions(folder.predictions), folder.rows()[-1]
    assert (facts.processes, facts.validation_images) == (2, 301)
    assert len(found.labels) == 301
    assert row["valid_accuracy"] == pytest.approx(found.right.mean(), abs=0.004)  # one image of 301
    loss = -found.log_probabilities.astype(np.float32)[np.arange(301), found.labels].mean()
    assert row["valid_loss"] == pytest.approx(loss, rel=1e-2)


def test_stopped_or_killed_they_go_on_bit_for_bit(launcher, command, whole, tmp_path):
    """SIGTERM to one of them, one killed, both killed; then to the end."""
    folder, args = tmp_path / "x" / "own" / "seed0", (*command, "--out", "x")
    pids = started(launcher, tmp_path, args)
    os.kill(pids[1], signal.SIGTERM)
    assert launcher.wait(pids) == [143, 143], launcher.log.read_text()
    assert launcher.log.read_text().count("stopped (SIGTERM)") == 1
    assert not (folder / ".lock").exists()

    pids = started(launcher, tmp_path, args)
    os.kill(pids[1], signal.SIGKILL)
    assert launcher.wait(pids) == [2, -signal.SIGKILL], launcher.log.read_text()
    assert launcher.lines() == [
        "dms-fastai: error: one of the processes has ended; the same command resumes from the last checkpoint"
    ]

    pids = started(launcher, tmp_path, args)
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    launcher.wait(pids)

    assert launcher.run(tmp_path, *args) == [0, 0], launcher.log.read_text()
    assert "resuming after" in launcher.log.read_text()
    same_run(whole, folder)


def test_another_number_of_processes_goes_on_and_a_second_training_is_refused(launcher, command, tmp_path):
    folder, args = tmp_path / "x" / "own" / "seed0", (*command, "--out", "x")
    pids = started(launcher, tmp_path, args)
    assert launcher.run(tmp_path, *args) == [2, 2]
    [line] = launcher.lines()
    assert f"is in use by process {pids[0]} on " in line
    os.kill(pids[0], signal.SIGTERM)
    assert launcher.wait(pids) == [143, 143]
    assert launcher.run(tmp_path, *args, number=1) == [0], launcher.log.read_text()
    assert "resumed with different arithmetic (processes 2 -> unset)" in launcher.log.read_text()
    assert RunFolder(folder).facts().finished


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["run", "see"], "did you mean 'se'"),
        (["run", "se", "--set", "data.batch_size=33"], "2 processes cannot share a batch of 33 images evenly"),
        (["run", "se", "--at-once", 2], "--at-once starts processes of its own"),
        (["report"], "torchrun works with run or prune only; start report without it"),
        (["run", "kd", "--teacher", "own.pkl"], "no teacher at own.pkl"),
    ],
)
def test_all_end_with_one_line(launcher, tmp_path, args, words):
    assert launcher.run(tmp_path, *args) == [2, 2], launcher.log.read_text()
    [line] = launcher.lines()
    assert words in line
    assert "Traceback" not in launcher.log.read_text()


# Python


def test_a_data_set_smaller_than_a_batch_is_refused_before_anything_is_written(launcher, tmp_path):
    """Its batches are as large as it is: three images."""
    images, labels = np.zeros((5, 8, 8), np.uint8), np.arange(5) % 2
    np.savez(tmp_path / "few.npz", train_images=images, train_labels=labels)
    args = ("run", "se", "--data", "few.npz", "--set", "data.valid=0.3", "--device", "cpu", "--out", "x")
    assert launcher.run(tmp_path, *args) == [2, 2]
    assert "2 processes cannot share a batch of 3 images" in launcher.log.read_text()
    assert not (tmp_path / "x").exists()


def test_lr_find_is_refused_before_it_waits_for_the_others(dls, tmp_path, monkeypatch):
    learn = quiet(dms_learner(dls, "se", path=tmp_path))
    monkeypatch.setattr(processes, "_size", 2)
    with pytest.raises(UserError, match=r"lr_find\(\) is for one process; call it without torchrun"):
        learn.lr_find(show_plot=False)


def test_variables_of_a_scheduler_alone_change_nothing(monkeypatch):
    """Without torchrun nobody is there to gather from, as fastai would."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    assert not processes.started()
    learn = quiet(dms_learner(load_data("digits", bs=256), "se", settings={"model.name": "test_dmsresnet"}))
    learn.fit_recipe(1)
    assert len(learn.get_preds()[0]) == len(learn.dls.valid_ds)


def test_fastais_own_way_is_refused_in_words(dls):
    learn = dms_learner(dls, "se")
    for call in (learn.distrib_ctx, learn.to_distributed):
        with pytest.raises(UserError, match="join_processes"):
            call()
