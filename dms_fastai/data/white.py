"""Pixels of any type as bytes: which value is white, and so becomes 255, is decided once for a data set.

A camera's 12 bits in a 16-bit file would come out nearly black if 65,535 were white.
"""

import numpy as np
import torch
from torch import Tensor

from ..errors import UserError

__all__ = ["BYTE", "UNIT", "as_bytes", "beyond", "describe", "other_range", "white_of"]

BYTE = 255.0
UNIT = 1.0
BITS = (8, 10, 12, 14, 16)
OVERSHOOT = 0.25  # decimal numbers may leave their range by this share of it: resampling does so
CHUNK = 2**24  # values that are converted at once


def white_of(values: np.ndarray) -> float:
    """The smallest customary white that the values do not exceed: 255 or the largest number of 10 to 16 bits.

    For decimal numbers it may also be 1, and they may exceed their white a little.

    Raises:
        UserError: The values are no numbers, negative, or larger than any white; says which.
    """
    if values.dtype == bool:
        return UNIT
    if values.dtype.kind not in "uif":
        raise UserError(f"pixels are {values.dtype}; give numbers, 0 to 255 or 0 to 1")
    if values.dtype == np.uint8 or not values.size:
        return BYTE
    low, high = float(values.min()), float(values.max())
    if not np.isfinite(low + high):
        raise UserError("pixels are NaN or infinite; give numbers, 0 to 255 or 0 to 1")
    decimal = values.dtype.kind == "f"
    whites = [UNIT] if decimal else []
    whites += [2.0**bits - 1 for bits in BITS]
    slack = OVERSHOOT if decimal else 0.0
    for white in whites:
        if high <= white * (1 + slack):
            if low < -slack * white:
                break
            return white
    hint = "; they look normalised" if decimal and low < 0 else ""
    raise UserError(f"pixels run from {low:g} to {high:g}{hint}; give 0 to 255, 0 to 1, or up to 65535")


def as_bytes(values: np.ndarray, white: float | None = None) -> Tensor:
    """The values as uint8, `white` (None: `white_of` the values) as 255; what lies outside the range is clipped."""
    if values.dtype == np.uint8:
        return torch.from_numpy(np.ascontiguousarray(values))
    whole = values.dtype.kind in "ui"
    if white is None or (whole and white < BYTE):  # a share of white is no whole number
        white = white_of(values)
    result = np.empty(values.shape, np.uint8)
    rows = max(1, CHUNK // max(1, values[:1].size))
    for first in range(0, len(values), rows):
        part = values[first : first + rows]
        if whole:  # the upper 8 bits, as hardware has it
            shifted = part.astype(np.int64) >> (round(white) + 1).bit_length() - 9
            result[first : first + rows] = shifted.clip(0, 255)
        else:
            scaled = part.astype(np.float64) * (BYTE / white)
            result[first : first + rows] = scaled.round().clip(0, 255)
    return torch.from_numpy(result)


def beyond(own: float, white: float, decimal: bool) -> bool:
    """Whether some values exceed the white of the training images, and so become white.

    Args:
        own: What the values suggest as their white.
        white: That of the training images.
        decimal: Whether the values are no whole numbers.

    Raises:
        UserError: Decimal values go beyond the 0 to 1 of the training images.
    """
    if decimal and own > white == UNIT:
        raise other_range(own, white)
    return own > white > UNIT


def other_range(own: float, white: float) -> UserError:
    """The error for pixels whose white is not that of the training images, one of the two being 1."""
    return UserError(f"pixels run to about {own:g}, and those of training to {white:g}; give one range")


def describe(white: float, dtype: np.dtype | None = None) -> str:
    """What is said of pixels that were converted."""
    kind = "" if dtype is None else f"{dtype} "
    return f"{kind}pixels are scaled: {white:g} becomes 255"
