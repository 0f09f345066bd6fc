"""Commands that show what there is: recipes, show, models, report."""

import os
from pathlib import Path
from typing import Annotated

import typer
from rich.box import SIMPLE_HEAD
from rich.table import Table

from ..errors import UserError, either
from ..files import check_folder
from ..names import entries, source_name
from ..recipes import ablation_of, added_by, flat, load_recipe, recipe_names
from ..runs.wanted import SEVERAL
from .app import app, console
from .common import show_runs
from .options import KEYS, Settings, data_words, home, settings_of, shown_words


@app.command()
def recipes() -> None:
    """List the recipes and what each adds to the one before."""
    from ..show import toml_value

    for name in recipe_names():
        chain = ablation_of(name)
        base = f", extends {chain[-2]}" if len(chain) > 1 else ""
        console.say(f"{name}: {load_recipe(name).title}{base}")
        for key, value in flat(added_by(name)).items():
            console.say(f"    {key} = {toml_value(value)}")
    console.say(f"{either(SEVERAL)} in a command stands for several of them")


@app.command()
def show(
    recipe: Annotated[
        str, typer.Argument(help="A recipe or a .toml; or the word keys, for all keys.", autocompletion=shown_words)
    ],
    data: Annotated[
        str | None, typer.Option(help="A data set, to which the recipe may adapt.", autocompletion=data_words)
    ] = None,
    set_: Settings = None,
) -> None:
    """Print a whole recipe as TOML: what each key means, and which file its value comes from; or list all keys."""
    from ..show import annotated, list_of_keys

    if recipe == KEYS and (data is not None or set_):
        raise UserError("show keys lists all keys; leave --data and --set out, or name a recipe")
    name = "" if data is None else source_name(os.path.expanduser(data))
    text = list_of_keys() if recipe == KEYS else annotated(os.path.expanduser(recipe), name, settings_of(set_))
    console.print(text, end="", soft_wrap=True)


@app.command()
def models() -> None:
    """List this package's architectures: parameters for 10 classes, and multiply-accumulates for one image."""
    listing = Table("model", "parameters", "MACs", "what it is", box=SIMPLE_HEAD, padding=0, show_edge=False)
    for column in listing.columns[:3]:
        column.no_wrap = True
    for column in listing.columns[1:3]:
        column.justify = "right"
    for entry in entries():
        weights = f"; with weights, {entry.weights}" if entry.weights else ""
        listing.add_row(entry.name, entry.parameters, entry.macs, entry.what + weights)
    console.print(listing)
    console.print("Any other timm architecture works as well: dms-fastai run se --arch resnet18")


@app.command()
def report(
    folders: Annotated[list[Path] | None, typer.Argument(help="Folders with runs; ./artifacts by default.")] = None,
    out: Annotated[Path, typer.Option(help="Folder of the page and its plots.")] = Path("report"),
) -> None:
    """Show all runs in the folders, finished or not: tables in the terminal, and a page with tables and plots."""
    from ..run_folder import find_runs

    check_folder(home(out))
    runs, problems = find_runs([home(folder) for folder in folders or [Path("artifacts")]])

    from ..report.page import write_report
    from ..report.rows import sections
    from ..report.shipped import shipped

    theirs = shipped()
    show_runs(runs, theirs)
    found = sections(runs, theirs)
    for problem in [*problems, *(damage for section in found for damage in section.damages)]:
        console.say(f"left out: {problem.what}")
    page = write_report(found, problems, home(out))
    console.say(f"report: {page}")
