"""Pickles that keep no folder of the machine that writes them."""

from types import FunctionType, SimpleNamespace
from typing import Any

import cloudpickle

__all__ = ["PORTABLE"]


class PortablePickler(cloudpickle.Pickler):
    """cloudpickle's pickler, which copies functions that cannot be imported, but not the files that they come from."""

    def reducer_override(self, obj: Any) -> Any:
        reduced = super().reducer_override(obj)
        if isinstance(obj, FunctionType) and isinstance(reduced, tuple):
            for part in reduced[1]:
                if isinstance(part, dict):  # the function's globals
                    part.pop("__file__", None)
        return reduced


PORTABLE = SimpleNamespace(__name__="portable", Pickler=PortablePickler)  # a pickle module, as far as torch.save asks
