"""Trained networks: what one is and expects, and how to open whatever holds one."""

from .answers import answers
from .inputs import Inputs, images_of, inputs_of
from .kept import KeptLogits
from .load import check_pretrained, ensemble, find_file, load_teacher, open_learner, without_code
from .network import Teacher, check_classes, check_teacher, renormalize
from .prune import pruned
from .start import Expected, begin_from, digest_of, expected_by, origin_of

__all__ = [
    "Expected",
    "Inputs",
    "KeptLogits",
    "Teacher",
    "answers",
    "begin_from",
    "check_classes",
    "check_pretrained",
    "check_teacher",
    "digest_of",
    "ensemble",
    "expected_by",
    "find_file",
    "images_of",
    "inputs_of",
    "load_teacher",
    "open_learner",
    "origin_of",
    "pruned",
    "renormalize",
    "without_code",
]
