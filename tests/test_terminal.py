"""What is printed: odd names as escapes, in any encoding, to readers that may leave; and what `predict` says."""

import csv
import io
import os
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dms_fastai import UserError, load_data
from dms_fastai.errors import notice
from dms_fastai.export import classify, classify_files, export_run, predict_files
from dms_fastai.predict import image_files
from dms_fastai.run_folder import RunFolder
from dms_fastai.terminal import Terminal, printable
from tests.test_runs import dms  # noqa: F401  (a fixture)

ROOT = Path(__file__).parent.parent


def harmless(text):
    return all(c == "\n" or c.isprintable() for c in text)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a b é 猫 😀 [/] <b> \\x", "a b é 猫 😀 [/] <b> \\x"),
        ("a\x1b[31m\n\t\x00", r"a\x1b[31m\n\t\x00"),
        ("\u202egnp\u200f", r"\u202egnp\u200f"),
        (os.fsdecode(b"caf\xe9"), r"caf\xe9"),
        (Path("a\rb"), r"a\rb"),
    ],
)
def test_printable(text, shown):
    assert printable(text) == shown


def test_a_console_prints_text_as_it_is():
    console = Terminal(file=io.StringIO(), width=200)
    console.say("[red]a[/] [/nothing] :cat: 1.5 \x1b[2J\n")
    console.print("[bold]b\x1b\nc")
    assert console.file.getvalue() == "[red]a[/] [/nothing] :cat: 1.5 \\x1b[2J\\n\n[bold]b\\x1b\nc\n"


# Names that are more than names

NAMES = [os.fsdecode(b"caf\xe9"), "a\x1b[31mred\nnew", "\u202ertl\u200f", "[bold]<b>:cat:"]


@pytest.fixture
def odd(tmp_path):
    """Image folders of strange names, in a folder of a strange name."""
    random = np.random.default_rng(0)
    for split in ("train", "test"):
        for number, name in enumerate(NAMES):
            folder = tmp_path / "[red]\x1b<i>" / split / name
            folder.mkdir(parents=True)
            for index in range(6):
                pixels = random.integers(0, 60, (8, 8, 3), dtype=np.uint8) + 60 * number
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f"\x1b{index}\udcff.png")
    return "[red]\x1b<i>"


def test_no_name_steers_the_terminal_or_the_page(dms, odd, tmp_path):  # noqa: F811
    small = ("--arch", "test_dmsresnet", "--epochs", 1, "--set", "data.batch_size=8", "--set", "data.size=8")
    code, out, err = dms("run", "se", "--data", odd, *small, "--out", "runs")
    assert code == 0
    assert harmless(out + err)
    assert r"[red]\x1b<i>, seed 0" in out
    code, out, err = dms("report", "runs")
    assert (code, err) == (0, "")
    assert harmless(out)
    page, text = ((tmp_path / "report" / name).read_text() for name in ("index.html", "report.md"))
    assert harmless(page)
    assert harmless(text)
    assert r"[red]\x1b&lt;i&gt;, seed 0" in page
    assert "<i>" not in page + text
    code, out, err = dms("predict", "runs/se/seed0", f"{odd}/test", "--top", 4)
    assert (code, err) == (0, "")
    assert harmless(out)
    assert len(out.splitlines()) == 24 + 1
    assert all(printable(name) in out.splitlines()[0] for name in NAMES)
    for command in (("run", "\x1b"), ("run", "se", "--data", "\x1b"), ("predict", "\x1b", "x"), ("report", "\x1b\n")):
        code, out, err = dms(*command)
        assert code == 2
        assert "\\x1b" in err
        assert harmless(out + err)
        assert err.count("\n") == 1


def test_a_table_has_the_names_as_they_are(dms, odd, tmp_path):  # noqa: F811
    small = ("--arch", "test_dmsresnet", "--epochs", 1, "--set", "data.batch_size=8", "--set", "data.size=8")
    assert dms("run", "se", "--data", odd, *small, "--out", "runs")[0] == 0
    assert dms("predict", "runs/se/seed0", f"{odd}/test", "--csv", "new/t.csv")[0] == 0
    with (tmp_path / "new" / "t.csv").open(newline="", encoding="utf-8", errors="surrogateescape") as file:
        head, *rows = csv.reader(file)
    assert head == ["file", "class", "probability", *sorted(["caf\\xe9", *NAMES[1:]])]
    assert [row[0] for row in rows] == sorted(map(str, Path(odd).glob("test/*/*.png")))


# Encodings, and readers that leave


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
@pytest.mark.parametrize("command", ["recipes", "models", "report", "predict"])
def test_every_encoding_will_do(dms, folder, examples, monkeypatch, encoding, command):  # noqa: F811
    files, _ = examples
    named = files[0].with_name("üκ\udcff.png")
    named.write_bytes(files[0].read_bytes())
    args = {"report": [ROOT / "artifacts" / "cifar10-cpu" / "se"], "predict": [folder, named]}
    monkeypatch.setattr("dms_fastai.report.page.draw", lambda *_: None)
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding=encoding))
    code, _, err = dms(command, *args.get(command, []))
    sys.stdout.flush()
    assert (code, err) == (0, "")
    out = raw.getvalue().decode(encoding)
    words = {"recipes": "baseline", "models": "dmsresnet", "report": "\N{PLUS-MINUS SIGN}", "predict": "üκ\\xff.png"}
    assert words[command].encode(encoding, "backslashreplace").decode(encoding) in out


def shell(line):
    """What a line prints to either stream, and the exit codes of its parts."""
    script = f"{line}; echo ${{PIPESTATUS[@]}} >&2"
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, cwd=ROOT)
    *err, codes = done.stderr.splitlines()
    return done.stdout, err, codes


def test_a_reader_that_leaves_ends_the_command_quietly():
    assert shell(f"{sys.executable} -m dms_fastai models | true") == ("", [], "141 0")
    code = (
        "from pathlib import Path; from dms_fastai.predict import table\n"
        "with table(Path('-'), ['a', 'b']) as write:\n"
        "    for _ in range(100_000): write(Path('x.png'), [0.25, 0.75])\n"
    )
    out, err, codes = shell(f'{sys.executable} -c "{code}" | head -2')
    assert (out, err, codes) == ("file,class,probability,a,b\nx.png,b,0.750000,0.250000,0.750000\n", [], "141 0")


def test_a_full_disk_behind_standard_output_is_said_in_a_line():
    out, err, codes = shell(f"{sys.executable} -m dms_fastai recipes > /dev/full")
    assert (out, codes) == ("", "2")
    assert len(err) == 1
    assert "No space left" in err[0]


def test_what_a_user_should_know_is_a_line(dms, monkeypatch):  # noqa: F811
    def recipes():
        notice("grey \x1b of 16 bits")
        warnings.warn("no longer", stacklevel=1)
        return []

    monkeypatch.setattr("dms_fastai.cli.show.recipe_names", recipes)
    code, _, err = dms("recipes")
    assert code == 0
    assert err.splitlines()[0] == r"dms-fastai: grey \x1b of 16 bits"
    assert "UserWarning: no longer" in err


# Which images, and what is said of them


@pytest.fixture(scope="module")
def folder(teacher, tmp_path_factory):
    """A trained Learner's run."""
    folder = tmp_path_factory.mktemp("run")
    export_run(teacher, RunFolder(folder))
    return folder


@pytest.fixture
def examples(tmp_path):
    """digits/CLASS/INDEX.png for 40 images, three of them in a wrong folder: the files in order, and the folders."""
    digits, files = load_data("digits").valid_ds, {}
    for index in range(40):
        name = str(digits.vocab[(digits.labels[index] + (index < 3)) % 10])
        file = tmp_path / "digits" / name / f"{index:02d}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(digits.images[index].permute(1, 2, 0).numpy()).save(file)
        files[file] = name
    return sorted(files), [files[file] for file in sorted(files)]


def test_a_folder_is_classified_with_its_accuracy(dms, folder, examples):  # noqa: F811
    files, labels = examples
    vocab, probabilities = predict_files(folder, files)
    best = [vocab[row.argmax()] for row in probabilities]
    right = sum(a == b for a, b in zip(best, labels, strict=True))
    assert 20 < right <= 37
    code, out, err = dms("predict", folder, "digits", "--top", 1)
    assert (code, err) == (0, "")
    *lines, last = out.splitlines()
    names = [file.relative_to(Path.cwd()) for file in files]
    shares = 100 * probabilities.max(1).values
    told = zip(names, best, shares, strict=True)
    assert lines == [f"{name}: {label} {share:.1f} %" for name, label, share in told]
    assert last == f"accuracy: {100 * right / 40:.2f} %, of 40 images in folders named after classes"
    alone = dms("predict", folder, *files[:3], "--top", 1)[1]
    assert alone.count("\n") == 3  # files say nothing of their classes


def test_a_table_has_every_probability(dms, folder, examples, tmp_path):  # noqa: F811
    files, _ = examples
    vocab, probabilities = predict_files(folder, files)
    code, out, err = dms("predict", folder, "digits", "--csv", "t.csv")
    assert (code, err) == (0, "")
    assert out.splitlines()[0].startswith("accuracy: ")
    head, *rows = csv.reader((tmp_path / "t.csv").open(newline=""))
    assert head == ["file", "class", "probability", *vocab]
    assert [row[0] for row in rows] == [str(file.relative_to(tmp_path)) for file in files]
    np.testing.assert_allclose(np.array([row[3:] for row in rows], float), probabilities, atol=1e-6)
    assert [row[1] for row in rows] == [vocab[row.argmax()] for row in probabilities]
    assert [row[2] for row in rows] == [max(row[3:]) for row in rows]
    code, out, err = dms("predict", folder, "digits", "--csv", "-")
    assert out == (tmp_path / "t.csv").read_text()
    assert err.startswith("accuracy: ")
    for nowhere in (tmp_path, "/dev/null"):
        code, _, err = dms("predict", folder, "digits", "--csv", nowhere)
        assert code == 2
        assert "give NAME.csv" in err


def test_images_are_found_at_any_depth_by_pattern_and_from_home(examples, tmp_path, monkeypatch):
    files, labels = examples
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    here = [file.relative_to(tmp_path) for file in files]
    deep = tmp_path / "digits" / "3" / "more" / "x.JPG"
    for file in (deep, tmp_path / "digits" / "notes.txt", tmp_path / "digits" / ".hidden" / "h.png"):
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(b"")
    (tmp_path / "digits" / "3" / "back").symlink_to(tmp_path / "digits")
    (tmp_path / "digits" / "latest").symlink_to(tmp_path / "digits" / "3")  # an image is classified once
    found = image_files(["digits"])
    assert list(found) == sorted([*here, deep.relative_to(tmp_path)])
    assert found[deep.relative_to(tmp_path)] == ("more", "3", "digits")
    assert [found[file][0] for file in here] == labels
    (tmp_path / "digits" / "3" / "back").unlink()
    (tmp_path / "digits" / "latest").unlink()
    assert list(image_files(["~/digits/*/*.png"])) == files
    assert list(image_files(["digits/**/*.png"])) == here
    assert list(image_files([str(files[1]), str(files[0]), str(files[1])])) == [files[1], files[0]]
    odd = tmp_path / "[a]*.png"
    odd.write_bytes(b"")
    assert list(image_files([str(odd)])) == [odd]  # a name, and no pattern
    (tmp_path / "empty").mkdir()
    for missing, words in (
        ("empty", "no images in empty"),
        ("*.gif", r"called \*\.gif"),
        ("a.png", "no such image: a.png"),
    ):
        with pytest.raises(UserError, match=words):
            image_files([missing])


@pytest.mark.parametrize("name", ["", "learner.pkl"])
def test_a_bad_file_costs_its_own_line(dms, folder, examples, tmp_path, name):  # noqa: F811
    files, _ = examples
    bad = tmp_path / "bad.png"
    bad.write_bytes(b"no image")
    model = (folder / name, "--trust-pickle")
    given = (files[0], bad, files[1], tmp_path / "missing.png", files[2])
    code, out, err = dms("predict", *model, *given)
    assert code == 1
    assert [line.split(":")[0] for line in out.splitlines()] == list(map(str, files[:3]))
    first, second, last = err.splitlines()
    assert str(bad) in first
    assert "missing.png" in second
    assert last == "dms-fastai: error: 2 of 5 images could not be read"
    code, out, err = dms("predict", *model, bad, bad.with_name("missing.png"), "--csv", "t.csv")
    assert (code, out) == (2, "")
    assert err.splitlines()[-1] == "dms-fastai: error: 2 of 2 images could not be read"
    assert not (tmp_path / "t.csv").exists()
    code, out, err = dms("predict", *model, bad)
    assert (code, out, err.count("\n")) == (2, "", 1)


def test_python_may_keep_the_errors(folder, examples, tmp_path):
    files, _ = examples
    bad = tmp_path / "bad.png"
    bad.write_bytes(b"no image")
    errors = []
    vocab, some = predict_files(folder, [files[0], bad, files[1]], errors=errors)
    torch.testing.assert_close(some, predict_files(folder, files[:2])[1])
    assert [str(bad) in error.message for error in errors] == [True]
    with pytest.raises(UserError, match=r"bad\.png"):
        predict_files(folder, [files[0], bad])
    assert predict_files(folder, [], errors=errors)[1].shape == (0, len(vocab))


def test_no_more_than_a_batch_is_in_memory(folder, examples, monkeypatch):
    monkeypatch.setattr(classify, "BATCH", 4)
    taken = []
    _, found = classify_files(folder, (taken.append(file) or file for file in examples[0]))
    assert taken == []
    assert next(found)[0] == examples[0][0]
    assert len(taken) == 4
    assert [file for file, _ in found] == examples[0][1:]
