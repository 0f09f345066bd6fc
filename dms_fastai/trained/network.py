"""A trained network and what it expects of its images, or several as one."""

import copy
import hashlib
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor, nn

from ..data.augment import at_size
from ..errors import UserError, reason_of
from ..models.build import described, modules_in_training
from ..models.fold import fold_batch_norms
from ..models.weights import all_finite
from ..settings import Pixels, convert
from .inputs import Inputs, shortest

__all__ = ["Ensemble", "Teacher", "averaged", "check_classes", "check_teacher", "folded", "renormalize"]

PROBABLY = 1e-3  # by which the sum of probabilities may differ from 1


@dataclass
class Teacher:
    """A network that teaches, and what it expects of its images.

    Attributes:
        model: Images (B, C, H, W) in, logits (B, classes) out.
        mean, std: What its images are normalised with; None: what the student's are.
        vocab: Its classes, in the order of its logits, where they are known.
        size: Height and width of the images that it was trained on; None: those of the student's, or an ensemble's
            members have sizes of their own.
    """

    model: nn.Module
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    vocab: list[str] | None = None
    size: tuple[int, int] | None = None

    @property
    def sizes(self) -> list[tuple[int, int] | None]:
        """`size`, or that of each member of an ensemble."""
        return self.model.sizes if isinstance(self.model, Ensemble) else [self.size]

    @property
    def largest(self) -> int:
        """The longest side of the images that it, or any of its members, was trained on; 0 where nobody says."""
        return max((max(size) for size in self.sizes if size), default=0)

    def at(self, size: int) -> "Teacher":
        """This teacher for images of another size. A network that is built for one size is built anew for it.

        Raises:
            UserError: The network cannot be, or the size is out of range.
        """
        size = convert(size, Pixels, "size")
        model = copy.deepcopy(self.model)
        for network in members_of(model):
            _set_size(network, size)
        if not isinstance(model, Ensemble):
            return replace(self, model=model, size=(size, size))
        model.set_sizes(lambda _: (size, size))
        return replace(self, model=model)

    @cached_property
    def digest(self) -> str:
        """A short hash of the weights: what tells one teacher from another."""
        state = hashlib.blake2b(digest_size=8)
        for name, value in self.model.state_dict().items():
            state.update(name.encode())
            if isinstance(value, Tensor) and not value.is_quantized:
                state.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
            else:  # of a quantised network
                state.update(repr(value).encode())
        return state.hexdigest()


class Ensemble(nn.Module):
    """Several teachers as one network: the mean of their logits, or the logarithm of their mean probabilities.

    Images come in the normalisation of the first teacher, at any size. Each gets them in its own, and at its own size.
    """

    def __init__(self, teachers: Iterable[Teacher], of: str):
        super().__init__()
        teachers = list(teachers)
        self.of = of
        self.members = nn.ModuleList(teacher.model for teacher in teachers)
        self.own_sizes = [teacher.size for teacher in teachers]
        for index, teacher in enumerate(teachers):
            scale, shift = renormalize((teachers[0].mean, teachers[0].std), (teacher.mean, teacher.std))
            self.register_buffer(f"scale{index}", scale)
            self.register_buffer(f"shift{index}", shift)

    @property
    def sizes(self) -> list[tuple[int, int] | None]:
        """The size of each member's images; an ensemble among them has several."""
        own = zip(self.members, self.own_sizes, strict=True)
        return [each for m, size in own for each in (m.sizes if isinstance(m, Ensemble) else [size])]

    def set_sizes(self, change: Callable[[tuple[int, int] | None], tuple[int, int] | None]) -> None:
        """Put `change(size)` in the place of the size of each member."""
        for member in self.members:
            if isinstance(member, Ensemble):
                member.set_sizes(change)
        own = zip(self.members, self.own_sizes, strict=True)
        self.own_sizes = [None if isinstance(member, Ensemble) else change(size) for member, size in own]

    def forward(self, x: Tensor) -> Tensor:
        logits = []
        for index, (member, size) in enumerate(zip(self.members, self.own_sizes, strict=True)):
            seen = x if size is None else at_size(x, size)
            logits.append(member(seen * getattr(self, f"scale{index}") + getattr(self, f"shift{index}")))
        every = torch.stack(logits).float()
        if self.of == "logits":
            return every.mean(0)
        return every.log_softmax(2).logsumexp(0) - math.log(len(logits))


def members_of(model: nn.Module) -> list[nn.Module]:
    """The networks of an ensemble, and of the ensembles in it; any other network alone."""
    return [each for m in model.members for each in members_of(m)] if isinstance(model, Ensemble) else [model]


def averaged(model: nn.Module) -> list | None:
    """What an ensemble averages, and then the same of each member, which may be another; None of any other network."""
    return [model.of, *map(averaged, model.members)] if isinstance(model, Ensemble) else None


def folded(model: nn.Module, shape: tuple[int, ...], size: tuple[int, int] | None = None) -> nn.Module:
    """As `fold_batch_norms`; of an ensemble, each member for itself.

    Args:
        model: The network of a teacher.
        shape: Of the student's images, (C, H, W).
        size: Height and width of the network's own images; None: the student's.
    """
    if not isinstance(model, Ensemble):
        return fold_batch_norms(model, (shape[0], *(size or shape[1:])))
    found = copy.deepcopy(model).eval().requires_grad_(False)
    members = zip(found.members, found.own_sizes, strict=True)
    found.members = nn.ModuleList(folded(member, shape, own) for member, own in members)
    return found


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
    for network, size in zip(members_of(teacher.model), teacher.sizes, strict=True):
        _try(network, shape, size or shape[1:], classes)


def _set_size(network: nn.Module, size: int) -> None:
    """Have a network that takes images of one size take those of `size` pixels a side; others take them anyway."""
    if not hasattr(network, "set_input_size"):  # timm's name for it
        return
    try:
        network.set_input_size(img_size=(size, size))
    except Exception as error:  # a network may raise anything
        name = type(network).__name__
        raise UserError(
            f"the teacher, {name}, does not take {described((3, size, size))}: {reason_of(error)}"
        ) from None


def _try(network: nn.Module, shape: tuple[int, ...], size: tuple[int, ...], classes: int | None) -> None:
    """Raise a UserError if a network does not turn images into logits of so many classes, or of any number.

    Args:
        network: The network.
        shape: That of the student's images, (C, H, W).
        size: Height and width of the images that the network gets.
        classes: How many logits it has to give an image; None: any number.
    """
    name, x = type(network).__name__, torch.zeros(2, shape[0], *size)
    pixels = f"the student's {described(tuple(shape))}"
    if tuple(shape[1:]) != tuple(size):
        pixels = f"{described(tuple(x.shape[1:]))}, made of {pixels}"
    training = modules_in_training(network)
    device = next((value.device for value in network.state_dict().values()), x.device)
    try:
        with torch.no_grad():
            logits = network.eval()(x.to(device))
    except Exception as error:  # a network may raise anything
        hint = "distill.size sets another size"
        raise UserError(f"the teacher, {name}, does not take {pixels}: {reason_of(error)}; {hint}") from None
    finally:
        for module in training:
            module.training = True
    if not isinstance(logits, Tensor):
        raise UserError(f"the teacher, {name}, gives a {type(logits).__name__}; wrap it so that it gives logits alone")
    if logits.ndim != 2 or len(logits) != len(x):
        raise UserError(f"the teacher, {name}, gives shape {tuple(logits.shape)} for {len(x)} images, not logits")
    if (logits >= 0).all() and (logits.float().sum(1) - 1).abs().max() < PROBABLY:
        raise UserError(
            f"the teacher, {name}, gives probabilities; give the network without its softmax, or one that gives their "
            f"logarithms"
        )
    if classes is not None and logits.shape[1] != classes:
        raise UserError(f"the teacher gives {logits.shape[1]} logits an image, the data have {classes} classes")


def _few(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:4]) + (", ..." if len(names) > 4 else "")
