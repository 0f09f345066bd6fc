"""What callbacks that work on pixels share: from normalised images to whole numbers, and back."""

from abc import ABC, abstractmethod

from fastai.callback.core import Callback
from torch import Tensor

from ..data.augment import affine, normalize
from ..data.stored import CHANNELS
from ..errors import UserError
from ..trained import Inputs

__all__ = ["OnPixels"]

SMALLEST = 3  # pixels a side: what sharpening looks at


class OnPixels(Callback, ABC):
    """Change the training images as whole numbers 0...255. What builds on this says how, in `change`.

    Grey images are changed as images in colour, of three equal channels, and stay grey.
    """

    run_valid = False
    scaling: tuple[Tensor, Tensor] | None = None
    _stateattrs = ("scaling",)

    def before_fit(self) -> None:
        self.scaling = None  # the DataLoaders may have changed

    def before_batch(self) -> None:
        x, *rest = self.learn.xb
        if x.shape[1] not in (1, CHANNELS) or min(x.shape[2:]) < SMALLEST:
            raise UserError(
                f"{type(self).__name__} changes images of 1 or {CHANNELS} channels, {SMALLEST} pixels or more a side, "
                f"and these are {tuple(x.shape[1:])}; leave it out"
            )
        if self.scaling is None or self.scaling[0].device != x.device:
            seen = Inputs.seen(x.shape[1:], self.learn.dls)
            self.scaling = affine(seen.mean, seen.std, 1, x.device)
        scale, shift = self.scaling
        pixels, mean = ((x - shift) / scale).round().clamp(0, 255), -shift / scale
        if x.shape[1] == 1:
            pixels, mean = (each.expand(-1, CHANNELS, -1, -1) for each in (pixels, mean))
        changed = self.change(pixels, mean)[:, : x.shape[1]]
        self.learn.xb = (normalize(changed, scale, shift), *rest)

    @abstractmethod
    def change(self, pixels: Tensor, mean: Tensor) -> Tensor:
        """Changed images.

        Args:
            pixels: Whole numbers 0...255 as float32, shape (B, 3, H, W).
            mean: The data's mean in the same units, shape (1, 3, 1, 1).
        """
