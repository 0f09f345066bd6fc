"""Hugging Face's image data sets: parquet files with the bytes of the images and their labels."""

import csv
import json
import re
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ..errors import UserError
from .folder import SPLIT_OF

__all__ = ["LABELS", "parquet_files", "unpack_parquet"]

LABELS = "labels.csv"


def parquet_files(source: Path) -> list[tuple[str, Path]]:
    """The parquet files in a folder with the split that each belongs to, or one file, for training.

    Raises:
        UserError: Those of a split lie in different folders, as those of several data sets do.
    """
    if source.is_file():
        return [("train", source)] if source.suffix.lower() == ".parquet" else []
    found, folder_of = [], {}
    for file in sorted(source.rglob("*.parquet")):
        path = file.relative_to(source)
        words = re.split(r"[^a-z]+", path.as_posix().lower())
        split = next((SPLIT_OF[word] for word in words if word in SPLIT_OF), None)
        if split is None or any(part.startswith(".") for part in path.parts):
            continue
        first = folder_of.setdefault(split, file.parent)
        if first != file.parent:
            raise UserError(f"{first} and {file.parent} both have parquet files of {split!r}; give one of them")
        found.append((split, file))
    return found


def unpack_parquet(source: Path, folder: Path) -> None:
    """Write the images in parquet files into a folder, with a table of their labels and splits, `LABELS`.

    Raises:
        UserError: pyarrow is missing, a file is damaged, or it has no images or no labels.
    """
    if find_spec("pyarrow") is None:
        raise UserError(f"{source} needs one more package: pip install pyarrow, or 'dms-fastai[parquet]'")
    with (folder / LABELS).open("w", newline="", encoding="utf-8") as opened:
        table = csv.writer(opened)
        table.writerow(("file", "label", "split"))
        for number, (split, file) in enumerate(parquet_files(source)):
            for row, (image, label) in enumerate(_rows(file)):
                name = f"{split}/{number:03}-{row:07}.png"  # Pillow looks at the content, not at the ending
                (folder / split).mkdir(exist_ok=True)
                (folder / name).write_bytes(image)
                table.writerow((name, label, split))


def _rows(file: Path) -> Iterator[tuple[bytes, str]]:
    """The bytes of each image, and its class."""
    import pyarrow
    from pyarrow import parquet

    try:
        opened = parquet.ParquetFile(file)
        features = _features(opened)
        image, label = _column(file, opened, features, "Image"), _column(file, opened, features, "ClassLabel")
        names = features.get(label, {}).get("names")
        for batch in opened.iter_batches(batch_size=256, columns=[image, label]):
            for content, value in zip(batch[image].to_pylist(), batch[label].to_pylist(), strict=True):
                content = content.get("bytes") if isinstance(content, dict) else content
                if not isinstance(content, bytes) or value is None:
                    raise UserError(f"{file} has a row without an image's bytes or without a label")
                if isinstance(value, str):
                    yield content, value
                elif not isinstance(value, int | float) or not float(value).is_integer():
                    raise UserError(f"{file} has the label {value!r}; give text or a whole number for each image")
                elif value >= 0 and (not names or value < len(names)):  # -1 is Hugging Face's mark of no label
                    yield content, names[int(value)] if names else str(int(value))
    except (pyarrow.ArrowException, OSError, ValueError, IndexError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{file} cannot be read as a parquet file of images: {error}") from None


def _features(opened: Any) -> dict[str, dict[str, Any]]:
    """What Hugging Face's library has noted of each column."""
    noted = json.loads((opened.schema_arrow.metadata or {}).get(b"huggingface", b"{}"))
    features = noted.get("info", {}).get("features", {}) if isinstance(noted, dict) else {}
    return {name: feature for name, feature in features.items() if isinstance(feature, dict)}


def _column(file: Path, opened: Any, features: dict[str, dict[str, Any]], kind: str) -> str:
    names = opened.schema_arrow.names
    usual = {"Image": ("image", "img", "pixel_values"), "ClassLabel": ("label", "labels", "fine_label", "class")}[kind]
    noted = [name for name in names if features.get(name, {}).get("_type") == kind]
    found = [name for name in usual if name in noted] + noted + [name for name in usual if name in names]
    if not found:
        what = "images" if kind == "Image" else "labels"
        raise UserError(f"{file} has the columns {', '.join(names)}, none of which holds {what}")
    return found[0]
