"""What leaves: a run as a file that runs elsewhere, in floating point or 8-bit integers, and what such files answer."""

from .classifier import Classifier, content_of
from .classify import Classified, classify_files, predict_files
from .source import open_model
from .write import export_learner, export_model, export_run

__all__ = [
    "Classified",
    "Classifier",
    "classify_files",
    "content_of",
    "export_learner",
    "export_model",
    "export_run",
    "open_model",
    "predict_files",
]
