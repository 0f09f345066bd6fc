"""Images that are there twice: what is validated on and trained on, too, and what has the labels of two classes."""

from collections.abc import Iterator, Sequence

from ..training.losses import UNLABELLED
from .imageset import ImageSet

__all__ = ["repeats", "repeats_said"]


def repeats(train: ImageSet, valid: ImageSet) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """Pairs of images with the same pixels.

    Returns:
        The indices of validation images, each with that of a training image; and of training images, each with that of
        an earlier one whose label is another.
    """
    first: dict[int, int] = {}
    other_label = []
    labels = train.labels.tolist()
    for index, image in enumerate(train.hashes()):
        before = first.setdefault(image, index)
        if UNLABELLED not in (labels[index], labels[before]) and labels[index] != labels[before]:
            other_label.append((index, before))
    trained = [(index, first[image]) for index, image in enumerate(valid.hashes()) if image in first]
    return trained, other_label


def repeats_said(train: ImageSet, valid: ImageSet) -> Iterator[str]:
    """A line about each kind of repeated images, where there are any."""
    trained, other_label = repeats(train, valid)
    if trained:
        yield (
            f"images to validate on that are training images, too: {len(trained):,} of {len(valid):,}"
            f"{_such_as(trained, valid, train)}; that flatters the accuracy"
        )
    if other_label:
        yield (
            f"training images that are in another class, too: {len(other_label):,}{_such_as(other_label, train, train)}"
        )


def _such_as(pairs: Sequence[tuple[int, int]], ours: ImageSet, theirs: ImageSet) -> str:
    """An example, if images have names."""
    if ours.files is None or theirs.files is None:
        return ""
    index, other = pairs[0]
    return f", such as {ours.root / ours.files[index]}, which is {theirs.root / theirs.files[other]}"
