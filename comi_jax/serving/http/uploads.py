"""Uploaded files: who owns them, and what is said of them. Their documents are in the store, under the same id."""

import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from comi_jax.serving.http.errors import ApiError

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


class Uploads:
    """The files of all keys. Used by the event loop's thread alone."""

    def __init__(self, most: int, drop: Callable[[str], None], now: Callable[[], float] = time.time):
        """``drop`` removes the document of a file, which is deleted or has expired."""
        self._most, self._drop, self._now = most, drop, now
        self._files: dict[str, Upload] = {}

    def new_id(self) -> str:
        """An id that nobody can guess. Raises ApiError if there are as many files as may be."""
        self.purge()
        if len(self._files) >= self._most:
            raise ApiError(
                429, f"the server has {self._most} files, as many as may be; delete some", code="too_many_files",
                headers={"Retry-After": "60"},
            )  # fmt: skip
        return f"file-{secrets.token_hex(16)}"

    def add(self, upload: Upload) -> None:
        """Add a file whose document is stored."""
        self._files[upload.id] = upload

    def get(self, owner: str, name: str, param: str | None = None) -> Upload:
        """The file ``name`` of ``owner``. Raises ApiError, 404, for another's as for none."""
        self.purge()
        found = self._files.get(name)
        if found is None or found.owner != owner:
            raise ApiError(404, "there is no such file", param=param, code="file_not_found")
        return found

    def of(self, owner: str) -> list[Upload]:
        """All files of ``owner``, the newest first."""
        self.purge()
        return [upload for upload in reversed(self._files.values()) if upload.owner == owner]

    def delete(self, owner: str, name: str) -> None:
        """Remove a file and its document. A question that is being answered goes on."""
        self.get(owner, name)
        del self._files[name]
        self._drop(name)

    def purge(self) -> int:
        """Remove the files that have expired. Returns how many there were."""
        now = self._now()
        late = [upload.id for upload in self._files.values() if upload.expires is not None and upload.expires <= now]
        for name in late:
            del self._files[name]
            self._drop(name)
        return len(late)
