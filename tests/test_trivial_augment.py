"""TrivialAugment, operation by operation against torchvision's, image by image."""

import math

import pytest
import torch
from fastai.callback.core import Callback
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as F

from dms_fastai import DMSLoss, TrivialAugment, dms_learner, load_data
from dms_fastai.callbacks.trivial_augment import OPERATIONS, apply, trivial_augment
from tests.conftest import quiet
from tests.test_mixup import Spy, stock_learner

NEAREST = InterpolationMode.NEAREST


def torchvisions(x, name, strength, sign):
    """One image, uint8, as torchvision's TrivialAugmentWide would have it at this strength."""
    shear = math.degrees(math.atan(sign * 0.99 * strength))
    still = {"angle": 0.0, "scale": 1.0, "interpolation": NEAREST}
    return {
        "identity": lambda: x,
        "shear_x": lambda: F.affine(x, translate=[0, 0], shear=[shear, 0.0], center=[0, 0], **still),
        "shear_y": lambda: F.affine(x, translate=[0, 0], shear=[0.0, shear], center=[0, 0], **still),
        "translate_x": lambda: F.affine(x, translate=[int(sign * 32 * strength), 0], shear=[0.0, 0.0], **still),
        "translate_y": lambda: F.affine(x, translate=[0, int(sign * 32 * strength)], shear=[0.0, 0.0], **still),
        "rotate": lambda: F.rotate(x, sign * 135 * strength, interpolation=NEAREST),
        "brightness": lambda: F.adjust_brightness(x, 1 + sign * 0.99 * strength),
        "color": lambda: F.adjust_saturation(x, 1 + sign * 0.99 * strength),
        "contrast": lambda: F.adjust_contrast(x, 1 + sign * 0.99 * strength),
        "sharpness": lambda: F.adjust_sharpness(x, 1 + sign * 0.99 * strength),
        "posterize": lambda: F.posterize(x, 8 - round(6 * strength)),
        "solarize": lambda: F.solarize(x, 255 * (1 - strength)),
        "autocontrast": lambda: F.autocontrast(x),
        "equalize": lambda: F.equalize(x),
    }[name]()


def smooth_images(n, height=32, width=32):
    """Colourful, and even enough for one pixel more or less not to be another image."""
    torch.manual_seed(0)
    coarse = torch.randint(20, 220, (n, 3, 4, 4)).float()
    return torch.nn.functional.interpolate(coarse, (height, width), mode="bilinear").round().to(torch.uint8)


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("size", [(32, 32), (24, 40)])
def test_each_operation_is_torchvisions(name, size, both_ways):
    cases = [(s / 30, sign) for s in (0, 1, 7, 16, 30) for sign in (-1, 1)]
    x = smooth_images(len(cases), *size)
    strength, sign = torch.tensor(cases).T
    ours = apply(x.float(), torch.full((len(cases),), OPERATIONS.index(name)), strength, sign).int()
    for image, mine, (s, way) in zip(x, ours, cases, strict=True):
        theirs = torchvisions(image, name, s, way).int()
        off = (mine - theirs).abs()
        if name in ("shear_x", "shear_y", "rotate"):  # a pixel on the line between two may fall to either
            assert (off > 2).float().mean() < 0.03, (name, s, way)
        else:
            assert off.max() <= 1, (name, s, way)


def test_every_image_draws_for_itself():
    torch.manual_seed(0)
    x = smooth_images(1).expand(400, -1, -1, -1).float()
    out = trivial_augment(x)
    assert out.dtype == torch.uint8
    kinds = {image.numpy().tobytes() for image in out}
    assert 150 < len(kinds) < 390
    unchanged = (out == x).flatten(1).all(1).float().mean()
    assert 1 / 14 < unchanged < 4 / 14  # the identity, strengths of none, and what an image has already


def test_only_training_images_are_changed_and_stay_normalised(dls):
    class Seen(Callback):
        order = 40

        def before_batch(self):
            seen.append((self.learn.training, self.learn.xb[0]))

    seen = []
    learn = quiet(dms_learner(dls, "se", settings={"augment.trivial": True}, cbs=Seen()))
    learn.fit_recipe(1)
    assert isinstance(learn.trivial_augment, TrivialAugment)
    plain = {x.numpy().tobytes() for x in torch.cat([x for x, _ in load_data("digits", bs=64).valid])}
    shown = [x.numpy().tobytes() for training, batch in seen if not training for x in batch]
    assert set(shown) == plain
    for training, x in seen:
        if training:
            pixels = learn.dls.train.decode((x,))[0] * 255
            assert (pixels - pixels.round()).abs().max() < 1e-2
            assert x.is_contiguous(memory_format=torch.channels_last)


def test_alone_in_a_stock_learner():
    spy = Spy()
    stock_learner(DMSLoss(), [TrivialAugment(), spy]).fit(1)
    assert all(x.shape[1:] == (3, 8, 8) for _, x, _ in spy.seen)
