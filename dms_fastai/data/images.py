"""Images in, uint8 tensors out: any file, mode and size that Pillow reads, always RGB."""

import os
import stat
import threading
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import ExifTags, Image, ImageOps
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor

from ..errors import UserError, notice
from ..files import amount
from .memory import free_memory
from .white import BYTE, as_bytes, beyond, white_of

__all__ = ["MIDDLE", "grey_white", "open_image", "read_image", "read_pixels", "read_whole", "resize", "to_rgb"]

MUCH = 2**28  # bytes: less is not compared with the memory that is free
LARGE = 2**24  # pixels; of images larger than this, one is decoded at a time
MIDDLE = 0.875  # of the shorter side is seen where crops are cut from larger images in training, as in timm
LONGEST = 2  # times its shorter side has an image that is kept whole
SCALES = 8  # is the largest by which a JPEG's sides are divided
GAP = 2  # times larger than needed is a JPEG decoded at least: then it is half a level of 255 off, on average
EXTENT = "dms_fastai_extent"  # in an image's `info`: its width and height at the scale at which it was decoded
one_large = threading.Lock()

warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)  # twice as many pixels are refused


def read_image(item: Any, size: int | None = None, white: float | None = None, middle: float = 1.0) -> Tensor:
    """One image as a uint8 tensor, shape (3, size, size).

    Args:
        item: A path, the bytes of a file, a PIL image, or an array or tensor of shape (H, W), (H, W, C) or (C, H, W)
            with 1 or 3 channels.
        size: Height and width that the middle square is resized to. None keeps the image as it is.
        white: The value that becomes 255, for pixels that are not bytes; None: what the image's own values suggest.
        middle: Share of the shorter side that is seen; more, where an image would have to be enlarged for it.

    Raises:
        UserError: The file is missing or is no image, or the array has another shape or type.
    """
    if isinstance(item, (np.ndarray, Tensor)):
        if isinstance(item, Tensor):
            item = (item.float() if item.dtype == torch.bfloat16 else item).numpy(force=True)
        if white is not None and item.dtype != np.uint8:
            _say_beyond(white_of(item), white, "the image", decimal=item.dtype.kind in "fb")
        pixels = to_rgb(as_bytes(item[None], white))
        return (resize(pixels, size, middle) if size else pixels)[0]
    if not isinstance(item, Image.Image):
        with open_image(item, size and round(size / middle)) as opened:
            if white is not None and (own := grey_white(opened)) is not None:
                _say_beyond(own, white, "the image" if isinstance(item, bytes) else str(item), opened.mode == "F")
            return read_image(opened, size, white, middle)
    if size and middle < 1:
        return _middle(read_whole(item, size, white, middle), size).contiguous()
    image = _rgb(item, white)
    if size:
        side = min(_extent(image))
        image = _resized(image, (side, side), (size, size))
    return _tensor(image)


def read_pixels(
    image: str | Path, shape: tuple[int, int, int], white: float | None = None, middle: float = 1.0
) -> Tensor:
    """The middle of an image file, resized to uint8 of `shape` (C, H, W), in colour or grey; `white` becomes 255.

    `middle` as in `read_image`, for a square in colour.

    Raises:
        UserError: The file is no image, or `shape` has neither 1 channel nor 3.
    """
    channels, height, width = shape
    if channels not in (1, 3):
        raise UserError(f"the model takes images of {channels} channels; files are in colour (3) or grey (1)")
    if channels == 3 and height == width:
        return read_image(image, height, white, middle)
    colours = Image.fromarray(read_image(image, None, white).permute(1, 2, 0).numpy())
    fitted = ImageOps.fit(colours, (width, height), method=Image.Resampling.BILINEAR)
    return pil_to_tensor(fitted if channels == 3 else fitted.convert("L"))


def read_whole(image: Image.Image, size: int, white: float | None = None, middle: float = MIDDLE) -> Tensor:
    """All of an image, but for the ends of one that is more than twice as long as wide: uint8, (3, height, width).

    Its shorter side has `size / middle` pixels, or fewer if it came with fewer; but `size` at least. Arguments and
    errors as in `read_image`.
    """
    image = _rgb(image, white)
    extent = _extent(image)
    side = min(extent)
    shorter = _shorter(side, size, middle)
    width, height = (min(length, LONGEST * side) for length in extent)
    kept = tuple(shorter if length == side else int(shorter * length / side) for length in (width, height))
    return _tensor(_resized(image, (width, height), kept))


@contextmanager
def open_image(file: str | Path | bytes, side: int | None = None) -> Iterator[Image.Image]:
    """The decoded image in a file, or in its bytes. Of large images, one at a time is held in memory.

    Args:
        file: The file, or its bytes.
        side: How many pixels its shorter side is needed with: a larger JPEG is decoded at a smaller scale, if it then
            still has twice as many. None: it is decoded as it is.

    Raises:
        UserError: The file is missing, is no image, or has too many pixels; or what is done with the image raises one,
            which then names the file. Decoders raise whatever their libraries raise, so any exception is the image's.
    """
    name = "the image" if isinstance(file, bytes) else str(file)
    with ExitStack() as held:
        try:
            opened = held.enter_context(BytesIO(file) if isinstance(file, bytes) else _open_regular(file))
            image = Image.open(opened)
            reduced = image.draft(None, (GAP * side, GAP * side)) if side and _may_be_reduced(image) else None
            if image.width * image.height > LARGE:
                held.enter_context(one_large)
            image.load()
            if reduced is not None and reduced[1][2:] != image.size:
                image.info[EXTENT] = reduced[1][2:]
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


def _say_beyond(own: float, white: float, name: str, decimal: bool) -> None:
    """Say that an image goes beyond the white of the training images; arguments and errors as in `beyond`."""
    if beyond(own, white, decimal):
        notice(f"{name}: pixels above {white:g} become white, as it is white in training")


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


def resize(pixels: Tensor, size: int, middle: float = 1.0) -> Tensor:
    """The middle squares of uint8 images (N, C, H, W), resized to (N, C, size, size) with antialiasing.

    `middle` as in `read_image`.
    """
    if middle < 1:
        larger = resize(pixels, _shorter(min(pixels.shape[-2:]), size, middle))
        return _middle(larger, size).contiguous()
    side = min(pixels.shape[-2:])
    pixels = _middle(pixels, side)
    if side == size:
        return pixels.contiguous()
    _check_memory(len(pixels) * pixels.shape[1] * size**2, size)
    chunks = pixels.split(4096)  # a whole data set at once would need several times its size
    return torch.cat([F.interpolate(c, size=(size, size), mode="bilinear", antialias=True) for c in chunks])


def _check_memory(needed: int, size: int) -> None:
    """Raise a UserError if images do not fit into memory at a size."""
    if needed > MUCH and needed > (free := free_memory(torch.device("cpu"))):
        raise UserError(
            f"the images take {amount(needed)} at {size} pixels, and {amount(free)} of memory are free; give a smaller "
            f"--set data.size, or distill.size for a teacher's"
        )


def _middle(pixels: Tensor, size: int) -> Tensor:
    """The middle squares of `size` pixels."""
    top, left = ((side - size) // 2 for side in pixels.shape[-2:])
    return pixels[..., top : top + size, left : left + size]


def _shorter(side: float, size: int, middle: float) -> int:
    """The shorter side that an image is kept with, if it came with `side`, and `size` pixels are its middle."""
    return max(size, min(round(side), round(size / middle)))


def _extent(image: Image.Image) -> tuple[float, float]:
    """Width and height; of a JPEG that was decoded at a smaller scale, its last pixels may stand for less than one."""
    return image.info.get(EXTENT, image.size)


def _resized(image: Image.Image, cut: tuple[float, float], size: tuple[int, int]) -> Image.Image:
    """The middle of an image, of `cut` width and height, resized to `size`."""
    extent = _extent(image)
    left, top = ((whole - part) / 2 for whole, part in zip(extent, cut, strict=True))
    if image.size == size == cut:
        return image
    return image.resize(size, Image.Resampling.BILINEAR, box=(left, top, left + cut[0], top + cut[1]))


def _tensor(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


def _may_be_reduced(image: Image.Image) -> bool:
    """Whether a JPEG has no last pixels that stand for less than others at a smaller scale, or will not be turned."""
    if not any(side % SCALES for side in image.size):
        return True
    with suppress(Exception):  # EXIF data that cannot be read turn nothing
        return image.getexif().get(ExifTags.Base.Orientation, 1) == 1
    return True


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
        values, clear = np.asarray(image), image.info.get("transparency")
        bytes_ = as_bytes(values, white).numpy()
        image = Image.fromarray(bytes_ if clear is None else np.where(values == clear, np.uint8(255), bytes_))
    elif image.has_transparency_data:
        key = image.info.get("transparency")
        if isinstance(key, tuple) and max(key) > BYTE:  # of 16 bits a channel, of which Pillow keeps the upper 8
            image.info["transparency"] = tuple(value >> 8 for value in key)
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def _upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # EXIF data that cannot be read say nothing of the pixels, which can
        return image
