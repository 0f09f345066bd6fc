"""Commands that look for good values: tune, lr-find."""

import gc
import os
import time
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Annotated

import typer
from rich.box import SIMPLE_HEAD
from rich.table import Table

from ..clock import seconds_of
from ..errors import UserError
from ..files import check_file, check_folder
from ..names import check_device, source_name
from ..runs.threads import Load
from ..runs.wanted import SEVERAL
from .app import app, console
from .common import choose_threads, progress_bar, say_what_is_read, stopped
from .options import (
    TRUST,
    Arch,
    DataSet,
    Epochs,
    Labels,
    Schedule,
    Seed,
    Settings,
    TeacherOf,
    arch_words,
    data_words,
    device_words,
    home,
    key_words,
    recipe_words,
    wanted_by,
)

if TYPE_CHECKING:
    from ..runs.tune import Trial


BEST = 10  # trials in the table of `tune`


@app.command()
def tune(
    recipe: Annotated[str, typer.Argument(help="A recipe or a .toml.", autocompletion=recipe_words)],
    over: Annotated[
        list[str],
        typer.Option(
            help="table.key=SPACE; may be repeated. SPACE: log(0.01,1), uniform(0,0.5), int(1,8) or [64,128].",
            autocompletion=key_words,
        ),
    ],
    trials: Annotated[int, typer.Option(min=1, help="How many there are to be, earlier ones among them.")] = 20,
    data: DataSet = "digits",
    labels: Labels = None,
    arch: Arch = None,
    teacher: TeacherOf = None,
    epochs: Epochs = None,
    schedule: Schedule = None,
    seed: Seed = None,
    set_: Settings = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or mps.", autocompletion=device_words)] = "auto",
    out: Annotated[Path | None, typer.Option(help="Folder of the search, instead of artifacts/DATA/tune.")] = None,
    time_limit: Annotated[str | None, typer.Option(help="Stop cleanly after 90s, 9m or 2h.")] = None,
    trust_pickle: Annotated[bool, TRUST] = False,
) -> None:
    """Search for the best values of a recipe's keys, judged by training images that are held out: a tenth of them.

    Trials that are behind the others end early. After a stop, the same command goes on. It needs the package optuna.
    """
    from ..runs.spaces import parse_space, searched

    load = Load()
    deadline = None if time_limit is None else time.monotonic() + seconds_of(time_limit)
    spaces = [parse_space(text) for text in over]
    wanted = wanted_by(
        [recipe],
        data,
        labels=labels,
        arch=arch,
        teacher=teacher,
        epochs=epochs,
        schedule=schedule,
        seed=seed,
        set_=set_,
        out=out,
    )
    check_device(device)
    wanted = searched(wanted, spaces)
    check_folder(wanted.root)
    if find_spec("optuna") is None:
        raise UserError("tune needs one more package: pip install optuna, or 'dms-fastai[tune]'")

    from ..runs.machine import choose_device
    from ..runs.plan import Opened
    from ..runs.stage import Manner
    from ..runs.tune import tune as search

    gc.freeze()
    manner = Manner(device=choose_device(device), deadline=deadline)
    if manner.device.type == "cpu" and "OMP_NUM_THREADS" not in os.environ:
        manner = replace(manner, threads=choose_threads(load))
    if wanted.teacher is not None:
        say_what_is_read(Path(wanted.teacher), trust_pickle)
    found, reason = search(wanted, spaces, trials, Opened(wanted.data, trust_pickle), manner, console)
    _show_trials(found)
    if reason is not None and len(found) < trials:
        stopped(reason, f"{len(found)} of {trials} trials", False)


def _show_trials(found: "list[Trial]") -> None:
    """The best trials as a table, and the best one's settings as `run` takes them."""
    from ..show import toml_value

    if not found:
        return
    best = found[0]
    listing = Table("trial", *best.settings, "accuracy, %", "", box=SIMPLE_HEAD)
    for trial in found[:BEST]:
        right = "" if trial.accuracy is None else f"{100 * trial.accuracy:.2f}"
        state = "" if trial.state == "finished" else trial.state
        listing.add_row(str(trial.number), *map(toml_value, trial.settings.values()), right, state)
    console.print(listing)
    if len(found) > BEST:
        console.say(f"the {BEST} best of {len(found)} trials")
    if best.state == "finished":
        settings = " ".join(f"--set {quote(f'{key}={toml_value(value)}')}" for key, value in best.settings.items())
        console.say(f"best, by {best.images:,} held-out images and one seed: {settings}")


@app.command("lr-find")
def lr_find(
    recipe: Annotated[str, typer.Argument(help="A recipe or a .toml.", autocompletion=recipe_words)],
    data: Annotated[str, typer.Option(help="As in run.", autocompletion=data_words)] = "digits",
    labels: Annotated[Path | None, typer.Option(help="As in run.")] = None,
    arch: Annotated[str | None, typer.Option(help="As in run.", autocompletion=arch_words)] = None,
    teacher: Annotated[str | None, typer.Option(help="As in run.", autocompletion=recipe_words)] = None,
    seed: Annotated[int, typer.Option(help="As in run.")] = 0,
    set_: Settings = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or mps.", autocompletion=device_words)] = "auto",
    out: Annotated[Path, typer.Option(help="The plot, a .png.")] = Path("lr-find.png"),
    trust_pickle: Annotated[bool, TRUST] = False,
) -> None:
    """Look for a learning rate, as fastai's lr_find does: a plot, and a line to paste. Takes a hundred steps.

    A teacher takes part if it is at hand. No run is written.
    """
    load = Load()
    out, data = home(out), os.path.expanduser(data)
    if out.suffix != ".png":
        raise UserError(f"{out} is no name of a plot; give --out NAME.png")
    check_file(out)
    if recipe in SEVERAL:
        raise UserError("lr-find takes one recipe; baseline, se, mixup and kd are those of the ablation")
    wanted = wanted_by([recipe], data, labels=labels, arch=arch, teacher=teacher, seed=seed, set_=set_)
    check_device(device)
    wanted.resolved()

    from ..runs.lr_find import STEPS, find_rates, plot_rates, without_untrained_teacher
    from ..runs.machine import choose_device
    from ..runs.plan import Opened, plan

    opened, on = Opened(data, trust_pickle), choose_device(device)
    if on.type == "cpu" and "OMP_NUM_THREADS" not in os.environ:
        choose_threads(load)
    *_, planned = plan(wanted, opened, device=on)
    stage = without_untrained_teacher(planned)
    if stage is not planned:
        console.say(f"without the teacher, which has not been trained: {planned.teacher}")
    console.say(f"{STEPS} steps of {stage.recipe.data.batch_size} images with {stage.recipe.model.name}")
    with progress_bar() as bar:
        task = bar.add_task("looking", total=STEPS)
        found = find_rates(stage, opened, on, lambda: bar.advance(task))
    plot_rates(found, stage.recipe.optimizer.lr, f"{stage.recipe.title} on {source_name(data)}", out)
    console.say(f"plot: {out}")
    console.say(f"--set optimizer.lr={found.suggested:.2g}")
