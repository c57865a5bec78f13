"""A system of two stages from the command line: it resumes within and across them, answers, and is not exported."""

import json
import shutil

import numpy as np
import pytest
import train_fixtures

from comi_jax import convert, evaluate
from comi_jax.errors import ConfigError
from comi_jax.params import flatten
from comi_jax.runs import stored_weights
from comi_jax.serving.compressor import Comi

quick_compilation = train_fixtures.quick_compilation
STEPS = 8  # of which 4 autoencoding


def command(lm, data, output, *more):
    return train_fixtures.command(
        lm, data, output, "system=gmsa", "gmsa.autoencoding=0.5", f"train.steps={STEPS}", "train.checkpoint_every=2",
        "train.keep_checkpoints=4", "train.log_every=1", "lora.rank=2", "compression.rates=2,4", *more,
    )  # fmt: skip


@pytest.fixture(scope="module")
def run(quick_compilation, tmp_path_factory):
    """The language model, its data, the folder of a finished run and what was printed."""
    base = tmp_path_factory.mktemp("gmsa")
    lm, data = (
        train_fixtures.language_model(base / "lm"),
        train_fixtures.write(base / "t.jsonl", train_fixtures.records(16)),
    )
    outcome = train_fixtures.run(command(lm, data, base / "run"))
    return lm, data, base / "run", outcome


def weights(folder, step):
    return {path: np.asarray(x) for path, x in flatten(stored_weights.load_params(folder, step=step)[1]).items()}


def test_each_stage_trains_its_parts_and_has_the_whole_schedule(run):
    _, _, folder, outcome = run
    assert f"GMSA: {STEPS} steps of 8 examples, 4 of them autoencoding" in outcome.printed
    assert (outcome.compiled, outcome.updates) == (2, 2)  # one program a stage
    after = {step: weights(folder, step) for step in (2, 4, 6, 8)}
    for path in after[2]:
        part = path.split("/")[0]
        first, second = (not np.array_equal(after[a][path], after[b][path]) for a, b in ((2, 4), (6, 8)))
        assert (first, second) == (part in ("encoder", "lsa", "tasks"), part == "lora"), path
        assert np.array_equal(after[4][path], after[6][path]) == (part != "lora"), path
    rates = [json.loads(line)["learning_rate"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert rates == pytest.approx(2 * [0.01, 0.0075, 0.005, 0.0025])


@pytest.mark.parametrize("from_step", [2, 4, pytest.param(6, marks=pytest.mark.slow)])
def test_a_run_resumes_at_any_step_as_if_it_had_not_stopped(run, tmp_path, from_step):
    """Within the first stage, at its end, and within the second: all weights equal bit for bit."""
    lm, data, folder, _ = run
    shutil.copytree(folder, tmp_path / "run")
    for step in range(from_step + 2, STEPS + 1, 2):
        shutil.rmtree(tmp_path / "run" / "checkpoints" / str(step))
    outcome = train_fixtures.run(command(lm, data, tmp_path / "run"))
    assert f"GMSA: resuming from step {from_step} of {STEPS}" in outcome.printed
    assert outcome.compiled == (2 if from_step < 4 else 1)
    ended = weights(tmp_path / "run", STEPS)
    for path, expected in weights(folder, STEPS).items():
        np.testing.assert_array_equal(ended[path], expected, err_msg=path)
    assert (tmp_path / "run" / "metrics.jsonl").read_text().count("loss") == STEPS


def test_its_checkpoint_answers_and_is_evaluated_by_its_title(run, tmp_path):
    _, _, folder, _ = run
    model = Comi.load(folder)
    found = model.compress("the red box holds a key .", "what does the red box hold ?", rate=4)
    assert found.vectors.shape == (2, 32) and found.ratio == 3.5  # of 7 tokens, groups of 4 and 3
    dev = train_fixtures.write(tmp_path / "dev.jsonl", train_fixtures.records(3, seed=1))
    evaluate.main([f"--checkpoint={folder}", f"--data={dev}", f"--output={tmp_path / 'out'}", "--rate=4"])
    (title, row), *_ = json.loads((tmp_path / "out" / "results.json").read_text()).items()
    assert title == "GMSA" and row["n"] == 3 and 3.5 <= row["ratio"] <= 4


def test_what_comi_alone_has_is_refused_for_its_checkpoint(run, tmp_path):
    _, _, folder, _ = run
    with pytest.raises(SystemExit, match="holds system=gmsa, and only COMI can be exported"):
        convert.main(["export-hf", f"--checkpoint={folder}", f"--output={tmp_path / 'out'}"])
    assert not (tmp_path / "out").exists()
    with pytest.raises(ConfigError, match="compression.coarse=false changes COMI, not system=gmsa"):
        Comi.load(folder, overrides=["compression.coarse=false"])


def test_another_system_does_not_begin_from_its_checkpoint(run, tmp_path):
    lm, data, folder, _ = run
    words = command(folder, data, tmp_path / "run", "system=icae")
    with pytest.raises(SystemExit, match="does not match this run's config; pass system=gmsa"):
        train_fixtures.run(words)


def test_an_unknown_system_is_refused_with_the_nearest(run, tmp_path):
    lm, data, _, _ = run
    with pytest.raises(SystemExit, match="there is no system 'gmas'; the nearest are gmsa"):
        train_fixtures.run(command(lm, data, tmp_path / "run", "system=gmas"))
