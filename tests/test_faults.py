"""Runs that are killed, signalled or moved to other devices end with what an undisturbed one ends with."""

import json
import os
import random
import shutil
import signal
import time

import fault_driver
import fault_fixtures
import jax
import numpy as np
import pytest
import train_fixtures

from comi_jax.runs import selection
from comi_jax.runs.arrays import restore_arrays, stored
from comi_jax.runs.checkpoints import Checkpoints
from comi_jax.runs.folder import Folder
from comi_jax.training.signals import STOPPED

STEPS, SAVE_EVERY = fault_fixtures.STEPS, fault_fixtures.SAVE_EVERY
POINTS = [
    "before the folder", "mid-data", "before the comparison", "after the comparison", "before the checksums",
    "before the commit", "after the commit", "mid-prune",
]  # fmt: skip
pytestmark = pytest.mark.fault


driver = fault_fixtures.driver


@pytest.fixture(scope="module")
def undisturbed(driver):
    """A run in a process of its own, without a cache of compilations."""
    output = driver.folder / "undisturbed"
    assert driver.train(output, cache=False).status() == 0
    return result(output)


def result(folder):
    """The per-step numbers of a run, but for those of time and memory, and its weights and optimizer, bit for bit."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    numbers = [{n: v for n, v in row.items() if n not in ("tokens_per_second", "memory_gb")} for row in lines]
    place = folder / "checkpoints" / str(STEPS)
    parts = {part: stored(place / part) for part in ("trained", "optimizer")}
    one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    arrays = {}
    for part, tree in parts.items():
        like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=one), tree)
        for path, x in jax.tree_util.tree_leaves_with_path(restore_arrays(place / part, like)):
            arrays[part + jax.tree_util.keystr(path)] = np.asarray(x).tobytes()
    return numbers, arrays


def assert_tidy(folder):
    """Nothing half written, half removed or locked is left."""
    strange = [
        p for p in folder.rglob("*") if any(word in p.name for word in ("tmp", "draft", "part", "removing", "lock"))
    ]
    assert not strange
    names = sorted(p.name for p in folder.iterdir())
    assert set(names) <= {
        "checkpoints", "config.json", "examples.arrow", "examples.json", "frozen", "metrics.jsonl", "tensorboard",
        "tokenizer",
    }  # fmt: skip
    assert sorted(p.name for p in (folder / "checkpoints").iterdir()) == sorted([str(STEPS - SAVE_EVERY), str(STEPS)])


def last_step(folder):
    """The last step in the metrics of a run that was killed, its last line perhaps torn."""
    path = folder / "metrics.jsonl"
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    return max((json.loads(line)["step"] for line in lines if line.endswith(b"\n")), default=0)


# --- the same, in new processes ---------------------------------------------------------------------------------------


@pytest.mark.slow
def test_two_processes_compute_the_same_with_and_without_cached_compilations(driver, undisturbed):
    for name in ("fills the cache", "uses the cache"):
        assert driver.train(driver.folder / name).status() == 0
        assert result(driver.folder / name) == undisturbed


# --- kill -9 ----------------------------------------------------------------------------------------------------------


def check_kills(driver, undisturbed, name, kills, rng):
    """Train in a folder, killed again and again, and then to the end. A run that came to its end before it was killed
    gives way to a new one, so that all of ``kills`` take place."""
    output, kills = driver.folder / name, [*kills]
    while True:
        die = kills[0] if kills else None
        child = driver.train(output, die=die)
        if kills and die is None:  # at any moment from the start of its first step on, or sooner
            if rng.random() < 0.9:
                child.wait_for("memory per device")
            time.sleep(rng.uniform(0, 1.0))
            child.kill()
        status = child.status()
        if status == 0:
            assert result(output) == undisturbed
            assert_tidy(output)
            if not kills:
                return
            shutil.rmtree(output)
            continue
        assert kills.pop(0) == die and status == -signal.SIGKILL, child.printed()
        kept = max(Folder(output).steps(), default=0)
        assert last_step(output) - kept <= 2 * SAVE_EVERY


def test_a_run_that_is_killed_four_times_ends_as_the_one_that_was_not(driver, undisturbed):
    kills = [("mid-data", 1), None, ("before the commit", 2), ("mid-prune", 1)]
    check_kills(driver, undisturbed, "killed", kills, random.Random(0))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_a_run_that_is_killed_twenty_times_ends_as_the_one_that_was_not(driver, undisturbed, seed):
    rng = random.Random(seed)
    points = [
        "before the folder",
        "mid-data",
        "before the checksums",
        "before the commit",
        "after the commit",
        "mid-prune",
    ]
    kills = [(point, rng.randrange(1, 3)) for point in points] + [(point, 0) for point in points[1:4]] + [None] * 11
    rng.shuffle(kills)
    check_kills(driver, undisturbed, f"killed {seed}", kills, rng)


def check_store(driver, folder, die, rng):
    """A process that saves is killed; what is then restored is the newest that was committed."""
    before = max(Folder(folder).steps(), default=0)
    child = driver.start(store=str(folder), die=die)
    if die is None:
        child.wait_for("settled")
        time.sleep(rng.uniform(0, 0.5))
        child.kill()
    assert child.status() == -signal.SIGKILL, child.printed()
    settled = [line.split()[1] for line in child.printed().splitlines() if line.startswith("settled")]
    settled = max((int(step) for step in settled if step != "None"), default=before)
    there = max(Folder(folder).steps(), default=0)
    assert settled <= there <= settled + 2
    said = []
    checkpoints = Checkpoints(folder, say=said.append)
    if there:
        state, progress = checkpoints.restore_newest(fault_driver.small_state(0))
        assert progress.step == progress.position["next"] == there and not said
        jax.tree.map(np.testing.assert_array_equal, state, fault_driver.small_state(there))
    assert all(path.name.isdecimal() for path in (folder / "checkpoints").glob("*"))


@pytest.mark.parametrize("point", POINTS)
def test_whenever_a_process_dies_as_it_saves_the_newest_committed_checkpoint_is_restored(driver, tmp_path, point):
    check_store(driver, tmp_path, (point, 3), random.Random(0))
    check_store(driver, tmp_path, (point, 0), random.Random(0))


@pytest.mark.slow
def test_whenever_a_process_dies_as_it_saves_the_newest_committed_one_is_restored_many_times(driver, tmp_path):
    rng = random.Random(1)
    for _ in range(100):
        check_store(driver, tmp_path, rng.choice([None, None, (rng.choice(POINTS), rng.randrange(5))]), rng)


# --- signals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_a_signal_saves_and_ends_and_no_step_is_lost(driver, undisturbed, number):
    output = driver.folder / number.name
    child = driver.train(output)
    child.wait_for(f"step 5/{STEPS}")
    since = time.monotonic()
    child.kill(number)
    assert child.status() == STOPPED, child.printed()
    assert time.monotonic() - since < 10
    reached = last_step(output)
    assert f"stopped by {number.name} after step {reached} of {STEPS}" in child.printed()
    assert reached < STEPS and max(Folder(output).steps()) == reached
    child = driver.train(output)
    assert child.status() == 0 and f"resuming from step {reached} of" in child.printed()
    assert result(output) == undisturbed


def test_a_second_signal_ends_at_once_and_without_harm(driver, undisturbed):
    output = driver.folder / "impatient"
    child = driver.train(output, die=("slow save", 2))
    child.wait_for(f"step 6/{STEPS}")
    child.kill(signal.SIGINT)
    child.wait_for("signal again to exit at once")
    since = time.monotonic()
    child.kill(signal.SIGINT)
    assert child.status() == 130
    assert time.monotonic() - since < 2
    assert not (output / "lock").exists()
    assert driver.train(output).status() == 0
    assert result(output) == undisturbed


def test_a_signal_before_the_first_step_ends_at_once(driver):
    output = driver.folder / "early"
    child = driver.train(output, die=("SIGTERM before the first step", 0))
    assert child.status() == STOPPED and "there is nothing to save" in child.printed()
    assert "step 1/" not in child.printed() and not (output / "lock").exists()
    assert not Folder(output).steps()


# --- evaluation on the way --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "die, status",
    [
        (("in an evaluation", 140), -9),
        pytest.param(("after an evaluation", 0), -9, marks=pytest.mark.slow),
        pytest.param(("SIGTERM in an evaluation", 5), STOPPED, marks=pytest.mark.slow),
    ],
)
def test_an_evaluation_that_was_killed_goes_on_and_has_each_example_once(driver, die, status):
    settings = (f"data.eval={driver.dev}", "train.steps=4", "train.eval_every=2", "train.checkpoint_every=0")
    output, whole = driver.folder / f"evaluated {die[0]}", driver.folder / "evaluated"
    if not whole.exists():
        assert driver.train(whole, *settings).status() == 0
    child = driver.train(output, *settings, die=die)
    assert child.status() == status, child.printed()
    child = driver.train(output, *settings)
    assert child.status() == 0, child.printed()
    assert "resuming from step 2 of 4" in child.printed()
    kept = "resuming with 128 of 150 answers" in child.printed()
    assert kept == (die[0] == "in an evaluation")
    for name in ("evaluations/step_2.jsonl", "evaluations/step_4.jsonl", "evaluations.jsonl", "predictions.jsonl"):
        assert (output / name).read_bytes() == (whole / name).read_bytes(), name
    rows = [json.loads(line) for line in (output / "evaluations" / "step_2.jsonl").read_text().splitlines()]
    assert [row["index"] for row in rows] == list(range(150))
    assert [row["step"] for row in selection.evaluations(output)] == [2, 4]
    assert not list(output.rglob("*.part"))


# --- other devices ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_run_goes_on_with_another_number_of_devices(driver, undisturbed):
    """The same examples in the same order: the losses are those of the run that stayed where it was."""
    output = driver.folder / "moved"
    assert driver.train(output, die=("after the commit", 1)).status() == -9
    kept = max(Folder(output).steps())
    child = driver.train(output, devices=4)
    assert child.status() == 0 and f"resuming from step {kept} of {STEPS}" in child.printed()
    losses, expected = ([row["loss"] for row in rows] for rows in (result(output)[0], undisturbed[0]))
    np.testing.assert_allclose(losses, expected, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("devices", [(4, 1), (2, 4), (1, 2)])
def test_for_fifty_steps_the_losses_do_not_depend_on_the_devices(driver, devices):
    settings = ("train.steps=56", "optimizer.learning_rate=0.001")
    here, moved = (driver.folder / f"{name} {devices}" for name in ("here", "moved"))
    assert driver.train(here, *settings, devices=devices[0]).status() == 0
    assert driver.train(moved, *settings, devices=devices[0], die=("after the commit", 1)).status() == -9
    assert driver.train(moved, *settings, devices=devices[1]).status() == 0
    losses, expected = (
        [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
        for folder in (moved, here)
    )
    assert len(losses) == 56
    np.testing.assert_allclose(losses, expected, atol=1e-5)


# --- one trainer at a time --------------------------------------------------------------------------------------------


def test_a_second_trainer_is_refused_and_the_lock_of_a_dead_one_taken_over(driver, tmp_path):
    child = driver.train(tmp_path / "run")
    child.wait_for("memory per device")
    os.kill(child.pid, signal.SIGSTOP)
    before = {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()}
    with pytest.raises(SystemExit) as refused:
        train_fixtures.run(driver.command(tmp_path / "run"))
    assert f"is in use by process {child.pid} on {os.uname().nodename}, since " in refused.value.code
    assert {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()} == before
    child.kill()
    assert child.status() == -9 and (tmp_path / "run" / "lock").exists()
    assert driver.train(tmp_path / "run").status() == 0
    assert not (tmp_path / "run" / "lock").exists()
