"""Accuracy and loss of a trained network on a split of a data set, and the accuracy in each class."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from timm.data import ImageNetInfo, infer_imagenet_subset
from torch import Tensor, nn

from .callbacks.bf16 import fast_kernels, has_bf16
from .data.augment import affine, normalize
from .data.decoded import EACH
from .data.imageset import ImageSet
from .data.known import check_square, known_classes
from .data.sets import VALID_BATCH
from .data.sources import load_splits
from .data.white import BYTE
from .errors import UserError, notice
from .export import open_model
from .export.formats import is_exported
from .models.card import ModelCard
from .names import TIMM, source_name
from .run_folder import RunFolder
from .trained import find_file
from .trained.pretrained import pretrained_cfg, timm_model

__all__ = ["ClassAccuracy", "Evaluation", "evaluate_model", "split_images"]

BATCH = VALID_BATCH["cpu"]


@dataclass(frozen=True)
class ClassAccuracy:
    """How many images of a class there are, and how many of them are classified right."""

    name: str
    images: int
    right: int

    @property
    def accuracy(self) -> float:
        return self.right / self.images


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate_model` found.

    Attributes:
        split: The split.
        loss: Mean cross-entropy.
        classes: Those with images, the least accurate first.
    """

    split: str
    loss: float
    classes: list[ClassAccuracy]

    @property
    def images(self) -> int:
        return sum(found.images for found in self.classes)

    @property
    def accuracy(self) -> float:
        return sum(found.right for found in self.classes) / self.images


def evaluate_model(
    source: str | Path,
    data: str | Path,
    split: str | None = None,
    labels: str | Path | None = None,
    device: torch.device | str = "cpu",
    trust: bool = False,
    track: Callable[[Sequence[Tensor]], Iterable[Tensor]] = iter,
    tta: bool = False,
) -> Evaluation:
    """Classify the images of a split, and compare with their labels. Classes are matched by name.

    A run's weights are evaluated as the run has validated them: in bf16, if its recipe and the device have it. All
    others are in float32. The images of the split are in memory, and of everything else a batch.

    Args:
        source, trust: As in `predict_files`; or "timm:NAME", at the size of timm's weights, and with the share of image
            files that timm crops to.
        data: As in `load_data`.
        labels: As in `load_data`. None: the table that the run at `source` had, if the data are called as its are.
        split: "test", "val" or "train". None: "test"; "val" where there is no "test"; where there is neither, the
            training images that the run at `source` has held out.
        device: Where to compute.
        track: Gets the indices of the images, a tensor for each batch, and gives them back one by one: for progress.
        tta: Average the probabilities of each image and its mirror image.

    Raises:
        UserError: There is no model at `source`, it does not take square images in colour, the data are missing or have
            no such split, or have a class that the model does not know.
    """
    timms = str(source).startswith(TIMM)
    model, card = _timm_model(str(source).removeprefix(TIMM)) if timms else open_model(source, trust)
    weights = None if timms or is_exported(source) else find_file(source, trust)
    device, own = torch.device(device), None if weights is None else RunFolder(weights.parent)
    images = split_images(data, split, labels, card, own)
    known = known_classes(images, card).to(device)
    bf16 = own is not None and own.recipe_file.is_file() and own.recipe().bf16 is not None and has_bf16(device)
    _note_other_images(images, data, own)
    model = model.to(device, memory_format=torch.channels_last).float().eval()
    scaling = affine(card.mean, card.std, images.size, device)
    of_class, right = (torch.zeros(images.c, dtype=torch.long, device=device) for _ in range(2))
    losses = []
    batches = torch.arange(len(images)).split(VALID_BATCH.get(device.type, BATCH))
    with torch.inference_mode(), fast_kernels(device):
        for index in track(batches):
            x, y = normalize(images.gathered(index).to(device), *scaling), images.labels[index].to(device)
            with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                seen = [model(view) for view in ((x, x.flip(-1)) if tta else (x,))]
            logits, wanted = torch.stack(seen).float(), known[y]
            logits = logits.log_softmax(2).logsumexp(0) if tta else logits[0]
            of_class += y.bincount(minlength=images.c)
            right += y[logits.argmax(1) == wanted].bincount(minlength=images.c)
            losses.append(F.cross_entropy(logits, wanted, reduction="sum"))
    loss = torch.stack(losses).cpu().double().sum().item() / len(images)
    counts = zip(map(str, images.vocab), of_class.tolist(), right.tolist(), strict=True)
    classes = [ClassAccuracy(*found) for found in counts if found[1]]
    return Evaluation(images.split, loss, sorted(classes, key=lambda found: found.accuracy))


def _timm_model(name: str) -> tuple[nn.Module, ModelCard]:
    """A network of timm with its weights, and what it is; ImageNet's classes are called by their synsets."""
    model, cfg = timm_model(name), pretrained_cfg(name)
    subset = None if cfg.label_names else infer_imagenet_subset(model)
    names = cfg.label_names or (ImageNetInfo(subset).label_names() if subset else map(str, range(cfg.num_classes)))
    images = tuple(cfg.mean), tuple(cfg.std), tuple(cfg.input_size)
    return model, ModelCard(name, list(names), *images, middle=min(cfg.crop_pct, 1.0))


def split_images(
    data: str | Path, split: str | None, labels: str | Path | None, card: ModelCard, own: RunFolder | None = None
) -> ImageSet:
    """The images of a split, as large as the model's; arguments and errors as in `evaluate_model`.

    `own` is the run that the model comes from.
    """
    check_square(card)
    own = own if own is not None and own.facts_file.is_file() and own.recipe_file.is_file() else None
    its_own = own is not None and own.trained_on(data)
    if labels is None and own is not None and own.recipe().data.labels is not None:
        if its_own:
            labels = own.recipe().data.labels
        elif own.facts().data == source_name(data):
            notice(f"{data} lies elsewhere than the run's images: its table {own.recipe().data.labels} is not used")
    white = EACH if card.white is None else card.white
    splits = load_splits(data, card.shape[1], labels, card.vocab, card.middle, to_train=False, white=white)
    there = [each for each in splits if each != "unlabelled"]
    found = split or next((name for name in ("test", "val") if name in there), None)
    if found is None and own is not None and not isinstance(own.recipe().data.valid, str):
        valid = own.recipe().data.build().open(data, splits=splits).valid
        if its_own or [valid.digest()] == (own.facts().data_digest or [])[1:2]:
            return valid
    if found is None:
        raise UserError(f"{data} has neither test nor val images; with evaluate, --split train measures on the others")
    if found not in there:
        raise UserError(f"{data} has no split {found!r}; give --split {' or '.join(there)}")
    images = splits[found]
    if not len(images):
        raise UserError(f"{data} has no images in its split {found!r}")
    if not images.labelled:
        raise UserError(f"{data} has no labels in its split {found!r}; give --labels with a table of them")
    ours, theirs = images.white or BYTE, card.white or BYTE
    if ours != theirs:
        notice(f"{data}: {ours:g} is white here, and was {theirs:g} in the images that the model was trained on")
    return images


def _note_other_images(images: ImageSet, data: str | Path, own: RunFolder | None) -> None:
    """Say so if a run was validated on other images of the same name, or trained on these."""
    if own is None or not own.facts_file.is_file():
        return
    facts = own.facts()
    digest = facts.data_digest[0] if facts.data_digest else None
    if images.split == "train" and (own.trained_on(data) or (digest is not None and images.digest() == digest)):
        notice(f"the run was trained on images of {images.name}, train: that flatters it")
    same = (images.name, images.split, images.size) == (facts.data, facts.valid, facts.size)
    if same and facts.data_digest and images.digest() != facts.data_digest[1]:
        notice(f"the run was validated on other images that are called {images.name}, too")
