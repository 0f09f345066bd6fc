"""The architectures: exact sizes, and everything that timm expects of an entry."""

import pytest
import timm
import torch
import torch.nn.functional as F
from functorch.compile import aot_function, nop
from timm.layers import SEModule, get_notrace_functions, get_notrace_modules
from timm.models import group_parameters
from timm.task import LogitDistillationTask
from torch import nn
from torch.fx import symbolic_trace
from torch.fx.experimental.proxy_tensor import make_fx
from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

import dms_fastai  # noqa: F401  (registers the architectures)
from dms_fastai.models.dropout import Dropout, dropout
from dms_fastai.models.fold import fold_batch_norms
from dms_fastai.models.macs import macs

COUNTS = {
    "dmsresnet": 4_697_742,
    "dmsresnet_plain": 4_697_162,
    "dmsresnet_seblocks": 4_733_610,
    "dmsresnet50": 23_521_422,
    "dmsresnet_wide": 36_693_460,
    "dmsresnet_small": 506_380,
    "dmsresnet_mini": 73_691,
}
NAMES = [*COUNTS, "dmsresnet_lite", "test_dmsresnet", "test_dmsresnet_plain"]
SMALL = ["dmsresnet_mini", "test_dmsresnet", "test_dmsresnet_plain", "dmsresnet50"]


def parameters(model):
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(("name", "count"), COUNTS.items())
def test_parameter_count_is_exact(name, count):
    assert parameters(timm.create_model(name)) == count


def test_lite_keeps_the_papers_promise_and_the_test_model_is_small():
    assert parameters(timm.create_model("dmsresnet_lite")) <= 4_367_742
    assert 20_000 < parameters(timm.create_model("test_dmsresnet")) < 60_000


@pytest.mark.parametrize(("name", "gmac"), [("dmsresnet", 0.799), ("dmsresnet50", 1.298), ("dmsresnet_small", 0.076)])
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


def test_the_member_for_microcontrollers_is_no_larger_than_mlperf_tinys_resnet():
    """12.5 M MACs and 78,666 parameters, for images of 32x32 pixels."""
    model = timm.create_model("dmsresnet_mini")
    assert parameters(model) <= 78_666
    assert macs(model, (3, 32, 32)) <= 12.5e6


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(3, 7), (5, 3, 9, 11), (2, 64, 32, 32)])
def test_dropout_drops_its_share_and_scales_the_rest(shape, dtype):
    x = torch.ones(shape, dtype=dtype, requires_grad=True)
    y = dropout(x, 0.25, True)
    y.backward(torch.ones_like(y))
    assert y.dtype == dtype
    assert set(y.detach().float().unique().tolist()) <= {0.0, float(torch.tensor(1 / 0.75, dtype=dtype))}
    assert torch.equal(x.grad, y)  # what was dropped gets no gradient, the rest is scaled alike
    n = x.numel()
    if n > 1000:
        gap = ((y == 0).float().mean() - 0.25).abs()
        assert gap < 5 * (0.25 * 0.75 / n) ** 0.5


def test_dropout_is_drawn_anew_from_torchs_random_state_for_every_element():
    x = torch.ones(64, 8, 16, 16).to(memory_format=torch.channels_last)
    torch.manual_seed(5)
    first, second = dropout(x, 0.5, True), dropout(x, 0.5, True)
    torch.manual_seed(5)
    assert torch.equal(first, dropout(x, 0.5, True))
    assert first.is_contiguous(memory_format=torch.channels_last)
    gone = (first == 0).permute(0, 2, 3, 1).flatten().float()
    both = ((second == 0).permute(0, 2, 3, 1).flatten().float() * gone).mean()
    assert abs(both - 0.25) < 0.01
    for lag in (1, 2, 3, 4, 8):  # elements of one draw, and of neighbouring ones, know nothing of each other
        assert abs((gone[lag:] * gone[:-lag]).mean() - 0.25) < 0.01


def test_dropouts_draws_are_those_of_recorded_runs():
    torch.manual_seed(0)
    kept = (2, 8, 12, 14, 19, 21, 22)
    assert dropout(torch.ones(24), 0.5, True).nonzero().flatten().tolist() == list(kept)
    assert torch.rand(1).item() == pytest.approx(0.0223, abs=1e-4)  # so many were drawn, and no more


@pytest.mark.parametrize("capture", [make_fx, aot_function], ids=lambda f: f.__name__)
def test_what_records_operators_meets_torchs_dropout(capture):
    """On these stand torch's compilers and quantisers. The operator `random_` of our own has no valid Python there."""
    layer, x = Dropout(0.25).train(), torch.ones(10_000)
    graph = capture(layer)(x) if capture is make_fx else capture(layer, nop)
    first, second = graph(x), graph(x)
    assert first.unique().tolist() == pytest.approx([0, 4 / 3])
    assert abs((first == 0).float().mean() - 0.25) < 0.03
    assert not torch.equal(first, second)


def test_dropout_at_its_ends():
    x = torch.randn(4, 5)
    assert torch.equal(dropout(x, 0.3, False), x)
    assert torch.equal(dropout(x, 0.0, True), x)
    assert torch.equal(dropout(x, 1.0, True), torch.zeros_like(x))
    assert dropout(torch.randn(1000), 0.999999, True).isfinite().all()


@pytest.mark.parametrize("name", ["dmsresnet50", "test_dmsresnet", "resnet18", "vit_tiny_patch16_224"])
def test_folding_batch_norms_changes_nothing_but_their_number(name):
    model = timm.create_model(name, num_classes=7)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    x = torch.randn(3, 3, *((224, 224) if name.startswith("vit") else (32, 32)))
    folded = fold_batch_norms(model, x.shape[1:])
    assert model.training
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert not any(isinstance(module, nn.BatchNorm2d) for module in folded.modules())
    assert not any(p.requires_grad for p in folded.parameters())
    with torch.no_grad():
        torch.testing.assert_close(folded(x), model.eval()(x), rtol=1e-4, atol=1e-4)


def test_a_network_that_cannot_be_traced_is_folded_to_a_copy():
    class Branching(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.bn = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)

        def forward(self, x):
            return self.bn(self.conv(x)) if x.mean() > 0 else x

    model = Branching()
    folded = fold_batch_norms(model, (3, 4, 4))
    assert folded is not model
    assert model.training
    assert not folded.training
    x = torch.rand(2, 3, 4, 4)
    torch.testing.assert_close(folded(x), model.eval()(x))


def patched(which):
    """A network of which an object has a `forward` of its own, as wrappers give it."""
    network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten())
    module = network if which == "network" else network[1]
    own = type(module).forward
    module.forward = lambda x: 10 * own(module, x)
    return network


class Unseen(nn.Module):
    """Python that torch.fx passes by."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)

    def forward(self, x):
        return self.bn(self.conv(x * 2 if isinstance(x, torch.Tensor) else x)).flatten(1)


@pytest.mark.parametrize("make", [lambda: patched("network"), lambda: patched("norm"), Unseen])
def test_folding_does_not_lose_what_torch_fx_does_not_see(make):
    network = make().eval()
    x = torch.randn(3, 3, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(fold_batch_norms(network, (3, 8, 8))(x), network(x))


class Odd(nn.Module):
    """A convolution, a batch norm, and something beside them that tracing alone would get wrong."""

    def __init__(self, kind):
        super().__init__()
        self.kind, self.conv, self.bn = kind, nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)
        if kind == "hook":
            self.conv.register_forward_hook(lambda module, given, found: 2 * found)

    def forward(self, x, targets=None, scale=1.0):
        y = self.bn(self.conv(x))
        if self.kind == "optional":
            return y if targets is None else -y
        return y + F.conv2d(x, self.conv.weight) if self.kind == "weight" else y * scale


@pytest.mark.parametrize("kind", ["optional", "hook", "weight", "plain"])
def test_what_is_folded_computes_what_it_did(kind):
    model = Odd(kind)
    model.bn.running_mean.normal_()
    model.bn.running_var.uniform_(2, 3)
    folded, x = fold_batch_norms(model, (3, 4, 4)), torch.rand(2, 3, 4, 4)
    torch.testing.assert_close(folded(x), model.eval()(x))
    left = sum(isinstance(module, nn.BatchNorm2d) for module in folded.modules())
    assert left == (kind in ("hook", "weight"))


@pytest.mark.parametrize("name", ["cait_xxs24_224", "test_vit3"])
def test_the_work_of_networks_that_torch_counts_only_without_gradients(name):
    small = {} if name == "test_vit3" else {"img_size": 32, "patch_size": 16}
    network = timm.create_model(name, **small)
    shape = (3, 32, 32) if small else network.default_cfg["input_size"]
    assert macs(network, shape) > 1e5
    assert all(p.requires_grad for p in network.parameters())


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


@pytest.mark.parametrize("name", [name for name in NAMES if name != "dmsresnet_wide"])
def test_what_reads_a_network_as_a_graph_meets_torchs_dropout(name):
    """As timm's own tests trace entries and then script them, in either mode; and torch.export, in training."""
    model, x = timm.create_model(name, drop_rate=0.1).eval(), torch.randn(2, 3, 16, 16)
    known = {"leaf_modules": list(get_notrace_modules()), "autowrap_functions": list(get_notrace_functions())}
    options = {**known, "param_shapes_constant": True}
    last = [nodes[-1:] for nodes in get_graph_node_names(model, tracer_kwargs=options)]
    traced = create_feature_extractor(
        model, train_return_nodes=last[0], eval_return_nodes=last[1], tracer_kwargs=options
    )
    scripted = torch.jit.script(traced)
    with torch.no_grad():
        (logits,) = scripted(x).values()
        torch.testing.assert_close(logits, model(x))
        (noisy,) = scripted.train()(x).values()
        exported = torch.export.export(model.train(), (x,)).module()
        for dropped in (noisy, exported(x)):
            assert dropped.isfinite().all()
            assert not torch.equal(dropped, logits)


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


def test_timms_own_distillation_takes_them():
    student, teacher = timm.create_model("test_dmsresnet", num_classes=4), timm.create_model("resnet10t", num_classes=4)
    task = LogitDistillationTask(student, teacher, nn.CrossEntropyLoss(), task_loss_weight=0.1, verbose=False)
    task(torch.randn(2, 3, 32, 32), torch.tensor([1, 2]))["loss"].backward()
    assert student.conv1.weight.grad.abs().sum() > 0


def test_stochastic_depth_leaves_out_whole_residuals_of_single_images_and_more_of_them_later():
    model = timm.create_model("test_dmsresnet", drop_path_rate=0.5, depths=(2, 2, 2))
    blocks = [block for stage in model.stages for block in stage]
    rates = [getattr(block.drop_path, "drop_prob", 0.0) for block in blocks]
    assert rates == pytest.approx([0, 0.1, 0.2, 0.3, 0.4, 0.5])
    last, x = blocks[-1].train(), torch.rand(4000, 48, 2, 2)
    out, plain = last(x), last.act(x)
    left_out = torch.isclose(out, plain).flatten(1).all(1).float().mean().item()
    assert left_out == pytest.approx(0.5, abs=0.04)
    model.eval()
    assert torch.equal(model(torch.ones(2, 3, 32, 32))[0], model(torch.ones(2, 3, 32, 32))[1])
    same = timm.create_model("test_dmsresnet", depths=(2, 2, 2)).eval()
    same.load_state_dict(model.state_dict())
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(same(x), model(x))


class Recurrent(torch.nn.Module):
    """One convolution three times, with one norm or with one for each time."""

    def __init__(self, norms):
        super().__init__()
        self.conv, self.head = torch.nn.Conv2d(3, 3, 3, padding=1), torch.nn.Linear(3, 10)
        self.norms = torch.nn.ModuleList(torch.nn.BatchNorm2d(3) for _ in range(norms))

    def forward(self, x):
        for time in range(3):
            x = self.norms[time % len(self.norms)](self.conv(x)).relu()
        return self.head(x.mean((2, 3)))


@pytest.mark.parametrize("norms", [1, 3])
def test_a_convolution_that_is_called_again_is_not_folded_twice(norms):
    torch.manual_seed(0)
    model = Recurrent(norms)
    for _ in range(20):
        model(3 * torch.randn(16, 3, 8, 8) + 1)
    x = torch.randn(8, 3, 8, 8)
    torch.testing.assert_close(fold_batch_norms(model.eval(), (3, 8, 8))(x), model(x))


def test_squeeze_and_excitation_is_in_one_of_its_places():
    for se in (True, "block", "Stem"):
        with pytest.raises(ValueError, match="it must be 'stem', 'blocks' or None"):
            timm.create_model("dmsresnet_tiny", se=se)
    for name in ("dmsresnet_tiny_plain", "test_dmsresnet_plain", "dmsresnet_plain"):
        assert any(isinstance(module, SEModule) for module in timm.create_model(name, se="blocks").modules())


@pytest.mark.parametrize("depths", [(1, 1), (1, 1, 1, 1)])
def test_features_are_those_of_all_stages_however_many_there_are(depths):
    widths = (8, 16, 24, 32)[: len(depths)]
    network = timm.create_model("dmsresnet_tiny", depths=depths, widths=widths, features_only=True)
    maps = network(torch.zeros(1, 3, 32, 32))
    assert [x.shape[1] for x in maps] == [8, *widths]


def test_a_size_of_none_is_no_other_size():
    network = timm.create_model("test_cct", img_size=16)
    before = network.pos_embed.clone()
    network.set_input_size(img_size=None)
    assert (network.img_size, torch.equal(network.pos_embed, before)) == ((16, 16), True)
