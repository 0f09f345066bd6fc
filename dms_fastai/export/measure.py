"""Exported files beside one another: what they answer, and how long they take."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch

from .formats import Exported

__all__ = ["Answers", "answers", "milliseconds"]

BATCH = 64  # images classified at once
LEAST, MOST = 5, 100  # calls that are timed
SECONDS = 2.0  # of timing, after which no further call begins
SMALLEST = 1e-12  # a probability, so that its logarithm is finite


@dataclass(frozen=True)
class Answers:
    """What a file answers to labelled images.

    Attributes:
        probabilities: Shape (N, classes).
        labels: Index of each image's class, shape (N,).
    """

    probabilities: np.ndarray
    labels: np.ndarray

    @property
    def classes(self) -> np.ndarray:
        """The likeliest class of each image."""
        return self.probabilities.argmax(1)

    @property
    def accuracy(self) -> float:
        return float((self.classes == self.labels).mean())

    @property
    def nll(self) -> float:
        """Mean negative log-likelihood."""
        of_label = self.probabilities[np.arange(len(self.labels)), self.labels]
        return float(-np.log(np.maximum(of_label, SMALLEST)).mean())

    @property
    def sum_error(self) -> float:
        """How far the sum of an image's probabilities is from 1, at most."""
        return float(np.abs(self.probabilities.sum(1) - 1).max())

    def agreement(self, other: "Answers") -> float:
        """The share of images to which another gives the same class."""
        return float((self.classes == other.classes).mean())


def answers(exported: Exported, images: torch.Tensor, labels: torch.Tensor) -> Answers:
    """Classify uint8 images, shape (N, C, H, W), a batch at a time; `labels` are indices into the file's classes."""
    with _one_thread():
        found = [exported.classify(batch.numpy()) for batch in images.split(BATCH)]
    return Answers(np.concatenate(found), labels.numpy())


def milliseconds(contenders: Sequence[Exported], batch: int = 1) -> list[np.ndarray]:
    """Milliseconds of each of several calls with a batch of images, on one thread; an array for each contender.

    It is processor time of the calling thread: what else the machine computes makes it hardly longer. The contenders
    take turns, so that a change of the processor's clock meets all of them.
    """
    images = [np.random.default_rng(0).integers(0, 256, (batch, *c.shape), np.uint8) for c in contenders]
    taken: list[list[float]] = [[] for _ in contenders]
    with _one_thread():
        for contender, pixels in zip(contenders, images, strict=True):
            contender.classify(pixels)  # the first call allocates
        end = time.thread_time() + SECONDS * len(contenders)
        for turn in range(MOST):
            if turn >= LEAST and time.thread_time() > end:
                break
            for contender, pixels, times in zip(contenders, images, taken, strict=True):
                before = time.thread_time()
                contender.classify(pixels)
                times.append(1000 * (time.thread_time() - before))
    return list(map(np.array, taken))


@contextmanager
def _one_thread() -> Iterator[None]:
    """torch, too, computes on one thread until the block ends."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
