"""Folders of arrays, written by Orbax and sealed with checksums before they are renamed into place."""

import contextlib
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from comi_jax.devices import distributed
from comi_jax.runs import checksums
from comi_jax.runs.checksums import CheckpointError, DamageError
from comi_jax.runs.readback import VerifyingHandler

WRITING = ".orbax-checkpoint-tmp"  # Orbax's suffix for a folder that is not complete
Say = Callable[[str], None]
OPEN = Path("/proc/self/fd")
# Characters that Orbax reads as a glob pattern or a bucket's URL, and TensorStore as a separator or as invalid text.
ODD = re.compile(r"[*?\[\]\\]|:/|[\ud800-\udfff]")


@contextlib.contextmanager
def plain(path: Path) -> Iterator[Path]:
    """``path`` in a form that Orbax and TensorStore take literally. If a folder above has characters that are special
    to them, that is a path through the parent's file descriptor, /proc/self/fd/N. The last component of ``path`` must
    have no such characters.

    Raises CheckpointError for special characters on a system without /proc/self/fd."""
    path = path.absolute()
    if not ODD.search(str(path)):
        yield path
        return
    number = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        if not (OPEN / str(number)).is_dir():
            raise CheckpointError(
                f"{path.parent} has one of * ? [ ] \\ in its path, with which arrays cannot be written on this system; "
                "choose another folder"
            )
        yield OPEN / str(number) / path.name
    finally:
        os.close(number)


@contextlib.contextmanager
def reading(path: Path, advice: str = "") -> Iterator[None]:
    """Turn Orbax's errors for a damaged folder, which may be a bare Exception, into a DamageError that names ``path``.

    A CheckpointError passes unchanged, and so does an error that a lost peer process may have caused."""
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:
        if distributed.of_all(error):
            raise
        reason = str(error).split("\n")[0][:200]
        raise DamageError(f"{path} cannot be read, files are damaged or missing ({reason}){advice}") from error


@contextlib.contextmanager
def intact(path: Path) -> Iterator[None]:
    """Turn a DamageError into a plain CheckpointError: the files at ``path`` are known to be as they were written."""
    try:
        yield
    except DamageError as error:
        reason = str(error.__cause__ or error).split("\n")[0][:200]
        raise CheckpointError(f"{path} is as it was written, but cannot be restored here: {reason}") from error


def frugal(arrays: Mapping[str, jax.Array]) -> VerifyingHandler:
    """A writer that handles about one array at a time, uncompressed: a model that fills the memory leaves no room for a
    second copy. Compression makes such a copy, takes three times as long and gains little on weights."""
    largest = max((array.nbytes for array in arrays.values()), default=0)
    return VerifyingHandler(save_concurrent_gb=largest // 10**9 + 1, use_compression=False)


class SealedWriter:
    """Orbax's asynchronous writer, which seals the folder before the rename into place."""

    def __init__(self, handler: Any):
        self._temporary, self._path = Path(), contextlib.ExitStack()
        # Silence Orbax's log. It repeats the traceback of each error that it raises, which the waiting caller reports,
        # and warns of incomplete saves, which ``readback`` detects and fails.
        logging.getLogger("absl").setLevel(logging.CRITICAL)
        # Orbax calls this when all files are complete, immediately before the rename.
        options = ocp.options.AsyncOptions(post_finalization_callback=lambda: checksums.seal(self._temporary))
        self._writer = ocp.AsyncCheckpointer(handler, async_options=options)

    def save(self, folder: Path, arguments: Any) -> None:
        """Start writing the new ``folder``; its arrays may be donated once this returns."""
        folder = folder.absolute()
        self._temporary = folder.with_name(folder.name + WRITING)
        path = self._path.enter_context(plain(folder))
        self._writer.save(path, args=arguments, custom_metadata=dict(checksums.SEAL))

    def wait(self) -> None:
        """Wait until the folder is complete. Raises the error of a failed save."""
        with self._path:
            self._writer.wait_until_finished()

    def close(self) -> None:
        with self._path:
            self._writer.close()


def write_once(folder: Path, handler: Any, arguments: Any) -> None:
    """Write the new ``folder`` and wait until it is complete. Raises CheckpointError."""
    try:
        with contextlib.closing(SealedWriter(handler)) as writer:
            writer.save(folder, arguments)
            writer.wait()
    except Exception as error:  # TensorStore raises ValueError
        if distributed.of_all(error):
            raise
        free = shutil.disk_usage(folder.parent).free
        raise CheckpointError(f"{folder} cannot be written: {reason_of(error)} ({free:,} bytes free there)") from error


def reason_of(error: Exception) -> str:
    """The operating system's message if ``error`` has one, else the error's first line, at most 200 characters."""
    code = re.search(r"os_error_code='(\d+)'", str(error))  # the format of TensorStore, which writes for Orbax
    if code:
        return os.strerror(int(code[1]))
    return getattr(error, "strerror", None) or (str(error).strip() or repr(error)).split("\n")[0][:200]


def restore_arrays(folder: Path, like: Any) -> Any:
    """The arrays of ``folder`` with the shapes, dtypes and shardings of ``like``."""
    with ocp.StandardCheckpointer() as reader, reading(folder):
        with plain(folder) as path:
            return reader.restore(path, like)


def stored(folder: Path) -> Any:
    """Orbax's metadata of the arrays in ``folder``: a tree of shapes and dtypes."""
    with reading(folder), plain(folder) as path:
        # Orbax annotates this parameter as etils' Path.
        return ocp.StandardCheckpointHandler().metadata(path).tree  # pyright: ignore[reportArgumentType]


def read_json(folder: Path) -> Any:
    with ocp.Checkpointer(ocp.JsonCheckpointHandler()) as reader, reading(folder):
        with plain(folder) as path:
            return reader.restore(path)
