"""Tiny residual networks, distilled: a fastai training recipe for small image classifiers.

Importing this package registers its architectures with timm.
"""

import warnings

with warnings.catch_warnings():
    # fastai and timm script functions as they are imported; torch 2.15 warns of it those who can do nothing about it.
    warnings.filterwarnings("ignore", message=r".*torch\.jit\.script", category=FutureWarning)
    from . import models  # noqa: F401  (registers the architectures)
    from .callbacks import (
        EMA,
        SAM,
        CutMix,
        Cutout,
        MixUp,
        MixUpOrCutMix,
        TeacherDistill,
        TrivialAugment,
        ensemble,
        load_teacher,
    )
    from .data import load_data
    from .errors import UserError
    from .export import export_model
    from .learner import DMSLearner, dms_learner
    from .losses import DMSLoss
    from .recipes import Recipe, load_recipe

__all__ = [
    "EMA",
    "SAM",
    "CutMix",
    "Cutout",
    "DMSLearner",
    "DMSLoss",
    "MixUp",
    "MixUpOrCutMix",
    "Recipe",
    "TeacherDistill",
    "TrivialAugment",
    "UserError",
    "dms_learner",
    "ensemble",
    "export_model",
    "load_data",
    "load_recipe",
    "load_teacher",
]
__version__ = "0.1.0"
