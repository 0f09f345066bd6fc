"""Images in, uint8 tensors out: any file, mode and size that Pillow reads, always RGB and square."""

from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor

from ..errors import UserError

__all__ = ["read_image", "resize", "to_rgb"]


def read_image(item: Any, size: int | None = None) -> Tensor:
    """One image as a uint8 tensor, shape (3, size, size).

    Args:
        item: A path, the bytes of a file, a PIL image, or a uint8 array or tensor of shape (H, W), (H, W, C) or
            (C, H, W) with 1 or 3 channels.
        size: Height and width that the middle square is resized to. None keeps the image as it is.

    Raises:
        UserError: The file is missing or is no image, or the array has another shape or type.
    """
    if isinstance(item, (np.ndarray, Tensor)):
        pixels = to_rgb(torch.as_tensor(item)[None])
        return (resize(pixels, size) if size else pixels)[0]
    if not isinstance(item, Image.Image):
        item = _open(item)
    image = _rgb(item)
    if size and image.size != (size, size):
        image = ImageOps.fit(image, (size, size), method=Image.Resampling.BILINEAR)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


def to_rgb(pixels: Tensor) -> Tensor:
    """Batched uint8 pixels as (N, 3, H, W), from (N, H, W), (N, H, W, C) or (N, C, H, W) with 1 or 3 channels."""
    if pixels.dtype != torch.uint8:
        raise UserError(f"pixels are {str(pixels.dtype).removeprefix('torch.')}; give uint8, 0 to 255")
    if pixels.ndim == 3:
        pixels = pixels[:, None]
    if pixels.ndim == 4 and pixels.shape[1] not in (1, 3) and pixels.shape[3] in (1, 3):
        pixels = pixels.permute(0, 3, 1, 2)
    if pixels.ndim != 4 or pixels.shape[1] not in (1, 3):
        raise UserError(f"images have shape {tuple(pixels.shape[1:])}; give (H, W), (H, W, 3) or (3, H, W)")
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


def _open(file: str | Path | bytes) -> Image.Image:
    name = "the image" if isinstance(file, bytes) else str(file)
    try:
        with BytesIO(file) if isinstance(file, bytes) else open(file, "rb") as opened:
            image = Image.open(opened)
            image.load()
    except FileNotFoundError:
        raise UserError(f"no such image: {name}") from None
    except IsADirectoryError:
        raise UserError(f"{name} is a folder; give the images in it") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        reason = "its content is of no known format" if isinstance(error, Image.UnidentifiedImageError) else error
        raise UserError(f"{name} is not an image that can be read ({reason}); remove or replace it") from None
    return image


def _rgb(image: Image.Image) -> Image.Image:
    """The image in RGB, turned upright by its EXIF data, with white where it is transparent.

    Grey of more than 8 bits is scaled; Pillow alone would clip it at 255. If whole numbers exceed 255, they count as
    16-bit; if decimal numbers do not exceed 1, they count as shares of 255.
    """
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):
        grey = np.asarray(image, dtype=np.int64)
        image = _grey(grey >> 8 if image.mode != "I" or grey.max() > 255 else grey)
    elif image.mode == "F":
        grey = np.asarray(image)
        image = _grey(255 * grey if grey.max() <= 1 else grey)
    elif "A" in image.getbands() or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def _grey(values: np.ndarray) -> Image.Image:
    return Image.fromarray(values.round().clip(0, 255).astype(np.uint8))
