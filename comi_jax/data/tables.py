"""Rows of Parquet and CSV files as objects, like lines of JSON: read exactly, without guessing types from cells."""

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
_BATCH = 64  # rows of Parquet in memory at a time
# The first characters of a list or object that a program wrote to CSV; document text does not begin like this.
_LISTS = ("['", '["', "{'", '{"', "array([")

Row = tuple[int, dict[str, Any] | Refused]


def delimiter(path: str | Path) -> str:
    """The delimiter of the file ``path``, by its name; empty if it is not a CSV or TSV file."""
    stem, ending = os.path.splitext(str(path).lower())
    return _DELIMITERS.get(os.path.splitext(stem)[1] if ending in _PACKED else ending, "")


def csv_rows(stream: io.BufferedIOBase, separator: str, largest: int) -> Iterator[Row]:
    """(line, fields) of each row below the header. Every cell is text as it is written: "1984" is not a number, "NA"
    and "null" are not missing values; only a JSON list or object is parsed.

    Args:
        largest: maximum size of a cell in bytes.

    Raises Unreadable for duplicate column names and at broken CSV or UTF-8, since the rows after it cannot be trusted.
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
        letters.detach()  # the caller closes the stream


def _fields(names: list[str], cells: list[str]) -> dict[str, Any]:
    if len(cells) != len(names):
        raise Refused(f"the row has {len(cells)} cells for {len(names)} columns")
    return {name: _cell(name, cell) for name, cell in zip(names, cells, strict=True)}


def _read(reader: Any) -> Iterator[tuple[int, list[str]]]:
    """(number of its first line, cells) of each non-blank row."""
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
                f"broken CSV ({error}); expected double quotes around cells with delimiters, quotes or line breaks",
                number,
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
    """(row from 1, fields) of each row. Raises OSError for a damaged file, Unreadable for duplicate column names."""
    import pyarrow  # slow to import, and only needed for Parquet
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
