"""ExecuTorch programs: the same answers in their own runtime, what int8 changes, and what is refused in a line."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dms_fastai import UserError, load_data
from dms_fastai.export import export_model, export_run, formats, predict_files
from dms_fastai.export.formats import open_exported
from dms_fastai.run_folder import RunFolder
from tests.test_runs import dms  # noqa: F401  (a fixture)

ALONE = """
import json, sys
import numpy as np, torch
from executorch.runtime import Runtime

images, found = torch.from_numpy(np.load("images.npy")), {}
for file in sys.argv[1:]:
    program = Runtime.get().load_program(file)
    texts = {name: program.load_method(name).execute([])[0] for name in program.method_names - {"forward"}}
    forward = program.load_method("forward")
    found[file] = texts, [forward.execute([image[None]])[0][0].tolist() for image in images]
assert not {"dms_fastai", "timm", "fastai", "onnxruntime"} & sys.modules.keys()
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def folder(teacher, tmp_path_factory):
    """A trained Learner's run."""
    folder = tmp_path_factory.mktemp("run")
    export_run(teacher, RunFolder(folder))
    return folder


def test_a_missing_runtime_is_named_with_the_extra(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(formats, "find_spec", lambda name: None)
    (tmp_path / "x.pte").touch()
    for act in (lambda: export_model(folder, tmp_path / "x.int8.pte"), lambda: open_exported(tmp_path / "x.pte")):
        with pytest.raises(UserError, match=r"pip install executorch, or 'dms-fastai\[executorch\]'"):
            act()


class TestWithExecuTorch:
    @pytest.fixture(scope="class", autouse=True)
    def installed(self):
        pytest.importorskip("executorch", reason="executorch, of the extra of this name, is not installed")

    @pytest.fixture(scope="class")
    def files(self, folder):
        """The run in float and in int8, by ending."""
        written = {ending: folder / f"digits{ending}" for ending in (".pte", ".int8.pte")}
        export_model(folder, written[".pte"])
        export_model(folder, written[".int8.pte"], data="digits", calibrate=50)
        return written

    def test_its_runtime_alone_gives_the_answers_of_predict(self, folder, files, tmp_path):
        images = load_data("digits").valid_ds.images.numpy()[::9]
        paths = [tmp_path / f"{index}.png" for index in range(len(images))]
        for path, image in zip(paths, images, strict=True):
            Image.fromarray(image.transpose(1, 2, 0)).save(path)
        np.save(tmp_path / "images.npy", images)
        command = [sys.executable, "-c", ALONE, *map(str, files.values())]
        done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        (texts, floats), (small_texts, small) = json.loads(done.stdout).values()
        vocab, expected = predict_files(folder, paths)
        assert json.loads(texts["classes"]) == json.loads(small_texts["classes"]) == vocab
        assert texts.keys() == {"classes", "macs"}
        assert json.loads(small_texts["calibration"]) == {"data": "digits", "images": 50, "seed": 0}
        np.testing.assert_allclose(floats, expected, atol=1e-4)
        np.testing.assert_allclose(small, expected, atol=0.2)
        assert (np.argmax(small, 1) == np.argmax(floats, 1)).mean() > 0.95
        np.testing.assert_allclose(np.sum(small, 1), 1, atol=1e-4)
        np.testing.assert_allclose(open_exported(files[".int8.pte"]).classify(images), small, atol=1e-6)

    def test_the_layout_of_images_in_memory_changes_nothing(self, files):
        """Those of files lie channels last, of which ExecuTorch knows nothing."""
        images = load_data("digits").valid_ds.images.numpy()[:20]
        images = images + np.arange(3, dtype=np.uint8)[:, None, None]  # not grey
        last = np.ascontiguousarray(images.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2)
        for file in files.values():
            classify = open_exported(file).classify
            np.testing.assert_array_equal(classify(last), classify(images))

    def test_a_file_is_small_and_keeps_no_path_of_this_machine(self, files):
        large, small = (file.read_bytes() for file in files.values())
        assert len(small) < 0.45 * len(large)
        for content in (large, small):
            assert str(Path(formats.__file__).parent).encode() not in content
            assert b"site-packages" not in content

    @pytest.mark.parametrize(
        ("name", "said"),
        [
            ("empty", "x.pte cannot be run: it is no ExecuTorch program"),
            ("noise", "x.pte cannot be run: it is no ExecuTorch program"),
            ("cut", "x.pte cannot be run: File size is too small"),
            ("damaged", "x.pte cannot be run: "),
            ("foreign", "x.pte does not name its classes; it was not written by dms-fastai export"),
            ("folder", "no such file: x.pte"),
        ],
    )
    def test_what_cannot_be_run_is_said_in_a_line(self, dms, files, tmp_path, name, said):  # noqa: F811
        whole, file = files[".pte"].read_bytes(), tmp_path / "x.pte"
        if name == "folder":
            file.mkdir()
        elif name == "foreign":
            file.write_bytes(another_program())
        else:
            broken = {"empty": b"", "noise": bytes(range(255, 0, -1)) * 9, "cut": whole[: len(whole) // 2]}
            file.write_bytes(broken.get(name, whole[:100] + bytes(500) + whole[600:]))
        Image.new("RGB", (8, 8)).save(tmp_path / "0.png")
        for words in (("bench", "x.pte"), ("predict", "x.pte", "0.png")):
            code, _, err = dms(*words)
            assert (code, err.count("\n")) == (2, 1), err
            assert said in err


def another_program():
    from executorch.exir import to_edge_transform_and_lower

    program = torch.export.export(torch.nn.Linear(2, 2), (torch.ones(1, 2),))
    return to_edge_transform_and_lower(program).to_executorch().buffer
