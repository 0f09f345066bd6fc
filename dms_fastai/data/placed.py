"""Where the images are of which batches are made: on the device, with copies or without, or where they are stored."""

from collections.abc import Iterator, Sequence
from typing import Literal

import torch
from torch import Tensor

from ..errors import UserError
from ..files import amount
from .ahead import ahead
from .augment import BatchCropper, Cropper, Crops
from .memory import free_memory
from .stored import Squares, Stored

__all__ = ["Placed", "Where", "place_for"]

Where = Literal["copies", "device", "disk"]
SHARE = 0.6  # of the free memory that images may take; the rest is for the network and its batches


class Placed:
    """Images where batches are made of them. All ways give the same batches, bit for bit."""

    def __init__(self, images: Stored, crops: Crops, device: torch.device, where: Where):
        """
        Args:
            images: All images.
            crops: How they are cropped and flipped.
            device: Where batches are made.
            where: "copies": they are on the device, with borders and mirror images, if they are square; "device": they
                are there as they are; "disk": they stay where they are stored, and each batch is gathered there.
        """
        if device.type == "cuda" and device.index is None:  # which is another GPU to a thread that gathers ahead
            device = torch.device("cuda", torch.cuda.current_device())
        self.device, self.streamed, self.cropper = device, where == "disk", None
        if where == "copies" and isinstance(images, Squares):
            self.cropper = Cropper(images, crops, device)
        else:
            self.images = images if self.streamed else images.to(device)
            self.cropper = BatchCropper(images, crops, device)

    def gathered(self, index: Tensor) -> Stored:
        """The images at `index`, shape (B,), on the device, or on their way there."""
        if not self.streamed:
            return self.images.subset(index)
        return self.images.gathered(index.cpu(), pinned=self.device.type == "cuda").to(self.device)

    def batches(self, indices: Sequence[Tensor]) -> Iterator[Stored | None]:
        """What `take` needs for each batch; a thread gathers it ahead where the images are stored."""
        if self.streamed:
            return ahead(self.gathered, indices)
        return iter([None] * len(indices)) if isinstance(self.cropper, Cropper) else map(self.gathered, indices)

    def take(self, index: Tensor, epoch: int = 0, gathered: Stored | None = None) -> Tensor:
        """Crops of the images at `index`, shape (B,), on the device: uint8 (B, C, H, W), channels last.

        Args:
            index: Which images.
            epoch: As in `BatchCropper.crop`.
            gathered: What `batches` gave for them; None: they are gathered now.
        """
        if isinstance(self.cropper, Cropper):
            return self.cropper.take(index, epoch)
        return self.cropper.crop(self.gathered(index) if gathered is None else gathered, index, epoch)


def place_for(train: Stored, others: Sequence[Stored], crops: Crops, device: torch.device, wanted: str) -> Where:
    """Where images are best for batches on `device`: there with copies, if these fit, or else there; or on the disk.

    Args:
        train: The images that are cropped.
        others: Further images that are needed.
        crops: How they are cropped.
        device: Where batches are made.
        wanted: "auto": as above; "device": not on the disk; "disk": nowhere else.

    Raises:
        UserError: They are to be on the device, and do not fit.
    """
    if wanted == "disk":
        return "disk"
    more, free = sum(each.nbytes for each in others), free_memory(device)
    if isinstance(train, Squares) and Cropper.nbytes(train, crops) + more <= SHARE * free:
        return "copies"
    needed = train.nbytes + more
    if needed <= (free if wanted == "device" else SHARE * free):
        return "device"
    if wanted == "auto":
        return "disk"
    where = "memory" if device.type == "cpu" else "the GPU's memory"
    raise UserError(
        f"data.where is 'device', and the images take {amount(needed)}; {where} has {amount(free)} free; leave "
        f"them on the disk, --set data.where=disk, or give a smaller --set data.size, or distill.size for a teacher's"
    )
