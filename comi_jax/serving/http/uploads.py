"""Uploaded files: who owns them, and what is said of them. Their documents are in the store, under the same id."""

import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from comi_jax.serving.http.errors import RETRY_FULL, ApiError

PURPOSES = ("user_data", "assistants")
LONGEST = 30 * 86_400  # seconds that a file may be asked to last


@dataclass(frozen=True)
class Upload:
    """An uploaded file. Times are in seconds of the epoch."""

    id: str
    owner: str
    filename: str
    purpose: str
    bytes: int
    created: float
    expires: float | None
    tokens: int
    nbytes: int  # of its document

    def described(self) -> dict[str, Any]:
        """As OpenAI's API describes a file."""
        about = {
            "id": self.id, "object": "file", "bytes": self.bytes, "created_at": int(self.created),
            "filename": self.filename, "purpose": self.purpose, "status": "processed",
            "comi": {"tokens": self.tokens, "nbytes": self.nbytes},
        }  # fmt: skip
        return about if self.expires is None else about | {"expires_at": int(self.expires)}


@runtime_checkable
class Files(Protocol):
    """Where the files are."""

    def get(self, name: str) -> Upload | None:
        """The file ``name``; None if there is none."""
        ...

    def content(self, name: str) -> bytes:
        """The bytes of the file ``name``, as they were uploaded."""
        ...

    def add(self, upload: Upload, content: bytes) -> None:
        """Add a file."""
        ...

    def remove(self, name: str) -> None:
        """Remove the file ``name``, if there is one."""
        ...

    def all(self) -> list[Upload]:
        """All files, the oldest first."""
        ...


class MemoryFiles:
    """Files that end with the process."""

    def __init__(self):
        self._files: dict[str, tuple[Upload, bytes]] = {}

    def get(self, name: str) -> Upload | None:
        return self._files[name][0] if name in self._files else None

    def content(self, name: str) -> bytes:
        return self._files[name][1]

    def add(self, upload: Upload, content: bytes) -> None:
        self._files[upload.id] = upload, content

    def remove(self, name: str) -> None:
        self._files.pop(name, None)

    def all(self) -> list[Upload]:
        return [upload for upload, _ in self._files.values()]


class Uploads:
    """The files of all keys. Used by the event loop's thread alone, but for ``add`` and ``content``."""

    def __init__(
        self,
        files: Files,
        most: int,
        most_bytes: int,
        drop: Callable[[str], None],
        now: Callable[[], float] = time.time,
    ):
        """``drop`` removes the document of a file, which is deleted or has expired. ``most_bytes``: of all contents."""
        self._files, self._most, self._most_bytes, self._drop, self._now = files, most, most_bytes, drop, now

    def new_id(self, size: int) -> str:
        """An id that nobody can guess, for a file of ``size`` bytes. Raises ApiError if there are as many files as may
        be."""
        self.purge()
        there = self._files.all()
        if len(there) >= self._most:
            raise ApiError(
                429, f"the server has {self._most} files, as many as may be; delete some", code="too_many_files",
                headers={"Retry-After": str(RETRY_FULL)},
            )  # fmt: skip
        if sum(upload.bytes for upload in there) + size > self._most_bytes:
            raise ApiError(
                429, "the texts of all files are as large as may be; delete some", code="store_full",
                headers={"Retry-After": str(RETRY_FULL)},
            )  # fmt: skip
        return f"file-{secrets.token_hex(16)}"

    def add(self, upload: Upload, content: bytes) -> None:
        """Add a file whose document is stored."""
        self._files.add(upload, content)

    def get(self, owner: str, name: str, param: str | None = None) -> Upload:
        """The file ``name`` of ``owner``. Raises ApiError, 404, for another's as for none."""
        found = self._files.get(name)
        if found is None:
            self._drop(name)  # where another server has removed it
        elif self._late(found):
            self._remove(name)
        elif found.owner == owner:
            return found
        raise ApiError(404, "there is no such file", param=param, code="file_not_found")

    def content(self, owner: str, name: str) -> bytes:
        """The bytes of the file ``name`` of ``owner``, as they were uploaded."""
        self.get(owner, name)
        return self._files.content(name)

    def of(self, owner: str) -> list[Upload]:
        """All files of ``owner``, the newest first."""
        self.purge()
        return [upload for upload in reversed(self._files.all()) if upload.owner == owner]

    def delete(self, owner: str, name: str) -> None:
        """Remove a file and its document. A question that is being answered goes on."""
        self.get(owner, name)
        self._remove(name)

    def purge(self) -> int:
        """Remove the files that have expired. Returns how many there were."""
        late = [upload.id for upload in self._files.all() if self._late(upload)]
        for name in late:
            self._remove(name)
        return len(late)

    def _late(self, upload: Upload) -> bool:
        return upload.expires is not None and upload.expires <= self._now()

    def _remove(self, name: str) -> None:
        self._files.remove(name)
        self._drop(name)
