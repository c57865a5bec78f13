"""Words of data.train become records: files, globs, folders, hub datasets, and how much of each."""

import gzip
import json
import subprocess
import sys

import datasets
import numpy as np
import pytest

from comi_jax import overrides
from comi_jax.config import Config
from comi_jax.data import sources
from comi_jax.data.records import DataError, Record
from comi_jax.errors import ConfigError

NEWS = {"document": "First. ||||| Second.", "summary": "Both."}
NEWS_RECORD = Record(("First.", "Second."), sources.adapters.SUMMARIZE, ("Both.",))


def write(path, prompts):
    lines = [json.dumps({"input": "c", "prompt": prompt, "answer": "a"}).encode() for prompt in prompts]
    path.write_bytes((gzip.compress if path.suffix == ".gz" else bytes)(b"\n".join(lines)))
    return str(path)


def prompts(words, **options):
    return [record.prompt for record in sources.read(words, "train", **options)[0]]


@pytest.mark.parametrize(
    "word, expected",
    [
        ("a.jsonl", ("a.jsonl", "", 1.0)),
        ("hotpotqa:/x/a.jsonl.gz@0.5", ("/x/a.jsonl.gz", "hotpotqa", 0.5)),
        ("nq:part-*.jsonl@2", ("part-*.jsonl", "nq", 2.0)),
        ("hf://deepmind/narrativeqa#test", ("hf://deepmind/narrativeqa#test", "", 1.0)),
        ("narrativeqa-summary:hf://deepmind/narrativeqa@3", ("hf://deepmind/narrativeqa", "narrativeqa-summary", 3.0)),
        ("./nq:a@2@1", ("./nq:a@2", "", 1.0)),
        ("me@home.jsonl", ("me@home.jsonl", "", 1.0)),
    ],
)
def test_a_word_is_a_schema_a_place_and_a_weight(word, expected):
    source = sources.parse(word)
    assert (source.place, source.schema, source.weight) == expected


@pytest.mark.parametrize(
    "word, message",
    [
        ("hotpot:a.jsonl", "unknown schema; known schemas: comi, hotpotqa, 2wikimqa, narrativeqa, .*, nq"),
        ("a.jsonl@0", "'a.jsonl@0' has weight 0; it must be above 0 and at most 100"),
        ("a.jsonl@101", "has weight 101; it must be above 0"),
        ("nq:", "'nq:' has no file, folder or data set"),
        ("nq:@2", "'nq:@2' has no file, folder or data set"),
    ],
)
def test_a_word_that_names_nothing_is_refused(word, message):
    with pytest.raises(ConfigError, match=message):
        sources.parse(word)


def test_files_and_globs_come_in_order(tmp_path):
    b, a = write(tmp_path / "b.jsonl", "34"), write(tmp_path / "a.jsonl.gz", "12")
    odd = write(tmp_path / "c[1].jsonl", "5")
    assert prompts([b, a]) == list("3412")
    records, report = sources.read([str(tmp_path / "[ab].json*"), odd], "train")
    assert [record.prompt for record in records] == list("12345")
    assert (report.found, report.taken) == ((4, 1), (4, 1))
    with pytest.raises(DataError, match="none-.*: matches no file"):
        prompts([str(tmp_path / "none-*.jsonl")])


def test_a_bad_line_is_named_or_listed_and_a_named_schema_is_obeyed(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text(json.dumps(NEWS) + "\n{}\n")
    with pytest.raises(DataError, match="x.jsonl, line 2: found no field at all; expected input, prompt"):
        prompts([str(path)])
    records, report = sources.read([f"multinews:{path}"], "train", skip_bad=True)
    assert records == [NEWS_RECORD]
    assert [str(line) for line in report.skipped] == [
        f'{path}, line 2: field "document" is missing; found no field at all'
    ]
    with pytest.raises(DataError, match='line 1: field "input" is missing'):
        prompts([f"comi:{path}"])


def test_a_weight_says_how_often_an_epoch_has_an_example(tmp_path):
    a, b = write(tmp_path / "a.jsonl", "0123456789"), write(tmp_path / "b.jsonl", "xy")
    drawn = prompts([f"{a}@2.5", b], seed=1)
    assert drawn[:20] == list("0123456789") * 2 and drawn[25:] == ["x", "y"]
    assert drawn[20:25] == sorted(set(drawn[20:25])) and set(drawn[20:25]) < set("0123456789")
    assert drawn == prompts([f"{a}@2.5", b], seed=1) != prompts([f"{a}@2.5", b], seed=2)
    assert len(prompts([f"{a}@0.31", b])) == 3 + 2
    with pytest.raises(ConfigError, match="give no example; raise their weights"):
        prompts([f"{b}@0.1"])


def test_every_share_is_as_likely_to_take_any_example():
    counts = sum(np.bincount(sources.draw(10, 0.3, np.random.default_rng(i)), minlength=10) for i in range(2000))
    assert counts.sum() == 6000 and abs(counts - 600).max() < 120


def test_the_fingerprint_is_of_the_records_and_their_order(tmp_path):
    a, packed, b = (write(tmp_path / name, text) for name, text in (("a", "12"), ("a.gz", "12"), ("b", "21")))
    prints = [sources.read([path], "train")[1].fingerprint for path in (a, packed, b)]
    assert prints[0] == prints[1] != prints[2]
    joined, apart = sources.Fingerprint(), sources.Fingerprint()
    joined.add(Record(("ab",), "c", ("d",)))
    apart.add(Record(("a", "b"), "c", ("d",)))
    assert str(joined) != str(apart)
    _, report = sources.read([a, b], "train")
    assert str(report) == f"4 records, fingerprint {report.fingerprint}: 2 from {a}, 2 from {b}"


def test_hub_datasets_are_read_row_by_row(monkeypatch):
    asked = []

    def load(name, config, split):
        asked.append((name, config, split))
        return datasets.Dataset.from_list([NEWS, NEWS | {"summary": None}])

    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(DataError, match='^hf://o/n/c#s, line 2: field "summary" is null; expected text'):
        sources.read(["hf://o/n/c#s"], "train")
    records, report = sources.read(["hf://o/n@2"], "eval", skip_bad=True)
    assert records == [NEWS_RECORD] * 2 and len(report.skipped) == 1
    sources.read(["hf://name"], "train", skip_bad=True)
    assert asked == [("o/n", "c", "s"), ("o/n", None, "validation"), ("name", None, "train")]


def test_a_hub_that_cannot_be_reached_is_one_sentence():
    """The tests run with the hub off line."""
    with pytest.raises(
        DataError, match="^hf://o/n: cannot be loaded from the Hugging Face hub .*; check name"
    ) as raised:
        sources.read(["hf://o/n"], "train")
    assert str(raised.value).isprintable()


def test_json_lines_never_load_datasets(tmp_path):
    path = write(tmp_path / "a.jsonl", "1")
    code = f"import sys; from comi_jax.data import sources; sources.read([{path!r}], 'train')"
    code += "; print('datasets' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"


# --- paths ------------------------------------------------------------------------------------------------------------


def test_a_path_that_is_there_is_no_pattern_in_any_of_its_parts(tmp_path):
    for folder in ("run[1]", "run1", "deep*"):
        (tmp_path / folder / "a[b]").mkdir(parents=True)
    first, second = (write(tmp_path / "run[1]" / f"part-{n}.jsonl", str(n)) for n in (1, 2))
    other = write(tmp_path / "run1" / "part-1.jsonl", "7")
    inner = write(tmp_path / "deep*" / "a[b]" / "x?.jsonl", "3")

    def places(pattern):
        return sources.files(sources.parse(str(pattern)), "train")

    assert places(tmp_path / "run[1]" / "part-*.jsonl") == (first, second)
    assert places(tmp_path / "run[1]" / "part-1.jsonl") == (first,)
    assert places(tmp_path / "run?" / "part-*.jsonl") == (other,)
    assert places(tmp_path / "run*" / "part-1.jsonl") == (other, first)
    assert places(tmp_path / "*" / "a[b]" / "x?.jsonl") == places(tmp_path / "deep*" / "**" / "x?.jsonl") == (inner,)
    assert places(tmp_path / "**" / "*.jsonl") == tuple(sorted((first, second, other, inner)))
    with pytest.raises(DataError, match="matches no file"):
        places(tmp_path / "run[1]" / "a*" / "part-[0-9].jsonl")


def test_relative_paths_and_home_are_found(tmp_path, monkeypatch):
    (tmp_path / "home").mkdir()
    write(tmp_path / "home" / "a.jsonl", "1")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    assert prompts(["~/a.jsonl"]) == prompts(["comi:~/*.jsonl@1"]) == prompts(["home/*.jsonl"]) == ["1"]
    assert sources.parse("hf://~/x").place == "hf://~/x"


def test_a_comma_in_a_path_is_written_with_a_backslash(tmp_path):
    path = write(tmp_path / "a,b.jsonl", "12")
    setting = f"data.train={path}"
    with pytest.raises(ConfigError, match=r"a comma separates entries; .* a backslash: .*/a\\,b\.jsonl$"):
        prompts(overrides.override(Config(), [setting]).data.train)
    words = overrides.override(Config(), [setting.replace(",", "\\,") + f"@1,{path}".replace(",b", "\\,b")]).data.train
    assert words == (f"{path}@1", path) and prompts(words) == list("1212")
    assert overrides.override(Config(), ["compression.rates=4,8"]).compression.rates == (4, 8)


def test_fields_of_ones_own_are_read_from_every_word_that_has_them(tmp_path):
    own, news = tmp_path / "own.jsonl", tmp_path / "news.jsonl"
    own.write_text(json.dumps({"passage": "c", "q": "q", "gold": "a"}) + "\n")
    news.write_text(json.dumps(NEWS) + "\n")
    fields = ("context:passage", "question:q", "answer:gold")
    records, _ = sources.read([str(own), str(news)], "train", fields=fields)
    assert records == [Record(("c",), "q", ("a",)), NEWS_RECORD]
    with pytest.raises(DataError, match=r"data.fields=context:passage,question:q,answer:gold$"):
        sources.read([str(own)], "train")
    with pytest.raises(DataError, match='line 1: field "input" is missing'):  # a schema that is named is obeyed
        sources.read([f"comi:{own}"], "train", fields=fields)
