"""The comparison of systems: its rows, what the next start takes over, and what is refused."""

import csv
import json
import os
import sys

import numpy as np
import pytest
import train_fixtures

from comi_jax import compare
from comi_jax.evaluation import comparison

quick_compilation, world = train_fixtures.quick_compilation, train_fixtures.world
SYSTEMS = "--systems=closed_book,truncation_tail,snapkv"


def run(world, output, *more):
    compare.main([f"--checkpoint={world.run}", f"--output={output}", *more])
    return json.loads((output / "results.json").read_text())


def bytes_of(output):
    names = ("results.json", "table.csv", "table.tex", "accuracy.png", "costs.png")
    return {name: (output / name).read_bytes() for name in names}


@pytest.fixture(scope="module")
def made(world, tmp_path_factory):
    output = tmp_path_factory.mktemp("compared") / "out"
    return output, run(world, output, SYSTEMS, "--rates=2,4,8")


def test_every_system_has_a_row_at_every_rate(world, made):
    output, found = made
    rows = {(row["name"], row["rate"]): row for row in found["rows"]}
    rated = [(name, rate) for name in ("comi", "truncation_tail", "snapkv") for rate in (2, 4, 8)]
    assert set(rows) == {*rated, ("closed_book", None)}
    assert [key for key, row in rows.items() if row["untrained"]] == [("comi", 8)]
    for (name, rate), row in rows.items():
        suffix = f"_{rate}x" if rate else ""
        lines = (output / "predictions" / f"{name}{suffix}.jsonl").read_text().splitlines()
        predictions = [json.loads(line) for line in lines]
        assert row["result"]["n"] == len(predictions) == 6
        if rate:
            assert all(p["memory_vectors"] <= -(-p["context_tokens"] // rate) for p in predictions)
            mean = np.mean([p["context_tokens"] / p["memory_vectors"] for p in predictions])
            assert row["result"]["account"]["ratio"]["mean"] == pytest.approx(mean)
    assert {(row["name"], row["rate"]): row["command"] for row in found["rows"]}["snapkv", 4] == (
        f"python -m comi_jax.compare --checkpoint {world.run} --systems=snapkv --rates=4"
    )
    about = {"data": [str(world.dev)], "n": 6, "rates": [2, 4, 8], "language_model": str(world.lm), "trained_by": []}
    assert found["about"] == about


def test_differences_are_paired(made):
    output, found = made

    def f1(name):
        lines = (output / "predictions" / f"{name}.jsonl").read_text().splitlines()
        return np.array([json.loads(line)["f1_max"] for line in lines])

    rows = {(row["name"], row["rate"]): row["differences"] for row in found["rows"]}
    assert (
        rows["comi", 2] == {}
        and list(rows["snapkv", 4]) == ["4"]
        and list(rows["closed_book", None]) == ["2", "4", "8"]
    )
    for name, file, rate in (("snapkv", "snapkv_4x", 4), ("closed_book", "closed_book", 2)):
        minus = f1(file) - f1(f"comi_{rate}x")
        value = rows[name, rate if name == "snapkv" else None][str(rate)]["f1_max"]
        assert value["mean"] == pytest.approx(minus.mean())
        assert minus.min() <= value["low"] <= value["mean"] <= value["high"] <= minus.max()


def test_the_table_is_in_every_form(made, capsys):
    output, found = made
    lines = list(csv.DictReader((output / "table.csv").read_text().splitlines()))
    assert [(line["system"], line["rate"]) for line in lines] == [
        (row["name"], str(row["rate"] or "")) for row in found["rows"]
    ]
    for line, row in zip(lines, found["rows"], strict=True):
        assert float(line["em"]) == row["result"]["metrics"]["em"]["mean"]
        assert float(line["entries"]) == row["result"]["account"]["entries"]
        assert (line["em_difference"] == "") == (row["name"] in ("comi", "closed_book"))
    text = (output / "table.tex").read_text()
    assert text.count(r" \\") == 1 + len(lines) and "COMI & 2 & " in text and " & 8* & " in text
    assert (output / "accuracy.png").read_bytes().startswith(b"\x89PNG")


def test_the_next_start_takes_over_what_is_done_and_gives_the_same_table(world, made, monkeypatch, capsys):
    output, _ = made
    before, evaluate, again = bytes_of(output), comparison.evaluate, []
    monkeypatch.setattr(comparison, "evaluate", lambda *a, **k: again.append(a[0].name) or evaluate(*a, **k))
    run(world, output, SYSTEMS, "--rates=2,4,8")
    assert bytes_of(output) == before and again == []
    (output / "predictions" / "snapkv_4x.json").unlink()
    run(world, output, SYSTEMS, "--rates=2,4,8")
    assert bytes_of(output) == before and again == ["snapkv"]
    capsys.readouterr()
    monkeypatch.setattr(comparison, "evaluate", evaluate)
    run(world, output, "--systems=truncation_tail", "--rates=2", "--limit=5")
    assert "truncation_tail_2x.json is of other records: evaluated again" in capsys.readouterr().out


def test_a_row_that_cannot_be_is_refused_and_the_others_are_there(world, tmp_path, capsys):
    found = run(world, tmp_path / "out", "--systems=streaming,truncation_head", "--rates=8,40")
    refused = {(row["name"], row["rate"]): row["refused"] for row in found["rows"] if row["refused"]}
    assert set(refused) == {("streaming", 8), ("streaming", 40), ("truncation_head", 40)}
    assert (
        "fewer than 4 sinks" in refused["streaming", 8] and "fewer than the rate 40" in refused["truncation_head", 40]
    )
    assert "StreamingLLM, positions unshifted at 8: streaming cannot answer 6 of 6" in capsys.readouterr().out
    line = [row for row in csv.DictReader((tmp_path / "out" / "table.csv").read_text().splitlines()) if row["refused"]]
    assert len(line) == 3 and line[0]["em"] == ""


def test_without_a_checkpoint_nothing_is_compared_with(world, tmp_path, capsys):
    compare.main(
        ["--config=qwen2", "--systems=closed_book,original", f"--output={tmp_path / 'out'}", f"--data={world.dev}"]
        + ["--limit=2", f"model.path={world.lm}", "model.dtype=float32", "generation.max_new_tokens=4"]
    )
    rows = json.loads((tmp_path / "out" / "results.json").read_text())["rows"]
    assert [row["differences"] for row in rows] == [{}, {}] and "paired" not in capsys.readouterr().out


def test_llmlingua2_is_run_once_a_text(world, tmp_path):
    python = tmp_path / "python"
    python.write_text(
        f"#!{sys.executable}\nimport json, sys\n"
        f"open({str(tmp_path / 'calls')!r}, 'a').write(' '.join(sys.argv[1:]) + '\\n')\n"
        "for line in sys.stdin:\n    row = json.loads(line)\n"
        "    print(json.dumps({'key': row['key'], 'text': row['context'][:30]}))\n"
    )
    os.chmod(python, 0o755)
    for _ in range(2):
        found = run(world, tmp_path / "out", f"--llmlingua2={python} tiny", "--systems=llmlingua2", "--rates=4")
    row = found["rows"][-1]
    assert row["name"] == "llmlingua2" and not row["refused"] and 0 < row["result"]["account"]["entries"] < 12
    (call,) = (tmp_path / "calls").read_text().splitlines()
    assert call.endswith("llmlingua2_program.py tiny")


@pytest.mark.parametrize(
    "more, message",
    [
        (["--systems=bm52"], "there is no system 'bm52'; the nearest are bm25"),
        (["--config=tiny"], "pass either --config=NAME, to train the systems, or --checkpoint=DIR"),
        (["model.path=x"], "model.path=x: settings come from the checkpoints"),
        (["--data=none.jsonl"], "none.jsonl: does not exist"),
    ],
)
def test_what_cannot_be_is_refused(world, tmp_path, more, message):
    with pytest.raises(SystemExit) as refused:
        run(world, tmp_path / "out", "--systems=original", *more)
    assert str(refused.value.code).startswith("error: ") and message in refused.value.code


def test_one_run_of_a_system_alone(world, tmp_path):
    with pytest.raises(SystemExit, match="is a second run of system=comi"):
        compare.main(["--checkpoint", str(world.run), str(world.run), f"--output={tmp_path}"])


def test_settings_behind_several_entries_of_data_are_settings():
    words = [
        "--config=qwen2",
        "--data",
        "a.jsonl",
        "synthetic-documents:two_hop=0",
        "train.steps=3",
        "--limit=2",
        "system=x",
    ]
    given = compare.parser().parse_intermixed_args(words)
    compare.settings_apart(given)
    assert given.data == ["a.jsonl", "synthetic-documents:two_hop=0"]
    assert given.overrides == ["system=x", "train.steps=3"]
