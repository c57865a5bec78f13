"""The training runs of a comparison: one for each system and seed, taken over, resumed, and joined in its table."""

import csv
import json
import shutil

import numpy as np
import pytest
import train_fixtures

from comi_jax import compare
from comi_jax.errors import ConfigError
from comi_jax.runs.folder import Folder
from comi_jax.training import series

quick_compilation, world = train_fixtures.quick_compilation, train_fixtures.world


def settings(world):
    """The settings of the run that the tests share, as a comparison takes them."""
    own = ("--config", "train.output", "train.compare_mean_pooling")
    return [word for word in world.command("") if not word.startswith(own)]


def run(world, output, *more):
    compare.main(["--config=qwen2", f"--output={output}", *more, *settings(world)])
    return json.loads((output / "results.json").read_text())


def read(output, name, rate):
    lines = (output / "predictions" / f"{name}_{rate}x.jsonl").read_text().splitlines()
    return np.array([json.loads(line)["f1_max"] for line in lines])


WORDS = ("--systems=comi,truncation_tail", "--rates=2,8", "--seeds=2")


@pytest.fixture(scope="module")
def made(world, tmp_path_factory):
    """Two seeds, of which the first is trained already."""
    output = tmp_path_factory.mktemp("series") / "out"
    shutil.copytree(world.run, output / "runs" / "comi_seed0")
    with pytest.MonkeyPatch.context() as patch:
        trained, train = [], series.run
        patch.setattr(
            series, "run", lambda config, *a, **k: trained.append(config.train.seed) or train(config, *a, **k)
        )
        found = run(world, output, *WORDS)
    return output, found, trained


def test_what_is_trained_is_taken_over_and_the_rest_is_trained(made):
    output, found, trained = made
    assert trained == [1] and Folder(output / "runs" / "comi_seed1").steps()[-1] == train_fixtures.STEPS
    (_, command) = found["about"]["trained_by"]
    assert command.startswith("python -m comi_jax.train --config=qwen2 ") and "train.seed=1" in command
    assert f"train.output={output}/runs/comi_seed1" in command


def test_a_row_of_several_seeds_is_their_mean_with_the_lowest_and_highest(made):
    output, found, _ = made
    rows = {(row["name"], row["rate"]): row for row in found["rows"]}
    assert set(rows) == {(name, rate) for name in ("comi", "truncation_tail") for rate in (2, 8)}
    assert rows["comi", 2]["seeds"] == [0, 1] and rows["truncation_tail", 2]["seeds"] == []
    assert rows["comi", 8]["untrained"] and not rows["comi", 2]["untrained"]
    seeds = [read(output, f"comi_seed{seed}", 2) for seed in (0, 1)]
    value, means = rows["comi", 2]["result"]["metrics"]["f1_max"], [seed.mean() for seed in seeds]
    assert value["mean"] == pytest.approx(np.mean(means)) and means[0] != means[1]
    assert (value["low"], value["high"]) == pytest.approx((min(means), max(means)))
    minus = rows["truncation_tail", 2]["differences"]["2"]["f1_max"]
    paired = read(output, "truncation_tail", 2) - np.mean(seeds, axis=0)
    assert minus["mean"] == pytest.approx(paired.mean()) and paired.min() <= minus["low"] <= minus["high"]
    each = [(row["seed"], row["result"]["metrics"]["f1_max"]["mean"]) for row in found["seeds"] if row["rate"] == 2]
    assert each == [(0, pytest.approx(means[0])), (1, pytest.approx(means[1]))]
    lines = list(csv.DictReader((output / "table.csv").read_text().splitlines()))
    assert [line["seeds"] for line in lines] == ["0 1", "0 1", "", ""]


def test_a_killed_start_goes_on_and_the_same_command_gives_the_same_table(world, made, capsys):
    output, _, _ = made
    names = ("results.json", "table.csv", "table.tex", "accuracy.png", "costs.png")
    before = {name: (output / name).read_bytes() for name in names}
    folder = Folder(output / "runs" / "comi_seed1")
    shutil.rmtree(folder.checkpoint(train_fixtures.STEPS))  # as if killed before its last step
    run(world, output, *WORDS)
    said = capsys.readouterr().out
    assert "COMI, seed 0: trained already" in said and "training 1 of 1: COMI, seed 1" in said
    assert f"resuming from step {train_fixtures.SAVE_EVERY} of {train_fixtures.STEPS}" in said
    assert {name: (output / name).read_bytes() for name in names} == before


def test_a_step_is_taken_from_comi_which_is_trained_too():
    given = compare.parser().parse_args(["--config=tiny", "--table=2", "--systems=without_fine"])
    assert compare.names_of(given) == (["comi", "without_fine"], [])
    given = compare.parser().parse_args(["--config=tiny"])
    trained, untrained = compare.names_of(given)
    assert trained[:2] == ["comi", "mean_pooling"] and "gmsa" in trained and "llmlingua2" not in untrained


def test_a_stopped_run_stops_the_comparison(world, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(series, "run", lambda config, *_, **__: asked.append(config.train.seed) and False)
    with pytest.raises(SystemExit) as stopped:
        run(world, tmp_path / "out", *WORDS)
    assert stopped.value.code == 85 and asked == [0] and not (tmp_path / "out" / "results.json").exists()


def test_every_run_has_its_settings_and_its_folder():
    names = list(series.TRAINED)
    runs = series.members("tiny", ["compression.alpha_fine=1", "train.seed=5"], names, 2, Folder("out"))
    assert [(run.name, run.seed) for run in runs] == [(name, seed) for name in names for seed in (5, 6)]
    found = {run.name: run for run in runs if run.seed == 6}
    assert str(found["gmsa"].folder) == "out/runs/gmsa_seed6" and found["gmsa"].config.system == "gmsa"
    assert found["alpha_fine_1"].folder == found["comi"].folder != found["alpha_fine_4"].folder
    assert not any(run.config.train.compare_mean_pooling for run in runs)
    compression = found["relevance_only"].config.compression
    assert not compression.coarse_redundancy and not compression.fine_redundancy and compression.coarse
    assert found["alpha_learned"].config.compression.learn_mig


def test_each_system_goes_on_from_its_own_earlier_run(world, made, tmp_path):
    """With its seed; the untrained ones have the language model that those runs started from."""
    earlier, _, _ = made
    output = tmp_path / "out"
    words = settings(world)
    words = [word for word in words if not word.startswith("model.path=")]
    command = ["--config=qwen2", f"--output={output}", f"--start-from={earlier}", *WORDS, *words]
    compare.main([*command, "train.steps=1", "optimizer.learning_rate=1e-30"])
    found = json.loads((output / "results.json").read_text())
    rows = {row["name"]: row for row in found["rows"] if row["rate"] == 2}
    for seed in (0, 1):  # whose weights so small a rate leaves as they were
        np.testing.assert_array_equal(*(read(place, f"comi_seed{seed}", 2) for place in (output, earlier)))
    np.testing.assert_array_equal(*(read(place, "truncation_tail", 2) for place in (output, earlier)))
    assert f"--start-from={earlier}" in rows["comi"]["command"]
    commands = found["about"]["trained_by"]
    assert all(f"model.path={earlier}/runs/comi_seed{seed}" in commands[seed] for seed in (0, 1))
    with pytest.raises(SystemExit, match="COMI, seed 2, would start from .*comi_seed2, which is no finished run; tra"):
        compare.main([*command, "--seeds=3"])
    with pytest.raises(SystemExit, match="a comparison sets model.path itself; leave it out and pass --start-from"):
        compare.main([*command, "model.path=tiny"])
    with pytest.raises(SystemExit, match="has no runs; pass --start-from the output of a comparison"):
        compare.main([*command, f"--start-from={tmp_path}"])


def test_untrained_systems_have_the_decoder_of_the_tuned_full_prompt_too(world, tmp_path):
    """With its adapters: where nothing is left out, they answer as the tuned full prompt does."""
    output, words = tmp_path / "out", ("--systems=full_prompt,truncation_head", "--tuned-decoder", "--rates=1")
    found = run(world, output, *words, "lora.rank=2", "optimizer.learning_rate=0.1")

    def answers(name):
        lines = (output / "predictions" / f"{name}.jsonl").read_text().splitlines()
        return [json.loads(line)["prediction"] for line in lines]

    assert answers("truncation_head_tuned_seed0_1x") == answers("full_prompt_seed0") != answers("truncation_head_1x")
    rows = {row["name"]: row for row in found["rows"]}
    assert rows["truncation_head_tuned"]["title"] == "Truncation, head, tuned decoder"
    assert "--tuned-decoder --systems=full_prompt,truncation_head" in rows["truncation_head_tuned"]["command"]
    with pytest.raises(SystemExit, match="add full_prompt to --systems, or its run to --checkpoint"):
        run(world, output, "--systems=truncation_head", "--tuned-decoder")
    with pytest.raises(SystemExit, match="--tuned-decoder is for tables of untrained systems' accuracy, not for tab"):
        run(world, output, "--systems=comi", "--tuned-decoder", "--table=2")


@pytest.mark.parametrize(
    "words, message",
    [
        (["system=gmsa"], "system=gmsa: a comparison sets system itself; leave it out and pass --systems"),
        (["train.output=x"], "leave it out and pass --output"),
        (["compression.fine=false"], "compression.fine=false changes COMI, not system=gmsa"),
    ],
)
def test_settings_that_the_comparison_sets_itself_are_refused(words, message):
    with pytest.raises(ConfigError, match=message):
        series.members("tiny", words, ["comi", "gmsa"], 1, Folder("out"))


@pytest.mark.parametrize(
    "more, message",
    [
        (["--systems=icea"], "there is no system 'icea'; the nearest are icae"),
        (["--systems=none"], "--systems=none leaves nothing to compare"),
        (["--table=6"], "table 6 is of one checkpoint: python -m comi_jax.diagnose --checkpoint=DIR"),
        (["--table=77"], "there is no table '77'; the nearest are 7"),
    ],
)
def test_what_cannot_be_compared_is_refused(world, tmp_path, more, message):
    with pytest.raises(SystemExit) as refused:
        run(world, tmp_path / "out", *more)
    assert str(refused.value.code).startswith("error: ") and message in refused.value.code
    assert not (tmp_path / "out").exists()


def test_what_no_system_could_start_from_is_refused_before_anything_is_trained(world, tmp_path, monkeypatch):
    monkeypatch.setattr(series, "run", lambda *_, **__: pytest.fail("trained"))
    start = f"model.path={world.run}"
    with pytest.raises(SystemExit, match="is a COMI checkpoint, not a language model; set model.path to the folder"):
        compare.main(["--config=qwen2", f"--output={tmp_path}", *WORDS, *settings(world), start])
    with pytest.raises(SystemExit, match="does not match this run's config; pass system=comi"):
        compare.main(["--config=qwen2", f"--output={tmp_path}", "--systems=comi,gmsa", *settings(world), start])


def test_a_folder_with_other_settings_is_refused_before_anything_is_trained(world, tmp_path, monkeypatch):
    shutil.copytree(world.run, tmp_path / "out" / "runs" / "comi_seed1")  # of seed 0
    monkeypatch.setattr(series, "run", lambda *_, **__: pytest.fail("trained"))
    with pytest.raises(SystemExit, match="comi_seed1 already holds another run, with train.seed 0 -> 1"):
        run(world, tmp_path / "out", *WORDS)


def test_a_context_too_long_for_one_system_is_refused_before_anything_is_trained(world, tmp_path, monkeypatch):
    monkeypatch.setattr(series, "run", lambda *_, **__: pytest.fail("trained"))
    with pytest.raises(SystemExit, match="error: ICAE: record 1: .* memory tokens, more than icae.memory_tokens, 1"):
        run(world, tmp_path / "out", "--systems=comi,icae", "icae.memory_tokens=1")
    assert not (tmp_path / "out" / "runs").exists()


@pytest.mark.parametrize(
    "more, message",
    [
        (["--systems=gmsa"], "gmsa is trained: add its run to --checkpoint, or train it with --config=NAME"),
        (["--seeds=2"], "--seeds=2 trains systems; pass --config=NAME instead of --checkpoint"),
    ],
)
def test_checkpoints_are_not_trained(world, tmp_path, more, message):
    with pytest.raises(SystemExit, match=message):
        compare.main([f"--checkpoint={world.run}", f"--output={tmp_path}", *more])


def test_checkpoints_of_other_data_do_not_share_a_table(world, tmp_path):
    config = json.loads((world.run / "config.json").read_text())
    config["config"] |= {"system": "gmsa", "data": config["config"]["data"] | {"train": ["other.jsonl"]}}
    config["config"]["train"] |= {"compare_mean_pooling": False}
    (tmp_path / "gmsa").mkdir()
    (tmp_path / "gmsa" / "config.json").write_text(json.dumps(config))
    with pytest.raises(SystemExit, match="gmsa was trained on other data than .*: data.train is"):
        compare.main(["--checkpoint", str(world.run), str(tmp_path / "gmsa"), f"--output={tmp_path / 'out'}"])
