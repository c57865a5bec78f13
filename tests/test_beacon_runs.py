"""Activation Beacon from the command line: it resumes, answers, streams and decodes in slots, and is not exported."""

import json
import shutil

import numpy as np
import pytest
import train_fixtures

from comi_jax import convert, evaluate
from comi_jax.data.records import Record
from comi_jax.errors import ConfigError
from comi_jax.evaluation import diagnostics_memory
from comi_jax.params import flatten
from comi_jax.runs import stored_weights
from comi_jax.serving.compressor import Comi

quick_compilation = train_fixtures.quick_compilation
STEPS = 4
CONTEXT, QUESTION = "the red box holds a key . the blue box holds a coin .", "what does the red box hold ?"  # 14 tokens


def command(lm, data, output, *more):
    return train_fixtures.command(
        lm, data, output, "system=beacon", "beacon.window=4", f"train.steps={STEPS}", "train.checkpoint_every=2",
        "train.keep_checkpoints=4", "train.log_every=1", "lora.rank=2", "compression.rates=2", *more,
    )  # fmt: skip


@pytest.fixture(scope="module")
def run(quick_compilation, tmp_path_factory):
    """The language model, its data, the folder of a finished run and what was printed."""
    base = tmp_path_factory.mktemp("beacon")
    lm, data = (
        train_fixtures.language_model(base / "lm"),
        train_fixtures.write(base / "t.jsonl", train_fixtures.records(16)),
    )
    outcome = train_fixtures.run(command(lm, data, base / "run"))
    return lm, data, base / "run", outcome


@pytest.fixture(scope="module")
def model(run):
    return Comi.load(run[2])


def weights(folder, step):
    return {path: np.asarray(x) for path, x in flatten(stored_weights.load_params(folder, step=step)[1]).items()}


def test_a_run_trains_beacons_and_adapters_and_resumes_as_if_it_had_not_stopped(run, tmp_path):
    """All weights equal bit for bit; nothing else is trained."""
    lm, data, folder, outcome = run
    assert f"Activation Beacon: {STEPS} steps of 8 examples" in outcome.printed
    assert (outcome.compiled, outcome.updates) == (1, 1)
    ended = weights(folder, STEPS)
    for path, before in weights(folder, 2).items():
        assert np.array_equal(before, ended[path]) != path.startswith(("beacons/", "lora/")), path
    shutil.copytree(folder, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / str(STEPS))
    outcome = train_fixtures.run(command(lm, data, tmp_path / "run"))
    assert f"Activation Beacon: resuming from step 2 of {STEPS}" in outcome.printed
    for path, again in weights(tmp_path / "run", STEPS).items():
        np.testing.assert_array_equal(again, ended[path], err_msg=path)


def test_its_answers_are_the_same_alone_streamed_and_in_slots(model):
    """With the account of what was kept: three windows of two beacons, and two tokens of the unfinished window."""
    alone = model.answer(CONTEXT, QUESTION)
    beside = model.answer([CONTEXT, "the pink box holds a pen ."], [QUESTION, QUESTION])[0]
    assert (alone.text, alone.tokens) == (beside.text, beside.tokens)
    assert (alone.context_tokens, alone.memory_vectors, alone.ratio) == (14, 8, 14 / 8)
    assert alone.account.kv_bytes == 8 * 2 * 2 * 2 * 8 * 4  # entries, k and v, layers, kv heads, head_dim, float32
    pieces = model.stream(CONTEXT, QUESTION)
    assert "".join(pieces) == alone.text and pieces.answer.account == alone.account
    prompt = model.prompt_embeddings(CONTEXT, QUESTION)
    assert prompt.memory_vectors == 8 and len(prompt.vectors) == 2 + 7
    loop = model.slots(slots=2, length=64)
    handle = loop.submit(prompt)
    while loop.live or loop.waiting:
        loop.step()
    assert handle.tokens == alone.tokens


def test_an_answer_at_another_rate_has_its_number_of_beacons(model):
    """3 does not divide the window of 4, which ends with a beacon; at a rate beyond the window, each has one."""
    assert [model.answer(CONTEXT, QUESTION, rate=rate, max_new_tokens=1).memory_vectors for rate in (3, 9)] == [8, 5]


def test_its_checkpoint_is_evaluated_by_its_title(run, tmp_path):
    _, _, folder, _ = run
    dev = train_fixtures.write(tmp_path / "dev.jsonl", train_fixtures.records(3, seed=1))
    evaluate.main([f"--checkpoint={folder}", f"--data={dev}", f"--output={tmp_path / 'out'}"])
    (title, row), *_ = json.loads((tmp_path / "out" / "results.json").read_text()).items()
    ratio = row["account"]["ratio"]
    assert title == "Activation Beacon" and row["n"] == 3 and 1.5 < ratio["min"] <= ratio["mean"] <= ratio["max"] <= 2


def test_what_needs_vectors_or_comi_is_refused(run, model, tmp_path):
    with pytest.raises(ConfigError, match="the memory of system=beacon is keys and values, not vectors; use answer"):
        model.compress(CONTEXT, QUESTION)
    with pytest.raises(ConfigError, match="documents are COMI's; the system of this run is beacon"):
        model.encode(CONTEXT)
    with pytest.raises(ConfigError, match="this prompt follows keys and values"):
        model.prompt_embeddings(CONTEXT, QUESTION).save(tmp_path / "prompt.pt")
    with pytest.raises(ConfigError, match="the memory of Activation Beacon is keys and values, not vectors; leave it"):
        diagnostics_memory.memory_redundancy({"beacon": model}, [Record((CONTEXT,), QUESTION, ())], 2)
    with pytest.raises(SystemExit, match="holds system=beacon, and only COMI can be exported"):
        convert.main(["export-hf", f"--checkpoint={run[2]}", f"--output={tmp_path / 'out'}"])
