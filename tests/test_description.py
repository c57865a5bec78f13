"""A run's folder: what is in it comes back bit for bit, and nothing of anybody else's is touched or taken for a run."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_models
import train_fixtures
from jax.sharding import NamedSharding, PartitionSpec

from comi_jax.config import Beacon, Compression, Config, Lora, Mesh, Model, Train
from comi_jax.devices import sharding
from comi_jax.errors import ConfigError
from comi_jax.model import architecture
from comi_jax.params import flatten, partition
from comi_jax.runs import checksums, description, selection, stored_weights
from comi_jax.runs.checkpoints import Checkpoints, Progress
from comi_jax.training.state import TrainState
from comi_jax.weights.tokenizer import load_tokenizer

TOKENIZER = train_fixtures.tokenizer()
CONFIG = Config(
    name="test",
    model=Model(dtype="float32"),
    compression=Compression(rates=(2, 4), encoder_layers=1, segment_size=32),
    train=Train(output="here", steps=7),
)


def run_of(config=CONFIG):
    return description.Run(config, train_fixtures.backbone(), (2, 5))


def changed(section, **values):
    return run_of(dataclasses.replace(CONFIG, **{section: dataclasses.replace(getattr(CONFIG, section), **values)}))


def contents(folder):
    """Every file below ``folder`` with its bytes, and every folder."""
    return {p.relative_to(folder): p.read_bytes() if p.is_file() else None for p in folder.rglob("*")}


def saved(folder, run, steps=(1,), keep=2):
    """``folder`` as a training run would leave it; returns its weights."""
    description.open_run(folder, run, TOKENIZER)
    params = tiny_models.shaken(architecture.specs(run.architecture), seed=3)
    trained, frozen = partition(params, lambda path: architecture.is_trained(path, run.architecture))
    stored_weights.save_frozen(folder, frozen)
    checkpoints = Checkpoints(folder, keep)
    for step in steps:
        state = TrainState(jnp.int32(step), {p: x + step for p, x in trained.items()}, {"count": jnp.int32(step)})
        checkpoints.save(state, Progress(step, {"next": step}))
    checkpoints.close()
    return flatten(params)


# --- the folder -------------------------------------------------------------------------------------------------------


def test_a_run_is_read_back_as_it_was_written(tmp_path):
    run = run_of(dataclasses.replace(CONFIG, lora=Lora(rank=4)))
    description.open_run(tmp_path / "a" / "run", run, TOKENIZER)
    assert description.read_run(tmp_path / "a" / "run") == run
    tokenizer = load_tokenizer(tmp_path / "a" / "run" / "tokenizer")
    text = "the red box holds a silver coin ."
    assert tokenizer(text)["input_ids"] == TOKENIZER(text)["input_ids"]
    assert tokenizer.eos_token_id == TOKENIZER.eos_token_id


def test_what_is_no_run_is_refused_and_not_touched(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    before = contents(tmp_path)
    with pytest.raises(checksums.CheckpointError, match="is not a COMI run; choose another train.output"):
        description.open_run(tmp_path, run_of(), TOKENIZER)
    with pytest.raises(checksums.CheckpointError, match="is not a COMI run"):
        description.open_run(tmp_path / "notes.txt", run_of(), TOKENIZER)
    assert contents(tmp_path) == before


def test_a_language_model_is_not_overwritten(tmp_path):
    # It has a config.json as a run has.
    before = contents(train_fixtures.language_model(tmp_path / "lm"))
    with pytest.raises(checksums.CheckpointError, match="config.json is not a COMI checkpoint"):
        description.open_run(tmp_path / "lm", run_of(), TOKENIZER)
    assert contents(tmp_path / "lm") == before


def test_another_run_is_refused_with_every_difference(tmp_path):
    saved(tmp_path, run_of())
    before = contents(tmp_path)
    other = changed("train", steps=8, seed=1)
    with pytest.raises(checksums.CheckpointError) as refused:
        description.open_run(tmp_path, other, TOKENIZER)
    for part in ("train.steps 7 -> 8", "train.seed 0 -> 1", "choose another train.output", "--allow-config-change"):
        assert part in str(refused.value)
    assert str(refused.value).count(" -> ") == 2
    assert contents(tmp_path) == before


def test_settings_of_other_systems_are_no_difference(tmp_path):
    saved(tmp_path / "run", run_of())
    assert description.check_folder(tmp_path / "run", changed("beacon", window=64)) == ["beacon.window 1024 -> 64"]
    beacon = dataclasses.replace(CONFIG, system="beacon")
    saved(tmp_path / "beacon", run_of(beacon))
    other = dataclasses.replace(beacon, beacon=Beacon(window=64))
    with pytest.raises(checksums.CheckpointError, match="beacon.window 1024 -> 64"):
        description.check_folder(tmp_path / "beacon", run_of(other))


def test_another_backbone_is_a_difference(tmp_path):
    saved(tmp_path, run_of())
    other = dataclasses.replace(run_of(), backbone=train_fixtures.backbone(rope_theta=5e5))
    with pytest.raises(checksums.CheckpointError, match="backbone.rope_theta 10000.0 -> 500000.0"):
        description.open_run(tmp_path, other, TOKENIZER)


def test_a_run_that_was_moved_goes_on(tmp_path):
    saved(tmp_path / "a", run_of())
    shutil.move(tmp_path / "a", tmp_path / "b")
    before = contents(tmp_path / "b")
    description.open_run(tmp_path / "b", changed("train", output=str(tmp_path / "b")), TOKENIZER)
    assert contents(tmp_path / "b") == before


def test_a_run_that_never_saved_anything_gives_way(tmp_path):
    description.open_run(tmp_path, run_of(), TOKENIZER)
    description.open_run(tmp_path, changed("train", steps=8), TOKENIZER)
    assert description.read_run(tmp_path).config.train.steps == 8


@pytest.mark.parametrize(
    "text, message",
    [
        (None, "is not a COMI checkpoint: it has no config.json"),
        ("{", "does not describe a COMI checkpoint"),
        ("[1]", "does not describe a COMI checkpoint"),
        ('{"model_type": "qwen2"}', "is not a COMI checkpoint of format 1 .its format is None"),
        ('{"format": 2}', "its format is 2.; a later version of comi_jax wrote it: install that version"),
        ('{"format": 1}', "does not describe a COMI checkpoint"),
        ('{"format": 1, "config": {"trian": {}}, "backbone": {}, "stop": []}', "trian"),
    ],
)
def test_a_folder_that_holds_no_run_is_refused(tmp_path, text, message):
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(checksums.CheckpointError, match=message):
        stored_weights.load_params(tmp_path)


def test_layers_that_the_backbone_does_not_have_are_refused():
    with pytest.raises(ConfigError, match="encoder_layers is 3; the backbone has 2"):
        changed("compression", encoder_layers=3)


# --- checkpoints ------------------------------------------------------------------------------------------------------


def state_on(mesh, value):
    split, whole = NamedSharding(mesh, PartitionSpec("data")), NamedSharding(mesh, PartitionSpec())
    weights = np.random.default_rng(value).standard_normal((8, 3)).astype(np.float32)
    moments = {"mu": jax.device_put(jnp.asarray(-weights), split), "count": jax.device_put(jnp.int32(value), whole)}
    return TrainState(jax.device_put(jnp.int32(value), whole), {"a/b": jax.device_put(weights, split)}, moments)


def test_a_state_comes_back_bit_for_bit_where_it_was(tmp_path):
    mesh = sharding.make_mesh(Mesh())
    checkpoints = Checkpoints(tmp_path)
    state = state_on(mesh, 5)
    expected = jax.tree.map(np.array, state)
    checkpoints.save(state, Progress(5, {"next": [1, 2]}, skipped=3, in_a_row=1, examples="x"))
    # The next step takes the arrays over while they may still be on their way to the disk.
    jax.jit(lambda s: jax.tree.map(lambda x: x * 0 + 1, s), donate_argnums=0)(state)
    like = state_on(mesh, 0)
    checkpoints.settle()
    restored, progress = checkpoints.restore(5, like)
    checkpoints.close()
    assert progress == Progress(5, {"next": [1, 2]}, skipped=3, in_a_row=1, examples="x")
    jax.tree.map(np.testing.assert_array_equal, restored, expected)
    assert jax.tree.map(lambda x: x.sharding, restored) == jax.tree.map(lambda x: x.sharding, like)


def test_the_newest_checkpoints_and_the_best_are_kept(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2)
    assert checkpoints.latest() is None
    checkpoints.best = 4
    for step in (2, 4, 6, 8, 10):
        checkpoints.save(state_on(sharding.make_mesh(Mesh()), step), Progress(step, {}))
    checkpoints.close()
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["10", "4", "8"]
    assert Checkpoints(tmp_path, keep=2).latest() == 10


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_weights_of_the_newest_checkpoint_are_loaded_and_nothing_is_written(tmp_path, dtype):
    run = changed("model", dtype=dtype)
    params = saved(tmp_path, run, steps=(1, 2))
    before = contents(tmp_path)
    loaded_run, loaded = stored_weights.load_params(tmp_path)
    assert contents(tmp_path) == before
    assert loaded_run == run
    loaded = flatten(loaded)
    assert set(loaded) == set(params)
    for path, expected in params.items():
        kept = jnp.float32 if path.startswith("mig/") else dtype
        expected = (expected + 2 * architecture.is_trained(path, run.architecture)).astype(kept)
        assert loaded[path].dtype == kept
        np.testing.assert_array_equal(loaded[path], expected, err_msg=path)


def test_a_run_without_a_checkpoint_is_refused(tmp_path):
    description.open_run(tmp_path, run_of(), TOKENIZER)
    before = contents(tmp_path)
    with pytest.raises(checksums.CheckpointError, match="has no complete checkpoint yet"):
        stored_weights.load_params(tmp_path)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("part", ["checkpoints/1", "frozen"])
def test_a_damaged_folder_is_named(tmp_path, part):
    saved(tmp_path, run_of())
    where = tmp_path / part / ("trained" if part != "frozen" else "")
    (where / "_METADATA").write_text("{")
    with pytest.raises(checksums.CheckpointError, match=f"{part} is damaged: .*_METADATA has 1 bytes, not"):
        stored_weights.load_params(tmp_path)


def test_a_checkpoint_is_chosen_by_its_number_or_as_the_newest_or_the_best(tmp_path):
    saved(tmp_path, run_of(), steps=(1, 2, 3), keep=3)
    with pytest.raises(checksums.CheckpointError, match="no best checkpoint, as nothing was evaluated during training"):
        selection.choose_step(tmp_path, "best")
    rows = [{"step": step, "metrics": {"f1_max": {"mean": mean}}} for step, mean in ((1, 0.2), (2, 0.6), (3, 0.6))]
    (tmp_path / "evaluations.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 4')
    assert [selection.choose_step(tmp_path, name) for name in ("newest", "best", "1")] == [3, 2, 1]
    biases = [flatten(stored_weights.load_params(tmp_path, step=step)[1])["encoder/norm"] for step in (1, None)]
    np.testing.assert_allclose(biases[1] - biases[0], 2, atol=1e-6)
    with pytest.raises(checksums.CheckpointError, match="has no checkpoint of step 7; it has 1, 2, 3"):
        selection.choose_step(tmp_path, "7")
    with pytest.raises(checksums.CheckpointError, match="--step=last is not a step"):
        selection.choose_step(tmp_path, "last")


def test_the_best_is_a_checkpoint_that_is_there_and_was_measured_as_the_newest_was(tmp_path):
    saved(tmp_path, run_of(), steps=(1, 2, 3), keep=3)

    def measured(step, mean, records="hard"):
        return {"step": step, "records": records, "metrics": {"f1_max": {"mean": mean}}}

    rows = [measured(1, 0.9, "easy"), measured(2, 0.4), measured(3, 0.3), measured(4, 0.8)]  # 4 could not be saved
    (tmp_path / "evaluations.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert selection.choose_step(tmp_path, "best") == 2


# --- other settings ---------------------------------------------------------------------------------------------------


def test_settings_of_use_can_be_changed_and_settings_of_the_weights_cannot():
    run = description.change(run_of(), ["data.on_long=truncate", "compression.segment_size=64"])
    assert (run.config.data.on_long, run.config.compression.segment_size) == ("truncate", 64)
    for word in ("compression.encoder_layers=2", "compression.alpha_fine=2", "lora.rank=2", "train.steps=3", "steps=3"):
        with pytest.raises(ConfigError, match=f"{word} cannot be set for a trained model; these can: data.max"):
            description.change(run_of(), [word])
    for path in description.CHANGEABLE:
        section, _, leaf = path.partition(".")
        assert hasattr(getattr(CONFIG, section), leaf)  # every one of them exists
