"""Rows of Parquet and CSV files as the objects that lines of JSON are: read exactly, nothing guessed from a cell."""

import csv
import io
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from comi_jax.data.packing import Unreadable
from comi_jax.data.values import Refused, decode, quote

_DELIMITERS = {".csv": ",", ".tsv": "\t"}
_PACKED = (".gz", ".bz2", ".xz", ".zst")
_BATCH = 64  # rows of Parquet that are held at a time
# How a program that writes lists into CSV begins them; the text of a document does not begin so.
_LISTS = ("['", '["', "{'", '{"', "array([")

Row = tuple[int, dict[str, Any] | Refused]


def delimiter(path: str | Path) -> str:
    """What separates the cells of the file ``path``, by its name; empty if it is no CSV file."""
    stem, ending = os.path.splitext(str(path).lower())
    return _DELIMITERS.get(os.path.splitext(stem)[1] if ending in _PACKED else ending, "")


def csv_rows(stream: io.BufferedIOBase, separator: str, largest: int) -> Iterator[Row]:
    """(line, fields) of each row below the names of the columns. Every cell is text as it stands: "1984", "NA" and
    "null" are no number and nothing missing; a JSON list or object is read as such.

    Args:
        largest: bytes of a cell, at most.

    Raises Unreadable, as what follows cannot be trusted.
    """
    csv.field_size_limit(max(csv.field_size_limit(), largest))
    letters = io.TextIOWrapper(stream, "utf-8", newline="")  # pyright: ignore[reportArgumentType] (it has all it needs)
    try:
        rows = _read(csv.reader(letters, delimiter=separator, strict=True))
        _, names = next(rows, (1, []))
        _check(names)
        for number, cells in rows:
            try:
                yield number, _fields(names, cells)
            except Refused as why:
                yield number, why
    finally:
        letters.detach()  # who opened the stream closes it


def _fields(names: list[str], cells: list[str]) -> dict[str, Any]:
    if len(cells) != len(names):
        raise Refused(f"the row has {len(cells)} cells for {len(names)} columns")
    return {name: _cell(name, cell) for name, cell in zip(names, cells, strict=True)}


def _read(reader: Any) -> Iterator[tuple[int, list[str]]]:
    """(number of its first line, cells) of each row that is not blank."""
    while True:
        number = reader.line_num + 1
        try:
            cells = next(reader)
        except StopIteration:
            return
        except UnicodeDecodeError as error:
            raise Unreadable(f"invalid UTF-8 (0x{error.object[error.start]:02x}); expected UTF-8", number) from None
        except csv.Error as error:
            raise Unreadable(
                f"broken CSV ({error}); expected cells in double quotes where they need them", number
            ) from None
        if cells:
            yield number, cells


def _cell(name: str, cell: str) -> Any:
    if not cell.lstrip().startswith(_LISTS):
        return cell
    try:
        return decode(cell.encode())
    except Refused:
        raise Refused(
            f"column {quote(name)} holds {quote(cell)}, a list or an object as Python prints it; write it as JSON "
            "(json.dumps), or the file as JSON Lines or Parquet"
        ) from None


def parquet_rows(raw: io.BufferedReader) -> Iterator[Row]:
    """(row from 1, fields) of each row. Raises OSError for a damaged file, Unreadable for the names of its columns."""
    import pyarrow  # slow to import, and of use to Parquet alone
    from pyarrow import parquet

    number = 0
    try:
        with parquet.ParquetFile(raw) as file:
            _check(file.schema_arrow.names)
            for batch in file.iter_batches(_BATCH):
                columns = dict(zip(batch.schema.names, batch.columns, strict=True))
                for i in range(batch.num_rows):
                    number += 1
                    try:
                        row = {name: column[i].as_py() for name, column in columns.items()}
                    except UnicodeDecodeError:
                        row = Refused("invalid UTF-8; expected UTF-8")
                    yield number, row
    except pyarrow.ArrowException as error:
        raise OSError(str(error)) from None


def _check(names: list[str]) -> None:
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise Unreadable(f"has {names.count(twice)} columns {quote(twice)}; expected one")
