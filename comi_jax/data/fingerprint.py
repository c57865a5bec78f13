"""Fingerprints of records, independent of the files, compression, schema and reader."""

import hashlib
import json
from collections.abc import Iterable

from comi_jax.data.records import Record


class Fingerprint:
    """The fingerprint of records in order, computed incrementally."""

    def __init__(self):
        self._hash = hashlib.sha256()

    def add(self, record: Record) -> None:
        parts = [*record.context, "", record.prompt, *record.answers]  # documents are never empty, so "" ends them
        self._hash.update(json.dumps([len(part) for part in parts]).encode() + "".join(parts).encode())

    def __str__(self) -> str:
        return self._hash.hexdigest()[:16]


def fingerprint_of(records: Iterable[Record]) -> str:
    """The fingerprint of ``records`` in order."""
    whole = Fingerprint()
    for record in records:
        whole.add(record)
    return str(whole)


def question_key(record: Record) -> str:
    """The fingerprint of the context and question of ``record``, without its answers."""
    return fingerprint_of([Record(record.context, record.prompt, ())])
