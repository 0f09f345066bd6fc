"""fastai callbacks, each of them of use alone in any Learner."""

from .clip import ClipGradValue
from .distill import Teacher, TeacherDistill, load_teacher
from .mixup import MixUp
from .precision import Precision

__all__ = ["ClipGradValue", "MixUp", "Precision", "Teacher", "TeacherDistill", "load_teacher"]
