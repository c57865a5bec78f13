"""What the commands share: reading arguments, writing output, and the handling of errors."""

import argparse
import contextlib
import io
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

from comi_jax.config import Mesh
from comi_jax.errors import ConfigError, UserError


class Parser(argparse.ArgumentParser):
    """A command's arguments, which are Unicode text; from here on whatever it prints, the terminal can take."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        forgiving_output()

    def parse_known_args(  # pyright: ignore[reportIncompatibleMethodOverride] (it has overloads)
        self, args: Sequence[str] | None = None, namespace: Any = None
    ) -> Any:
        words = sys.argv[1:] if args is None else list(args)
        for number, word in enumerate(words, start=1):
            if any("\ud800" <= letter <= "\udfff" for letter in word):
                shown = word.encode("utf-8", "surrogateescape" if args is None else "replace").decode(
                    "utf-8", "replace"
                )
                leave(f"argument {number}, {shown[:80]!r}, has bytes that are not UTF-8; give it as UTF-8 text")
        return super().parse_known_args(args, namespace)


def path(text: str) -> str:
    """A type of command-line paths: a leading ~ is the home folder, also where the shell leaves it, as in --a=~/b."""
    return os.path.expanduser(text)


def forgiving_output() -> None:
    """Have standard output and error replace the letters that their encoding lacks, and go on in silence when their
    reader has closed them."""
    for name, number in (("stdout", 1), ("stderr", 2)):
        stream = getattr(sys, name)
        if stream is not getattr(sys, f"__{name}__") or not isinstance(stream, io.TextIOWrapper):
            continue  # somebody else's, as in a notebook
        stream.flush()
        errors = "replace" if stream.errors in ("strict", "surrogateescape") else stream.errors
        buffered = io.BufferedWriter(_Pipe(number, "w", closefd=False))
        line_by_line = stream.line_buffering or number == 2
        setattr(sys, name, io.TextIOWrapper(buffered, stream.encoding, errors, line_buffering=line_by_line))


class _Pipe(io.FileIO):
    """A file that may be a pipe: what is written after its reader has gone is lost, and nothing else is."""

    def write(self, data: Any) -> int | None:
        try:
            return super().write(data)
        except BrokenPipeError:
            return memoryview(data).nbytes


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


def add_mesh(parser: argparse.ArgumentParser) -> None:
    """Give ``parser`` the option of the commands that ask documents: on one device, or on those of a mesh."""
    text = "split the model over all devices, e.g. fsdp=8 or tensor=4,fsdp=2 (default: it is on one device)"
    parser.add_argument("--mesh", type=_mesh, metavar="AXIS=N", help=text)


def _mesh(text: str) -> Mesh:
    """An argparse type: the axes of a mesh; those that are not named have one device."""
    axes = {"data": 1}
    for word in text.split(","):
        axis, _, size = word.partition("=")
        if axis not in Mesh.__dataclass_fields__ or not size.isdecimal() or int(size) < 1:
            raise argparse.ArgumentTypeError(
                f"{word!r} is not an axis ({', '.join(Mesh.__dataclass_fields__)}) and its number of devices, as fsdp=8"
            )
        axes[axis] = int(size)
    return Mesh(**axes)


def files(given: Sequence[str]) -> Iterator[str]:
    """The files of --context; of a folder all in it and below, by name, but those that begin with a dot."""
    for name in given:
        folder = Path(name)
        if name == "-" or not folder.is_dir():
            yield name
            continue
        below = sorted(path for path in folder.rglob("*") if path.is_file())
        found = [str(path) for path in below if not any(p.startswith(".") for p in path.relative_to(folder).parts)]
        if not found:
            raise ConfigError(f"--context={name} is a folder without files; give one that holds text files")
        yield from found


def read_text(path: str) -> str:
    """The text of a file of --context, or of standard input for "-". Raises ConfigError if it has none."""
    try:
        content = sys.stdin.buffer.read() if path == "-" else Path(path).read_bytes()
        text = content.decode("utf-8-sig")  # whatever the locale; a byte order mark is no text
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--context={path} cannot be read as UTF-8 text: {error}") from None
    if not text.strip():
        raise ConfigError(f"--context={path} is empty; give a file that holds text")
    return text


def add_ignore_config(parser: argparse.ArgumentParser) -> None:
    """Give ``parser`` the option of the commands that read a Hugging Face folder."""
    text = "attributes of the language model's config.json to read it without (model.ignore_config)"
    parser.add_argument("--ignore-config", action="append", default=[], metavar="KEY[,KEY]", help=text)


def ignore_config(given: argparse.Namespace) -> list[str]:
    """The override that ``--ignore-config`` stands for."""
    return [f"model.ignore_config={','.join(given.ignore_config)}"] if given.ignore_config else []
