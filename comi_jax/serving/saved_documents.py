"""Documents in a folder that several servers share, and the store in memory before it.

DIR/FINGERPRINT/NAME.comi: a document, written whole or not at all, checksummed, of one model and its settings
"""

import concurrent.futures
import dataclasses
import logging
import os
import re
from collections.abc import Callable, Generator
from pathlib import Path
from typing import TypeVar

import xxhash

from comi_jax.errors import ConfigError, UserError
from comi_jax.runs.checksums import DamageError
from comi_jax.serving import document_files
from comi_jax.serving.documents import Document
from comi_jax.serving.segments import Contents, DocumentError, Origin
from comi_jax.serving.store import SUFFIX, DocumentStore

NAME = re.compile(r"file-[0-9a-f]{32}")  # all that may become a part of a path
PAUSE = 0.005  # seconds of waiting for the disk between two looks at the answers beside it
T = TypeVar("T")


class MissingError(UserError):
    """A stored document that is gone."""


class SavedDocuments:
    """The saved documents of one model. Any number of processes may use the folder."""

    def __init__(self, folder: str | os.PathLike, origin: Origin):
        """Makes the folder. Raises ConfigError if nothing can be written to it."""
        about = dataclasses.asdict(origin)
        del about["model"]  # the path of its run, which may be another one on another machine
        self.origin = origin
        self.folder = Path(folder) / xxhash.xxh3_128(repr(sorted(about.items())).encode()).hexdigest()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            probe = self.folder / f"probe.{os.getpid()}.part"
            probe.write_bytes(b"")
            probe.unlink()
        except OSError as error:
            raise ConfigError(f"--documents={folder} cannot be written: {error.strerror or error}") from None

    def path(self, name: str, suffix: str = SUFFIX) -> Path:
        """The file of ``name``, which must be an id of a file."""
        if not NAME.fullmatch(name):
            raise MissingError("there is no such file")
        return self.folder / f"{name}{suffix}"

    def write(self, name: str, contents: Contents) -> None:
        """Save a document. Raises DocumentError if it cannot be written."""
        document_files.write(self.path(name), contents)

    def read(self, name: str) -> Contents:
        """The document, memory-mapped. Raises MissingError if it is not there or damaged."""
        path = self.path(name)
        if not path.exists():
            raise MissingError(f"the file {name} is gone")
        try:
            contents, _ = document_files.read(path)
            contents.origin.check(self.origin)
        except (DamageError, DocumentError) as error:
            logging.getLogger(__name__).error("%s", error)  # with its path, which is not for clients
            raise MissingError(f"the saved file {name} is damaged; upload it again") from None
        return contents


class Shelf:
    """The documents of a server: those in ``store``, and behind them those that are saved, if any are."""

    def __init__(self, store: DocumentStore, saved: SavedDocuments | None, adopt: Callable[[Contents], Document]):
        self.store, self._saved, self._adopt = store, saved, adopt
        self._reader = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="documents")

    def put(self, name: str, document: Document) -> None:
        """Add ``document``. Raises DocumentError if there is no room."""
        self._with_room(name, lambda: self.store.put(name, document))

    def take(self, name: str) -> Generator[None, None, Document]:
        """The document ``name``, on the device, as a generator that returns it: one that is read from the folder stops
        nothing else. Raises MissingError if there is none."""
        if name not in self.store:
            if self._saved is None:
                raise MissingError(f"the file {name} is gone")
            reading = self._reader.submit(self._saved.read, name)
            while not concurrent.futures.wait([reading], PAUSE).done:
                yield
            self.put(name, self._adopt(reading.result()))
        return self._with_room(name, lambda: self.store.get(name))

    def _with_room(self, name: str, do: Callable[[], T]) -> T:
        """``do()``; what is saved is dropped from memory, the least recently used first, until there is room for it."""
        while True:
            try:
                return do()
            except DocumentError:
                others = [other for other in self.store.names() if other != name]
                if self._saved is None or not others:
                    raise
                self.store.drop(others[0])
