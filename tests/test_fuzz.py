"""Damaged files of every kind that a user may bring: each is read, or refused in one line.

FUZZ_SECONDS=600 tries that long for each kind, and FUZZ_SEED=1 tries other damages.
"""

import io
import json
import os
import random
import shutil
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from dms_fastai import UserError, dms_learner, load_recipe
from dms_fastai.data.images import read_image
from dms_fastai.data.sources import load_splits
from dms_fastai.models.weights import KEY, load_weights, save_weights
from tests.test_data import make_npz

SECONDS = float(os.environ.get("FUZZ_SECONDS", "0"))  # for each kind; 0: `TRIES` files
TRIES = 300
SEED = int(os.environ.get("FUZZ_SEED", "0"))
SPECIAL = (b"\xff" * 4, b"\0" * 4, b"\x7f\xff\xff\xff", b"\xff\xff\xff\x7f", b"-1", b"1e999", b"\n")
FORMATS = ("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM", "TGA", "ICO", "PCX")


def damaged(data, rng):
    """The bytes with a few changed, cut off, left out, doubled or replaced by what is often special."""
    data = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 5, 20))):
        at = rng.randrange(len(data) + 1)
        match rng.randrange(6):
            case 0 if at < len(data):
                data[at] = rng.randrange(256)
            case 1 if at < len(data):
                data[at] ^= 1 << rng.randrange(8)
            case 2:
                del data[at:]
            case 3:
                del data[at : at + rng.randrange(1, 9)]
            case 4:
                data[at:at] = data[at : at + rng.randrange(1, 65)]
            case 5:
                special = rng.choice(SPECIAL)
                data[at : at + len(special)] = special
    return bytes(data)


def survives(open_it, samples, write, share=1.0):
    """Open damaged samples: each is opened, or refused in one line. Gives how many of each.

    `share` is that of the time, or of the files, that other kinds get.
    """
    rng, outcomes, end = random.Random(SEED), [0, 0], time.monotonic() + share * SECONDS
    while time.monotonic() < end or sum(outcomes) < share * TRIES:
        content = damaged(rng.choice(samples), rng)
        write(content)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                open_it()
            except UserError as error:
                outcomes[1] += 1
                message = error.message
            except BaseException as error:
                raise AssertionError(f"{error!r} from {content!r}") from error
            else:
                outcomes[0] += 1
                message = ""
        assert "\n" not in message, content
    print(f"{outcomes[0]:,} read, {outcomes[1]:,} refused")
    return outcomes


def image_bytes(kind, mode="RGB"):
    file = io.BytesIO()
    image = Image.effect_noise((17, 13), 60).convert(mode)
    exif = Image.Exif()
    exif[0x0112] = 6
    more = {"exif": exif} if kind in ("JPEG", "TIFF", "PNG", "WEBP") else {}
    image.save(file, kind, **more)
    return file.getvalue()


def test_damaged_images(tmp_path):
    samples = [image_bytes(kind) for kind in FORMATS] + [image_bytes("PNG", mode) for mode in ("P", "I;16", "LA")]
    file = tmp_path / "image.png"
    read, refused = survives(lambda: read_image(file, 16), samples, file.write_bytes)
    assert read > 10
    assert refused > 10


def test_damaged_arrays(tmp_path):
    samples = [
        make_npz(tmp_path / "a.npz").read_bytes(),
        make_npz(tmp_path / "b.npz", class_names=list("abc")).read_bytes(),
    ]
    with np.load(tmp_path / "a.npz") as arrays:
        np.savez_compressed(tmp_path / "c.npz", **arrays)
    samples.append((tmp_path / "c.npz").read_bytes())
    file = tmp_path / "images.npz"
    _, refused = survives(lambda: dict(load_splits(file, 8)), samples, file.write_bytes)
    assert refused > 10


def test_damaged_tables(tmp_path):
    for index in range(4):
        Image.new("RGB", (8, 8)).save(tmp_path / f"{index}.png")
    samples = [b"file,label\n0.png,a\n1.png,b\n", b"id;class;split\n0;x;train\n1;y;train\n2;x;test\n"]
    table = tmp_path / "labels.csv"
    survives(lambda: load_splits(tmp_path, 8, table), samples, table.write_bytes)


def test_damaged_archives(tmp_path, monkeypatch):
    monkeypatch.setenv("DMS_FASTAI_CACHE", str(tmp_path / "cache"))
    root = tmp_path / "images"
    for label in "ab":
        (root / "train" / label).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(root / "train" / label / "1.png")
    for ending, kind in ((".zip", "zip"), (".tar", "tar"), (".tgz", "gztar")):
        sample = Path(shutil.make_archive(str(tmp_path / "p"), kind, root)).read_bytes()
        file = tmp_path / f"images{ending}"
        survives(lambda file=file: dict(load_splits(file, 8)), [sample], file.write_bytes, 1 / 3)
    assert {path.parent.name for path in (tmp_path / "cache").rglob("*.png")} <= {"a", "b"}


def test_damaged_recipes(tmp_path):
    recipe = load_recipe("kd", "digits")
    samples = [recipe.to_toml().encode(), b'extends = "kd"\nmixup = false\n[optimizer]\nlr = 0.05\n[on.digits.ema]\n']
    file = tmp_path / "mine.toml"
    survives(lambda: load_recipe(str(file), "digits"), samples, file.write_bytes)


def test_damaged_weights(dls, tmp_path):
    """Most changes hit the numbers, so the card is damaged apart from them, too."""
    learn = dms_learner(dls, "se", arch="test_dmsresnet_plain")
    save_weights(learn.model, learn.card, tmp_path / "whole.safetensors")
    content = (tmp_path / "whole.safetensors").read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    card = header["__metadata__"]
    file = tmp_path / "model.safetensors"

    def with_card(text):
        table = {**header, "__metadata__": {**card, KEY: text.decode("utf-8", "replace")}}
        head = json.dumps(table).encode()
        file.write_bytes(len(head).to_bytes(8, "little") + head + content[8 + length :])

    _, refused = survives(lambda: load_weights(file), [card[KEY].encode()], with_card)
    assert refused > 10
    survives(lambda: load_weights(file), [content], file.write_bytes)


@pytest.mark.parametrize("text", ["[]", "3", "null", '"x"', "{}", '{"arch": "resnet18"}', "{" * 5000])
def test_what_is_json_and_no_card(tmp_path, text):
    save_file({"w": torch.zeros(1)}, tmp_path / "a.safetensors", {KEY: text})
    with pytest.raises(UserError):
        load_weights(tmp_path / "a.safetensors")
