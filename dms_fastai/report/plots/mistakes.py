"""What a network gets wrong, and where in the images it saw what it answered."""

from typing import Any

import numpy as np
from matplotlib.figure import Figure

from ..rows import Section
from .drawing import Theme, figure, named, shortened

__all__ = ["mistakes", "mistakes_data", "regions"]

SHADE = 0.85  # opacity of the black over what said nothing


def mistakes(section: Section, theme: Theme) -> Figure | None:
    return _mistakes(section, regions=False)


def regions(section: Section, theme: Theme) -> Figure | None:
    return _mistakes(section, regions=True)


def _mistakes(section: Section, regions: bool) -> Figure | None:
    """The mistakes of the headline's first run, with or without the regions that speak for them."""
    found = section.headline.predictions[0]
    if not found or not len(found[0].mistakes) or (regions and found[0].regions is None):
        return None
    p = found[0]
    columns = min(len(p.mistakes), 6)
    lines = -(-len(p.mistakes) // columns)
    drawn = figure(max(1.5 * columns, 2.5), (1.85 if p.files is None else 2.0) * lines + 0.6)
    drawn.suptitle(named(section.headline), fontsize=10)
    for axes in drawn.subplots(lines, columns, squeeze=False).flat:
        axes.set_axis_off()
    for number, (axes, index, image) in enumerate(zip(drawn.axes, p.mistakes, p.images, strict=False)):
        axes.imshow(image, interpolation="nearest")
        if regions:
            height, width = image.shape[:2]
            shade = np.zeros((*p.regions[number].shape, 4))
            shade[..., 3] = SHADE * (1 - p.regions[number] / 255)
            axes.imshow(shade, extent=(-0.5, width - 0.5, height - 0.5, -0.5), interpolation="bilinear")
        certain = np.exp(np.float64(p.log_probabilities[index].max()))
        true, said = (shortened(p.vocab[each[index]], 14) for each in (p.labels, p.predicted))
        file = "" if p.files is None else f"\n{shortened(p.files[index], 22)}"
        axes.set_title(f"{said}, {100 * certain:.0f} %\nis {true}{file}", fontsize=8)
    return drawn


def mistakes_data(section: Section) -> Any:
    found = section.headline.predictions[0]
    return found[0].mistakes.tolist() if found else None
