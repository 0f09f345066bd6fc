"""fastai callbacks, each of them of use alone in any Learner."""

from .clip import ClipGradValue
from .distill import Teacher, TeacherDistill, load_teacher
from .mixup import MixUp
from .precision import Precision
from .torch_compile import TorchCompile

__all__ = ["ClipGradValue", "MixUp", "Precision", "Teacher", "TeacherDistill", "TorchCompile", "load_teacher"]
