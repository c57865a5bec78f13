"""Values of a data file, each read exactly or refused with a reason: JSON, texts, lists of texts."""

import json
from collections import Counter
from collections.abc import Mapping

_SHOWN = 40  # characters shown of a refused value; with 10 field names, enough to find it


class Refused(ValueError):
    """The reason why a line or row is not a record; the reader adds file and number."""


def decode(line: bytes) -> object:
    """The JSON value on a line, strictly by RFC 8259 and without duplicate keys; raises Refused."""
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
    except ValueError:  # json's only other error is Python's limit on the digits of an integer
        raise Refused("a number has too many digits; expected texts and lists of texts") from None


def _object(pairs: list[tuple[str, object]]) -> dict[str, object]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        twice, times = Counter(name for name, _ in pairs).most_common(1)[0]
        raise Refused(f"field {quote(twice)} occurs {times} times in one object; expected once")
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
    """`value`, if it is valid text and not blank; raises Refused."""
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
    """A short description of a value of any size."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return f"a boolean ({str(value).lower()})"
    if isinstance(value, int | float):
        return f"a number ({str(value)[:_SHOWN]})"
    if isinstance(value, str):
        return f"text ({quote(value)})"
    if isinstance(value, dict | list):
        return f"an object of {len(value)} fields" if isinstance(value, dict) else f"a list of {len(value)} items"
    return f"a value of type {type(value).__name__}"  # from a Parquet column


def field_names(fields: Mapping[str, object]) -> str:
    """The first field names of an object, for a message."""
    found = ", ".join(quote(key) for key in list(fields)[:10]) + (", ..." if len(fields) > 10 else "")
    return found or "no field at all"


def quote(text: str) -> str:
    """``text`` shortened, quoted and escaped to ASCII, so that the content of a file cannot garble a log."""
    return json.dumps(text[:_SHOWN]) + ("..." if len(text) > _SHOWN else "")
