"""Short names for records: the same whichever files, compression or schema they came in, and whatever reads them."""

import hashlib
import json
from collections.abc import Iterable

from comi_jax.data.records import Record


class Fingerprint:
    """The fingerprint of records in their order."""

    def __init__(self):
        self._hash = hashlib.sha256()

    def add(self, record: Record) -> None:
        parts = [*record.context, "", record.prompt, *record.answers]  # no document is empty
        self._hash.update(json.dumps([len(part) for part in parts]).encode() + "".join(parts).encode())

    def __str__(self) -> str:
        return self._hash.hexdigest()[:16]


def fingerprint_of(records: Iterable[Record]) -> str:
    """The fingerprint of ``records`` in their order."""
    whole = Fingerprint()
    for record in records:
        whole.add(record)
    return str(whole)


def question_key(record: Record) -> str:
    """The fingerprint of what ``record`` asks about which context, whatever its answers."""
    return fingerprint_of([Record(record.context, record.prompt, ())])
