"""Data files as they are found: packed, of other formats, damaged; each is read exactly, or told what it is."""

import bz2
import gzip
import io
import json
import lzma
import tarfile
import zipfile

import datasets
import pyarrow as pa
import pytest
import test_adapters
from pyarrow import parquet

from comi_jax.data import adapters
from comi_jax.data.records import DataError, Record, numbered_records, read_records

ROWS = [{"input": f"document {i} é", "prompt": f"question {i}", "answer": [f"a{i}", "b"]} for i in range(3)]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS).encode()
RECORDS = [Record((row["input"],), row["prompt"], tuple(row["answer"])) for row in ROWS]
BOM = b"\xef\xbb\xbf"


def zstd(content):
    return pa.Codec("zstd").compress(content, asbytes=True)


PACKED = {"gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress, "zst": zstd}


def read(tmp_path, content, name="x.jsonl", **options):
    path = tmp_path / name
    path.write_bytes(content)
    return read_records(path, **options)[0]


def refusal(tmp_path, content, name="x.jsonl", **options):
    with pytest.raises(DataError) as raised:
        read(tmp_path, content, name, **options)
    said = str(raised.value)
    assert said.startswith(str(tmp_path / name)) and said.isprintable()
    return said.removeprefix(str(tmp_path / name))


# --- packed -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", PACKED)
@pytest.mark.parametrize("mark", [b"", BOM])
def test_every_compression_is_told_by_content_and_may_be_of_several_streams(kind, mark, tmp_path):
    pack = PACKED[kind]
    assert read(tmp_path, pack(mark + LINES)) == RECORDS
    half = len(LINES) // 2
    padding = b"" if kind == "zst" else bytes(1024)  # as tapes and xz have it
    content = pack(mark + LINES[:half]) + pack(LINES[half:]) + padding
    assert read(tmp_path, content, "x.txt") == RECORDS


@pytest.mark.parametrize("kind", PACKED)
def test_what_is_cut_short_or_followed_by_garbage_is_refused(kind, tmp_path):
    whole = PACKED[kind](LINES)
    for content in (whole[: len(whole) // 2], whole[:-3], whole + b"garbage", whole + whole[: len(whole) - 3]):
        for skip_bad in (False, True):
            said = refusal(tmp_path, content, skip_bad=skip_bad)
            assert "the file is damaged or cut short and cannot be read from here on" in said


@pytest.mark.parametrize("kind", PACKED)
def test_what_is_packed_twice_is_told(kind, tmp_path):
    said = refusal(tmp_path, gzip.compress(PACKED[kind](LINES)))
    assert said == ": is compressed twice; decompress it once"


def archive(kind):
    inside = io.BytesIO()
    if kind == "zip":
        with zipfile.ZipFile(inside, "w") as file:
            file.writestr("x.jsonl", LINES)
    else:
        with tarfile.open(fileobj=inside, mode="w") as file:
            file.addfile(tarfile.TarInfo("x.jsonl"))
    return inside.getvalue()


FOREIGN = {
    "zip": (archive("zip"), "is a zip archive; unpack it and name the files in it: unzip FILE"),
    "tar": (archive("tar"), "is a tar archive; unpack it"),
    "tar.gz": (gzip.compress(archive("tar")), "is a tar archive; unpack it"),
    "UTF-16": (
        LINES.decode().encode("utf-16"),
        "is text in UTF-16; make it UTF-8: iconv -f UTF-16 -t UTF-8 FILE > NEW",
    ),
    "UTF-16 without a mark": (
        LINES.decode().encode("utf-16-be"),
        "is text in UTF-16; make it UTF-8: iconv -f UTF-16BE",
    ),
    "UTF-32": (LINES.decode().encode("utf-32"), "is text in UTF-32"),
    "packed UTF-16": (bz2.compress(LINES.decode().encode("utf-16-le")), "is text in UTF-16; make it UTF-8"),
    "a pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "is a Git LFS pointer, not the data"),
    "a page": (b"<!DOCTYPE html>\n<html>", "is a web page, not data"),
    "Arrow": (b"ARROW1\0\0", "is an Arrow file; make it Parquet"),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_what_is_none_of_ours_is_told_what_it_is_and_what_to_do(name, tmp_path):
    content, expected = FOREIGN[name]
    assert refusal(tmp_path, content, skip_bad=True).startswith(f": {expected}")


HINTS = {
    "several lines": (b'{\n "input": "c"\n}', "; for an object over several lines: jq -c . FILE > FILE.jsonl"),
    "a list": (b"[\n{}\n]", "; for a file that is one list: jq -c '.[]' FILE > FILE.jsonl"),
    "Python": (b"{'input': 'c'}", "; it was printed by Python: write it with json.dumps"),
    "commas": (b'{"input": "c"},\n{}', "; remove the comma after the object"),
    "carriage returns": (
        LINES.replace(b"\n", b"\r"),
        r"; its lines end in a carriage return alone: tr '\\r' '\\n' < FILE",
    ),
    "prose": (b"Once upon a time, far away.\n", "; plain text has no questions: write one object per line with input,"),
    "CSV": (b"input,prompt,answer\na,b,c\n", "; the name of a CSV file must end in .csv"),
    "SQuAD": (b'{"version": "1.1", "data": [}', "; for a file of SQuAD: jq -c '.data[]' FILE > FILE.jsonl"),
}


@pytest.mark.parametrize("name", HINTS)
def test_a_file_that_is_nearly_json_lines_is_told_how_to_make_it(name, tmp_path):
    content, hint = HINTS[name]
    said = refusal(tmp_path, content)
    assert said.startswith(", line 1: broken JSON at character") and hint.replace("\\\\", "\\") in said


def test_a_byte_order_mark_is_left_out_at_the_beginning_alone(tmp_path):
    assert read(tmp_path, BOM + LINES) == RECORDS
    assert "line 2: broken JSON at character 1 (Unexpected UTF-8 BOM" in refusal(
        tmp_path, LINES.splitlines()[0] + b"\n" + BOM + LINES
    )
    assert refusal(tmp_path, BOM) == ": has no records; expected one JSON object per line"


# --- tables -----------------------------------------------------------------------------------------------------------


def table(path, rows, **options):
    parquet.write_table(pa.Table.from_pylist(rows), path, **options)
    return path


def test_parquet_is_read_as_the_lines_of_json_are(tmp_path):
    path = table(tmp_path / "x", ROWS * 50, row_group_size=7)  # told by its content
    assert read_records(path)[0] == RECORDS * 50
    datasets.Dataset.from_list(ROWS).to_parquet(tmp_path / "hub.parquet")
    assert read_records(tmp_path / "hub.parquet")[0] == RECORDS


@pytest.mark.parametrize(
    "change, reason",
    [
        ({"answer": None}, 'field "answer" is null; expected text or a list of texts'),
        ({"answer": []}, 'field "answer" is an empty list'),
        ({"answer": ["a", None]}, 'field "answer", item 2 of 2, is null; expected text'),
        ({"prompt": " "}, 'field "prompt" is blank'),
        ({"input": ""}, 'field "input" is empty'),
    ],
)
def test_a_missing_value_of_parquet_is_refused_with_file_and_row(change, reason, tmp_path):
    rows = [*ROWS, ROWS[0] | change, ROWS[1]]
    path = table(tmp_path / "x.parquet", rows)
    with pytest.raises(DataError) as raised:
        read_records(path)
    assert str(raised.value).startswith(f"{path}, row 4: {reason}") and (raised.value.line, raised.value.unit) == (
        4,
        "row",
    )
    kept, report = read_records(path, skip_bad=True)
    assert kept == [*RECORDS, RECORDS[1]] and str(report.skipped[0]).startswith(f"{path}, row 4: {reason}")


def test_parquet_of_published_schemas_and_of_other_types(tmp_path):
    squad = {"id": "1", "context": "A goat.", "question": "What?", "answers": {"text": ["goat"], "answer_start": [2]}}
    path = table(tmp_path / "squad.parquet", [squad])
    assert list(numbered_records(path, adapters.adapt)) == [(1, Record(("A goat.",), "What?", ("goat",)))]
    path = table(tmp_path / "bytes.parquet", [{"input": b"c", "prompt": "q", "answer": "a"}])
    with pytest.raises(DataError, match='row 1: field "input" is a value of type bytes; expected text'):
        read_records(path)


@pytest.mark.parametrize("name", ["hotpotqa on the hub", "2wikimqa as JSON in a text", "nq", "narrativeqa", "multinews",
    "musique", "triviaqa", "longbench", "quality on the hub", "squad", "flat narrativeqa", "flat list"])  # fmt: skip
def test_published_sets_are_the_same_as_parquet_and_as_json_lines(name, tmp_path):
    fields, record = test_adapters.READ[name]
    fields = {
        key: value for key, value in fields.items() if key not in ("supporting_facts", "evidences")
    }  # mixed lists
    datasets.Dataset.from_list([fields, fields]).to_parquet(tmp_path / "x.parquet")
    assert list(numbered_records(tmp_path / "x.parquet", adapters.adapt)) == [(1, record), (2, record)]


def test_a_damaged_parquet_file_is_refused(tmp_path):
    whole = table(tmp_path / "whole.parquet", ROWS).read_bytes()
    for content in (whole[:-5], whole[: len(whole) // 2], b"PAR1", b"PAR1" + bytes(100) + b"PAR1"):
        assert "the file is damaged or cut short" in refusal(tmp_path, content, "x.parquet", skip_bad=True)
    twice = pa.table([["c"], ["q"], ["a"], ["b"]], names=["input", "prompt", "answer", "answer"])
    parquet.write_table(twice, tmp_path / "twice.parquet")
    with pytest.raises(DataError, match='twice.parquet: has 2 columns "answer"; expected one'):
        read_records(tmp_path / "twice.parquet")


def test_csv_is_read_letter_by_letter(tmp_path):
    content = BOM + b'input,prompt,answer,id\r\n"a, ""b""\nc",q,1984,1\r\n\r\nNA,null,"[""x"", ""None""]",2\r\n'
    expected = [Record(('a, "b"\nc',), "q", ("1984",)), Record(("NA",), "null", ("x", "None"))]
    assert read(tmp_path, content, "x.csv") == expected
    assert read(tmp_path, gzip.compress(content), "X.CSV.gz") == expected
    assert read(tmp_path, b"prompt\tanswer\tinput\nq, r\ta\tc\n", "x.tsv") == [Record(("c",), "q, r", ("a",))]
    long = "goat " * 40_000  # more than Python's csv takes unasked
    assert read(tmp_path, f"input,prompt,answer\n{long},q,a\n".encode(), "x.csv")[0].context == (long,)


@pytest.mark.parametrize(
    "content, reason",
    [
        (b'input,prompt,answer\n"a\nb",q,a\nc,q,\n', 'line 4: field "answer" is empty'),
        (b"input,prompt,answer\na,q,a\nc,q\n", "line 3: the row has 2 cells for 3 columns"),
        (
            b"input,prompt,answer\na,q,\"['x' 'y']\"\n",
            "line 2: column \"answer\" holds \"['x' 'y']\", a list or an object",
        ),
        (b"input,prompt,answer\na,q,{'text': array(['x'])}\n", 'line 2: column "answer" holds "{'),
        (b'input,prompt,answer\na,q,a\nb,"q"r,a\n', "line 3: broken CSV ('"),
        (b'input,prompt,answer\na,q,a\nb,"q,a\nc,q,a\n', "line 3: broken CSV (unexpected end of data)"),
        (b"input,prompt,answer\na,q,caf\xe9\n", "invalid UTF-8 (0xe9)"),
        (b"input,answer,answer\na,q,a\n", 'has 2 columns "answer"; expected one'),
        (b"input;prompt;answer\na;q;a\n", 'line 2: field "input" is missing; found "input;prompt;answer"'),
        (b"input,prompt,answer\n", "has no records"),
    ],
)
def test_a_broken_csv_file_is_refused_with_file_and_line(content, reason, tmp_path):
    assert reason in refusal(tmp_path, content, "x.csv")
