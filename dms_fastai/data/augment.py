"""Augmentation of whole batches, on the device that holds them."""

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["crop_windows", "normalize", "random_crop", "random_flip"]


def crop_windows(images: Tensor, padding: int) -> Tensor:
    """Every crop of every padded picture, as a view: shape (N, C, 2p + 1, 2p + 1, H, W) of pictures (N, C, H, W).

    The border is black, as the paper's code pads before it normalises. Only the padded copy takes memory.
    """
    height, width = images.shape[-2:]
    return F.pad(images, [padding] * 4).unfold(2, height, 1).unfold(3, width, 1)


def random_crop(windows: Tensor, index: Tensor) -> Tensor:
    """A crop of each picture in `index`, its place drawn uniformly; shape (B, C, H, W)."""
    places = windows.shape[2]
    top, left = torch.randint(places, (2, len(index)), device=windows.device)
    return windows[index, :, top, left]


def random_flip(x: Tensor, p: float) -> Tensor:
    """Each picture of (B, C, H, W) mirrored left to right with probability `p`."""
    flipped = torch.rand(len(x), 1, 1, 1, device=x.device) < p
    return torch.where(flipped, x.flip(-1), x)


def normalize(x: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """uint8 pictures (B, C, H, W) as float32, (x / 255 - mean) / std, laid out channels last."""
    x = x.to(torch.float32, memory_format=torch.channels_last)
    return x.sub_(255 * mean).div_(255 * std)
