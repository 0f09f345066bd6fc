"""torch.compile for training on a GPU."""

import os
import shutil
from typing import Any

import torch
from fastai.callback.core import Callback
from fastai.callback.training import GradientAccumulation
from torch import nn
from torch.utils._triton import has_triton

from ..settings import Steps, checked
from ..training.losses import DMSLoss
from ..training.parts import order_of
from .distill import TeacherDistill

__all__ = ["TorchCompile", "can_compile"]


def can_compile(device: torch.device) -> bool:
    """Whether torch.compile works on `device` and gains speed there: a GPU with Triton, and a C compiler for Triton.

    On a CPU it works, too, but trains the networks of this package at 0.6 to 0.8 times the speed.
    """
    compilers = (os.environ.get("CC") or "cc", "gcc", "clang")
    return device.type == "cuda" and has_triton() and any(map(shutil.which, compilers))


@checked
class TorchCompile(Callback):
    """Compile student, teacher and loss, with CUDA graphs, if training on a GPU is long enough to be worth it.

    They are compiled in place, for the training batches alone. Weights keep their names. Validation, prediction and
    export, whose batches may have any size, use the modules as they were.
    """

    order = order_of("compile")
    compiled: tuple[tuple[nn.Module, Any], ...] | None = None
    _stateattrs = ("compiled",)

    def __init__(self, steps: Steps = 5_000):
        """
        Args:
            steps: Compile if the fit has at least so many training steps, and if `can_compile`. Compiling takes a
                minute or two, and a compiled step saves milliseconds.
        """
        super().__init__()
        self.steps = steps

    def before_train(self) -> None:
        if self.compiled is None:
            # Without CUDA graphs where gradients are accumulated: the next step would write over them.
            graphs = not any(isinstance(cb, GradientAccumulation) for cb in self.learn.cbs)
            self.compiled = tuple((module, compiled_call(module, graphs)) for module in self.worth_compiling())
        self.switch(on=True)

    def worth_compiling(self) -> list[nn.Module]:
        learn = self.learn
        steps = learn.n_epoch * len(learn.dls.train)  # of the whole fit, so that a resumed one decides alike
        if steps < self.steps or not can_compile(next(learn.model.parameters()).device):
            return []
        teachers = [cb.network for cb in learn.cbs if isinstance(cb, TeacherDistill)]
        return [learn.model, *teachers, *([learn.loss_func] if isinstance(learn.loss_func, DMSLoss) else [])]

    def before_batch(self) -> None:
        if self.compiled and self.learn.training:
            torch.compiler.cudagraph_mark_step_begin()  # the last step's outputs may be written over

    def after_train(self) -> None:
        self.switch(on=False)

    def after_fit(self) -> None:
        self.release()

    def switch(self, on: bool) -> None:
        for module, call in self.compiled or ():
            module._compiled_call_impl = call if on else None  # torch has no method to undo compile()

    def release(self) -> None:
        """Leave the modules as they were. A Learner calls this if an exception ends a fit without an event."""
        self.switch(on=False)
        self.compiled = None


def compiled_call(module: nn.Module, graphs: bool) -> Any:
    """The call of the compiled module, in place of the module's; `reduce-overhead` is torch's name for CUDA graphs."""
    module.compile(dynamic=False, mode="reduce-overhead" if graphs else "default")
    return module._compiled_call_impl
