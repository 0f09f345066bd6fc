"""Many runs: a command reads its data once, and `plan` gives its stages as commands of their own."""

import json
import os
import random
import re
import shlex
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from PIL import Image

from dms_fastai.data import decoded, sets
from dms_fastai.data.imageset import ImageSet
from dms_fastai.errors import UserError
from dms_fastai.run_folder import RunFolder
from dms_fastai.runs import plan as plan_module
from dms_fastai.runs.commands import commands_of
from dms_fastai.runs.lock import locked
from dms_fastai.runs.wanted import Wanted
from tests.test_runs import dms, same_run  # noqa: F401  (a fixture)

PLAN = "dms-fastai plan ablation --data cifar10 --seeds 0,1,2"
CLUSTERS = (Path(__file__).parent.parent / "docs" / "clusters.md").read_text()

TINY = ("--arch", "test_dmsresnet", "--set", "data.batch_size=256", "--epochs", 1, "--device", "cpu")
TINY_TEACHER = ("--set", "teacher.model.name=test_dmsresnet")


# Read once


@pytest.fixture
def images(tmp_path):
    """A folder of two classes, with images without labels."""
    for split, count in (("train/a", 8), ("train/b", 8), ("test/a", 2), ("test/b", 2), ("val/a", 2), ("unlabelled", 4)):
        for number in range(count):
            file = tmp_path / "images" / split / f"{number}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (8, 8), (20 * number + 20, 99, len(split))).save(file)
    return tmp_path / "images"


@pytest.fixture
def counted(monkeypatch):
    """How often data are opened, image files are listed and decoded, and images are hashed."""
    counts = dict.fromkeys(("load_splits", "_stamp", "_decode", "_hashed"), 0)

    def count(owner, name):
        original = getattr(owner, name)

        def counting(*args, **kwargs):
            counts[name] += 1
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, name, counting)

    for owner in (sets, plan_module):
        count(owner, "load_splits")
    for owner, name in ((decoded, "_stamp"), (decoded, "_decode"), (ImageSet, "_hashed")):
        count(owner, name)
    return counts


def test_a_command_reads_its_data_once_for_all_stages_and_seeds(dms, images, counted, tmp_path):  # noqa: F811
    more = (*TINY, "--data", images, "--set", "data.size=8")
    assert dms("run", "se", "kd", "--seeds", "0,1", *more, *TINY_TEACHER)[0] == 0
    # train, test and unlabelled: each is listed, decoded and hashed, and val, which nobody asks for, is not
    assert counted == {"load_splits": 1, "_stamp": 3, "_decode": 3, "_hashed": 3}

    (tmp_path / "own.toml").write_text('extends = "se"\n[data]\nvalid = "val"\n')
    counted.update(dict.fromkeys(counted, 0))
    assert dms("run", "se", "own.toml", *more, "--out", "x")[0] == 0
    assert counted == {"load_splits": 1, "_stamp": 3, "_decode": 1, "_hashed": 3}  # train, test and val


def test_processes_that_begin_together_decode_once(images, counted):
    """Threads stand for processes: the lock is on an open file, of which each has its own."""
    listing = decoded.Listing(images / "train", [f"a/{n}.png" for n in range(8)], [0] * 8, ["a"])
    found, begin = [], threading.Barrier(4)

    def read():
        begin.wait()
        found.append(decoded.decoded_image_set(listing, 8).images)

    threads = [threading.Thread(target=read) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert counted["_decode"] == 1
    assert len(found) == 4
    assert all(torch.equal(images, found[0]) for images in found)


# A command for each stage


ASKED = ("se", "kd", "--seeds", "0,1", *TINY, *TINY_TEACHER)
ASKED = [str(word) for word in ASKED if word not in ("--device", "cpu")]
STAGES = [f"{name}/seed{seed}" for seed in (0, 1) for name in ("se", "teacher", "kd")]


@pytest.fixture
def bin_path(tmp_path, monkeypatch):
    """A `dms-fastai` of this Python for the shell, without a GPU."""
    script = tmp_path / "bin" / "dms-fastai"
    script.parent.mkdir()
    script.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m dms_fastai "$@"\n')
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{script.parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent.parent))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # the scripts themselves set the number of threads


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The runs of the one command."""
    out = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CUDA_VISIBLE_DEVICES", "")
        patch.setenv("OMP_NUM_THREADS", "1")
        subprocess.run([sys.executable, "-m", "dms_fastai", "run", *ASKED, "--out", out], check=True)
    return out


def same_folders(one, other, stages=STAGES):
    """Every stage has the same weights, epochs, recipe and facts, but for times and where the teacher lies."""
    for stage in stages:
        same_run(one / stage, other / stage)
        a, b = (RunFolder(out / stage) for out in (one, other))
        assert a.recipe_file.read_bytes() == b.recipe_file.read_bytes()
        told = [json.loads(folder.facts_file.read_text()) for folder in (a, b)]
        for facts in told:
            for key in ("started", "seconds", "commit"):  # the commit, as somebody may make one meanwhile
                facts.pop(key, None)
            facts["teacher"] = facts.get("teacher", "")[-len("teacher/seed0") :]
        assert told[0] == told[1]


def as_written(kind, holding):
    """The block of a language in docs/clusters.md that has a text in it."""
    [found] = [block for block in re.findall(rf"```{kind}\n(.*?)```", CLUSTERS, re.S) if holding in block]
    return found


def shuffled(planned, rng):
    """Ids in an order drawn by `rng` in which everything comes after what it waits for."""
    left, order = list(planned), []
    while left:
        ready = [command for command in left if set(command["after"]) <= set(order)]
        left.remove(taken := rng.choice(ready))
        order.append(taken["id"])
    return order


def test_commands_of_a_plan_give_what_the_one_command_gives(dms, whole, bin_path, tmp_path):  # noqa: F811
    """Two at once, in a shuffled order: a student waits by itself while its teacher is still trained."""
    code, out, err = dms("plan", *ASKED, "--out", "apart", "--json")
    assert (code, err) == (0, "")
    planned = json.loads(out)
    assert [command["folder"] for command in planned] == [f"apart/{stage}" for stage in STAGES]
    assert [command["after"] for command in planned] == [[], [], [2], [], [], [5]]
    assert not any(command["finished"] for command in planned)
    lines = dms("plan", *ASKED, "--out", "apart")[1].splitlines()
    assert lines == [command["command"] for command in planned]
    order = shuffled(planned, random.Random(3))
    assert order != sorted(order)
    (tmp_path / "shuffled.txt").write_text("".join(f"{lines[number - 1]}\n" for number in order))
    script = as_written("sh", "xargs").replace(PLAN, "cat shuffled.txt")
    subprocess.run(["sh", "-ec", script], check=True, stdout=subprocess.DEVNULL)
    same_folders(whole, tmp_path / "apart")
    assert all(command["finished"] for command in json.loads(dms("plan", *ASKED, "--out", "apart", "--json")[1]))


def test_one_stage_alone(dms, tmp_path):  # noqa: F811
    args = ("run", "se", "kd", *TINY, *TINY_TEACHER, "--out", "x")
    code, _, err = dms(*args, "--only", "kd")
    assert code == 2
    assert "the teacher in x/teacher/seed0 has not finished; train it first" in err
    assert not (tmp_path / "x").exists()
    assert dms(*args, "--only", "teacher")[0] == 0
    assert [file.parent.parent.name for file in tmp_path.rglob("run.json")] == ["teacher"]
    assert dms(*args, "--only", "teacher")[0] == 0  # finished: nothing to do
    assert dms(*args, "--only", "kd")[0] == 0
    assert {file.parent.parent.name for file in tmp_path.rglob("run.json")} == {"teacher", "kd"}
    code, _, err = dms(*args, "--only", "mixup")
    assert (code, "unknown stage 'mixup': known: kd, se, teacher" in err) == (2, True)


def test_a_plan_says_what_the_command_says(dms, tmp_path):  # noqa: F811
    """Each line, read as a shell does, asks for the same recipes as the whole command."""
    settings = ("--set", "title=a 'b' $c", "--set", "model.drop_rate=0.05", "--set", "bf16=false")
    settings += ("--set", 'model.weights="a\\nb"', "--set", 'data.labels=""')
    asked = ("kd", "--compare", "--teacher", "timm:resnet18", "--fine-tune-teacher", "--data", "my images", *settings)
    (tmp_path / "my images").mkdir()
    lines = [shlex.split(line) for line in dms("plan", *asked, "--seed", 3)[1].splitlines()]
    assert [words[words.index("--only") + 1] for words in lines] == ["teacher/pretrained", "kd", "kd-alone"]
    assert [words[-1] for words in lines] == ["3", "--wait", "3"]
    for words in lines:
        assert words[:2] == ["dms-fastai", "run"]
        settings = ("title=a 'b' $c", "bf16=false", 'model.weights="a\\nb"', 'data.labels=""')
        for option in ("--compare", "--fine-tune-teacher", "my images", *settings):
            assert option in words


def test_a_teacher_that_is_there_may_be_another_network_for_all_who_ask(dms, tmp_path):  # noqa: F811
    assert dms("run", "teacher", *TINY, "--out", "x")[0] == 0
    planned = json.loads(dms("plan", "kd", "--seeds", "0,1", "--out", "x", "--json")[1])
    folders = ["x/teacher/seed0", "x/kd/seed0", "x/teacher/seed1", "x/kd/seed1"]
    assert [(command["folder"], command["finished"]) for command in planned] == [(f, f == folders[0]) for f in folders]
    wanted = Wanted(("kd",), seeds=(0, 1), out=Path("x"), settings={"data.batch_size": 256})
    stages = plan_module.plan(wanted, plan_module.Opened("digits"))
    assert [str(stage.folder.path) for stage in stages] == folders[1:]


def test_what_cannot_be_planned_is_refused_in_a_line(dms):  # noqa: F811
    code, out, err = dms("plan", "small/kd")
    assert (code, out) == (2, "")
    assert "'small/kd' has a budget, which is fitted to the machine" in err
    wanted = Wanted(("se", "kd"), out=Path("x"), teacher="x/se/seed0")
    Path("x/se/seed0").mkdir(parents=True)
    with pytest.raises(UserError, match="this command trains x/se/seed0 itself"):
        commands_of(wanted)


@pytest.mark.parametrize("command", ["run", "plan"])
@pytest.mark.parametrize("more", [("--budget", "20m"), ("--set", "budget.minutes=20")])
def test_a_recipe_that_has_been_fitted_takes_no_other_budget(dms, tmp_path, command, more):  # noqa: F811
    (tmp_path / "fitted.toml").write_text('extends = "small"\n[budget]\nfitted = true\n')
    code, out, err = dms(command, "fitted.toml", *more)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "'fitted' has been fitted already" in err
    assert "has a budget" in dms("plan", "fitted.toml", *more, "--set", "budget.fitted=false")[2]


def test_a_plan_needs_neither_torch_nor_the_images(tmp_path):
    (tmp_path / "damaged.npz").touch()
    code = """
import sys
sys.argv = ["dms-fastai", "plan", "ablation", "--data", "damaged.npz", "--seeds", "0,1,2"]
from dms_fastai.cli import app
app(standalone_mode=False)
print({"torch", "timm", "fastai", "matplotlib", "numpy"} & set(sys.modules))
"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert len(ran.stdout.splitlines()) == 16, ran.stderr
    assert ran.stdout.splitlines()[-1] == "set()"


# Wait


def test_a_locked_folder_is_waited_for_until_it_is_free(tmp_path):
    """The holder goes when it is waited for."""
    said = []
    first = locked(tmp_path)
    first.__enter__()

    def wait(what):
        said.append(what)
        first.__exit__(None, None, None)

    with locked(tmp_path, wait):
        pass
    assert len(said) == 1
    assert re.search(rf"in use by process {os.getpid()} on ", said[0])


def test_a_deadline_ends_the_wait_with_a_code_of_its_own(dms, tmp_path):  # noqa: F811
    args = ("run", "kd", *TINY, "--out", "x", "--wait", "--time-limit", "0.8s")
    code, out, err = dms(*args, "--only", "kd")
    assert code == 75
    assert "waiting: x/teacher/seed0 has not finished" in out
    assert "time limit: x/teacher/seed0 has not finished; the same command goes on waiting" in err
    with locked(tmp_path / "x" / "teacher" / "seed0"):
        code, out, err = dms(*args)
    assert code == 75
    assert out.count("waiting: x/teacher/seed0 is in use by process") == 1
    assert not list(tmp_path.rglob("run.json"))


def test_two_commands_at_once_train_a_stage_once(bin_path, tmp_path):
    command = [sys.executable, "-m", "dms_fastai", "run", "kd", *map(str, (*TINY, *TINY_TEACHER)), "--wait"]
    command += ["--out", str(tmp_path / "x")]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    said = [process.communicate()[0] for process in both]
    assert [process.returncode for process in both] == [0, 0]
    for title in ("Teacher", "+ SE + MixUp + KD"):
        assert sum(out.count(f"{title}: epoch 1/1") for out in said) == 1


def test_waiting_and_beginning_again_do_not_go_together(dms):  # noqa: F811
    code, _, err = dms("run", "se", "--wait", "--restart")
    assert (code, "leave one out" in err) == (2, True)


# docs/clusters.md


def test_the_makefile_trains_a_teacher_and_then_its_student(whole, bin_path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rules.py").write_text(as_written("python", "json.load"))
    asked = [word for word in ASKED if word not in ("se", "--seeds", "0,1")]
    script = as_written("sh", "make -f").replace(PLAN, shlex.join(["dms-fastai", "plan", *asked, "--out", "apart"]))
    subprocess.run(["sh", "-ec", script], check=True, stdout=subprocess.DEVNULL)
    same_folders(whole, tmp_path / "apart", ["teacher/seed0", "kd/seed0"])


def test_xargs_leaves_quotes_to_the_shell(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    said = ["+ SE, from se", """it's "two"  words \\ and $HOME"""]
    lines = [shlex.join(["sh", "-c", 'printf %s "$1" > "$2"', "sh", text, f"{n}.txt"]) for n, text in enumerate(said)]
    (tmp_path / "lines").write_text("".join(f"{line}\n" for line in lines))
    subprocess.run(["sh", "-ec", as_written("sh", "xargs").replace(PLAN, "cat lines")], check=True)
    assert [(tmp_path / f"{n}.txt").read_text() for n in range(2)] == said


@pytest.mark.skipif(shutil.which("jq") is None, reason="needs jq")
def test_jobs_with_dependencies_get_their_own_commands(bin_path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bin" / "sbatch").write_text(
        f"#!{sys.executable}\nimport json, sys, pathlib\nlog = pathlib.Path('jobs')\n"
        "jobs = log.read_text().splitlines() if log.exists() else []\n"
        "log.write_text(''.join(f'{j}\\n' for j in [*jobs, json.dumps(sys.argv[1:])]))\nprint(101 + len(jobs))\n"
    )
    (tmp_path / "bin" / "sbatch").chmod(0o755)
    plan = shlex.join(["dms-fastai", "plan", "se", "kd", "--set", "title=a 'b' \\c"])
    subprocess.run(["bash", "-ec", as_written("sh", "--dependency").replace(PLAN, plan)], check=True)
    jobs = [json.loads(line) for line in (tmp_path / "jobs").read_text().splitlines()]
    lines = subprocess.run(["sh", "-c", plan], capture_output=True, text=True, check=True).stdout.splitlines()
    assert [job[job.index("--wrap") + 1] for job in jobs] == lines
    needs = [[word for word in job if word.startswith("--dependency")] for job in jobs]
    assert needs == [[], [], ["--dependency=afterok:102"]]  # se, teacher, and kd


@pytest.mark.parametrize("holding", ["#SBATCH --array", "--dependency"])
def test_the_scripts_for_slurm_can_be_parsed(holding):
    text = as_written("sh", holding)
    subprocess.run(["bash", "-n"], input=text, text=True, check=True)
