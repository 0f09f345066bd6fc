"""`dms-fastai lr-find`: fastai's search for a learning rate, for a stage that a run would train."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from fastai.callback.core import Callback
from fastai.callback.progress import ProgressCallback
from fastai.callback.schedule import lr_find, valley  # noqa: F401  (lr_find patches Learner)
from fastai.torch_core import set_seed

from ..errors import UserError
from ..files import whole
from ..learner import dms_learner
from ..run_folder import RunFolder
from ..terminal import printable
from .images import loaders_of
from .machine import is_out_of_memory
from .plan import Opened, Stage

__all__ = ["STEPS", "Rates", "find_rates", "plot_rates", "without_untrained_teacher"]

STEPS = 100
FIRST, LAST = STEPS // 10, 5  # steps at either end that fastai leaves out
CURVE, MARK = "#0b6e99", "#c77d0a"


@dataclass(frozen=True)
class Rates:
    """The learning rate of each step, its smoothed loss, and the rate that fastai suggests."""

    rates: list[float]
    losses: list[float]
    suggested: float


def without_untrained_teacher(stage: Stage) -> Stage:
    """The stage as it is or, if a run is to be its teacher and has not finished, the stage without distillation."""
    if not isinstance(stage.teacher, Path) or RunFolder(stage.teacher).finished:
        return stage
    return replace(stage, recipe=stage.recipe.without_teacher(), teacher=None)


def find_rates(
    stage: Stage, opened: Opened, device: torch.device | str = "cpu", step: Callable[[], None] = lambda: None
) -> Rates:
    """Train for up to `STEPS` steps with a growing learning rate, and see where the loss falls. Nothing is kept.

    Args:
        stage, opened: As in `run_stage`.
        device: The device to train on.
        step: Called after each step.

    Raises:
        UserError: Data, teacher or batches do not fit, or the loss grows too soon to tell anything.
    """
    recipe = replace(stage.recipe, fixed_views=None)  # whose answers would be kept
    teacher = opened.teacher_of(stage)
    sets = opened.sets(recipe, teacher)
    dls = loaders_of(recipe, sets, device)
    set_seed(stage.seed)
    with TemporaryDirectory() as folder:  # for the weights that fastai saves meanwhile
        learn = dms_learner(dls, recipe, teacher, path=folder, cbs=Callback(after_batch=lambda _: step()))
        learn.remove_cb(ProgressCallback)
        try:
            learn.lr_find(num_it=STEPS, show_plot=False, suggest_funcs=None)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            raise UserError(
                f"batches of {dls.bs} images do not fit into memory; take a smaller data.batch_size"
            ) from None
    losses = torch.stack(list(learn.recorder.losses)).float()
    sound = int(losses.isfinite().cumprod(0).sum())  # steps before the first loss that is no number
    rates, losses = learn.recorder.lrs[:sound], losses[:sound].tolist()
    looked_at = slice(FIRST, sound - LAST)
    if sound - LAST - FIRST < 2:
        raise UserError(f"the loss grows after {sound} steps, at a learning rate of {rates[-1] if rates else 0:.2g}")
    suggested, _ = valley(rates[looked_at], losses[looked_at], STEPS)
    return Rates([float(rate) for rate in rates], losses, suggested)


def plot_rates(found: Rates, own: float, title: str, file: Path) -> None:
    """Draw the loss over the learning rate, with the suggestion and the recipe's own rate, as a .png.

    Args:
        found: What `find_rates` gave.
        own: The recipe's learning rate.
        title: The title above the curve.
        file: The .png, written whole or not at all.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    drawn = Figure(figsize=(6, 3.6), layout="constrained")
    axes = drawn.subplots()
    seen = slice(FIRST, len(found.rates) - LAST)
    axes.plot(found.rates[seen], found.losses[seen], color=CURVE)
    axes.axvline(found.suggested, color=MARK, label=f"suggested: {found.suggested:.2g}")
    axes.axvline(own, color=MARK, linestyle=":", label=f"the recipe's: {own:.2g}")
    axes.set_xscale("log")
    axes.set_xlabel("learning rate")
    axes.set_ylabel("loss")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    drawn.suptitle(printable(title), parse_math=False)
    file.parent.mkdir(parents=True, exist_ok=True)
    with whole(file) as partial:
        FigureCanvasAgg(drawn).print_png(partial)
