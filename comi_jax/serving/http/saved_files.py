"""Uploaded files in the folder of saved documents, where several servers find them.

    NAME.comi: the document;   NAME.txt: the text as it was uploaded;   NAME.json: whose it is, and until when

The last one is written last and removed first: a file is there when it is.
"""

import contextlib
import dataclasses
import json
import logging
import os
import threading
import time
from pathlib import Path

import xxhash

from comi_jax.serving.http.errors import RETRY_FULL, ApiError
from comi_jax.serving.http.uploads import Upload
from comi_jax.serving.saved_documents import NAME, MissingError, SavedDocuments

ABOUT, TEXT = ".json", ".txt"
LEFT = 3600.0  # seconds after which what has no ABOUT is of an upload that has failed
LOG = logging.getLogger(__name__)


class SavedFiles:
    """The files of all servers with this folder and model."""

    def __init__(self, saved: SavedDocuments):
        self._saved = saved
        self._known: dict[str, Upload] = {}  # as read; a file never changes
        self._sweep()

    def get(self, name: str) -> Upload | None:
        if not NAME.fullmatch(name):
            return None
        path = self._saved.path(name, ABOUT)
        if not path.exists():
            self._known.pop(name, None)
            return None
        if name not in self._known:
            try:
                self._known[name] = Upload(**json.loads(path.read_bytes())["upload"])
            except (OSError, ValueError, KeyError, TypeError) as error:
                LOG.error("%s cannot be read: %s", path, error)
                return None
        return self._known[name]

    def content(self, name: str) -> bytes:
        try:
            about = json.loads(self._saved.path(name, ABOUT).read_bytes())
            content = self._saved.path(name, TEXT).read_bytes()
        except (OSError, ValueError):
            raise MissingError(f"the file {name} is gone") from None
        if xxhash.xxh3_128(content).hexdigest() != about["text"]:
            LOG.error("%s is damaged", self._saved.path(name, TEXT))
            raise MissingError(f"the saved file {name} is damaged; upload it again")
        return content

    def add(self, upload: Upload, content: bytes) -> None:
        about = {"upload": dataclasses.asdict(upload), "text": xxhash.xxh3_128(content).hexdigest()}
        try:
            _write(self._saved.path(upload.id, TEXT), content)
            _write(self._saved.path(upload.id, ABOUT), json.dumps(about).encode())
        except OSError as error:
            self.remove(upload.id)
            raise unwritable(error) from None

    def remove(self, name: str) -> None:
        self._known.pop(name, None)
        if NAME.fullmatch(name):
            for path in (self._saved.path(name, ABOUT), self._saved.path(name, TEXT), self._saved.path(name)):
                with contextlib.suppress(OSError):
                    path.unlink(missing_ok=True)

    def all(self) -> list[Upload]:
        names = (path.stem for path in self._saved.folder.glob(f"file-*{ABOUT}"))
        found = (self.get(name) for name in names)
        return sorted((upload for upload in found if upload), key=lambda upload: upload.created)

    def _sweep(self) -> None:
        """Remove what uploads have left that were cut off."""
        for path in self._saved.folder.iterdir():
            whole = NAME.fullmatch(path.stem) and path.with_suffix(ABOUT).exists()
            with contextlib.suppress(OSError):
                if not whole and path.stat().st_mtime < time.time() - LEFT:
                    path.unlink()


def unwritable(error: Exception) -> ApiError:
    """The response where the folder cannot be written; the log has the reason."""
    LOG.error("the folder of saved documents cannot be written: %s", error)
    return ApiError(
        503, "the server cannot save the file; ask again later", code="storage_failed",
        headers={"Retry-After": str(RETRY_FULL)},
    )  # fmt: skip


def _write(path: Path, content: bytes) -> None:
    """Write ``path``, whole or not at all."""
    draft = path.with_name(f"{path.name}.{os.getpid()}.{threading.get_ident()}.part")
    try:
        with draft.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)
