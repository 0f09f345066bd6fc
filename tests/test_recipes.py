"""Recipes: what the shipped ones say, how files extend one another, and what is refused."""

import dataclasses
import json
import os
import string
from datetime import date

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dms_fastai import UserError, load_recipe
from dms_fastai.recipes import Recipe, ablation_of, parse_setting, recipe_names
from dms_fastai.runs.wanted import Wanted


def test_the_ablation_is_the_chain_of_files():
    assert ablation_of("kd") == ["baseline", "se", "mixup", "kd"]
    names = [load_recipe(name).model.name for name in ablation_of("kd")]
    assert names == ["dmsresnet_plain", "dmsresnet", "dmsresnet", "dmsresnet"]
    assert [load_recipe(name).mixup is not None for name in ablation_of("kd")] == [False, False, True, True]


def test_every_stage_trains_as_the_paper_says():
    for name in ("baseline", "se", "mixup", "kd", "teacher"):
        recipe = load_recipe(name)
        optimizer = recipe.optimizer
        assert (optimizer.lr, optimizer.momentum, optimizer.weight_decay) == (0.1, 0.9, 5e-4)
        assert (recipe.schedule.name, recipe.schedule.epochs, recipe.data.batch_size) == ("cosine", 200, 128)
        assert (recipe.model.drop_rate, recipe.augment.pad * 32, recipe.augment.flip) == (0.1, 4, 0.5)
        assert recipe.lookahead is None
    assert load_recipe("teacher").model.name == "dmsresnet50"
    distill = load_recipe("kd").distill
    assert (distill.alpha, distill.T, distill.divergence.reduction) == (0.95, 6.0, "batchmean")


def test_the_authors_recipes_train_as_their_notebooks_did():
    student, teacher = load_recipe("authors/kd"), load_recipe("authors/teacher")
    for recipe in (student, teacher):
        assert (recipe.lookahead.k, recipe.lookahead.alpha, recipe.clip.value) == (5, 0.5, 0.1)
        assert recipe.schedule.step == "epoch"
    assert (student.distill.alpha, student.distill.T, student.distill.divergence.reduction) == (1.0, 6.0, "mean")
    assert (student.mixup.alpha, student.model.drop_rate, student.teacher) == (1.0, 0.1, "authors/teacher")
    assert (teacher.mixup.alpha, teacher.model.drop_rate, teacher.model.name) == (0.9, 0.0, "dmsresnet50")


@pytest.mark.parametrize("data", ["", "digits"])
@pytest.mark.parametrize("name", recipe_names())
@pytest.mark.parametrize("schedule", ["cosine", "one-cycle"])
def test_a_resolved_recipe_survives_being_written(name, data, schedule, tmp_path):
    recipe = load_recipe(name, data, settings={"schedule.name": schedule})
    file = tmp_path / "anything.toml"
    file.write_text(recipe.to_toml())
    assert load_recipe(file) == recipe


numbers = st.floats(1e-6, 1e6, allow_nan=False)
names = st.text(string.digits + string.ascii_letters + string.punctuation + " äß漢🙂", min_size=1).filter(
    lambda name: not {"", ".", ".."} & {*name.split("/")}
)
recipes = st.builds(
    lambda name, lr, epochs, alpha, T, teacher: Recipe(
        name=name,
        title=name,
        optimizer=dataclasses.replace(load_recipe("se").optimizer, lr=lr),
        schedule=dataclasses.replace(load_recipe("se").schedule, epochs=epochs),
        distill=dataclasses.replace(load_recipe("kd").distill, alpha=alpha, T=T),
        teacher=teacher,
    ),
    names,
    numbers,
    st.integers(1, 10**9),
    st.floats(0, 1),
    numbers,
    st.text(min_size=1).filter(lambda teacher: "," not in teacher),
)


@settings(max_examples=50, deadline=None)
@given(recipes)
def test_any_recipe_survives_being_written(tmp_path_factory, recipe):
    file = tmp_path_factory.mktemp("recipe") / "any.toml"
    file.write_text(recipe.to_toml(), encoding="utf-8")
    beside = file.parent / recipe.teacher  # which a text of dots is
    expected = dataclasses.replace(recipe, teacher=str(beside)) if os.path.exists(beside) else recipe
    assert load_recipe(file) == expected


@given(st.text())
def test_any_text_is_a_setting_or_a_clear_refusal(text):
    try:
        key, _ = parse_setting(text)
    except UserError:
        return
    assert key == text.partition("=")[0].strip() != ""


@pytest.mark.parametrize("text", [".lr=3", "a..b=3", "a.=3", ".=3"])
def test_a_key_has_no_dot_too_many(text):
    with pytest.raises(UserError, match=f"setting {text!r} has a dot too many in its key; write table.key=value"):
        parse_setting(text)


@pytest.mark.parametrize(
    ("text", "value"),
    [("a.b=3", 3), ("a.b = 0.5", 0.5), ("a.b=true", True), ("a.b=[1, 2]", [1, 2]), ("a.b=one-cycle", "one-cycle"),
     ("a.b='x=y'", "x=y"), ("a.b=1e-3", 1e-3), ("a.b=2024-01-01", "2024-01-01"), ("a.b=07:00:00", "07:00:00")],
)  # fmt: skip
def test_settings_are_toml_and_bare_words_are_text(text, value):
    assert parse_setting(text) == ("a.b", value)


@pytest.mark.parametrize(
    ("text", "value"), [("True", True), ("False", False), (".5", 0.5), ("-.5e-3", -5e-4), ("5.", 5.0), (".", ".")]
)
def test_numbers_and_switches_may_be_pythons(text, value):
    key, found = parse_setting(f"bf16={text}")
    assert (key, found, type(found)) == ("bf16", value, type(value))


def test_a_recipe_is_read_with_what_the_command_sets(tmp_path):
    text = 'extends = "se"\n[schedule]\nname = "sgdr"\ncycles = [10, 20, 40]\n[distill]\nalpha = 0.5\n'
    own = str(write(tmp_path, own=text) / "own.toml")
    [recipe] = Wanted((own,), epochs=70, teacher="dmsresnet").resolved()
    assert (recipe.schedule.epochs, recipe.distill.alpha) == (70, 0.5)
    assert len(Wanted((own, "se"), epochs=70, teacher="dmsresnet").resolved()) == 2
    with pytest.raises(UserError, match="'own' distils without a teacher; give --teacher"):
        Wanted((own,), epochs=70).resolved()


def test_what_can_be_switched_off_says_so():
    with pytest.raises(UserError, match="bf16 is 'off'; it must be true, false or a table"):
        load_recipe("se", settings={"bf16": "off"})


def write(folder, **files):
    for name, text in files.items():
        (folder / f"{name}.toml").write_text(text)
    return folder


def test_files_extend_one_another_and_change_for_a_data_set(tmp_path):
    write(
        tmp_path,
        base="[optimizer]\nlr = 0.2\nmomentum = 0.8\n[on.digits.optimizer]\nlr = 0.3\n",
        mine='extends = "base.toml"\n[optimizer]\nlr = 0.4\n[on.digits.schedule]\nepochs = 2\n',
    )
    mine = tmp_path / "mine.toml"
    assert load_recipe(mine).optimizer.lr == 0.4
    assert load_recipe(mine).optimizer.momentum == 0.8
    assert load_recipe(mine, "digits").optimizer.lr == 0.4  # the nearer file wins, and within a file its data table
    assert load_recipe(tmp_path / "base.toml", "digits").optimizer.lr == 0.3
    assert load_recipe(mine, "digits").schedule.epochs == 2
    assert load_recipe(mine, "digits", settings={"optimizer.lr": 0.5}).optimizer.lr == 0.5
    assert load_recipe(mine).name == "mine"


def test_arguments_of_a_network_are_no_other_ones():
    assert load_recipe("fast/teacher").model.args == {"widths": [128, 256, 512]}
    assert load_recipe("fast/teacher", arch="dmsresnet").model.args == {"widths": [128, 256, 512]}
    assert load_recipe("fast/teacher", arch="resnet18").model.args is None
    narrow = load_recipe("fast/teacher", arch="dmsresnet_small", settings={"model.args.widths": [8, 16, 32]})
    assert narrow.model.args == {"widths": [8, 16, 32]}


def test_ones_own_recipe_extends_a_shipped_one_by_name(tmp_path):
    own = write(tmp_path, kd='extends = "kd"\n[distill]\nT = 3') / "kd.toml"
    assert load_recipe(own).distill.T == 3.0
    assert load_recipe(own).teacher == "teacher"
    assert ablation_of(own) == ["baseline", "se", "mixup", "kd", "kd"]


def test_name_and_title_are_a_recipes_own(tmp_path):
    write(tmp_path, base='name = "b"\ntitle = "Base"\nextends = "kd"', mine='extends = "base.toml"')
    assert [(r.name, r.title) for r in (load_recipe(tmp_path / f) for f in ("base.toml", "mine.toml"))] == [
        ("b", "Base"),
        ("mine", "mine"),
    ]


def test_a_teacher_may_lie_beside_the_recipe(tmp_path, monkeypatch):
    own = write(
        tmp_path, t='extends = "teacher"', mine='extends = "kd"\nteacher = "t.toml"', other='extends = "mine.toml"'
    )
    monkeypatch.chdir(tmp_path.parent)
    folder = tmp_path.name
    for name in ("mine", "other"):
        assert load_recipe(f"{folder}/{name}.toml").teacher == f"{folder}/t.toml"
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "recipe.toml").write_text(load_recipe(f"{folder}/mine.toml").to_toml())
    assert load_recipe(f"{folder}/run/recipe.toml").teacher == f"{folder}/t.toml"  # from where it was trained
    (own / "teacher").mkdir()
    assert load_recipe(write(tmp_path, kd='extends = "kd"') / "kd.toml").teacher == "teacher"
    ensemble = ",".join(["timm:dmsresnet"] * 20)  # longer than a file's name may be
    write(tmp_path, many=f'extends = "kd"\nteacher = "{ensemble}"')
    assert load_recipe(own / "many.toml").teacher == ensemble


def test_what_lies_beside_a_recipe_is_found_from_anywhere(tmp_path, monkeypatch):
    """Also what is for a data set alone, and each of several teachers; what is not there stays as it is."""
    for name in ("t.safetensors", "w.safetensors", "l.csv"):
        (tmp_path / name).touch()
    text = 'teacher = "%s"\n[%smodel]\nweights = "w.safetensors"\n[%sdata]\nlabels = "l.csv"\n'
    own, several = 'extends = "kd"\n', "./t.safetensors, timm:dmsresnet,run/t.safetensors"
    write(
        tmp_path,
        always=own + text % (several, "", ""),
        digits=own + "[on.digits]\n" + text % (several, *["on.digits."] * 2),
    )
    monkeypatch.chdir(tmp_path.parent)
    folder = tmp_path.name
    for name in ("always", "digits"):
        found = load_recipe(f"{folder}/{name}.toml", "digits")
        assert found.teacher == f"{folder}/t.safetensors,timm:dmsresnet,run/t.safetensors"
        assert (found.model.weights, found.data.labels) == (f"{folder}/w.safetensors", f"{folder}/l.csv")
    monkeypatch.chdir(tmp_path)
    assert load_recipe("always.toml").teacher == "t.safetensors,timm:dmsresnet,run/t.safetensors"


def test_a_runs_own_recipe_has_paths_from_where_it_was_trained(tmp_path):
    """A run's folder has files that may be called as what it was trained from."""
    written = load_recipe("kd", settings={"model.weights": "model.safetensors", "teacher": "best.safetensors"})
    for name in ("model.safetensors", "best.safetensors", "run.json"):
        (tmp_path / name).touch()
    (tmp_path / "recipe.toml").write_text(written.to_toml())
    assert load_recipe(tmp_path / "recipe.toml") == written


@pytest.mark.parametrize("key", ["name", "title", "extends"])
def test_what_is_the_whole_files_is_no_change_for_a_data_set(tmp_path, key):
    mine = write(tmp_path, mine=f'extends = "se"\n[on.digits]\n{key} = "kd"\n') / "mine.toml"
    assert load_recipe(mine).name == "mine"
    with pytest.raises(UserError, match=rf"\[on.digits\] has '{key}', which is the whole file's; give it above"):
        load_recipe(mine, "digits")


def test_the_plain_variant_of_an_architecture_is_the_ablations_baseline():
    assert load_recipe("baseline", arch="test_dmsresnet").model.name == "test_dmsresnet_plain"
    assert load_recipe("se", arch="test_dmsresnet").model.name == "test_dmsresnet"
    assert load_recipe("baseline", arch="resnet18").model.name == "resnet18"


@pytest.mark.parametrize(
    ("kwargs", "words"),
    [
        ({"recipe": "kdd"}, "unknown recipe 'kdd': did you mean 'kd'"),
        ({"recipe": "nowhere.toml"}, "no such recipe file: nowhere.toml"),
        ({"arch": "dmsresnet5O"}, "did you mean 'dmsresnet50'"),
        ({"arch": "zzzzzzzz"}, "known is near it"),
        ({"settings": {"schedule.epoch": 3}}, "unknown recipe key 'schedule.epoch': did you mean 'schedule.epochs'"),
        ({"settings": {"schedul.epochs": 3}}, "did you mean 'schedule'"),
        ({"settings": {"schedule.epochs": 0}}, "schedule.epochs is 0; it must be at least 1"),
        ({"settings": {"schedule.epochs": 1.5}}, "must be a whole number"),
        ({"settings": {"schedule.epochs": True}}, "must be a whole number"),
        ({"settings": {"schedule.name": "trapezoid"}}, "'cosine', 'one-cycle', 'linear', 'warmup-cosine'"),
        ({"settings": {"optimizer.lr": "fast"}}, "optimizer.lr is 'fast'; it must be a finite number"),
        ({"settings": {"optimizer.lr": float("nan")}}, "must be a finite number"),
        ({"settings": {"optimizer.lr": float("inf")}}, "must be a finite number"),
        ({"settings": {"distill.alpha": 1.5}}, "distill.alpha is 1.5; it must be between 0 and 1"),
        ({"settings": {"distill.T": 0}}, "distill.T is 0; it must be above 0"),
        ({"settings": {"mixup.alpha": -1}}, "mixup.alpha is -1"),
        ({"settings": {"data.valid": 1.0}}, "data.valid is 1.0"),
        ({"settings": {"data.valid": "train"}}, "data.valid is 'train'"),
        ({"settings": {"name": "../kd"}}, "name is '../kd'; it must be a relative path"),
        ({"settings": {"name": "/"}}, "name is '/'; it must be a relative path"),
        ({"settings": {"name": "/tmp/kd"}}, "it must be a relative path"),
        ({"settings": {"model": 3}}, "model is 3; it must be a table"),
        ({"settings": {"title": date(2024, 1, 1)}}, "title is 2024-01-01; it must be text"),
        ({"settings": {"model.args.num_classes": 3}}, "model.args.num_classes is 3; leave it out: the data say"),
        ({"settings": {"model.args.drop_rate": 0.1}}, "leave it out: that is model.drop_rate"),
    ],
)
def test_what_is_wrong_is_named(kwargs, words):
    with pytest.raises(UserError) as error:
        load_recipe(**{"recipe": "kd", **kwargs})
    assert words in error.value.message
    assert "\n" not in error.value.message


@pytest.mark.parametrize(
    "name", ["", ".", "./", "./a", "a/", "a//b", "a/./b", "a/..", "a\0b", "a\nb", "a\x1bb", "a\u202eb"]
)
def test_a_name_is_that_of_one_folder(tmp_path, name):
    (tmp_path / "mine.toml").write_text(f'extends = "se"\nname = {json.dumps(name)}\n')
    for recipe, own in (("se", {"name": name}), (tmp_path / "mine.toml", {})):
        with pytest.raises(UserError) as error:
            load_recipe(recipe, settings=own)
        words = f"name is {name!r}; it must be a relative path without '..', '.', empty"
        assert error.value.message.startswith(words if own else f"{recipe}: {words}")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("lr = ", "not valid TOML"),
        (f"lr = {'[' * 3000}{']' * 3000}", "not valid TOML"),
        ('extends = "gone.toml"', "'gone.toml', which is neither"),
        ("extends = 3", "neither"),
        ('extends = "mine.toml"', "extends itself"),
        ('title = "x"\nbogus = 1', "mine.toml: unknown recipe key 'bogus'"),
        (
            "[on.digits.schedul]\nepochs = 1",
            r"mine.toml \[on.digits\]: unknown recipe key 'schedul': did you mean 'sch",
        ),
        ("[on.digits.schedule]\nepoch = 1", r"mine.toml \[on.digits\]: unknown recipe key 'schedule.epoch'"),
        ('extends = "kd"\n[optimizer]\nlr = -1', "mine.toml: optimizer.lr is -1; it must be above 0"),
    ],
)
def test_files_that_cannot_be_read(tmp_path, text, words):
    with pytest.raises(UserError, match=words):
        load_recipe(write(tmp_path, mine=text) / "mine.toml", "digits")


def test_a_wrong_value_is_said_to_be_that_of_the_file_that_has_it(tmp_path):
    root = write(tmp_path, base='extends = "kd"\n[optimizer]\nlr = -1', mine='extends = "base.toml"\ntitle = "x"')
    with pytest.raises(UserError, match=r"^\S*base.toml: optimizer.lr is -1; it must be above 0$"):
        load_recipe(root / "mine.toml")
    with pytest.raises(UserError, match=r"^optimizer.lr is -2; it must be above 0$"):
        load_recipe(root / "mine.toml", settings={"optimizer.lr": -2})


def test_a_file_may_begin_with_a_mark(tmp_path):
    file = tmp_path / "mine.toml"
    file.write_text('extends = "se"\n[optimizer]\nlr = 0.25\n', encoding="utf-8-sig")
    assert load_recipe(file).optimizer.lr == 0.25


def test_a_teacher_that_teaches_nobody_is_refused(tmp_path):
    write(tmp_path, a='extends = "se"\nteacher = "baseline"', b='extends = "kd"\nteacher = ","')
    with pytest.raises(UserError, match="has the teacher 'baseline', and does not distil"):
        load_recipe(tmp_path / "a.toml")
    with pytest.raises(UserError, match="teacher is ','; give a recipe"):
        load_recipe(tmp_path / "b.toml")
    assert load_recipe(tmp_path / "a.toml", settings={"distill": True}).teacher == "baseline"
    (tmp_path / "run.json").write_text("{}")  # a run's own recipe, whose distillation was switched off
    assert load_recipe(tmp_path / "a.toml").distill is None


@pytest.mark.parametrize(
    ("recipe", "settings", "words"),
    [
        ("kd", {"feature_distill": True, "sam": True}, "feature_distill does not go with sam"),
        ("kd", {"feature_distill": True, "fixed_views": True}, "feature_distill does not go with fixed_views"),
        ("se", {"feature_distill": True}, "feature_distill needs a teacher"),
        ("se", {"optimizer": "adamw"}, "write optimizer.name=adamw"),
        ("se", {"model": "resnet18"}, "write model.name=resnet18"),
        ("se", {"mixup": "yes"}, "mixup is 'yes'; it must be true, false or a table"),
    ],
)
def test_what_cannot_be_trained_is_refused_before_anything_is(recipe, settings, words):
    with pytest.raises(UserError) as error:
        load_recipe(recipe, settings=settings)
    assert words in error.value.message
