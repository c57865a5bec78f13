"""Checkpoints that are damaged, foreign, too new or cannot be written: noticed, told, and nothing good is lost."""

import json
import random
import shutil

import fault_driver
import fault_fixtures
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from comi_jax.runs import checksums
from comi_jax.runs.arrays import SealedWriter, frugal, reading, write_once
from comi_jax.runs.checkpoints import Checkpoints, Progress, distributed, ocp
from comi_jax.runs.checksums import CheckpointError
from comi_jax.runs.folder import Folder
from comi_jax.training.state import TrainState

pytestmark = pytest.mark.fault
driver = fault_fixtures.driver


def state(value, width=16, dtype=jnp.float32, name="a/w"):
    weights = np.random.default_rng(value).standard_normal((width, 8)).astype(np.float32)
    trained = {name: jnp.asarray(weights, dtype), "b": jnp.full((3,), value, jnp.float32)}
    moments = ({"count": jnp.int32(value), "mu": {name: -trained[name]}}, ())
    return TrainState(jnp.int32(value), trained, moments)


def fill(folder, steps=(1, 2, 3), **more):
    said = []
    checkpoints = Checkpoints(folder, keep=len(steps), say=said.append)
    for step in steps:
        checkpoints.save(state(step, **more), Progress(step, {"next": step}))
    checkpoints.close()
    return folder / "checkpoints", said


@pytest.fixture(scope="module")
def filled(tmp_path_factory):
    return fill(tmp_path_factory.mktemp("filled"))[0]


@pytest.fixture
def folder(filled, tmp_path):
    shutil.copytree(filled, tmp_path / "checkpoints")
    return tmp_path


def restored(folder, like=None):
    """The step that is restored, whether its arrays are the right ones, and what is said."""
    said = []
    found, progress = Checkpoints(folder, say=said.append).restore_newest(like or state(0))
    assert progress.position == {"next": progress.step}
    same = jax.tree.map(lambda a, b: bool((a == b).all()), found, state(progress.step))
    return progress.step, all(jax.tree.leaves(same)), said


def files(checkpoint):
    return sorted(path for path in checkpoint.rglob("*") if path.is_file())


# --- damage -----------------------------------------------------------------------------------------------------------


def truncate(path, rng):
    path.write_bytes(path.read_bytes()[: rng.randrange(path.stat().st_size)])


def zero(path, rng):
    path.write_bytes(bytes(path.stat().st_size))


def delete(path, rng):
    path.unlink()


def flip(path, rng):
    content = bytearray(path.read_bytes())
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    path.write_bytes(content)


def check_damage(folder, damage, rng, file=None):
    """Damage one file of the newest checkpoint: then it is set aside and the one before it restored, or, if what the
    file holds has no bearing on values, it is restored as it was. Returns whether it was set aside."""
    newest = folder / "checkpoints" / "3"
    file = file or rng.choice([path for path in files(newest) if path.stat().st_size])
    content, name = file.read_bytes(), file.relative_to(newest)
    damage(file, rng)
    step, right, said = restored(folder)
    assert right, (name, damage)
    aside = folder / "checkpoints" / "3.damaged"
    if step == 3:
        assert not said and name.name in checksums.LATER and name.name != checksums.SUMS
        file.write_bytes(content)
        return False
    assert step == 2 and aside.is_dir()
    assert len(said) == 1 and "3 is damaged: " in said[0] and "kept as 3.damaged" in said[0]
    aside.rename(newest)  # nothing of it was touched, so it can be mended for the next trial
    (newest / name).write_bytes(content)
    return True


@pytest.mark.parametrize("damage", [truncate, zero, delete, flip])
def test_damage_of_any_file_is_noticed_and_the_checkpoint_before_is_restored(folder, damage):
    rng = random.Random(0)
    every = [path for path in files(folder / "checkpoints" / "3") if path.name not in checksums.LATER]
    assert len(every) > 10
    for file in rng.sample(every, 6):
        assert check_damage(folder, damage, rng, file)
    assert check_damage(folder, damage, rng, folder / "checkpoints" / "3" / checksums.SUMS)


def test_no_flipped_bit_changes_a_value_in_silence(folder):
    rng = random.Random(1)
    assert sum(check_damage(folder, flip, rng) for _ in range(12)) > 6


@pytest.mark.slow
@pytest.mark.parametrize("damage", [truncate, zero, delete, flip])
def test_no_damage_changes_a_value_in_silence_in_300_trials(folder, damage):
    rng = random.Random(2)
    assert sum(check_damage(folder, damage, rng) for _ in range(300)) > 200


def test_every_bit_of_a_small_folder_is_covered(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "data").write_bytes(bytes(range(64)))
    checksums.seal(tmp_path)
    assert checksums.verify(tmp_path)
    for bit in range(64 * 8):
        content = bytearray(range(64))
        content[bit // 8] ^= 1 << bit % 8
        (tmp_path / "a" / "data").write_bytes(content)
        with pytest.raises(checksums.DamageError, match="a/data has other content"):
            checksums.verify(tmp_path)


def test_what_fails_for_another_reason_than_damage_sets_nothing_aside(folder, monkeypatch):
    def refuse(*_):
        raise RuntimeError("RESOURCE_EXHAUSTED: out of memory\nmore of it")

    monkeypatch.setattr(ocp.StandardCheckpointer, "restore", refuse)
    message = "checkpoints/3 is as it was written, but cannot be restored here: RESOURCE_EXHAUSTED: out of memory$"
    with pytest.raises(CheckpointError, match=message):
        restored(folder)
    assert Folder(folder).steps() == [1, 2, 3]


def test_weights_that_find_no_room_on_the_disk_are_said_in_one_sentence(tmp_path, monkeypatch):
    def refuse(*_):
        raise ValueError("OUT_OF_RANGE: [os_error_code='27'] writing")

    monkeypatch.setattr(SealedWriter, "save", refuse)
    with pytest.raises(CheckpointError, match=r"frozen cannot be written: File too large \([\d,]+ bytes free there\)$"):
        write_once(tmp_path / "frozen", frugal({}), None)


def test_with_every_checkpoint_damaged_nothing_begins_anew(folder):
    for step in "123":
        delete(folder / "checkpoints" / step / "trained" / "_METADATA", None)
    checkpoints = Checkpoints(folder, say=lambda text: None)
    with pytest.raises(CheckpointError, match="none of the checkpoints .* can be read.* choose another train.output"):
        checkpoints.restore_newest(state(0))
    assert sorted(p.name for p in (folder / "checkpoints").iterdir()) == ["1.damaged", "2.damaged", "3.damaged"]
    assert Folder(folder).has_begun()


def test_a_second_damaged_checkpoint_of_a_step_replaces_none(folder):
    shutil.copytree(folder / "checkpoints" / "2", folder / "checkpoints" / "3.damaged")
    zero(folder / "checkpoints" / "3" / "trained" / "manifest.ocdbt", None)
    assert restored(folder)[:2] == (2, True)
    names = sorted(p.name for p in (folder / "checkpoints").iterdir())
    assert names == ["1", "2", "3.damaged", "3.damaged1"]


def test_a_reader_changes_nothing(folder):
    zero(folder / "checkpoints" / "3" / "trained" / "manifest.ocdbt", None)
    said = []
    checkpoints = Checkpoints(folder, say=said.append, read_only=True)
    assert checkpoints.restore_newest(state(0))[1].step == 2 and "left there" in said[0]
    assert sorted(p.name for p in (folder / "checkpoints").iterdir()) == ["1", "2", "3"]


def test_a_checkpoint_from_before_there_were_checksums_is_restored_with_a_note(folder):
    place = folder / "checkpoints" / "3"
    (place / checksums.SUMS).unlink()
    shutil.rmtree(place / "counters")
    metadata = json.loads((place / checksums.ORBAX).read_text())
    (place / checksums.ORBAX).write_text(json.dumps(metadata | {"custom_metadata": None}))
    step, right, said = restored(folder)
    assert (step, right) == (3, True) and "before there were checksums: not verified" in said[0]


# --- of another model, of another time --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "here, message",
    [
        (dict(width=17), r"trained/a/w is float32 \[16, 8\] there, float32 \[17, 8\] here"),
        (dict(dtype=jnp.bfloat16), r"trained/a/w is float32 \[16, 8\] there, bfloat16 \[16, 8\] here"),
        (dict(name="other/w"), "trained/other/w is not there; trained/a/w is there alone"),
    ],
    ids=["shape", "dtype", "names"],
)
def test_a_foreign_checkpoint_is_refused_with_the_differences(folder, here, message):
    with pytest.raises(CheckpointError, match=message) as refused:
        Checkpoints(folder, say=pytest.fail).restore_newest(state(0, **here))
    assert "is a checkpoint of another model" in str(refused.value) and "optimizer/0/mu/" in str(refused.value)
    assert sorted(p.name for p in (folder / "checkpoints").iterdir()) == ["1", "2", "3"]


def test_a_newer_format_is_refused_and_not_taken_for_damage(folder):
    sums = folder / "checkpoints" / "3" / checksums.SUMS
    sums.write_text(json.dumps(json.loads(sums.read_text()) | {"format": checksums.FORMAT + 1}))
    with pytest.raises(CheckpointError, match="reads formats up to 1; install the version that wrote it"):
        Checkpoints(folder, say=pytest.fail).restore_newest(state(0))
    assert (folder / "checkpoints" / "3").is_dir()


# --- no room ----------------------------------------------------------------------------------------------------------


def test_a_failed_save_is_told_and_the_next_one_succeeds(driver, tmp_path):
    child = driver.start(store=str(tmp_path), full=[2, 4])
    assert child.status() == 0, child.printed()
    told = child.printed().splitlines()
    small = fault_driver.small_state(2)
    size = sum(x.nbytes for x in jax.tree.leaves((small.trained, small.optimizer)))
    assert len(told) == 2 and f"checkpoint {tmp_path}/checkpoints/2 ({size:,} bytes, " in told[0]
    assert "cannot be saved: File too large; the run goes on until the next one" in told[0]
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["1", "3", "5"]
    assert Checkpoints(tmp_path).restore_newest(fault_driver.small_state(0))[1].step == 5


def test_a_second_failed_save_in_a_row_stops_the_run(driver, tmp_path):
    child = driver.start(store=str(tmp_path), full=[3, 4])
    assert child.status() == 1
    last = child.printed().splitlines()[-1]
    assert f"checkpoint {tmp_path}/checkpoints/4 (" in last
    assert "File too large; it is the second in a row, so the run stops; the newest is that of step 2" in last
    assert Checkpoints(tmp_path).restore_newest(fault_driver.small_state(0))[1].step == 2
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["1", "2"]


def test_what_fails_because_another_process_is_gone_is_no_damage_and_no_full_disk(tmp_path, monkeypatch):
    """It is told as what it is, so that the run is started again and no checkpoint is renamed."""
    gone = jax.errors.JaxRuntimeError("UNKNOWN: Gloo AllGather failed: Connection reset by peer")
    monkeypatch.setattr(distributed.jax, "process_count", lambda: 2)
    with pytest.raises(jax.errors.JaxRuntimeError, match="reset by peer"), reading(tmp_path):
        raise gone
    with pytest.raises(jax.errors.JaxRuntimeError, match="reset by peer"):
        Checkpoints(tmp_path)._missed(3, 100, gone)


@pytest.mark.parametrize(
    "error, waits",
    [(ValueError("UNKNOWN: Gloo AllGather failed: Connection reset by peer"), True), (OSError("disk full"), False)],
)
def test_what_may_come_of_a_process_that_is_gone_is_told_when_none_is(tmp_path, monkeypatch, error, waits):
    """The watch, which would end this process, has its time before the error is called a save that failed."""
    waited = []
    monkeypatch.setattr(distributed.jax, "process_count", lambda: 2)
    monkeypatch.setattr(distributed.time, "sleep", waited.append)
    monkeypatch.setenv("COMI_HEARTBEAT", "6")
    with pytest.raises(checksums.CheckpointError, match="cannot be saved"):
        Checkpoints(tmp_path)._missed(3, 100, error)
    assert bool(waited) == waits and sum(waited) >= 6 * waits
