"""What the design promises: modules import what is above them, constructors are the schema, words are refused before
torch is imported, and what was written before can be read.
"""

import ast
import dataclasses
import inspect
import json
import pickle
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import timm
import torch
from fastai.callback.core import Callback
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from dms_fastai import UserError, dms_learner, load_data, load_recipe, names, schema
from dms_fastai.data import sources
from dms_fastai.models.macs import entry_macs
from dms_fastai.models.weights import load_weights
from dms_fastai.recipes import all_keys
from dms_fastai.run_folder import RunFolder
from dms_fastai.runs import at_once, machine, plan
from dms_fastai.runs.predictions import read_predictions
from dms_fastai.runs.wanted import Wanted
from dms_fastai.schema import choices_of, load, settings_of, table_of
from dms_fastai.training.parts import PARTS, order_of
from tests.conftest import quiet
from tests.test_runs import dms, same_run  # noqa: F401  (a fixture)

ROOT = Path(__file__).parent.parent
RUNS = sorted(file.parent for file in (ROOT / "artifacts").rglob("run.json"))


COMMON = ("errors", "files", "processes", "settings", "terminal")  # which all modules below may import


def modules():
    """The table of modules: for each, in their order, the words of what it may import."""
    table = (ROOT / "docs" / "design.md").read_text().partition("## A training step")[0]
    rows = [line.strip("| ").split(" | ") for line in table.splitlines() if line.startswith("| `")]
    return {dotted(row[0].strip("`")): row[2] if len(row) == 3 else "" for row in rows}


def dotted(path):
    return path.rstrip("/").removesuffix(".py").replace("/", ".")


def imported(module):
    """The modules of the package that a file or a folder of it imports, each with the file that does."""
    package = ROOT / "dms_fastai"
    path = package / module
    for file in sorted(path.rglob("*.py")) if path.is_dir() else [path.with_suffix(".py")]:
        where = file.relative_to(package).parts[:-1]
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and node.level:
                base = [*where[: len(where) - node.level + 1], *(node.module or "").split(".")]
                names = [] if node.module else [alias.name for alias in node.names]
                for name in names or [""]:
                    yield ".".join(part for part in (*base, name) if part), file


@pytest.mark.parametrize(("module", "words"), modules().items())
def test_modules_import_what_the_design_lets_them(module, words):
    known = list(modules())
    above = known[: known.index(module)]
    may = {each for each in COMMON if each in above} | {module, "__version__"}
    for word, onwards in re.findall(r"`([^`]+)`( and above)?", words):
        may |= {dotted(word), *(known[: known.index(word.removesuffix("/")) + 1] if onwards else ())}
    if words.startswith("everything"):
        may |= {*above}
    for name, file in imported(module):
        assert any(name == each or name.startswith(f"{each}.") for each in may), f"{file} imports {name}"


def test_every_module_is_in_the_design():
    there = {p.stem for p in (ROOT / "dms_fastai").iterdir() if p.suffix == ".py" or (p / "__init__.py").is_file()}
    assert there - {"__main__"} == {*modules()}


def classes():
    """Where every part's settings are, with those that a name chooses."""
    at = [part.settings or part.at for part in PARTS]
    several = [choices_of(place) for place in (*at, "training.losses:DIVERGENCES")]
    return [place for place in at if choices_of(place) is None] + [c for s in several if s for c in s.values()]


@pytest.mark.parametrize("at", classes())
def test_settings_read_from_the_source_are_those_of_the_constructor(at):
    read = settings_of(at)
    if "__init__" not in vars(load(at)):
        assert read == {}  # fastai's own constructor
        return
    signature = inspect.signature(load(at)).parameters
    assert all(signature[name].default == setting.default for name, setting in read.items())
    assert all(signature[name].annotation == setting.hint for name, setting in read.items())
    # What has a default and is no setting is what a recipe cannot say: tensors, and how a loss is reduced.
    rest = [p.name for p in signature.values() if p.default is not p.empty and p.name not in read]
    assert set(rest) <= {"weight", "reduction"}


@pytest.mark.parametrize("at", classes())
def test_a_table_builds_its_part_and_survives_pickling(at):
    table = table_of(at)()
    if at != "callbacks.distill:TeacherDistill":
        assert isinstance(table.build(), load(at))
    assert pickle.loads(pickle.dumps(table)) == table


@pytest.mark.parametrize("at", [at for at in classes() if settings_of(at)])
def test_every_part_checks_its_settings(at):
    """Their ranges are annotations, which `checked` reads."""
    assert hasattr(load(at).__init__, "__wrapped__")


def test_an_idea_that_is_half_there_is_said(monkeypatch):
    made = "callbacks.half_an_idea:HalfAnIdea"
    for at in (made, "callbacks.cutout:Cutouts"):
        with pytest.raises(LookupError, match=f"{at} is listed as a part, and there is no"):
            settings_of(at)
    with pytest.raises(LookupError, match="there is no part 'half_an_idea'; add its line to PARTS"):
        order_of("half_an_idea")
    code = "class HalfAnIdea:\n    def __init__(self, prob: Share = 1 / 5): ...\nBOTH = {'a': half.Idea}\n"
    half = {node.name: node for node in ast.parse(code).body[:1]} | {"BOTH": ast.parse(code).body[1].value}
    monkeypatch.setattr(schema, "_definitions", lambda module: half)
    with pytest.raises(TypeError, match="the default of prob is 1 / 5, which is no literal"):
        settings_of("callbacks.other:HalfAnIdea")
    with pytest.raises(TypeError, match=r"has half\.Idea; an entry is a class of this file"):
        choices_of("callbacks.other:BOTH")


def test_every_setting_has_its_meaning_in_the_docstring():
    for at in classes():
        part = load(at)
        text = "\n".join(filter(None, (part.__init__.__doc__, *(base.__doc__ for base in part.__mro__))))
        for name in settings_of(at):
            assert re.search(rf"\b{name}\b[\w, ]*:", text), f"{at}: {name}"


def test_every_shipped_recipe_says_only_what_there_is():
    keys = set(all_keys())
    for file in (ROOT / "recipes").rglob("*.toml"):
        table = tomllib.loads(file.read_text())
        for key, value in table.items():
            if isinstance(value, dict) and key != "on":
                assert {f"{key}.{name}" for name in value if not isinstance(value[name], dict)} <= keys


# Recipes


def write(folder, **files):
    for name, text in files.items():
        (folder / f"{name}.toml").write_text(text)
    return folder


def test_false_leaves_out_what_another_file_has_put_in(tmp_path):
    write(tmp_path, own='extends = "kd"\nmixup = false\ncutout = true\n[ema]\n')
    own = load_recipe(tmp_path / "own.toml")
    assert own.mixup is None
    assert own.cutout.size == 0.25
    assert own.ema.decay == 0.999
    assert "mixup" not in own.to_table()
    assert load_recipe(tmp_path / "own.toml", settings={"mixup.alpha": 0.5}).mixup.alpha == 0.5
    assert load_recipe("kd", settings={"bf16": False}).bf16 is None


def test_another_choice_inherits_what_it_has_too(tmp_path):
    write(tmp_path, own='extends = "authors/kd"\n[distill.divergence]\nname = "dkd"\n')
    own = load_recipe(tmp_path / "own.toml", settings={"schedule.name": "one-cycle"})
    assert dataclasses.asdict(own.schedule) == {"name": "one-cycle", "epochs": 200}
    assert dataclasses.asdict(own.distill.divergence) == {"name": "dkd", "beta": 8.0}


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"distill.divergence.beta": 3}, "distill.divergence.beta is a setting of 'dkd', not of 'kl'"),
        (
            {"schedule.name": "one-cycle", "schedule.step": "epoch"},
            "a setting of 'cosine', 'warmup-cosine' or 'sgdr', not of",
        ),
        ({"cutmix.share": 0.5, "mixup": False, "cutmix.alpha": "x"}, "cutmix.alpha is 'x'"),
        ({"distill.divergence.name": "js"}, "distill.divergence.name is 'js'; it must be 'kl', 'dkd' or 'dist'"),
        ({"optimizer.name": "sdg"}, "optimizer.name is 'sdg'; it must be 'sgd'"),
        ({"mixup_or_cutmix": True}, "mixup and mixup_or_cutmix would mix the same batch"),
        ({"optimizer.lr": 10**400}, "it must be a finite number"),
        ({"bf16.x": 1}, "unknown recipe key 'bf16.x': did you mean 'bf16'?"),
        ({"size": 0.5}, "unknown recipe key 'size': did you mean 'data.size' or 'cutout.size' or 'distill.size'?"),
        ({"compile.step": 3}, "unknown recipe key 'compile.step': did you mean 'compile.steps'?"),
        ({"bf16.steps": 3}, "unknown recipe key 'bf16.steps': did you mean 'compile.steps'"),
    ],
)
def test_a_setting_without_effect_is_an_unknown_key(settings, words):
    with pytest.raises(UserError) as error:
        load_recipe("kd", settings=settings)
    assert words in error.value.message


# What was written before


BEFORE = {
    "precision": ("float32", {"bf16": False}),
    "compile": ("always", {"compile.steps": 0}),
    "label_smoothing": (0.1, {"loss.label_smoothing": 0.1}),
    "augment.trivial": (True, {"trivial_augment": True}),
    "augment.cutout": (0.5, {"cutout.size": 0.5}),
    "optimizer.clip_value": (0.1, {"clip.value": 0.1}),
    "optimizer.sam": (0.1, {"sam.rho": 0.1}),
    "distill.kl": ("mean", {"distill.divergence.reduction": "mean"}),
    "distill.divergence": ("dist", {"distill.divergence.name": "dist"}),
    "cutmix": (True, {"mixup": False, "mixup_or_cutmix": True}),
    "cutmix.share": (0.3, {"mixup": False, "mixup_or_cutmix.share": 0.3}),
}


@pytest.mark.parametrize("key", BEFORE)
def test_keys_of_before_are_those_of_today(key):
    value, now = BEFORE[key]
    assert load_recipe("kd", settings={key: value}) == load_recipe("kd", settings=now)


def test_words_of_before_that_had_meant_nothing_or_off_still_do():
    assert load_recipe("kd", settings={"compile": "never"}).compile is None
    assert load_recipe("kd", settings={"augment.cutout": 0.0}).cutout is None
    assert load_recipe("kd", settings={"compile": "auto", "precision": "auto"}) == load_recipe("kd")


WHOLE = """
name = "own"
teacher = "teacher"
precision = "auto"
label_smoothing = 0.0
[model]
name = "dmsresnet"
[augment]
trivial = false
cutout = 0.0
[optimizer]
lr = 0.2
[schedule]
name = "one-cycle"
epochs = 3
step = "batch"
[model.args]
[distill]
alpha = 0.5
kl = "batchmean"
divergence = "dkd"
beta = 4.0
"""


def test_a_whole_recipe_of_before(tmp_path):
    (tmp_path / "recipe.toml").write_text(WHOLE)
    own = load_recipe(tmp_path / "recipe.toml")
    assert (own.optimizer.lr, own.schedule.epochs, own.distill.alpha) == (0.2, 3, 0.5)
    assert dataclasses.asdict(own.distill.divergence) == {"name": "dkd", "beta": 4.0}
    assert own.bf16 is not None  # these were on where nothing was said
    assert own.compile.steps == 5000
    assert (own.cutout, own.trivial_augment, own.model.args) == (None, None, None)


@pytest.mark.parametrize("folder", RUNS, ids=lambda f: str(f.relative_to(ROOT / "artifacts")))
def test_committed_run_folders_load(folder):
    run = RunFolder(folder)
    facts, rows, recipe = run.facts(), run.rows(), run.recipe()
    assert facts.finished
    assert facts.last.valid_accuracy == rows[-1]["valid_accuracy"]
    assert (facts.recipe, facts.epochs) == (recipe.name, recipe.schedule.epochs)
    if run.predictions.is_file():
        found = read_predictions(run.predictions)
        assert found.right.mean() == pytest.approx(facts.last.valid_accuracy, abs=2e-3)
        assert len(found.images) == len(found.mistakes)


def test_weights_with_the_card_of_before_load(tmp_path):
    """Earlier versions wrote the side of square images, and arguments that a recipe says otherwise today."""
    [file] = (ROOT / "dms_fastai" / "models" / "pretrained").glob("dmsresnet_mini.*.safetensors")
    with safe_open(file, "pt") as opened:
        [(key, text)] = opened.metadata().items()
    card = json.loads(text)
    before = {name: card[name] for name in ("arch", "vocab", "mean", "std")}
    before |= {"size": card["shape"][-1], "args": {**card["args"], "pretrained": False}}
    save_file(load_file(file), tmp_path / "old.safetensors", {key: json.dumps(before)})
    model, read = load_weights(tmp_path / "old.safetensors")
    assert (read.arch, len(read.vocab), read.shape) == ("dmsresnet_mini", 10, (3, 32, 32))
    with torch.no_grad():
        assert model(torch.zeros(1, 3, 32, 32)).shape == (1, 10)


# Names, and how fast they are refused


def test_architectures_are_found_without_timm():
    found = names._from_source()
    assert set(timm.list_models()) <= found
    assert set(timm.models._registry._model_entrypoints) <= found | names._deprecated()
    for entry in names.entries():
        parameters = sum(p.numel() for p in timm.create_model(entry.name).parameters())
        assert entry.parameters == f"{parameters:,}"
        assert entry.macs == f"{entry_macs(entry.name) / 1e6:,.1f} M"
        assert bool(entry.weights) == bool(timm.get_pretrained_cfg(entry.name).file)
    modules = ("cct", "dmsresnet", "hcgnet", "plain_cnn")
    assert {entry.name for entry in names.entries()} == set(timm.list_models(module=modules))


def test_former_names_of_timm_are_known_too():
    assert {"tv_resnet50"} <= names._deprecated() <= set(timm.models._registry._model_entrypoints)


def test_the_data_sets_that_have_a_name():
    assert set(names.DATA_SETS) == set(sources.NAMED)


def python(code):
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_the_package_imports_nothing_that_takes_long():
    assert python("import dms_fastai, sys; print({'torch', 'timm', 'fastai'} & set(sys.modules))") == "set()\n"
    assert (
        python("import dms_fastai; print('Cutout' in dir(dms_fastai), len(dms_fastai.__all__) > 20)") == "True True\n"
    )


@pytest.mark.parametrize("order", ["timm, dms_fastai", "dms_fastai, timm"])
def test_importing_it_registers_the_architectures(order):
    code = f"import warnings; warnings.simplefilter('ignore'); import {order}; print(timm.is_model('dmsresnet'))"
    assert python(code) == "True\n"


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("run nosuch", "unknown recipe 'nosuch'"),
        ("run kdd", "did you mean 'kd'"),
        ("run kd --arch dmsresnet5O", "did you mean 'dmsresnet50'"),
        ("run kd --data digit", "did you mean 'digits'"),
        ("run kd --teacher teachr", "no teacher at teachr; did you mean 'teacher'"),
        ("run kd --teacher timm:resnet8", "unknown timm model 'resnet8'"),
        ("run kd --device gpu", "device is 'gpu'"),
        ("run kd --schedule trapezoid", "schedule.name is 'trapezoid'"),
        ("run kd --set optimiser.lr=1", "unknown recipe key 'optimiser'"),
        ("run kd --set augment.border=mirorr", "augment.border is 'mirorr'"),
        ("run kd --set optimizer.lr=-1", "optimizer.lr is -1; it must be above 0"),
        (
            "run se --out README.md/x",
            "README.md/x cannot be written: README.md is no folder; give another --out",
        ),
        ("tune se --over optimizer.lr=[1] --out README.md", "README.md is no folder; give another --out"),
        ("lr-find se --out README.md/x.png", "README.md is no folder; give another --out"),
        ("report --out README.md", "README.md is no folder; give another --out"),
        ("predict dmsresnet x.png --csv README.md/x.csv", "README.md is no folder; give another --csv"),
        ("export dmsresnet README.md/x.onnx", "README.md is no folder; give another file"),
        ("run kd --seeds 0,0", "the same seed twice"),
        ("run se --seed 3 --seeds 0,1", "--seed 3 and --seeds 0,1 both say what to train with; leave one out"),
        ("plan se --seed 0 --seeds 0", "leave one out"),
        ("run kd --teacher dmsresnet --set teacher=teacher", "--teacher and --set teacher say the same thing"),
        ("tune kd --over optimizer.lr=[1] --labels a.csv --set data.labels=b.csv", "--labels and --set data.labels"),
        ("run small --budget 5m --set budget.minutes=9", "--budget and --set budget.minutes say the same thing"),
        ("prune dmsresnet --macs 0.3 --set prune.macs=0.7", "--macs and --set prune.macs say the same thing"),
        ("prune dmsresnet --from-scratch --set prune.from_scratch=false", "--from-scratch and --set"),
        ("predict dmsresnet x.png --top 5 --csv x.csv", "the table of --csv has every class"),
        ("predict dmsresnet --csv x.png y.png", "--csv is x.png; give NAME.csv, or - for standard output"),
        ("run kd --time-limit 9", "write 90s, 9m or 2h"),
        ("report nowhere", "no such folder"),
        ("predict nowhere x.png", "no model at nowhere"),
        ("predict dmsresnet nowhere.png", "no such image: nowhere.png"),
        ("export dmsresnet kd.onx", "the formats are .onnx, .int8.onnx, .pt2, .pte or .int8.pte"),
        ("export dmsresnet kd.int8.onnx", "no images to calibrate with"),
        ("export dmsresnet kd.int8.pt2", "kd.int8.pt2 cannot be written; the formats are .onnx, .int8.onnx"),
        ("bench nowhere.onnx", "no such file: nowhere.onnx"),
        ("recipes", ""),
        ("models", ""),
    ],
)
def test_what_is_mistyped_is_refused_before_torch_is_imported(command, words):
    code = f"""
import sys
from dms_fastai import cli
sys.argv = ["dms-fastai", *{command.split()!r}]
try:
    cli.main()
except SystemExit as stop:
    print(stop.code)
print({{"torch", "timm", "fastai", "matplotlib", "scipy"}} & set(sys.modules))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.endswith("set()\n")
    assert words in done.stderr
    assert "Traceback" not in done.stderr


def test_what_trains_does_not_import_the_report():
    code = "import dms_fastai.runs.stage, sys; print([m for m in sys.modules if m.startswith('dms_fastai.report')])"
    assert python(code.replace("import ", "import warnings; warnings.simplefilter('ignore'); import ", 1)) == "[]\n"


# Runs


def test_a_plan_opens_each_data_set_and_each_teacher_once(dms, tmp_path, monkeypatch):  # noqa: F811
    assert dms("run", "teacher", "--epochs", 1, "--out", "t", "--arch", "test_dmsresnet")[0] == 0
    opened, calls = [], {"data": sources.load_splits, "teacher": plan.load_teacher}
    monkeypatch.setattr(plan, "load_splits", lambda *a: opened.append("data") or calls["data"](*a))
    monkeypatch.setattr(plan, "load_teacher", lambda *a: opened.append("teacher") or calls["teacher"](*a))
    args = ("--epochs", 1, "--set", "data.batch_size=256", "--out", "x", "--seeds", "0,1")
    assert dms("run", "ablation", *args, "--teacher", "t/teacher/seed0")[0] == 0
    assert sorted(opened) == ["data", "teacher"]


NAMES = ("cpu/teacher", "cpu/kd", "se")


def test_a_teacher_that_is_wanted_too_comes_first_whatever_the_order(dms, tmp_path):  # noqa: F811
    more = ("--epochs", 1, "--set", "data.batch_size=256", "--set", "model.drop_rate=0.05", "--out", "x")
    for restart in ((), ("--restart",)):
        code, out, _ = dms("run", "cpu/kd", "cpu/teacher", *more, *restart)
        assert code == 0
        assert out.index("Teacher (CPU): epoch 1/1") < out.index("KD (CPU): epoch 1/1")
    assert RunFolder(tmp_path / "x" / "cpu" / "teacher" / "seed0").recipe().model.drop_rate == 0.05


def test_several_at_once_are_the_same_runs_as_one_after_the_other(dms, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setenv("OMP_NUM_THREADS", str(torch.get_num_threads()))
    args = ("run", *NAMES, "--epochs", 1, "--set", "data.batch_size=256", "--device", "cpu")
    (tmp_path / "random.py").write_text("raise SystemExit('a file of mine, which is not the module')")
    code, out, _ = dms(*args, "--out", "side", "--at-once", 2)
    assert code == 0
    assert dms(*args, "--out", "turn")[0] == 0
    for name in NAMES:
        same_run(tmp_path / "side" / name / "seed0", tmp_path / "turn" / name / "seed0")
        assert (tmp_path / "side" / "logs" / f"{name.replace('/', '-')}-seed-0.log").is_file()
    assert "learner: side/se/seed0/learner.pkl" in out
    taught, teacher = (RunFolder(tmp_path / "side" / "cpu" / name / "seed0").facts() for name in ("kd", "teacher"))
    assert taught.started >= teacher.started
    assert taught.teacher.endswith("cpu/teacher/seed0")
    code, out, _ = dms(*args, "--set", "model.drop_rate=0.05", "--out", "side", "--at-once", 2, "--restart")
    assert code == 0
    assert {RunFolder(tmp_path / "side" / name / "seed0").recipe().model.drop_rate for name in NAMES} == {0.05}


def test_stages_whose_names_are_alike_are_trained_by_their_own_recipes(dms, tmp_path):  # noqa: F811
    """Side by side, each process reads its recipe from a file."""
    for place, name in enumerate(("a/b", "a-b", "a b")):
        write(tmp_path, **{f"r{place}": f'extends = "se"\nname = "{name}"\n[model]\ndrop_rate = 0.{place}\n'})
    args = ("--epochs", 1, "--set", "data.batch_size=256", "--arch", "test_dmsresnet", "--device", "cpu", "--out", "x")
    assert dms("run", "r0.toml", "r1.toml", "r2.toml", *args, "--at-once", 3)[0] == 0
    for place, name in enumerate(("a/b", "a-b", "a b")):
        recipe = RunFolder(tmp_path / "x" / name / "seed0").recipe()
        assert (recipe.name, recipe.model.drop_rate) == (name, place / 10)
    assert len(list((tmp_path / "x" / "logs").glob("*.log"))) == 3


def test_a_stage_with_other_settings_has_a_recipe_file_of_its_own(tmp_path):
    """Two commands that begin at the same time do not write over each other's."""
    (tmp_path / "logs").mkdir()
    folder = RunFolder(tmp_path / "se" / "seed0")
    recipes = [load_recipe("se", settings={"schedule.epochs": epochs}) for epochs in (1, 2)]
    files = [at_once.Job(plan.Stage(recipe, 0, folder), tmp_path)._write_recipe() for recipe in recipes]
    assert [load_recipe(file) for file in files] == recipes


def test_a_teacher_that_the_command_trains_itself_is_given_as_a_recipe(dms):  # noqa: F811
    assert dms("run", "se", "--epochs", 1, "--out", "x", "--set", "data.batch_size=256")[0] == 0
    code, _, err = dms("run", "se", "kd", "--teacher", "x/se/seed0", "--out", "x", "--epochs", 1, "--restart")
    assert code == 2
    assert "trains x/se/seed0 itself" in err


def test_two_recipes_of_one_name(dms, tmp_path):  # noqa: F811
    write(tmp_path, own='extends = "se"\nname = "se"\n')
    code, _, err = dms("run", "se", "own.toml")
    assert code == 2
    assert "two of the recipes are called 'se'" in err


def test_two_teachers_of_one_name(dms, tmp_path):  # noqa: F811
    """Two students may have one teacher, but none gets the other's."""
    for name, lr in (("a", 0.1), ("b", 0.05), ("c", 0.1)):
        (tmp_path / name).mkdir()
        student = f'extends = "kd"\nname = "kd-{name}"\nteacher = "t.toml"\n'
        write(tmp_path / name, t=f'extends = "teacher"\n[optimizer]\nlr = {lr}\n', s=student)
    code, _, err = dms("plan", "a/s.toml", "b/s.toml")
    assert (code, "two of the teachers are called 't'" in err) == (2, True)
    assert dms("plan", "a/s.toml", "c/s.toml")[0] == 0


def test_a_damaged_run_json_is_no_obstacle_to_restart(dms, tmp_path):  # noqa: F811
    args = ("run", "se", "--epochs", 1, "--out", "x", "--set", "data.batch_size=256")
    assert dms(*args)[0] == 0
    file = tmp_path / "x" / "se" / "seed0" / "run.json"
    for content in ("{}", "nonsense"):
        file.write_text(content)
        code, _, err = dms(*args)
        assert code == 2
        assert "is damaged" in err
        assert dms(*args, "--restart")[0] == 0
    told = json.loads(file.read_text())
    told["last"]["valid_loss"] = float("nan")  # as earlier versions wrote it
    file.write_text(json.dumps(told))
    assert dms(*args)[0] == 0


def test_a_run_folder_of_before_is_finished_to_the_same_command(dms, tmp_path):  # noqa: F811
    args = ("run", "se", "--epochs", 1, "--out", "x", "--set", "data.batch_size=256")
    assert dms(*args)[0] == 0
    folder = tmp_path / "x" / "se" / "seed0"
    recipe = (folder / "recipe.toml").read_text()
    for new, old in (("[bf16]\n", ""), ("[compile]\nsteps = 5000\ngraphs = true\n", ""), ('name = "sgd"\n', "")):
        assert new in recipe
        recipe = recipe.replace(new, old)
    scalars, tables = recipe.split("\n\n", 1)
    words = 'precision = "auto"\ncompile = "auto"\nlabel_smoothing = 0.0\n'
    (folder / "recipe.toml").write_text(f"{scalars}\n{words}\n{tables}\n[model.args]\n")
    facts = (folder / "run.json").read_text()
    (folder / "run.json").write_text(facts.replace("_images", "_pictures"))
    code, out, err = dms(*args)
    assert (code, err) == (0, "")
    assert "epoch 1/1" not in out


def test_what_fails_beside_others_is_said(dms, tmp_path):  # noqa: F811
    args = ("run", "se", "baseline", "--epochs", 1, "--out", "x", "--at-once", 2, "--set", "optimizer.lr=1e30")
    code, out, _ = dms(*args)
    assert code == 2
    assert out.count("the loss is") == 2


def test_the_code_that_a_result_depends_on_is_told_by_folder(tmp_path, monkeypatch):
    package = shutil.copytree(
        ROOT / "dms_fastai", tmp_path / "dms_fastai", ignore=shutil.ignore_patterns("__pycache__")
    )
    monkeypatch.setattr(machine, "PACKAGE", package)

    def changed(file, old, new):
        path, before = package / file, machine.versions()["dms-fastai"]
        text = path.read_text()
        assert old in text
        path.write_text(text.replace(old, new))
        return machine.versions()["dms-fastai"] != before

    assert not changed("runs/progress.py", '"""What is seen', '"""What can be seen')
    assert not changed("report/tables.py", '"""The table', '"""A table')
    assert changed("callbacks/ema.py", "0.999", "0.99")
    assert changed("training/optimizers.py", "lr: Positive = 0.1", "lr: Positive = 0.2")
    assert changed("training/parts.py", "order=45", "order=46")


def test_cross_entropy_and_distillation_are_recorded_apart(dms, teacher, tmp_path):  # noqa: F811
    """The epoch's means, by hand from the loss of every step; with alpha they give the loss."""
    seen = []

    def note(cb):
        if cb.learn.training:
            seen.append(
                (len(cb.learn.yb[0]), *(v.item() for v in cb.learn.loss_func.parts.values()), cb.learn.loss.item())
            )

    learn = quiet(dms_learner(load_data("digits", bs=64), "kd", teacher=teacher, cbs=Callback(after_loss=note)))
    learn.fit_recipe(1)
    n, ce, kd, loss = map(torch.tensor, zip(*seen, strict=True))
    assert loss == pytest.approx(0.95 * kd + 0.05 * ce, rel=1e-4)
    recorded = dict(zip(learn.recorder.metric_names[1:], learn.recorder.values[-1], strict=False))
    assert recorded["train_cross_entropy"] == pytest.approx(((n * ce).sum() / n.sum()).item(), rel=1e-4)
    assert recorded["train_distillation"] == pytest.approx(((n * kd).sum() / n.sum()).item(), rel=1e-4)

    assert dms("run", "kd", "--epochs", 1, "--out", "x", "--set", "teacher=cpu/teacher")[0] == 0
    row = RunFolder(tmp_path / "x" / "kd" / "seed0").rows()[-1]
    assert row["train_cross_entropy"] > 0
    assert row["train_distillation"] > 0
    assert "train_distillation" not in RunFolder(tmp_path / "x" / "cpu" / "teacher" / "seed0").rows()[-1]


def test_wanted_settings_reach_the_recipes_that_have_their_table():
    recipes = Wanted(("ablation",), settings={"mixup.alpha": 0.5, "ema.decay": 0.99, "optimizer.lr": 0.3}).resolved()
    assert [r.mixup and r.mixup.alpha for r in recipes] == [None, None, 0.5, 0.5]
    assert all((r.ema.decay, r.optimizer.lr) == (0.99, 0.3) for r in recipes)  # which none of them had


def test_run_json_is_read_back_as_it_was_written(tmp_path):
    folder = RunFolder(tmp_path)
    before = RunFolder(RUNS[0]).facts()
    folder.write_facts(before)
    assert folder.facts() == before
    assert "validation_images" in json.loads(folder.facts_file.read_text())
