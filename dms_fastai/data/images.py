"""Images in, uint8 tensors out: any file, mode and size that Pillow reads, always RGB and square."""

import math
import os
import stat
import threading
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor

from ..errors import UserError
from .white import as_bytes, white_of

__all__ = ["grey_white", "open_image", "read_image", "resize", "to_rgb"]

LARGE = 2**24  # pixels; of images larger than this, one is decoded at a time
one_large = threading.Lock()

warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)  # such images are refused here


def read_image(item: Any, size: int | None = None, white: float | None = None) -> Tensor:
    """One image as a uint8 tensor, shape (3, size, size).

    Args:
        item: A path, the bytes of a file, a PIL image, or an array or tensor of shape (H, W), (H, W, C) or (C, H, W)
            with 1 or 3 channels.
        size: Height and width that the middle square is resized to. None keeps the image as it is.
        white: The value that becomes 255, for pixels that are not bytes; None: what the image's own values suggest.

    Raises:
        UserError: The file is missing or is no image, or the array has another shape or type.
    """
    if isinstance(item, (np.ndarray, Tensor)):
        if isinstance(item, Tensor):
            item = (item.float() if item.dtype == torch.bfloat16 else item).numpy(force=True)
        pixels = to_rgb(as_bytes(item[None], white))
        return (resize(pixels, size) if size else pixels)[0]
    if not isinstance(item, Image.Image):
        with open_image(item) as opened:
            return read_image(opened, size, white)
    image = _rgb(item, white)
    if size and image.size != (size, size):
        image = ImageOps.fit(image, (size, size), method=Image.Resampling.BILINEAR)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


@contextmanager
def open_image(file: str | Path | bytes) -> Iterator[Image.Image]:
    """The decoded image in a file, or in its bytes. Of large images, one at a time is held in memory.

    Raises:
        UserError: The file is missing, is no image, or has too many pixels; or what is done with the image raises one,
            which then names the file. Decoders raise whatever their libraries raise, so any exception is the image's.
    """
    name = "the image" if isinstance(file, bytes) else str(file)
    with ExitStack() as held:
        try:
            opened = held.enter_context(BytesIO(file) if isinstance(file, bytes) else _open_regular(file))
            image = Image.open(opened)
            pixels, most = image.width * image.height, Image.MAX_IMAGE_PIXELS or math.inf
            if pixels > most:
                raise ValueError(f"it has {image.width} x {image.height} pixels, and {most:,} are the most")
            if pixels > LARGE:
                held.enter_context(one_large)
            image.load()
        except FileNotFoundError:
            raise UserError(f"no such image: {name}") from None
        except IsADirectoryError:
            raise UserError(f"{name} is a folder; give the images in it") from None
        except Exception as error:
            reason = "its content is of no known format" if isinstance(error, Image.UnidentifiedImageError) else error
            raise UserError(
                f"{name} is not an image that can be read ({str(reason) or type(error).__name__}); remove or replace it"
            ) from None
        try:
            yield image
        except UserError as error:
            raise UserError(f"{name}: {error.message}") from None
        except (ValueError, OSError) as error:  # of a mode that Pillow cannot convert
            raise UserError(f"{name} is not an image that can be read ({error}); remove or replace it") from None


def grey_white(image: Image.Image) -> float | None:
    """What the values of a grey image of more than 8 bits suggest as white; None for any other image."""
    return white_of(np.asarray(image)) if _is_deep(image) else None


def to_rgb(pixels: Tensor) -> Tensor:
    """Batched uint8 pixels as (N, 3, H, W), from (N, H, W), (N, H, W, C) or (N, C, H, W) with 1 or 3 channels."""
    if pixels.ndim == 3:
        pixels = pixels[:, None]
    if pixels.ndim == 4 and pixels.shape[1] not in (1, 3) and pixels.shape[3] in (1, 3):
        pixels = pixels.permute(0, 3, 1, 2)
    if pixels.ndim != 4 or pixels.shape[1] not in (1, 3):
        raise UserError(f"images have shape {tuple(pixels.shape[1:])}; give (H, W), (H, W, 3) or (3, H, W)")
    if not pixels.shape[2] or not pixels.shape[3]:
        raise UserError(f"images have shape {tuple(pixels.shape[1:])}, and so no pixels")
    return pixels.expand(-1, 3, -1, -1).contiguous()


def resize(pixels: Tensor, size: int) -> Tensor:
    """The middle squares of uint8 images (N, C, H, W), resized to (N, C, size, size) with antialiasing."""
    height, width = pixels.shape[-2:]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    pixels = pixels[..., top : top + side, left : left + side]
    if side == size:
        return pixels.contiguous()
    chunks = pixels.split(4096)  # a whole data set at once would need several times its size
    return torch.cat([F.interpolate(c, size=(size, size), mode="bilinear", antialias=True) for c in chunks])


def _open_regular(file: str | Path) -> Any:
    """The file, open for reading; a pipe or a device, on which opening or reading could wait for ever, is refused."""
    if not stat.S_ISREG(os.stat(file).st_mode) and not os.path.isdir(file):
        raise OSError("it is a pipe or a device")
    return open(file, "rb")


def _is_deep(image: Image.Image) -> bool:
    """Whether the image is grey, of more than 8 bits or of decimal numbers."""
    return image.mode.startswith("I") or image.mode == "F"


def _rgb(image: Image.Image, white: float | None) -> Image.Image:
    """The image in RGB, turned upright by its EXIF data, with white where it is transparent.

    Grey of more than 8 bits is scaled; Pillow alone would clip it at 255.
    """
    image = _upright(image)
    if _is_deep(image):
        image = Image.fromarray(as_bytes(np.asarray(image), white).numpy())
    elif "A" in image.getbands() or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def _upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # EXIF data that cannot be read say nothing of the pixels, which can
        return image
