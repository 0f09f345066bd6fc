"""Checks before a run is resumed: its folder must have the same recipe, images, teacher, code and arithmetic."""

import os
from collections.abc import Mapping
from typing import Any

import torch

from .. import processes
from ..callbacks.bf16 import has_bf16
from ..errors import FolderError
from ..recipes import Recipe, flat
from ..run_folder import RunFolder
from .machine import device_name

__all__ = [
    "arithmetic",
    "other_arithmetic",
    "refuse_other_code",
    "refuse_other_origin",
    "refuse_other_recipe",
    "refuse_unknown",
]


def refuse_other_recipe(
    recipe: Recipe, folder: RunFolder, of: tuple[str, ...] | None = None, or_else: str = "--restart"
) -> None:
    """Raise a FolderError if a run's recipe differs; it names the keys. Compares the keys `of` alone, if given.

    So it does where `refuse_unknown` does.
    """
    refuse_unknown(folder)
    if not folder.recipe_file.is_file() or not folder.begun:
        return
    theirs, ours = (flat(r.without_folders().to_table()) for r in (folder.recipe(), recipe))
    keys = sorted(key for key in of or theirs.keys() | ours.keys() if theirs.get(key) != ours.get(key))
    if "model.weights" in keys and folder.facts().begun_digest and os.path.exists(recipe.model.weights or ""):
        keys.remove("model.weights")  # their hashes are compared, however somebody spells where they are
    if keys:
        changes = ", ".join(f"{key} {theirs.get(key, 'default')} -> {ours.get(key, 'default')}" for key in keys)
        raise FolderError(
            f"{folder.path} holds a run of another recipe ({changes}); give --out another folder, or {or_else}"
        )


def refuse_unknown(folder: RunFolder, restart: bool = False) -> None:
    """Raise a FolderError if nothing says of which run a folder's weights or checkpoints are.

    With `restart`, they may be replaced if a recipe beside them says that they are a run's.
    """
    ours = folder.recipe_file.is_file()
    if folder.lost is not None and not (restart and ours):
        raise FolderError(
            f"{folder.path} has {folder.lost.name}, and no {folder.facts_file.name} that says what run it is of; give "
            f"--out another folder" + ", or --restart" * ours
        )


def refuse_other_origin(origin: Mapping[str, Any], folder: RunFolder, or_else: str = "--restart") -> None:
    """Raise a FolderError if a folder's run has other images, another teacher, or began from other weights."""
    if not folder.begun:
        return
    facts, begun = folder.facts(), origin.get("begun_digest")
    if begun and facts.begun_digest and begun != facts.begun_digest:  # neither of a file that is gone, nor of before
        raise FolderError(f"{folder.path} holds a run from other weights; give --out another folder, or {or_else}")
    for key, what in (("data_digest", "on other images"), ("teacher_digest", "with another teacher")):
        if key in origin and getattr(facts, key) != origin[key]:
            raise FolderError(f"{folder.path} holds a run {what}; give --out another folder, or {or_else}")


def refuse_other_code(versions: Mapping[str, str], folder: RunFolder) -> None:
    """Raise a FolderError if an unfinished run was begun by other code, which would give other results."""
    if not folder.begun:
        return
    theirs = folder.facts().versions
    changes = [
        f"{name} {theirs.get(name)} -> {versions[name]}" for name in versions if theirs.get(name) != versions[name]
    ]
    if changes:
        raise FolderError(
            f"{folder.path} holds an unfinished run of other code ({', '.join(changes)}); finish it with that code, "
            f"give --out another folder, or --restart"
        )


def arithmetic(learn: Any) -> dict[str, Any]:
    """What decides, beside recipe and code, which bits a training step gives: kept in checkpoints."""
    device = torch.device(learn.dls.device)
    facts = {"device": device_name(device), "bf16": hasattr(learn, "bf16") and has_bf16(device)}
    if processes.count() > 1:
        facts["processes"] = processes.count()
    return facts | ({"threads": torch.get_num_threads()} if device.type == "cpu" else {})


def other_arithmetic(before: Mapping[str, Any], now: Mapping[str, Any]) -> str | None:
    """What has changed since a checkpoint, in words; None if nothing has.

    Raises:
        FolderError: Something has, and the run is to be deterministic.
    """
    keys = [key for key in dict.fromkeys([*before, *now]) if before.get(key) != now.get(key)]
    if not keys:
        return None
    changes = ", ".join(f"{key} {before.get(key, 'unset')} -> {now.get(key, 'unset')}" for key in keys)
    if torch.are_deterministic_algorithms_enabled():
        raise FolderError(
            f"the run was begun with different arithmetic ({changes}); resume it there, or without --deterministic"
        )
    return f"resumed with different arithmetic ({changes}): the last digits differ from those of an uninterrupted run"
