"""Documents: texts that are encoded once and asked many times."""

import contextlib
import dataclasses
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from comi_jax.serving import document_files
from comi_jax.serving.segments import Contents, DocumentError, Origin, Segment

# The segments of a text behind so many characters and so many tokens, in host memory, and whether it was truncated.
Encode = Callable[[str, int, int], tuple[list[Segment], bool]]
Admit = Callable[[int], contextlib.AbstractContextManager]  # room for so many more bytes


class Document:
    """An encoded text. ``Comi.encode`` makes it, ``Comi.answer`` and ``Comi.compress`` ask it."""

    def __init__(self, contents: Contents, encode: Encode | None = None, mesh: Mesh | None = None):
        """``encode``: how text is appended; None: it cannot be. ``mesh``: the devices of the model that asks it, which
        share its tokens; None: one device."""
        self.contents, self._encode, self._mesh = contents, encode, mesh
        self.admit: Admit | None = None  # of the store that holds it
        self._lock = threading.RLock()

    @property
    def origin(self) -> Origin:
        """What encoded it."""
        return self.contents.origin

    @property
    def segments(self) -> tuple[Segment, ...]:
        """Its segments, in order."""
        return self.contents.segments

    @property
    def tokens(self) -> int:
        """The number of its tokens."""
        return sum(segment.tokens for segment in self.segments)

    @property
    def nbytes(self) -> int:
        """The bytes of states, keys, values and norms, padding included; token ids take 12 more per token."""
        return sum(segment.nbytes for segment in self.segments)

    @property
    def on_device(self) -> bool:
        """Whether all its arrays are on a device."""
        return all(segment.on_device for segment in self.segments)

    def append(self, text: str) -> None:
        """Encode ``text`` as one or more new segments behind the others, which stay as they are: the last one is not
        filled up. A question that is being answered goes on with the segments that it began with.

        Raises DocumentError for a document that was loaded without its model, and LengthError as ``Comi.encode``."""
        if self._encode is None:
            raise DocumentError("the document was loaded without a model; load it with Document.load(path, comi)")
        with self._lock:
            segments, truncated = self._encode(text, self.contents.characters, self.tokens)
            with self.admit(sum(segment.nbytes for segment in segments)) if self.admit else contextlib.nullcontext():
                if self.on_device:
                    segments = [segment.to_device(self._mesh) for segment in segments]
                before = self.contents
                self.contents = Contents(
                    before.origin,
                    (*before.segments, *segments),
                    before.characters + len(text),
                    before.truncated or truncated,
                )

    def to_device(self) -> "Document":
        """Move its arrays to the device, or to the devices of its model. Returns the document."""
        segments = tuple(segment.to_device(self._mesh) for segment in self.segments)
        self.contents = dataclasses.replace(self.contents, segments=segments)
        return self

    def to_host(self) -> "Document":
        """Move its arrays to host memory, from where each segment is copied to the device while it is asked. Returns
        the document."""
        segments = tuple(segment.to_host() for segment in self.segments)
        self.contents = dataclasses.replace(self.contents, segments=segments)
        return self

    def save(self, path: str | os.PathLike) -> str:
        """Write the document as the file ``path``, whole or not at all. Returns the file's checksum. Raises
        DocumentError if it cannot be written."""
        return document_files.write(Path(os.path.expanduser(path)), self.contents)

    @classmethod
    def load(cls, path: str | os.PathLike, comi: Any = None) -> "Document":
        """The document in the file ``path``, verified and memory-mapped: its arrays are read from disk when it is
        asked, or by ``to_device``. With ``comi``, the model that encoded it, text can be appended.

        Raises DamageError if the file is truncated or differs from what was written, and DocumentError if it is none or
        if another model than ``comi`` wrote it."""
        contents, _ = document_files.read(Path(os.path.expanduser(path)))
        if comi is None:
            return cls(contents)
        contents.origin.check(comi.origin)
        return comi.adopt(contents)
