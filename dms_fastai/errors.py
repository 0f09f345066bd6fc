"""Errors that the user can mend: one line that says what was wrong, with which value, and what to do."""

from collections.abc import Iterable
from difflib import get_close_matches

__all__ = ["UserError", "unknown"]

MANY = 20  # names in a message


class UserError(ValueError):
    """Something the user can mend. The command line prints `message` alone and exits with code 2."""

    def __init__(self, message: str):
        super().__init__(message)
        self.message = message  # fastai rewrites the arguments of what is raised inside a callback


def unknown(kind: str, name: str, known: Iterable[str]) -> UserError:
    """The error for a name that does not exist; it names the nearest that does, or all where they are few."""
    known = sorted(known)
    near = get_close_matches(name, known, n=1, cutoff=0.5)
    if near:
        hint = f"did you mean {near[0]!r}?"
    else:
        hint = "known: " + ", ".join(known) if len(known) <= MANY else f"none of the {len(known)} known is near it"
    return UserError(f"unknown {kind} {name!r}: {hint}")
