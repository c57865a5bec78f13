"""Files in, records out: every line or row is either read exactly or refused with file, number and reason.

One record per line: `{"input": str | [str], "prompt": str, "answer": str | [str]}` = context document(s), question,
reference answer(s) in order of preference. Files are JSON Lines or CSV in UTF-8, plain or compressed, or Parquet.
Lenient readers corrupt data: a missing answer becomes None, then the text "None", and is trained on.
"""

import contextlib
import io
import lzma
import os
import re
import stat
import zlib
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from comi_jax.data import packing, tables
from comi_jax.data.values import Refused, decode, describe, field_names, text, texts
from comi_jax.errors import UserError

# Parsed JSON can take 24 times the memory of its text ("[{},{},..."): 16 MiB, a dozen novels, stay well under 1 GB.
MAX_LINE_BYTES = 16 * 2**20
MAX_SKIPPED = 100_000  # bad lines listed per call; a file with more is not a data file

BYTE_ORDER_MARK = "\ufeff"  # at the start of a file or text: a mark of the encoding, not content
FIELDS = ("input", "prompt", "answer")


@dataclass(frozen=True)
class Record:
    """One example: context documents (kept separate), question, reference answers (the first is the target; none when
    only answering)."""

    context: tuple[str, ...]
    prompt: str
    answers: tuple[str, ...]

    def context_text(self) -> str:
        """The context as one text; several documents are joined by newlines."""
        return "\n".join(document.removeprefix(BYTE_ORDER_MARK) for document in self.context)


class DataError(UserError):
    """A data file, or one line of it (counted from 1), that cannot be read; the message begins with the location.

    Attributes: `path`, `line` (None for the whole file), `reason`, and `unit`, "line" or "row".
    """

    def __init__(self, path: str | Path, line: int | None, reason: str, unit: str = "line") -> None:
        # All arguments go to the base class, so that the error can be pickled when it leaves a data worker process.
        super().__init__(path, line, reason, unit)
        self.path, self.line, self.reason, self.unit = str(path), line, reason, unit

    def __str__(self) -> str:
        path = self.path if self.path.isprintable() else ascii(self.path)
        return f"{path}{'' if self.line is None else f', {self.unit} {self.line}'}: {self.reason}"


@dataclass(frozen=True)
class Skipped:
    """A skipped line, and why it was skipped."""

    path: str
    line: int
    reason: str
    unit: str = "line"

    def __str__(self) -> str:
        return f"{self.path}, {self.unit} {self.line}: {self.reason}"


@dataclass(frozen=True)
class ReadReport:
    """The report of `read_records`: the files in order, the number of records kept from each, every skipped line."""

    paths: tuple[str, ...]
    kept: tuple[int, ...]
    skipped: tuple[Skipped, ...]

    def __str__(self) -> str:
        lines = [f"{path}: {kept} records kept" for path, kept in zip(self.paths, self.kept, strict=True)]
        return "\n".join(lines + [f"skipped {line}" for line in self.skipped])


# Reads one schema: from a line or row to a record, or to several, each of which may be refused. Raises Refused.
Adapt = Callable[[dict[str, object]], Record | Sequence[Record | Refused]]


def adapted(row: dict[str, object] | Refused | None, adapt: Adapt) -> Sequence[Record | Refused]:
    """The records that `adapt` makes of a row; none for a blank row (None), the reason for a refused one."""
    if row is None or isinstance(row, Refused):
        return [] if row is None else [row]
    try:
        made = adapt(row)
    except Refused as why:
        return [why]
    return [made] if isinstance(made, Record) else made


def read_records(
    paths: str | Path | Sequence[str | Path], *, skip_bad: bool = False
) -> tuple[list[Record], ReadReport]:
    """All records of one or more files, in order, and a report of what was kept and skipped.

    Args:
        paths: files; compression is recognised by content, not by name.
        skip_bad: skip bad lines and list them in the report, instead of raising at the first one. Errors of a whole
            file (missing, unreadable, damaged compressed stream, no good record) are still raised: an unknown number
            of records is lost, and in a damaged stream the lines read so far may be wrong too.

    Raises:
        DataError: as `iter_records`.
        ValueError: `paths` is empty.
    """
    files = [paths] if isinstance(paths, str | Path) else list(paths)
    if not files:
        raise ValueError("no data file given; name at least one JSON Lines file")
    records: list[Record] = []
    skipped: list[Skipped] = []
    kept = []
    for path in files:
        before = len(records)
        records.extend(iter_records(path, skipped=skipped if skip_bad else None))
        kept.append(len(records) - before)
    return records, ReadReport(tuple(str(path) for path in files), tuple(kept), tuple(skipped))


def iter_records(path: str | Path, *, skipped: list[Skipped] | None = None) -> Iterator[Record]:
    """The records of one file, streamed: one line of at most MAX_LINE_BYTES (of Parquet, a batch of rows) is in memory.

    Blank lines are ignored, as are fields other than the three. The file is opened at the first `next`.

    Args:
        path: a file.
        skipped: if given, bad lines are appended to it instead of raised.

    Raises:
        DataError: a line that is not exactly a record; a file that is missing, a directory, unreadable, a damaged
            compressed stream (raised where it stops, or at its end if the checksum fails), without a good record, or
            with more than MAX_SKIPPED bad lines.
    """
    for _, record in numbered_records(path, record_of, skipped=skipped):
        yield record


def numbered_records(
    path: str | Path, adapt: Adapt, *, skipped: list[Skipped] | None = None
) -> Iterator[tuple[int, Record]]:
    """As `iter_records`, for any schema: (line or row number, record) pairs. `adapt` turns an object into one or more
    records, or raises Refused."""
    kept = refused = 0
    reading = _Reading(path)
    with contextlib.closing(iter(reading)) as rows:
        for number, row in rows:
            for record in adapted(row, adapt):
                if isinstance(record, Record):
                    kept += 1
                    yield number, record
                    continue
                if skipped is None:
                    raise DataError(path, number, str(record), reading.unit)
                skipped.append(Skipped(str(path), number, str(record), reading.unit))
                refused += 1
                if len(skipped) > MAX_SKIPPED:
                    reason = f"more than {MAX_SKIPPED:,} lines are not records; this one: {record}"
                    raise DataError(path, number, reason, reading.unit)
    if skipped and refused and not kept:
        raise DataError(path, None, f"no line is a record; {refused} were refused, the first: {skipped[-refused]}")
    if not kept:
        raise DataError(path, None, "has no records; expected one JSON object per line")


def record_of(fields: dict[str, object]) -> Record:
    """The record of an object in our own schema; raises Refused with what was found and what was expected."""
    for name in FIELDS:
        if name not in fields:
            raise Refused(f'field "{name}" is missing; found {field_names(fields)}')
    context, answers = texts('field "input"', fields["input"]), texts('field "answer"', fields["answer"])
    return Record(context, text('field "prompt"', fields["prompt"]), answers)


class _Reading:
    """(number, row) for each row of a file, in order: row is an object, None if blank, or Refused with the reason."""

    unit = "line"

    def __init__(self, path: str | Path):
        self.path, self.number, self._whole = path, 0, True  # _whole: line `number` is complete

    def __iter__(self) -> Generator[tuple[int, dict[str, object] | Refused | None]]:
        path = self.path
        try:
            # A pipe or device may be readable once, endlessly or not at all. Opening a directory raises an error.
            if not stat.S_ISREG(mode := os.stat(path).st_mode) and not stat.S_ISDIR(mode):
                raise DataError(path, None, "is not a regular file; name a JSON Lines file")
            raw: io.BufferedReader = io.BufferedReader(io.FileIO(path), 2**20)
            with raw:
                for number, row in self._rows(raw):
                    self.number = number
                    yield number, row
        except FileNotFoundError:
            raise DataError(path, None, "does not exist") from None
        except IsADirectoryError:
            raise DataError(path, None, "is a directory; name the JSON Lines files in it") from None
        except PermissionError:
            raise DataError(path, None, "cannot be read (permission denied)") from None
        except packing.Unreadable as why:
            raise DataError(path, why.line, str(why), self.unit) from None
        except (OSError, EOFError, zlib.error, lzma.LZMAError) as damage:
            # Only errors of the operating system have an errno; errors of compressed streams do not.
            if not self.number and isinstance(damage, OSError) and damage.errno:
                raise DataError(path, None, f"cannot be read ({damage.strerror})") from None
            what = " ".join(str(damage).split())
            reason = (
                f"the file is damaged or cut short and cannot be read from here on ({what}); fetch or write it again"
            )
            raise DataError(path, self.number + self._whole, reason, self.unit) from damage

    def _rows(self, raw: io.BufferedReader) -> Iterator[tuple[int, dict[str, object] | Refused | None]]:
        if packing.is_parquet(raw):
            self.unit = "row"
            yield from tables.parquet_rows(raw)
        elif separator := tables.delimiter(self.path):
            yield from tables.csv_rows(packing.unpacked(raw), separator, MAX_LINE_BYTES)
        else:
            yield from self._json_lines(packing.unpacked(raw))

    def _json_lines(self, stream: io.BufferedIOBase) -> Iterator[tuple[int, dict[str, object] | Refused | None]]:
        """Of a line above the limit, only the first MAX_LINE_BYTES + 1 bytes are examined."""
        number = 0
        while piece := stream.readline(MAX_LINE_BYTES + 1):
            if self._whole:
                number += 1
                try:
                    yield number, _fields(piece)
                except Refused as why:
                    yield number, why
            self._whole = piece.endswith(b"\n")


def _fields(line: bytes) -> dict[str, object] | None:
    """The object on a line, or None for a blank line."""
    if len(line) > MAX_LINE_BYTES and not line.endswith(b"\n"):
        raise Refused(f"the line is longer than {MAX_LINE_BYTES} bytes; expected one record per line{_hint(line)}")
    if line.isspace():
        return None
    try:
        fields = decode(line)
    except Refused as why:
        raise Refused(f"{why}{_hint(line)}") from None
    if not isinstance(fields, dict):
        expected = 'expected an object with the fields "input", "prompt" and "answer"'
        raise Refused(f"the line is {describe(fields)}; {expected}{_hint(line)}")
    return fields


def _hint(line: bytes) -> str:
    """Advice for a line that is not an object, if the cause is recognised."""
    bare = line.strip()
    if bare[:1] == b"[":  # HotpotQA and 2WikiMultihopQA
        return "; for a file that is one list: jq -c '.[]' FILE > FILE.jsonl"
    if re.match(rb'\{\s*"(data|version)":', bare):  # SQuAD
        return "; for a file of SQuAD: jq -c '.data[]' FILE > FILE.jsonl"
    if bare == b"{":
        return "; for an object over several lines: jq -c . FILE > FILE.jsonl"
    if bare[:2] == b"{'":
        return "; it was printed by Python: write it with json.dumps"
    if bare[-2:] == b"},":
        return "; remove the comma after the object"
    if b"}\r{" in bare:
        return "; its lines end in a carriage return alone: tr '\\r' '\\n' < FILE > FILE.jsonl"
    if re.fullmatch(rb'"?\w+"?([,;\t]"?\w+"?)+', bare):
        return "; the name of a CSV file must end in .csv"
    if bare[:1].isalpha() and b" " in bare:
        return "; plain text has no questions: write one object per line with input, prompt and answer"
    return ""
