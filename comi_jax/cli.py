"""What the commands share: argument types, and the handling of errors."""

import argparse
import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from typing import NoReturn

from comi_jax.errors import UserError


def leave(message: str) -> NoReturn:
    """End this process with ``message`` on standard error and status 1."""
    sys.exit(f"error: {message}")


@contextlib.contextmanager
def one_way_out(leave: Callable[[str], NoReturn] = leave) -> Iterator[None]:
    """Ends the command through ``leave`` with one sentence on a UserError or an OSError. Any other exception is a bug
    and keeps its traceback."""
    try:
        yield
    except UserError as error:
        leave(str(error))
    except OSError as error:
        leave(f"{error.filename}: {error.strerror}" if error.filename and error.strerror else str(error))


def width() -> int | None:
    """Columns of a rich Console: a terminal's own, or those that COLUMNS says; in a log so many that no table breaks
    its cells into lines."""
    return None if sys.stdout.isatty() or os.environ.get("COLUMNS") else 1000


def at_least(least: int) -> Callable[[str], int]:
    """An argparse type: whole numbers from ``least`` up."""

    def number(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text} is not a whole number of at least {least}")
        return int(text)

    return number


def add_ignore_config(parser: argparse.ArgumentParser) -> None:
    """Give ``parser`` the option of the commands that read a Hugging Face folder."""
    text = "attributes of the language model's config.json to read it without (model.ignore_config)"
    parser.add_argument("--ignore-config", action="append", default=[], metavar="KEY[,KEY]", help=text)


def ignore_config(given: argparse.Namespace) -> list[str]:
    """The override that ``--ignore-config`` stands for."""
    return [f"model.ignore_config={','.join(given.ignore_config)}"] if given.ignore_config else []
