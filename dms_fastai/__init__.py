"""Tiny residual networks, distilled: a fastai training recipe for small image classifiers.

Importing this package registers its architectures with timm. Everything else is imported on first use, so that the
command line answers at once.
"""

import warnings
from importlib import import_module
from types import ModuleType
from typing import Any

from wrapt import when_imported

from .training.parts import PARTS

_AT = {
    **{part.at.split(":")[1]: part.at.split(":")[0] for part in PARTS if part.order is not None},
    "DMSLearner": "learner",
    "DMSLoss": "training.losses",
    "Recipe": "recipes",
    "Teacher": "trained",
    "UserError": "errors",
    "dms_learner": "learner",
    "ensemble": "trained",
    "join_processes": "processes",
    "export_model": "export",
    "load_data": "data",
    "load_recipe": "recipes",
    "load_teacher": "trained",
}

# fastai and timm script functions when they are imported; the user can do nothing about torch's warning.
warnings.filterwarnings("ignore", message=r".*torch\.jit\.script", category=FutureWarning)

__all__ = sorted(_AT)
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name not in _AT:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_AT[name]}", __name__), name)


def __dir__() -> list[str]:
    return [*globals(), *_AT]


@when_imported("timm")
def _register(timm: ModuleType) -> None:
    import_module(".models", __name__)
