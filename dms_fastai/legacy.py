"""Older forms of recipes and run folders, turned into today's, so that every run can always be read."""

from collections.abc import Mapping
from typing import Any

__all__ = ["modern_facts", "modern_layer", "modern_predictions", "modern_recipe"]

Table = dict[str, Any]

MOVED = {  # settings that moved to another table; a value that meant "off" leaves that table out
    "label_smoothing": ("loss", "label_smoothing"),
    "augment.cutout": ("cutout", "size"),
    "optimizer.clip_value": ("clip", "value"),
    "optimizer.sam": ("sam", "rho"),
}
SWITCHED = {  # words that switched a part on or off
    "augment.trivial": ("trivial_augment", {True: {}, False: False}),
    "precision": ("bf16", {"auto": {}, "float32": False}),
    "compile": ("compile", {"auto": {}, "always": {"steps": 0}, "never": False}),
}


def modern_layer(layer: Mapping[str, Any]) -> Table:
    """One layer of a recipe, from a file or a caller, in today's tables."""
    table = {key: dict(value) if isinstance(value, Mapping) else value for key, value in layer.items()}
    for old, (name, key) in MOVED.items():
        value = _taken(table, old)
        if value is not None:
            off = value == 0 and name == "cutout"
            table[name] = False if off else {**_as_table(table.get(name)), key: value}
    for old, (name, now) in SWITCHED.items():
        value = _taken(table, old, lambda v, now=now: isinstance(v, (str, bool)) and v in now)
        if value is not None:
            table[name] = now[value]
    if isinstance(table.get("distill"), dict):
        _divergence(table["distill"])
    if isinstance(table.get("model"), dict) and table["model"].get("args") == {}:
        del table["model"]["args"]  # there are none
    schedule = table.get("schedule")
    if isinstance(schedule, dict) and schedule.get("name") == "one-cycle":
        schedule.pop("step", None)  # it had no effect
    return table


def modern_recipe(table: Table, old: bool) -> Table:
    """A recipe whose layers have been merged, in today's tables."""
    mixup, cutmix = table.get("mixup"), table.get("cutmix")
    if isinstance(mixup, Mapping) and isinstance(cutmix, Mapping):  # meant MixUp or CutMix, drawn for each batch
        renamed = {"cutmix_alpha" if key == "alpha" else key: value for key, value in cutmix.items()}
        both = {key: value for key, value in mixup.items() if (key, value) != ("per", "batch")} | renamed
        table = {**table, "mixup": False, "cutmix": False, "mixup_or_cutmix": both}
    elif isinstance(cutmix, Mapping) and "share" in cutmix:  # the share had no effect without MixUp
        table = {**table, "cutmix": {key: value for key, value in cutmix.items() if key != "share"}}
    if old:  # these two were on unless a word said otherwise
        table = {"bf16": {}, "compile": {}, **table}
    return table


def modern_facts(facts: Mapping[str, Any]) -> Table:
    """The contents of a run.json, under today's names."""
    return {key.replace("_pictures", "_images"): value for key, value in facts.items()}


def modern_predictions(arrays: Mapping[str, Any]) -> Table:
    """The contents of a predictions.npz, under today's names."""
    return {"images" if name == "pictures" else name: array for name, array in arrays.items()}


def _divergence(distill: Table) -> None:
    """Make a table of the older form: a word, with the settings of all divergences beside it, used or not."""
    name, kl, beta = (distill.get(key) for key in ("divergence", "kl", "beta"))
    if not isinstance(name, str | None) or (name is None and kl is None and beta is None):
        return
    had = {"name": name, "reduction": kl, "beta": beta}
    unused = {"kl": ("beta",), "dkd": ("reduction",), "dist": ("reduction", "beta")}.get(name, ())
    own = {key: value for key, value in had.items() if value is not None and key not in unused}
    for key in ("kl", "beta"):
        distill.pop(key, None)
    distill["divergence"] = own


def _taken(table: Table, dotted: str, wanted: Any = lambda value: True) -> Any:
    """Take the value at a dotted key out of the table; None if there is none, or it is not `wanted`."""
    *outer, key = dotted.split(".")
    inside = table.get(outer[0]) if outer else table
    if not isinstance(inside, dict) or key not in inside or not wanted(inside[key]):
        return None
    return inside.pop(key)


def _as_table(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}
