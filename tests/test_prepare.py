"""A mixture is written once, whole or not at all, with the numbers that tell what is in it."""

import fcntl
import gzip
import json
import os
import shutil

import pytest
import train_fixtures
from test_adapters import HOTPOT, NEWS, STORY

from comi_jax import prepare
from comi_jax.data import sources
from comi_jax.data.mixture import NAMED, _there_already
from comi_jax.data.records import DataError
from comi_jax.errors import ConfigError


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    train_fixtures.tokenizer().save_pretrained(folder)
    return folder


def ask(i, answer="a key"):
    return {
        "input": [f"the red box holds {answer} .", f"in {i} ."],
        "prompt": "what does the red box hold ?",
        "answer": answer,
    }


@pytest.fixture
def run(tmp_path, tokenizer, capsys):
    """The command on files in ``tmp_path``: what it printed, and its error if it ended with one."""

    def run(*words, output=tmp_path / "out"):
        error = None
        try:
            prepare.main(["--config=qwen2", f"model.tokenizer={tokenizer}", f"--output={output}", *words])
        except SystemExit as ended:
            error = ended.code
        return capsys.readouterr().out, error

    return run


def write(path, rows):
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def report(tmp_path):
    return json.loads((tmp_path / "out" / "report.json").read_text())


def test_a_mixture_of_schemas_is_written_and_trained_on(run, tmp_path):
    ours = write(tmp_path / "ours.jsonl", [ask(i) for i in range(8)])
    mixed = write(tmp_path / "mixed.jsonl", [HOTPOT, STORY, NEWS])
    dev = write(tmp_path / "dev.jsonl", [ask(99)])
    printed, error = run(f"data.train={ours}@0.5,{mixed}", f"data.eval={dev}", "data.examples_per_source=6")
    assert error is None
    with gzip.open(tmp_path / "out" / "train.jsonl.gz", "rt") as file:
        lines = [json.loads(line) for line in file]
    assert len(lines) == 6 and all(line in [ask(i) | {"answer": ["a key"]} for i in range(8)] for line in lines[:3])
    records, mixture = sources.read([str(tmp_path / "out")], "train")
    assert [sources.to_line(record) for record in records] == [json.dumps(x, ensure_ascii=False) + "\n" for x in lines]
    assert sources.read([str(tmp_path / "out")], "eval")[0][0].context[1] == "in 99 ."

    made = report(tmp_path)
    first, second = made["splits"]["train"]["sources"]
    assert mixture.fingerprint == made["splits"]["train"]["fingerprint"] and mixture.fingerprint in printed
    assert made["fingerprint"] in printed
    assert (first["written"], first["in_context"], first["dropped"]) == (3, 3, {"was not drawn": [5]})
    assert first["tokens"] == {"context": [10] * 5, "query": [7] * 5, "answer": [3] * 5}  # with the end of sequence
    assert (second["written"], second["in_context"]) == (3, 1)  # Mark; neither yes nor what both say
    assert second["tokens"]["query"][0] == 3 and "100.0%" in printed


def test_answers_are_found_whatever_their_case_and_spacing(run, tmp_path):
    rows = [ask(1) | {"answer": answer} for answer in (["coin", "A\n KEY"], "a coin", "red  BOX")]
    run(f"data.train={write(tmp_path / 'x.jsonl', rows)}")
    assert [row["in_context"] for row in report(tmp_path)["splits"]["train"]["sources"]] == [
        1
    ]  # one context, one question
    shutil.rmtree(tmp_path / "out")
    rows = [row | {"input": f"the red box holds a key . {i}"} for i, row in enumerate(rows)]
    run(f"data.train={write(tmp_path / 'x.jsonl', rows)}")
    assert [row["in_context"] for row in report(tmp_path)["splits"]["train"]["sources"]] == [2]


def test_what_is_dropped_is_counted_and_the_first_named(run, tmp_path):
    train = write(tmp_path / "a.jsonl", [ask(1), "?", ask(2), ask(1), ask(9), "{}", ask(3)])
    again = write(tmp_path / "b.jsonl", [ask(4), ask(3), *[ask(4)] * 9])
    dev = write(tmp_path / "dev.jsonl", [ask(9)])
    words = [f"data.train={train},{again}", f"data.eval={dev}"]
    _, error = run(*words)
    assert error.startswith(f"error: {train}, line 2: broken JSON at character 1")
    assert sorted(os.listdir(tmp_path)) == ["a.jsonl", "b.jsonl", "dev.jsonl"]  # nothing is left
    printed, error = run(*words, "--skip-bad-records")
    assert error is None
    a, b = report(tmp_path)["splits"]["train"]["sources"]
    assert (a["written"], b["written"]) == (3, 1)
    assert a["dropped"]["asks again"] == [1, f"{train}, line 4: as {train}, line 1"]
    assert a["dropped"]["is in data.eval"] == [1, f"{train}, line 5: as {dev}, line 1"]
    assert a["dropped"]["is no record"][0] == 2 and a["dropped"]["is no record"][1].startswith(
        f"{train}, line 2: broken"
    )
    assert b["dropped"]["asks again"][:2] == [10, f"{again}, line 2: as {train}, line 7"]
    assert len(b["dropped"]["asks again"]) == 1 + NAMED
    assert f"    {train}, line 4: as {train}, line 1" in printed


def test_the_second_time_it_is_there_already_and_other_settings_are_refused(run, tmp_path):
    data = write(tmp_path / "a.jsonl", [ask(i) for i in range(5)])
    run(f"data.train={data}")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    printed, error = run(f"data.train={data}")
    assert error is None and "has this mixture already" in printed and report(tmp_path)["fingerprint"] in printed
    _, error = run(f"data.train={data}", "train.seed=1", "data.max_query=9")
    assert (
        "mixture with other settings (max_query 512 -> 9; seed 0 -> 1); remove it or choose another --output" in error
    )
    write(data, [ask(i) for i in range(6)])
    _, error = run(f"data.train={data}")
    assert "other settings (bytes/" in error
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    write(data, [ask(i) for i in range(5)])
    first = report(tmp_path)
    run(f"data.train={data}", output=tmp_path / "other")  # the same bytes elsewhere
    for name in ("train.jsonl.gz", "report.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "other" / name).read_bytes()
    run(f"data.train={data}@0.6", "train.seed=1", output=tmp_path / "third")
    assert json.loads((tmp_path / "third" / "report.json").read_text())["fingerprint"] != first["fingerprint"]


def test_a_folder_of_something_else_is_left_alone(run, tmp_path):
    data = write(tmp_path / "a.jsonl", [ask(1)])
    (tmp_path / "out").mkdir()
    write(tmp_path / "out" / "mine.txt", ["x"])
    _, error = run(f"data.train={data}")
    assert "exists and is not a mixture of comi_jax.prepare; choose another --output" in error
    assert os.listdir(tmp_path / "out") == ["mine.txt"]
    (tmp_path / "out" / "mine.txt").unlink()
    assert run(f"data.train={data}")[1] is None  # an empty one may be there


@pytest.mark.parametrize(
    "words, message",
    [
        ([], "set data.train, and optionally data.eval"),
        (["data.train=synthetic"], "set data.train, and optionally data.eval"),
        (["data.train=nope.jsonl"], "nope.jsonl: does not exist"),
        (
            ["data.train={a}", "data.max_context=9", "data.on_long=refuse"],
            "a.jsonl, line 1: 10, 7 and 3 tokens of context",
        ),
        (["data.train={a}", "data.eval={a}"], "no example is left after filtering data.train="),
        (["data.train={a}@0.1"], "no example is left after filtering data.train="),
    ],
)
def test_what_cannot_be_prepared_is_one_sentence_and_leaves_nothing(run, tmp_path, words, message):
    a = write(tmp_path / "a.jsonl", [ask(1), ask(2)])
    _, error = run(*(word.format(a=a) for word in words))
    assert error.startswith("error: ") and message in error and error.count("\n") == 0
    assert os.listdir(tmp_path) == ["a.jsonl"]


def test_longer_ones_are_counted_where_they_will_be_cut(run, tmp_path):
    data = write(tmp_path / "a.jsonl", [ask(1), ask(2, "a coin a coin")])
    run(f"data.train={data}", "data.max_context=9", "data.max_answer=4")
    assert report(tmp_path)["splits"]["train"]["sources"][0]["longer"] == {"context": 2, "query": 0, "answer": 1}


@pytest.mark.fault
def test_a_full_disk_is_one_sentence_and_leaves_nothing(run, tmp_path, monkeypatch):
    data = write(tmp_path / "a.jsonl", [ask(i) for i in range(9)])
    to_line, left = sources.to_line, [4]

    def full(record):
        left[0] -= 1
        if left[0] < 0:
            raise OSError(28, "No space left on device", "train.jsonl.gz")
        return to_line(record)

    monkeypatch.setattr(sources, "to_line", full)
    _, error = run(f"data.train={data}")
    assert error.endswith("out cannot be written: No space left on device (train.jsonl.gz)")
    assert os.listdir(tmp_path) == ["a.jsonl"]
    left[0] = 99
    assert run(f"data.train={data}")[1] is None


@pytest.mark.fault
def test_what_a_killed_one_left_is_used_again_and_two_at_once_are_refused(run, tmp_path):
    data = write(tmp_path / "a.jsonl", [ask(1)])
    partial = tmp_path / ".out.partial"
    partial.mkdir()
    write(partial / "train.jsonl.gz", ["half"])
    handle = os.open(partial, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    _, error = run(f"data.train={data}")
    assert "another process is preparing" in error and (partial / "train.jsonl.gz").is_file()
    os.close(handle)
    assert run(f"data.train={data}")[1] is None
    assert sorted(os.listdir(tmp_path)) == ["a.jsonl", "out"]
    assert sorted(os.listdir(tmp_path / "out")) == ["report.json", "train.jsonl.gz"]


@pytest.mark.fault
def test_a_folder_that_was_changed_is_not_trained_on(run, tmp_path):
    run(f"data.train={write(tmp_path / 'a.jsonl', [ask(1), ask(2)])}")
    out = tmp_path / "out"
    with pytest.raises(DataError, match="eval.jsonl.gz: does not exist"):
        sources.read([str(out)], "eval")
    with gzip.open(out / "train.jsonl.gz", "wt") as file:
        file.write(json.dumps(ask(1)) + "\n")
    with pytest.raises(
        DataError,
        match="report.json: records fingerprint .* for train.jsonl.gz, but the file has .*; prepare the folder again",
    ):
        sources.read([str(out)], "train")
    (out / "train.jsonl.gz").unlink()
    with pytest.raises(DataError, match="train.jsonl.gz: does not exist"):
        sources.read([str(out)], "train")
    write(out / "eval.jsonl.gz", [ask(1)])
    with pytest.raises(DataError, match="report.json: is not a report of comi_jax.prepare with the split 'eval'"):
        sources.read([str(out)], "eval")
    (out / "report.json").write_text("{")
    with pytest.raises(ConfigError, match="is not a mixture"):
        _there_already(out, {})
