"""A student and its pruned self as files, in float and in int8, beside one another: the end of `run edge`."""

import json
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np

from .bench import Row, bench
from .data import Sets
from .errors import UserError
from .export import export_model
from .export.formats import FORMATS, check_packages
from .files import amount, whole
from .models.dmsresnet import DMSResNet
from .models.prune import widths_within
from .recipes import Recipe
from .run_folder import EXPORTED, RunFolder

__all__ = ["check_student", "files_of"]

ANY = 100.0  # points of accuracy that int8 may lose: the table tells


def check_student(recipe: Recipe, sets: Sets, share: float) -> None:
    """Raise a UserError, before anything is trained, if a student could not be pruned to this share, or exported."""
    for ending in EXPORTED:
        check_packages(Path(f"{recipe.name}{ending}"), FORMATS[ending].packages, FORMATS[ending].extra)
    if sets.agreement:
        raise UserError(f"{sets.valid.name} has no validation images with labels, on which int8 could be checked")
    shape = 3, sets.size, sets.size
    network = recipe.model.build().create(len(sets.vocab), shape)
    if not isinstance(network, DMSResNet):
        raise UserError(
            f"edge prunes its student, and only this package's residual networks can be pruned, not "
            f"{recipe.model.name}; give another --arch: dms-fastai models lists them"
        )
    args = {**(recipe.model.args or {}), "mid_widths": widths_within(network, share, shape)}
    replace(recipe.model, args=args).build().create(len(sets.vocab), shape)


def files_of(folders: Sequence[RunFolder], sets: Sets, say: Callable[[str], None]) -> list[Row]:
    """Export runs in float and in int8, into their folders, and measure the files. What is there is not made again.

    Args:
        folders: Finished runs. The last one also gets the figures.
        sets: The images to calibrate with, and those to validate on.
        say: Gets the name of each file that is written.
    """
    figures, files = folders[-1].figures, []
    for folder in folders:
        for ending in EXPORTED:
            file = folder.exported(ending)
            if not file.is_file():
                own = {"data": sets, "tolerance": ANY} if FORMATS[ending].quantize else {}
                export_model(folder.path, file, **own)
                say(f"{file}: {amount(file.stat().st_size)}")
            files.append(file)
    if figures.is_file():
        with suppress(ValueError, TypeError, KeyError):  # a damaged file: it is all measured again
            found = json.loads(figures.read_text(encoding="utf-8"))
            return [Row(**row | {name: np.array(row[name]) for name in ("one", "many")}) for row in found]
    rows = [replace(row, name=row.name.removesuffix(row.format)) for row in bench(files, data=sets.valid)]
    told = [asdict(row) | {"one": row.one.tolist(), "many": row.many.tolist()} for row in rows]
    with whole(figures) as partial:
        partial.write_text(json.dumps(told), encoding="utf-8")
    return rows
