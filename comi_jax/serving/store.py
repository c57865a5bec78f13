"""A store of documents within bounds: the least recently used go from the device to host memory, from there to disk,
and come back when they are asked."""

import contextlib
import logging
import os
import threading
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from comi_jax.errors import ConfigError
from comi_jax.runs.checksums import DamageError
from comi_jax.serving import document_files
from comi_jax.serving.documents import Document
from comi_jax.serving.segments import Contents, DocumentError

DEVICE, HOST, DISK = PLACES = ("device", "host", "disk")
SUFFIX = ".comi"


@dataclass
class Entry:
    """A document of a store, and where its arrays are."""

    document: Document
    place: str
    file: Path | None = None  # on disk, written when it first went there; None if there is none or it has changed
    checksum: str = ""  # of the file


class DocumentStore:
    """Documents by name. Those on the device never take more than ``budget_bytes``, those in host memory never more
    than ``host_bytes``; the others are in files in ``folder``, memory-mapped. A document is the same wherever it is. It
    can be asked through any reference to it, but only ``get`` marks it as used and brings it to the device. A question
    that is being answered holds on to the arrays that it began with, which are not counted.

    What cannot be done raises a UserError and changes nothing. All methods may be called from several threads."""

    def __init__(
        self,
        budget_bytes: int,
        host_bytes: int = 0,
        folder: str | os.PathLike | None = None,
        say: Callable[[str], None] | None = None,
    ):
        """``folder`` (None: nothing goes to disk) is created, and files of an earlier store in it are left alone.
        ``say`` is told what moves where (None: logged)."""
        if budget_bytes < 1 or host_bytes < 0:
            raise ConfigError(
                f"the store's budget_bytes is {budget_bytes} and its host_bytes {host_bytes}; give at least 1 and 0"
            )
        self.budget = {DEVICE: budget_bytes, HOST: host_bytes}
        self.folder = None if folder is None else Path(os.path.expanduser(folder))
        self._say = say or logging.getLogger(__name__).info
        self._entries: dict[str, Entry] = {}  # the least recently used first
        self._lock = threading.RLock()

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, name: str) -> bool:
        return name in self._entries

    def names(self) -> list[str]:
        """The names of all documents, the least recently used first."""
        return list(self._entries)

    def place(self, name: str) -> str:
        """Where the document ``name`` is: "device", "host" or "disk"."""
        return self._entry(name).place

    def used(self, place: str) -> int:
        """The bytes of all documents in ``place``."""
        with self._lock:
            return sum(entry.document.nbytes for entry in self._entries.values() if entry.place == place)

    def put(self, name: str, document: Document) -> None:
        """Add ``document`` as ``name``, on the device. Raises DocumentError if the name is taken, if the document is in
        a store already, or if there is no room for it."""
        with self._lock:
            if name in self._entries:
                raise DocumentError(f"the store has a document {name!r} already; drop it first")
            if document.admit is not None:
                raise DocumentError(f"the document for {name!r} is in a store already, under another name")
            self._make_room(name, document.nbytes)
            document.to_device()
            document.admit = lambda size: self._growth(name, size)
            self._entries[name] = Entry(document, DEVICE)

    def get(self, name: str) -> Document:
        """The document ``name``, on the device, as the most recently used. Raises DamageError if its file on disk has
        changed, and DocumentError if there is none of this name or other documents cannot make room."""
        with self._lock:
            entry = self._entry(name)
            if entry.place != DEVICE:
                self._check_file(name, entry)
                self._make_room(name, entry.document.nbytes)
                entry.document.to_device()
                before, entry.place = entry.place, DEVICE
                self._say(f"document {name!r}: from {before} to device, {entry.document.nbytes:,} bytes")
            self._entries[name] = self._entries.pop(name)
            return entry.document

    def drop(self, name: str) -> None:
        """Forget the document ``name`` and remove its file. References to it can still be asked."""
        with self._lock:
            entry = self._entry(name)
            if entry.place == DISK:
                entry.document.to_host()
            self._remove_file(entry)
            entry.document.admit = None
            del self._entries[name]

    def _entry(self, name: str) -> Entry:
        if name not in self._entries:
            raise DocumentError(f"the store has no document {name!r}")
        return self._entries[name]

    @contextlib.contextmanager
    def _growth(self, name: str, size: int) -> Iterator[None]:
        """Room for ``size`` more bytes of the document ``name`` on the device, while they are added."""
        with self._lock:
            document = self.get(name)
            self._make_room(name, document.nbytes + size, document.nbytes)
            yield
            entry = self._entries[name]
            self._remove_file(entry)  # it lacks what was added

    def _make_room(self, name: str, size: int, own: int = 0) -> None:
        """Move other documents so that ``name`` fits the device with ``size`` bytes, of which it has ``own`` there: all
        files are written first, so that a full disk changes nothing."""
        limit = self.budget[DEVICE]
        if size > limit:
            raise DocumentError(
                f"the document {name!r} has {size:,} bytes, more than the store's budget_bytes, {limit:,}; raise it, "
                'or encode with dtype="int8" or keep_kv=False'
            )
        moves = self._moves(name, size - own)
        on_disk = self._written([other for other, place in moves.items() if place == DISK])
        # From host to disk before from device to host, so that host memory is within its bounds at every moment.
        for other, place in sorted(moves.items(), key=lambda move: PLACES.index(move[1]), reverse=True):
            entry = self._entries[other]
            before, entry.place = entry.place, place
            if place == HOST:
                entry.document.to_host()
            else:
                entry.document.contents = on_disk[other]
            self._say(f"document {other!r}: from {before} to {place}, {entry.document.nbytes:,} bytes")

    def _moves(self, name: str, size: int) -> dict[str, str]:
        """Where documents other than ``name`` go, the least recently used first, so that ``size`` bytes fit the
        device."""
        place = {other: entry.place for other, entry in self._entries.items()}
        bytes_of = {other: entry.document.nbytes for other, entry in self._entries.items()}

        def over(where: str, more: int) -> bool:
            return sum(bytes_of[o] for o in place if place[o] == where) + more > self.budget[where]

        for other in self._entries:
            if not over(DEVICE, size):
                break
            if place[other] == DEVICE and other != name:
                place[other] = HOST if bytes_of[other] <= self.budget[HOST] else DISK
        for other in self._entries:
            if not over(HOST, 0):
                break
            if place[other] == HOST and other != name:
                place[other] = DISK
        moves = {other: where for other, where in place.items() if where != self._entries[other].place}
        if self.folder is None and DISK in moves.values():
            raise DocumentError(
                f"there is no room for the document {name!r}: the store's device and host memory are full; drop a "
                "document, raise host_bytes, or give the store a folder"
            )
        return moves

    def _written(self, names: list[str]) -> dict[str, Contents]:
        """The documents ``names``, as memory-mapped files of them that are whole. Writes the files that there are not;
        if one cannot be written, those written before it are removed."""
        contents: dict[str, Contents] = {}
        begun: list[Entry] = []
        for name in names:
            entry = self._entries[name]
            try:
                if (read := self._intact(entry)) is None:
                    begun.append(entry)
                    self._write(entry)
                    read = self._intact(entry)
                if read is None:
                    raise DocumentError(f"{entry.file}, read back, differs from what was written")
                contents[name] = read
            except (OSError, DocumentError) as error:
                for entry in begun:
                    self._remove_file(entry)
                raise DocumentError(
                    f"the document {name!r} cannot make room for another one, as it cannot be written to disk: {error}"
                ) from None
        return contents

    def _write(self, entry: Entry) -> None:
        self._remove_file(entry)
        if self.folder is None:
            raise DocumentError("the store has no folder")
        self.folder.mkdir(parents=True, exist_ok=True)
        file = self.folder / f"{uuid.uuid4().hex}{SUFFIX}"  # a document's name may hold any character
        entry.checksum = entry.document.save(file)
        entry.file = file

    def _intact(self, entry: Entry) -> Contents | None:
        """The contents of a document's file; None if there is none or it is not as it was written."""
        if entry.file is None:
            return None
        try:
            contents, checksum = document_files.read(entry.file)
        except (DamageError, DocumentError):
            return None
        return contents if checksum == entry.checksum else None

    def _check_file(self, name: str, entry: Entry) -> None:
        """Read the file of a document on disk again, as it may have changed since."""
        if entry.place != DISK or entry.file is None:
            return
        try:
            contents, checksum = document_files.read(entry.file)
        except (DamageError, DocumentError) as error:
            raise DamageError(f"the document {name!r} cannot come back from disk: {error}") from None
        if checksum != entry.checksum:
            raise DamageError(f"the document {name!r} cannot come back from disk: {entry.file} is another document")
        entry.document.contents = contents

    def _remove_file(self, entry: Entry) -> None:
        if entry.file is not None:
            with contextlib.suppress(OSError):
                entry.file.unlink()
        entry.file, entry.checksum = None, ""
