"""Trained networks: what one is and expects, and how to open whatever holds one."""

from .load import begin_from, check_pretrained, ensemble, find_file, load_teacher, open_learner, without_code
from .network import Teacher, check_classes, renormalize

__all__ = [
    "Teacher",
    "begin_from",
    "check_classes",
    "check_pretrained",
    "ensemble",
    "find_file",
    "load_teacher",
    "open_learner",
    "renormalize",
    "without_code",
]
