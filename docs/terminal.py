"""An image of a command at work in a terminal of 80 columns: how it looks on the way, and how at its end.

pip install pyte
python -m docs.terminal --when "epoch 8/40" --last 14 docs/images/terminal.svg dms-fastai run kd --data digits
"""

import argparse
import fcntl
import os
import pty
import re
import struct
import termios
from pathlib import Path

import pyte
from rich.console import Console
from rich.style import Style
from rich.text import Text

COLUMNS, LINES = 80, 40
NAMES = {"default": None, "brown": "yellow"}  # pyte's, where rich has others


def colour(name: str) -> str | None:
    """rich's word for one of pyte's colours, which are names or six hexadecimal digits."""
    return f"#{name}" if re.fullmatch("[0-9a-f]{6}", name) else NAMES.get(name, name)


def lines(screen: pyte.Screen) -> list[Text]:
    """What is on the screen, in its colours, down to the last line with anything on it."""
    shown = []
    for y in range(screen.lines):
        line = Text()
        for x in range(screen.columns):
            char = screen.buffer[y][x]
            line.append(char.data, Style(color=colour(char.fg), bold=char.bold))
        shown.append(line)
    while shown and not shown[-1].plain.strip():
        shown.pop()
    return shown


def watch(command: list[str], when: str) -> tuple[list[Text], list[Text]]:
    """The screen when a text was first on it, and at the end."""
    screen = pyte.Screen(COLUMNS, LINES)
    stream, middle = pyte.ByteStream(screen), []
    pid, terminal = pty.fork()
    if pid == 0:
        os.environ["TERM"] = "xterm-256color"
        os.execvp(command[0], command)
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", LINES, COLUMNS, 0, 0))
    while True:
        try:
            stream.feed(os.read(terminal, 65536))
        except OSError:  # the other end is closed
            break
        if not middle and any(when in line for line in screen.display):
            middle = lines(screen)
    os.waitpid(pid, 0)
    return middle, lines(screen)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--when", required=True, help="text on the screen that the first image is taken at")
    parser.add_argument("--last", type=int, default=LINES, help="how many lines of the end are shown")
    parser.add_argument("file", type=Path)
    parser.add_argument("command", nargs=argparse.REMAINDER)
    args = parser.parse_args()
    middle, end = watch(args.command, args.when)
    with open(os.devnull, "w") as nowhere:
        console = Console(record=True, width=COLUMNS, file=nowhere)
        for line in (Text(f"$ {' '.join(args.command)}", "bold"), *middle, Text("   ⋮"), *end[-args.last :]):
            console.print(line)
        svg = console.export_svg(title=args.command[0])
    args.file.write_text(re.sub(r"@font-face \{.*?\}", "", svg, flags=re.S))  # fonts from elsewhere


if __name__ == "__main__":
    main()
