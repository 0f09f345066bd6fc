"""Errors that the user can fix: one line that says what was wrong, with which value, and what to do."""

import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches

__all__ = [
    "FolderError",
    "Notice",
    "TryAgainError",
    "UserError",
    "damage",
    "either",
    "no_format",
    "no_model",
    "notice",
    "reason_of",
    "unknown",
    "unlistable",
]

MANY = 24  # names in a message
LONG = 200  # characters of what another library says


class UserError(ValueError):
    """An error that the user can fix. The command line prints `message` alone and exits with code 2."""

    def __init__(self, message: str):
        message = " ".join(message.split("\n")) if "\n" in message else message  # other libraries' reasons have several
        super().__init__(message)
        self.message = message  # fastai changes the arguments of an exception that a callback raises


class FolderError(UserError):
    """A run's folder is in use, or holds a run that is not the one to be trained."""


class TryAgainError(UserError):
    """Nothing is wrong, but the time was too short; the same command may get further. Its exit code is 75."""


class Notice(UserWarning):
    """What the user should know and need not mend: what was converted, or left out. A command prints it in a line."""


def notice(message: str) -> None:
    """Say something that the user should know, in one line."""
    warnings.warn(message, Notice, stacklevel=2)


@contextmanager
def damage(what: str) -> Iterator[None]:
    """Turn what the readers of damaged files raise, which may be anything, into a UserError: `what`, and the reason."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{what}: {str(error) or type(error).__name__}") from None


def reason_of(error: BaseException) -> str:
    """The first line of what another library's exception says, or its type if it says nothing; of bounded length."""
    said = str(error).strip() or type(error).__name__
    return said.splitlines()[0].rstrip(".")[:LONG]


def either(words: Iterable[str]) -> str:
    """The words as "A, B or C"."""
    *words, last = words
    return f"{', '.join(words)} or {last}" if words else last


def unknown(kind: str, name: str, known: Iterable[str]) -> UserError:
    """The error for an unknown name. It suggests the nearest known name, or lists all if they are few."""
    known = sorted(known)
    near = get_close_matches(name, known, n=1, cutoff=0.5)
    if near:
        hint = f"did you mean {near[0]!r}?"
    else:
        hint = "known: " + ", ".join(known) if len(known) <= MANY else f"none of the {len(known)} known is near it"
    return UserError(f"unknown {kind} {name!r}: {hint}")


def no_model(source: object) -> UserError:
    """The error for a trained model that is not there."""
    return UserError(
        f"no model at {source}; give a learner.pkl, a model.safetensors, a run's folder, or dmsresnet, whose weights "
        f"come with this package"
    )


def no_format(file: object, formats: Iterable[str], purpose: str = "written") -> UserError:
    """The error for a file whose ending is that of no format to which networks are exported."""
    return UserError(f"{file} cannot be {purpose}; the formats are {either(formats)}")


def unlistable(error: OSError) -> UserError:
    """The error for a folder that the system does not list."""
    return UserError(f"{error.filename} cannot be listed ({error.strerror}); make it readable, or remove it")
