"""Images on the disk: the raw file, how it goes on after a kill, and batches that are the same wherever they are."""

import io
import os
import resource
import signal
import threading
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from torch._subclasses.fake_tensor import FakeTensorMode

from dms_fastai import load_data
from dms_fastai.data import BatchLoader, Crops, Data, ImageSet, Sets, decoded, memory, npz, placed, rows
from dms_fastai.data.ahead import ahead
from dms_fastai.data.boxes import resized_parts
from dms_fastai.data.images import read_image, read_whole
from dms_fastai.data.sources import load_splits
from dms_fastai.data.stored import Squares, Wholes
from dms_fastai.errors import UserError
from dms_fastai.evaluate import evaluate_model
from dms_fastai.export.classify import predict_files
from dms_fastai.export.source import read_model
from dms_fastai.run_folder import Run
from dms_fastai.runs.predictions import read_predictions
from tests.test_runs import dms  # noqa: F401

RNG = np.random.default_rng(0)
SIZE = 16
CPU = torch.device("cpu")


def photo(width, height):
    """A smooth image in colour."""
    small = RNG.integers(0, 256, (3, 4, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DMS_FASTAI_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def photos(tmp_path, cache):
    """A folder of photos, of different shapes, in two classes."""
    for split, count in (("train", 20), ("test", 6)):
        for name in "ab":
            folder = tmp_path / "photos" / split / name
            folder.mkdir(parents=True)
            for index in range(count // 2):
                photo(40 + 3 * index, 32 + 8 * (index % 3)).save(folder / f"{index}.jpg", quality=95)
    return tmp_path / "photos"


def batches(dls, epochs=2):
    """All batches of some epochs, from one seed."""
    torch.manual_seed(3)
    return [tuple(t.clone() for t in batch) for _ in range(epochs) for loader in dls.loaders for batch in loader]


def same(first, second):
    assert len(first) == len(second) > 0
    return all(
        torch.equal(a, b) for one, other in zip(first, second, strict=True) for a, b in zip(one, other, strict=True)
    )


CROPS = {
    "plain": {},
    "mirror": {"border": "mirror", "flip": 0.3},
    "alternate": {"alternate": True, "pad": 0.2},
    "no flip": {"flip": 0.0},
    "no crop": {"pad": 0.0, "flip": 0.0},
    "parts": {"min_area": 0.3, "pad": 0.0},
    "parts and border": {"min_area": 0.3},
}


@pytest.mark.parametrize("crops", CROPS.values(), ids=CROPS)
@pytest.mark.parametrize("more", [{}, {"valid": 0.25}, {"balance": True}], ids=["", "held out", "balance"])
def test_the_same_seed_gives_the_same_batches_wherever_the_images_are(photos, monkeypatch, crops, more):
    def found(where, share):
        monkeypatch.setattr(placed, "SHARE", share)
        dls = load_data(photos, bs=8, size=SIZE, where=where, **crops, **more)
        return dls.train.where, batches(dls)

    (device, first), (disk, second) = found("device", 0.0), found("disk", 0.6)
    assert (device, disk) == ("device", "disk")
    assert same(first, second)
    if "min_area" not in crops:  # square images also have copies
        copies, third = found("auto", 0.6)
        assert copies == "copies"
        assert same(first, third)


def test_images_without_labels_join_those_on_the_disk(photos, monkeypatch):
    (photos / "unlabelled").mkdir()
    for index in range(5):
        photo(50, 30).save(photos / "unlabelled" / f"{index}.jpg")
    found = []
    for where in ("device", "disk"):
        for crops in ({}, {"min_area": 0.5}):
            dls = load_data(photos, bs=8, size=SIZE, where=where, **crops).with_unlabelled()
            assert len(dls.train_ds) == 25
            found.append(batches(dls))
    assert same(found[0], found[2])
    assert same(found[1], found[3])


def test_a_resumed_pass_goes_on_with_the_same_batches_from_the_disk(photos):
    dls = load_data(photos, bs=4, size=SIZE, where="disk", pad=0.0, flip=0.0)
    torch.manual_seed(0)
    whole = list(dls.train)
    torch.manual_seed(0)
    dls.train.resume_at(3, lambda: None)
    assert same(list(dls.train), whole[3:])


def test_a_pass_that_is_left_ends_its_thread(photos):
    dls = load_data(photos, bs=4, size=SIZE, where="disk")
    before = threading.active_count()
    passing = iter(dls.train)
    next(passing)
    passing.close()
    assert threading.active_count() == before


def test_what_is_made_ahead_comes_in_order_and_its_errors_in_turn():
    made = []

    def make(item):
        made.append(item)
        if item == 5:
            raise ValueError("five")
        return 10 * item

    found = ahead(make, range(100), most=3)
    assert [next(found) for _ in range(5)] == [0, 10, 20, 30, 40]
    with pytest.raises(ValueError, match="five"):
        next(found)
    assert len(made) <= 5 + 1 + 3


# Whole images


def test_images_are_kept_whole_where_parts_are_cut_out(photos):
    dls = load_data(photos, size=SIZE, min_area=0.3)
    stored = dls.train_ds.stored
    assert isinstance(stored, Wholes)
    shapes = {tuple(sides) for sides in stored.sides.tolist()}
    assert min(min(sides) for sides in shapes) == max(min(sides) for sides in shapes) == 18  # 16 / 0.875
    assert (18, 36) in shapes, "67 x 32 is cut to twice its height"
    assert isinstance(load_data(photos, size=SIZE).train_ds.stored, Squares)


def test_small_square_images_stay_as_they_are(tmp_path, cache):
    for split in ("train", "test"):
        for name in "ab":
            (tmp_path / "small" / split / name).mkdir(parents=True)
            for index in range(4):
                pixels = RNG.integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / "small" / split / name / f"{index}.png")
    plain, parts = (load_data(tmp_path / "small", size=SIZE, min_area=area).train_ds for area in (1.0, 0.5))
    assert isinstance(parts.stored, Squares)
    assert torch.equal(plain.images, parts.images)
    assert plain.digest() == parts.digest()
    assert parts.middle == 1.0


def test_validation_resizes_the_shorter_side_and_crops_the_middle_as_timm_does(photos):
    from timm.data import create_transform

    valid = load_data(photos, size=SIZE, min_area=0.3).valid_ds
    transform = create_transform((3, SIZE, SIZE), crop_pct=0.875, interpolation="bilinear")
    transform.transforms = transform.transforms[:2]  # without those that normalise
    compared = []
    for file, image, sides in zip(valid.items, valid.images, valid.stored.sides.tolist(), strict=True):
        with Image.open(file) as opened:
            theirs = torch.from_numpy(np.asarray(transform(opened)).copy()).permute(2, 0, 1)
        if not (max(sides) - SIZE) % 2:  # of an odd rest, ours has one pixel less before the middle, or theirs
            assert (image.int() - theirs.int()).abs().max() <= 1
            compared.append(file)
        assert torch.equal(image, read_image(file, SIZE, middle=0.875))  # as predict reads it
    assert len(compared) > 1


def test_parts_of_whole_images_are_resized_as_pil_does():
    image = torch.from_numpy(np.asarray(photo(48, 30)).copy()).permute(2, 0, 1)
    boxes = [(3, 5, 20, 31), (0, 0, 30, 48), (10, 10, 6, 8)]
    found = resized_parts([image] * 3, boxes, [False, False, True], SIZE)
    for result, (top, left, height, width), method in zip(
        found, boxes, ("BILINEAR", "BILINEAR", "BICUBIC"), strict=True
    ):
        part = Image.fromarray(image.permute(1, 2, 0).numpy()).crop((left, top, left + width, top + height))
        theirs = np.asarray(part.resize((SIZE, SIZE), Image.Resampling[method])).astype(int)
        assert abs(result.permute(1, 2, 0).numpy().astype(int) - theirs).max() <= 1


def test_parts_have_the_areas_and_the_shapes_that_are_asked_for():
    size, count = 32, 400
    pixels = torch.stack(torch.meshgrid(torch.arange(64), torch.arange(96), indexing="ij"), -1)
    pixels = torch.cat([2 * pixels, torch.zeros(64, 96, 1)], -1).to(torch.uint8)  # twice the row, and twice the column
    images = Wholes.in_a_row(pixels.flatten().repeat(count), torch.tensor([[64, 96]]).expand(count, 2), size)
    loader = BatchLoader(ImageSet(images, None, ["a", "b"], split_idx=0), count, crops=Crops(0.0, 0.0, min_area=0.35))
    [(x,)] = list(loader)
    values = loader.decode((x,))[0] * 255 / 2
    height, width = (values[:, 0, -1, 0] - values[:, 0, 0, 0]), (values[:, 1, 0, -1] - values[:, 1, 0, 0])
    height, width = height * size / (size - 1), width * size / (size - 1)
    shares, aspects = height * width / (64 * 96), width / height
    assert 0.3 < shares.min() < 0.4
    assert 0.8 < shares.max() < 0.92, "no more, for a part that is not too long: 64 x 85"
    assert 0.7 < aspects.min() < 0.8
    assert 1.25 < aspects.max() < 1.42
    assert values[:, 1, 0, 0].max() > 30, "from anywhere along the longer side"


def test_a_run_keeps_how_much_it_has_seen_of_an_image(photos, dms, tmp_path):  # noqa: F811
    asked = ("run", "se", "--data", photos, "--epochs", 1, "--device", "cpu", "--out", "x")
    more = [word for key in ("size=16", "batch_size=8", "where=disk") for word in ("--set", f"data.{key}")]
    assert dms(*asked, *more, "--set", "augment.min_area=0.4")[0] == 0
    run = Run.read(tmp_path / "x" / "se" / "seed0")
    assert read_model(run.folder.weights, trust=False)[1].middle == 0.875
    found = evaluate_model(run.folder.path, photos)
    assert found.accuracy == run.facts.last.valid_accuracy
    files = load_splits(photos, SIZE)["test"].items
    predicted = read_predictions(run.folder.predictions)
    _, probabilities = predict_files(run.folder.path, files)
    assert np.abs(probabilities.numpy() - np.exp(predicted.log_probabilities.astype(np.float32))).max() < 0.01
    # where images are is no part of what has been trained
    assert dms(*asked, *more[:-2], "--set", "augment.min_area=0.4")[0] == 0
    assert Run.read(run.folder.path).facts == run.facts


# The raw file


Counted = namedtuple("Counted", "files interrupted_after")


@pytest.fixture
def opened(monkeypatch):
    """The files that are decoded; after so many, the process is interrupted."""
    found, real = Counted([], [None]), decoded.open_image

    def counting(file, *args):
        if found.interrupted_after[0] == len(found.files):
            raise KeyboardInterrupt
        found.files.append(Path(file))
        return real(file, *args)

    monkeypatch.setattr(decoded, "open_image", counting)
    monkeypatch.setattr(decoded, "AHEAD", 4)
    return found


@pytest.mark.parametrize("middle", [1.0, 0.875])
def test_decoding_goes_on_after_an_interruption(photos, cache, opened, middle):
    opened.interrupted_after[0] = 13
    with pytest.raises(KeyboardInterrupt):
        load_splits(photos, SIZE, middle=middle)["train"]
    opened.interrupted_after[0] = None
    images = load_splits(photos, SIZE, middle=middle)["train"]
    assert 20 <= len(opened.files) <= 20 + 4  # those that were in work come twice
    fresh = load_splits(photos.rename(photos.with_name("moved")), SIZE, middle=middle)["train"]
    assert torch.equal(images.images, fresh.images)
    assert images.digest() == fresh.digest()


def test_grey_of_sixteen_bits_goes_on_with_the_same_white(tmp_path, cache, opened):
    for index, level in enumerate((100, 200, 300, 4000, 500, 600)):
        folder = tmp_path / "deep" / "train" / "ab"[index % 2]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((8, 8), level, np.uint16)).save(folder / f"{index}.png")
    opened.interrupted_after[0] = 7  # while the first are read again, with the white of the brightest
    with pytest.raises(KeyboardInterrupt):
        load_splits(tmp_path / "deep", 8)["train"]
    opened.interrupted_after[0] = None
    images = load_splits(tmp_path / "deep", 8)["train"]
    assert images.white == 4095
    assert images.images[:, 0, 0, 0].tolist() == [level >> 4 for level in (100, 300, 500, 200, 4000, 600)]


def test_a_file_that_is_cut_short_goes_on_from_there(photos, cache, opened):
    whole = load_splits(photos, SIZE)["train"].images.clone()
    [file] = cache.glob("photos-train-*.pixels")
    os.truncate(file, 7 * SIZE * SIZE * 3 + 5)
    opened.files.clear()
    assert torch.equal(load_splits(photos, SIZE)["train"].images, whole)
    assert len(opened.files) == 13


def test_a_stale_file_is_not_cut_short_under_those_who_have_it_mapped(photos, cache):
    before = load_splits(photos, SIZE)["train"].images
    kept = before.clone()
    (photos / "train" / "a" / "0.jpg").unlink()
    assert len(load_splits(photos, SIZE)["train"]) == 19
    assert torch.equal(before, kept)


def test_decoding_goes_on_after_a_kill(photos, cache, opened, monkeypatch):
    def killed(self, *args):
        if len(self) == 9:
            os.kill(os.getpid(), signal.SIGKILL)
        append(self, *args)

    append, child = rows.Rows.append, os.fork()
    if not child:
        rows.SECONDS, rows.Rows.append = 0.0, killed
        load_splits(photos, SIZE)["train"]
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    images = load_splits(photos, SIZE)["train"]
    assert len(opened.files) == 11
    for file, image in zip(images.items, images.images, strict=True):
        assert torch.equal(image, read_image(file, SIZE))


def test_of_two_that_begin_at_once_one_decodes(photos, cache, opened):
    begin, found = threading.Barrier(2), []

    def start():
        begin.wait()
        found.append(load_splits(photos, SIZE, middle=0.875)["train"].digest())

    threads = [threading.Thread(target=start) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found[0] == found[1]
    assert len(opened.files) == 20


def test_images_that_no_disk_can_hold_are_in_memory_or_refused(photos, cache, monkeypatch):
    whole = load_splits(photos, SIZE)["train"].images.clone()
    full = namedtuple("Usage", "total used free")(100, 100, 0)
    monkeypatch.setattr(decoded.shutil, "disk_usage", lambda path: full)
    moved = photos.rename(photos.with_name("moved"))
    assert torch.equal(load_splits(moved, SIZE)["train"].images, whole)
    monkeypatch.setattr(decoded, "free_memory", lambda device: 1e4)
    again = moved.rename(photos)
    monkeypatch.setenv("DMS_FASTAI_CACHE", str(cache.with_name("other")))
    with pytest.raises(
        UserError, match=r"the images take 15\.4 kB; .*other has 0\.0 kB free .*DMS_FASTAI_CACHE .*data\.size"
    ):
        load_splits(again, SIZE)["train"]


def test_a_disk_that_fills_up_as_images_are_decoded(photos, cache, monkeypatch):
    real = rows._flush

    def flush(opened):
        if not isinstance(opened, io.BytesIO):
            raise OSError(28, "No space left on device")
        real(opened)

    monkeypatch.setattr(rows, "_flush", flush)
    assert len(load_splits(photos, SIZE)["train"].images) == 20
    monkeypatch.setattr(decoded, "free_memory", lambda device: 1e3)
    with pytest.raises(UserError, match="No space left on device"):
        load_splits(photos, SIZE)["train"]


# JPEG at a smaller scale


@pytest.mark.parametrize("turned", [None, 6, 3])
@pytest.mark.parametrize("size", [(500, 375), (333, 501), (640, 480)])
def test_a_jpeg_decoded_at_a_smaller_scale_is_what_it_was(size, turned, tmp_path):
    exif = Image.Exif()
    if turned is not None:
        exif[0x0112] = turned
    photo(*size).save(tmp_path / "a.jpg", quality=95, exif=exif)
    with decoded.open_image(tmp_path / "a.jpg", 40) as image:
        smaller = turned is None or not any(side % 8 for side in size)
        assert 80 <= min(image.size) <= (min(size) / 2 + 1 if smaller else min(size))
    with Image.open(tmp_path / "a.jpg") as image:
        upright = ImageOps.exif_transpose(image).convert("RGB")
        exact = np.asarray(ImageOps.fit(upright, (40, 40), Image.Resampling.BILINEAR)).astype(int)
        wide = read_whole(upright, 35).numpy().astype(int)
    assert abs(read_image(tmp_path / "a.jpg", 40).permute(1, 2, 0).numpy() - exact).mean() < 0.5
    with decoded.open_image(tmp_path / "a.jpg", 40) as image:
        assert abs(read_whole(image, 35).numpy() - wide).mean() < 0.5


# Large arrays


@pytest.mark.parametrize(("dtype", "scale"), [(np.uint8, 1), (np.uint16, 16.0), (np.float32, 1 / 255)])
@pytest.mark.parametrize("shape", [(20, 24, 3), (20, 24), (3, 20, 20)])
@pytest.mark.parametrize("size", [None, 8])
def test_a_large_array_is_read_in_parts(tmp_path, cache, monkeypatch, dtype, scale, shape, size):
    def arrays(count):
        values = RNG.integers(0, 256, (count, *shape), dtype=np.uint8)
        return (values * scale).astype(dtype)

    given = {"train_images": arrays(30), "test_images": arrays(7)}
    given |= {"train_labels": np.arange(30) % 3, "test_labels": np.arange(7) % 3}
    np.savez_compressed(tmp_path / "a.npz", **given)
    whole = load_splits(tmp_path / "a.npz", size)
    expected = {split: (whole[split].images, whole[split].digest(), whole[split].white) for split in whole}
    assert not list(cache.glob("*.pixels"))
    monkeypatch.setattr(npz, "LARGE", 100)
    monkeypatch.setattr(npz, "PART", 5000)
    parts = load_splits(tmp_path / "a.npz", size)
    for split, (images, digest, white) in expected.items():
        assert torch.equal(parts[split].images, images)
        assert (parts[split].digest(), parts[split].white) == (digest, white)
    assert len(list(cache.glob("*.pixels"))) == 2


def test_a_large_array_that_is_damaged_is_named(tmp_path, cache, monkeypatch):
    monkeypatch.setattr(npz, "LARGE", 100)
    labels = np.arange(4) % 2
    np.savez(tmp_path / "a.npz", train_images=np.zeros((4, 8, 8, 5)), train_labels=labels)
    with pytest.raises(UserError, match=r"a\.npz: train_images: images have shape \(8, 8, 5\)"):
        load_splits(tmp_path / "a.npz")["train"]
    np.savez(tmp_path / "b.npz", train_images=np.full((4, 8, 8), np.nan), train_labels=labels)
    with pytest.raises(UserError, match=r"b\.npz: train_images: pixels are NaN"):
        load_splits(tmp_path / "b.npz")["train"]
    np.savez(
        tmp_path / "c.npz",
        train_images=RNG.integers(0, 256, (400, 8, 8, 3), dtype=np.uint8),
        train_labels=np.arange(400) % 2,
    )
    content = bytearray((tmp_path / "c.npz").read_bytes())
    content[5000] ^= 255
    (tmp_path / "c.npz").write_bytes(content)
    with pytest.raises(UserError, match=r"c\.npz cannot be read .*CRC"):
        load_splits(tmp_path / "c.npz")["train"]


# What fits where


@pytest.mark.parametrize(
    ("free", "wanted", "where"),
    [
        (1e9, "auto", "copies"),
        (2e5, "auto", "device"),
        (1e4, "auto", "disk"),
        (1e9, "disk", "disk"),
        (1e5, "device", "device"),
    ],
)
def test_images_are_where_they_fit(monkeypatch, free, wanted, where):
    """100 images of 16 pixels: 76,800 bytes, and 240,000 with borders and mirror images."""
    monkeypatch.setattr(placed, "free_memory", lambda device: free)
    images = Squares([torch.zeros(100, 3, SIZE, SIZE, dtype=torch.uint8)])
    assert placed.place_for(images, [], Crops(), CPU, wanted) == where


@pytest.mark.parametrize("crops", [Crops(), Crops(border="mirror", alternate=True), Crops(0.0, 0.0, min_area=0.5)])
def test_square_images_on_a_gpu_are_found_by_an_order_that_is_drawn_on_the_cpu(crops):
    """torch's fake tensors have a device and a shape, and no values: they need no GPU."""
    gpu = torch.device("cuda", 0)
    with FakeTensorMode():
        order = torch.arange(12).split(4)
        there = placed.Placed(Squares([torch.zeros(12, 3, SIZE, SIZE, dtype=torch.uint8)]), crops, gpu, "device")
        for index, gathered in zip(order, there.batches(order), strict=True):
            x = there.take(index.to(gpu), gathered=gathered)
            assert (x.device, x.shape) == (gpu, (4, 3, SIZE, SIZE))


def test_a_thread_that_gathers_ahead_knows_which_gpu_is_this_process_s(monkeypatch):
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    images = Squares([torch.zeros(4, 3, SIZE, SIZE, dtype=torch.uint8)])
    for device, meant in (("cuda", "cuda:1"), ("cuda:0", "cuda:0"), ("cpu", "cpu")):
        assert placed.Placed(images, Crops(), torch.device(device), "disk").device == torch.device(meant)


def test_what_does_not_fit_is_refused_before_training(dms, monkeypatch):  # noqa: F811
    monkeypatch.setattr(placed, "free_memory", lambda device: 1e5)
    code, _, err = dms("run", "se", "--data", "digits", "--device", "cpu", "--set", "data.where=device", "--epochs", 1)
    assert code == 2
    assert "the images take 345.0 kB; memory has 100.0 kB free" in " ".join(err.split())
    assert "--set data.where=disk" in err
    assert "--set data.size" in " ".join(err.split())


def test_images_without_labels_count_with_their_copies(monkeypatch):
    """20 images with labels and 100 without: 768 bytes each, and 2,400 with borders and mirror images."""
    monkeypatch.setattr(placed, "free_memory", lambda device: 3e5)  # of which images may take 180,000 bytes
    train, valid, unlabelled = (
        ImageSet(torch.zeros(n, 3, SIZE, SIZE, dtype=torch.uint8), torch.full((n,), label), ["a", "b"], split_idx=split)
        for n, label, split in ((20, 0, 0), (10, 0, 1), (100, -100, 0))
    )
    alone, both = Sets(train, valid), Sets(train, valid, unlabelled)
    batches(alone.loaders(8), 1)
    assert [key for key in train._resident if Crops() in key]
    assert (alone.loaders(8).train.where, both.loaders(8).train.where) == ("copies", "device")
    assert not [key for key in train._resident if Crops() in key], "those of a stage before leave"
    assert both.held_bytes(Crops(), "device") == 120 * 768
    assert both.held_bytes(Crops(), "copies") == 120 * (768 + 2400)


def test_the_second_of_two_stages_keeps_what_is_there(monkeypatch):
    sets = Data().open("digits")
    first = sets.loaders(64, Crops())
    batches(first, 1)
    monkeypatch.setattr(placed, "free_memory", lambda device: 0.0)  # the copies of the first have taken it
    second = sets.loaders(64, Crops())
    assert second.train.where == first.train.where == "copies"
    assert second.train._placed() is first.train._placed()
    assert sets.loaders(64, Crops(pad=0.25)).train.where == "disk"
    assert not [key for key in sets.train._resident if Crops() in key], "the first crops' copies are given up"


@pytest.mark.parametrize("limit", ["RLIMIT_AS", "RLIMIT_DATA"])
def test_a_limit_of_the_shell_counts(monkeypatch, limit):
    most = 2**36  # above what any test takes; below it there is less than on the machine
    unlimited = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
    of = {getattr(resource, limit): (most, most)}
    monkeypatch.setattr(memory, "_system", lambda: 2.0**40)
    monkeypatch.setattr(memory, "machine_memory", lambda: 2.0**40)
    monkeypatch.setattr(resource, "getrlimit", lambda which: of.get(which, unlimited))
    monkeypatch.setattr(memory, "GROUPS", Path("nowhere"))
    assert most - 2**35 < memory.free_memory(CPU) < most - 2**26
    of.clear()
    assert memory.free_memory(CPU) == 2**40


@pytest.mark.parametrize(
    ("group", "inside", "names"),
    [
        ("0::/\n", "", ("memory.max", "memory.current", "")),  # a container's
        ("0::/jobs/7/step\n", "jobs/7", ("memory.max", "memory.current", "")),  # that of a cluster's job
        (
            "2:cpu:/x\n3:hugetlb,memory:/jobs/7\n",
            "memory/jobs/7",
            ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_"),
        ),
    ],
)
def test_a_control_group_s_limit_counts(tmp_path, monkeypatch, group, inside, names):
    limit, used, prefix = names
    folder = tmp_path / "cgroup" / inside
    folder.mkdir(parents=True)
    (folder / limit).write_text("2000000\n")
    (folder / used).write_text("1500000\n")
    (folder / "memory.stat").write_text(f"anon 900000\n{prefix}active_file 200000\n{prefix}inactive_file 100000\n")
    (tmp_path / "groups").write_text(group)
    monkeypatch.setattr(memory, "CGROUP", tmp_path / "cgroup")
    monkeypatch.setattr(memory, "GROUPS", tmp_path / "groups")
    assert memory.free_memory(CPU) == 800_000
    (folder / limit).write_text("max\n")
    assert memory.free_memory(CPU) > 1e6
