"""Statistics of a few runs: means with intervals, differences of runs that share their seeds, calibration."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import norm, t

__all__ = ["Calibration", "Estimate", "binomial", "calibrate", "over_seeds", "paired_images"]

LEVEL = 0.95
BINS = 15


@dataclass(frozen=True)
class Estimate:
    """A share or a difference of shares, with a 95 % interval.

    Attributes:
        mean: The estimate.
        low, high: Ends of the interval; both are the mean if there is no interval.
        n: Seeds behind it.
        sd: Standard deviation over the seeds; None for one.
        over: Which chance the interval covers: that of the "seeds" or, with one seed, that of the test "images" alone.
    """

    mean: float
    low: float
    high: float
    n: int
    sd: float | None
    over: str


def over_seeds(values: Sequence[float]) -> Estimate:
    """The mean over seeds, their standard deviation, and Student's interval of the mean. Needs two values or more."""
    x = np.asarray(values, dtype=float)
    n, mean, sd = len(x), x.mean(), x.std(ddof=1)
    half = t.ppf((1 + LEVEL) / 2, n - 1) * sd / np.sqrt(n)
    return Estimate(float(mean), float(mean - half), float(mean + half), n, float(sd), "seeds")


def binomial(share: float, images: int) -> Estimate:
    """For one seed: the share of the test images that are classified right, with Wilson's interval."""
    z = norm.ppf((1 + LEVEL) / 2)
    centre = (share + z**2 / (2 * images)) / (1 + z**2 / images)
    half = z / (1 + z**2 / images) * np.sqrt(share * (1 - share) / images + z**2 / (4 * images**2))
    return Estimate(float(share), float(centre - half), float(centre + half), 1, None, "images")


def paired_images(right: np.ndarray, before: np.ndarray) -> Estimate:
    """For one seed each: the difference of two accuracies, from whether each image was classified right, (N,)."""
    difference = right.astype(float) - before.astype(float)
    mean, half = difference.mean(), norm.ppf((1 + LEVEL) / 2) * difference.std() / np.sqrt(len(difference))
    return Estimate(float(mean), float(mean - half), float(mean + half), 1, None, "images")


@dataclass(frozen=True)
class Calibration:
    """How far a classifier's confidence can be trusted.

    Attributes:
        confidence, accuracy, share: For each bin of confidence that has images, in ascending order: the mean of the
            largest probability, the share of images classified right, and the bin's share of all images.
        ece: Expected calibration error: the mean of |accuracy - confidence| over the bins by their share (Guo et al.,
            2017), with 15 bins of equal width.
        nll: Mean negative log-likelihood of the true class, in nats.
    """

    confidence: np.ndarray
    accuracy: np.ndarray
    share: np.ndarray
    ece: float
    nll: float


def calibrate(log_probabilities: np.ndarray, predicted: np.ndarray, labels: np.ndarray) -> Calibration:
    """The calibration, from log-probabilities of shape (N, C), and predicted and true classes of shape (N,)."""
    logs = log_probabilities.astype(np.float64)
    certain, right = np.exp(logs.max(axis=1)), predicted == labels
    bins = np.minimum((certain * BINS).astype(int), BINS - 1)
    count = np.bincount(bins, minlength=BINS)
    there = count > 0
    confidence = np.bincount(bins, certain, BINS)[there] / count[there]
    accuracy = np.bincount(bins, right, BINS)[there] / count[there]
    share = count[there] / len(labels)
    nll = -logs[np.arange(len(labels)), labels].mean()
    return Calibration(confidence, accuracy, share, float((share * abs(accuracy - confidence)).sum()), float(nll))
