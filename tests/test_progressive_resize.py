"""Progressive resizing: the sizes of every step, what it costs, and a resume."""

from types import SimpleNamespace

import pytest
import timm
import torch
from fastai.callback.core import Callback
from PIL import Image

from dms_fastai import DMSLoss, ProgressiveResize, UserError, dms_learner, load_data
from dms_fastai.run_folder import Run
from tests.conftest import quiet
from tests.test_mixup import stock_learner
from tests.test_runs import dms, same_run  # noqa: F401  (a fixture)

SIZES = {"progressive_resize.smallest": 0.5, "progressive_resize.grow_at": 0.25, "progressive_resize.full_at": 0.75}


class Sizes(Callback):
    """Notes the side of each batch, in training and in validation."""

    order = 3

    def before_fit(self):
        self.training_sides, self.valid_sides = [], []

    def before_batch(self):
        (self.training_sides if self.training else self.valid_sides).append(self.learn.xb[0].shape[-1])


def test_sides_grow_from_the_smallest_to_the_whole():
    resize = ProgressiveResize(0.5, 0.25, 0.75)
    sides = [resize.side(32, pct / 100) for pct in range(101)]
    assert sides == sorted(sides)
    assert set(sides) == {16, 20, 24, 28, 32}
    assert sides[:38] == [16] * 38  # a quarter of the growth, 0.25 to 0.375, goes by before 20 pixels are full
    assert sides[38] == 20
    assert sides[74] == 28
    assert sides[75:] == [32] * 26
    assert ProgressiveResize(0.1).side(8, 0.0) == 4
    assert ProgressiveResize(1.0).side(30, 0.0) == 28  # a multiple of four, until it is whole
    assert ProgressiveResize(0.5).shape((3, 64, 32), 0.0) == (3, 32, 16)
    assert ProgressiveResize(0.5, 0.5, 0.5).side(32, 0.49) == 16
    assert ProgressiveResize(0.5, 0.5, 0.5).side(32, 0.5) == 32


def test_training_images_are_small_and_validated_ones_whole():
    sizes = Sizes()
    learn = quiet(dms_learner(load_data("digits", size=32), "se", arch="test_dmsresnet", settings=SIZES, cbs=sizes))
    learn.fit_recipe(4)
    steps = len(learn.dls.train)
    assert sizes.training_sides[: steps + 1] == [16] * (steps + 1)
    assert sizes.training_sides[3 * steps + 1 :] == [32] * (steps - 1)
    assert set(sizes.valid_sides) == {32}
    learn = stock_learner(DMSLoss(), [ProgressiveResize(), Sizes()])
    learn.fit(2)
    assert learn.sizes.training_sides[0] < learn.sizes.training_sides[-1] == learn.sizes.valid_sides[0]


def test_images_are_made_smaller_as_pil_does():
    images = torch.randint(256, (4, 3, 32, 32), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)

    class Fit:
        xb, pct_train, training, dls = (images.float(),), 0.0, True, SimpleNamespace(train_ds=None)

    resize = ProgressiveResize(0.5)
    resize.learn = Fit()
    resize.before_batch()
    [small] = resize.learn.xb
    for image, ours in zip(images, small, strict=True):
        theirs = Image.fromarray(image.permute(1, 2, 0).numpy()).resize((16, 16), Image.Resampling.BILINEAR)
        theirs = torch.tensor(list(theirs.getdata())).view(16, 16, 3).permute(2, 0, 1)
        assert (ours - theirs).abs().max() <= 1  # PIL rounds after each of two passes


def test_a_run_counts_the_work_at_the_sizes_that_it_trained_on_and_resumes_bit_for_bit(dms, tmp_path):  # noqa: F811
    settings = [f"{key}={value}" for key, value in SIZES.items()]
    args = ["run", "se", "--arch", "test_dmsresnet", "--epochs", 4, "--set", "data.size=32", "--device", "cpu"]
    args += [word for setting in settings for word in ("--set", setting)]
    assert dms(*args, "--out", "whole")[0] == 0
    while (code := dms(*args, "--out", "parts", "--time-limit", "0.5s")[0]) == 75:
        pass
    assert code == 0
    same_run(tmp_path / "whole" / "se" / "seed0", tmp_path / "parts" / "se" / "seed0")
    facts = Run.read(tmp_path / "whole" / "se" / "seed0").facts

    def counted(size):
        network, seen = timm.create_model("test_dmsresnet", num_classes=10).eval(), []
        for module in network.modules():
            if isinstance(module, (torch.nn.Conv2d, torch.nn.Linear)):
                module.register_forward_hook(lambda m, _, y: seen.append(m.weight[0].numel() * y[0].numel()))
        network(torch.zeros(1, 3, size, size))
        return sum(seen)

    assert facts.macs == counted(32)
    means = (counted(16), (counted(16) + counted(20)) / 2, (counted(24) + counted(28)) / 2, counted(32))
    assert facts.train_pflop.student == pytest.approx(6 * sum(means) * 22 * 64 / 1e15, rel=0.02)


def test_what_does_not_fit_is_refused_before_the_first_step():
    with pytest.raises(UserError, match=r"grow_at is 0\.8; it must be at most full_at, which is 0\.75"):
        ProgressiveResize(grow_at=0.8)
    with pytest.raises(UserError, match="ProgressiveResize's smallest is 0; it must be above 0"):
        ProgressiveResize(0)
    settings = {"progressive_resize.smallest": 0.25}
    with pytest.raises(UserError, match=r"raise progressive_resize\.smallest"):
        dms_learner(load_data("digits", size=32), "se", arch="test_vit", settings=settings)


def test_a_network_has_to_take_every_size():
    """Its patches have 16 pixels a side, and 36 is between 32 and 64."""
    dls = load_data("digits", size=64, bs=64, device="cpu")
    arch = {"model.args": {"patch_size": 16, "dynamic_img_size": True}, "progressive_resize.smallest": 0.5}
    with pytest.raises(UserError, match=r"raise progressive_resize\.smallest"):
        dms_learner(dls, "se", arch="test_vit", settings=arch)
