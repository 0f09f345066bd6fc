"""What makes training fast: nothing waits for the device, events are cheap, and none of it changes the result."""

import gzip
import io
import itertools
import json
import platform
import re
import shutil
import types

import pytest
import timm
import torch
from fastai.callback.core import Callback
from fastai.callback.mixup import MixUp as StockMixUp
from fastai.callback.training import GradientAccumulation
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat
from fastai.metrics import accuracy as stock_accuracy
from fastai.optimizer import SGD
from rich.console import Console
from torch.autograd import DeviceType
from torch.utils._python_dispatch import TorchDispatchMode

from dms_fastai import dms_learner, load_data
from dms_fastai.callbacks import torch_compile
from dms_fastai.callbacks.bf16 import fast_kernels
from dms_fastai.errors import Notice
from dms_fastai.learner import memory
from dms_fastai.learner.recorder import accuracy
from dms_fastai.runs import progress
from dms_fastai.runs.profile import PARTS, STEPS, TIMED, WARM_UP, StepProfile, busy_milliseconds
from dms_fastai.training import optimizers
from tests.conftest import quiet

# What waits for a GPU: reading a value, copying to or from the host, and shapes that depend on values.
WAITING_OPS = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "_unique2", "unique_dim"}
WAITING_CALLS = [(torch.Tensor, name) for name in ("item", "cpu", "numpy", "tolist", "__array__")]
WAITING_CALLS += [(torch, name) for name in ("tensor", "as_tensor", "from_numpy")]


class Waits(TorchDispatchMode):
    """Notes, while it is on, everything that would wait for a GPU if the tensors were there."""

    def __init__(self):
        super().__init__()
        self.seen, self.patches = [], pytest.MonkeyPatch()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket.__name__ in WAITING_OPS:
            self.seen.append(func.overloadpacket.__name__)
        if func.overloadpacket.__name__ == "index" and any(t is not None and t.dtype == torch.bool for t in args[1]):
            self.seen.append("index by a mask")
        return func(*args, **(kwargs or {}))

    def __enter__(self):
        for owner, name in WAITING_CALLS:
            self.patches.setattr(owner, name, self._noting(name, getattr(owner, name)))
        return super().__enter__()

    def __exit__(self, *exception):
        self.patches.undo()
        return super().__exit__(*exception)

    def _noting(self, name, call):
        def noting(*args, **kwargs):
            self.seen.append(name)
            return call(*args, **kwargs)

        return noting


class FromTheSecondStepToTheLast(Callback):
    """Has `waits` on in training, but for the first step, which may put things where they stay."""

    order, run_valid = 2000, False

    def __init__(self, waits):
        super().__init__()
        self.waits = waits

    def after_batch(self):
        if self.learn.iter == 0:
            self.waits.__enter__()
        elif self.learn.iter == len(self.learn.dls.train) - 1:
            self.waits.__exit__(None, None, None)


@pytest.mark.parametrize("recipe", ["baseline", "mixup", "kd", "authors/kd"])
@pytest.mark.parametrize("schedule", ["cosine", "one-cycle"])
def test_a_training_epoch_never_waits_for_the_device(dls, teacher, recipe, schedule, monkeypatch):
    monkeypatch.setattr(progress, "REFRESH_SECONDS", 1e9)  # it reads the loss so often, and says so
    taught = {"teacher": teacher} if "kd" in recipe else {}
    learn = quiet(dms_learner(dls, recipe, settings={"schedule.name": schedule}, **taught))
    waits = Waits()
    with progress.RichProgress("", NoHistory(), Console(file=io.StringIO(), force_terminal=True)) as shown:
        learn.fit_recipe(1, cbs=[FromTheSecondStepToTheLast(waits), shown])
    assert waits.seen == []


BEYOND_THE_PAPER = {
    "augment.trivial": True,
    "augment.cutout": 0.25,
    "cutmix.share": 0.5,
    "ema.decay": 0.99,
    "label_smoothing": 0.1,
    "optimizer.sam": 0.05,
}


@pytest.mark.parametrize("divergence", ["dkd", "dist"])
def test_nor_does_what_the_paper_does_not_have(teacher, divergence, ahead):
    dls = load_data("digits", bs=64, border="mirror", flip=0.5, alternate=True)
    settings = BEYOND_THE_PAPER | {"distill.divergence": divergence}
    learn = quiet(dms_learner(dls, "kd", teacher=[teacher, teacher], settings=settings))
    waits = Waits()
    learn.fit_recipe(1, cbs=FromTheSecondStepToTheLast(waits))
    assert waits.seen == []
    assert learn.recorder.losses[-1].isfinite()


class NoHistory:
    """What the progress display reads at the end of an epoch."""

    rows = ({"epoch": 1, "valid_accuracy": 0.5, "seconds": 1.0},)


def test_the_count_of_waits_finds_those_of_stock_fastai(dls):
    """Or the test above could not fail."""
    waits = Waits()
    model = timm.create_model("test_dmsresnet")
    cbs = [StockMixUp(), FromTheSecondStepToTheLast(waits)]
    quiet(Learner(dls, model, CrossEntropyLossFlat(), opt_func=SGD, metrics=stock_accuracy, cbs=cbs)).fit(1)
    assert len(waits.seen) >= len(dls.train)


def test_progress_reads_the_loss_seldom(dls, monkeypatch):
    reads = []
    real = torch.Tensor.__float__
    monkeypatch.setattr(torch.Tensor, "__float__", lambda t: reads.append(1) or real(t))
    learn = quiet(dms_learner(dls, "se"))
    with progress.RichProgress("", NoHistory(), Console(file=io.StringIO(), force_terminal=True)) as shown:
        learn.fit(1, cbs=shown)
    assert 1 <= len(reads) < len(dls.train) / 2


def test_accuracy_is_fastais():
    pred, y = torch.randn(50, 7), torch.randint(7, (50,))
    assert accuracy(pred, y) == stock_accuracy(pred, y)


# The order of an epoch


def test_an_epochs_order_is_torchs_next_permutation(dls):
    loader = dls.train
    for seed in (3, 4):
        torch.manual_seed(seed)
        order = torch.randperm(loader.n).tolist()
        torch.manual_seed(seed)
        labels = [int(y) for _, batch in loader for y in batch]
        assert labels == loader.dataset.labels[order[: len(labels)]].tolist()


def test_an_order_as_fastai_gives_it_is_followed():
    """Its own loaders hand over numbers one by one, and one that never end."""
    loader = load_data("digits", bs=64).valid
    order = torch.randperm(loader.n)
    for given in (order, iter(order.tolist())):
        labels = torch.cat([y for _, y in loader.create_batches(given)])
        assert torch.equal(labels, loader.dataset.labels[order])
    loader.get_idxs = lambda: itertools.repeat(5)
    assert set(torch.cat([y for _, y in loader]).tolist()) == {int(loader.dataset.labels[5])}


def test_predictions_of_shuffled_images_come_back_in_order(dls):
    learn = quiet(dms_learner(dls, "se"))
    shuffled = dls.valid.new(shuffle=True)
    _, labels = learn.get_preds(dl=shuffled)
    assert torch.equal(labels, dls.valid_ds.labels)
    _, drawn = learn.get_preds(dl=shuffled, reorder=False)
    assert not torch.equal(drawn, dls.valid_ds.labels)


# Events


class Everything(Callback):
    """A callback that takes all events in one place."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __call__(self, event_name):
        self.seen.append(event_name)


class ByMethod(Callback):
    order = 5

    def __init__(self):
        super().__init__()
        self.seen = []

    def before_fit(self):
        self.seen.append("before_fit")

    def after_fit(self):
        self.seen.append("after_fit")


for name in ("before_batch", "after_pred", "after_loss", "before_step", "after_batch", "before_validate"):
    setattr(ByMethod, name, lambda self, name=name: self.seen.append(name))


def seen_by(callback, learner_class, dls, **attributes):
    """What a callback sees in an epoch of a Learner."""
    learn = learner_class(dls)
    for key, value in attributes.items():
        setattr(callback, key, value)
    learn.fit(1, cbs=callback)
    return callback.seen


def stock(dls):
    return quiet(Learner(dls, timm.create_model("test_dmsresnet"), CrossEntropyLossFlat(), opt_func=SGD))


def ours(dls):
    return quiet(dms_learner(dls, "se"))


@pytest.mark.parametrize(
    ("callback", "attributes"),
    [
        (Everything, {}),
        (ByMethod, {}),
        (ByMethod, {"run_train": False}),
        (ByMethod, {"run_valid": False}),
        (ByMethod, {"run": False}),
    ],
)
def test_callbacks_are_sent_what_a_stock_learner_sends_them(dls, callback, attributes):
    assert seen_by(callback(), ours, dls, **attributes) == seen_by(callback(), stock, dls, **attributes)


def test_a_callback_switched_off_is_off_for_one_fit(dls):
    learn, callback = ours(dls), ByMethod()
    learn.add_cb(callback)
    callback.run = False
    learn.fit(1)
    assert callback.seen == []
    learn.fit(1)
    assert "after_batch" in callback.seen


def test_callbacks_can_come_and_go_in_the_middle_of_an_epoch(dls):
    guest = ByMethod()

    class Host(Callback):
        def after_batch(self):
            if self.learn.training and self.learn.iter == 3:
                self.learn.add_cb(guest)
            if self.learn.training and self.learn.iter == 7:
                self.learn.remove_cb(guest)

    ours(dls).fit(1, cbs=Host())
    assert guest.seen.count("before_batch") == 4


def test_an_error_in_a_callback_arrives_as_it_is(dls):
    class Faulty(Callback):
        def after_loss(self):
            raise ValueError

    with pytest.raises(ValueError, match=r"^$"):
        ours(dls).fit(1, cbs=Faulty())


# The optimiser


def test_norms_and_biases_can_be_spared_the_decay(dls):
    settings = {"optimizer.wd_bn_bias": False, "optimizer.weight_decay": 0.1, "optimizer.lr": 0.5}
    learn = dms_learner(dls, "se", settings=settings)
    learn.create_opt()
    before = {name: p.detach().clone() for name, p in learn.model.named_parameters()}
    for p in learn.model.parameters():
        p.grad = torch.zeros_like(p)
    learn.opt.step()
    for name, p in learn.model.named_parameters():
        kept = 1 - 0.5 * 0.1 if p.ndim > 1 else 1.0
        torch.testing.assert_close(p.detach(), before[name] * kept, msg=name)
    assert any(p.ndim == 1 and p.abs().sum() > 0 for p in learn.model.parameters())
    learn.opt.set_hypers(wd=0.2, lr=0.25)  # what fit(wd=..., lr=...) does
    assert [g["weight_decay"] for g in learn.opt.opt.param_groups] == [0.2, 0.0] * 2  # body and head
    assert [g["lr"] for g in learn.opt.opt.param_groups] == [0.25] * 4


@pytest.mark.parametrize("wd_bn_bias", [True, False])
def test_the_groups_of_a_splitter_keep_their_rates_and_freeze(wd_bn_bias):
    model = timm.create_model("test_dmsresnet")
    head = list(model.fc.parameters())
    body = [p for p in model.parameters() if all(p is not h for h in head)]
    opt = optimizers.optimizer([body, head], 0.1, optimizers.SGD(wd_bn_bias=wd_bn_bias))
    opt.set_hyper("lr", slice(0.01, 0.1))
    assert [h["lr"] for h in opt.hypers] == pytest.approx([0.01, 0.1])
    for group in opt.opt.param_groups:
        in_body = any(p is b for p in group["params"] for b in body)
        assert group["lr"] == pytest.approx(0.01 if in_body else 0.1)
    opt.set_hyper("mom", [0.8, 0.9])
    assert [h["mom"] for h in opt.hypers] == [0.8, 0.9]
    assert [set(map(id, group)) for group in opt.param_lists] == [set(map(id, group)) for group in (body, head)]
    opt.freeze()
    assert not any(p.requires_grad for p in body)
    assert all(p.requires_grad for p in head)
    opt.unfreeze()
    assert all(p.requires_grad for p in body)


def test_fused_sgd_does_what_torchs_own_does(dls):
    """Ten steps of a recipe with halves, against torch's SGD over two groups made by hand."""
    learn = dms_learner(dls, "se", settings={"optimizer.wd_bn_bias": False})
    learn.create_opt()
    twin = timm.create_model("test_dmsresnet")
    twin.load_state_dict(learn.model.state_dict())
    groups = [[p for p in twin.parameters() if (p.ndim > 1) == many] for many in (True, False)]
    theirs = torch.optim.SGD(
        [{"params": groups[0], "weight_decay": 5e-4}, {"params": groups[1], "weight_decay": 0.0}],
        lr=0.1, momentum=0.9, foreach=False,
    )  # fmt: skip
    for _ in range(10):
        for p, q in zip(learn.model.parameters(), twin.parameters(), strict=True):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        learn.opt.step()
        theirs.step()
    for p, q in zip(learn.model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q)


# Compiling


@pytest.fixture
def compiling(monkeypatch):
    if shutil.which("g++") is None and shutil.which("clang++") is None:
        pytest.skip("there is no C++ compiler")
    monkeypatch.setattr(torch_compile, "can_compile", lambda device: True)


def test_compiled_training_is_eager_training(dls, teacher, compiling):
    """Dropout aside, whose random numbers a compiler draws in its own way.

    It also adds up in its own order, and what that changes in the last bit grows from step to step.
    """

    def train(compile):
        torch.manual_seed(0)
        settings = {"compile": compile, "bf16": False, "model.drop_rate": 0.0}
        learn = quiet(dms_learner(dls, "kd", teacher=teacher, settings=settings))
        seen = []
        learn.fit_recipe(1, cbs=Callback(before_validate=lambda cb: seen.append(cb.learn.model._compiled_call_impl)))
        assert seen == [None]  # validation is eager
        return learn

    compiled, eager = train("always"), train("never")
    torch.testing.assert_close(
        torch.stack(compiled.recorder.losses[:5]), torch.stack(eager.recorder.losses[:5]), rtol=1e-3, atol=1e-3
    )
    assert compiled.model.state_dict().keys() == eager.model.state_dict().keys()
    assert all(m._compiled_call_impl is None for m in (compiled.model, compiled.loss_func, teacher.model))
    compiled.model.load_state_dict(eager.model.state_dict())
    assert list(compiled.validate()) == pytest.approx(list(eager.validate()))


def test_an_interrupted_fit_leaves_nothing_compiled(dls, monkeypatch):
    class Interrupt(Callback):
        def before_batch(self):
            raise KeyboardInterrupt

    monkeypatch.setattr(torch_compile, "can_compile", lambda device: True)
    monkeypatch.setattr(torch_compile, "rehearse", lambda device, mode: None)
    learn = quiet(dms_learner(dls, "se", settings={"compile": "always"}))
    with pytest.raises(KeyboardInterrupt):
        learn.fit(1, cbs=Interrupt())
    assert learn.model._compiled_call_impl is None
    assert learn.loss_func._compiled_call_impl is None


@pytest.mark.parametrize(("compile", "there"), [("auto", True), ("always", False), ("never", True)])
def test_short_fits_and_cpus_are_not_compiled(dls, monkeypatch, compile, there):
    monkeypatch.setattr(torch_compile, "can_compile", lambda device: there)
    monkeypatch.setattr(torch.nn.Module, "compile", lambda *_, **__: pytest.fail("compiled"))
    quiet(dms_learner(dls, "se", settings={"compile": compile})).fit(1)


def test_a_resumed_fit_is_compiled_as_it_was_begun(dls, monkeypatch):
    compiled = []
    monkeypatch.setattr(torch_compile, "can_compile", lambda device: True)
    monkeypatch.setattr(torch_compile, "rehearse", lambda device, mode: None)
    monkeypatch.setattr(torch_compile, "compiled_call", lambda module, graphs: compiled.append(module))
    learn = quiet(dms_learner(dls, "se"))
    learn.torch_compile.steps = 3 * len(dls.train)
    learn.fit(3, start_epoch=2)
    assert compiled == [learn.model, learn.loss_func]


@pytest.mark.parametrize(("enough", "count"), [(0, 2), (1, 0)])
def test_each_size_of_the_images_needs_its_steps(monkeypatch, enough, count):
    """Digits of 32 pixels that begin with 16: five sizes."""
    compiled = []
    monkeypatch.setattr(torch_compile, "can_compile", lambda device: True)
    monkeypatch.setattr(torch_compile, "rehearse", lambda device, mode: None)
    monkeypatch.setattr(torch_compile, "compiled_call", lambda module, graphs: compiled.append(module))
    settings = {"progressive_resize.smallest": 0.5}
    learn = quiet(dms_learner(load_data("digits", bs=512, size=32), "se", arch="test_dmsresnet", settings=settings))
    learn.torch_compile.steps = 2 * len(learn.dls.train) // 5 + enough
    learn.fit(2)
    assert len(compiled) == count


@pytest.fixture
def rehearsing(monkeypatch):
    """As on a GPU; what is rehearsed is forgotten."""
    monkeypatch.setattr(torch_compile, "can_compile", lambda device: True)
    rehearse = torch_compile.rehearse
    rehearse.cache_clear()
    yield
    rehearse.cache_clear()


def test_where_nothing_can_be_compiled_training_is_eager(dls, rehearsing, monkeypatch, recwarn):
    def train(**settings):
        torch.manual_seed(0)
        learn = quiet(dms_learner(load_data("digits", bs=64), "se", settings=settings))
        learn.fit(1)
        return torch.stack(learn.recorder.losses)

    def without_a_header(*_, **__):
        raise RuntimeError("fatal error: Python.h: No such file\ncompilation terminated")

    eager = train(compile=False)
    assert not [each for each in recwarn if "compiled" in str(each.message)]
    monkeypatch.setattr(torch, "compile", without_a_header)
    said = "training is not compiled, because that fails here: RuntimeError: fatal error: Python.h: No such file; "
    with pytest.warns(Notice, match=f"{said}--set compile.graphs=false compiles without CUDA graphs"):
        found = train(**{"compile.steps": 0})
    assert torch.equal(found, eager)


@pytest.mark.parametrize("wrong", [False, True])
def test_a_rehearsal_compares_what_is_compiled(rehearsing, monkeypatch, wrong):
    monkeypatch.setattr(torch, "compile", lambda line, **_: (lambda x: line(3 * x)) if wrong else line)
    expected = "a compiled gradient is wrong" if wrong else None
    before = torch.get_rng_state()
    assert torch_compile.rehearse(torch.device("cpu"), "default") == expected
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("settings", "cbs", "graphs"),
    [({}, [], True), ({"compile.graphs": False}, [], False), ({}, [GradientAccumulation(128)], False)],
)
def test_cuda_graphs_are_a_choice(dls, rehearsing, monkeypatch, settings, cbs, graphs):
    seen = []
    monkeypatch.setattr(torch_compile, "rehearse", lambda device, mode: seen.append(mode))
    monkeypatch.setattr(torch_compile, "compiled_call", lambda module, graphs: seen.append(graphs))
    quiet(dms_learner(dls, "se", settings={"compile.steps": 0, **settings}, cbs=cbs)).fit(1)
    assert seen == ["reduce-overhead" if graphs else "default", graphs, graphs]


@pytest.mark.parametrize("fails", [False, True])
def test_fast_kernels_leave_torch_as_it_was(fails):
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.benchmark
    try:
        with fast_kernels(torch.device("cuda")):
            assert torch.get_float32_matmul_precision() == "high"
            assert torch.backends.cudnn.benchmark
            if fails:
                raise RuntimeError
    except RuntimeError:
        assert fails
    assert (torch.get_float32_matmul_precision(), torch.backends.cudnn.benchmark) == before
    with fast_kernels(torch.device("cpu")):
        assert (torch.get_float32_matmul_precision(), torch.backends.cudnn.benchmark) == before


# The profile


def test_the_parts_of_a_step_add_up(dls, teacher, tmp_path):
    out, seconds = io.StringIO(), []

    class Steps(Callback):
        order, run_valid = 2000, False

        def before_train(self):
            self.began = progress.time.perf_counter()

        def after_batch(self):
            seconds.append(progress.time.perf_counter() - self.began)
            self.began += seconds[-1]

    learn = quiet(dms_learner(dls, "kd", teacher=teacher))
    with StepProfile(tmp_path, Console(file=out, width=100)) as profile:
        learn.fit(2, cbs=[*profile.edges, Steps()])
    split = json.loads((tmp_path / "step.json").read_text())["milliseconds"]
    assert list(split) == list(PARTS)
    assert all(value > 0 for value in split.values())
    timed = seconds[WARM_UP : WARM_UP + TIMED]  # the same steps, from outside
    assert sum(split.values()) == pytest.approx(1e3 * sum(timed) / TIMED, rel=0.1)
    for part in PARTS:
        assert re.search(rf"{part} +\d+\.\d\d +\d+\.\d %", out.getvalue()), part
    trace = tmp_path / "trace.json.gz"
    names = {event.get("name") for event in json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]}
    assert set(PARTS) <= names
    assert "aten::convolution" in names
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step.json", "trace.json.gz"]


def test_a_gpu_is_as_busy_as_its_kernels_and_copies():
    """On the host, and in named ranges, the profiler counts the same microseconds again."""

    def event(where, microseconds, named=False):
        return types.SimpleNamespace(
            device_type=where, self_device_time_total=microseconds, is_user_annotation=named, is_legacy=False
        )

    host, gpu = DeviceType.CPU, DeviceType.CUDA
    events = [event(host, 700.0), event(gpu, 700.0), event(gpu, 50.0), event(gpu, 800.0, named=True), event(host, 0.0)]
    assert busy_milliseconds(events) == pytest.approx(0.75)


def test_sams_second_pass_is_not_the_optimisers(dls, tmp_path):
    learn = quiet(dms_learner(dls, "se", settings={"optimizer.sam": 0.05}))
    with StepProfile(tmp_path, Console(file=io.StringIO())) as profile:
        learn.fit(2, cbs=profile.edges)
    split = json.loads((tmp_path / "step.json").read_text())["milliseconds"]
    assert split["backward"] > split["forward"] > split["optimiser"]


def test_too_few_steps_for_a_profile_are_said(dls, tmp_path):
    out = io.StringIO()
    with StepProfile(tmp_path, Console(file=out)) as profile:
        quiet(dms_learner(dls, "se")).fit(1, cbs=profile.edges)
    assert f"takes {STEPS} training steps, and there were {len(dls.train)}" in out.getvalue()
    assert list(tmp_path.iterdir()) == []


# Memory


def test_freed_memory_is_returned_once_a_minute_at_most(dls, monkeypatch):
    calls, clock = [], [0.0]
    monkeypatch.setattr(memory, "_malloc_trim", lambda: calls.append)
    monkeypatch.setattr(memory.time, "monotonic", lambda: clock[0])
    trimmer = memory.Trimmer()
    for seconds in (59.0, 60.0, 61.0, 119.0, 120.0):
        clock[0] = seconds
        trimmer.trim()
    assert calls == [0, 0]
    monkeypatch.setattr(memory, "SECONDS", 0.0)
    quiet(dms_learner(dls, "se")).fit(2)
    assert len(calls) == 4


def test_glibc_is_found_where_it_is():
    if platform.libc_ver()[0] != "glibc":
        pytest.skip("another C library")
    memory.Trimmer().trim()
    assert memory._malloc_trim()(0) in (0, 1)
