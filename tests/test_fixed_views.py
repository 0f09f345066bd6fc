"""Fixed views: the same batches again, a teacher that is asked once, and networks that do not notice."""

import errno
import os
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from threading import Barrier, BrokenBarrierError

import numpy as np
import pytest
import timm
import torch
from fastai.callback.core import Callback
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader
from fastai.learner import Learner

from dms_fastai import (
    Cutout,
    DMSLoss,
    FixedViews,
    MixUpOrCutMix,
    TeacherDistill,
    UserError,
    dms_learner,
    load_data,
    load_teacher,
)
from dms_fastai.errors import Notice
from dms_fastai.random_states import seed_everything
from dms_fastai.run_folder import Run
from dms_fastai.runs.profile import FirstOfAll
from dms_fastai.trained import KeptLogits, Teacher, ensemble
from dms_fastai.trained.network import averaged
from tests.conftest import quiet
from tests.test_runs import dms, same_run  # noqa: F401  (a fixture)

TINY = "test_dmsresnet"
AUGMENTED = {"cutout.size": 0.25, "trivial_augment": True, "model.drop_rate": 0.2}
MIRRORED = {"flip": 0.5, "alternate": True}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DMS_FASTAI_CACHE", str(tmp_path / "cache"))


class Batches(Callback):
    """Keeps what the student is shown, and what dropout would draw."""

    order, run_valid = 40, False

    def __init__(self):
        super().__init__()
        self.seen, self.targets, self.draws = [], [], []

    def after_pred(self):
        self.seen.append(self.learn.xb[0])
        self.targets.append([torch.as_tensor(y) for y in self.learn.yb])
        self.draws.append(torch.rand(()).item())


class Counting(torch.nn.Module):
    """A teacher that counts how often it is asked; copies count, too."""

    asked = 0

    def __init__(self):
        super().__init__()
        self.network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 8 * 8, 10))

    def forward(self, x):
        Counting.asked += len(x) > 2  # not when it is tried on two black images
        return self.network(x)


def train(seed, epochs, views=2, recipe="mixup", teacher=None, **settings):
    seed_everything(seed)
    batches = Batches()
    given = {**AUGMENTED, "fixed_views.count": views, **settings}
    learn = dms_learner(load_data("digits", bs=256, **MIRRORED), recipe, teacher, TINY, given)
    quiet(learn).fit_recipe(epochs, cbs=batches)
    return learn, batches


@pytest.mark.parametrize("views", [2, 3])
def test_the_batches_come_again_after_so_many_epochs_and_in_runs_with_other_seeds(views):
    _, one = train(0, 2 * views, views)
    _, other = train(1, views, views)
    steps = len(one.seen) // (2 * views)
    for index, x in enumerate(one.seen):
        again = one.seen[index % (views * steps)]
        assert torch.equal(x, again)
        assert all(map(torch.equal, one.targets[index], one.targets[index % (views * steps)]))
    assert all(map(torch.equal, other.seen, one.seen[: views * steps]))
    assert not torch.equal(one.seen[0], one.seen[steps])  # two views differ
    assert not torch.equal(one.seen[0], one.seen[1])


@pytest.mark.parametrize("workers", [0, 2])
def test_so_they_do_over_fastais_own_loaders(workers):
    def drawn(item):
        x, y = item
        return x + torch.rand(()), y

    items, seen = [(torch.full((3, 8, 8), float(index)), torch.tensor(index % 10)) for index in range(24)], []
    for seed in (0, 1):
        seed_everything(seed)
        loader = DataLoader(items, bs=6, shuffle=True, after_item=drawn, num_workers=workers)
        dls, batches = DataLoaders(loader, DataLoader(items, bs=24), device=torch.device("cpu")), Batches()
        cbs = [FixedViews(2), batches]
        quiet(Learner(dls, timm.create_model(TINY), torch.nn.CrossEntropyLoss(), cbs=cbs)).fit(4)
        seen.append(torch.stack(batches.seen).view(4, 24, -1))
    assert torch.equal(*seen)
    assert torch.equal(seen[0][:2], seen[0][2:])
    assert not torch.equal(seen[0][0], seen[0][1])


def test_what_the_network_draws_does_not_come_again():
    _, one = train(seed=0, epochs=4)
    _, other = train(seed=1, epochs=4)
    assert len(set(one.draws)) == len(one.draws)
    assert not set(one.draws) & set(other.draws)
    _, same = train(seed=0, epochs=4)
    assert same.draws == one.draws


def test_a_teacher_is_asked_once_and_never_by_a_later_run():
    torch.manual_seed(0)
    teacher, Counting.asked = load_teacher(Counting()), 0
    learn, _ = train(0, 4, recipe="kd", teacher=teacher)
    steps = len(learn.dls.train)
    assert Counting.asked == 2 * steps + 1  # once more, whether it says what is recalled
    train(1, 3, recipe="kd", teacher=teacher)
    assert Counting.asked == 2 * steps + 2
    train(1, 1, recipe="kd", teacher=teacher, **{"cutout.size": 0.5})
    assert Counting.asked == 3 * steps + 2  # other batches, other answers
    train(1, 1, recipe="kd", teacher=load_teacher(Counting()))
    assert Counting.asked == 4 * steps + 2  # and another teacher


def test_a_teacher_that_says_something_else_with_the_same_weights_is_asked(recwarn):
    torch.manual_seed(0)
    network = Counting()
    train(0, 1, recipe="kd", teacher=load_teacher(network))
    louder, Counting.asked = load_teacher(network), 0
    louder.model.register_forward_hook(lambda module, args, logits: 2 * logits)
    learn, _ = train(1, 2, recipe="kd", teacher=louder)
    assert Counting.asked == 2 * len(learn.dls.train)
    assert any("asked in every step, because it does not say what" in str(each.message) for each in recwarn)


def test_a_smaller_last_batch_has_no_answers_kept(recwarn):
    teacher, dls = load_teacher(Counting()), load_data("digits", bs=1000)
    dls.loaders[0] = dls.train.new(drop_last=False)
    Counting.asked = 0
    quiet(dms_learner(dls, "kd", teacher, TINY, {"fixed_views.count": 1})).fit_recipe(2)
    assert Counting.asked == 4
    assert any("the last batch is smaller" in str(each.message) for each in recwarn)


def test_whatever_decides_an_answer_tells_it_from_others():
    torch.manual_seed(0)
    network = load_teacher(Counting()).model
    network.network.insert(0, torch.nn.AdaptiveAvgPool2d(8))  # of any size

    def asked_by(teacher, seen=None, **loaded):
        dls, Counting.asked = load_data("digits", bs=512, **loaded), 0
        dls.train_ds.seen = seen
        settings = {"fixed_views.count": 1, "progressive_resize.smallest": 1.0}
        quiet(dms_learner(dls, "kd", teacher, TINY, settings)).fit_recipe(1)
        return Counting.asked

    one, other = Teacher(network, (0.5,) * 3, (0.5,) * 3), Teacher(network, (0.1,) * 3, (0.2,) * 3)
    two, three = ensemble([one, other]), ensemble([one, other], of="probabilities")
    assert [asked_by(each) for each in (one, one, other, two, three)] == [2, 1, 2, 4, 4]
    assert averaged(ensemble([three, one]).model) == ["logits", ["probabilities", None, None], None]
    assert [asked_by(one, **loaded) for loaded in ({"flip": 0.5}, {"balance": True})] == [2, 2]
    assert [asked_by(one, size=16, seen=seen) for seen in (None, 8)] == [2, 2]


def test_the_settings_of_callbacks_tell_answers_apart_in_any_learner():
    torch.manual_seed(0)
    teacher, own = load_teacher(Counting()), type("Own", (Cutout,), {})

    def asked_beside(*cbs):
        dls, Counting.asked = load_data("digits", bs=128), 0
        dls.loaders = [dl.new(dl.dataset.subset(torch.arange(256))) for dl in dls.loaders]
        cbs = [*cbs, FixedViews(1), TeacherDistill(teacher)]
        quiet(Learner(dls, timm.create_model(TINY), DMSLoss(), cbs=cbs)).fit(1)
        return Counting.asked

    assert [asked_beside(Cutout(size)) for size in (0.25, 0.25, 0.9)] == [2, 1, 2]
    assert asked_beside(Cutout(0.25), FirstOfAll(lambda name, learn: None)) == 1  # which only takes the time
    assert [asked_beside(MixUpOrCutMix(cutmix_alpha=a)) for a in (1.0, 1.0, 0.1)] == [2, 1, 2]
    for cb in (own(0.25), Callback(before_batch=lambda cb: None)):
        with pytest.warns(Notice, match=f"asked in every step, because {type(cb).__name__} may change the images"):
            assert [asked_beside(cb) for _ in range(2)] == [2, 2]


def test_what_is_recalled_is_what_the_teacher_says_of_the_same_batch():
    torch.manual_seed(0)
    teacher, told = load_teacher(Counting()), []

    class Told(Callback):
        order, run_valid = 41, False

        def after_pred(self):
            told.append((self.learn.xb[0], self.learn.yb[3]))

    seed_everything(3)
    given = {**AUGMENTED, "fixed_views.count": 1, "bf16": False}
    learn = dms_learner(load_data("digits", bs=256, device="cpu", **MIRRORED), "kd", teacher, TINY, given)
    quiet(learn).fit_recipe(3, cbs=Told())
    for x, logits in told:
        with torch.no_grad():
            torch.testing.assert_close(logits.float(), teacher.model.eval()(x), atol=2e-3, rtol=2e-3)


def test_answers_are_kept_as_they_come(tmp_path):
    answers, logits = KeptLogits(tmp_path / "a", (2, 3, 4, 5)), torch.randn(4, 5)
    assert answers.get(1, 2) is None
    answers.put(1, 2, logits)
    assert answers.share == pytest.approx(1 / 6)
    again = KeptLogits(tmp_path / "a", (2, 3, 4, 5))  # of another process
    assert torch.equal(again.get(1, 2), logits.half())
    assert again.get(1, 1) is None
    assert KeptLogits.of({"teacher": "x"}, (1, 1, 1, 2)).folder != KeptLogits.of({"teacher": "y"}, (1, 1, 1, 2)).folder
    with pytest.raises(UserError, match="answers take 2,000,000,000"):
        KeptLogits(tmp_path / "b", (10**9, 10**3, 10**3, 1000))
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be kept"):
        KeptLogits(tmp_path / "file" / "c", (1, 1, 1, 1))


def test_of_processes_that_begin_together_one_makes_the_files(tmp_path, monkeypatch):
    """Two threads, each with a lock of its own, would both be making the file where nothing keeps one back."""
    make, both, files = np.lib.format.open_memmap, Barrier(2), []

    def slowly(file, mode, *args):
        if mode == "w+":
            files.append(file)
            with suppress(BrokenBarrierError):
                both.wait(0.2)
        return make(file, mode, *args)

    monkeypatch.setattr(np.lib.format, "open_memmap", slowly)
    with ThreadPoolExecutor(2) as pool:
        one, other = pool.map(lambda _: KeptLogits(tmp_path / "a", (2, 3, 4, 5)), range(2))
    assert len(files) == 2  # logits, and what has been said
    one.put(0, 1, torch.ones(4, 5))
    assert torch.equal(other.get(0, 1), torch.ones(4, 5).half())


@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="this system reserves no room")
def test_room_on_the_disk_is_reserved(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", full)
        with pytest.raises(UserError, match=r"cannot be kept in .* \(No space left on device\)"):
            KeptLogits(tmp_path / "a", (2, 50, 64, 10))
    assert not list((tmp_path / "a").glob("*.np*"))
    KeptLogits(tmp_path / "a", (2, 50, 64, 10))
    found = (tmp_path / "a" / "logits.npy").stat()
    assert found.st_blocks * 512 >= found.st_size


def test_a_stopped_run_ends_as_one_without_interruption(dms, tmp_path):  # noqa: F811
    args = ["run", "kd", "--arch", TINY, "--set", f"teacher.model.name={TINY}", "--epochs", 3, "--device", "cpu"]
    args += ["--set", "fixed_views.count=2", "--set", "model.drop_rate=0.2", "--checkpoint-steps", 2]
    assert dms(*args, "--out", "whole")[0] == 0
    while (code := dms(*args, "--out", "parts", "--time-limit", "0.5s")[0]) == 75:
        pass
    assert code == 0
    same_run(tmp_path / "whole" / "kd" / "seed0", tmp_path / "parts" / "kd" / "seed0")
    facts = Run.read(tmp_path / "whole" / "kd" / "seed0").facts
    teacher = Run.read(tmp_path / "whole" / "teacher" / "seed0").facts
    assert facts.train_pflop.teacher == pytest.approx(teacher.macs * 2 * 2 * 22 * 64 / 1e15, rel=1e-5)


def test_what_does_not_go_together_is_said_before_the_first_step():
    with pytest.raises(UserError, match="count is 0; it must be at least 1"):
        FixedViews(0)
    with pytest.raises(UserError, match="feature_distill does not go with fixed_views"):
        train(0, 1, recipe="kd", teacher=timm.create_model(TINY), **{"feature_distill.weight": 1.0})
