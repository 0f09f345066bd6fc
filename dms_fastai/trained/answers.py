"""A teacher's answers, in place of labels that nobody has given."""

import copy

import torch
from torch import Tensor

from ..data.augment import at_size
from ..data.loader import BatchLoader
from .network import Teacher, renormalize

__all__ = ["answers"]


def answers(teacher: Teacher, loader: BatchLoader) -> Tensor:
    """The class that a teacher gives each image of a loader, in the order of its set: int64, shape (N,), on the CPU."""
    device, ours = loader.device or torch.device("cpu"), (loader.mean, loader.std)
    theirs = ours if teacher.mean is None else (teacher.mean, teacher.std)
    scale, shift = (t.to(device) for t in renormalize(ours, theirs))
    network = copy.deepcopy(teacher.model).to(device).eval()
    found = []
    with torch.no_grad():
        for index in torch.arange(len(loader.dataset)).split(loader.bs):
            x, *_ = loader.load_batch(index.to(device))
            x = x if teacher.size is None else at_size(x, teacher.size)
            found.append(network(x * scale + shift).argmax(1).cpu())
    return torch.cat(found)
