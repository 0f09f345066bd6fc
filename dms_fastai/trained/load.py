"""Open whatever holds a trained network: a run, a .safetensors or .pkl file, timm, a Learner, or several of these."""

import contextlib
import copy
import os
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from fastai.learner import Learner, load_learner
from torch import nn

from ..data.loader import statistics, vocabulary
from ..errors import UserError, notice, reason_of
from ..models.weights import all_finite, load_weights, shipped_weights
from ..run_folder import RunFolder
from .inputs import images_of
from .network import Ensemble, Teacher, check_classes
from .pretrained import pretrained_cfg, timm_model

__all__ = ["check_pretrained", "ensemble", "find_file", "load_teacher", "open_learner", "without_code"]


def ensemble(sources: Iterable[Any], of: str = "logits", trust: bool = False) -> Teacher:
    """Several teachers as one.

    Args:
        sources: Teachers, each in a form that `load_teacher` takes.
        of: What is averaged: "logits" or "probabilities".
        trust: As in `load_teacher`.

    Raises:
        UserError: There are no teachers, they do not know the same classes, or `of` is something else.
    """
    teachers = [load_teacher(source, trust) for source in sources]
    if not teachers:
        raise UserError("an ensemble needs at least one teacher")
    if of not in ("logits", "probabilities"):
        raise UserError(f"an ensemble cannot average {of!r}; it averages 'logits' or 'probabilities'")
    first, vocab = teachers[0], next((teacher.vocab for teacher in teachers if teacher.vocab), None)
    for teacher in teachers:
        check_classes(teacher, vocab)
        if (teacher.mean is None) != (first.mean is None):
            raise UserError(
                "only some of these teachers say how their images are normalised; give the others as "
                "Teacher(model, mean, std)"
            )
    return Teacher(Ensemble(teachers, of), first.mean, first.std, vocab)


def load_teacher(source: Any, trust: bool = False, size: int | None = None) -> Teacher:
    """Load a teacher from whatever holds one. A model or a Learner is copied, and stays as it is.

    Args:
        source: A `Teacher`; a model; a Learner; a folder of a finished run; a .safetensors file of this package; a .pkl
            of `Learner.export`; an architecture whose weights come with this package; "timm:NAME" for timm's; or
            several of these, as a list or as a text with commas between: the mean of their logits teaches.
        trust: Load a .pkl, which runs the code in it. Otherwise, for a run's .pkl, the weights beside it are read.
        size: Height and width of the images that it is to see, in place of those that its weights were trained on.

    Raises:
        UserError: There is no teacher at `source`, it is a .pkl that is not trusted, its weights are NaN or infinite,
            or its network is built for images of another size than `size`.
    """
    if size is not None:
        found = load_teacher(source, trust)
        return found if set(found.sizes) == {(size, size)} else found.at(size)
    if isinstance(source, Teacher):
        return source
    if isinstance(source, (list, tuple)):
        return ensemble(source, trust=trust)
    if isinstance(source, str) and "," in source and not os.path.exists(source):
        return ensemble((part.strip() for part in source.split(",") if part.strip()), trust=trust)
    if isinstance(source, Learner):
        mean, std = statistics(source.dls)
        return Teacher(_copied(source.model), mean, std, vocabulary(source.dls), _learner_size(source))
    if isinstance(source, nn.Module):
        teacher = Teacher(_copied(source), *_cfg_statistics(source), size=_fixed_size(source))
        if teacher.mean is None:
            notice(
                f"the teacher, {type(source).__name__}, does not say how its images are normalised, and gets them as "
                f"the student does; if it was trained otherwise, give Teacher(model, mean, std)"
            )
        return teacher
    if not isinstance(source, (str, Path)):
        raise UserError(f"a {type(source).__name__} is no teacher; give a model, a Learner, a file or 'timm:NAME'")
    if str(source).startswith("timm:"):
        return _timm_teacher(str(source).removeprefix("timm:"))
    file = find_file(source, trust)
    if file is None:
        raise UserError(f"no teacher at {source}; give a run's folder, a .safetensors or .pkl file, or 'timm:NAME'")
    if file.suffix == ".pkl":
        return load_teacher(open_learner(file, trust))
    model, card = load_weights(file)
    return Teacher(model, tuple(card.mean), tuple(card.std), card.vocab, tuple(card.shape[1:]))


def _copied(model: nn.Module) -> nn.Module:
    """A copy with weights in float32, in which the student's images come."""
    if not all_finite(model):
        raise UserError("the teacher's weights are NaN or infinite; train it again")
    return copy.deepcopy(model).float()


def find_file(source: str | Path, trust: bool) -> Path | None:
    """The .safetensors or .pkl file that a path stands for; None if it stands for neither.

    Args:
        source: A run's folder, a file, or the name of an architecture whose weights come with this package.
        trust: Take a .pkl itself, and not the weights beside it.

    Raises:
        UserError: The folder is no run's, but holds runs.
    """
    path = without_code(Path(source), trust)
    path = path if path.exists() else shipped_weights(str(source)) or path
    if path.is_dir():
        path = _weights_in(path)
    return path if path.suffix in (".safetensors", ".pkl") else None


def _weights_in(folder: Path) -> Path:
    weights = RunFolder(folder).weights
    if not weights.exists() and (inside := RunFolder(folder).runs_inside):
        raise UserError(f"{folder} is no run, but holds some; give {inside[0]}")
    return weights


def without_code(source: Path, trust: bool) -> Path:
    """For a run's .pkl, the weights beside it, which hold the same network; other sources as they are."""
    if source.suffix != ".pkl" or trust:
        return source
    beside = RunFolder(source.parent).weights
    return beside if beside.is_file() else source


def open_learner(file: Path, trust: bool) -> Learner:
    """The Learner in a .pkl of `Learner.export`.

    Raises:
        UserError: The file is missing, not trusted, or cannot be loaded.
    """
    if not file.is_file():
        raise UserError(f"no such Learner: {file}")
    if not trust:
        raise UserError(
            f"{file} is a pickle, and loading it runs the code in it; if you trust who made it, "
            f"give --trust-pickle, or trust=True in Python"
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return load_learner(file)
    except Exception as error:  # unpickling may raise whatever the file's classes raise
        old = "; another version may have written it: give the weights beside it, model.safetensors"
        hint = old if isinstance(error, (AttributeError, ImportError)) else ""
        said = f"{file} cannot be loaded as a fastai Learner ({type(error).__name__}: {reason_of(error)})"
        raise UserError(said + hint) from None


def check_pretrained(source: str, classes: int, options: str) -> None:
    """Raise a UserError if a pretrained teacher of timm has another number of classes, before it is downloaded.

    Args:
        source: Teachers as `load_teacher` takes them.
        classes: How many classes the data have.
        options: Of `dms-fastai run`, to train a teacher on the same images, for the error.
    """
    for name in (part.strip().removeprefix("timm:") for part in source.split(",") if part.strip().startswith("timm:")):
        known = pretrained_cfg(name).num_classes
        if known != classes:
            raise UserError(
                f"timm's weights of {name!r} know {known} classes and the data have {classes}; train it on them: add "
                f"--fine-tune-teacher, or run `dms-fastai run teacher/pretrained --arch {name} {options}` first "
                f"and give that run's folder"
            )


def _cfg_statistics(model: nn.Module) -> tuple[tuple[float, ...] | None, tuple[float, ...] | None]:
    cfg = getattr(model, "pretrained_cfg", None) or {}
    return tuple(cfg["mean"]) if cfg.get("mean") else None, tuple(cfg["std"]) if cfg.get("std") else None


def _fixed_size(model: nn.Module) -> tuple[int, int] | None:
    """Height and width of the images of a network that takes no others.

    None for any other network: the size in its `pretrained_cfg` may be that of weights that it does not have.
    """
    part = getattr(model, "patch_embed", model)
    size = getattr(part, "img_size", None) if getattr(part, "strict_img_size", True) else None
    return tuple(size) if isinstance(size, (tuple, list)) else None


def _learner_size(learn: Learner) -> tuple[int, int] | None:
    """Height and width of a Learner's images; None if it has none any more, or never had."""
    images = getattr(learn, "exported_inputs", None)
    with contextlib.suppress(UserError):
        images = images or images_of(learn.dls)
    return None if images is None else tuple(images.shape[1:])


def _cfg_vocab(model: nn.Module) -> list[str] | None:
    names = (getattr(model, "pretrained_cfg", None) or {}).get("label_names")
    return list(names) if names else None


def _timm_teacher(name: str) -> Teacher:
    model = timm_model(name)
    size = model.pretrained_cfg.get("input_size")
    return Teacher(model, *_cfg_statistics(model), _cfg_vocab(model), size and tuple(size[1:]))
