"""Knowledge distillation: a teacher whose logits the loss gets to see."""

import copy
import hashlib
import math
import os
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from fastai.callback.core import Callback
from fastai.learner import Learner, load_learner
from torch import Tensor, nn

from ..data.loader import statistics, vocabulary
from ..errors import UserError, unknown
from ..losses import DMSLoss
from ..models.fold import fold_batch_norms
from ..models.weights import WEIGHTS, load_weights, weights_in

__all__ = ["Teacher", "TeacherDistill", "ensemble", "load_teacher"]


@dataclass
class Teacher:
    """A network that teaches, and what it expects of its pictures.

    Attributes:
        model: Pictures (B, 3, H, W) in, logits (B, C) out.
        mean, std: What its pictures are normalised with; None: the same as the student's.
        vocab: Its classes, in the order of its logits, where they are known.
    """

    model: nn.Module
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    vocab: list[str] | None = None

    def digest(self) -> str:
        """A short hash of the weights: what tells one teacher from another."""
        state = hashlib.blake2b(digest_size=8)
        for name, value in self.model.state_dict().items():
            state.update(name.encode())
            state.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
        return state.hexdigest()


class Ensemble(nn.Module):
    """Several teachers as one network: the mean of their logits, or the logarithm of their mean probabilities.

    Pictures come as the first one expects them; each of the others gets them in its own normalisation.
    """

    def __init__(self, teachers: "Iterable[Teacher]", of: str):
        super().__init__()
        teachers = list(teachers)
        self.of = of
        self.members = nn.ModuleList(teacher.model for teacher in teachers)
        for index, teacher in enumerate(teachers):
            scale, shift = renormalize((teachers[0].mean, teachers[0].std), (teacher.mean, teacher.std))
            self.register_buffer(f"scale{index}", scale)
            self.register_buffer(f"shift{index}", shift)

    def forward(self, x: Tensor) -> Tensor:
        logits = []
        for index, member in enumerate(self.members):
            logits.append(member(x * getattr(self, f"scale{index}") + getattr(self, f"shift{index}")))
        every = torch.stack(logits).float()
        if self.of == "logits":
            return every.mean(0)
        return every.log_softmax(2).logsumexp(0) - math.log(len(logits))


def ensemble(sources: Iterable[Any], of: str = "logits", trust: bool = False) -> Teacher:
    """Several teachers as one.

    Args:
        sources: Each whatever `load_teacher` takes.
        of: What is averaged: "logits" or "probabilities".
        trust: As in `load_teacher`.

    Raises:
        UserError: There are none, they do not know the same classes, or `of` is something else.
    """
    teachers = [load_teacher(source, trust) for source in sources]
    if not teachers:
        raise UserError("an ensemble needs at least one teacher")
    if of not in ("logits", "probabilities"):
        raise UserError(f"an ensemble of {of!r} cannot be had; it averages 'logits' or 'probabilities'")
    first = teachers[0]
    for teacher in teachers[1:]:
        check_classes(teacher, first.vocab)
        if (teacher.mean is None) != (first.mean is None):
            raise UserError("some of these teachers say what their pictures are normalised with, and some do not")
    return Teacher(Ensemble(teachers, of), first.mean, first.std, first.vocab)


def load_teacher(source: Any, trust: bool = False) -> Teacher:
    """A teacher from whatever holds one. A model or a Learner is copied, and stays as it is.

    Args:
        source: A `Teacher`; a model; a Learner; a folder of a finished run; a .safetensors file of this package; a .pkl
            of `Learner.export`; "timm:NAME" for timm's pretrained weights; or a list of these, or a text of several
            with commas between, whose mean logits teach.
        trust: Load a .pkl, which runs the code inside it. Without, the weights beside it are taken, in a run's folder.

    Raises:
        UserError: There is nothing of the kind at `source`, or it is a .pkl that is not trusted.
    """
    if isinstance(source, Teacher):
        return source
    if isinstance(source, (list, tuple)):
        return ensemble(source, trust=trust)
    if isinstance(source, str) and "," in source and not os.path.exists(source):
        return ensemble((part.strip() for part in source.split(",") if part.strip()), trust=trust)
    if isinstance(source, Learner):
        mean, std = statistics(source.dls)
        return Teacher(copy.deepcopy(source.model), mean, std, vocabulary(source.dls))
    if isinstance(source, nn.Module):
        return Teacher(copy.deepcopy(source), *_cfg_statistics(source))
    if not isinstance(source, (str, Path)):
        raise UserError(f"a {type(source).__name__} is no teacher; give a model, a Learner, a file or 'timm:NAME'")
    if str(source).startswith("timm:"):
        return _timm_teacher(str(source).removeprefix("timm:"))
    path = without_code(Path(source), trust)
    if path.is_dir():
        path = weights_in(path)
    if path.suffix == ".safetensors":
        model, card = load_weights(path)
        return Teacher(model, tuple(card.mean), tuple(card.std), card.vocab)
    if path.suffix == ".pkl":
        return load_teacher(open_learner(path, trust))
    raise UserError(f"no teacher at {source}; give a run's folder, a .safetensors or .pkl file, or 'timm:NAME'")


def without_code(source: Path, trust: bool) -> Path:
    """The weights beside a run's .pkl in place of it, which hold the same network; other sources as they are."""
    if source.suffix != ".pkl" or trust:
        return source
    beside = source.with_name(WEIGHTS)
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
            f"{file} is a pickle, and loading one runs whatever code it holds; if you trust who made it, "
            f"say so: --trust-pickle, or trust=True in Python"
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return load_learner(file)
    except Exception as error:  # unpickling lets through whatever the file's classes raise
        reason = str(error).splitlines()[0] if str(error) else "no reason given"
        raise UserError(f"{file} cannot be loaded as a fastai Learner ({type(error).__name__}: {reason})") from None


class TeacherDistill(Callback):
    """Show each training batch to a frozen teacher, mixed as it is, and hand its logits to the loss.

    With a `DMSLoss` the logits join the targets and the loss gives equation (ii) or (iv), with its own alpha and T.
    Any other loss becomes `alpha T^2 KL(teacher || student) + (1 - alpha) loss`. The teacher is in evaluation mode,
    has no gradients, plays no part in validation, and stays out of exported and pickled Learners.
    """

    # The loss is complete before gradient accumulation (6) divides it; mixed precision still lasts in after_pred.
    order, run_valid = 5, False
    teacher = network = made_of = logits = None
    _stateattrs = ("teacher", "network", "made_of", "logits")

    def __init__(
        self,
        teacher: Any,
        alpha: float | None = None,
        T: float | None = None,
        kl: str | None = None,
    ):
        """
        Args:
            teacher: Whatever `load_teacher` takes; a .pkl that is trusted goes through it.
            alpha, T, kl: For losses other than `DMSLoss`, which has its own; None: its defaults.

        Raises:
            UserError: There is no such teacher, or a value is out of range.
        """
        super().__init__()
        given = {k: v for k, v in {"alpha": alpha, "T": T, "kl": kl}.items() if v is not None}
        self.given, self.divergence = given, DMSLoss(**given)
        self.teacher = load_teacher(teacher)

    def before_train(self) -> None:
        """Check that teacher and student fit, and put a copy of the teacher, made for speed, where the student is."""
        if self.teacher is None:
            raise UserError(
                "this Learner was exported without its teacher; set learn.teacher_distill.teacher = load_teacher(...), "
                "or remove the callback: learn.remove_cb(TeacherDistill)"
            )
        if self.given and isinstance(self.learn.loss_func, DMSLoss):
            raise UserError(f"{', '.join(self.given)} given to TeacherDistill, but DMSLoss has its own; set it there")
        check_classes(self.teacher, vocabulary(self.learn.dls))
        if self.network is not None and self.made_of is self.teacher:
            return
        device = next(self.learn.model.parameters()).device
        self.made_of = self.teacher
        self.network = fold_batch_norms(self.teacher.model).to(device, memory_format=torch.channels_last)
        self.affine = self._affine(device)
        if hasattr(self.learn, "precision") and self.learn.precision.wanted(device):
            cast_weights(self.network, torch.bfloat16)

    def after_pred(self) -> None:
        """Ask the teacher about the pictures that the student has just seen."""
        x = self.learn.xb[0]
        if self.affine is not None:
            scale, shift = self.affine
            x = x * scale + shift
        with torch.no_grad():
            self.logits = self.network(x)
        theirs, ours = self.logits.shape[1], self.learn.pred.shape[1]
        if theirs != ours:
            raise UserError(f"the teacher gives {theirs} logits a picture, the student {ours}; they need the same")
        if isinstance(self.learn.loss_func, DMSLoss):
            y_a, y_b, lam = (*self.learn.yb, None, None)[:3]
            self.learn.yb = (y_a, y_b, lam, self.logits)

    def after_loss(self) -> None:
        if isinstance(self.learn.loss_func, DMSLoss):
            self.learn.yb = self.learn.yb[:1]
            return
        kd = self.divergence
        divergence = kd.soft(self.learn.pred, self.logits, self.learn.yb[0])
        self.learn.loss_grad = kd.alpha * divergence + (1 - kd.alpha) * self.learn.loss_grad
        self.learn.loss = self.learn.loss_grad.detach().clone()

    def after_cancel_batch(self) -> None:
        if isinstance(self.learn.loss_func, DMSLoss):
            self.learn.yb = self.learn.yb[:1]

    def after_fit(self) -> None:
        self.network = self.made_of = self.logits = None

    def _affine(self, device: torch.device) -> tuple[Tensor, Tensor] | None:
        """Scale and shift from the student's normalisation to the teacher's; None where they are the same."""
        theirs, ours = (self.teacher.mean, self.teacher.std), statistics(self.learn.dls)
        if theirs[0] is None or theirs == ours:
            return None
        return tuple(t.to(device) for t in renormalize(ours, theirs))


def cast_weights(network: nn.Module, dtype: torch.dtype) -> None:
    """Cast a frozen network's large weights for good to what autocast would cast them to in every step."""
    for module in network.modules():
        if type(module) in (nn.Conv2d, nn.Linear):  # not their subclasses, which may compute with their weights
            module.to(dtype)


Statistics = tuple[tuple[float, ...] | None, tuple[float, ...] | None]


def renormalize(ours: Statistics, theirs: Statistics) -> tuple[Tensor, Tensor]:
    """Scale and shift, shape (1, C, 1, 1), from pictures that `ours` normalised to what `theirs` would have made."""
    if ours == theirs:
        return torch.ones(1, 1, 1, 1), torch.zeros(1, 1, 1, 1)
    mean_s, std_s, mean_t, std_t = (torch.tensor(v).view(1, -1, 1, 1) for v in (*ours, *theirs))
    return std_s / std_t, (mean_s - mean_t) / std_t


def check_classes(teacher: Teacher, vocab: list[str] | None) -> None:
    """Raise a UserError that says both where the teacher's classes are not the data's."""
    known = len(teacher.vocab) if teacher.vocab else getattr(teacher.model, "num_classes", None)
    if vocab is None or known is None:
        return
    if known != len(vocab):
        raise UserError(f"the teacher knows {known} classes and the data have {len(vocab)}; train a teacher on them")
    for index, (theirs, ours) in enumerate(zip(teacher.vocab or vocab, vocab, strict=True)):
        if theirs != ours:
            raise UserError(
                f"class {index} is {theirs!r} to the teacher and {ours!r} in the data "
                f"({_few(teacher.vocab)} against {_few(vocab)}); train a teacher on them"
            )


def check_pretrained(source: str, classes: int) -> None:
    """Raise a UserError where one of timm's pretrained teachers, before it is downloaded, is known not to fit."""
    for name in (part.strip().removeprefix("timm:") for part in source.split(",") if part.strip().startswith("timm:")):
        cfg = timm.get_pretrained_cfg(name) if timm.is_model(name.split(".")[0]) else None
        if cfg is not None and cfg.num_classes != classes:
            raise UserError(
                f"timm's weights of {name!r} know {cfg.num_classes} classes and the data have {classes}; train it on "
                f"them, as in `dms-fastai run se --arch {name.split('.')[0]}`, and give that run's folder"
            )


def _few(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:4]) + (", ..." if len(names) > 4 else "")


def _cfg_statistics(model: nn.Module) -> tuple[tuple[float, ...] | None, tuple[float, ...] | None]:
    cfg = getattr(model, "pretrained_cfg", None) or {}
    return tuple(cfg["mean"]) if cfg.get("mean") else None, tuple(cfg["std"]) if cfg.get("std") else None


def _cfg_vocab(model: nn.Module) -> list[str] | None:
    names = (getattr(model, "pretrained_cfg", None) or {}).get("label_names")
    return list(names) if names else None


def _timm_teacher(name: str) -> Teacher:
    if not timm.is_model(name.split(".")[0]):
        raise unknown("timm model", name, timm.list_models())
    try:
        model = timm.create_model(name, pretrained=True)
    except Exception as error:  # the hub's client lets through whatever its libraries raise
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"timm has no weights at hand for {name!r} ({reason})") from None
    return Teacher(model, *_cfg_statistics(model), _cfg_vocab(model))
