"""Windows, Macs and machines with little memory, by the behaviour that they are known for: none of them is here."""

import contextlib
import enum
import errno
import fcntl
import importlib.util
import os
import signal
import sys
import threading
import time
import types
from pathlib import Path, PureWindowsPath

import pytest
import torch

from dms_fastai import DMSLoss, UserError, dms_learner, release
from dms_fastai.callbacks import torch_compile
from dms_fastai.callbacks.bf16 import fast_kernels, has_bf16
from dms_fastai.files import whole
from dms_fastai.models.weights import save_weights
from dms_fastai.recipes import cut_path
from dms_fastai.run_folder import RunFolder
from dms_fastai.runs import at_once, checkpoint, lock, machine, stage, stop
from tests.test_runs import FILES, dms, same_run  # noqa: F401  (dms is a fixture)

RUN = ("run", "mixup", "--device", "cpu", "--epochs", 2, "--set", "data.batch_size=256")
PROC = Path("/proc/self/fd")


def name_of_open(descriptor):
    return Path(os.readlink(PROC / str(descriptor))).name


# Windows


@pytest.fixture
def windows(monkeypatch):
    """What Windows refuses is refused, and what it lacks is gone; gives two modules as they are imported there."""
    if not PROC.is_dir():
        pytest.skip("there is no /proc")
    real = types.SimpleNamespace(**{name: getattr(os, name) for name in ("fsync", "open", "read", "replace", "unlink")})
    locked_bytes = {}

    def is_open(path):
        with contextlib.suppress(OSError):
            inode = os.stat(path).st_ino
            for descriptor in os.listdir(PROC):
                with contextlib.suppress(OSError):
                    if os.fstat(int(descriptor)).st_ino == inode:
                        return True
        return False

    def fsync(descriptor):
        if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            raise OSError(errno.EBADF, "Bad file descriptor")
        real.fsync(descriptor)

    def open_(path, flags, *args, **kwargs):
        if os.path.isdir(path) and "dir_fd" not in kwargs and not flags & os.O_DIRECTORY:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return real.open(path, flags, *args, **kwargs)

    def replace(source, target):
        if is_open(source) or is_open(target):
            raise PermissionError(errno.EACCES, "Access is denied", str(target))
        real.replace(source, target)

    def rename(source, target):
        if os.path.exists(target):
            raise FileExistsError(errno.EEXIST, "Cannot create a file when that file already exists", str(target))
        replace(source, target)

    def unlink(path, **kwargs):
        if not kwargs and is_open(path):
            raise PermissionError(errno.EACCES, "The process cannot access the file", str(path))
        real.unlink(path, **kwargs)

    def read(descriptor, n):
        """No byte that another has locked can be read."""
        place, theirs = os.lseek(descriptor, 0, os.SEEK_CUR), locked_bytes.get(os.fstat(descriptor).st_ino, -1)
        if place <= theirs < place + n:
            raise PermissionError(errno.EACCES, "Permission denied")
        return real.read(descriptor, n)

    def locking(descriptor, mode, n):
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise PermissionError(errno.EACCES, "Permission denied") from None
        locked_bytes[os.fstat(descriptor).st_ino] = os.lseek(descriptor, 0, os.SEEK_CUR)

    for name, refusing in (("fsync", fsync), ("open", open_), ("replace", replace), ("rename", rename)):
        monkeypatch.setattr(os, name, refusing)
    for name, refusing in (("unlink", unlink), ("remove", unlink), ("read", read)):
        monkeypatch.setattr(os, name, refusing)
    monkeypatch.delattr(os, "O_NOFOLLOW")
    for name in ("SIGHUP", "SIGUSR1", "SIGUSR2", "SIGXCPU"):
        monkeypatch.delattr(signal, name)
    monkeypatch.setattr(signal, "SIGBREAK", 21, raising=False)
    monkeypatch.setitem(sys.modules, "fcntl", None)
    monkeypatch.setitem(sys.modules, "msvcrt", types.SimpleNamespace(LK_NBLCK=2, locking=locking))
    modules = types.SimpleNamespace(lock=imported_anew(lock), stop=imported_anew(stop))
    monkeypatch.setattr(stage, "locked", modules.lock.locked)
    monkeypatch.setattr(stage, "StopOnRequest", modules.stop.StopOnRequest)
    return modules


def imported_anew(module):
    spec = importlib.util.spec_from_file_location(f"{module.__name__}_there", module.__file__)
    anew = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(anew)
    return anew


def test_a_run_on_windows_is_written_stopped_and_resumed(dms, tmp_path, windows, monkeypatch):  # noqa: F811
    for _ in range(2):
        assert dms(*RUN, "--out", "x", "--time-limit", "0.001s")[0] == 75
    code, out, _ = dms(*RUN, "--out", "x")
    assert code == 0
    assert "resuming after epoch 0 of 2, step 2" in out
    folder = tmp_path / "x" / "mixup" / "seed0"
    assert {file.name for file in folder.iterdir()} == FILES
    assert dms(*RUN, "--out", "x", "--restart")[0] == 0
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    assert dms(*RUN, "--out", "here")[0] == 0
    same_run(folder, tmp_path / "here" / "mixup" / "seed0")


def test_on_windows_a_folder_has_one_user(tmp_path, windows):
    locked = windows.lock.locked
    with locked(tmp_path):
        said = f"process {os.getpid()} on "
        for _ in range(2):  # who is refused takes nothing with him
            with pytest.raises(UserError, match=f"is in use by {said}"), locked(tmp_path):
                pass
        assert (tmp_path / lock.LOCK).read_text().startswith(said)
    assert not (tmp_path / lock.LOCK).exists()
    with locked(tmp_path):
        pass


def test_on_windows_a_link_for_a_lock_is_refused(tmp_path, windows):
    (tmp_path / "precious").write_text("mine")
    (tmp_path / lock.LOCK).symlink_to(tmp_path / "precious")
    with pytest.raises(UserError, match="is a link; remove it"), windows.lock.locked(tmp_path):
        pass
    assert (tmp_path / "precious").read_text() == "mine"


def test_a_teacher_has_the_same_name_on_every_system():
    assert cut_path(PureWindowsPath(r"artifacts\digits\teacher\seed0")) == "artifacts/digits/teacher/seed0"
    assert cut_path(PureWindowsPath(r"C:\me\artifacts\digits\teacher\seed0")) == "digits/teacher/seed0"
    assert cut_path("/home/me/a.safetensors, timm:resnet18") == "a.safetensors, timm:resnet18"


def test_on_windows_three_signals_ask_to_stop(windows, monkeypatch):
    assert windows.stop.SIGNALS == [signal.SIGINT, signal.SIGTERM, signal.SIGBREAK]
    monkeypatch.setattr(signal, "Signals", enum.IntEnum("Signals", {"SIGINT": 2, "SIGTERM": 15, "SIGBREAK": 21}))
    assert [windows.stop.name_of(number) for number in windows.stop.SIGNALS] == ["SIGINT", "SIGTERM", "SIGINT"]


def test_on_windows_a_file_that_is_read_is_replaced_once_it_is_closed(tmp_path, windows):
    file = tmp_path / "run.json"
    file.write_text("old")
    opened = file.open()
    threading.Timer(0.2, opened.close).start()
    with whole(file) as partial:
        partial.write_text("new")
    assert file.read_text() == "new"


def test_on_windows_a_file_that_stays_open_is_left_as_it_was(tmp_path, windows, monkeypatch):
    monkeypatch.setattr("dms_fastai.files.PATIENCE", 0.1)
    file = tmp_path / "run.json"
    file.write_text("old")
    with file.open(), pytest.raises(PermissionError), whole(file) as partial:
        partial.write_text("new")
    assert [(f.name, f.read_text()) for f in tmp_path.iterdir()] == [("run.json", "old")]


# What is flushed to disk


@pytest.mark.skipif(not PROC.is_dir(), reason="there is no /proc")
def test_what_a_power_cut_must_not_take_is_flushed(dms, tmp_path, monkeypatch):  # noqa: F811
    flushed, flush = [], os.fsync
    monkeypatch.setattr(os, "fsync", lambda opened: flushed.append(name_of_open(opened)) or flush(opened))
    monkeypatch.setattr(checkpoint, "SHARE", 1e9)  # a checkpoint after every epoch
    assert dms(*RUN, "--out", "x")[0] == 0
    flushed = [name.split(f".{os.getpid()}.")[0] for name in flushed]
    assert FILES - {"curves.png"} <= set(flushed)
    assert sum(name.endswith(".pt") for name in flushed) == 2
    assert flushed.count("metrics.csv") == 1  # at the end, not in every epoch


# Devices


@pytest.fixture
def only(monkeypatch):
    """Has torch find this accelerator and no other."""

    def have(name):
        found = None if name is None else torch.device(name)
        monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available=False: found)

    return have


@pytest.mark.parametrize(
    ("there", "auto", "known"),
    [
        (None, "cpu", {"cpu"}),
        ("cuda", "cuda", {"cpu", "cuda"}),
        ("mps", "mps", {"cpu", "mps"}),
        ("xpu", "cpu", {"cpu"}),
    ],
)
def test_the_device_is_the_one_that_is_there(only, there, auto, known):
    only(there)
    assert machine.choose_device("auto") == torch.device(auto)
    for name in ("cpu", "cuda", "mps"):
        if name in known:
            assert machine.choose_device(name) == torch.device(name)
        else:
            with pytest.raises(UserError, match=f"device is {name}, but torch finds no GPU of this kind"):
                machine.choose_device(name)


def test_a_device_that_is_not_there_or_not_tested_is_said(dms, only, recwarn):  # noqa: F811
    only(None)
    code, _, err = dms("run", "se", "--device", "mps")
    assert code == 2
    assert err.count("\n") == 1
    assert "device is mps, but torch finds no GPU of this kind here" in err
    only("mps")
    recwarn.clear()
    machine.choose_device("cpu")
    assert not recwarn
    machine.choose_device("auto")
    assert [str(each.message) for each in recwarn] == [
        "device mps: nobody has trained on it yet; --device cpu is tested"
    ]


def test_on_mps_nothing_is_compiled_or_cast():
    device = torch.device("mps")
    assert not torch_compile.can_compile(device)
    assert not has_bf16(device)
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.benchmark
    with fast_kernels(device):
        assert (torch.get_float32_matmul_precision(), torch.backends.cudnn.benchmark) == before


def test_the_random_state_of_mps_is_kept(monkeypatch):
    assert checkpoint.get_random_states()["mps"] is None or torch.backends.mps.is_available()
    state, restored = torch.arange(3, dtype=torch.uint8), []
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.mps, "get_rng_state", state.clone)
    monkeypatch.setattr(torch.mps, "set_rng_state", restored.append)
    states = checkpoint.get_random_states()
    state += 1
    checkpoint.set_random_states(states)
    assert restored[0].tolist() == [0, 1, 2]
    checkpoint.set_random_states({key: value for key, value in states.items() if key != "mps"})  # of earlier versions
    assert len(restored) == 1


# Memory


def allocate(*_):
    torch.empty(2**60)


def fail(error):
    def failing(*_):
        raise error

    return failing


@pytest.mark.parametrize(
    "forward",
    [
        allocate,
        fail(MemoryError()),
        fail(RuntimeError("[enforce fail] DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes.")),
        fail(RuntimeError("MPS backend out of memory (MPS allocated: 9 GB)")),
    ],
    ids=["refused", "Python", "Windows", "mps"],
)
def test_too_little_memory_names_a_smaller_batch(dms, monkeypatch, forward):  # noqa: F811
    monkeypatch.setattr(DMSLoss, "forward", forward)
    code, _, err = dms("run", "se", "--out", "x", "--device", "cpu", "--set", "data.size=16")
    assert code == 2
    assert err.count("\n") == 1
    assert "batches of 64 images do not fit into memory; try --set data.batch_size=32 or --set data.size=8" in err
    assert RunFolder(Path("x/se/seed0")).facts().status == "interrupted"


def test_another_error_is_not_taken_for_too_little_memory(dms, monkeypatch):  # noqa: F811
    monkeypatch.setattr(DMSLoss, "forward", fail(RuntimeError("shapes differ")))
    with pytest.raises(RuntimeError, match="shapes differ"):
        dms("run", "se", "--out", "x", "--device", "cpu")


# Time limits


def test_no_stage_is_compiled_that_could_only_overrun(dms, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setattr(torch_compile, "can_compile", lambda device: True)
    monkeypatch.setattr(torch_compile, "rehearse", lambda device, mode: "not here")
    args = (*RUN, "--out", "x", "--set", "compile.steps=0", "--time-limit", "100s")
    monkeypatch.setattr(stop, "BEGAN", time.monotonic() - 1000)  # a stage of many in this process
    code, out, _ = dms(*args)
    assert code == 75
    assert "stopped (time limit): + SE + MixUp, interrupted, epoch 0/2" in out
    assert not (tmp_path / "x" / "mixup" / "seed0" / "metrics.csv").exists()
    monkeypatch.setattr(stop, "BEGAN", time.monotonic())  # the first: waiting would help nobody
    assert dms(*args)[0] == 0


def jobs(root, *recipes):
    """Stages that are not begun, as far as `train_at_once` looks at them."""
    for name in recipes:
        recipe = types.SimpleNamespace(name=name, compile=object(), to_toml=lambda: "")
        folder = RunFolder(root / name / "seed0")
        yield at_once.Job(types.SimpleNamespace(recipe=recipe, seed=0, folder=folder, teacher=None), root)


@pytest.mark.parametrize(("compiles", "left", "begun"), [(False, 60, 2), (True, 60, 0), (False, 30, 0), (True, 150, 2)])
def test_side_by_side_none_is_begun_that_could_only_overrun(tmp_path, monkeypatch, compiles, left, begun):
    """Each is given less time than there is: its clock starts only when it has imported what it needs."""
    given, now = [], time.monotonic()

    def start(job, options, threads):
        given.append(options)
        job.process = types.SimpleNamespace(poll=lambda: 0)

    times = iter([now])
    monkeypatch.setattr(at_once, "can_compile", lambda device: compiles)
    monkeypatch.setattr(at_once.Job, "start", start)
    monkeypatch.setattr(at_once, "LOOK", 0.0)
    monkeypatch.setattr(at_once.time, "monotonic", lambda: next(times, now + 1000 - left))
    console = types.SimpleNamespace(print=lambda *_, **__: None)
    reason = at_once.train_at_once(list(jobs(tmp_path, "se", "kd")), 2, [], now + 1000, console)
    assert given == [["--time-limit", f"{left - 10:.3f}s"]] * begun
    assert reason == (None if begun else "time limit")


def test_what_failed_side_by_side_says_its_own_error_and_not_that_of_a_process_before(tmp_path):
    """Of a log to which another process writes, too, such as one that goes on without its parent."""
    said = []
    [job] = jobs(tmp_path, "se")
    job.log.parent.mkdir()
    job.log.write_text("dms-fastai: error: an old one\n")
    job.begin, job.process = job.log.stat().st_size, types.SimpleNamespace(poll=lambda: 2)
    with job.log.open("a") as log:
        log.write("$ ...\ndms-fastai: error: x is in use\n" + "epoch 1/9\n" * 9)
    assert at_once.complain([job], [], types.SimpleNamespace(print=lambda text, **_: said.append(text))) == 2
    assert said == [f"--- {job.log}", "dms-fastai: error: x is in use"]
    with job.log.open("a") as log:
        job.begin = log.tell()
        log.write("Traceback:\n" + "  line\n" * 9 + "ValueError: 3\n")
    at_once.complain([job], [], types.SimpleNamespace(print=lambda text, **_: said.append(text)))
    assert said[-1].splitlines() == ["  line"] * 4 + ["ValueError: 3"]


# Signals


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="there is no SIGHUP")
def test_a_signal_that_nohup_has_a_process_ignore_does_not_stop_it():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stop.StopOnRequest(None).listening() as request:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not request.asked()
            os.kill(os.getpid(), signal.SIGUSR1)
            assert request.asked()
        with at_once._signals() as asked:
            os.kill(os.getpid(), signal.SIGHUP)
            os.kill(os.getpid(), signal.SIGTERM)
        assert asked == ["SIGTERM"]
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.skipif(os.name != "posix", reason="a process's parent is known elsewhere even if it has ended")
def test_a_process_whose_parent_has_been_killed_stops_as_if_it_had_been_told_to(dms):  # noqa: F811
    args = ["run", "se", "--arch", "test_dmsresnet", "--epochs", 1, "--set", "data.batch_size=700", "--device", "cpu"]
    code, out, _ = dms(*args, "--parent", os.getpid())
    assert (code, "stopped (SIGTERM): + SE, interrupted, epoch 0/1" in out) == (143, True)
    assert dms(*args, "--parent", os.getppid())[0] == 0


# Between the stages of a process


def test_a_stage_begins_without_the_graphs_of_the_one_before(dms):  # noqa: F811
    compiled = []
    double = torch.compile(lambda x: 2 * x, backend=lambda graph, inputs: compiled.append(graph) or graph.forward)
    for _ in range(2):
        double(torch.ones(2))
    assert len(compiled) == 1
    assert dms(*RUN, "--out", "x", "--epochs", 1)[0] == 0
    double(torch.ones(2))
    assert len(compiled) == 2


# Float32 where float32 is said


def test_released_weights_are_measured_without_tf32(dls, tmp_path, monkeypatch):
    learn, seen = dms_learner(dls, "se"), set()
    save_weights(learn.model, learn.card, tmp_path / "x.safetensors", torch.float16)
    forward = torch.nn.Conv2d.forward
    monkeypatch.setattr(
        torch.nn.Conv2d, "forward", lambda *args: seen.add(torch.backends.cudnn.allow_tf32) or forward(*args)
    )
    right, labels = release.correct(tmp_path / "x.safetensors", "digits", torch.device("cpu"))
    assert seen == {False}
    assert torch.backends.cudnn.allow_tf32
    assert len(right) == len(labels) == len(dls.valid_ds)
