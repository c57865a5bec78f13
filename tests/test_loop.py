"""The loop around a step that costs nothing: what it tells, saves, refuses and survives."""

import errno
import json
import os
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import train_fixtures
from train_fixtures import SAVE_EVERY, STEPS

from comi_jax.model import comi
from comi_jax.runs import description
from comi_jax.runs.arrays import SealedWriter
from comi_jax.runs.folder import Folder
from comi_jax.runs.logs import RunConsole
from comi_jax.training.step import Gradients

quick_compilation = train_fixtures.quick_compilation


@pytest.fixture(scope="module")
def files(quick_compilation, tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    lm = train_fixtures.language_model(folder / "lm")
    return lm, train_fixtures.write(folder / "train.jsonl", train_fixtures.records(16))


@pytest.fixture
def quick_step(monkeypatch):
    """A train step that only counts; ``quick_step(bad)`` has it skip the steps in ``bad``."""

    def use(bad=()):
        def add_gradients(total, state, frozen, rows, key, number, *, arch):
            sums = comi.LossSums(*[jnp.float32(0)] * 4)
            return Gradients(jax.tree.map(jnp.zeros_like, state.trained), sums)

        def apply_gradients(state, total, *, update):
            step = state.step + 1
            skipped = jnp.isin(step, jnp.array(list(bad), jnp.int32)).astype(jnp.int32)
            loss = jnp.where(skipped == 1, jnp.float32(jnp.nan), 1 / step.astype(jnp.float32))
            names = ("accuracy", "gradient_norm", "memory_vectors")
            numbers = dict.fromkeys(names, jnp.float32(8)) | {"loss": loss, "skipped": skipped}
            return state.replace(step=step), numbers

        monkeypatch.setattr("comi_jax.training.step.add_gradients", add_gradients)
        monkeypatch.setattr("comi_jax.training.step.apply_gradients", apply_gradients)

    use()
    return use


def run(files, output, *more):
    return train_fixtures.run(train_fixtures.command(*files, output, "train.log_every=1", *more)).printed


def refusal(files, output, *more):
    with pytest.raises(SystemExit) as refused:
        run(files, output, *more)
    assert refused.value.code.startswith("error: ")
    return refused.value.code


def lines(output):
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def contents(folder):
    return {path: path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


# --- what it tells ----------------------------------------------------------------------------------------------------


def test_each_step_tells_what_a_person_wants_to_know(files, quick_step, tmp_path):
    said = run(files, tmp_path / "run", "train.steps=4")
    rows = lines(tmp_path / "run")
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    names = {"step", "loss", "accuracy", "gradient_norm", "learning_rate", "padding", "ratio", "memory_gb", "skipped"}
    assert set(rows[0]) == names and set(rows[1]) == names | {"tokens_per_second"}  # the first step compiles
    assert all(0 < row["padding"] < 0.5 and row["ratio"] > 1 and row["memory_gb"] > 0.05 for row in rows)
    assert "step 4/4  loss 0.2500  accuracy 8.000" in said and "lr " in said and "left 0:00:00" in said
    assert "MFU" not in said  # the peak of this processor is in no table


def test_the_last_step_is_always_told(files, quick_step, tmp_path):
    run(files, tmp_path / "run", "train.steps=5", "train.log_every=3")
    assert [row["step"] for row in lines(tmp_path / "run")] == [3, 5]


def test_a_dry_run_ends_with_the_summary_and_writes_nothing(files, quick_step, tmp_path):
    said = run(files, tmp_path / "run", "--dry-run")
    assert not (tmp_path / "run").exists()
    assert "37,732 parameters (" in said and "decoder 18,848" in said and "25,152 trained on 4 cpu device(s)" in said
    assert f"{STEPS} steps of 8 examples, rates 2, 4" in said and "FLOP per step" in said
    assert "memory per device: about" in said and "optimizer 0.1 MB" in said
    assert said.endswith("dry run: everything is in order; nothing was trained or written\n")
    run(files, tmp_path / "run", "train.steps=20")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "20")
    before = contents(tmp_path / "run")
    said = run(files, tmp_path / "run", "train.steps=20", "--dry-run")
    assert f"resuming from step {SAVE_EVERY} of 20" in said and contents(tmp_path / "run") == before


# --- going on ---------------------------------------------------------------------------------------------------------


def test_settings_that_leave_the_weights_as_they_are_may_change(files, quick_step, tmp_path):
    run(files, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / str(STEPS))
    said = run(
        files, tmp_path / "run", "train.checkpoint_every=4", "train.keep_checkpoints=1", "mesh.fsdp=2", "mesh.data=0"
    )
    assert "settings changed: mesh.data 1 -> 0; mesh.fsdp 0 -> 2; train.checkpoint_every 15 -> 4; " in said
    assert "; train.keep_checkpoints 2 -> 1" in said
    assert f"resuming from step {SAVE_EVERY} of {STEPS}" in said
    assert description.read_run(tmp_path / "run").config.train.checkpoint_every == 4
    assert Folder(tmp_path / "run").steps() == [STEPS]


def test_other_changes_need_consent_and_are_written_down(files, quick_step, tmp_path):
    run(files, tmp_path / "run")
    more = ("train.steps=33", "optimizer.learning_rate=0.02")
    said = refusal(files, tmp_path / "run", *more)
    assert "optimizer.learning_rate 0.01 -> 0.02; train.steps 30 -> 33" in said and "--allow-config-change" in said
    said = run(files, tmp_path / "run", *more, "--allow-config-change")
    assert "COMI: settings changed: optimizer.learning_rate 0.01 -> 0.02; train.steps 30 -> 33" in said
    assert "resuming from step 30 of 33" in said and len(lines(tmp_path / "run")) == 33
    (change,) = json.loads((tmp_path / "run" / "config.json").read_text())["changes"]
    assert change == {"after_step": 30, "settings": ["optimizer.learning_rate 0.01 -> 0.02", "train.steps 30 -> 33"]}
    assert "nothing" not in refusal(files, tmp_path / "run")  # the new settings are the run's now


def test_a_change_that_cannot_work_leaves_the_run_as_it_is(files, quick_step, tmp_path):
    run(files, tmp_path / "run", "train.steps=2")
    before = contents(tmp_path / "run")
    for word in ("compression.encoder_layers=2", "lora.rank=2"):
        said = refusal(files, tmp_path / "run", "train.steps=2", word, "--allow-config-change")
        assert "is a checkpoint of another model: trained/" in said
        assert contents(tmp_path / "run") == before


def test_other_examples_under_the_same_name_are_refused(files, quick_step, tmp_path):
    lm, data = files[0], tmp_path / "train.jsonl"
    data.write_text(files[1].read_text())
    run((lm, data), tmp_path / "run", "train.steps=2")
    shutil.copytree(tmp_path / "run", tmp_path / "copy")
    train_fixtures.write(data, train_fixtures.records(16, seed=5))
    assert "data.train holds other examples than those" in refusal((lm, data), tmp_path / "run", "train.steps=2")
    said = run((lm, data), tmp_path / "copy", "train.steps=2", "--allow-config-change")
    assert "resuming from step 2 of 2" in said


def test_an_imported_model_is_no_place_for_a_run(files, quick_step, tmp_path):
    run(files, tmp_path / "run", "train.steps=2")
    values = json.loads((tmp_path / "run" / "config.json").read_text())
    (tmp_path / "run" / "config.json").write_text(json.dumps(values | {"imported": True}))
    assert "holds an imported model; to train it, set model.path=" in refusal(files, tmp_path / "run", "train.steps=2")


# --- faults -----------------------------------------------------------------------------------------------------------


@pytest.mark.fault
def test_a_run_goes_on_when_nobody_reads_what_it_says(files, quick_step, tmp_path, monkeypatch):
    """As behind ``| head``: every step is made, and its numbers are in the files."""
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as pipe:
        monkeypatch.setattr("comi_jax.train.RunConsole", lambda **named: RunConsole(file=pipe, **named))
        assert run(files, tmp_path / "run", "train.steps=4") == ""
    assert [row["step"] for row in lines(tmp_path / "run")] == [1, 2, 3, 4]
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["4"]


@pytest.mark.fault
def test_steps_that_are_not_finite_are_left_out_counted_and_told(files, quick_step, tmp_path):
    quick_step(bad=(3, 5, 6))
    said = run(files, tmp_path / "run", "train.steps=8", "train.max_skipped=3")
    rows = lines(tmp_path / "run")
    assert [row["skipped"] for row in rows] == [0, 0, 1, 1, 2, 3, 3, 3]
    assert [row["step"] for row in rows if row["loss"] is None] == [3, 5, 6]  # JSON has no word for it
    assert "skipped 3" in said
    rates = [row["learning_rate"] for row in rows]
    assert rates[2] == rates[3] and rates[4] == rates[5] == rates[6] > rates[7]  # as many updates, as far


@pytest.mark.fault
@pytest.mark.parametrize("parts", [1, 2])
def test_too_many_in_a_row_stop_the_run_with_the_batch_written(files, quick_step, tmp_path, parts):
    quick_step(bad=(4, 5, 6, 7))
    said = refusal(files, tmp_path / "run", "train.max_skipped=3", f"optimizer.accumulate={parts}")
    path = tmp_path / "run" / "bad_batches" / "step_6.npz"
    assert "of 3 steps in a row, up to step 6, is not finite" in said and str(path) in said
    batch = np.load(path)
    assert batch["context"].shape == (8, 32) and batch["query_text"][0].startswith("what does the")
    (step,) = Folder(tmp_path / "run").steps()
    assert step == 7 and [row["skipped"] for row in lines(tmp_path / "run")] == [0, 0, 0, 1, 2, 3, 4]
    # Behind them, it goes on.
    said = run(files, tmp_path / "run", "train.max_skipped=3", f"optimizer.accumulate={parts}")
    assert f"resuming from step 7 of {STEPS}" in said and lines(tmp_path / "run")[-1]["skipped"] == 4


@pytest.mark.fault
@pytest.mark.parametrize("full", [(15,), (30,), (15, 30)], ids=str)
def test_a_full_disk_costs_a_checkpoint_and_two_the_run(files, quick_step, tmp_path, monkeypatch, full):
    save, left = SealedWriter.save, list(full)

    def refuse(self, folder, arguments):
        if folder.name in map(str, left):
            left.remove(int(folder.name))
            raise OSError(errno.ENOSPC, "No space left on device")
        return save(self, folder, arguments)

    monkeypatch.setattr(SealedWriter, "save", refuse)
    if len(full) == 2:
        said = refusal(files, tmp_path / "run")
        assert "checkpoints/30 (" in said and "No space left on device; it is the second in a row" in said
        assert "there is none yet" in said
        return
    said = run(files, tmp_path / "run")
    assert f"checkpoints/{full[0]} (" in said and "No space left on device; the run goes on until the next one" in said
    assert 30 in Folder(tmp_path / "run").steps() and len(lines(tmp_path / "run")) == STEPS


@pytest.mark.fault
def test_a_folder_that_cannot_be_written_is_refused_in_one_sentence(files, quick_step):
    said = refusal(files, "/sys/comi_run")
    assert said == "error: /sys/comi_run cannot be written: Operation not permitted"
