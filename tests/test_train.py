"""Training from the command line: it learns, goes on where it stopped, and refuses before it writes."""

import io
import json
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import train_fixtures
from rich.console import Console
from train_fixtures import LOG_EVERY, SAVE_EVERY, STEPS

from comi_jax import convert, overrides, train
from comi_jax.devices import sharding
from comi_jax.model import architecture, comi
from comi_jax.params import flatten
from comi_jax.runs import stored_weights
from comi_jax.training import dataset
from comi_jax.training.step import Gradients
from comi_jax.weights import hf
from comi_jax.weights.starting_model import StartingModel

quick_compilation, world = train_fixtures.quick_compilation, train_fixtures.world


def contents(folder):
    """Every file below ``folder`` with its bytes, and every folder."""
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in folder.rglob("*")}


def metrics(folder):
    """metrics.jsonl, but for the numbers that no two runs share."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{n: value for n, value in line.items() if n not in ("tokens_per_second", "memory_gb")} for line in lines]


def weights(folder):
    return {path: np.asarray(x) for path, x in flatten(stored_weights.load_params(folder)[1]).items()}


def refusal(arguments):
    """What ``main`` says to a user as it gives up."""
    with pytest.raises(SystemExit) as refused:
        train_fixtures.run(arguments)
    assert refused.value.code.startswith("error: ")
    return refused.value.code


# --- a run ------------------------------------------------------------------------------------------------------------


def test_a_run_learns_and_leaves_what_it_should(world):
    lines = metrics(world.run)
    assert [line["step"] for line in lines] == list(range(LOG_EVERY, STEPS + 1, LOG_EVERY))
    assert lines[-1]["loss"] < 0.5 * lines[0]["loss"] and lines[-1]["accuracy"] > lines[0]["accuracy"]
    assert lines[-1]["learning_rate"] == pytest.approx(0.01 / (0.9 * STEPS))
    assert all(np.isfinite(list(line.values())).all() and line["gradient_norm"] > 0 for line in lines)
    assert sorted(p.name for p in (world.run / "checkpoints").iterdir()) == [str(SAVE_EVERY), str(STEPS)]
    assert sorted(p.parent.name for p in (world.run / "tensorboard").glob("*/events.*")) == ["COMI", "mean-pooling"]
    table = json.loads((world.run / "results.json").read_text())
    assert list(table) == ["COMI", "mean-pooling", "closed book"]
    assert [row["n"] for row in table.values()] == [6, 6, 6]
    assert 0 < table["COMI"]["ratio"] <= 2 * 30 / 29 and table["closed book"]["ratio"] == 0


def test_a_run_says_what_it_does(world):
    said = world.outcome.printed
    assert "training data: 16 examples, 474 context tokens; cut to fit: 0 contexts, 0 queries, 0 answers" in said
    count = sum(x.size for x in weights(world.run).values())
    assert f"COMI: {count:,} parameters" in said and "trained on 4 cpu device(s)" in said
    for step in range(LOG_EVERY, STEPS + 1, LOG_EVERY):
        assert re.search(rf"COMI  step {step}/{STEPS}  loss \d\.\d+  accuracy \d\.\d+  [\d,]+ tokens/s", said)
    assert f"COMI: checkpoint in {world.run}" in said
    assert "6 held-out questions" in said and "mean-pooling" in said and "closed book" in said


def test_the_step_is_compiled_once_for_each_system(world):
    assert world.outcome.compiled == world.outcome.updates == 2  # COMI and mean-pooling


def test_the_step_is_compiled_once_for_each_bucket(world, tmp_path, monkeypatch):
    def add_gradients(total, state, frozen, rows, key, number, *, arch, stage="answering"):
        width, one = jnp.float32(rows.context.shape[1]), jnp.float32(1)
        return Gradients(jax.tree.map(jnp.zeros_like, state.trained), comi.LossSums(width, one, one, one))

    monkeypatch.setattr("comi_jax.training.step.add_gradients", add_gradients)
    # One of 16 records is long: every epoch has a batch with it and one without.
    rows = train_fixtures.records(15, facts=2) + train_fixtures.records(1, facts=4)
    data = train_fixtures.write(tmp_path / "data.jsonl", rows)
    more = ("data.buckets=16,32", "train.log_every=1")
    outcome = train_fixtures.run(train_fixtures.command(world.lm, data, tmp_path / "run", *more))
    assert (outcome.compiled, outcome.updates) == (2, 1)
    lengths = [line["loss"] for line in metrics(tmp_path / "run")]
    assert {tuple(sorted(lengths[i : i + 2])) for i in range(0, STEPS, 2)} == {(16.0, 32.0)}


def test_the_same_command_again_has_nothing_to_do(world, tmp_path):
    shutil.copytree(world.run, tmp_path / "run")
    before = contents(tmp_path / "run")
    outcome = train_fixtures.run(world.command(tmp_path / "run"))
    after = contents(tmp_path / "run")
    assert f"COMI: resuming from step {STEPS} of {STEPS}" in outcome.printed and outcome.compiled == 0
    new = {name for name in after if "events.out" in name} - set(before)
    assert {name: after[name] for name in set(after) - new} == before


def test_an_interrupted_run_ends_as_the_uninterrupted_one(world, tmp_path):
    shutil.copytree(world.run, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / str(STEPS))
    with (tmp_path / "run" / "metrics.jsonl").open("a") as torn:
        torn.write('{"step": 3')  # killed as it wrote
    outcome = train_fixtures.run(world.command(tmp_path / "run"))
    assert f"COMI: resuming from step {SAVE_EVERY} of {STEPS}" in outcome.printed
    assert outcome.compiled == 1
    assert metrics(tmp_path / "run") == metrics(world.run)
    ended, expected = weights(tmp_path / "run"), weights(world.run)
    for path, array in expected.items():
        np.testing.assert_array_equal(ended[path], array, err_msg=path)


def test_lora_trains_adapters_encoder_and_lsa_only(world, tmp_path):
    more = ("lora.rank=2", "lora.alpha=4", "model.dtype=bfloat16", "train.steps=2", "train.checkpoint_every=0")
    train_fixtures.run(train_fixtures.command(world.lm, world.data, tmp_path / "run", *more))
    run, after = stored_weights.load_params(tmp_path / "run")
    after, before = flatten(after), StartingModel.open(run.config).load(run, sharding.make_mesh(run.config.mesh))
    assert set(after) == set(before) and run.architecture.lora.rank == 2
    for path, array in after.items():
        kept = np.array_equal(np.asarray(array), np.asarray(before[path], array.dtype))
        assert kept == path.startswith(("decoder/", "mig/")), path
        assert np.isfinite(np.asarray(array, np.float32)).all()
    assert not np.asarray(before["lora/q/b"]).any()  # adapters start without effect
    saved = {path for path in before if architecture.is_trained(path, run.architecture)}
    assert all(path.startswith(("encoder/", "lsa/", "lora/")) for path in saved)


def test_a_trained_run_goes_out_with_its_results(world, tmp_path):
    """Its float32 masters in the model's dtype, and the closing table in the card."""
    convert.main(["export-hf", f"--checkpoint={world.run}", f"--output={tmp_path / 'out'}"])
    run, after = stored_weights.load_params(world.run)
    decoder = {"decoder": architecture.specs(run.architecture)["decoder"]}
    out = hf.load_parts(tmp_path / "out" / "decoder", run.backbone, decoder)
    for path, array in out.items():
        np.testing.assert_array_equal(array, flatten(after)[path].astype(run.config.model.dtype), err_msg=path)
    card = (tmp_path / "out" / "README.md").read_text()
    results = json.loads((world.run / "results.json").read_text())
    row = results["COMI"]
    assert (row["step"], row["data"], row["of"]) == (STEPS, [str(world.dev)], 6)
    assert row["weights"] == stored_weights.weights_of(world.run, STEPS)
    circumstances = f"| {STEPS} | {world.dev.name} ({row['records'][:16]}) | 6 | 2 |"
    assert f"| COMI {circumstances} {row['metrics']['em']['mean']:.3f} [" in card
    assert f"| mean-pooling | {STEPS} |" in card and f"| closed book: the contexts withheld | {STEPS} |" in card
    assert f"Weights after step {STEPS}, checksum {row['weights'][:16]}." in card


# --- what is refused --------------------------------------------------------------------------------------------------


def test_other_settings_on_the_same_folder_are_refused_with_the_difference(world):
    before = contents(world.run)
    said = refusal(world.command(world.run, "train.steps=31", "compression.rates=4"))
    assert "already holds another run" in said
    assert f"train.steps {STEPS} -> 31" in said and "compression.rates [2, 4] -> [4]" in said
    assert contents(world.run) == before


def test_a_folder_with_other_files_is_refused_and_left_alone(world, tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    before = contents(tmp_path)
    assert "exists and is not a COMI run; choose another train.output" in refusal(world.command(tmp_path))
    assert contents(tmp_path) == before


def test_the_folder_of_the_language_model_is_not_a_place_for_a_run(world):
    before = contents(world.lm)
    assert "is not a COMI checkpoint" in refusal(world.command(world.lm))
    assert contents(world.lm) == before


@pytest.mark.parametrize(
    "override, message",
    [
        ("train.batch_size=6", "= 6 contexts do not divide over 1 micro-batches (optimizer.accumulate) on 4 devices"),
        ("mesh.data=3", "= 3 x 1 x 1 x 1 is not the number of devices, 4"),
        ("compression.encoder_layers=3", "encoder_layers is 3; the backbone has 2 layers"),
        ("compression.lsa_layers=3", "lsa_layers is 3; the backbone has 2 layers"),
        ("data.max_context=20", "data.eval: 6 of 6 records are too long, the first is record 1"),
        ("data.eval= data.max_context=20", "error: 16 of 16 records are too long, the first is record 1"),
        ("generation.max_new_tokens=120", "data.eval: record 1: 15 memory vectors, a query of 7 and an answer of 120"),
        ("data.train=", "data.train is not set"),
        ("data.train=none.jsonl", "none.jsonl: does not exist"),
        ("data.eval=none.jsonl", "none.jsonl: does not exist"),
        ("data.train=synthetic", "data.synthetic_examples is 0"),
        ("model.tokenizer=none", "none holds no tokenizer"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_written(world, tmp_path, override, message):
    assert message in refusal(world.command(tmp_path / "run", *override.split()))
    assert not (tmp_path / "run").exists()


def test_weights_that_do_not_fit_are_listed_before_the_run_begins(world, tmp_path):
    shutil.copytree(world.lm, tmp_path / "lm")
    values = json.loads((tmp_path / "lm" / "config.json").read_text())
    (tmp_path / "lm" / "config.json").write_text(json.dumps(values | {"intermediate_size": 50}))
    with pytest.raises(SystemExit) as refused:
        train.main(world.command(tmp_path / "run", f"model.path={tmp_path / 'lm'}"))
    assert "6 problem(s)" in refused.value.code and "mlp.gate_proj.weight has shape (48, 32)" in refused.value.code
    assert not (tmp_path / "run").exists()


def test_a_tokenizer_larger_than_the_vocabulary_is_refused(world, tmp_path):
    tokenizer = train_fixtures.tokenizer()
    tokenizer.add_tokens([f"new{i}" for i in range(80)])
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    said = refusal(world.command(tmp_path / "run", f"model.tokenizer={tmp_path / 'tokenizer'}"))
    assert re.search(r"the tokenizer has \d+ tokens, the model only 100", said)


@pytest.mark.parametrize("path", ["", "nowhere"])
@pytest.mark.parametrize("name", ["qwen2", "llama2", "qwen3"])
def test_missing_weights_say_what_to_download_and_which_option_names_it(name, path):
    said = refusal([f"--config={name}", f"model.path={path}", "data.train=x.jsonl"])
    hub = overrides.load(name).model.hub
    assert hub.count("/") == 1
    assert f"download {hub}: hf download {hub} --local-dir=DIR, then pass model.path=DIR" in said
    assert (f"{path} is not a model's folder" if path else "model.path is not set") in said


def test_a_missing_run_says_which_command_makes_it(tmp_path):
    said = refusal(["--config=small", f"model.path={tmp_path / 'tiny'}", f"train.output={tmp_path / 'run'}"])
    assert "tiny is not a model's folder; make it first with python -m comi_jax.train --config=tiny, or pass" in said
    assert not (tmp_path / "run").exists()


def test_unknown_names_are_refused_with_the_nearest():
    said = refusal(["--config=qwen"])
    assert "there is no config 'qwen'; the nearest are qwen3, qwen2" in said and "llama2" in said
    assert "no setting 'train.step'; the nearest are train.steps" in refusal(["--config=qwen2", "train.step=1"])


def test_options_and_overrides_may_stand_in_any_order(monkeypatch):
    seen = []
    monkeypatch.setattr("comi_jax.train.run", lambda config, console, **more: seen.append(config) or True)
    train.main(["train.steps=7", "--config=qwen2", "model.path=x", "--skip-bad-records", "train.seed=3"])
    (got,) = seen
    assert (got.train.steps, got.model.path, got.train.seed, got.data.skip_bad_records) == (7, "x", 3, True)


def test_a_bad_line_is_named_or_left_out_counted_and_listed(world, tmp_path):
    rows = train_fixtures.records(3)
    rows[1]["answer"] = "[/b]", 7  # a bracket, as in the markup of the console
    data = train_fixtures.write(tmp_path / "data.jsonl", rows)
    with data.open("a") as end:
        end.write('{"input": "[/i]\n')
    said = refusal(world.command(tmp_path / "run", f"data.train={data}"))
    assert f"{data}, line 2: " in said and "a number (7)" in said
    assert not (tmp_path / "run").exists()
    settings = overrides.load("qwen2", [f"data.train={data}", "data.skip_bad_records=true"])
    printed = io.StringIO()
    console = Console(file=printed, soft_wrap=True)
    kept = dataset.read_examples(settings, train_fixtures.tokenizer(), tmp_path / "examples", console)
    assert [len(e.query) for e in kept] == [len(row["prompt"].split()) for row in (rows[0], rows[2])]
    assert "skipped 2 bad records:" in printed.getvalue()
    assert f"{data}, line 2: " in printed.getvalue() and f"{data}, line 4: " in printed.getvalue()


def test_only_the_first_records_are_evaluated_if_asked(world):
    quiet, dev = Console(file=io.StringIO()), f"data.eval={world.dev}"
    for words, count in (([dev, "data.eval_examples=2"], 2), ([dev], 6), ([], 0)):
        assert len(dataset.read_held_out(overrides.load("qwen2", words), quiet)[0]) == count
