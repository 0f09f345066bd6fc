"""Checks before a run is resumed: its folder must have the same recipe, images, teacher and code."""

from collections.abc import Mapping
from typing import Any

from ..errors import UserError
from ..recipes import Recipe, flat
from ..run_folder import RunFolder

__all__ = ["refuse_other_code", "refuse_other_origin", "refuse_other_recipe"]


def refuse_other_recipe(
    recipe: Recipe, folder: RunFolder, of: tuple[str, ...] | None = None, or_else: str = "--restart"
) -> None:
    """Raise a UserError if a run's recipe differs; it names the keys. Compares the keys `of` alone, if given."""
    if not folder.recipe_file.is_file() or not folder.begun:
        return
    theirs, ours = (flat(r.to_table()) for r in (folder.recipe(), recipe))
    keys = sorted(key for key in of or theirs.keys() | ours.keys() if theirs.get(key) != ours.get(key))
    if keys:
        changes = ", ".join(f"{key} {theirs.get(key, 'default')} -> {ours.get(key, 'default')}" for key in keys)
        raise UserError(
            f"{folder.path} holds a run of another recipe ({changes}); give --out another folder, or {or_else}"
        )


def refuse_other_origin(origin: Mapping[str, Any], folder: RunFolder, or_else: str = "--restart") -> None:
    """Raise a UserError if a folder's run has other images or another teacher."""
    if not folder.begun:
        return
    facts = folder.facts()
    for key, what in (("data_digest", "on other images"), ("teacher_digest", "with another teacher")):
        if key in origin and getattr(facts, key) != origin[key]:
            raise UserError(f"{folder.path} holds a run {what}; give --out another folder, or {or_else}")


def refuse_other_code(versions: Mapping[str, str], folder: RunFolder) -> None:
    """Raise a UserError if an unfinished run was begun by other code, which would give other results."""
    if not folder.begun:
        return
    theirs = folder.facts().versions
    changes = [
        f"{name} {theirs.get(name)} -> {versions[name]}" for name in versions if theirs.get(name) != versions[name]
    ]
    if changes:
        raise UserError(
            f"{folder.path} holds an unfinished run of other code ({', '.join(changes)}); finish it with that code, "
            f"give --out another folder, or --restart"
        )
