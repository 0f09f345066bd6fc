"""torch.compile for training on a GPU."""

import os
import shutil
from functools import cache
from typing import Any

import torch
from fastai.callback.training import GradientAccumulation
from torch import nn
from torch.utils._triton import has_triton

from .. import processes
from ..data.imageset import ImageSet
from ..errors import notice
from ..settings import Steps, checked
from ..training.losses import DMSLoss
from ..training.parts import order_of
from .distill import TeacherDistill
from .feature_distill import FeatureDistill
from .fixed_views import FixedViews
from .releasing import Releasing

__all__ = ["TorchCompile", "can_compile", "rehearse"]


def can_compile(device: torch.device) -> bool:
    """Whether torch.compile works on `device` and gains speed there: a GPU with Triton, and a C compiler for Triton.

    On a CPU it works, too, but trains the networks of this package at 0.6 to 0.8 times the speed.
    """
    compilers = (os.environ.get("CC") or "cc", "gcc", "clang")
    return device.type == "cuda" and has_triton() and any(map(shutil.which, compilers))


@checked
class TorchCompile(Releasing):
    """Compile student, teacher and loss, with CUDA graphs, if training on a GPU is long enough to be worth it.

    They are compiled in place, for the training batches alone. Weights keep their names. Validation, prediction and
    export, whose batches may have any size, use the modules as they were. If a line of code cannot be compiled here,
    nothing is, and a notice says why.
    """

    order = order_of("compile")
    compiled: tuple[tuple[nn.Module, Any], ...] | None = None
    graphs = True  # also of Learners that were exported before there was a choice
    _stateattrs = ("compiled",)

    def __init__(self, steps: Steps = 5_000, graphs: bool = True):
        """
        Args:
            steps: Compile if the fit has at least so many training steps, for each size of its images where
                `ProgressiveResize` changes it, and if `can_compile`. Compiling takes half a minute for each size, and a
                compiled step saves milliseconds.
            graphs: Whether to use CUDA graphs, too.
        """
        super().__init__()
        self.steps, self.graphs = steps, graphs

    def before_train(self) -> None:
        if self.compiled is None:
            self.compiled = self.calls()
        self.switch(on=True)

    def calls(self) -> tuple[tuple[nn.Module, Any], ...]:
        """The modules to compile, each with its compiled call."""
        modules = self.worth_compiling()
        if not modules:
            return ()
        # Without CUDA graphs where gradients are accumulated: the next step would write over them. Nor where other
        # processes wait for gradients, which a graph would keep from them until its end.
        graphs = self.graphs and not any(isinstance(cb, GradientAccumulation) for cb in self.learn.cbs)
        graphs = graphs and processes.count() == 1
        failure = rehearse(next(self.learn.model.parameters()).device, mode_of(graphs))
        if failure is not None:
            hint = "; --set compile.graphs=false compiles without CUDA graphs" if graphs else ""
            notice(f"training is not compiled, because that fails here: {failure}{hint}")
            return ()
        return tuple((module, compiled_call(module, graphs)) for module in modules)

    def worth_compiling(self) -> list[nn.Module]:
        learn = self.learn
        steps = learn.n_epoch * len(learn.dls.train)  # of the whole fit, so that a resumed one decides alike
        if steps < self.steps * self.sizes() or not can_compile(next(learn.model.parameters()).device):
            return []
        if any(isinstance(cb, (FeatureDistill, FixedViews)) for cb in learn.cbs):
            return []  # what hooks catch would leave a graph, and graphs have random states of their own
        teachers = [cb.network for cb in learn.cbs if isinstance(cb, TeacherDistill)]
        loss = learn.loss_func
        # An alpha that changes would be compiled anew in every step.
        return [learn.model, *teachers, *([loss] if isinstance(loss, DMSLoss) and loss.distillation.constant else [])]

    def sizes(self) -> int:
        """How many sizes the student's images have in training: each is compiled anew."""
        resize, data = getattr(self.learn, "progressive_resize", None), self.learn.dls.train_ds
        return len(resize.shapes(data.shape)) if resize is not None and isinstance(data, ImageSet) else 1

    def before_batch(self) -> None:
        if self.compiled and self.learn.training:
            torch.compiler.cudagraph_mark_step_begin()  # the last step's outputs may be written over

    def after_train(self) -> None:
        self.switch(on=False)

    def switch(self, on: bool) -> None:
        for module, call in self.compiled or ():
            module._compiled_call_impl = call if on else None  # torch has no method to undo compile()

    def release(self) -> None:
        """Leave the modules as they were."""
        self.switch(on=False)
        self.compiled = None


def mode_of(graphs: bool) -> str:
    """torch's name for compiling with or without CUDA graphs."""
    return "reduce-overhead" if graphs else "default"


def compiled_call(module: nn.Module, graphs: bool) -> Any:
    """The call of the compiled module, in place of the module's."""
    module.compile(dynamic=False, mode=mode_of(graphs))
    return module._compiled_call_impl


@cache
def rehearse(device: torch.device, mode: str) -> str | None:
    """Compile a line of code and its gradient, and run them a few times; gives what fails, None if nothing does.

    A compiler without a header or a driver without graphs fails here as it would in training, where nothing could
    catch it any more. Draws no random numbers.
    """
    try:
        line = torch.compile(lambda x: (2 * x).relu().sum(), dynamic=False, mode=mode)
        for _ in range(4):  # a graph is recorded in the second, and replayed from the third
            torch.compiler.cudagraph_mark_step_begin()
            x = torch.ones(64, device=device, requires_grad=True)
            line(x).backward()
            if x.grad.tolist() != [2.0] * 64:
                return "a compiled gradient is wrong"
    except Exception as error:  # whatever the compiler, the driver or the system raises
        return f"{type(error).__name__}: {next(iter(str(error).strip().splitlines()), '')}"
    return None
