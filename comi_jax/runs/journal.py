"""JSON Lines that a run writes as it goes: a process may die within a line, so what counts is what stands before."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def rows(path: Path) -> list[dict[str, Any]]:
    """The objects in the file at ``path``, up to the first line that is torn or is none; none if there is no file."""
    return [row for row, _ in _whole(path)]


def keep_until(path: Path, step: int) -> None:
    """Cut the file at ``path`` after its last whole line of ``step`` or before; what an earlier attempt wrote after its
    checkpoint is run again."""
    if path.is_file():
        kept = 0
        for row, size in _whole(path):
            if row["step"] > step:
                break
            kept += size
        os.truncate(path, kept)


def _whole(path: Path) -> Iterator[tuple[dict[str, Any], int]]:
    """The objects of whole lines, and the bytes of each."""
    for line in path.read_bytes().splitlines(keepends=True) if path.is_file() else ():
        try:
            row = json.loads(line)
        except ValueError:
            return
        if not line.endswith(b"\n") or not isinstance(row, dict):
            return
        yield row, len(line)
