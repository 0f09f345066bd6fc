"""Cutout, CutMix and the switch, mirrored borders and alternating flips: what becomes of images and labels."""

import random

import numpy as np
import pytest
import torch
from fastai.losses import CrossEntropyLossFlat

from dms_fastai import CutMix, Cutout, DMSLoss, MixUp, MixUpOrCutMix, UserError, dms_learner, load_data
from dms_fastai.callbacks.cutmix import cut
from dms_fastai.callbacks.cutout import cutout
from dms_fastai.data.augment import Cropper, Crops
from tests.conftest import quiet
from tests.test_mixup import Spy, stock_learner


def training(spy):
    return [(x, yb) for is_training, x, yb in spy.seen if is_training]


# --- CutMix


def test_a_rectangle_of_the_partner_lies_in_each_image_and_lambda_is_the_rest():
    spy = Spy()
    stock_learner(DMSLoss(), [CutMix(), spy]).fit(8)  # every pixel of an image is its class
    kept = []
    for x, (y_a, y_b, lam) in training(spy):
        torch.testing.assert_close(x[:, 0].mean((1, 2)), lam * y_a + (1 - lam) * y_b)
        kept.append(float(lam))
        changed = (x[:, 0] != y_a[:, None, None]).any(0)
        if changed.any():
            rows, columns = changed.any(1).nonzero(), changed.any(0).nonzero()
            height, width = (int(v.max() - v.min()) + 1 for v in (rows, columns))
            assert int(changed.sum()) == height * width  # a whole rectangle
            assert height * width == round((1 - float(lam)) * 64)
    assert len(set(kept)) > 10
    assert all(0 <= lam <= 1 for lam in kept)


def test_the_rectangles_area_and_place():
    torch.manual_seed(0)
    covered, areas = torch.zeros(32, 32), []
    for _ in range(4000):
        mask, lam = cut(32, 32, torch.tensor(0.75))
        assert lam.item() == pytest.approx(1 - mask.float().mean().item())
        areas.append(mask.sum().item())
        covered += mask
    assert max(areas) == 16 * 16  # a quarter of the area, where the border leaves it whole
    assert np.mean(areas) / 1024 == pytest.approx((0.5 - 0.25 / 4) ** 2, abs=0.01)  # what is cut off at the border
    middle, corner = covered[12:20, 12:20].mean() / 4000, covered[0, 0] / 4000
    assert middle == pytest.approx(0.25, abs=0.03)
    assert corner == pytest.approx(0.25**2, abs=0.03)


@pytest.mark.parametrize(("lam", "share"), [(1.0, 0.0), (0.0, 0.25)])
def test_nothing_and_everything_can_be_cut(lam, share):
    mask, kept = cut(8, 8, torch.tensor(lam))
    assert mask.float().mean() == pytest.approx(1 - kept.item())
    assert mask.float().mean() >= share


@pytest.mark.parametrize(("share", "fewest", "most"), [(0.0, 0, 0), (1.0, 28, 30), (0.5, 8, 22)])
def test_the_switch_gives_each_its_share_of_the_batches(share, fewest, most):
    random.seed(1)
    spy = Spy()
    stock_learner(DMSLoss(), [MixUpOrCutMix(share=share), spy]).fit(10)
    found = 0
    for x, (y_a, y_b, lam) in training(spy):
        torch.testing.assert_close(x[:, 0].mean((1, 2)), lam * y_a + (1 - lam) * y_b)
        found += not torch.equal(x, x[:, :, :1, :1].expand_as(x))  # MixUp leaves these images of one colour
    assert fewest <= found <= most


def test_a_stock_loss_is_asked_about_both_labels():
    spy = Spy()
    learn = stock_learner(CrossEntropyLossFlat(), [CutMix(), spy])
    learn.fit(1)
    assert all(len(yb) == 1 for _, _, yb in spy.seen)
    assert learn.recorder.values[0][0] > 0


# --- Cutout


def test_each_image_loses_a_square_of_its_own():
    torch.manual_seed(0)
    x = cutout(torch.ones(2000, 3, 16, 12), 0.5)
    gone = x[:, 0] == 0
    assert torch.equal(x, x[:, :1].expand_as(x))  # in every channel
    assert int(gone.sum((1, 2)).max()) == 6 * 6
    for image in gone[:50]:
        rows, columns = image.any(1).nonzero(), image.any(0).nonzero()
        assert int(image.sum()) == (rows.max() - rows.min() + 1) * (columns.max() - columns.min() + 1)
    assert len({tuple(image.flatten().tolist()) for image in gone[:50]}) > 30
    centre = gone[:, 6:10, 5:7].float().mean()
    assert centre == pytest.approx(36 / (16 * 12), abs=0.03)


def test_cutout_comes_before_mixing_and_not_in_validation():
    spy = Spy()
    learn = stock_learner(DMSLoss(), [MixUp(), Cutout(0.5), spy])
    learn.fit(1)
    for is_training, x, _ in spy.seen:
        if not is_training:
            assert torch.equal(x, x[:, :, :1, :1].expand_as(x))
    x, (y_a, y_b, lam) = training(spy)[0]
    allowed = torch.stack([lam * y_a + (1 - lam) * y_b, lam * y_a, (1 - lam) * y_b, torch.zeros(len(y_a))])
    distance = (x[:, 0].flatten(1)[None] - allowed[..., None]).abs().amin(0)
    assert distance.max() < 1e-5


@pytest.mark.parametrize(
    "make",
    [lambda: Cutout(0), lambda: Cutout(1.5), lambda: CutMix(0), lambda: MixUpOrCutMix(share=2)],
)
def test_values_that_cannot_be(make):
    with pytest.raises(UserError):
        make()


# --- borders and flips


@pytest.mark.parametrize(("size", "padding"), [(8, 1), (8, 7), (5, 3)])
def test_a_mirrored_border_is_numpys(size, padding):
    images = torch.randint(256, (4, 3, size, size), dtype=torch.uint8)
    cropper = Cropper(images, Crops(pad=padding / size, flip=0.0, border="mirror"))
    width = [(0, 0), (0, 0), (padding, padding), (padding, padding)]
    padded = np.pad(images.numpy(), width, mode="reflect")
    for _ in range(20):
        for number, crop in enumerate(cropper.take(torch.arange(4)).numpy()):
            places = range(2 * padding + 1)
            assert any((padded[number, :, i : i + size, j : j + size] == crop).all() for i in places for j in places)


def test_alternating_flips_show_each_image_both_ways_in_two_epochs():
    dls = load_data("digits", bs=719, pad=0, flip=0.5, alternate=True)
    loader, images = dls.train, dls.train_ds.images  # 2 x 719 images
    unmirrored = []
    for _ in range(4):
        seen = torch.cat([loader.decode((x,))[0] for x, _ in loader]).mul(255).round().to(torch.uint8)
        seen = {image.numpy().tobytes() for image in seen}
        unmirrored.append({i for i, image in enumerate(images) if image.numpy().tobytes() in seen})
    assert unmirrored[0] == unmirrored[2]
    assert unmirrored[1] == unmirrored[3]
    assert unmirrored[0] | unmirrored[1] == set(range(len(images)))
    for epoch in unmirrored[:2]:
        assert 0.45 < len(epoch) / len(images) < 0.55


@pytest.mark.parametrize("change", [lambda x: cutout(x, 0.25), lambda x: CutMix().pair(x, torch.arange(8))[0]])
def test_images_stay_channels_last(change):
    x = torch.randn(8, 3, 16, 16).to(memory_format=torch.channels_last)
    assert change(x).is_contiguous(memory_format=torch.channels_last)


def test_all_of_it_by_recipe():
    settings = {"augment.cutout": 0.25, "cutmix.share": 0.3, "label_smoothing": 0.1}
    dls = load_data("digits", bs=256, border="mirror")
    learn = quiet(dms_learner(dls, "mixup", settings=settings))
    assert learn.mix_up_or_cut_mix.share == 0.3
    assert learn.cutout.size == 0.25
    assert learn.loss_func.label_smoothing == 0.1
    assert not hasattr(learn, "mix_up")
    learn.fit_recipe(1)
    assert quiet(dms_learner(dls, "se", settings={"cutmix.alpha": 0.5})).cut_mix.alpha == 0.5
    with pytest.raises(UserError, match=r"'mixup_or_cutmix\.per'"):
        dms_learner(dls, "mixup", settings={"mixup.per": "sample", "cutmix.alpha": 1.0})
