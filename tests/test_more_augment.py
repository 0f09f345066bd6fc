"""Enlarged crops, RandAugment, affine maps, erasing and partners, against PIL, torchvision or timm image by image."""

import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from fastai.vision.data import ImageDataLoaders
from PIL import Image
from timm.data import auto_augment
from timm.data.random_erasing import RandomErasing as TimmErasing
from torchvision.transforms import RandomResizedCrop
from torchvision.transforms.v2 import functional as F

from dms_fastai import (
    CutMix,
    DMSLoss,
    MixUp,
    MixUpOrCutMix,
    RandAugment,
    RandomAffine,
    RandomErasing,
    TrivialAugment,
    UserError,
    dms_learner,
    load_data,
    load_recipe,
)
from dms_fastai.callbacks.affine import affine_map
from dms_fastai.callbacks.erasing import erase
from dms_fastai.callbacks.rand_augment import apply
from dms_fastai.data.augment import Cropper, Crops
from dms_fastai.data.boxes import random_sides, resized_crops
from dms_fastai.data.operations import OPERATIONS
from tests.conftest import quiet
from tests.test_augment import training
from tests.test_mixup import Spy, stock_learner
from tests.test_runs import dms, same_run  # noqa: F401  (a fixture)
from tests.test_speed import FromTheSecondStepToTheLast, Waits
from tests.test_trivial_augment import smooth_images

ALL = {
    "affine": True,
    "rand_augment": True,
    "erasing.prob": 0.5,
    "mixup_or_cutmix.partner": "reversed",
    "mixup": False,
}


# --- Enlarged crops

BOXES = [(0, 0, 40, 32), (3, 5, 33, 27), (0, 31, 40, 1), (39, 0, 1, 32), (7, 4, 8, 9), (1, 0, 39, 31)]


@pytest.mark.parametrize("bicubic", [False, True])
def test_an_enlarged_crop_is_torchvisions(bicubic):
    x = torch.randint(256, (len(BOXES), 3, 40, 32), dtype=torch.uint8)  # noise, where every weight counts
    ours = resized_crops(x, *torch.tensor(BOXES).float().T, torch.full((len(BOXES),), bicubic))
    assert ours.dtype == torch.uint8
    assert ours.is_contiguous(memory_format=torch.channels_last)
    mode = F.InterpolationMode.BICUBIC if bicubic else F.InterpolationMode.BILINEAR
    for image, mine, box in zip(x, ours, BOXES, strict=True):
        theirs = F.resized_crop(image, *box, [40, 32], mode, antialias=True)
        assert (mine.int() - theirs.int()).abs().max() <= 1, box


def test_images_of_one_batch_have_interpolations_of_their_own():
    x = torch.randint(256, (2, 3, 16, 16), dtype=torch.uint8)
    box = torch.tensor([[2, 2, 9, 11]] * 2).float().T
    both = resized_crops(x, *box, torch.tensor([True, False]))
    for index, bicubic in enumerate((True, False)):
        assert torch.equal(both[index], resized_crops(x, *box, torch.full((2,), bicubic))[index])


@pytest.mark.parametrize("area", [(0.08, 1.0), (0.8, 1.0)])
def test_the_sides_are_as_torchvision_draws_them(area):
    image = torch.zeros(3, 32, 32)
    theirs = torch.tensor([RandomResizedCrop.get_params(image, area, (3 / 4, 4 / 3))[2:] for _ in range(4000)]).float()
    ours = torch.stack(random_sides(20_000, (32, 32), 1024, area, 0.75, torch.device("cpu")), 1)
    ours = torch.where(ours == 0, 32, ours)  # where none fits, all of the image
    torch.testing.assert_close(ours.mean(0), theirs.mean(0), rtol=0, atol=0.4)
    torch.testing.assert_close(ours.std(0), theirs.std(0), rtol=0, atol=0.3)
    assert ours.min() >= 1
    assert ours.max() <= 32


def test_the_loader_shows_parts_of_the_drawn_area_everywhere_in_the_image():
    place = torch.arange(32)
    image = torch.stack([8 * place[:, None].expand(32, 32), 8 * place.expand(32, 32), torch.zeros(32, 32)])
    cropper = Cropper(image[None].to(torch.uint8), Crops(pad=0.0, flip=0.0, min_area=0.5, interpolation="bilinear"))
    x = cropper.take(torch.zeros(500, dtype=torch.long)).int() // 8
    assert x.shape == (500, 3, 32, 32)
    top, bottom, left, right = x[:, 0, 0, 0], x[:, 0, -1, 0], x[:, 1, 0, 0], x[:, 1, 0, -1]
    height, width = bottom - top + 1, right - left + 1
    assert 0.47 < (height * width / 1024).min() < 0.55  # sides are whole pixels
    assert (height * width / 1024).max() > 0.95
    assert 0.7 < (width / height).min() < 0.8
    assert 1.25 < (width / height).max() < 1.45
    assert top.min() == left.min() == 0
    assert bottom.max() == right.max() == 31
    assert len(set(zip(top.tolist(), left.tolist(), strict=True))) > 50


def test_without_a_part_the_loader_draws_and_shows_what_it_did():
    def batch(**crops):
        torch.manual_seed(0)
        return load_data("digits", bs=64, **crops).one_batch()[0], torch.get_rng_state()

    (plain, state), (whole, again) = batch(), batch(min_area=1.0)
    assert torch.equal(plain, whole)
    assert torch.equal(state, again)
    assert not torch.equal(plain, batch(min_area=0.8)[0])


# --- RandAugment

TIMM = {
    **{"shear_x": "ShearX", "shear_y": "ShearY", "translate_x": "TranslateXRel", "translate_y": "TranslateYRel"},
    **{"rotate": "Rotate", "autocontrast": "AutoContrast", "equalize": "Equalize", "invert": "Invert"},
    **{"posterize": "PosterizeIncreasing", "solarize": "SolarizeIncreasing", "solarize_add": "SolarizeAdd"},
    **{name: f"{name.title()}Increasing" for name in ("brightness", "color", "contrast", "sharpness")},
}
MOVES = OPERATIONS[1:6]
FILL = (125, 123, 114)


def test_the_operations_are_timms():
    assert set(TIMM) == set(OPERATIONS[1:])
    assert set(TIMM.values()) == set(auto_augment._RAND_INCREASING_TRANSFORMS)


def timms(image, name, magnitude, sign, bicubic, monkeypatch):
    """One image, uint8, as timm changes it with PIL."""
    if name == "posterize" and magnitude == 10:
        return torch.zeros_like(image)  # no bit is left, which PIL refuses today
    flipped = -sign if "translate" in name else sign  # theirs move the other way
    monkeypatch.setattr(auto_augment, "_randomly_negate", lambda value: flipped * value)
    method = Image.Resampling.BICUBIC if bicubic else Image.Resampling.BILINEAR
    operation = auto_augment.AugmentOp(
        TIMM[name], prob=1.0, magnitude=magnitude, hparams={"img_mean": FILL, "interpolation": method}
    )
    return F.pil_to_tensor(operation(F.to_pil_image(image)))


@pytest.mark.parametrize("name", OPERATIONS[1:])
@pytest.mark.parametrize("size", [(32, 32), (24, 40)])
def test_each_operation_is_timms(name, size, monkeypatch, both_ways):
    cases = [(m, sign, cubic) for m in (0.0, 2.4, 7.5, 9.0, 10.0) for sign in (-1, 1) for cubic in (False, True)]
    x = smooth_images(len(cases), *size)
    magnitude, sign, bicubic = torch.tensor(cases).T
    index = torch.full((len(cases),), OPERATIONS.index(name))
    fill = torch.tensor(FILL).float().view(1, 3, 1, 1)
    ours = apply(x.float(), index, magnitude, sign, bicubic.bool(), fill).int()
    for image, mine, case in zip(x, ours, cases, strict=True):
        off = (mine - timms(image, name, *case, monkeypatch).int()).abs()
        if name in MOVES:  # at the edge a pixel may be inside or outside; PIL's cubic kernel is a little sharper
            assert (off > (3 if case[2] else 1)).float().mean() < 0.01, case
        else:
            assert off.max() <= 2, case


def test_an_image_is_changed_by_its_own_operation_whatever_others_draw(both_ways):
    n = 20 * len(OPERATIONS)
    x, index = smooth_images(n).float(), torch.randint(len(OPERATIONS), (n,))
    drawn = index, 10 * torch.rand(n), 2 * torch.randint(2, (n,)) - 1, torch.rand(n) < 0.5
    fill = torch.tensor(FILL).float().view(1, 3, 1, 1)
    given = x.clone()
    together = apply(x, *drawn, fill)
    alone = [apply(x[i : i + 1], *(each[i : i + 1] for each in drawn), fill) for i in range(n)]
    assert torch.equal(together, torch.cat(alone))
    assert torch.equal(x, given)
    changed = (together != x).flatten(1).any(1)
    assert not changed[index == 0].any()
    assert changed[index != 0].float().mean() > 0.7


@pytest.mark.parametrize(
    ("settings", "fewest", "most"), [({"prob": 0.0}, 0, 0), ({"num_ops": 1}, 0.4, 0.55), ({}, 0.6, 0.8)]
)
def test_images_draw_for_themselves(settings, fewest, most):
    x = smooth_images(1).expand(600, -1, -1, -1).float()
    changed = RandAugment(**settings).change(x, torch.full((1, 3, 1, 1), 120.0))
    share = (changed != x).flatten(1).any(1).float().mean().item()
    assert fewest <= share <= most
    assert changed.min() >= 0
    assert changed.max() <= 255


def test_the_magnitude_varies_and_stays_within_its_range(monkeypatch):
    seen = []

    def note(x, operation, magnitude, *more):
        seen.append(magnitude)
        return x

    monkeypatch.setattr("dms_fastai.callbacks.rand_augment.apply", note)
    RandAugment(num_ops=1, magnitude=9.0, magnitude_std=0.5).change(
        torch.zeros(20_000, 3, 8, 8), torch.zeros(1, 3, 1, 1)
    )
    assert seen[0].max() == 10
    below = seen[0] < 9
    assert below.float().mean() == pytest.approx(0.5, abs=0.02)
    assert (seen[0][below] - 9).square().mean().sqrt() == pytest.approx(0.5, abs=0.02)


def test_a_moved_image_ends_in_the_mean_of_the_data(dls):
    """On black images, invert and solarize_add aside, nothing else can be seen."""
    x = torch.zeros(64, 3, 32, 32)
    mean = torch.tensor(dls.train.mean).view(1, 3, 1, 1) * 255
    assert mean.round().flatten().tolist() == list(FILL)
    colours = RandAugment(num_ops=1, prob=1.0).change(x, mean).permute(0, 2, 3, 1).reshape(-1, 3).unique(dim=0)
    assert list(FILL) in colours.int().tolist()


@pytest.mark.parametrize("make", [TrivialAugment, RandAugment])
@pytest.mark.parametrize("mean", [(0.4,), (0.0, 0.0, 0.0)], ids=["own", "fastai's without any"])
def test_grey_images_are_changed_as_three_equal_channels_and_stay_grey(make, mean):
    grey, std, shown = smooth_images(60)[:, :1], (0.5,) * len(mean), []
    for channels in (1, 3):
        callback, dls = make(), SimpleNamespace(train=SimpleNamespace(mean=mean, std=std))
        x = ((grey / 255 - mean[0]) / 0.5).expand(-1, channels, -1, -1)
        callback.learn = SimpleNamespace(xb=(x,), dls=dls)
        torch.manual_seed(1)
        callback.before_batch()
        shown.append(callback.learn.xb[0])
    assert shown[0].shape == grey.shape
    torch.testing.assert_close(shown[0], shown[1][:, :1])
    assert (shown[0] != x[:, :1]).flatten(1).any(1).float().mean() > 0.5


# --- Affine maps


@pytest.mark.parametrize("size", [(32, 32), (24, 40)])
def test_an_affine_map_is_torchvisions(size):
    n = 12
    x = torch.randn(n, 3, *size)
    right, down, angle = (torch.empty(n).uniform_(-9, 9) for _ in range(3))
    zoom, shear = torch.empty(n).uniform_(0.8, 1.25), torch.empty(n).uniform_(-20, 20)
    ours = affine_map(x, right, down, zoom, shear, angle)
    for image, mine, *values in zip(x, ours, right, down, zoom, shear, angle, strict=True):
        r, d, z, s, a = (float(value) for value in values)
        mode = F.InterpolationMode.BILINEAR
        theirs = F.affine(image, angle=a, translate=[r, d], scale=z, shear=[s, 0.0], interpolation=mode)
        torch.testing.assert_close(mine, theirs, rtol=0, atol=2e-3)


def test_every_change_can_be_left_out():
    spy = Spy()
    stock_learner(DMSLoss(), [RandomAffine(0.0, 0.0, 0.0, 0.0), spy]).fit(1)
    for _, x, (y, *_) in spy.seen:
        torch.testing.assert_close(x[:, 0, 0, 0], y.float())


@pytest.mark.parametrize(
    ("settings", "furthest"),
    [({"shift": 0.25}, 8), ({"zoom": 0.5}, 3.5), ({"shear": 45.0}, 3.5), ({"rotation": 90.0}, 7)],
)
def test_an_amount_is_the_most_that_is_drawn(settings, furthest):
    """A column's pixels are its distance from the middle; 8x8 of them are looked at, whose corners move furthest."""
    affine = RandomAffine(**({"shift": 0.0, "zoom": 0.0, "shear": 0.0, "rotation": 0.0} | settings))
    ramp = torch.arange(32.0).expand(2000, 3, 32, 32) - 15.5
    affine.learn = SimpleNamespace(xb=(ramp,))
    affine.before_batch()
    moved = (affine.learn.xb[0] - ramp)[:, 0, 12:20, 12:20].abs().amax((1, 2))
    assert 0.9 * furthest < moved.max() <= furthest + 0.01
    assert moved.min() < 0.1 * furthest


# --- Erasing


@pytest.mark.parametrize("mode", ["pixel", "mean"])
def test_a_rectangle_of_the_drawn_area_is_filled(mode, both_ways):
    x = erase(torch.full((2000, 3, 32, 24), 9.0), 1.0, (0.02, 1 / 3), 0.3, mode)
    gone = x[:, 0] != 9
    assert torch.equal((x != 9), gone[:, None].expand_as(x))
    for image in gone[:200]:
        rows, columns = image.any(1).nonzero(), image.any(0).nonzero()
        assert int(image.sum()) == (rows.max() - rows.min() + 1) * (columns.max() - columns.min() + 1)
    noise = x[(x != 9)]
    if mode == "mean":
        assert noise.unique().tolist() == [0]
    else:
        assert noise.mean() == pytest.approx(0, abs=0.01)
        assert noise.std() == pytest.approx(1, abs=0.01)
        assert len(noise.unique()) > 0.9 * len(noise)  # of each pixel and channel its own


def test_rectangles_are_as_large_and_lie_as_timms_do():
    random.seed(0)
    theirs = TimmErasing(1.0, mode="const", device="cpu")(torch.ones(3000, 1, 32, 32))[:, 0] == 0
    ours = erase(torch.ones(12_000, 1, 32, 32), 1.0, (0.02, 1 / 3), 0.3, "mean")[:, 0] == 0
    for kind in (
        lambda gone: gone.any(2).sum(1).float(),  # heights
        lambda gone: gone.any(1).sum(1).float(),
        lambda gone: gone.sum((1, 2)).float() / 10,
    ):
        assert kind(ours).mean() == pytest.approx(kind(theirs).mean(), abs=0.5)
        assert kind(ours).std() == pytest.approx(kind(theirs).std(), abs=0.5)
    torch.testing.assert_close(ours.float().mean(0), theirs.float().mean(0), rtol=0, atol=0.04)


def test_some_images_are_left_alone():
    x = erase(torch.ones(4000, 3, 8, 8), 0.25, (0.02, 1 / 3), 0.3, "mean")
    assert (x == 0).flatten(1).any(1).float().mean() == pytest.approx(0.25, abs=0.03)


def test_what_is_erased_is_not_mixed_afterwards():
    spy = Spy()
    stock_learner(DMSLoss(), [RandomErasing(1.0, mode="mean"), MixUp(), spy]).fit(2)
    for x, (y_a, y_b, lam) in training(spy):
        mixed = (lam * y_a + (1 - lam) * y_b).view(-1, 1, 1, 1).expand_as(x)
        torch.testing.assert_close(x, torch.where(x == 0, 0.0, mixed))
        assert 0.02 < (x == 0).float().mean() < 0.6


# --- Partners


@pytest.mark.parametrize("mixer", [MixUp, CutMix, MixUpOrCutMix])
def test_reversed_partners_are_the_batch_from_its_end(mixer):
    spy = Spy()
    stock_learner(DMSLoss(), [mixer(partner="reversed"), spy]).fit(2)
    for x, (y_a, y_b, lam) in training(spy):
        assert torch.equal(y_b, y_a.flip(0))
        torch.testing.assert_close(x[:, 0].mean((1, 2)), lam * y_a + (1 - lam) * y_b)


def test_random_partners_draw_as_before():
    x, y = torch.randn(8, 3, 4, 4), torch.arange(8)
    torch.manual_seed(5)
    _, partners, lam = MixUp(0.4).pair(x, y)
    torch.manual_seed(5)
    assert torch.equal(lam, torch.distributions.Beta(torch.tensor(0.4), torch.tensor(0.4)).sample())
    assert torch.equal(partners, torch.randperm(8))


# --- Beside the rest


def test_all_of_it_by_recipe_and_none_by_default():
    recipe = load_recipe("mixup", settings=ALL | {"augment.min_area": 0.6})
    assert recipe.augment.min_area == 0.6
    assert recipe.mixup_or_cutmix.partner == "reversed"
    plain = load_recipe("kd")
    assert (plain.affine, plain.rand_augment, plain.erasing, plain.drop_block) == (None, None, None, None)
    assert (plain.augment.min_area, plain.mixup.partner) == (1.0, "random")


def test_the_teacher_sees_what_the_student_sees_and_validation_is_plain(teacher):
    student, taught = [], []
    dls = load_data("digits", bs=64, min_area=0.6)
    learn = quiet(dms_learner(dls, "kd", teacher=teacher, settings=ALL))
    handles = learn.model.register_forward_pre_hook(lambda _, args: student.append((learn.training, args[0].clone())))
    after_pred = learn.teacher_distill.after_pred

    def note():
        taught.append(learn.xb[0].clone())
        after_pred()

    learn.teacher_distill.after_pred = note
    learn.fit_recipe(1)
    handles.remove()
    shown = [x for is_training, x in student if is_training]
    assert len(shown) == len(taught) == len(dls.train)
    assert all(torch.equal(a, b) for a, b in zip(shown, taught, strict=True))
    plain = torch.cat([x for x, _ in load_data("digits", bs=64).valid])
    assert torch.equal(torch.cat([x for is_training, x in student if not is_training]), plain)


@pytest.mark.parametrize("part", [RandAugment, RandomAffine, RandomErasing])
def test_images_stay_channels_last(dls, part):
    spy = Spy()
    quiet(dms_learner(dls, "se", cbs=[part(), spy])).fit_recipe(1)
    assert all(x.is_contiguous(memory_format=torch.channels_last) for _, x, _ in spy.seen)
    assert all(x.dtype == torch.float32 for _, x, _ in spy.seen)


def test_callbacks_have_no_part_in_fastais_test_time_augmentation():
    dls = load_data("digits", bs=719, pad=0.0)
    learn = quiet(dms_learner(dls, "mixup", settings=ALL))
    torch.testing.assert_close(learn.tta(n=2, beta=None)[0][0], learn.get_preds()[0])


def test_nothing_waits_for_the_device(ahead):
    dls = load_data("digits", bs=64, min_area=0.6)
    learn = quiet(dms_learner(dls, "mixup", settings=ALL))
    waits = Waits()
    learn.fit_recipe(1, cbs=FromTheSecondStepToTheLast(waits))
    assert waits.seen == []


def test_a_stopped_run_ends_as_if_it_had_not_stopped(dms, tmp_path):  # noqa: F811
    args = ["run", "mixup", "--epochs", 2, "--device", "cpu", "--set", "data.batch_size=512"]
    for key, value in {"augment.min_area": 0.6, **ALL}.items():
        args += ["--set", f"{key}={str(value).lower()}"]
    assert dms(*args, "--out", "whole")[0] == 0
    for _ in range(3):
        assert dms(*args, "--out", "pieces", "--time-limit", "0.001s")[0] == 75
    assert dms(*args, "--out", "pieces")[0] == 0
    same_run(tmp_path / "whole" / "mixup" / "seed0", tmp_path / "pieces" / "mixup" / "seed0")


@pytest.mark.parametrize(
    "make", [lambda: RandAugment(), lambda: RandomAffine(rotation=20.0), lambda: RandomErasing(1.0)]
)
def test_alone_in_a_stock_learner_over_stock_loaders(make, tmp_path):
    """Loaders of fastai's own, whose batches are a kind of tensor of their own."""
    for split in ("train", "valid"):
        for label in "ab":
            (tmp_path / split / label).mkdir(parents=True)
            for index in range(4):
                pixels = np.random.default_rng(index).integers(0, 256, (16, 16, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / split / label / f"{index}.png")
    dls = ImageDataLoaders.from_folder(tmp_path, bs=4, num_workers=0)
    spy = Spy()
    learn = stock_learner(DMSLoss(), [make(), spy])
    learn.dls = dls
    learn.fit(1)
    assert {x.shape for _, x, _ in spy.seen} == {(4, 3, 16, 16)}
    assert all(x.isfinite().all() for _, x, _ in spy.seen)


@pytest.mark.parametrize(
    "make",
    [
        lambda: RandAugment(magnitude=11),
        lambda: RandAugment(num_ops=0),
        lambda: RandomAffine(zoom=1.0),
        lambda: RandomAffine(shear=90),
        lambda: RandomErasing(min_area=0.5),  # above max_area
        lambda: RandomErasing(mode="rand"),
        lambda: MixUp(partner="next"),
        lambda: Crops(min_area=0),
        lambda: Crops(interpolation="nearest"),
    ],
)
def test_values_that_cannot_be(make):
    with pytest.raises(UserError):
        make()


@pytest.mark.parametrize("kind", [TrivialAugment, RandAugment])
@pytest.mark.parametrize("shape", [(4, 8, 8), (2, 8, 8), (3, 2, 9), (1, 8, 1)])
def test_images_that_cannot_be_changed_are_refused_in_a_line(kind, shape):
    images = SimpleNamespace(xb=(torch.zeros(2, *shape),))
    callback = kind()
    callback.learn = images
    with pytest.raises(
        UserError, match=f"{kind.__name__} changes images of 1 or 3 channels, 3 pixels or more"
    ) as error:
        callback.before_batch()
    assert str(shape) in error.value.message
