"""Pictures in, uint8 tensors out: any file, mode and size that Pillow reads, always RGB and square."""

from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor

from ..errors import UserError

__all__ = ["read_picture", "resize", "to_rgb"]


def read_picture(item: Any, size: int | None = None) -> Tensor:
    """One picture as a uint8 tensor, shape (3, size, size).

    Args:
        item: A path, the bytes of a file, a PIL picture, or a uint8 array or tensor of shape (H, W), (H, W, C) or
            (C, H, W) with 1 or 3 channels.
        size: Height and width; the middle square is cut out and resized to it. None keeps the picture as it is.

    Raises:
        UserError: The file is missing or is no picture, or the array has another shape or type.
    """
    if isinstance(item, (np.ndarray, Tensor)):
        pixels = to_rgb(torch.as_tensor(item)[None])
        return (resize(pixels, size) if size else pixels)[0]
    if not isinstance(item, Image.Image):
        item = _open(item)
    picture = _rgb(item)
    if size and picture.size != (size, size):
        picture = ImageOps.fit(picture, (size, size), method=Image.Resampling.BILINEAR)
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1).contiguous()


def to_rgb(pixels: Tensor) -> Tensor:
    """Batched uint8 pixels as (N, 3, H, W), from (N, H, W), (N, H, W, C) or (N, C, H, W) with 1 or 3 channels."""
    if pixels.dtype != torch.uint8:
        raise UserError(f"pixels are {str(pixels.dtype).removeprefix('torch.')}; give uint8, 0 to 255")
    if pixels.ndim == 3:
        pixels = pixels[:, None]
    if pixels.ndim == 4 and pixels.shape[1] not in (1, 3) and pixels.shape[3] in (1, 3):
        pixels = pixels.permute(0, 3, 1, 2)
    if pixels.ndim != 4 or pixels.shape[1] not in (1, 3):
        raise UserError(f"pictures have shape {tuple(pixels.shape[1:])}; give (H, W), (H, W, 3) or (3, H, W)")
    return pixels.expand(-1, 3, -1, -1).contiguous()


def resize(pixels: Tensor, size: int) -> Tensor:
    """The middle squares of uint8 pictures (N, C, H, W), resized to (N, C, size, size) with antialiasing."""
    height, width = pixels.shape[-2:]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    pixels = pixels[..., top : top + side, left : left + side]
    if side == size:
        return pixels.contiguous()
    chunks = pixels.split(4096)  # a whole data set at once would need several times its size
    return torch.cat([F.interpolate(c, size=(size, size), mode="bilinear", antialias=True) for c in chunks])


def _open(file: str | Path | bytes) -> Image.Image:
    name = "the picture" if isinstance(file, bytes) else str(file)
    try:
        with BytesIO(file) if isinstance(file, bytes) else open(file, "rb") as opened:
            picture = Image.open(opened)
            picture.load()
    except FileNotFoundError:
        raise UserError(f"no such picture: {name}") from None
    except IsADirectoryError:
        raise UserError(f"{name} is a folder; give the pictures in it") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        reason = "its content is of no known format" if isinstance(error, Image.UnidentifiedImageError) else error
        raise UserError(f"{name} is not a picture that can be read ({reason}); remove or replace it") from None
    return picture


def _rgb(picture: Image.Image) -> Image.Image:
    """RGB, upright as the camera meant it, and on white where it is transparent.

    Grey of more than 8 bits is scaled, where Pillow alone would cut it off at 255: whole numbers above that are taken
    for 16-bit ones, and decimal numbers up to 1 for shares.
    """
    picture = ImageOps.exif_transpose(picture)
    if picture.mode.startswith("I"):
        grey = np.asarray(picture, dtype=np.int64)
        picture = _grey(grey >> 8 if picture.mode != "I" or grey.max() > 255 else grey)
    elif picture.mode == "F":
        grey = np.asarray(picture)
        picture = _grey(255 * grey if grey.max() <= 1 else grey)
    elif "A" in picture.getbands() or "transparency" in picture.info:
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    return picture.convert("RGB")


def _grey(values: np.ndarray) -> Image.Image:
    return Image.fromarray(values.round().clip(0, 255).astype(np.uint8))
