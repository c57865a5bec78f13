"""Every line of a data file is read exactly or refused with its file, its number and the reason."""

import gzip
import json
import pickle
import random
import tracemalloc

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from comi_jax.data import records
from comi_jax.data.records import DataError, Record, Skipped, iter_records, read_records

GOOD = b'{"input": "Paris is in France.", "prompt": "Where is Paris?", "answer": ["France", "in France"]}'
GOOD_RECORD = Record(("Paris is in France.",), "Where is Paris?", ("France", "in France"))


@pytest.fixture
def write(tmp_path):
    def write(*lines, name="train.jsonl"):
        path = tmp_path / name
        path.write_bytes(b"\n".join(lines) + b"\n")
        return path

    return write


def line_with(**fields):
    return json.dumps({"input": "c", "prompt": "q", "answer": "a"} | fields).encode()


def test_documents_and_references_are_kept_in_order(write):
    path = write(b'{"answer": ["b", "a"], "input": ["one\\n", "two"], "prompt": "q"}', line_with())
    (listed, single), report = read_records(path)
    assert listed == Record(("one\n", "two"), "q", ("b", "a")) and single == Record(("c",), "q", ("a",))
    assert listed.context_text() == "one\n\ntwo" and single.context_text() == "c"
    assert (report.paths, report.kept, report.skipped) == ((str(path),), (2,), ())


def test_unknown_fields_blank_lines_crlf_and_a_missing_last_newline_are_no_errors(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_bytes(b"\n \t\r\n" + line_with(id=3, meta={"n": [None, 1.5]}) + b"\r\n\n" + GOOD)
    assert read_records(path)[0] == [Record(("c",), "q", ("a",)), GOOD_RECORD]


def test_text_is_taken_as_it_is(write):
    odd = " \u2028é\u0301\U0001f600\ufeff\x1b\\n\t\u200b "
    escaped = line_with(input=odd, prompt=odd)
    plain = json.dumps({"input": odd, "prompt": odd, "answer": "a"}, ensure_ascii=False).encode()
    assert read_records(write(escaped, plain))[0] == [Record((odd,), odd, ("a",))] * 2


REFUSED = {
    "cut in a text": (GOOD[:-3], "broken JSON at character 84 (Unterminated string starting at)"),
    "cut between texts": (GOOD[:-2], "broken JSON at character 95 (Expecting ',' delimiter)"),
    "not json": (b"hello", "broken JSON at character 1 (Expecting value); expected one object per line"),
    "two records": (GOOD + GOOD, "broken JSON at character 97 (Extra data)"),
    "byte order mark": (b"\xef\xbb\xbf" + GOOD, "broken JSON at character 1 (Unexpected UTF-8 BOM"),
    "raw control character": (GOOD.replace(b" is ", b"\x01"), "broken JSON at character 17 (Invalid control character"),
    "list": (b"[1, 2]", 'the line is a list of 2 items; expected an object with the fields "input", "prompt" and'),
    "number": (b"3", "the line is a number (3)"),
    "null": (b"null", "the line is null"),
    "text": (b'"x"', 'the line is text ("x")'),
    "missing": (b'{"input": "c", "prompt": "q"}', 'field "answer" is missing; found "input", "prompt"'),
    "misspelt": (b'{"input": "c", "Prompt": "q", "answer": "a"}', 'field "prompt" is missing; found "input", "Prompt"'),
    "no field": (b"{}", 'field "input" is missing; found no field at all'),
    "answer number": (line_with(answer=3), 'field "answer" is a number (3); expected text or a list of texts'),
    "answer null": (line_with(answer=None), 'field "answer" is null; expected text or a list of texts'),
    "answer boolean": (line_with(answer=True), 'field "answer" is a boolean (true); expected text or a list of texts'),
    "input object": (line_with(input={"text": "c"}), 'field "input" is an object of 1 fields; expected text or a list'),
    "prompt list": (line_with(prompt=["q"]), 'field "prompt" is a list of 1 items; expected text'),
    "item number": (line_with(answer=["a", 1.5]), 'field "answer", item 2 of 2, is a number (1.5); expected text'),
    "item null": (line_with(input=[None, "c"]), 'field "input", item 1 of 2, is null; expected text'),
    "item list": (line_with(input=["c", ["d"]]), 'field "input", item 2 of 2, is a list of 1 items; expected text'),
    "no answers": (line_with(answer=[]), 'field "answer" is an empty list; expected text or a list of texts'),
    "no documents": (line_with(input=[]), 'field "input" is an empty list; expected text or a list of texts'),
    "empty context": (line_with(input=""), 'field "input" is empty; expected text or a list of texts'),
    "empty question": (line_with(prompt=""), 'field "prompt" is empty; expected text'),
    "blank question": (line_with(prompt=" \n\u00a0"), 'field "prompt" is blank (white space only); expected text'),
    "empty answer": (line_with(answer=["a", ""]), 'field "answer", item 2 of 2, is empty; expected text'),
    "empty document": (line_with(input=["c", " ", "d"]), 'field "input", item 2 of 3, is blank (white space only)'),
    "lone surrogate": (line_with(input="ab\ud83d"), 'field "input" has the lone surrogate \\ud83d at character 3'),
    "NUL": (line_with(answer=["a\0"]), 'field "answer", item 1 of 1, has a NUL character at character 2'),
    "same key twice": (GOOD[:-1] + b', "prompt": ""}', 'field "prompt" occurs 2 times in one object; expected'),
    "same key within": (line_with()[:-1] + b', "m": {"k": 1, "k": 2}}', 'field "k" occurs 2 times'),
    "NaN": (line_with(score=float("nan")), "NaN is not JSON"),
    "infinity": (line_with(answer=float("-inf")), "-Infinity is not JSON"),
    "digits": (b'{"input": ' + b"9" * 5000 + b"}", "a number has too many digits"),
    "not UTF-8": ("{'input': 'é'}".encode("latin-1"), "invalid UTF-8 at byte 12 (0xe9)"),
    "UTF-16": (GOOD.decode().encode("utf-16"), "invalid UTF-8 at byte 1 (0xff)"),
    "surrogate in UTF-8": (GOOD.replace(b"France.", b"\xed\xa0\x80"), "invalid UTF-8 at byte 24 (0xed)"),
    "deep list": (b"[" * 100_000, "the JSON is nested too deeply"),
    "deep object": (b'{"a":' * 100_000, "the JSON is nested too deeply"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_bad_line_is_refused_with_file_number_and_reason(write, name):
    bad, reason = REFUSED[name]
    path = write(GOOD, b"", bad, GOOD)
    with pytest.raises(DataError) as raised:
        read_records(path)
    message = str(raised.value)
    assert message.startswith(f"{path}, line 3: {reason}")
    assert message.isprintable() and len(message) < len(str(path)) + 200
    assert (raised.value.path, raised.value.line) == (str(path), 3)

    kept, report = read_records(path, skip_bad=True)
    assert kept == [GOOD_RECORD] * 2 and report.kept == (2,)
    assert report.skipped == (Skipped(str(path), 3, raised.value.reason),)
    assert str(report) == f"{path}: 2 records kept\nskipped {message}"


def test_a_file_that_is_one_list_is_told_what_to_do(write, monkeypatch):
    path = write(b"[" + b", ".join([GOOD] * 3) + b"]")
    with pytest.raises(DataError, match="line 1: the line is a list of 3 items; .* one list: jq -c '...' FILE"):
        read_records(path)
    monkeypatch.setattr(records, "MAX_LINE_BYTES", 100)
    with pytest.raises(DataError, match="line 1: the line is longer than 100 bytes; .* one list: jq -c '...' FILE"):
        read_records(path)


def test_a_huge_value_or_name_does_not_fill_the_message(write):
    path = write(line_with(prompt=["x" * 9999]), json.dumps({"k" * 999 + str(i): 1 for i in range(99)}).encode(), GOOD)
    _, report = read_records(path, skip_bad=True)
    assert len(report.skipped) == 2 and all(len(line.reason) < 600 for line in report.skipped)
    assert report.skipped[1].reason.endswith('k"..., ...')


def test_an_error_survives_pickling(write):
    with pytest.raises(DataError) as raised:
        read_records(write(b"?"))
    copy = pickle.loads(pickle.dumps(raised.value))
    assert str(copy) == str(raised.value) and copy.line == 1


@pytest.mark.parametrize("ending", ["", ".gz"])
def test_a_line_above_the_limit_is_refused_and_never_held(tmp_path, monkeypatch, ending):
    monkeypatch.setattr(records, "MAX_LINE_BYTES", 200)
    fits = line_with(input="c" * (200 - len(line_with(input=""))))
    assert len(fits) == 200
    path = tmp_path / f"x.jsonl{ending}"
    with (gzip.open if ending else open)(path, "wb") as f:
        f.write(fits + b"\n" + b" " * 20_000_000 + GOOD + b"\n" + b"x" * 201 + b"\n" + GOOD + b"\n" + b"y" * 5000)
    tracemalloc.start()
    kept, report = read_records(path, skip_bad=True)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert [len(record.context[0]) for record in kept] == [200 - len(line_with(input="")), 19]
    assert [line.line for line in report.skipped] == [2, 3, 5]
    assert report.skipped[0].reason == "the line is longer than 200 bytes; expected one record per line"
    assert peak < 5_000_000


def test_gzip_is_told_by_content_not_by_name(tmp_path):
    packed, plain = tmp_path / "a.jsonl", tmp_path / "b.jsonl.gz"
    packed.write_bytes(gzip.compress(GOOD + b"\n") + gzip.compress(GOOD))  # two members, as `cat a.gz b.gz` makes
    plain.write_bytes(GOOD)
    kept, report = read_records([packed, str(plain)])
    assert kept == [GOOD_RECORD] * 3 and report.kept == (2, 1) and report.paths == (str(packed), str(plain))


def _numbered(n):
    rng = random.Random(0)
    return [line_with(prompt=f"q{i}", input=f"{rng.getrandbits(800):x}") for i in range(n)]


def test_a_truncated_gzip_file_is_refused_at_the_line_reached(tmp_path):
    path = tmp_path / "x.jsonl.gz"
    whole = gzip.compress(b"\n".join(_numbered(300)))
    for cut in (5, 15, len(whole) // 3, len(whole) // 2, len(whole) - 9, len(whole) - 1):
        path.write_bytes(whole[:cut])
        kept = []
        with pytest.raises(DataError, match="damaged or cut short") as raised:
            for record in iter_records(path):
                kept.append(record)
        assert [record.prompt for record in kept] == [f"q{i}" for i in range(len(kept))]
        assert str(raised.value).startswith(f"{path}, line {len(kept) + 1}: ")
        with pytest.raises(DataError, match="damaged or cut short"):
            read_records(path, skip_bad=True)


def test_a_flipped_bit_in_a_gzip_file_never_goes_unnoticed(tmp_path):
    path = tmp_path / "x.jsonl.gz"
    lines = _numbered(60)
    whole = gzip.compress(b"\n".join(lines))
    expected = [json.loads(line)["prompt"] for line in lines]
    rng = random.Random(1)
    for _ in range(60):
        bit = rng.randrange(80, 8 * len(whole))  # behind the header, whose time stamp and flags may change freely
        path.write_bytes(whole[: bit // 8] + bytes([whole[bit // 8] ^ 1 << bit % 8]) + whole[bit // 8 + 1 :])
        with pytest.raises(DataError):
            read_records(path)
        with pytest.raises(DataError):
            read_records(path, skip_bad=True)
    path.write_bytes(whole)
    assert [record.prompt for record in read_records(path)[0]] == expected


def test_files_that_cannot_be_records_are_named(tmp_path, write):
    cases = [
        (tmp_path / "nowhere.jsonl", "nowhere.jsonl: does not exist"),
        (tmp_path, ": is a directory; name the JSON Lines files in it"),
        (write(b"", b" ", name="blank.jsonl"), "blank.jsonl: has no records"),
        (
            write(b"x", b"", b"y", name="bad.jsonl"),
            f"bad.jsonl: no line is a record; 2 were refused, the first: {tmp_path}/bad.jsonl, line 1: ",
        ),
    ]
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "empty.jsonl.gz").write_bytes(gzip.compress(b""))
    cases += [(tmp_path / "empty.jsonl", "empty.jsonl: has no records")]
    cases += [(tmp_path / "empty.jsonl.gz", "empty.jsonl.gz: has no records")]
    for path, message in cases:
        with pytest.raises(DataError) as raised:
            read_records([write(GOOD), path], skip_bad=True)
        assert str(raised.value).startswith(str(path)) and message in str(raised.value) and raised.value.line is None
    with pytest.raises(ValueError, match="no data file given"):
        read_records([])


def test_many_files_keep_their_order_and_the_report_its_files(write):
    a = write(b"?", line_with(prompt="1"), name="a.jsonl")
    b = write(line_with(prompt="2"), line_with(prompt="3"), b"?", name="b.jsonl")
    kept, report = read_records((b, str(a)), skip_bad=True)
    assert [record.prompt for record in kept] == ["2", "3", "1"] and report.kept == (2, 1)
    assert [(line.path, line.line) for line in report.skipped] == [(str(b), 3), (str(a), 1)]


def test_reading_is_streamed_up_to_the_bad_line(write):
    stream = iter_records(write(GOOD, GOOD, b"?", GOOD))
    assert [next(stream), next(stream)] == [GOOD_RECORD] * 2
    with pytest.raises(DataError, match="line 3"):
        next(stream)


ANY = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=20)
TEXT = ANY.filter(str.strip)
TEXTS = st.lists(TEXT, min_size=1, max_size=3).map(tuple)


@settings(derandomize=True, deadline=None, max_examples=100)
@given(st.lists(st.tuples(TEXTS, TEXT, TEXTS), min_size=1, max_size=3), st.booleans(), st.booleans())
def test_what_is_written_is_read_back_equal(tmp_path_factory, fields, ascii_only, packed):
    written = [Record(*parts) for parts in fields]

    def dump(record):
        one = len(record.context) == 1
        fields = {"input": record.context[0] if one else record.context, "prompt": record.prompt}
        return json.dumps(fields | {"answer": record.answers}, ensure_ascii=ascii_only).encode()

    path = tmp_path_factory.getbasetemp() / "written.jsonl"
    content = b"\n".join(map(dump, written))
    path.write_bytes(gzip.compress(content) if packed else content)
    assert read_records(path)[0] == written


@settings(derandomize=True, deadline=None, max_examples=200)
@given(st.one_of(st.binary(max_size=200), st.binary(max_size=100).map(lambda tail: b"\x1f\x8b\x08\x00" + tail)))
def test_random_bytes_raise_nothing_but_data_error(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "random.jsonl"
    path.write_bytes(content)
    for skip_bad in (False, True):
        with pytest.raises(DataError):
            read_records(path, skip_bad=skip_bad)


def _tuple(value):
    return tuple(value) if isinstance(value, list) else (value,)


@pytest.mark.fault
@pytest.mark.parametrize("count", [600, pytest.param(10_000, marks=pytest.mark.slow)])
def test_mutated_lines_are_read_right_or_refused_and_good_lines_stay_in_order(tmp_path, count):
    """`count` lines with 1 to 3 bytes changed, dropped or put in, every fourth after a good line."""
    rng = random.Random(0)
    alphabet = b'{}[]",:\\u0d8 \x00\xff\xc3tfn1' + bytes(range(32, 127))
    lines = []
    for i in range(count):
        line = bytearray(line_with(prompt=f"bad {i}", input=["é" * 3, "two"], answer=["a", "b"]))
        for _ in range(rng.randint(1, 3)):
            start = rng.randrange(len(line))
            line[start : start + rng.randint(0, 2)] = bytes(rng.choices(alphabet, k=rng.randint(0, 2)))
        lines += [bytes(line)] if i % 4 else [line_with(prompt=f"good {i}"), bytes(line)]
    path = tmp_path / "mutated.jsonl"
    path.write_bytes(b"\n".join(lines))
    kept, report = read_records(path, skip_bad=True)

    refused = {line.line for line in report.skipped}
    accepted = [json.loads(line) for number, line in enumerate(lines, 1) if number not in refused]
    assert kept == [Record(_tuple(f["input"]), f["prompt"], _tuple(f["answer"])) for f in accepted]
    good = [record.prompt for record in kept if record.prompt.startswith("good")]
    assert good == [f"good {i}" for i in range(0, count, 4)]
    assert 0.3 * count < len(refused) < count
