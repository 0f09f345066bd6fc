"""Every command and every line of Python in the README, run as it stands there, but for a few steps instead of many."""

import re
import shlex
from pathlib import Path

import fastai.vision.all as vision
import pytest
from PIL import Image

from dms_fastai import DMSLearner
from tests.test_runs import dms  # noqa: F401  (a fixture)

README = (Path(__file__).parent.parent / "README.md").read_text()
LINES = [line.split("#")[0] for block in re.findall(r"```sh\n(.*?)```", README, re.S) for line in block.splitlines()]
COMMANDS = [command.strip() for line in LINES for command in line.split("&&")]
NOT_HERE = ("pip install", "pytest", "dms-fastai --install-completion")  # what changes the machine, and this suite
SHORT = {
    "run": ["--epochs", "1", "--set", "data.size=8"],
    "lr-find": ["--set", "data.size=8"],
    "tune": ["--epochs", "1", "--trials", "2", "--set", "data.size=8"],
}
TINY = ["--arch", "test_dmsresnet"]


@pytest.fixture
def folder(tmp_path):
    """Images of one's own, and others to classify."""
    for number in range(48):
        split, name = "test" if number % 3 == 0 else "train", ("cat", "dog")[number % 2]
        file = tmp_path / "my_images" / split / name / f"{number}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (5 * number, 40 * (number % 2), 90)).save(file)
    for file in ("new_images/a.png", "new_images/b.jpg", "images/c.png", "image.png"):
        (tmp_path / file).parent.mkdir(exist_ok=True)
        Image.new("RGB", (12, 10), (200, 10, 10)).save(tmp_path / file)
    return tmp_path


def shortened(command):
    """The command's words with a tiny network, one epoch, and digits for a data set that would be downloaded."""
    _, *words = shlex.split(command)
    words = ["digits" if word == "cifar10" else word for word in words]
    words += SHORT.get(words[0], [])
    if words[0] == "export" and ".int8." in command:
        words += ["--tolerance", "100"]  # after one epoch
    if words[0] == "run":
        words += [] if "--arch" in words else TINY
        if words[1] in ("kd", "ablation", "small/kd", "edge") and "--teacher" not in words:
            words += ["--set", "teacher.model.name=test_dmsresnet"]
    if words[0] in ("lr-find", "tune"):
        words += TINY
    return words


def test_every_command_of_the_readme_runs(dms, folder):  # noqa: F811
    here = [command for command in COMMANDS if not command.startswith(NOT_HERE)]
    assert len(here) > 15
    assert dms("run", "se", *SHORT["run"], *TINY, "--out", "artifacts/x")[0] == 0
    for command in here:
        code, out, err = dms(*shortened(command))
        assert code == 0, f"{command}: {out[-500:]}{err}"
    assert (folder / "kd.onnx").is_file()
    assert (folder / "report" / "index.html").is_file()
    assert len((folder / "new.csv").read_text().splitlines()) == 3


def test_the_python_of_the_readme_runs(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    own, stock = DMSLearner.fit_recipe, vision.vision_learner
    monkeypatch.setattr(DMSLearner, "fit_recipe", lambda learn: own(learn, epochs=1))
    monkeypatch.setattr(vision, "vision_learner", lambda *args, **kwargs: stock(*args, pretrained=False, **kwargs))
    blocks = re.findall(r"```python\n(.*?)```", README, re.S)
    assert len(blocks) == 3
    names = {}
    for block in sorted(blocks, key=lambda block: "onnxruntime" in block):  # the file is written in a later block
        exec(compile(block, "README.md", "exec"), names)
    assert capsys.readouterr().out.split()[-1] in [str(number) for number in range(10)]
