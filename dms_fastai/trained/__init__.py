"""Trained networks: what one is and expects, and how to open whatever holds one."""

from .answers import answers
from .inputs import Inputs, images_of, inputs_of
from .load import begin_from, check_pretrained, ensemble, find_file, load_teacher, open_learner, without_code
from .network import Teacher, check_classes, check_teacher, renormalize

__all__ = [
    "Inputs",
    "Teacher",
    "answers",
    "begin_from",
    "check_classes",
    "check_pretrained",
    "check_teacher",
    "ensemble",
    "find_file",
    "images_of",
    "inputs_of",
    "load_teacher",
    "open_learner",
    "renormalize",
    "without_code",
]
