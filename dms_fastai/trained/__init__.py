"""Trained networks: what one is and expects, and how to open whatever holds one."""

from .load import check_pretrained, ensemble, find_file, load_teacher, open_learner, without_code
from .network import Teacher, check_classes, renormalize

__all__ = [
    "Teacher",
    "check_classes",
    "check_pretrained",
    "ensemble",
    "find_file",
    "load_teacher",
    "open_learner",
    "renormalize",
    "without_code",
]
