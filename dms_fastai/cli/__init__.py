"""The command line: parse, call, print.

Imports that need torch are inside the commands, after the arguments have been checked: nobody should wait seconds for
the report of a typing mistake.
"""

from . import run, search, show, trained  # noqa: F401  (each adds its commands, in this order)
from .app import app, main

__all__ = ["app", "main"]
