"""The paper's tables 2, 4 and 9 from the rows of a comparison."""

import csv
import io
import json

import numpy as np
import pytest
import train_fixtures

from comi_jax import compare
from comi_jax.errors import ConfigError
from comi_jax.evaluation import comparison_ablations, comparison_lengths, paper_figures, table_files
from comi_jax.evaluation.comparison import Row, place
from comi_jax.evaluation.comparison_seeds import joined
from comi_jax.serving.compressor import Comi
from comi_jax.training import contenders, series

quick_compilation, world = train_fixtures.quick_compilation, train_fixtures.world
MEASURES = ("em", "f1_max", "f1_first", "acc_subspan", "acc_subspan_firstline", "rougeL")


def row(at, name, rate, scores, seed=None, **more):
    """A row whose questions have ``scores``, with its predictions below ``at``."""
    made = Row(name, more.pop("title", name), rate, more.pop("untrained", False), {}, seed=seed, **more)
    account = {"entries": 4.0, "ratio": {"mean": 8.0, "min": 7.0, "max": 9.0}, "kv_bytes": 1, "ingest_flop": 1.0}
    value = {"mean": float(np.mean(scores)), "low": 0.0, "high": 1.0}
    result = {
        "n": len(scores), "records": "r", "metrics": dict.fromkeys(MEASURES, value),
        "account": account | {"question_flop": 1.0},
    }  # fmt: skip
    path = place(at, made)
    path.parent.mkdir(exist_ok=True)
    lines = [json.dumps(dict.fromkeys(MEASURES, score) | {"memory_vectors": i}) for i, score in enumerate(scores)]
    path.with_name(f"{path.name}.jsonl").write_text("\n".join(lines))
    return Row(**{**made.__dict__, "result": result})


def test_table_2_has_a_trained_and_a_switched_off_column(tmp_path):
    rows = [
        row(tmp_path, "comi", 8, [1, 1, 0, 1], 0, folder="a"),
        row(tmp_path, "comi", 8, [1, 1, 1, 1], 1, folder="b"),
        row(tmp_path, "without_fine", 8, [0, 1, 0, 0], 0),
        row(tmp_path, "without_fine", 8, [0, 0, 0, 1], 1),
        row(tmp_path, "alpha_fine_4", 8, [1, 1, 0, 1], 0, folder="a"),
        row(tmp_path, "without_fine_off", 8, [0, 0, 0, 0], 0),
        row(tmp_path, "without_fine_off", 8, [0, 1, 1, 1], 1),
    ]
    titles = {name: series.TRAINED[name].title for name in ("without_coarse", "without_fine", "alpha_fine_4")}
    table = comparison_ablations.table_2(joined(rows, tmp_path, "comi"), titles)
    assert [line["system"] for line in table.rows] == ["COMI", "without fine", "alpha_fine 4 (COMI's own)"]
    whole, fine, alpha = table.rows
    assert whole["EM, trained"]["mean"] == 0.875 and whole["EM, switched off"] is None
    assert (whole["EM, trained"]["low"], whole["EM, trained"]["high"]) == (0.75, 1.0)
    assert fine["EM, trained"]["mean"] == 0.25 and fine["EM, switched off"]["mean"] == 0.375
    assert fine["EM minus COMI, trained"]["mean"] == -0.625 and fine["EM minus COMI, switched off"]["mean"] == -0.5
    assert alpha["EM, switched off"] is None


def test_a_step_is_switched_off_on_the_checkpoint(world, tmp_path, monkeypatch):
    monkeypatch.setattr(contenders, "ABLATIONS", {"without_fine": series.ABLATIONS["without_fine"]})
    compare.main([f"--checkpoint={world.run}", f"--output={tmp_path}", "--table=2", "--rates=4"])
    found = json.loads((tmp_path / "table_2.json").read_text())
    assert [line["system"] for line in found["rows"]] == ["COMI", "without fine"]
    lines = (tmp_path / "predictions" / "without_fine_off_4x.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in world.dev.read_text().splitlines()]
    model = Comi.load(world.run, overrides=["compression.fine=false"])
    answers = model.answer(["\n".join(r["input"]) for r in records], [r["prompt"] for r in records], rate=4)
    assert [json.loads(line)["prediction"] for line in lines] == [answer.text for answer in answers]


def test_every_context_is_in_one_bin():
    lengths = [1, 10, 11, 20, 21, 500]
    assert comparison_lengths.bins_of(lengths, (10, 20, 30, 40)) == {
        "1 to 10": [0, 1], "11 to 20": [2, 3], "21 to 30": [4], "31 to 40": [], "over 40": [5],
    }  # fmt: skip
    with pytest.raises(ConfigError, match="the bins 20,10 do not rise"):
        comparison_lengths.bins_of(lengths, (20, 10))


def test_table_9_counts_its_questions_and_what_was_truncated(tmp_path):
    rows = [
        row(tmp_path, "comi", 16, [1, 0, 0, 1], 0, title="COMI", untrained=True),
        row(tmp_path, "comi", 16, [1, 1, 0, 0], 1, title="COMI", untrained=True),
        row(tmp_path, "original", None, [0, 0, 1, 1]),
        Row("snapkv", "SnapKV", 16, False, {}, "its window is too long"),
    ]
    lengths = [5, 12, 14, 90]
    groups = comparison_lengths.bins_of(lengths, (10, 20, 50))
    table = comparison_lengths.by_group("9", "context tokens", rows, tmp_path, groups, lengths, 13)
    found = [(r["system"], r["rate"], r["context tokens"], r["n"], r["EM, strict"]["mean"]) for r in table.rows]
    assert found == [
        ("COMI", "16*", "1 to 10", 1, 1.0), ("COMI", "16*", "11 to 20", 2, 0.25), ("COMI", "16*", "over 50", 1, 0.5),
        ("original", "-", "1 to 10", 1, 0.0), ("original", "-", "11 to 20", 2, 0.5),
        ("original", "-", "over 50", 1, 1.0),
    ]  # fmt: skip
    assert [r["truncated"] for r in table.rows] == [0, 1, 1] * 2 and table.rows[0]["paper, %"].startswith("22.79 (F1")
    assert table.rows[1]["entries"] == 1.5
    assert "SnapKV at 16: its window is too long" in table.notes
    assert "no question has a context of 21 to 50 tokens" in table.notes
    assert paper_figures.NOT_COMPARABLE in table.notes


def test_table_4_tells_the_data_apart(world, tmp_path):
    data = train_fixtures.write(tmp_path / "two.jsonl", train_fixtures.records(3, seed=2))
    output = tmp_path / "out"
    words = ["--table=4", "--systems=original", "--rates=4", "--data", str(world.dev), str(data)]
    compare.main([f"--checkpoint={world.run}", f"--output={output}", *words])
    found = json.loads((output / "table_4.json").read_text())
    rows = [(line["system"], line["data"], line["n"]) for line in found["rows"]]
    assert rows == [(s, str(d), n) for s in ("COMI", "Original prompt") for d, n in ((world.dev, 6), (data, 3))]
    predictions = (output / "predictions" / "original.jsonl").read_text().splitlines()
    f1 = np.mean([json.loads(line)["f1_max"] for line in predictions[6:]])
    assert found["rows"][3]["F1, best reference"]["mean"] == pytest.approx(f1)


def test_csv_and_latex_have_every_cell():
    value = {"mean": 0.5, "low": 0.25, "high": 0.75}
    rows = [{"system": "a & b", "EM": value, "s": 0.123456}, {"system": "c", "EM": None, "s": None}]
    lines = list(csv.reader(io.StringIO(table_files.as_csv(rows))))
    assert lines == [
        ["system", "EM", "EM, low", "EM, high", "s"], ["a & b", "0.5", "0.25", "0.75", "0.123456"],
        ["c", "", "", "", ""],
    ]  # fmt: skip
    text = table_files.as_latex(rows)
    assert r"a \& b & 50.00 {\scriptsize [25.00, 75.00]} & 0.123 \\" in text and r"c & -- & -- \\" in text


@pytest.mark.parametrize(
    "more, message",
    [
        (["--table=2", "--systems=bm25"], "bm25 is not COMI without a step; table 2 has comi, without_coarse"),
        (["--table=9", "--bins=20,10"], "the bins 20,10 do not rise"),
    ],
)
def test_what_is_no_table_is_refused(world, tmp_path, more, message):
    with pytest.raises(SystemExit) as refused:
        compare.main([f"--checkpoint={world.run}", f"--output={tmp_path}", *more])
    assert str(refused.value.code).startswith("error: ") and message in refused.value.code
