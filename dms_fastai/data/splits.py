"""The splits of a data set, each read when it is first asked for."""

from collections.abc import Callable, Iterator, Mapping

from ..errors import UserError
from .imageset import ImageSet

__all__ = ["NEEDS_TEACHER", "Splits", "UnlabelledError"]

NEEDS_TEACHER = "images without labels need a --teacher that says its classes, such as a run; classes= in Python"


class UnlabelledError(UserError):
    """A split whose images have no labels."""


class Splits(Mapping[str, ImageSet]):
    """ "train" and, where there are any, "test", "val" and "unlabelled"; a split that nobody asks for is never read."""

    def __init__(self) -> None:
        self._readers: dict[str, Callable[[], ImageSet]] = {}
        self._read: dict[str, ImageSet] = {}
        self.name = ""

    def add(self, split: str, read: Callable[[], ImageSet]) -> None:
        self._readers[split] = read

    def __getitem__(self, split: str) -> ImageSet:
        if split not in self._read:
            self._read[split] = found = self._readers[split]()
            found.name, found.split = self.name, split
        return self._read[split]

    def __contains__(self, split: object) -> bool:
        return split in self._readers  # a Mapping would read it

    def __iter__(self) -> Iterator[str]:
        return iter(self._readers)

    def __len__(self) -> int:
        return len(self._readers)
