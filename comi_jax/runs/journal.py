"""JSON Lines that a run appends to: a torn last line, left by a killed process, is ignored."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def rows(path: Path) -> list[dict[str, Any]]:
    """The objects in the file at ``path``, up to the first torn or invalid line; empty if there is no file."""
    return [row for row, _ in _whole(path)]


def keep_until(path: Path, step: int) -> None:
    """Truncate the file at ``path`` after its last whole line up to ``step``, as later steps will be run again."""
    if path.is_file():
        kept = 0
        for row, size in _whole(path):
            if row["step"] > step:
                break
            kept += size
        os.truncate(path, kept)


def _whole(path: Path) -> Iterator[tuple[dict[str, Any], int]]:
    """The objects of the whole lines, with the size of each in bytes."""
    for line in path.read_bytes().splitlines(keepends=True) if path.is_file() else ():
        try:
            row = json.loads(line)
        except ValueError:
            return
        if not line.endswith(b"\n") or not isinstance(row, dict):
            return
        yield row, len(line)
