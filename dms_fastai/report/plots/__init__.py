"""The report's images: a module each, from rows to a figure and to the numbers in it. A new one is a `Plot` more."""

from functools import partial

from .ablation import ablation, ablation_data
from .classes import classes, classes_data
from .confusion import confusion, confusion_data
from .cost import MACS, PARAMETERS, PFLOP, against, against_data
from .curves import curves, curves_data
from .drawing import DARK, LIGHT, Plot, Theme, draw, figure
from .mistakes import mistakes, mistakes_data, regions
from .reliability import reliability, reliability_data

__all__ = ["DARK", "LIGHT", "PLOTS", "Plot", "Theme", "draw", "figure"]

PLOTS = (
    Plot("ablation", "The last epoch of each stage.", ablation, ablation_data),
    Plot("curves", "Validation accuracy and loss by epoch.", curves, curves_data),
    Plot("confusion", "Which classes are taken for which.", confusion, confusion_data),
    Plot("classes", "Accuracy by class.", classes, classes_data),
    Plot(
        "mistakes",
        "The most confident mistakes: what was predicted, how confidently, and what it is.",
        mistakes,
        mistakes_data,
    ),
    Plot(
        "regions",
        "Where in these images the network saw what it answered (Grad-CAM); the brighter, the more.",
        regions,
        mistakes_data,
    ),
    Plot("reliability", "How often a prediction is right, by its confidence.", reliability, reliability_data),
    Plot("parameters", "Accuracy against size.", partial(against, PARAMETERS), partial(against_data, PARAMETERS)),
    Plot("macs", "Accuracy against the cost of an image.", partial(against, MACS), partial(against_data, MACS)),
    Plot("pflop", "Accuracy against the cost of training.", partial(against, PFLOP), partial(against_data, PFLOP)),
)
