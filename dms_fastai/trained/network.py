"""A trained network and what it expects of its images, or several as one."""

import hashlib
import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from ..errors import UserError
from ..models.build import described
from ..models.weights import all_finite
from .inputs import Inputs, shortest

__all__ = ["Ensemble", "Teacher", "check_classes", "check_teacher", "renormalize"]


@dataclass
class Teacher:
    """A network that teaches, and what it expects of its images.

    Attributes:
        model: Images (B, C, H, W) in, logits (B, classes) out.
        mean, std: What its images are normalised with; None: what the student's are.
        vocab: Its classes, in the order of its logits, where they are known.
    """

    model: nn.Module
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    vocab: list[str] | None = None

    @cached_property
    def digest(self) -> str:
        """A short hash of the weights: what tells one teacher from another."""
        state = hashlib.blake2b(digest_size=8)
        for name, value in self.model.state_dict().items():
            state.update(name.encode())
            state.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
        return state.hexdigest()


class Ensemble(nn.Module):
    """Several teachers as one network: the mean of their logits, or the logarithm of their mean probabilities.

    Images come in the normalisation of the first teacher. Each of the others gets them in its own.
    """

    def __init__(self, teachers: Iterable[Teacher], of: str):
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


Statistics = tuple[tuple[float, ...] | None, tuple[float, ...] | None]


def renormalize(ours: Statistics, theirs: Statistics) -> tuple[Tensor, Tensor]:
    """Scale and shift, shape (1, C, 1, 1), that turn images normalised with `ours` into the same with `theirs`."""
    if ours == theirs:
        return torch.ones(1, 1, 1, 1), torch.zeros(1, 1, 1, 1)
    values = [shortest(tuple(v)) for v in (*ours, *theirs)]
    if len({len(v) for v in values} - {1}) > 1:
        raise UserError(f"images are normalised in {len(ours[0])} channels here and in {len(theirs[0])} by the teacher")
    mean_s, std_s, mean_t, std_t = (torch.tensor(v).view(1, -1, 1, 1) for v in values)
    return std_s / std_t, (mean_s - mean_t) / std_t


def check_classes(teacher: Teacher, vocab: list[str] | None) -> None:
    """Raise a UserError if the teacher's classes are not the data's; it names both."""
    known = len(teacher.vocab) if teacher.vocab else getattr(teacher.model, "num_classes", None)
    if vocab is None or known is None:
        return
    if known != len(vocab):
        raise UserError(f"the teacher knows {known} classes and the data have {len(vocab)}; train one on the data")
    for index, (theirs, ours) in enumerate(zip(teacher.vocab or vocab, vocab, strict=True)):
        if theirs != ours:
            raise UserError(
                f"class {index} is {theirs!r} to the teacher and {ours!r} in the data "
                f"({_few(teacher.vocab)} against {_few(vocab)}); train a teacher on the data"
            )


def check_teacher(teacher: Teacher, classes: int | None, images: Inputs, vocab: list[str] | None = None) -> None:
    """Raise a UserError if a teacher cannot teach; it says what teacher and data have. Tries it on two black images.

    Args:
        teacher: The teacher.
        classes: How many logits it has to give an image; None: any number.
        images: The student's images.
        vocab: The classes' names, where they are known.
    """
    check_classes(teacher, vocab)
    if not all_finite(teacher.model):
        raise UserError("the teacher's weights are NaN or infinite; train it again")
    shape, theirs = images.shape, (teacher.mean, teacher.std)
    scale, _ = renormalize((images.mean, images.std), theirs if teacher.mean else (images.mean, images.std))
    if scale.shape[1] not in (1, shape[0]):
        raise UserError(f"the teacher's images have {scale.shape[1]} channels, the student's {shape[0]}")
    members = teacher.model.members if isinstance(teacher.model, Ensemble) else [teacher.model]
    for network in members:
        _try(network, torch.zeros(2, *shape), classes)


def _try(network: nn.Module, x: Tensor, classes: int | None) -> None:
    """Raise a UserError if a network does not turn images into logits of so many classes, or of any number."""
    name, pixels = type(network).__name__, described(tuple(x.shape[1:]))
    training = [module for module in network.modules() if module.training]
    device = next((value.device for value in network.state_dict().values()), x.device)
    try:
        with torch.no_grad():
            logits = network.eval()(x.to(device))
    except Exception as error:  # a network may raise anything
        reason = (str(error) or type(error).__name__).splitlines()[0].rstrip(".")
        raise UserError(f"the teacher, {name}, does not take the student's {pixels}: {reason}") from None
    finally:
        for module in training:
            module.training = True
    if not isinstance(logits, Tensor):
        raise UserError(f"the teacher, {name}, gives a {type(logits).__name__}; wrap it so that it gives logits alone")
    if logits.ndim != 2 or len(logits) != len(x):
        raise UserError(f"the teacher, {name}, gives shape {tuple(logits.shape)} for {len(x)} images, not logits")
    if classes is not None and logits.shape[1] != classes:
        raise UserError(f"the teacher gives {logits.shape[1]} logits an image, the data have {classes} classes")


def _few(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:4]) + (", ..." if len(names) > 4 else "")
