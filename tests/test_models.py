"""The architectures: exact sizes, and everything that timm expects of an entry."""

import pytest
import timm
import torch
from timm.models import group_parameters
from torch import nn
from torch.fx import symbolic_trace

import dms_fastai  # noqa: F401  (registers the architectures)

COUNTS = {
    "dmsresnet": 4_697_742,
    "dmsresnet_plain": 4_697_162,
    "dmsresnet_seblocks": 4_733_610,
    "dmsresnet50": 23_521_422,
}
NAMES = [*COUNTS, "dmsresnet_lite", "test_dmsresnet", "test_dmsresnet_plain"]
SMALL = ["test_dmsresnet", "test_dmsresnet_plain", "dmsresnet50"]


def parameters(model):
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(("name", "count"), COUNTS.items())
def test_parameter_count_is_exact(name, count):
    assert parameters(timm.create_model(name)) == count


def test_lite_keeps_the_papers_promise_and_the_test_model_is_small():
    assert parameters(timm.create_model("dmsresnet_lite")) <= 4_367_742
    assert 20_000 < parameters(timm.create_model("test_dmsresnet")) < 60_000


@pytest.mark.parametrize(("name", "gmac"), [("dmsresnet", 0.799), ("dmsresnet50", 1.298)])
def test_forward_cost_at_32_pixels(name, gmac):
    """Multiply-adds of convolutions and the classifier, counted from the shapes that pass through."""
    model, macs = timm.create_model(name).eval(), []

    def count(module, _, output):
        macs.append(module.weight.numel() * (output[0, 0].numel() if output.ndim == 4 else 1))

    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            module.register_forward_hook(count)
    with torch.no_grad():
        model(torch.randn(1, 3, 32, 32))
    assert sum(macs) / 1e9 == pytest.approx(gmac, abs=0.001)


def test_one_squeeze_excitation_acts_after_the_stem_and_none_in_the_plain_network():
    def where(name):
        return [n for n, m in timm.create_model(name).named_modules() if type(m).__name__ == "SEModule"]

    assert where("dmsresnet") == where("dmsresnet50") == ["se"]
    assert where("dmsresnet_plain") == []
    assert len(where("dmsresnet_seblocks")) == 11
    assert "se" not in where("dmsresnet_seblocks")


def test_dropout_follows_every_block_and_precedes_the_classifier():
    model = timm.create_model("dmsresnet", drop_rate=0.1)
    assert [m.p for m in model.modules() if isinstance(m, nn.Dropout)] == [0.1] * 12
    assert isinstance(model.head_drop, nn.Dropout)


@pytest.mark.parametrize("name", NAMES)
def test_every_parameter_gets_a_gradient_and_the_head_has_any_size(name):
    model = timm.create_model(name, num_classes=42, in_chans=1)
    output = model(torch.randn(2, 1, 16, 16))
    assert output.shape == (2, 42)
    output.mean().backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("name", NAMES)
def test_default_cfg_says_the_truth(name):
    model = timm.create_model(name).eval()
    cfg, state = model.default_cfg, model.state_dict()
    x = torch.randn(1, *cfg["input_size"])
    with torch.no_grad():
        assert model.forward_features(x).shape[-2:] == cfg["pool_size"]
        assert model(x).shape == (1, cfg["num_classes"])
        assert model.forward_head(model.forward_features(x), pre_logits=True).shape == (1, model.num_features)
        model.reset_classifier(0)
        assert model(x).shape == (1, model.num_features)
        model.reset_classifier(0, "")
        assert model(x).shape[-2:] == cfg["pool_size"]
        model.reset_classifier(7, "avg")
        assert model(x).shape == (1, 7)
    assert model.num_classes == 7
    assert model.get_classifier() is model.fc
    assert {f"{cfg['classifier']}.weight", f"{cfg['first_conv']}.weight"} <= set(state)


@pytest.mark.parametrize("name", SMALL)
def test_features_and_intermediates_are_the_same_maps(name):
    features, model = timm.create_model(name, features_only=True).eval(), timm.create_model(name).eval()
    features.load_state_dict({k.replace("stages.", "stages_"): v for k, v in model.state_dict().items()}, strict=False)
    x = torch.randn(2, 3, 24, 24)
    with torch.no_grad():
        maps = features(x)
        final, intermediates = model.forward_intermediates(x)
        last = model.forward_intermediates(x, indices=1, intermediates_only=True)
        first = model.forward_intermediates(x, indices=[0, 1], stop_early=True, intermediates_only=True)
    assert [m.shape[1] for m in maps] == features.feature_info.channels()
    assert [24 // m.shape[-1] for m in maps] == features.feature_info.reduction()
    for one, other in zip(maps, intermediates, strict=True):
        torch.testing.assert_close(one, other)
    torch.testing.assert_close(final, last[0])
    assert [m.shape for m in first] == [m.shape for m in maps[:2]]
    with pytest.raises(ValueError, match="NCHW"):
        model.forward_intermediates(x, output_fmt="NLC")


def test_pruned_stages_leave_the_earlier_maps_as_they_were():
    model = timm.create_model("test_dmsresnet").eval()
    x = torch.randn(1, 3, 16, 16)
    before = model.forward_intermediates(x, indices=[1], intermediates_only=True)[0]
    model.prune_intermediate_layers([1])
    torch.testing.assert_close(model(x), before)


@pytest.mark.parametrize("name", SMALL)
def test_scripts_and_traces(name):
    model = timm.create_model(name, scriptable=True).eval()
    x = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        expected = model(x)
        torch.testing.assert_close(torch.jit.script(model)(x), expected)
        torch.testing.assert_close(symbolic_trace(model)(x), expected)


def test_checkpointing_changes_no_gradient():
    x = torch.randn(4, 3, 16, 16)
    model = timm.create_model("test_dmsresnet", drop_rate=0.1)

    def gradients(enable):
        torch.manual_seed(1)
        model.zero_grad()
        model.set_grad_checkpointing(enable)
        model(x).square().sum().backward()
        return [p.grad.clone() for p in model.parameters()]

    for plain, checkpointed in zip(gradients(False), gradients(True), strict=True):
        torch.testing.assert_close(plain, checkpointed)


@pytest.mark.parametrize("size", [8, 9, 17, 64])
@pytest.mark.parametrize("name", SMALL)
def test_any_size_from_8_pixels_up(name, size):
    with torch.no_grad():
        assert timm.create_model(name).eval()(torch.randn(1, 3, size, size)).isfinite().all()


@pytest.mark.parametrize("coarse", [False, True])
def test_group_matcher_orders_every_parameter_by_depth(coarse):
    model = timm.create_model("dmsresnet_seblocks")
    groups = group_parameters(model, model.group_matcher(coarse))
    names = [name for group in groups.values() for name in group]
    assert sorted(names) == sorted(name for name, _ in model.named_parameters())
    assert len(groups) == 1 + (3 if coarse else 11) + 1


def test_initialisation_is_torchs_own():
    """Kaiming-uniform with a = sqrt(5): every weight within +-1 / sqrt(fan in), and spread over that range."""
    weight = timm.create_model("dmsresnet").stages[0][0].residual[0].weight
    bound = (64 * 9) ** -0.5
    assert weight.abs().max() <= bound
    assert weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.02)
