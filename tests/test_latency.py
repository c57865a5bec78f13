"""Latencies: what is timed is the answer itself, and where compression pays is computed from the medians."""

import json
import time

import numpy as np
import pytest
import train_fixtures

from comi_jax import compare
from comi_jax.data import encode
from comi_jax.data.records import Record
from comi_jax.errors import ConfigError
from comi_jax.evaluation import latency, latency_tables
from comi_jax.evaluation.latency import STAGES, SUMS, Timed
from comi_jax.evaluation.systems import SYSTEMS
from comi_jax.evaluation.systems.answerer import SystemAnswerer
from comi_jax.params import flatten
from comi_jax.serving.compressor import Comi
from comi_jax.serving.language_model import LanguageModel
from comi_jax.training import timing

quick_compilation, world = train_fixtures.quick_compilation, train_fixtures.world
TOKENS = 4


@pytest.fixture(scope="module")
def comi(world):
    return Comi.load(world.run, batch_size=1)


@pytest.fixture(scope="module")
def model(comi):
    return LanguageModel.open(comi.run.config, batch_size=1)


@pytest.fixture(scope="module")
def record(world):
    row = json.loads(world.dev.read_text().splitlines()[0])
    return Record(context=tuple(row["input"]), prompt=row["prompt"], answers=tuple(row["answer"]))


def timed(**medians):
    """Latencies of one repetition with these stages, in seconds."""
    stages = {name: [medians.get(name, 0.0)] for name in STAGES}
    return Timed(1, stages | {name: [sum(stages[part][0] for part in parts)] for name, parts in SUMS.items()})


def tokens_of(stages):
    """The tokens that the stages, run in order, decode."""
    state = None
    for name in STAGES:
        state = stages[name](state) if name in stages else state
    assert state is not None
    return np.asarray(state.ids)[0, :TOKENS].tolist()


def test_the_stages_of_comi_are_its_answer(comi, record):
    ((example,), _) = encode.encode([record], comi.tokenizer, comi.run.config.data, targets=False)
    stages, entries = latency.of_trained(comi, example, 4, TOKENS)
    (answer,) = comi.generate([example], 4, comi.run.config.generation)
    assert list(stages) == list(STAGES) and entries == answer.memory_vectors
    assert tokens_of(stages)[: len(answer.tokens)] == list(answer.tokens)


@pytest.mark.parametrize("name", ["original", "snapkv", "streaming", "bm25"])
def test_the_stages_of_an_untrained_system_are_its_answer(comi, model, record, name):
    data, options = comi.run.config.data, comi.run.config.generation
    rate = 4 if SYSTEMS[name].system.needs_budget else None
    answerer = SystemAnswerer(name, SYSTEMS[name].system, model, data, options, rate)
    (question,) = answerer.questions([record])[0]
    (answer,) = answerer.answer([question])
    stages, entries = latency.of_untrained(answerer.system, model, question, rate, TOKENS)
    assert ("compress" in stages) == answerer.system.query_aware and entries == answer.memory_vectors
    assert tokens_of(stages)[: len(answer.tokens)] == list(answer.tokens)
    if name == "original":  # a kept cache answers the same
        kept, entries = latency.of_kept_cache(model, question, TOKENS)
        assert tokens_of(kept) == tokens_of(stages) and entries == len(question.context)


def test_sums_are_of_one_repetition_and_warm_up_is_not_counted(monkeypatch):
    calls, clock = [], iter(range(10**6))
    monkeypatch.setattr(time, "perf_counter", lambda: float(next(clock)))
    stages = {"encode": lambda _: calls.append("e") or 1.0, "decode": lambda x: calls.append("d") or x}
    found = latency.measure(stages, 3, repeat=5, warm=2)
    assert calls == ["e", "d"] * 7 and {len(values) for values in found.seconds.values()} == {5}
    assert found.median("encode") == 1 and found.median("compress") == 0 and found.median("total") == 2
    assert found.median("next question") == 1 and found.median("first token") == 1
    assert found.spread("total") == {"mean": 2e3, "low": 2e3, "high": 2e3}


@pytest.mark.parametrize("encode", [0.0, 1.0, 2.5, 7.0])
@pytest.mark.parametrize("each", [0.5, 1.0, 1.25, 2.0])
def test_the_number_of_questions_is_that_of_counting(encode, each):
    before, comi = 2.5, timed(encode=encode, prefill=1.0)
    faster = [q for q in range(1, 100) if encode + q * 1.0 < before + q * each]
    said = latency_tables.questions(comi, before, each)
    if not faster:
        assert said == "none"
    elif len(faster) == 99:
        assert said == "any"
    else:
        assert said == (f"from {faster[0]}" if faster[-1] == 99 else f"up to {faster[-1]}")


def test_compression_pays_from_the_length_on_that_no_longer_one_loses():
    cost = timed(prefill=2.0)
    lengths = {
        length: {"comi": cost, "original": timed(prefill=seconds), "kept": timed(encode=1.0, prefill=0.5)}
        for length, seconds in ((64, 3.0), (128, 1.0), (256, 2.5), (512, 9.0))
    }
    rows, (said,) = latency_tables.break_even(lengths, 8)
    assert said == "COMI at rate 8 answers a first question sooner than the original prompt from 256 tokens on"
    assert [row["questions, against reading anew"] for row in rows] == ["any", "none", "any", "any"]
    lengths[512]["original"] = timed(prefill=1.0)
    assert latency_tables.break_even(lengths, 8)[1][0].endswith("at none of these lengths, up to 512 tokens")


def test_table_3_is_measured_once_and_shown_again(world, tmp_path, monkeypatch, capsys):
    words = [f"--checkpoint={world.run}", f"--output={tmp_path}", "--table=3", "--systems=original,streaming"]
    words += ["--rates=4,20", "--bins=16", "--new-tokens=4"]
    compare.main(words)
    names = ("table_3.json", "table_3.csv", "table_3.tex", "table_3.png")
    before = {name: (tmp_path / name).read_bytes() for name in names}
    found = json.loads(before["table_3.json"])
    assert [(row["system"], row["rate"]) for row in found["rows"]] == [
        ("COMI", "4"), ("COMI", "20"), ("Original prompt", "-"), ("Original prompt, KV cache kept", "-"),
        ("StreamingLLM, positions unshifted", "4"),
    ]  # fmt: skip
    assert any(note.startswith("StreamingLLM, positions unshifted at 20: streaming cannot") for note in found["notes"])
    for row in found["rows"]:
        assert 0 < row["first token, ms"]["low"] <= row["first token, ms"]["mean"] <= row["total, ms"]["mean"]
    (length,) = found["more"]["break_even"]
    assert length["context tokens"] == 16 and length["COMI, total, ms"]["mean"] > 0
    monkeypatch.setattr(timing, "table", lambda *_: pytest.fail("measured again"))
    capsys.readouterr()
    compare.main(words)
    assert "was measured by this command before; remove it to measure again" in capsys.readouterr().out
    assert {name: (tmp_path / name).read_bytes() for name in names} == before


def test_a_config_is_timed_with_fresh_weights(world, comi):
    fresh = timing.fresh(comi.run.config)
    assert fresh.run.architecture == comi.run.architecture
    shapes = [
        {path: (x.shape, x.dtype) for path, x in flatten(params).items()} for params in (fresh.params, comi.params)
    ]
    assert shapes[0] == shapes[1]


def test_a_context_beyond_the_positions_is_refused(model):
    assert timing.lengths_of(None, model, 8, 20) == [100]  # of 128 positions: no power of two from 128 on fits
    with pytest.raises(
        ConfigError, match="--bins=16,512 holds 512, but a question of 8 tokens and 20 new ones leave 100"
    ):
        timing.lengths_of((16, 512), model, 8, 20)


def test_the_typical_record_has_the_median_length(model, comi):
    records = [Record(context=(" ".join(["box"] * n),), prompt="what ?", answers=("key",)) for n in (9, 1, 5, 3, 7)]
    assert timing.typical(records, model.tokenizer, comi.run.config) is records[2]
