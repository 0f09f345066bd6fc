"""Pruning, against a dense network whose lost channels are silent, and `dms-fastai prune` from a run to its report."""

import re

import numpy as np
import onnxruntime
import pytest
import timm
import torch
from PIL import Image
from torch import nn

from dms_fastai import Teacher, UserError, dms_learner, export_model, load_data, load_recipe
from dms_fastai.models.card import ModelCard
from dms_fastai.models.dmsresnet import BasicBlock
from dms_fastai.models.prune import mid_widths_of, narrowed, reestimate_batch_norms, widths_within
from dms_fastai.models.weights import load_weights, save_weights
from dms_fastai.run_folder import RunFolder
from dms_fastai.runs.plan import Opened, plan
from dms_fastai.runs.prune import after_pruning
from dms_fastai.runs.stage import run_stage
from dms_fastai.runs.wanted import Wanted
from dms_fastai.trained import begin_from
from tests.conftest import quiet
from tests.test_runs import dms, same_run  # noqa: F401  (a fixture)

SHAPE = (3, 16, 16)
KINDS = {
    "dmsresnet": {"depths": (2, 1, 2), "widths": (16, 24, 32)},
    "dmsresnet_seblocks": {"depths": (1, 2), "widths": (16, 20), "drop_path_rate": 0.2},
    "dmsresnet50": {"depths": (2, 1), "widths": (16, 24)},
}


def network(name="dmsresnet", **more):
    """A network whose batch norms say something."""
    model = timm.create_model(name, **KINDS[name], **more).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 2)
            nn.init.uniform_(module.weight, -1.5, 1.5)
            nn.init.normal_(module.bias)
    return model


def card(model, args, name="dmsresnet"):
    return ModelCard(name, list("abcdefghij"), (0.5,), (0.25,), SHAPE, args)


def strongest(conv, norm, width):
    """The filters with the largest norm times scale, one number after the other."""
    sizes = [sum(v * v for v in f.flatten().tolist()) ** 0.5 * abs(s) for f, s in zip(conv, norm.tolist(), strict=True)]
    return sorted(sorted(range(len(sizes)), key=lambda i: -sizes[i])[:width])


def hooked_macs(model):
    """Multiply-accumulates of convolutions and the classifier, from the shapes that pass through."""
    counted = []

    def count(module, _, out):
        counted.append(module.weight.numel() * (out[0, 0].numel() if out.ndim == 4 else 1))

    hooks = [m.register_forward_hook(count) for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    with torch.no_grad():
        model(torch.zeros(1, *SHAPE))
    for hook in hooks:
        hook.remove()
    return sum(counted)


@pytest.mark.parametrize("name", KINDS)
def test_a_pruned_network_is_the_dense_one_with_silent_channels(name):
    dense = network(name)
    before = {key: value.clone() for key, value in dense.state_dict().items()}
    widths = [width - 3 - place for place, width in enumerate(mid_widths_of(dense))]
    pruned = narrowed(dense, widths)
    assert mid_widths_of(pruned) == widths
    assert all(torch.equal(value, before[key]) for key, value in dense.state_dict().items())

    blocks = [(f"stages.{s}.{b}", block) for s, stage in enumerate(dense.stages) for b, block in enumerate(stage)]
    for (prefix, block), width in zip(blocks, widths, strict=True):
        kept_before = []
        for at in (0,) if isinstance(block, BasicBlock) else (0, 3):
            conv, norm = block.residual[at], block.residual[at + 1]
            kept = strongest(conv.weight, norm.weight, width)
            own = pruned.get_submodule(prefix).residual
            rows = conv.weight[kept] if at == 0 else conv.weight[kept][:, kept_before]
            assert torch.equal(own[at].weight, rows)
            assert torch.equal(own[at + 1].running_var, norm.running_var[kept])
            gone = [i for i in range(len(norm.weight)) if i not in kept]
            norm.weight.data[gone] = norm.bias.data[gone] = 0
            kept_before = kept
    x = torch.randn(4, *SHAPE)
    with torch.no_grad():
        torch.testing.assert_close(pruned(x), dense(x), rtol=1e-4, atol=1e-5)
    assert hooked_macs(pruned) < hooked_macs(dense)


def test_with_all_its_filters_a_network_is_as_it_was():
    dense = network()
    widths = mid_widths_of(dense)
    assert widths == [16, 16, 24, 32, 32]
    same = timm.create_model("dmsresnet", mid_widths=widths, **KINDS["dmsresnet"]).eval()
    same.load_state_dict(narrowed(dense, widths).state_dict())
    x = torch.randn(2, *SHAPE)
    assert torch.equal(same(x), dense(x))


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("share", [0.8, 0.6])
def test_macs_are_just_below_the_share(name, share):
    dense = network(name)
    widths = widths_within(dense, share, SHAPE)
    own = mid_widths_of(dense)
    assert all(w % 8 == 0 and 8 <= w <= width for w, width in zip(widths, own, strict=True))
    left = hooked_macs(narrowed(dense, widths)) / hooked_macs(dense)
    assert left <= share
    steps = [[min(w + 8 * (place == at), own[place]) for place, w in enumerate(widths)] for at in range(len(widths))]
    assert max(hooked_macs(narrowed(dense, step)) for step in steps) > share * hooked_macs(dense)


def test_the_weakest_filters_of_all_layers_go_first_and_no_layer_goes_whole():
    dense = network()
    with torch.no_grad():
        for stage in dense.stages:
            for block in stage:
                block.residual[0].weight.fill_(1.0)
                block.residual[1].weight.fill_(1.0)
        dense.stages[2][0].residual[1].weight[4:20] = 0.01
        dense.stages[0][1].residual[0].weight *= 1e-6  # a layer is measured by its own mean
    assert widths_within(dense, 0.97, SHAPE) == [16, 16, 24, 16, 32]
    kept = narrowed(dense, [16, 16, 24, 16, 32]).stages[2][0].residual[1].weight
    assert torch.equal(kept, torch.ones(16))
    words = r"prune.macs is 0.05, and the narrowest blocks still have 0\.\d\d\d of the MACs; take (0\.\d\d) or more"
    with pytest.raises(UserError, match=words) as error:
        widths_within(dense, 0.05, SHAPE)
    assert len(widths_within(dense, float(re.search(words, error.value.message)[1]), SHAPE)) == 5


def test_batch_norms_get_the_statistics_of_the_batches():
    model, batches = network(), [torch.randn(8, *SHAPE) for _ in range(3)]
    seen = torch.stack([model.conv1(batch).transpose(0, 1).flatten(1) for batch in batches])
    weights = {key: value.clone() for key, value in model.named_parameters()}
    reestimate_batch_norms(model, ((batch, None) for batch in batches))
    torch.testing.assert_close(model.bn1.running_mean, seen.mean(2).mean(0))
    torch.testing.assert_close(model.bn1.running_var, seen.var(2).mean(0), rtol=1e-4, atol=1e-5)
    assert all(torch.equal(value, weights[key]) for key, value in model.named_parameters())
    assert not model.training


# As an entry of timm


def narrow(**more):
    return timm.create_model("dmsresnet", mid_widths=[8, 16, 8, 16, 24], **KINDS["dmsresnet"], **more).eval()


def test_timms_ways_go_on_working():
    model, x = narrow(), torch.randn(2, *SHAPE)
    features = narrow(features_only=True)
    features.load_state_dict({k.replace("stages.", "stages_"): v for k, v in model.state_dict().items()}, strict=False)
    with torch.no_grad():
        for one, other in zip(features(x), model.forward_intermediates(x, intermediates_only=True), strict=True):
            torch.testing.assert_close(one, other)
        torch.testing.assert_close(torch.jit.script(narrow(scriptable=True))(x).shape, model(x).shape)
    deep = narrow(drop_path_rate=0.5).train()
    deep(x).sum().backward()
    assert deep.stages[2][1].drop_path.drop_prob == 0.5
    assert mid_widths_of(deep) == [8, 16, 8, 16, 24]


@pytest.mark.parametrize("widths", [[8, 8], [8, 8, 8, 8, 0], [8, 8, 8, 8, 8.0], [8, 8, 8, 8, True]])
def test_widths_that_cannot_be_are_refused_in_a_line(widths):
    settings = {"model.args": {"depths": [2, 1, 2], "mid_widths": widths}}
    with pytest.raises(UserError, match="must be 5 whole numbers above 0, one for each block") as error:
        load_recipe("se", settings=settings).model.build().create(10, SHAPE)
    assert "\n" not in error.value.message


def test_a_file_of_a_pruned_network_is_read_and_refused_where_it_does_not_fit(tmp_path):
    dense, args = network(), {key: list(value) for key, value in KINDS["dmsresnet"].items()}
    save_weights(dense, card(dense, args), tmp_path / "dense.safetensors")
    widths = [8, 16, 16, 24, 24]
    pruned = narrowed(dense, widths)
    save_weights(pruned, card(pruned, args | {"mid_widths": widths}), tmp_path / "pruned.safetensors")
    x = torch.randn(2, *SHAPE)
    assert torch.equal(load_weights(tmp_path / "pruned.safetensors")[0](x), pruned(x))

    begun = timm.create_model("dmsresnet", mid_widths=widths, **KINDS["dmsresnet"]).eval()
    begin_from(begun, str(tmp_path / "dense.safetensors"), "dmsresnet")
    assert torch.equal(begun(x), pruned(x))

    save_weights(pruned, card(pruned, args | {"mid_widths": [8] * 5}), tmp_path / "wrong.safetensors")
    with pytest.raises(UserError, match=r"wrong.safetensors cannot be loaded \(stages.0.1"):
        load_weights(tmp_path / "wrong.safetensors")
    with pytest.raises(UserError, match=r"give --set model.args.mid_widths='\[8, 16, 16, 24, 24\]'"):
        begin_from(dense, str(tmp_path / "pruned.safetensors"), "dmsresnet")
    with pytest.raises(UserError, match="give --arch dmsresnet"):
        begin_from(timm.create_model("resnet18"), str(tmp_path / "pruned.safetensors"), "resnet18")


def test_an_exported_pruned_network_agrees(tmp_path):
    args = {"depths": [1, 1], "widths": [16, 16], "mid_widths": [8, 4]}
    learn = quiet(dms_learner(load_data("digits", bs=64), "se", settings={"model.args": args}))
    learn.model.eval()
    session = onnxruntime.InferenceSession(export_model(learn, tmp_path / "pruned.onnx"))
    pixels = learn.dls.valid_ds.images[:5]
    [found] = session.run(None, {"pixels": pixels.numpy()})
    x, _ = learn.dls.valid.one_batch()
    with torch.no_grad():
        expected = learn.model.cpu()(x[:5].cpu()).softmax(1)
    np.testing.assert_allclose(found, expected, atol=1e-5)


# The command

FEW = ("--device", "cpu", "--set", "data.batch_size=512")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run of se on the digits, with seed 1."""
    out = tmp_path_factory.mktemp("dense")
    wanted = Wanted(("se",), seeds=(1,), out=out, epochs=2, settings={"data.batch_size": 512})
    opened = Opened("digits")
    [stage] = plan(wanted, opened)
    return run_stage(stage, opened).folder.path


def test_wide_layers_lose_sixteen_filters_at_a_time():
    dense = timm.create_model("dmsresnet", depths=(1, 1, 1), widths=(56, 64, 72))
    with torch.no_grad():
        for stage in dense.stages:
            stage[0].residual[0].weight.fill_(1.0)
            stage[0].residual[1].weight.copy_(torch.linspace(1.0, 2.0, stage[0].residual[1].num_features))
    seen = {tuple(widths_within(dense, share, SHAPE)) for share in (0.99, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3)}
    first, second, third = (sorted({widths[place] for widths in seen}) for place in range(3))
    assert any(width % 16 for width in first)
    assert min(len(second), len(third)) > 1
    assert all(width % 8 == 0 for width in first)
    assert all(width % 16 == 0 for width in second)
    assert all(width % 16 == 0 or width == 72 for width in third)  # its odd eight go first


def test_a_run_is_pruned_trained_on_and_reported_beside_its_parent(dms, run, tmp_path):  # noqa: F811
    code, out, _ = dms("prune", run, *FEW, "--epochs", 2, "--out", "x")
    assert code == 0
    folder, parent = RunFolder(tmp_path / "x" / "se-macs50" / "seed1"), RunFolder(run)
    facts, before = folder.facts(), parent.facts()
    recipe = folder.recipe()
    assert facts.title == "Half the MACs of se"
    assert facts.teacher == facts.begun_from == "/".join(run.parts[-3:])
    assert 0.3 * before.macs < facts.macs <= 0.5 * before.macs
    widths = recipe.model.args["mid_widths"]
    model, own = load_weights(folder.weights)
    assert mid_widths_of(model) == widths == own.args["mid_widths"]
    assert hooked_macs(model) * 8 * 8 / 16 / 16 == pytest.approx(facts.macs, rel=0.01)
    said = " ".join(out.split())
    assert f"{facts.parameters:,} parameters" in said
    assert f"before, {before.macs / 1e6:.4g} M MACs and {before.parameters:,} parameters" in said
    assert "after pruning, with batch norms re-estimated" in said
    assert dms("report", "x", run)[0] == 0
    page = (tmp_path / "report" / "report.md").read_text()
    for line, of in (("| + SE |", before), ("| Half the MACs of se (1) |", facts)):
        [row] = [each for each in page.splitlines() if each.startswith(line)]
        assert f"| {of.parameters:,} | {of.macs / 1e6:,.4g} |" in row

    code, out, _ = dms("prune", run, *FEW, "--epochs", 2, "--out", "x")
    assert code == 0
    assert "epoch 1/2" not in out
    assert "after pruning" not in out
    code, _, err = dms("prune", run, *FEW, "--epochs", 3, "--out", "x")
    assert code == 2
    assert "schedule.epochs 2 -> 3" in err
    assert dms("export", folder.path, "pruned.onnx")[0] == 0


def test_a_pruned_run_that_is_stopped_after_every_step_ends_the_same(dms, run, tmp_path):  # noqa: F811
    args = ("prune", run, *FEW, "--epochs", 2, "--macs", 0.6)
    assert dms(*args, "--out", "whole")[0] == 0
    stops = 0
    while (code := dms(*args, "--out", "parts", "--time-limit", "0.001s", "--checkpoint-steps", 1)[0]) == 75:
        stops += 1
    assert (code, stops) == (0, 5)
    same_run(tmp_path / "whole" / "se-macs60" / "seed1", tmp_path / "parts" / "se-macs60" / "seed1")


def test_the_same_network_from_scratch_has_fresh_weights_and_the_same_teacher(dms, run, tmp_path):  # noqa: F811
    args = (run, *FEW, "--epochs", 1, "--out", "x")
    code, out, _ = dms("prune", *args, "--from-scratch")
    assert code == 0
    assert "with fresh weights" in " ".join(out.split())
    assert dms("prune", *args)[0] == 0
    fresh, pruned = (RunFolder(tmp_path / "x" / name / "seed1") for name in ("se-macs50-scratch", "se-macs50"))
    ours, theirs = fresh.recipe(), pruned.recipe()
    assert ours.model.args == theirs.model.args
    assert (ours.model.weights, ours.teacher) == (None, "/".join(run.parts[-3:]))
    assert ours.optimizer.lr == load_recipe("fast").optimizer.lr > theirs.optimizer.lr
    assert fresh.facts().teacher_digest == pruned.facts().teacher_digest
    assert (fresh.facts().begun_from, fresh.facts().title) == (None, "Half the MACs of se, from scratch")


def test_what_cannot_be_pruned_is_refused_in_a_line(dms, run, tmp_path):  # noqa: F811
    save_weights(
        timm.create_model("resnet10t", num_classes=10), card(None, {}, "resnet10t"), tmp_path / "r.safetensors"
    )
    (tmp_path / "empty").mkdir()
    for command, words in {
        ("prune", "r.safetensors", "--data", "digits"): "only this package's residual networks can be pruned; ",
        ("prune", "r.safetensors"): "no images to prune with",
        ("prune", "nowhere"): "no model at nowhere",
        ("prune", "empty"): "empty holds no finished run",
        ("prune", run, "--macs", 1): "prune.macs is 1.0; it must be above 0 and below 1",
        ("prune", run, "--macs", 0.05): "prune.macs is 0.05, and the narrowest blocks still have",
        ("prune", run, "--set", "prune.mac=1"): "did you mean 'prune.macs'",
        ("run", "prune"): "recipe 'prune' prunes a trained network; give it: dms-fastai prune RUN",
        ("run", "prune", "--from", run, "--arch", "resnet18"): "has the network that it prunes; leave --arch out",
        ("run", "prune", "--from", run, "--budget", "5m"): "has the network that it prunes; leave --budget out",
    }.items():
        code, _, err = dms(*command)
        assert (code, err.count("\n")) == (2, 1), err
        assert words in err
    with pytest.raises(UserError, match=r"give model\.weights, a finished run's folder"):
        dms_learner(load_data("digits"), "prune", teacher=run)


def test_batch_norms_are_re_estimated_on_the_students_images_where_a_teacher_sees_larger_ones(tmp_path):
    folder = tmp_path / "photos"
    for index, label in enumerate(range(24)):
        for split in ("train", "test"):
            (folder / split / str(label % 2)).mkdir(parents=True, exist_ok=True)
            pixels = np.random.default_rng(index).integers(0, 256, (32, 32, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / split / str(label % 2) / f"{index}.png")
    dense = timm.create_model("test_dmsresnet", num_classes=2)
    own = ModelCard("test_dmsresnet", ["0", "1"], (0.5,) * 3, (0.2,) * 3, (3, 16, 16), {})
    save_weights(dense, own, tmp_path / "dense.safetensors")
    large = Teacher(timm.create_model("test_dmsresnet", num_classes=2), (0.5,) * 3, (0.2,) * 3, None, (32, 32))
    means = []
    for view in ({}, {"view": 32}):
        torch.manual_seed(0)
        dls = load_data(str(folder), bs=24, size=16, device="cpu", pad=0.0, flip=0.0, **view)
        settings = {"model.weights": str(tmp_path / "dense.safetensors"), "prune.macs": 0.8, "bf16": False}
        learn = quiet(dms_learner(dls, "prune", large, settings=settings))
        list(after_pruning(learn))
        means.append(next(m.running_mean for m in learn.model.modules() if isinstance(m, nn.BatchNorm2d)))
    torch.testing.assert_close(*means, atol=0.02, rtol=0.02)


def test_blocks_that_cannot_be_narrower_are_said():
    narrow = timm.create_model("dmsresnet_tiny", mid_widths=[8, 8, 8])
    with pytest.raises(UserError, match=r"prune.macs is 0.99, and these blocks cannot be narrower; prune a wider"):
        widths_within(narrow, 0.99, SHAPE)
