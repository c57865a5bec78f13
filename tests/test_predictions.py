"""Measuring a checkpoint: every prediction and every number that says how it was made are in the files."""

import json

import pytest
import train_fixtures

from comi_jax import evaluate
from comi_jax.config import MEASURES
from comi_jax.evaluation import metrics
from comi_jax.overrides import to_dict
from comi_jax.runs import lock, stored_weights
from comi_jax.runs.description import read_run

quick_compilation, world = train_fixtures.quick_compilation, train_fixtures.world


def run(world, output, *more, data=None):
    """``python -m comi_jax.evaluate``: its result and its predictions."""
    evaluate.main([f"--checkpoint={world.run}", f"--data={data or world.dev}", f"--output={output}", *more])
    (result,) = json.loads((output / "results.json").read_text()).values()
    return result, [json.loads(line) for line in (output / "predictions.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def plain(world, tmp_path_factory):
    return run(world, tmp_path_factory.mktemp("plain") / "new")


def test_every_record_has_its_prediction_in_its_place(world, plain):
    _, predictions = plain
    rows = [json.loads(line) for line in world.dev.read_text().splitlines()]
    assert [p["index"] for p in predictions] == list(range(len(rows)))
    for row, prediction in zip(rows, predictions, strict=True):
        assert (prediction["prompt"], prediction["answers"]) == (row["prompt"], row["answer"])
        assert prediction["context_tokens"] == len(" ".join(row["input"]).split())
        score = metrics.score(prediction["prediction"], prediction["answers"])
        assert {name: prediction[name] for name in MEASURES} == score and set(score) == set(MEASURES)


def test_the_result_says_how_it_was_made(world, plain):
    result, predictions = plain
    assert result["n"] == 6 and tuple(result["metrics"]) == MEASURES
    for name, value in result["metrics"].items():
        assert value["n"] == 6 and 0 <= value["low"] <= value["mean"] <= value["high"] <= 1
        assert value["mean"] == pytest.approx(sum(p[name] for p in predictions) / 6)
    tokens, vectors = (sum(p[name] for p in predictions) for name in ("context_tokens", "memory_vectors"))
    assert result["ratio"] == pytest.approx(tokens / vectors)
    assert result["decoding"] == {"method": "greedy"} | to_dict(read_run(world.run).config.generation)
    assert (result["rate"], result["closed_book"], result["skipped_records"]) == (2, False, 0)
    step = train_fixtures.STEPS
    assert (result["step"], result["weights"]) == (step, stored_weights.weights_of(world.run, step))
    assert (result["data"], result["of"]) == ([str(world.dev)], 6)
    assert (result["truncated_contexts"], result["truncated_queries"]) == (0, 0)
    assert 1 <= result["mean_output_tokens"] <= 4


def test_it_repeats_what_the_training_run_ended_with(world, plain):
    ended = [json.loads(line) for line in (world.run / "predictions.jsonl").read_text().splitlines()]
    assert plain[1] == ended
    table = json.loads((world.run / "results.json").read_text())["COMI"]
    assert {name: value for name, value in plain[0].items() if name != "skipped_records"} == table


def test_a_second_evaluation_in_the_same_place_is_refused_at_its_start(world, tmp_path):
    with lock.held(tmp_path / "out"), pytest.raises(SystemExit, match="error: .*out is in use by process .* choose an"):
        run(world, tmp_path / "out", "--rate=4")
    assert not (tmp_path / "out").exists()
    assert run(world, tmp_path / "out", "--rate=4", "--limit=2")[0]["of"] == 6
    assert not (tmp_path / "out" / "lock").exists()


def test_closed_book_reads_no_context(world, tmp_path):
    result, predictions = run(world, tmp_path, "--closed-book")
    assert all(p["context_tokens"] == p["memory_vectors"] == 0 for p in predictions)
    assert (result["ratio"], result["rate"], result["closed_book"]) == (0.0, None, True)


def test_bad_records_are_left_out_counted_and_listed(world, tmp_path, capsys):
    data = tmp_path / "data.jsonl"
    data.write_text(world.dev.read_text() + '{"input": "[/i]", "prompt": "what ?", "answer": []}\n')
    result, predictions = run(world, tmp_path / "out", "--skip-bad-records", data=data)
    assert (result["n"], len(predictions), result["skipped_records"]) == (6, 6, 1)
    said = capsys.readouterr().out
    assert f"skipped 1 bad records:\n  {data}, line 7: " in said and "1 records skipped" in said
    with pytest.raises(SystemExit, match=f"error: {data}, line 7: "):
        run(world, tmp_path / "other", data=data)
    assert not (tmp_path / "other").exists()


def test_what_was_cut_is_counted(world, tmp_path):
    result, predictions = run(world, tmp_path, "--set=data.on_long=truncate", "--set=data.max_context=29")
    long = sum(len(" ".join(json.loads(line)["input"]).split()) > 29 for line in world.dev.read_text().splitlines())
    assert result["truncated_contexts"] == long > 0
    assert max(p["context_tokens"] for p in predictions) == 29


@pytest.mark.parametrize(
    "more, message",
    [
        (["--limit=0"], "--limit=0 leaves no records"),
        (["--batch-size=0"], "the batch size is 0"),
        (["--rate=0"], "the rate is 0"),
        (["--max-new-tokens=0"], "generation.max_new_tokens is 0"),
        (["--max-new-tokens=200"], "record 1: 15 memory vectors, a query of 7 and an answer of 200"),
        (["--set=data.max_context=20"], "6 of 6 records are too long"),
        (["--set=train.steps=20"], "train.steps=20 cannot be set for a trained model"),
        (["--data=none.jsonl"], "none.jsonl: does not exist"),
        (["--checkpoint=none"], "none is not a COMI checkpoint"),
    ],
)
def test_what_cannot_be_is_refused_and_nothing_is_written(world, tmp_path, more, message):
    with pytest.raises(SystemExit) as refused:
        run(world, tmp_path / "out", *more)
    assert refused.value.code.startswith("error: ") and message in refused.value.code
    assert not (tmp_path / "out").exists()
