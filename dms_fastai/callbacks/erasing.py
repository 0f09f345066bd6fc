"""Random erasing: a rectangle of noise in some of the training images."""

from typing import Literal

import torch
from fastai.callback.core import Callback
from torch import Tensor

from ..data.boxes import inside, random_sides, random_starts
from ..data.operations import runs_ahead
from ..errors import UserError
from ..settings import PositiveShare, Share, checked
from ..training.parts import order_of

__all__ = ["RandomErasing", "erase"]


@checked
class RandomErasing(Callback):
    """Fill a rectangle of some training images with noise, after all has been mixed (Zhong et al., 2020).

    As in timm, whose loader erases after it has mixed: labels and lambda stay as they are. Area and ratio of the sides
    are drawn for each image, and the place among all where the rectangle lies within.
    """

    order, run_valid = order_of("erasing"), False

    def __init__(
        self,
        prob: Share = 0.25,
        min_area: PositiveShare = 0.02,
        max_area: PositiveShare = 0.333,
        min_aspect: PositiveShare = 0.3,
        mode: Literal["pixel", "mean"] = "pixel",
    ):
        """
        Args:
            prob: Probability that an image loses a rectangle.
            min_area: Smallest area of the rectangle, as a share of the image's.
            max_area: Its largest area.
            min_aspect: Smallest ratio of its sides; the largest is the inverse.
            mode: What fills it: "pixel" is noise drawn from N(0, 1) for each pixel and channel of normalised images;
                "mean" is 0, which is their mean.

        Raises:
            UserError: A value out of range, or `min_area` above `max_area`.
        """
        super().__init__()
        if min_area > max_area:
            raise UserError(f"RandomErasing's min_area is {min_area}; it must be at most max_area, which is {max_area}")
        self.prob, self.area, self.min_aspect, self.mode = prob, (min_area, max_area), min_aspect, mode

    def before_batch(self) -> None:
        x, *rest = self.learn.xb
        self.learn.xb = (erase(x, self.prob, self.area, self.min_aspect, self.mode), *rest)


def erase(x: Tensor, prob: float, area: tuple[float, float], min_aspect: float, mode: str) -> Tensor:
    """Normalised images (B, C, H, W), some with a rectangle that is filled. Arguments as in `RandomErasing`."""
    n, _, height, width = x.shape
    # A rectangle is shorter than the image both ways, as in timm.
    heights, widths = random_sides(n, (height - 1, width - 1), height * width, area, min_aspect, x.device)
    rows = inside(random_starts(heights, height), heights, height)
    columns = inside(random_starts(widths, width), widths, width)
    chosen = torch.rand(n, 1, 1, device=x.device) < prob
    box = (rows[:, :, None] & columns[:, None, :] & chosen)[:, None]
    if mode == "mean":
        return torch.where(box, 0.0, x)
    if runs_ahead(x.device):
        return torch.where(box, torch.randn_like(x), x)
    box = box.expand_as(x)  # on a CPU, noise takes longer than all else: no more than is shown
    return x.clone().masked_scatter_(box, torch.randn(int(box.sum()), dtype=x.dtype))
