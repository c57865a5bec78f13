"""JSON Lines in, records out: every line is either read exactly or refused with its file, its number and the reason.

One record per line: `{"input": str | [str], "prompt": str, "answer": str | [str]}` = context document(s), question,
reference answer(s) in order of preference. Files are UTF-8, plain or gzipped. Lenient readers lose data here: a missing
answer becomes None, then the text "None", and is trained on.
"""

import gzip
import json
import os
import stat
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from comi_jax.errors import UserError

# JSON can take 24 times its length once parsed ("[{},{},..."): 16 MiB, a dozen novels, stay well under 1 GB.
MAX_LINE_BYTES = 16 * 2**20
MAX_SKIPPED = 100_000  # bad lines that one reading lists; a file with more is no data file

_GZIP_MAGIC = b"\x1f\x8b"
BYTE_ORDER_MARK = "\ufeff"  # at the beginning of a file or a text: how it was written, no letter of it
FIELDS = ("input", "prompt", "answer")
_SHOWN = 40  # characters of a rejected value, and 10 field names, are enough to find the place


@dataclass(frozen=True)
class Record:
    """One example: context documents (boundaries kept), question, reference answers (the first one is the target)."""

    context: tuple[str, ...]
    prompt: str
    answers: tuple[str, ...]

    def context_text(self) -> str:
        """The context as one text: a single document as it is, several joined by a newline."""
        return "\n".join(document.removeprefix(BYTE_ORDER_MARK) for document in self.context)


class DataError(UserError):
    """A data file, or one line of it (counted from 1), that cannot be read; the message begins with where.

    The three parts are kept as `path`, `line` (None when the whole file is meant) and `reason`.
    """

    def __init__(self, path: str | Path, line: int | None, reason: str) -> None:
        # All parts go to ValueError so that the error survives pickling, as it must to leave a data worker process.
        super().__init__(path, line, reason)
        self.path, self.line, self.reason = str(path), line, reason

    def __str__(self) -> str:
        path = self.path if self.path.isprintable() else ascii(self.path)
        return f"{path}{'' if self.line is None else f', line {self.line}'}: {self.reason}"


@dataclass(frozen=True)
class Skipped:
    """A line that was left out, and why."""

    path: str
    line: int
    reason: str

    def __str__(self) -> str:
        return f"{self.path}, line {self.line}: {self.reason}"


@dataclass(frozen=True)
class ReadReport:
    """What `read_records` did: the files in order, the records kept from each, every line skipped."""

    paths: tuple[str, ...]
    kept: tuple[int, ...]
    skipped: tuple[Skipped, ...]

    def __str__(self) -> str:
        lines = [f"{path}: {kept} records kept" for path, kept in zip(self.paths, self.kept, strict=True)]
        return "\n".join(lines + [f"skipped {line}" for line in self.skipped])


class Refused(ValueError):
    """Why one line is not a record; the reader adds file and line number."""


def read_records(
    paths: str | Path | Sequence[str | Path], *, skip_bad: bool = False
) -> tuple[list[Record], ReadReport]:
    """All records of one file or of several, in order, and a report of what was kept and skipped.

    Args:
        paths: files, plain or gzipped (told by their content, not by their names).
        skip_bad: leave bad lines out and list them in the report, instead of raising at the first one. What is wrong
            with a whole file (missing, unreadable, broken gzip stream, no good record in it) raises all the same: an
            unknown number of records is lost, and a broken gzip stream cannot vouch for the lines before it either.

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
    """The records of one file, streamed: no more than one line, of at most MAX_LINE_BYTES, is held at a time.

    Blank lines are ignored, as are fields other than the three. The file is opened at the first `next`.

    Args:
        path: a JSON Lines file, plain or gzipped.
        skipped: when given, bad lines are appended to it instead of raised.

    Raises:
        DataError: a line that is not exactly a record, or a file that is missing, a directory, unreadable, a damaged
            gzip stream (raised where it stops, or at its end when the checksum fails), without any good record, or
            with more than MAX_SKIPPED bad lines.
    """
    for _, record in numbered_records(path, record_of, skipped=skipped):
        yield record


def numbered_records(
    path: str | Path, adapt: Callable[[dict[str, object]], Record], *, skipped: list[Skipped] | None = None
) -> Iterator[tuple[int, Record]]:
    """As `iter_records`, each record after the number of its line, for lines of any schema: `adapt` makes a line's
    object a record, or raises Refused."""
    kept = refused = 0
    for number, line in _lines(path):
        try:
            fields = _fields(line)
            if fields is None:
                continue
            record = adapt(fields)
        except Refused as why:
            if skipped is None:
                raise DataError(path, number, str(why)) from None
            skipped.append(Skipped(str(path), number, str(why)))
            refused += 1
            if len(skipped) > MAX_SKIPPED:
                reason = f"more than {MAX_SKIPPED:,} lines are not records, this one because: {why}"
                raise DataError(path, number, reason) from None
            continue
        kept += 1
        yield number, record
    if refused and not kept:
        raise DataError(path, None, f"no line is a record; the first of {refused} refused: {skipped[-refused]}")
    if not kept:
        raise DataError(path, None, "has no records; expected one JSON object per line")


def _lines(path: str | Path) -> Iterator[tuple[int, bytes]]:
    """(number, bytes) of each line; of a line above the limit only the first MAX_LINE_BYTES + 1 bytes."""
    number, whole = 0, True
    try:
        # A pipe or a device could be read but once, for ever or not at all; a directory says so itself when opened.
        if not stat.S_ISREG(mode := os.stat(path).st_mode) and not stat.S_ISDIR(mode):
            raise DataError(path, None, "is not a regular file; name a JSON Lines file")
        with open(path, "rb", buffering=2**20) as raw:
            stream = gzip.GzipFile(fileobj=raw) if raw.peek(2)[:2] == _GZIP_MAGIC else raw
            while piece := stream.readline(MAX_LINE_BYTES + 1):
                if whole:
                    number += 1
                    yield number, piece
                whole = piece.endswith(b"\n")
    except FileNotFoundError:
        raise DataError(path, None, "does not exist") from None
    except IsADirectoryError:
        raise DataError(path, None, "is a directory; name the JSON Lines files in it") from None
    except PermissionError:
        raise DataError(path, None, "may not be read (permission denied)") from None
    except (OSError, EOFError, zlib.error) as damage:
        if not number and getattr(damage, "errno", None):  # the system's, not that of a gzip stream
            raise DataError(path, None, f"cannot be read ({damage.strerror})") from None
        reason = f"the file is damaged or cut short and cannot be read from here on ({damage}); fetch or write it again"
        raise DataError(path, number + whole, reason) from damage


def record_of(fields: dict[str, object]) -> Record:
    """The record that the fields of our own schema make; raises Refused with what was found and what was expected."""
    for name in FIELDS:
        if name not in fields:
            raise Refused(f'field "{name}" is missing; found {field_names(fields)}')
    context, answers = texts('field "input"', fields["input"]), texts('field "answer"', fields["answer"])
    return Record(context, text('field "prompt"', fields["prompt"]), answers)


def _fields(line: bytes) -> dict[str, object] | None:
    """The object on a line, None for a blank line."""
    # HotpotQA and 2WikiMultihopQA are published as one list in one line.
    hint = "; for a file that is one list: jq -c '.[]' FILE > FILE.jsonl" if line[:20].lstrip().startswith(b"[") else ""
    if len(line) > MAX_LINE_BYTES and not line.endswith(b"\n"):
        raise Refused(f"the line is longer than {MAX_LINE_BYTES} bytes; expected one record per line{hint}")
    if line.isspace():
        return None
    fields = decode(line)
    if not isinstance(fields, dict):
        expected = 'expected an object with the fields "input", "prompt" and "answer"'
        raise Refused(f"the line is {describe(fields)}; {expected}{hint}")
    return fields


def decode(line: bytes) -> object:
    """The JSON value on a line, by the letter of RFC 8259 and with no key given twice."""
    try:
        return json.loads(line.decode("utf-8").rstrip("\n"), object_pairs_hook=_object, parse_constant=_constant)
    except Refused:
        raise
    except UnicodeDecodeError as err:
        raise Refused(f"invalid UTF-8 at byte {err.start + 1} (0x{line[err.start]:02x}); expected UTF-8") from None
    except json.JSONDecodeError as err:
        raise Refused(f"broken JSON at character {err.pos + 1} ({err.msg}); expected one object per line") from None
    except RecursionError:
        raise Refused("the JSON is nested too deeply; expected an object of texts and lists of texts") from None
    except ValueError:  # Python's limit on the digits of an integer is the one other thing that json raises
        raise Refused("a number has too many digits; expected texts and lists of texts") from None


def _object(pairs: list[tuple[str, object]]) -> dict[str, object]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        twice, times = Counter(name for name, _ in pairs).most_common(1)[0]
        raise Refused(f"field {quote(twice)} is given {times} times in one object; expected it once")
    return fields


def _constant(name: str) -> None:
    raise Refused(f"{name} is not JSON; expected texts and lists of texts")


def texts(where: str, value: object) -> tuple[str, ...]:
    """One text or a list of texts, as a tuple; raises Refused."""
    expected = "text or a list of texts"
    if not isinstance(value, list):
        return (text(where, value, expected),)
    if not value:
        raise Refused(f"{where} is an empty list; expected {expected}")
    return tuple(text(f"{where}, item {i} of {len(value)},", item) for i, item in enumerate(value, 1))


def text(where: str, value: object, expected: str = "text") -> str:
    """`value`, if it is text that says something; raises Refused."""
    if not isinstance(value, str):
        raise Refused(f"{where} is {describe(value)}; expected {expected}")
    if not value or value.isspace():
        raise Refused(f"{where} is {'blank (white space only)' if value else 'empty'}; expected {expected}")
    if "\0" in value:
        raise Refused(f"{where} has a NUL character at character {value.index(chr(0)) + 1}; expected plain {expected}")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as err:
        found = f"the lone surrogate \\u{ord(value[err.start]):04x} at character {err.start + 1}"
        raise Refused(f"{where} has {found}; expected valid Unicode") from None
    return value


def describe(value: object) -> str:
    """A JSON value in words, short whatever its size."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return f"a boolean ({str(value).lower()})"
    if isinstance(value, int | float):
        return f"a number ({str(value)[:_SHOWN]})"
    if isinstance(value, str):
        return f"text ({quote(value)})"
    return f"an object of {len(value)} fields" if isinstance(value, dict) else f"a list of {len(value)} items"


def field_names(fields: dict[str, object]) -> str:
    """The first names of an object's fields, for a message."""
    found = ", ".join(quote(key) for key in list(fields)[:10]) + (", ..." if len(fields) > 10 else "")
    return found or "no field at all"


def quote(text: str) -> str:
    """Quoted and escaped to ASCII, so that no content of a file can garble a log."""
    return json.dumps(text[:_SHOWN]) + ("..." if len(text) > _SHOWN else "")
