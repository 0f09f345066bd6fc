"""Commands that people look for: evaluate, show, lr-find, help and version, `run --keep-best` and `run --from`."""

import inspect
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from fastai.callback.core import Callback
from fastai.callback.schedule import lr_find  # noqa: F401  (patches Learner)
from fastai.torch_core import set_seed
from PIL import Image
from safetensors import safe_open

from dms_fastai import UserError, dms_learner, load_data, load_recipe, release
from dms_fastai.evaluate import evaluate_model
from dms_fastai.export import predict_files
from dms_fastai.models.weights import load_weights, save_weights
from dms_fastai.recipes import all_keys, origins_of, parse_setting, recipe_names
from dms_fastai.run_folder import RunFolder
from dms_fastai.runs.best import KeepBest, describe_best
from dms_fastai.runs.plan import Opened, plan
from dms_fastai.runs.predictions import read_predictions
from dms_fastai.runs.stage import Manner, run_stage
from dms_fastai.runs.wanted import Wanted
from dms_fastai.schema import load, meaning_of, settings_of
from dms_fastai.show import annotated, every_key
from tests.conftest import quiet
from tests.test_design import classes
from tests.test_runs import dms, same_run  # noqa: F401  (a fixture)

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run of se on the digits, three epochs, with its best epoch's weights."""
    wanted = Wanted(("se",), out=tmp_path_factory.mktemp("runs"), epochs=3, settings={"ema.decay": 0.9})
    opened = Opened("digits")
    [stage] = plan(wanted, opened)
    return run_stage(stage, opened, Manner(keep_best=True)).folder


# evaluate


def test_a_run_is_evaluated_as_it_was_validated(run):
    """Accuracy and loss are the last epoch's; the classes are counted from the predictions that the run has kept."""
    found, last, kept = evaluate_model(run.path, "digits"), run.rows()[-1], read_predictions(run.predictions)
    assert (found.split, found.images) == ("test", 359)
    assert found.accuracy == pytest.approx(last["valid_accuracy"], abs=1e-6)
    assert found.loss == pytest.approx(last["valid_loss"], abs=1e-5)
    for of_class in found.classes:
        own = kept.labels == list(kept.vocab).index(of_class.name)
        assert (of_class.images, of_class.right) == (own.sum(), kept.right[own].sum())
    shares = [of_class.accuracy for of_class in found.classes]
    assert len(shares) == 10
    assert shares == sorted(shares)


def test_classes_are_matched_by_name(run, tmp_path):
    """A model whose logits come in another order gives the same; so do images of two classes alone."""
    model, card = load_weights(run.weights)
    head = model.get_classifier()
    with torch.no_grad():
        head.weight.copy_(head.weight.flip(0))
        head.bias.copy_(head.bias.flip(0))
    save_weights(model, replace(card, vocab=card.vocab[::-1]), tmp_path / "turned.safetensors")
    same, found = (evaluate_model(source, "digits") for source in (run.weights, tmp_path / "turned.safetensors"))
    assert found.accuracy == pytest.approx(same.accuracy, abs=0.003)  # the run's is in bf16 where the CPU has that
    assert found.loss == pytest.approx(same.loss, rel=0.02)

    digits, files = load_data("digits").valid_ds, []
    for index in (digits.labels.eq(3) | digits.labels.eq(7)).nonzero().flatten().tolist():
        files.append(tmp_path / "two" / str(digits.vocab[digits.labels[index]]) / f"{index}.png")
        files[-1].parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(digits.images[index].permute(1, 2, 0).numpy()).save(files[-1])
    vocab, probabilities = predict_files(tmp_path / "turned.safetensors", files)
    right = [vocab[row.argmax()] == file.parent.name for row, file in zip(probabilities, files, strict=True)]
    found = evaluate_model(tmp_path / "turned.safetensors", tmp_path / "two", "train")
    assert {of_class.name: of_class.images for of_class in found.classes} == {"3": 37, "7": 36}
    assert found.accuracy == pytest.approx(sum(right) / 73)
    (tmp_path / "two" / "3").rename(tmp_path / "two" / "three")
    with pytest.raises(
        UserError, match="the class 'three', which the model does not know; its 10 classes are '0', '1'"
    ):
        evaluate_model(run.path, tmp_path / "two", "train")


def test_no_more_than_a_batch_is_classified_at_once(run):
    sizes = []
    track = lambda batches: (sizes.append(len(batch)) or batch for batch in batches)  # noqa: E731
    assert evaluate_model(run.path, "digits", "train", track=track).images == sum(sizes) == 1438
    assert max(sizes) == 128


def test_evaluate_prints_the_worst_classes_first(dms, run, monkeypatch):  # noqa: F811
    monkeypatch.setattr("dms_fastai.cli.trained.WORST", 3)
    found = evaluate_model(run.path, "digits")
    answers = [dms("evaluate", run.path, "--device", "cpu"), dms("evaluate", run.weights, "--data", "digits")]
    assert answers[0] == answers[1]
    code, out, err = answers[0]
    assert (code, err) == (0, "")
    *table, rest, last = out.splitlines()
    named = [line.split()[1] for line in table if line.startswith("│")]
    assert named == [of_class.name for of_class in found.classes[:3]]
    assert rest == f"and 7 more classes, {100 * found.classes[3].accuracy:.2f} % or better"
    assert last == f"accuracy: {100 * found.accuracy:.2f} %, loss: {found.loss:.4f}, of 359 images: digits, test"
    code, out, err = dms("evaluate", run.learner, "--split", "train", "--device", "cpu")
    assert (code, out.splitlines()[-1].split(", of ")[1]) == (0, "1,438 images: digits, train")
    assert "reading" in err
    assert dms("evaluate", run.learner, "--trust-pickle")[1].splitlines()[-1] == last


def test_what_cannot_be_evaluated_is_said_in_a_line(dms, run, tmp_path):  # noqa: F811
    elsewhere, called = tmp_path / "elsewhere", tmp_path / "called"
    for folder, own in ((elsewhere, {"data": "holiday"}), (called, {"place": "a1b2c3"})):  # a folder called digits
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(run.weights.read_bytes())
        RunFolder(folder).write_facts(replace(run.facts(), **own))
    for command, words in (
        (("dmsresnet",), "dmsresnet does not say which; give --data"),
        ((elsewhere,), "where holiday lies is not known; give --data"),
        ((called,), "where digits lies is not known; give --data"),
        ((run.path, "--split", "val"), "digits has no split 'val'; give --split"),
        ((run.path, "--split", "vall"), "split is 'vall'; it must be test, val or train"),
        ((run.path, "--data", "nowhere"), "'nowhere'"),
        (("dmsresnet", "--data", "digits"), "the class '0', '1', '2' and 7 more, which the model does not know"),
        (("nowhere",), "no model at nowhere"),
        (("nowhere.safetensors",), "no such file: nowhere.safetensors"),
        ((run.path.parent,), f"is no run, but holds some; give {run.path}"),
    ):
        code, out, err = dms("evaluate", *command)
        assert (code, out, err.count("\n")) == (2, "", 1)
        assert words in err
    RunFolder(elsewhere).write_facts(replace(run.facts(), data_digest=["0" * 16] * 2))
    code, _, err = dms("evaluate", elsewhere)
    assert code == 0
    assert err == "dms-fastai: the run was validated on other images that are called digits, too\n"


# release


def test_weights_are_replaced_once_all_of_them_is_known(run, tmp_path, monkeypatch, capsys):
    out = tmp_path / "pretrained"
    command = ["release", str(run.path), "--tag", "x", "--data", "digits", "--device", "cpu", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", command)
    release.main()
    names = [f"test_dmsresnet.x.{ending}" for ending in ("json", "md", "safetensors")]
    assert sorted(file.name for file in out.iterdir()) == names
    facts, rows = json.loads((out / names[0]).read_text()), run.rows()
    assert facts["test_accuracy"] == pytest.approx(rows[-1]["valid_accuracy"], abs=0.01)  # in float16
    assert "Colour images of 8x8 pixels in, 10 classes out." in (out / names[1]).read_text()
    before = {file: file.read_bytes() for file in out.iterdir()}
    pruned, recipe = tmp_path / "pruned", run.recipe()
    shutil.copytree(run.path, pruned)
    narrow = replace(recipe, model=replace(recipe.model, args={"mid_widths": [8, 8]}))
    RunFolder(pruned).recipe_file.write_text(narrow.to_toml())
    other = tmp_path / "other"
    shutil.copytree(run.path, other)
    RunFolder(other).write_facts(replace(run.facts(), data_digest=["0" * 16] * 2))
    refused = {
        other: "the test images of digits are not those",
        pruned: "holds a pruned network",
        tmp_path: "holds no run",
    }
    for folder, said in refused.items():
        command[1] = str(folder)
        with pytest.raises(SystemExit) as ended:
            release.main()
        err = capsys.readouterr().err.splitlines()[-1:]
        assert (ended.value.code, said in "".join(err)) == (2, True)
    assert {file: file.read_bytes() for file in out.iterdir()} == before


# show


@pytest.mark.parametrize("data", ["", "digits"])
@pytest.mark.parametrize("name", recipe_names())
def test_what_is_shown_is_the_recipe(name, data, tmp_path):
    settings = {"ema": True, "model.args.widths": [8, 16, 32], "model.args.odd.key b": 'x"#'}
    text = annotated(name, data, settings)
    assert tomllib.loads(text) == load_recipe(name, data, settings=settings).to_table()
    assert "widths = [8, 16, 32]  # --set\n" in text
    (tmp_path / "shown.toml").write_text(text)
    assert load_recipe(tmp_path / "shown.toml") == load_recipe(name, data, settings=settings)


def test_a_key_of_several_parts_is_shown_with_its_meaning_for_the_one_that_is_chosen():
    assert "\n# Momentum as in torch" in annotated("se")
    assert "\n# beta1, " in annotated("se", settings={"optimizer.name": "adamw"})
    assert "\n# Weight of the classes other" in annotated("kd", settings={"distill.divergence.name": "dkd"})


def test_values_come_from_where_they_were_said_last(tmp_path):
    (tmp_path / "own.toml").write_text(
        'extends = "kd"\ntitle = "Own"\nmixup = false\n[optimizer]\nlr = 0.2\n[on.digits.optimizer]\nlr = 0.3\n'
    )
    own = str(tmp_path / "own.toml")
    found = origins_of(own, "digits", {"distill.T": 3, "mixup": True})
    expected = {
        "name": "the file's name",
        "title": own,
        "optimizer.lr": f"{own} [on.digits]",
        "optimizer.momentum": "baseline.toml",
        "model.name": "se.toml [on.digits]",
        "schedule.epochs": "baseline.toml [on.digits]",
        "distill": "kd.toml",
        "distill.alpha": "kd.toml",
        "distill.T": "--set",
        "mixup": "--set",
        "bf16": "baseline.toml",
    }
    assert {key: found.get(key) for key in expected} == expected
    assert "mixup.alpha" not in found  # of what `mixup = false` switched off, nothing is left
    assert origins_of(own)["optimizer.lr"] == own
    assert origins_of("kd", settings={"schedule.name": "one-cycle"})["schedule.epochs"] == "baseline.toml"
    assert "schedule.step" not in origins_of("authors/kd", settings={"schedule.name": "one-cycle"})


def test_show_prints_meaning_and_origin_of_each_value(dms):  # noqa: F811
    code, out, err = dms("show", "kd", "--data", "digits", "--set", "optimizer.lr=0.25")
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert lines[lines.index("lr = 0.25  # --set") - 1] == "# Highest learning rate."
    assert lines[lines.index("epochs = 40  # baseline.toml [on.digits]") - 1] == "# Length of the training."
    assert "[distill]  # kd.toml" in lines
    assert 'border = "black"  # default' in lines


@pytest.mark.parametrize("at", classes())
def test_meanings_are_the_docstrings_words(at):
    """Read from the source; compared with what Python has of the class."""
    part, meaning = load(at), meaning_of(at)
    texts = (part.__doc__, part.__init__.__doc__, *(base.__doc__ for base in part.__mro__ if base.__doc__))
    own = " ".join(" ".join(filter(None, texts)).split())
    for name in settings_of(at):
        assert len(meaning.settings[name]) > 8
        assert re.search(rf"\b{name}\b[\w, ]*: {re.escape(meaning.settings[name])}", own)
    assert own.startswith(meaning.part)


def test_the_list_of_keys_is_complete(dms):  # noqa: F811
    tables = {key for key in all_keys() if any(other.startswith(f"{key}.") for other in all_keys())}
    assert [key.key for key in every_key()] == [key for key in all_keys() if key not in tables]
    by_key = {key.key: key for key in every_key()}
    for at, where in (("training.optimizers:SGD", "optimizer"), ("data.augment:Crops", "augment")):
        for name, parameter in inspect.signature(load(at)).parameters.items():
            default = by_key[f"{where}.{name}"].default.partition(";")[0]
            read = tomllib.loads(f"value = {default}")["value"]
            assert (tuple(read) if isinstance(read, list) else read) == parameter.default
    assert by_key["optimizer.lr"].default == '0.1; for "muon": 0.05; for "adamw": 0.001'
    assert by_key["optimizer.momentum"].default == '0.9; for "muon": 0.6'
    assert by_key["optimizer.rest"].of == ("muon",)
    assert by_key["schedule.epochs"].of == ()
    code, out, err = dms("show", "keys")
    assert (code, err) == (0, "")
    assert [line.split(" = ")[0] for line in out.splitlines() if not line.startswith(" ")] == list(by_key)
    assert '\n    a finite number, above 0, for "muon": Learning rate of the rest' in out


# lr-find


def test_lr_find_suggests_what_fastai_does(dms, tmp_path):  # noqa: F811
    code, out, err = dms("lr-find", "se", "--device", "cpu", "--seed", 3, "--out", "plots/rate.png")
    assert (code, err) == (0, "")
    planned, told, line = out.splitlines()
    assert planned == "100 steps of 64 images with test_dmsresnet"
    assert told == "plot: plots/rate.png"
    assert Image.open(tmp_path / "plots" / "rate.png").size[0] > 400
    assert [file.name for file in tmp_path.iterdir()] == ["plots"]  # no run

    dls = load_data("digits", bs=64, device="cpu")
    set_seed(3)
    learn = quiet(dms_learner(dls, "se", path=tmp_path))
    with learn.no_bar(), learn.no_logging():
        expected = learn.lr_find(show_plot=False).valley
    key, rate = parse_setting(line.removeprefix("--set "))
    assert (key, rate) == ("optimizer.lr", pytest.approx(expected, rel=0.05))  # two digits are printed


def test_lr_find_takes_the_teacher_if_it_is_there(dms, teacher, tmp_path, monkeypatch):  # noqa: F811
    taught = []
    monkeypatch.setattr("dms_fastai.runs.lr_find.dms_learner", lambda *a, **k: taught.append(a[2]) or learner(*a, **k))
    learner = dms_learner
    monkeypatch.setattr("dms_fastai.runs.lr_find.STEPS", 20)
    small = ("--set", "data.batch_size=256", "--device", "cpu")
    assert dms("lr-find", "cpu/kd", *small, "--set", "feature_distill=true")[0] == 0
    code, out, _ = dms("lr-find", "cpu/kd", *small)
    assert code == 0
    assert "without the teacher, which has not been trained: artifacts/digits/cpu/teacher/seed0" in out
    assert dms("run", "cpu/teacher", "--epochs", 1, "--out", "t", *small)[0] == 0
    code, out, _ = dms("lr-find", "cpu/kd", "--teacher", "t/cpu/teacher/seed0", *small)
    assert code == 0
    assert "without" not in out
    assert [source is None for source in taught] == [True, True, False]


# help, version, completion


def python(code, **environment):
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env={**os.environ, **environment}
    )
    return done.stdout, done.stderr


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("--version", "dms-fastai 0."),
        ("show kd --data digits", "[distill]"),
        ("show keys", "optimizer.lr = 0.1"),
        ("show kdd", "did you mean 'kd'"),
        ("show keys --set optimizer.lr=1", "leave --data and --set out"),
        ("show kd --set optimizer.lr=-1", "it must be above 0"),
        ("lr-find ablation", "lr-find takes one recipe"),
        ("lr-find se --out rate.jpg", "give --out NAME.png"),
        ("lr-find se --device gpu", "device is 'gpu'"),
        ("evaluate nowhere", "no model at nowhere"),
        ("evaluate dmsresnet --split valid", "split is 'valid'"),
        ("run se --from nowhere", "no model at nowhere"),
        ("run se mixup --from dmsresnet", "--from is for one recipe"),
        ("run ablation --from dmsresnet", "--from is for one recipe"),
        ("run se --from dmsresnet --set model.weights=timm", "say the same thing"),
        ("run se --from recipes", "recipes holds no finished run"),
    ],
)
def test_words_are_answered_before_torch_is_imported(command, words):
    out, err = python(f"""
import sys
from dms_fastai import cli
sys.argv = ["dms-fastai", *{command.split()!r}]
try:
    cli.main()
except SystemExit:
    pass
print({{"torch", "timm", "fastai", "matplotlib", "scipy"}} & set(sys.modules))
""")
    assert out.endswith("set()\n")
    assert words in out + err
    assert "Traceback" not in err


@pytest.mark.parametrize("command", [(), ("run",), ("evaluate",), ("lr-find",), ("show",), ("report",)])
def test_h_is_help(dms, command):  # noqa: F811
    short, long = (dms(*command, option) for option in ("-h", "--help"))
    assert short == long
    assert short[0] == 0
    assert "Usage" in short[1]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("show ke", ["keys"]),
        ("lr-find mi", ["mixup"]),
        ("run se --set schedule.ep", ["schedule.epochs="]),
        ("evaluate x --split t", ["test", "train"]),
        ("evaluate x --data cifar1", ["cifar10", "cifar100"]),
    ],
)
def test_the_shell_completes_new_words(line, words):
    typed = f"dms-fastai {line}"
    out, _ = python(
        "import sys; from dms_fastai import cli; sys.argv = ['dms-fastai']; cli.app(prog_name='dms-fastai')",
        _DMS_FASTAI_COMPLETE="complete_bash",
        COMP_WORDS=typed,
        COMP_CWORD=str(len(typed.split()) - 1),
    )
    assert out.split() == words


# run --keep-best


@pytest.mark.parametrize("settings", [{}, {"ema.decay": 0.9}])
def test_the_best_epochs_weights_are_kept(tmp_path, settings):
    """After the second of four epochs, the trained weights are set to zero, and what follows is worse."""
    folder, validated, kept = RunFolder(tmp_path), [], []

    def watch(cb):
        validated.append({name: value.clone() for name, value in cb.learn.model.state_dict().items()})
        with safe_open(folder.best, "pt") as opened:
            kept.append(int(opened.metadata()["epoch"]))
        if cb.learn.epoch == 1:
            for parameter in (cb.learn.ema.raw if settings else cb.learn.model).parameters():
                torch.nn.init.zeros_(parameter)

    watching = Callback(after_epoch=watch)
    watching.order = KeepBest.order + 1
    learn = quiet(dms_learner(load_data("digits", bs=64, device="cpu"), "se", settings={**settings, "bf16": False}))
    history = SimpleNamespace(rows=[])
    learn.fit_recipe(4, cbs=[KeepBest(folder, history), watching])
    place = list(learn.recorder.metric_names[1:]).index("valid_accuracy")
    accuracies = [values[place] for values in learn.recorder.values]
    assert kept == [accuracies.index(max(accuracies[: epoch + 1])) + 1 for epoch in range(4)]
    assert kept[-1] == 2
    model, card = load_weights(folder.best)
    assert card.vocab == [str(digit) for digit in range(10)]
    assert all(torch.equal(value, validated[1][name]) for name, value in model.state_dict().items())
    assert evaluate_model(folder.best, "digits").accuracy == pytest.approx(accuracies[1], abs=1e-6)

    learn.fit_recipe(1, cbs=[KeepBest(folder, history), watching])  # as when a run is resumed
    assert learn.recorder.values[-1][place] < accuracies[1]
    assert kept[-1] == 2

    folder.best.unlink()  # as when its best epoch was trained without it
    history.rows = [{"valid_accuracy": accuracies[1]}]
    learn.fit_recipe(1, cbs=[KeepBest(folder, history)])
    assert learn.recorder.values[-1][place] < accuracies[1]
    assert not folder.best.exists()
    assert "whose best epoch was trained without --keep-best" in describe_best(folder)


def test_a_resumed_run_keeps_the_same_best(dms, tmp_path):  # noqa: F811
    args = ("run", "se", "--epochs", 3, "--device", "cpu", "--set", "data.batch_size=1024")  # a step is an epoch
    code, out, _ = dms(*args, "--keep-best", "--out", "whole")
    assert code == 0
    whole, pieces = (RunFolder(tmp_path / name / "se" / "seed0") for name in ("whole", "pieces"))
    told = max(whole.rows(), key=lambda row: row["valid_accuracy"])
    figures = f"epoch {told['epoch']:.0f}, {100 * told['valid_accuracy']:.2f} %"
    line = f"best: whole/se/seed0/best.safetensors, {figures}: chosen on the images that it was validated on"
    assert out.splitlines()[-1] == line
    for more in (("--keep-best",), ("--keep-best",), ()):  # once begun, it needs no word
        assert dms(*args, *more, "--out", "pieces", "--time-limit", "0.001s")[0] == 75
    assert dms(*args, "--out", "pieces")[0] == 0
    same_run(whole.path, pieces.path)
    with safe_open(whole.best, "pt") as one, safe_open(pieces.best, "pt") as other:
        assert one.metadata() == other.metadata()
        assert all(torch.equal(one.get_tensor(name), other.get_tensor(name)) for name in other.keys())  # noqa: SIM118
    assert dms("predict", pieces.best, ROOT / "docs" / "images" / "tutorial-1.png")[0] == 0


def test_a_finished_run_without_its_best_says_so(dms):  # noqa: F811
    args = ("run", "se", "--epochs", 1, "--device", "cpu", "--set", "data.batch_size=256")
    assert dms(*args)[0] == 0
    code, out, _ = dms(*args, "--keep-best")
    assert code == 0
    assert "trained without --keep-best; --restart" in out.splitlines()[-1]


# run --from


def test_a_run_begins_from_anothers_weights(dms, run, tmp_path):  # noqa: F811
    args = ("run", "se", "--from", run.path, "--epochs", 1, "--device", "cpu", "--set", "optimizer.lr=1e-12")
    code, out, _ = dms(*args)
    assert code == 0
    assert f"--set model.weights={run.path}; the run goes to artifacts/digits/se-from\n" in out
    folder = RunFolder(tmp_path / "artifacts" / "digits" / "se-from" / "seed0")
    assert (folder.facts().recipe, folder.facts().title) == ("se-from", "+ SE, from se")
    (ours, _), (theirs, _) = (load_weights(file) for file in (folder.weights, run.weights))
    for (name, one), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6, msg=name)
    code, again, _ = dms(*args)
    assert code == 0
    assert "epoch 1/1" not in again  # it has finished

    code, _, err = dms("run", "se", "--from", folder.path, "--epochs", 1)
    assert (code, err.count("\n")) == (2, 1)
    assert "would be written over; give --out another folder" in err
    code, _, err = dms("run", "se", "--from", folder.weights, "--epochs", 1, "--restart")
    assert code == 2
    assert folder.weights.is_file()
    assert dms("run", "se", "--from", folder.path, "--epochs", 1, "--out", "other", "--device", "cpu")[0] == 0
    code, _, err = dms("run", "baseline", "--from", run.path, "--epochs", 1, "--arch", "test_dmsresnet_plain")
    assert (code, err.count("\n")) == (2, 1)
    assert "are of another network than test_dmsresnet_plain" in err
    assert "give --arch test_dmsresnet" in err


def test_a_run_that_begins_from_another_has_its_network_unless_it_is_given(dms, tmp_path):  # noqa: F811
    few = ("--set", "data.batch_size=700", "--epochs", 1, "--device", "cpu")
    wide = ("--set", "model.args.widths=[8, 16, 24]")
    assert dms("run", "se", "--arch", "dmsresnet_tiny", *wide, *few, "--out", "a")[0] == 0
    assert dms("run", "small", "--from", "a/se/seed0", *few, "--out", "b")[0] == 0
    begun = RunFolder(tmp_path / "b" / "small-from" / "seed0")
    card = load_weights(begun.weights)[1]
    assert (card.arch, list(card.args["widths"])) == ("dmsresnet_tiny", [8, 16, 24])
    code, _, err = dms("run", "se", "--from", "a/se/seed0", "--arch", "dmsresnet_mini", *few, "--out", "c")
    assert (code, "give --arch dmsresnet_tiny" in err) == (2, True)
