"""Text on any terminal: names of files and classes come from elsewhere, and may hold anything."""

import io
import os
import sys
from typing import IO, Any, NoReturn

from rich.console import Console
from rich.text import Text

__all__ = ["Terminal", "any_encoding", "printable", "reader_gone"]

BROKEN_PIPE = 141  # what a shell reports for a program that SIGPIPE has ended


def printable(text: object, keep: str = "") -> str:
    r"""The text with an escape in place of every character that prints nothing or steers a terminal.

    These are control characters, marks of writing direction, and the bytes of a file name that is not UTF-8:
    printable("a\x1b") is r"a\x1b".

    Args:
        text: Anything; it is converted to text.
        keep: Such characters that stay as they are.
    """
    text = str(text)
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in keep else _escaped(c) for c in text)


def _escaped(character: str) -> str:
    if "\udc80" <= character <= "\udcff":  # how Python keeps a byte that is not UTF-8
        return f"\\x{ord(character) - 0xDC00:02x}"
    return character.encode("unicode_escape").decode()


class Terminal(Console):
    """A console on which text is only text: rich's markup and emoji codes mean nothing, and what is not printable is
    escaped. Where a reader such as `head` has gone, the program ends without a word.
    """

    def __init__(self, **kwargs: Any):
        super().__init__(markup=False, emoji=False, highlight=False, **kwargs)

    def render_str(self, text: str, **kwargs: Any) -> Text:
        return super().render_str(printable(text, keep="\n"), **kwargs)

    def say(self, text: str) -> None:
        """Print one line, which the terminal may wrap."""
        self.print(printable(text), soft_wrap=True)

    def on_broken_pipe(self) -> None:
        reader_gone(self.file)


def reader_gone(stream: IO[str]) -> NoReturn:
    """End the program without a word, because nobody reads `stream` any more."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())  # Python flushes it once more at the end
    sys.exit(BROKEN_PIPE)


def any_encoding() -> None:
    """Have standard output and standard error write escapes for characters that their encoding does not have."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
