"""fastai callbacks, each of them of use alone in any Learner."""

from .clip import ClipGradValue
from .cutmix import CutMix, MixUpOrCutMix
from .cutout import Cutout
from .distill import Teacher, TeacherDistill, ensemble, load_teacher
from .ema import EMA
from .mixup import MixUp
from .precision import Precision
from .sam import SAM
from .torch_compile import TorchCompile
from .trivial_augment import TrivialAugment

__all__ = [
    "EMA",
    "SAM",
    "ClipGradValue",
    "CutMix",
    "Cutout",
    "MixUp",
    "MixUpOrCutMix",
    "Precision",
    "Teacher",
    "TeacherDistill",
    "TorchCompile",
    "TrivialAugment",
    "ensemble",
    "load_teacher",
]
