"""A search over a recipe's values: spaces as the command says them, trials that go on after a stop, and who wins."""

import json
import re
import signal
import subprocess
import sys

import pytest
from PIL import Image

from dms_fastai import UserError
from dms_fastai.run_folder import RunFolder
from dms_fastai.runs.spaces import Space, parse_space
from tests.test_runs import dms  # noqa: F401  (a fixture)

SMALL = ("--arch", "dmsresnet_tiny", "--device", "cpu", "--set", "compile=never", "--set", "data.batch_size=64")


@pytest.mark.parametrize(
    ("text", "kind", "values"),
    [
        ("optimizer.lr=log(0.01,1)", "log", (0.01, 1.0)),
        ("optimizer.lr = log( 1e-3 , 1 )", "log", (0.001, 1.0)),
        ("loss.label_smoothing=uniform(0, 0.2)", "uniform", (0.0, 0.2)),
        ("schedule.epochs=int(1,8)", "int", (1, 8)),
        ("data.batch_size=[64, 128]", "list", (64, 128)),
        ('augment.border=["black", "mirror"]', "list", ("black", "mirror")),
    ],
)
def test_a_space_is_read(text, kind, values):
    assert parse_space(text) == Space(text.partition("=")[0].strip(), kind, values)


@pytest.mark.parametrize(
    "text",
    ["optimizer.lr", "optimizer.lr=0.1", "a.b=log(0,1)", "a.b=log(1,0.1)", "a.b=uniform(1)", "a.b=uniform(1,2,3)",
     "a.b=uniform(x,2)", "a.b=uniform(nan,1)", "a.b=uniform(0,inf)", "a.b=uniform(true,2)", "a.b=int(0.5,2)",
     "a.b=int(3,3)", "a.b=[]", "a.b=normal(0,1)", "a.b=log()"],
)  # fmt: skip
def test_what_is_no_space_is_refused_with_what_to_write(text):
    with pytest.raises(UserError, match=r"write|take|log\("):
        parse_space(text)


def test_a_number_is_short_and_within_its_range():
    drawn = Space("optimizer.lr", "log", (0.01, 0.12345))
    assert drawn.setting(0.0123456) == 0.0123
    assert drawn.setting(0.12345) <= 0.12345
    assert Space("a.b", "list", ([1], [2])).setting(1) == [2]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["se", "--over", "optimizer.lr=uniform(-1,1)"], "optimizer.lr"),
        (["se", "--over", "optimizer.rl=log(0.1,1)"], "did you mean"),
        (["se", "--over", "optimizer.lr=log(0.1,1)", "--set", "optimizer.lr=1"], "given twice"),
        (["se", "--over", "optimizer.lr=log(0.1,1)", "--over", "optimizer.lr=[1]"], "given twice"),
        (["se", "--over", "optimizer.lr=log(0.1,1)", "--set", "data.valid=test"], "test images"),
        (["mixup", "--over", "mixup=[true,false]", "--over", "mixup.alpha=uniform(0.2,1)"], "would switch it on"),
        (["mixup", "--over", "mixup=[true,false]", "--set", "mixup.alpha=0.3"], "mixup.alpha would switch it on"),
        (["small", "--over", "optimizer.lr=log(0.1,1)"], "has a budget"),
        (["se", "--over", "data.valid=[0.1,0.2]"], "test images"),
        (["kd", "--over", "distill.T=log(1,9)"], "--teacher RUN"),
        (["se", "--over", "schedule.epochs=int(1,8)", "--epochs", "2"], "given twice, by --epochs and by --over"),
        (["se", "--over", 'schedule.name=["cosine"]', "--schedule", "linear"], "given twice, by --schedule and"),
        (["se", "--over", 'model.name=["dmsresnet"]', "--arch", "dmsresnet_tiny"], "given twice, by --arch and"),
        (["kd", "--over", 'teacher=["dmsresnet"]', "--teacher", "dmsresnet"], "given twice, by --teacher and"),
        (["kd", "--over", 'teacher=["dmsresnet", "teacher"]'], "--teacher RUN"),
        (["se", "--over", 'name=["a", "b"]'], "name changes nothing in a training"),
        (["ablation", "--over", "optimizer.lr=log(0.1,1)"], "one at a time"),
    ],
)
def test_what_cannot_be_searched_is_refused_before_anything_is_trained(dms, words, said):  # noqa: F811
    code, _, err = dms("tune", *words)
    assert code == 2
    assert said in err
    assert err.count("\n") == 1


def test_images_that_stand_in_for_others_are_no_less_the_test_images(dms, tmp_path):  # noqa: F811
    words = ["tune", "se", *SMALL, "--over", "optimizer.lr=log(0.1,1)", "--set", "data.valid=val"]  # digits have none
    code, _, err = dms(*words, "--out", tmp_path / "s")
    assert (code, "must not look at the test images" in err) == (2, True)
    assert not list(tmp_path.rglob("run.json"))


def test_values_that_cannot_be_trained_do_not_stand_in_the_way_of_others(dms, tmp_path):  # noqa: F811
    over = "model.args.widths=[[8, 16, 32], [8, 16]]"  # the latter are too few
    code, out, _ = dms("tune", "se", *SMALL, "--epochs", 1, "--over", over, "--out", tmp_path / "s", "--trials", 6)
    assert code == 0
    assert "this trial ends here: " in out
    assert "refused" in out
    assert "--set 'model.args.widths=[8, 16, 32]'" in out


def test_a_search_whose_trials_all_fail_says_why(dms, tmp_path):  # noqa: F811
    words = ["tune", "se", *SMALL[2:], "--over", "optimizer.lr=log(0.1,1)", "--set", "model.name=vit_tiny_patch16_224"]
    code, out, err = dms(*words, "--set", "model.args.img_size=7", "--out", tmp_path / "s")
    assert code == 2
    assert out.count("this trial ends here: ") == 2
    assert "vit_tiny_patch16_224" in err


def test_a_search_belongs_to_its_images(dms, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.chdir(tmp_path)
    for split, count in (("train", 8), ("test", 1)):
        for name, level in (("dark", 40), ("light", 200)):
            (tmp_path / "own" / split / name).mkdir(parents=True)
            for number in range(count):
                Image.new("RGB", (8, 8), (level, number, 0)).save(tmp_path / "own" / split / name / f"{number}.png")
    more = ["--epochs", 1, "--set", "data.valid=0.5", "--set", "data.size=8", "--out", "s", "--trials"]
    words = ["tune", "se", *SMALL, "--seed", 2**32 - 1, "--over", "optimizer.lr=log(0.1,1)", "--data"]
    assert dms(*words, "own", *more, 1)[0] == 0
    code, out, _ = dms(*words, tmp_path / "own" / "", *more, 2)  # the same, by another name
    assert (code, "trial 2 of 2" in out) == (0, True)
    Image.new("RGB", (8, 8), (90, 90, 90)).save(tmp_path / "own" / "train" / "dark" / "more.png")
    code, _, err = dms(*words, "own", *more, 3)
    assert (code, "other values or data" in err) == (2, True)


def test_a_search_belongs_to_its_teacher(dms, tmp_path):  # noqa: F811
    few = ("--device", "cpu", "--epochs", 1, "--set", "data.batch_size=512")
    for seed in (0, 1):
        assert dms("run", "se", *few, "--arch", "test_dmsresnet", "--seed", seed, "--out", "t")[0] == 0
        (tmp_path / "t" / "se" / f"seed{seed}" / "model.safetensors").rename(tmp_path / f"t{seed}.safetensors")
    words = ["tune", "kd", *few, "--over", "distill.alpha=uniform(0.1,0.9)", "--out", "s", "--teacher"]
    assert dms(*words, "t0.safetensors", "--trials", 1)[0] == 0
    code, _, err = dms(*words, "t1.safetensors", "--trials", 2)
    assert (code, "other values or data" in err) == (2, True)
    both = ["tune", "kd", *few, "--over", 'teacher=["t0.safetensors", "t1.safetensors"]', "--out", "b", "--trials", 2]
    assert dms(*both)[0] == 0


def test_trials_that_are_stopped_keep_their_numbers_and_wait_for_their_own_code(dms, tmp_path):  # noqa: F811
    words = ["tune", "se", *SMALL, "--epochs", 1, "--over", "optimizer.lr=log(0.01,0.1)", "--out", "s", "--trials", 2]
    for _ in range(2):
        assert dms(*words, "--time-limit", "0.001s")[0] == 75
    [file] = (tmp_path / "s").rglob("run.json")
    told = file.read_text()
    facts = json.loads(told)
    file.write_text(json.dumps(facts | {"versions": facts["versions"] | {"torch": "0.1"}}))
    code, _, err = dms(*words)
    assert (code, "holds an unfinished run of other code" in err, "or remove s" in err) == (2, True, True)
    file.write_text(told)
    code, out, _ = dms(*words)
    assert code == 0
    assert {path.name for path in (tmp_path / "s").iterdir() if path.is_dir()} == {"001", "002"}
    rates = {line.split()[1]: line.split()[0] for line in out.split("trial   ")[1].splitlines()[2:4]}
    for number, rate in ((n, r) for r, n in rates.items()):
        recipe = RunFolder(next((tmp_path / "s" / f"00{number}").rglob("run.json")).parent).recipe()
        assert recipe.optimizer.lr == float(rate)


def runs_below(folder):
    """The trained trials' facts."""
    return [RunFolder(file.parent).facts() for file in sorted(folder.rglob("run.json"))]


def test_the_best_of_the_trials_by_images_that_are_held_out(dms, tmp_path):  # noqa: F811
    words = ["tune", "se", *SMALL, "--epochs", "1", "--over", "optimizer.lr=log(1e-5,0.3)", "--out", tmp_path / "s"]
    assert dms(*words, "--trials", 2)[0] == 0
    code, out, _ = dms(*words, "--trials", 4)  # two more
    assert code == 0
    assert [line.split(":")[0] for line in out.splitlines() if line.startswith("trial ")] == [
        "trial 3 of 4",
        "trial 4 of 4",
    ]
    found = runs_below(tmp_path / "s")
    assert len(found) == 4
    assert all(facts.valid == "held out" and facts.validation_images == 143 for facts in found)
    best = max(found, key=lambda facts: facts.last.valid_accuracy)
    rate = float(re.search(r"--set optimizer.lr=(\S+)", out).group(1))
    recipes = [RunFolder(file.parent).recipe() for file in (tmp_path / "s").rglob("run.json")]
    assert rate in [recipe.optimizer.lr for recipe in recipes]
    assert f"{100 * best.last.valid_accuracy:.2f}" in out.split("trial   ")[1].splitlines()[2]
    refused = dms(*words[:-2], "--epochs", 2, "--out", tmp_path / "s")
    assert refused[0] == 2
    assert "other values or data" in refused[2]


def test_a_trial_that_is_stopped_goes_on_in_its_folder(tmp_path):
    words = [sys.executable, "-m", "dms_fastai", "tune", "se", *SMALL, "--epochs", "20", "--trials", "1",
             "--over", "optimizer.lr=log(0.01,0.1)", "--out", str(tmp_path)]  # fmt: skip
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as process:
        while "epoch 2/20" not in process.stdout.readline():
            assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        said = process.stdout.read()
    assert process.returncode == 143
    assert "0 of 1 trials" in said
    [before] = runs_below(tmp_path)
    assert before.status == "interrupted"
    again = subprocess.run(words, capture_output=True, text=True, check=True).stdout
    assert "resuming after epoch" in again
    [after] = runs_below(tmp_path)
    assert (after.status, after.started) == ("finished", before.started)


def test_a_trial_that_diverges_or_falls_behind_is_not_the_end(dms, tmp_path):  # noqa: F811
    words = ["tune", "se", *SMALL, "--epochs", "2", "--over", "optimizer.lr=[0.05, 1e18]", "--out", tmp_path / "s"]
    code, out, _ = dms(*words, "--trials", 10)
    assert code == 0
    assert "diverged" in out or "behind" in out
    assert "--set optimizer.lr=0.05" in out
    journal = (tmp_path / "s" / "trials.log").read_text().splitlines()
    assert all(json.loads(line) for line in journal)
    assert not list((tmp_path / "s").rglob("*.pt"))
