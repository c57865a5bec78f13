"""Arrays as folders, written by Orbax and sealed with checksums before they are renamed into place."""

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

WRITING = ".orbax-checkpoint-tmp"  # as Orbax names what is not complete
Say = Callable[[str], None]
# What Orbax takes for a pattern or the address of a bucket, and TensorStore for a separator or for no text at all.
OPEN = Path("/proc/self/fd")
ODD = re.compile(r"[*?\[\]\\]|:/|[\ud800-\udfff]")


@contextlib.contextmanager
def plain(path: Path) -> Iterator[Path]:
    """``path``, whose own name is plain, as one that Orbax and TensorStore take as it is: where a folder above it has
    characters that mean something to them, by the number under which that folder is opened here.

    Raises CheckpointError on a system without such numbers."""
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
    """Turn what Orbax raises for a damaged folder, which may be a bare Exception, into a CheckpointError."""
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
    """What fails in here is no damage: the files at ``path`` are those that were written."""
    try:
        yield
    except DamageError as error:
        reason = str(error.__cause__ or error).split("\n")[0][:200]
        raise CheckpointError(f"{path} is as it was written, but cannot be restored here: {reason}") from error


def frugal(arrays: Mapping[str, jax.Array]) -> VerifyingHandler:
    """Writes about an array at a time, and as it is: a model that fills the memory has no room for a copy of itself.
    Compression, which gains little on weights, makes one and takes three times as long."""
    largest = max((array.nbytes for array in arrays.values()), default=0)
    return VerifyingHandler(save_concurrent_gb=largest // 10**9 + 1, use_compression=False)


class SealedWriter:
    """Orbax's asynchronous writer; what it has written is sealed before it is renamed into place."""

    def __init__(self, handler: Any):
        self._temporary, self._path = Path(), contextlib.ExitStack()
        # Orbax logs the traceback of what it raises, too, which is told by whoever waits; its warnings that a save is
        # incomplete are of no more use than the comparison of ``readback``, which ends the save.
        logging.getLogger("absl").setLevel(logging.CRITICAL)
        # Orbax calls this when all files are complete, just before the rename.
        options = ocp.options.AsyncOptions(post_finalization_callback=lambda: checksums.seal(self._temporary))
        self._writer = ocp.AsyncCheckpointer(handler, async_options=options)

    def save(self, folder: Path, arguments: Any) -> None:
        """Start writing the new ``folder``; its arrays may be donated once this returns."""
        folder = folder.absolute()
        self._temporary = folder.with_name(folder.name + WRITING)
        path = self._path.enter_context(plain(folder))
        self._writer.save(path, args=arguments, custom_metadata=dict(checksums.SEAL))

    def wait(self) -> None:
        """Until the folder is complete. Raises what went wrong."""
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
    except Exception as error:  # TensorStore's are ValueErrors
        if distributed.of_all(error):
            raise
        free = shutil.disk_usage(folder.parent).free
        raise CheckpointError(f"{folder} cannot be written: {reason_of(error)} ({free:,} bytes free there)") from error


def reason_of(error: Exception) -> str:
    """What the system said, if it is the system that refused."""
    code = re.search(r"os_error_code='(\d+)'", str(error))  # as TensorStore, which writes for Orbax, puts it
    if code:
        return os.strerror(int(code[1]))
    return getattr(error, "strerror", None) or (str(error).strip() or repr(error)).split("\n")[0][:200]


def restore_arrays(folder: Path, like: Any) -> Any:
    """The arrays of ``folder`` with the shapes, dtypes and places of ``like``."""
    with ocp.StandardCheckpointer() as reader, reading(folder):
        with plain(folder) as path:
            return reader.restore(path, like)


def stored(folder: Path) -> Any:
    """What ``folder`` holds, with shapes and dtypes."""
    with reading(folder), plain(folder) as path:
        # Its annotation asks for the Path of etils.
        return ocp.StandardCheckpointHandler().metadata(path).tree  # pyright: ignore[reportArgumentType]


def read_json(folder: Path) -> Any:
    with ocp.Checkpointer(ocp.JsonCheckpointHandler()) as reader, reading(folder):
        with plain(folder) as path:
            return reader.restore(path)
