"""The application: what every command shares, and how a command ends. What the user can fix is one line."""

import errno
import gc
import os
import sys
import warnings
from importlib import import_module
from typing import Annotated

import typer

from .. import __version__, processes
from ..errors import Notice, TryAgainError, UserError, either
from ..terminal import Terminal, any_encoding

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)
console, errors = Terminal(), Terminal(stderr=True)
SIGNAL_CODES = {"SIGHUP": 129, "SIGINT": 130, "SIGUSR1": 138, "SIGUSR2": 140, "SIGTERM": 143, "SIGXCPU": 152}
EXIT_CODES = {**SIGNAL_CODES, "time limit": 75}
TRAINING = ("run", "prune")  # commands that several processes carry out together
IMPORT = "DMS_FASTAI_IMPORT"
FULL = {errno.ENOSPC, errno.EFBIG, getattr(errno, "EDQUOT", errno.ENOSPC)}  # a disk, a limit on files, a quota


def _version(asked: bool) -> None:
    if asked:
        console.say(f"dms-fastai {__version__}")
        raise typer.Exit


@app.callback()
def about(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", help="Show the version and exit.", is_eager=True, callback=_version)
    ] = False,
) -> None:
    """Tiny residual networks, distilled: train, compare and export small image classifiers."""
    command = context.invoked_subcommand
    if processes.started() and command not in TRAINING:
        raise UserError(f"torchrun works with {either(TRAINING)} only; start {command} without it")
    _import_own()


def _import_own() -> None:
    """Import the modules that the environment variable names, from the current folder, too; they register networks."""
    names = [name.strip() for name in os.environ.get(IMPORT, "").split(",") if name.strip()]
    sys.path += [os.getcwd()] if names else []
    for name in names:
        try:
            import_module(name)
        except ImportError as error:
            raise UserError(f"{IMPORT} is {os.environ[IMPORT]!r}, and {name} cannot be imported: {error}") from None


def _show_warning(message: Warning | str, category: type[Warning], *where: object, **more: object) -> None:
    """Print a warning: in one line, if it is for users."""
    if issubclass(category, Notice):
        errors.say(f"dms-fastai: {message}")
    else:
        sys.stderr.write(warnings.formatwarning(message, category, *where[:2]))


def _tell_for_all(message: str) -> None:
    """Say what has ended the command; of several processes, which all end then, the first to know it does."""
    if processes.first_to_tell():
        errors.quiet = False
        errors.say(f"dms-fastai: error: {message}")


def main() -> None:
    """Run the console script. An error that the user can fix gives one line and exit code 2."""
    any_encoding()
    gc.freeze()  # what is imported stays, so that no collection, a fifth of a second, need look at it
    console.quiet = errors.quiet = processes.started() and os.environ["RANK"] != "0"
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            app()
    except UserError as error:
        _tell_for_all(error.message)
        sys.exit(EXIT_CODES["time limit"] if isinstance(error, TryAgainError) else 2)
    except UnicodeEncodeError as error:
        errors.say(f"dms-fastai: error: the name {error.object} is not UTF-8, and a file has to hold it; rename it")
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(EXIT_CODES["SIGINT"])
    except RuntimeError as error:
        if not processes.lost_another(error):
            raise
        _tell_for_all("one of the processes has ended; the same command resumes from the last checkpoint")
        sys.exit(2)
    except OSError as error:  # a folder that cannot be written, a full disk
        kept = "; what was finished is kept: make room or raise the limit, and the same command resumes"
        _tell_for_all(f"{error}{kept if error.errno in FULL else ''}")
        sys.exit(2)
