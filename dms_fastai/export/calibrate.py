"""int8 out of float: the images that an exported file is calibrated with, and what it loses."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from fastai.learner import Learner

from ..data import Data, ImageSet, Sets
from ..data.decoded import EACH
from ..data.images import resize
from ..data.known import check_square, known_classes
from ..data.sources import load_splits
from ..errors import UserError
from ..models.card import ModelCard
from ..run_folder import RunFolder, own_data
from ..trained import find_file
from .formats import Format
from .measure import Answers, answers, milliseconds

__all__ = ["Calibration", "Compared", "sets_of"]

SEED = 0  # of the images' choice


@dataclass(frozen=True)
class Compared:
    """A file on the validation images.

    Attributes:
        name: "float" or "int8".
        size: Bytes.
        answers: What it answers.
        agreement: The share of images to which it gives the class that the float file gives.
        milliseconds: Median time of an image, on one thread.
    """

    name: str
    size: int
    answers: Answers
    agreement: float
    milliseconds: float


@dataclass(frozen=True)
class Calibration:
    """How a file becomes int8.

    Attributes:
        sets: The images to choose from, and those to check on.
        images: How many training images show the range of the activations.
        tolerance: How many points of accuracy it may lose.
        compared: Gets the figures of both files before an int8 file is refused.
    """

    sets: Sets
    images: int = 200
    tolerance: float = 0.5
    compared: Callable[[Sequence[Compared]], None] = lambda rows: None

    @property
    def chosen(self) -> torch.Tensor:
        """The training images to calibrate with, drawn by `SEED` alone: uint8, shape (N, C, H, W).

        Of images that are held larger, for a teacher, they are what the student sees.
        """
        order = torch.randperm(len(self.sets.train), generator=torch.Generator().manual_seed(SEED))
        return resize(self.sets.train.gathered(order[: self.images]), self.sets.size)

    def metadata(self) -> dict[str, str]:
        """What the file is to say about it."""
        told = {"data": self.sets.train.name, "images": len(self.chosen), "seed": SEED}
        return {"calibration": json.dumps(told)}

    def quantize(
        self,
        program: torch.export.ExportedProgram,
        texts: Mapping[str, str],
        written: Format,
        card: ModelCard,
        file: Path,
    ) -> bytes:
        """The content of a file in int8, once it is known what that loses.

        Args:
            program, texts: Of `traced`.
            written: The format.
            card: What the network is.
            file: Where it will be written; for the error.

        Raises:
            UserError: It loses more than is tolerated, or the validation images have no labels or strange classes.
        """
        valid = self.sets.valid
        if self.sets.agreement:
            raise UserError(f"{valid.name} has no validation images with labels, on which int8 could be checked")
        labels = known_classes(valid, card)[valid.labels]
        large, small = written.quantize(program, {**texts, **self.metadata()}, self.chosen.numpy())
        found = _compare({"float": large, "int8": small}, written, valid.images, labels)
        self.compared(found)
        before, after = (100 * each.answers.accuracy for each in found)
        lost = round(before - after, 9)  # a difference of two floats is a little more or less
        if lost > self.tolerance:
            raise UserError(
                f"{file} is not written: in int8, accuracy falls from {before:.2f} to {after:.2f} %, on {len(valid):,} "
                f"images of {valid.name}, {valid.split}; --calibrate more images than {len(self.chosen):,}, or allow "
                f"more with --tolerance {math.ceil(round(100 * lost, 6)) / 100:.2f}"
            )
        return small


def _compare(contents: dict[str, bytes], written: Format, images: torch.Tensor, labels: torch.Tensor) -> list[Compared]:
    with TemporaryDirectory() as folder:
        opened = []
        for name, content in contents.items():
            file = Path(folder) / name
            file.write_bytes(content)
            opened.append(written.open(file))
        found = [answers(each, images, labels) for each in opened]
        medians = [float(torch.tensor(times).median()) for times in milliseconds(opened)]
    rows = zip(contents, contents.values(), found, medians, strict=True)
    return [Compared(name, len(content), each, each.agreement(found[0]), ms) for name, content, each, ms in rows]


def sets_of(
    source: str | Path | Learner,
    card: ModelCard,
    data: str | Path | Sets | None,
    trust: bool,
    labels: str | Path | None = None,
) -> Sets:
    """The images that a network was trained and validated on, at its size.

    Args:
        source, trust: As in `export_model`.
        card: What the network is.
        data: As in `load_data`; or the images. None: a Learner's own images, or the data set of the run.
        labels: As in `load_data`. None: the table that the run had.

    Raises:
        UserError: It is not known which images these are, or they cannot be read.
    """
    if isinstance(data, Sets):
        return data
    if isinstance(source, Learner):
        own = [dl.dataset for dl in source.dls.loaders[:2]]
        if data is None and len(own) == 2 and all(isinstance(each, ImageSet) and len(each) for each in own):
            return Sets(*own)
        run = None
    else:
        run = RunFolder(find_file(source, trust).parent)
    if data is None:
        data = own_data(Path("the Learner") if run is None else Path(source), "calibrate with")
    check_square(card)
    wanted = run.recipe().data.build() if run is not None and run.recipe_file.is_file() else Data()
    table = wanted.labels if run is not None and run.facts_file.is_file() and run.trained_on(data) else None
    wanted = replace(wanted, size=card.shape[1], labels=table if labels is None else str(labels))
    white = EACH if card.white is None else card.white
    splits = load_splits(data, wanted.size, wanted.labels, card.vocab, card.middle, white=white)
    return wanted.open(data, splits=splits)
