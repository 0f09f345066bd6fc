"""The comparison systems of the paper's Table 1: exact sizes, exact functions, and what runs do with them."""

import copy
import json
import math
import re

import pytest
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from timm.layers import get_notrace_functions, get_notrace_modules
from timm.models import group_parameters
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch.fx import symbolic_trace
from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

import dms_fastai  # noqa: F401  (registers the architectures)
from dms_fastai import UserError, dms_learner, load_data
from dms_fastai.models.build import Model, needs_more_than_one
from dms_fastai.models.card import read_card
from dms_fastai.models.dropblock import DropBlock
from dms_fastai.models.macs import entry_macs, macs
from dms_fastai.models.weights import load_weights, save_weights
from dms_fastai.trained import begin_from
from tests.conftest import quiet
from tests.test_runs import dms  # noqa: F401  (a fixture)

TESTS = ["test_cct", "test_hcgnet", "test_plain_cnn"]
FEWER = {"test_hcgnet": {"growths": (4, 8), "depths": (1, 1)}}  # for what takes long
NAMES = ["cct_7_3x1", "cct_7_3x1_sine", "hcgnet_a2", "plain_cnn", *TESTS]


def count(*modules):
    return sum(p.numel() for module in modules for p in module.parameters())


def noisy(name, **kwargs):
    """A network in float64 and evaluation mode, with statistics and affine parameters of norms as after training."""
    model = timm.create_model(name, **kwargs).double().eval()
    for module in model.modules():
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
            module.running_mean.normal_(0, 0.2)
            module.running_var.uniform_(0.5, 2)
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d, nn.LayerNorm)):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.2)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.normal_(module.bias, 0, 0.2)
    return model


# Sizes


def test_cct_has_its_parameters_part_by_part():
    model = timm.create_model("cct_7_3x1")
    assert count(model) == 3_760_139
    assert count(model.conv1) == 6_912
    assert model.pos_embed.shape == (1, 256, 256)
    assert [count(layer) for layer in model.layers] == [526_336] * 7
    assert (count(model.norm), count(model.pool), count(model.head)) == (512, 257, 2_570)
    assert count(timm.create_model("cct_7_3x1_sine")) == 3_694_603


def test_hcgnet_has_its_parameters_part_by_part():
    model = timm.create_model("hcgnet_a2")
    first, second, third = model.stages
    assert count(model) == 3_069_149
    assert (count(model.conv1), count(first[0]), count(first[7])) == (1_296, 13_743, 30_207)
    assert (count(second[0]), count(second[8])) == (278_073, 73_917)
    assert (count(third[0]), count(third[8])) == (798_306, 228_155)
    assert (count(model.norm), count(model.fc)) == (1_432, 7_170)
    kinds = dict.fromkeys((nn.Conv2d, nn.modules.batchnorm._BatchNorm, nn.Linear), 0)
    for module in model.modules():
        for kind in kinds:
            kinds[kind] += count(module) if isinstance(module, kind) else 0
    assert list(kinds.values()) == [2_640_256, 33_258, 395_635]


def test_plain_cnn_has_its_parameters_part_by_part():
    model = timm.create_model("plain_cnn")
    assert count(model) == 4_394_570
    assert (count(model.conv1, model.stages), count(model.hidden), count(model.fc)) == (3_323_456, 1_050_624, 20_490)


@pytest.mark.parametrize(
    ("name", "cost"),
    [
        # Convolutions and linear layers; then queries by keys and weights by values; then the pooling.
        ("cct_7_3x1", 946_670_080 + 7 * 4 * 2 * 256 * 256 * 64 + 256 * 256),
        ("cct_7_3x1_sine", 946_670_080 + 7 * 4 * 2 * 256 * 256 * 64 + 256 * 256),
        # And the weighted sums of three maps for each module, over 32x32, 16x16 and 8x8 positions.
        ("hcgnet_a2", 488_603_776 + 3 * (1024 * 8 * 24 + 256 * (120 + 8 * 36) + 64 * (204 + 8 * 64))),
        ("plain_cnn", 625_692_672),
    ],
)
def test_cost_of_an_image(name, cost):
    assert entry_macs(name) == cost


def test_counting_leaves_a_network_as_it_is():
    model = timm.create_model("test_cct").train()
    before = copy.deepcopy(model.state_dict())
    macs(model, (3, 32, 32))
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


# Functions, written once more. `next` takes the weights in the order of the text.


def weights_of(model):
    """The parameters in order, each with the running statistics of its batch norm, if it is one's weight."""
    found = {}
    for module in model.modules():
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
            found[id(module.weight)] = module
    return iter([(p.detach(), found.get(id(p))) for p in model.parameters()])


def cct(model, x, heads):
    weights = weights_of(model)

    def take():
        return next(weights)[0]

    table = take() if isinstance(model.pos_embed, nn.Parameter) else model.pos_embed
    x = F.max_pool2d(F.conv2d(x, take(), padding=1).clamp(min=0), 3, 2, 1)
    B, C = x.shape[:2]
    x = x.reshape(B, C, -1).permute(0, 2, 1) + table

    def norm(x):
        gap = x - x.mean(-1, keepdim=True)
        return gap / (gap.square().mean(-1, keepdim=True) + 1e-5).sqrt() * take() + take()

    def linear(x):
        return x @ take().T + take()

    for _ in model.layers:
        q, k, v = (norm(x) @ take().T).split(C, -1)
        d, out = C // heads, []
        for h in range(heads):
            part = slice(h * d, (h + 1) * d)
            scores = q[..., part] @ k[..., part].transpose(1, 2) / math.sqrt(d)
            out.append(scores.softmax(-1) @ v[..., part])
        b = norm(x + linear(torch.cat(out, -1)))
        hidden = linear(b)
        x = b + linear(0.5 * hidden * (1 + torch.erf(hidden / math.sqrt(2))))
    x = norm(x)
    pooled = (linear(x).softmax(1) * x).sum(1)
    logits = linear(pooled)
    assert next(weights, None) is None
    return logits


@pytest.mark.parametrize(("name", "heads"), [("cct_7_3x1", 4), ("cct_7_3x1_sine", 4), ("test_cct", 2)])
def test_cct_is_the_function_of_the_paper(name, heads):
    model, x = noisy(name), torch.randn(2, 3, 32, 32, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(model(x), cct(model, x, heads), rtol=1e-11, atol=1e-11)


def hcgnet(model, x, depths, training):
    weights = weights_of(model)

    def take():
        return next(weights)[0]

    def norm(x):
        (scale, own), shift = next(weights), take()
        shape = (1, -1) + (1,) * (x.ndim - 2)
        others = [d for d in range(x.ndim) if d != 1]
        mean = x.mean(others) if training else own.running_mean
        var = x.var(others, unbiased=False) if training else own.running_var
        x = (x - mean.view(shape)) / (var.view(shape) + 1e-5).sqrt()
        return x * scale.view(shape) + shift.view(shape)

    def pre(x, **kwargs):
        x = norm(x).clamp(min=0)
        return F.conv2d(x, take(), **kwargs)

    def linear(x):
        return x @ take().T + take()

    def pool(z):
        scores = torch.einsum("bchw,oc->bohw", z, take()) + take()
        shares = scores.exp() / scores.exp().sum((2, 3), keepdim=True)
        return (z * shares).sum((2, 3))

    def gates(s):
        n = s.shape[1]
        forget = 1 / (1 + (-linear(torch.tanh(norm(linear(pool(s)))))).exp())
        near = pre(s, padding=1, groups=n)
        far = pre(s, padding=2, dilation=2, groups=n)
        p, q = pool(near), pool(far)
        v = torch.tanh(norm(linear(torch.cat([p, q], 1))))
        shares = torch.stack([linear(v), linear(v)]).softmax(0)
        context = shares[0] * p + shares[1] * q
        return torch.einsum("bchw,bc->bchw", s, forget) + context.view(*context.shape, 1, 1)

    x = F.conv2d(x, take(), padding=1)
    for block, depth in enumerate(depths):
        if block:
            x = gates(pre(pre(x), stride=2, padding=1))
        for _ in range(depth):
            x = torch.cat([x, gates(pre(pre(x), padding=1, groups=4))], 1)
    logits = linear(norm(x).clamp(min=0).mean((2, 3)))
    assert next(weights, None) is None
    return logits


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(("name", "depths"), [("hcgnet_a2", (8, 8, 8)), ("test_hcgnet", (2, 2, 2))])
def test_hcgnet_is_the_function_of_the_paper(name, depths, training):
    model, x = noisy(name), torch.randn(4, 3, 32, 32, dtype=torch.float64)
    with torch.no_grad():
        expected = hcgnet(model, x, depths, training)
        tolerance = 1e-9 if training else 1e-11
        torch.testing.assert_close(model.train(training)(x), expected, rtol=tolerance, atol=tolerance)
        channels_last = x.to(memory_format=torch.channels_last)
        torch.testing.assert_close(model(channels_last), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(("name", "stages"), [("plain_cnn", [4, 3, 2, 1]), ("test_plain_cnn", [2, 2, 1, 1])])
def test_plain_cnn_is_what_it_says(name, stages):
    model, x = noisy(name), torch.randn(2, 3, 32, 32, dtype=torch.float64)
    weights, expected = weights_of(model), x
    with torch.no_grad():
        for stage, convolutions in enumerate(stages):
            if stage:
                expected = F.max_pool2d(expected, 2)
            for _ in range(convolutions):
                expected = F.conv2d(expected, next(weights)[0], padding=1)
                (scale, own), (shift, _) = next(weights), next(weights)
                mean, var, scale, shift = (
                    v.view(1, -1, 1, 1) for v in (own.running_mean, own.running_var, scale, shift)
                )
                expected = ((expected - mean) / (var + 1e-5).sqrt() * scale + shift).clamp(min=0)
        hidden = (expected.mean((2, 3)) @ next(weights)[0].T + next(weights)[0]).clamp(min=0)
        expected = hidden @ next(weights)[0].T + next(weights)[0]
        assert next(weights, None) is None
        torch.testing.assert_close(model(x), expected, rtol=1e-11, atol=1e-11)


def test_sine_table():
    table = timm.create_model("cct_7_3x1_sine").pos_embed
    assert table.shape == (1, 256, 256)
    for p, i in ((0, 0), (0, 1), (1, 0), (7, 100), (255, 3), (255, 254), (128, 255)):
        angle = p / 10_000 ** (2 * (i // 2) / 256)
        assert table[0, p, i].item() == pytest.approx((math.cos if i % 2 else math.sin)(angle), abs=1e-7)


# Training


def test_initialisations():
    model = timm.create_model("cct_7_3x1")
    assert model.conv1.weight.std().item() == pytest.approx((2 / 27) ** 0.5, rel=0.03)
    assert model.pos_embed.std().item() == pytest.approx(0.2, rel=0.03)
    linear = [module for module in model.modules() if isinstance(module, nn.Linear)]
    for module in linear:
        if module.weight.numel() > 10_000:
            assert module.weight.std().item() == pytest.approx(0.02, rel=0.03)
    assert all(not module.bias.any() for module in linear if module.bias is not None)
    assert model.head.weight.std().item() == pytest.approx(0.02, rel=0.1)
    gated = timm.create_model("hcgnet_a2").stages[0][0].reduce[2].weight
    assert gated.abs().max() <= 48**-0.5
    assert gated.std().item() == pytest.approx((3 * 48) ** -0.5, rel=0.05)
    plain = timm.create_model("plain_cnn").stages[3][1][0].weight
    assert plain.std().item() == pytest.approx((2 / (512 * 9)) ** 0.5, rel=0.02)


def test_rates_of_what_is_dropped():
    model = timm.create_model("cct_7_3x1")
    rates = [round(layer.drop_path1.drop_prob, 4) for layer in model.layers]
    assert rates == [0, 0.0167, 0.0333, 0.05, 0.0667, 0.0833, 0.1]
    assert rates == [round(layer.drop_path2.drop_prob, 4) for layer in model.layers]
    assert {layer.attn.drop_rate for layer in model.layers} == {0.1}
    assert (model.head_drop.p, timm.create_model("test_cct", drop_rate=0.3).head_drop.p) == (0.0, 0.3)
    assert timm.create_model("test_hcgnet", drop_rate=0.3).head_drop.p == 0.3
    assert timm.create_model("plain_cnn").head_drop.p == 0.8
    assert Model("test_plain_cnn", drop_rate=0.3).create(10, (3, 32, 32)).head_drop.p == 0.3


def test_a_branch_is_skipped_for_single_images_by_each_drop_path_apart():
    layer = timm.create_model("test_cct", drop_path_rate=0.5, attn_drop_rate=0).layers[-1].train()
    x = torch.randn(1, 4, 48).expand(2000, -1, -1)
    with torch.no_grad():
        found = layer(x)
        skipped = layer.norm2(x)  # without attention, and in `kept` with it, of double strength
        kept = layer.norm2(x + 2 * layer.attn(layer.norm1(x)))
        cases = [b + 2 * on * layer.mlp(b) for b in (skipped, kept) for on in (0, 1)]
    of_each = [torch.isclose(found, case, atol=1e-5).flatten(1).all(1) for case in cases]
    assert torch.stack(of_each).sum(0).eq(1).all()
    for which in of_each:
        assert which.float().mean().item() == pytest.approx(0.25, abs=0.05)


def test_attention_drops_weights_and_scales_the_rest():
    """With values that are all one, an output is the sum of a query's weights, whose mean stays one."""
    model = timm.create_model("test_cct", attn_drop_rate=0.25).train()
    attention = model.layers[0].attn
    with torch.no_grad():
        attention.qkv.weight[:96].zero_()  # all weights are 1 / N
        attention.proj.weight.copy_(torch.eye(48))
        x = torch.ones(20, 256, 48)
        attention.qkv.weight[96:].fill_(1 / 48)
        sums = attention(x)
        shares = sums[..., 0] * 256 * 0.75  # how many of the 256 weights are left
        torch.testing.assert_close(shares, shares.round(), rtol=0, atol=1e-2)
        assert shares.mean().item() == pytest.approx(0.75 * 256, rel=0.01)
        assert shares.std().item() == pytest.approx((256 * 0.75 * 0.25) ** 0.5, rel=0.1)
        assert not torch.equal(sums[..., 0], sums[..., 24])  # each head draws its own
        torch.testing.assert_close(attention.eval()(x), x)


def test_dropblock_blanks_squares_in_all_channels():
    block = DropBlock(0.2).train()
    x = torch.rand(64, 5, 12, 10) + 1
    y = block(x)
    blank = y == 0
    assert torch.equal(blank, blank[:, :1].expand_as(blank))
    mask = (~blank[:, 0]).float()
    torch.testing.assert_close(y, x * mask[:, None] * mask.numel() / mask.sum())
    gone = blank[:, 0]
    # Everything blank is covered by a 2x2 square of blanks, cut at the edges; it holds a seed at its upper left.
    padded = F.pad(gone, (0, 1, 0, 1), value=True)
    seeds = padded[:, :-1, :-1] & padded[:, 1:, :-1] & padded[:, :-1, 1:] & padded[:, 1:, 1:]
    covered = seeds.clone()
    covered[:, 1:] |= seeds[:, :-1]
    covered[:, :, 1:] |= seeds[:, :, :-1]
    covered[:, 1:, 1:] |= seeds[:, :-1, :-1]
    assert torch.equal(covered, gone)
    assert not torch.equal(gone[0], gone[1])
    assert torch.equal(block.eval()(x), x)


def test_dropblock_blanks_its_share():
    y = DropBlock(0.4).train()(torch.ones(4000, 1, 4, 4))
    gone = (y == 0).float().mean(0)[0]
    # A position is left if it and its neighbours to the left, above, and above to the left are no seeds.
    neighbours = torch.tensor([[1, 2, 2, 2], [2, 4, 4, 4], [2, 4, 4, 4], [2, 4, 4, 4]])
    torch.testing.assert_close(gone, 1 - 0.9**neighbours, rtol=0, atol=0.03)


def test_dropblocks_rate_can_be_set_and_zero_changes_nothing():
    model = timm.create_model("test_hcgnet", drop_block_rate=0.1)
    blocks = [module for module in model.modules() if isinstance(module, DropBlock)]
    assert [block.rate for block in blocks] == [0.1, 0.1]
    assert isinstance(blocks[0].rate, float)
    x = torch.rand(2, 3, 8, 8)
    for block in blocks:
        block.rate = 0.0
        assert torch.equal(block.train()(x), x)
        block.rate = 1.0
    assert blocks[0](torch.ones(500, 1, 1, 1)).eq(0).float().mean().item() == pytest.approx(0.25, abs=0.08)
    assert blocks[0](torch.ones(1, 1, 1, 1)).isfinite().all()
    assert not any("drop_block" in name for name in model.state_dict())


def test_a_compiled_network_is_compiled_once_for_all_rates():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.block = nn.Conv2d(3, 3, 1), DropBlock()

        def forward(self, x):
            return self.block(self.conv(x))

    net, counter = Net().train(), CompileCounter()
    compiled = torch.compile(net, backend=counter, dynamic=False)
    for rate in (0.0, 0.1, 0.2):
        net.block.rate = rate
        assert (compiled(torch.rand(8, 3, 16, 16)) == 0).any().item() == (rate > 0)
    assert counter.frame_count == 1


def test_hcgnet_does_not_train_on_one_image():
    model = timm.create_model("test_hcgnet")
    assert needs_more_than_one(model, (3, 32, 32))
    assert not needs_more_than_one(timm.create_model("test_cct"), (3, 32, 32))
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        model(torch.rand(1, 3, 32, 32))
    dls = load_data("digits", bs=64)
    dls.train = dls.train.new(drop_last=False, bs=1437)  # of 1,438 images
    with pytest.raises(UserError, match="leave a last batch of one image"):
        quiet(dms_learner(dls, "se", arch="test_hcgnet")).fit(1)


# What timm expects


@pytest.mark.parametrize("name", TESTS)
def test_every_parameter_gets_a_gradient_and_the_head_has_any_size(name):
    model = timm.create_model(name, num_classes=42, in_chans=1)
    output = model(torch.randn(2, 1, 32, 32))
    assert output.shape == (2, 42)
    output.square().mean().backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("name", NAMES)
def test_configurations_say_the_truth(name):
    model = timm.create_model(name).eval()
    cfg = model.default_cfg
    x = torch.randn(1, *cfg["input_size"])
    assert {f"{cfg['classifier']}.weight", f"{cfg['first_conv']}.weight"} <= set(model.state_dict())
    with torch.no_grad():
        maps, logits = model.forward_features(x), model(x)
        assert logits.shape == (1, cfg["num_classes"]) == (1, 10)
        if cfg["pool_size"]:
            assert maps.shape[-2:] == cfg["pool_size"]
        before = model.forward_head(maps, pre_logits=True)
        assert before.shape == (1, model.head_hidden_size)
        model.reset_classifier(0)
        torch.testing.assert_close(model(x), before)
        model.reset_classifier(0, "")
        torch.testing.assert_close(model(x), maps)
        model.reset_classifier(7, "seq" if "cct" in name else "avg")
        assert model(x).shape == (1, 7)
    assert model.num_classes == 7
    assert timm.create_model(name, num_classes=0, global_pool="").eval()(x).shape == maps.shape


def test_normalisations():
    cfgs = {name: timm.get_pretrained_cfg(name) for name in NAMES}
    assert cfgs["cct_7_3x1"].mean == (0.4914, 0.4822, 0.4465)
    assert cfgs["cct_7_3x1"].std == (0.2470, 0.2435, 0.2616)
    assert cfgs["hcgnet_a2"].std == (0.24703233, 0.24348505, 0.26158768)
    assert (cfgs["plain_cnn"].mean, cfgs["plain_cnn"].std) == ((0, 0, 0), (1, 1, 1))


@pytest.mark.parametrize("name", TESTS)
def test_features_and_intermediates_are_the_same_maps(name):
    model = timm.create_model(name).eval()
    features = timm.create_model(name, features_only=True).eval()
    theirs = {re.sub(r"^model\.|_(?=\d)", lambda m: "." if m.group() == "_" else "", k) for k in features.state_dict()}
    assert theirs <= set(model.state_dict())
    renamed = {
        re.sub(r"^model\.|_(?=\d)", lambda m: "." if m.group() == "_" else "", k): k for k in features.state_dict()
    }
    features.load_state_dict({renamed[k]: v for k, v in model.state_dict().items() if k in renamed})
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        maps = features(x)
        final, intermediates = model.forward_intermediates(x)
        last = model.forward_intermediates(x, indices=1, norm=True, intermediates_only=True)
        first = model.forward_intermediates(x, indices=[0, 1], stop_early=True, intermediates_only=True)
        torch.testing.assert_close(final, model.forward_features(x))
    assert [m.shape[1] for m in maps] == features.feature_info.channels()
    assert [32 // m.shape[-1] for m in maps] == features.feature_info.reduction()
    assert len(maps) >= 3
    for one, other in zip(maps, intermediates, strict=True):
        torch.testing.assert_close(one, other)
    for one, other in zip(first, intermediates, strict=False):
        torch.testing.assert_close(one, other)
    torch.testing.assert_close(last[0].flatten(2), final.transpose(1, 2) if "cct" in name else final.flatten(2))
    with pytest.raises(ValueError, match="NCHW"):
        model.forward_intermediates(x, output_fmt="NHWC")
    with torch.no_grad():
        model.prune_intermediate_layers([1], prune_norm=True)
        pruned = model(x)
    expected = intermediates[1].flatten(2).transpose(1, 2) if "cct" in name else intermediates[1]
    torch.testing.assert_close(pruned, expected)


@pytest.mark.parametrize("name", TESTS)
def test_graphs(name):
    """TorchScript, torch.fx, and timm's way from one to the other, in either mode."""
    model, x = timm.create_model(name, scriptable=True, **FEWER.get(name, {})).eval(), torch.randn(2, 3, 32, 32)
    known = {"leaf_modules": list(get_notrace_modules()), "autowrap_functions": list(get_notrace_functions())}
    options = {**known, "param_shapes_constant": True}
    last = [nodes[-1:] for nodes in get_graph_node_names(model, tracer_kwargs=options)]
    traced = create_feature_extractor(
        model, train_return_nodes=last[0], eval_return_nodes=last[1], tracer_kwargs=options
    )
    scripted = torch.jit.script(traced)
    with torch.no_grad():
        expected = model(x)
        for graph in (
            torch.jit.script(model),
            symbolic_trace(model),
            lambda x: next(iter(scripted(x).values())),
        ):
            torch.testing.assert_close(graph(x), expected)
        (in_training,) = traced.train()(x).values()
        for noisy_logits in (in_training, torch.jit.script(model.train())(x), symbolic_trace(model)(x)):
            assert noisy_logits.isfinite().all()
            assert not torch.equal(noisy_logits, expected)


@pytest.mark.parametrize("name", TESTS)
@pytest.mark.parametrize("training", [False, True])
def test_exports(name, training):
    model, x = timm.create_model(name, **FEWER.get(name, {})).eval(), torch.randn(2, 3, 32, 32)
    batch = ({0: torch.export.Dim("batch")},)
    with torch.no_grad():
        expected = model(x)
        exported = torch.export.export(model.train(training), (x,), dynamic_shapes=None if training else batch)
        found = exported.module()(x)
    assert found.isfinite().all()
    assert torch.allclose(found, expected, rtol=1e-4, atol=1e-5) is not training


@pytest.mark.parametrize("name", [*TESTS, "test_dmsresnet"])
def test_checkpointing_changes_no_gradient(name):
    x, model = torch.randn(4, 3, 32, 32), timm.create_model(name).double()

    def gradients(enable):
        torch.manual_seed(1)
        model.zero_grad()
        model.set_grad_checkpointing(enable)
        final, maps = model.forward_intermediates(x.double())
        (model.forward_head(final).square().sum() + maps[1].square().mean()).backward()
        model(x.double()).square().sum().backward()
        return [p.grad.clone() for p in model.parameters()]

    for plain, checkpointed in zip(gradients(False), gradients(True), strict=True):
        torch.testing.assert_close(plain, checkpointed)


@pytest.mark.parametrize("name", NAMES)
def test_group_matcher_orders_every_parameter_by_depth(name):
    model = timm.create_model(name)
    for coarse in (False, True):
        groups = group_parameters(model, model.group_matcher(coarse))
        names = [name for group in groups.values() for name in group]
        assert sorted(names) == sorted(name for name, _ in model.named_parameters())
        assert len(groups) > 2
        assert any(name.startswith(model.default_cfg["first_conv"]) for name in next(iter(groups.values())))
        assert f"{model.default_cfg['classifier']}.weight" in list(groups.values())[-1]


# Sizes of images


@pytest.mark.parametrize("size", [8, 16, 17, 24, 64])
@pytest.mark.parametrize("name", TESTS)
def test_a_network_is_built_for_the_datas_size_and_channels(name, size):
    model = Model(name).create(7, (1, size, size)).eval()
    with torch.no_grad():
        assert model(torch.randn(1, 1, size, size)).isfinite().all()
    sized = {"img_size": size} if name == "test_cct" else {}
    assert Model(name).args_for((3, size, size)) == sized


def test_images_of_another_size_than_it_was_built_for():
    with pytest.raises(AssertionError, match="img_size"):
        timm.create_model("test_cct")(torch.randn(1, 3, 16, 16))
    oblong = Model("test_cct").create(10, (3, 16, 24))
    assert oblong(torch.randn(2, 3, 16, 24)).shape == (2, 10)
    assert Model("test_cct", args={"img_size": 16}).args_for((3, 32, 32)) == {"img_size": 16}


@pytest.mark.parametrize(
    ("name", "size", "args"),
    [("vit_tiny_patch16_224", 64, {"img_size": 64}), ("crossvit_9_240", 64, {}), ("resnet18", 64, {})],
)
def test_timms_own_networks_get_a_size_only_if_they_would_refuse_the_images(name, size, args):
    state = torch.get_rng_state()
    assert Model(name).args_for((3, size, size)) == args
    assert torch.equal(state, torch.get_rng_state())
    kept = {"dynamic_img_size": True}
    assert Model(name, args=kept).args_for((3, size, size)) == kept


def test_positions_are_resampled_for_images_of_another_size(tmp_path):
    """A table that is the same at all positions stays as it is, and a slope stays a slope."""
    small = timm.create_model("test_cct", img_size=16)
    slope = torch.linspace(-1, 1, 8)[None, :].expand(8, 8)
    with torch.no_grad():
        small.pos_embed.copy_(torch.stack([slope.reshape(-1)] + [torch.full((64,), 0.5)] * 47, 1))
    torch.save(small.state_dict(), tmp_path / "small.pth")
    large = timm.create_model("test_cct", pretrained=True, pretrained_cfg_overlay={"file": str(tmp_path / "small.pth")})
    table = large.pos_embed.view(16, 16, 48)
    torch.testing.assert_close(table[..., 1:], torch.full((16, 16, 47), 0.5))
    torch.testing.assert_close(table[0, :, 0], table[9, :, 0])
    assert (table[0, :, 0].diff() > 0).all()
    torch.testing.assert_close(table[0, 2:-2, 0], (torch.arange(16) / 2 - 3.75)[2:-2] * 2 / 7, rtol=0, atol=0.02)
    assert torch.equal(large.layers[0].mlp.fc1.weight, small.layers[0].mlp.fc1.weight)


def test_runs_of_another_size_and_other_classes_are_a_beginning(dms, tmp_path):  # noqa: F811
    args = ("run", "se", "--arch", "test_cct", "--epochs", 1, "--set", "data.batch_size=256")
    assert dms(*args, "--out", "a")[0] == 0
    larger = ("--set", "data.size=16", "--out", "b")
    assert dms(*args, *larger, "--from", "a/se/seed0")[0] == 0
    model, card = load_weights(tmp_path / "b" / "se-from" / "seed0" / "model.safetensors")
    assert card.args["img_size"] == 16
    assert model.pos_embed.shape == (1, 64, 48)
    with pytest.raises(UserError, match="are of another network"):
        begin_from(timm.create_model("test_cct", depth=4), str(tmp_path / "a" / "se" / "seed0"), "test_cct")


# Runs


@pytest.mark.parametrize("name", TESTS)
def test_a_run_its_exports_and_its_student(dms, tmp_path, name):  # noqa: F811
    import onnxruntime

    args = ("--data", "digits", "--arch", name, "--epochs", 1, "--set", "data.batch_size=128", "--out", "x")
    fewer = [("--set", f"model.args.{key}={list(value)}") for key, value in FEWER.get(name, {}).items()]
    assert dms("run", "se", *args, *sum(fewer, ()))[0] == 0
    folder, image = tmp_path / "x" / "se" / "seed0", tmp_path / "image.png"
    pixels = load_data("digits").valid_ds.images[:3]
    Image.fromarray(pixels[0].permute(1, 2, 0).numpy()).save(image)
    for source in (folder, folder / "learner.pkl"):
        code, answer, _ = dms("predict", source, image, "--trust-pickle")
        assert (code, answer[: len(str(image))]) == (0, str(image))
    assert dms("export", folder, tmp_path / "x.onnx")[0] == 0
    model, card = load_weights(folder / "model.safetensors")
    session = onnxruntime.InferenceSession(tmp_path / "x.onnx")
    (found,) = session.run(None, {"pixels": pixels.numpy()})
    mean, std = (torch.tensor(v).view(1, -1, 1, 1) for v in (card.mean, card.std))
    with torch.no_grad():
        expected = model((pixels / 255 - mean) / std).softmax(1)
    torch.testing.assert_close(torch.from_numpy(found), expected, rtol=1e-3, atol=1e-4)
    student = ("run", "kd", "--data", "digits", "--epochs", 1, "--set", "data.batch_size=256", "--out", "y")
    assert dms(*student, "--teacher", folder)[0] == 0


def test_a_card_says_what_is_approximate(tmp_path):
    learn = dms_learner(load_data("digits", bs=64), "se", arch="test_plain_cnn")
    assert "approximate" in learn.card.note
    save_weights(learn.model, learn.card, tmp_path / "x.safetensors")
    assert load_weights(tmp_path / "x.safetensors")[1] == learn.card
    other = dms_learner(load_data("digits", bs=64), "se").card
    assert "note" not in json.loads(other.to_json())  # so that earlier versions read it
    with pytest.raises(ValueError, match="note"):
        read_card(json.dumps({**json.loads(other.to_json()), "note": 3}))


def test_the_listing_has_the_cost_and_says_what_is_approximate(dms):  # noqa: F811
    code, out, _ = dms("models")
    assert code == 0
    row = out[out.index("plain_cnn") :].split("hcgnet")[0]
    assert "625.7 M" in row
    assert "approximate" in row


def test_a_pooling_that_the_hidden_layer_does_not_take_is_refused_when_it_is_chosen():
    with pytest.raises(ValueError, match="doubles the channels"):
        timm.create_model("test_plain_cnn", global_pool="catavgmax")
    network = timm.create_model("test_plain_cnn", global_pool="avgmax")
    with pytest.raises(ValueError, match="doubles the channels"):
        network.reset_classifier(5, "catavgmax")
    network.reset_classifier(5, "max")
    assert network(torch.zeros(2, 3, 16, 16)).shape == (2, 5)
