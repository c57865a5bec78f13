"""What a save has written is read back before it counts; folders are names, never patterns."""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from comi_jax.runs import arrays, readback
from comi_jax.runs.checkpoints import Checkpoints, Progress
from comi_jax.runs.checksums import CheckpointError, DamageError
from comi_jax.runs.stored_weights import save_frozen
from comi_jax.training.state import TrainState

pytestmark = pytest.mark.fault


def state(value, place=None):
    numbers = np.random.default_rng(value).standard_normal((64, 32))
    trained = {"a/w": jnp.asarray(numbers, jnp.bfloat16), "b": jnp.float32(value)}
    moments = ({"count": jnp.int32(value), "mu": {"a/w": jnp.asarray(-numbers, jnp.float32)}}, ())
    given = TrainState(jnp.int32(value), trained, moments)
    return given if place is None else jax.tree.map(lambda x: jax.device_put(x, place(x)), given)


def save(folder, steps, say=print, place=None):
    checkpoints = Checkpoints(folder, keep=9, say=say)
    saved = []
    for step in steps:
        checkpoints.save(state(step, place), Progress(step, {"next": step}))
        saved.append(checkpoints.settle())
    checkpoints.close()
    return saved


def restored(folder, place=None):
    checkpoints = Checkpoints(folder)
    found, progress = checkpoints.restore_newest(state(0, place))
    checkpoints.close()
    same = jax.tree.map(lambda a, b: bool((a == b).all()), found, state(progress.step, place))
    assert all(jax.tree.leaves(same)) and progress.position == {"next": progress.step}
    return progress.step


# --- folders whose names mean something to the libraries underneath ---------------------------------------------------


@pytest.mark.parametrize("name", ["run a[1]", "a\\b", "a*b", "a**b", "a?", "gs:", "[!a]", "\udcff"])
def test_a_folder_of_any_name_can_be_restored(tmp_path, name):
    folder = tmp_path / name / "run"
    folder.mkdir(parents=True)
    assert save(folder, [1, 2]) == [True, True] and restored(folder) == 2
    save_frozen(folder, {"x": jnp.arange(3)})
    like = {"x": jax.ShapeDtypeStruct((3,), jnp.int32, sharding=jax.sharding.SingleDeviceSharding(jax.devices()[0]))}
    assert arrays.restore_arrays(folder / "frozen", like)["x"].tolist() == [0, 1, 2]
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_where_such_a_folder_cannot_be_written_it_is_refused_in_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr(arrays, "OPEN", tmp_path / "there is none")
    (tmp_path / "a[1]").mkdir()
    with pytest.raises(CheckpointError, match="has one of .* in its path.*; choose another folder"):
        save_frozen(tmp_path / "a[1]", {"x": jnp.arange(3)})


def test_a_save_that_the_library_believes_and_that_holds_nothing_is_noticed(tmp_path, monkeypatch):
    monkeypatch.setattr(arrays, "ODD", re.compile("(?!)"))  # as before: Orbax looks for a pattern and finds nothing
    folder = tmp_path / "a[1]"
    folder.mkdir()
    with pytest.raises(CheckpointError, match=r"a/w is missing.*the second in a row, so the run stops"):
        save(folder, [1, 2], say=lambda text: None)
    assert not Checkpoints(folder).steps()


# --- what is compared -------------------------------------------------------------------------------------------------


def before_comparing(monkeypatch, change, step):
    """Have ``change`` done to the folder of arrays of checkpoint ``step`` after it is written."""
    compare = readback.compare

    def changed(directory):
        if directory.parent.name.startswith(f"{step}.") and directory.name.startswith("trained"):
            change(directory)
        compare(directory)

    monkeypatch.setattr(readback, "compare", changed)


def flip(directory):
    """One bit in the middle of the numbers."""
    path = max((path for path in directory.rglob("d/*")), key=lambda path: path.stat().st_size)
    content = bytearray(path.read_bytes())
    content[1500] ^= 1
    path.write_bytes(content)


def lose(directory):
    for path in directory.rglob("d/*"):
        path.unlink()


@pytest.mark.parametrize("change, what", [(flip, "a/w has other content"), (lose, "cannot be opened")])
def test_a_save_that_differs_is_told_at_once_and_the_one_before_is_kept(tmp_path, monkeypatch, change, what):
    before_comparing(monkeypatch, change, step=2)
    said = []
    assert save(tmp_path, [1, 2], said.append) == [True, False]
    assert what in said[0] and "the checkpoint before it is kept" in said[0] and "cannot be saved" in said[1]
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["1"] and restored(tmp_path) == 1
    assert save(tmp_path, [3]) == [True] and restored(tmp_path) == 3


@pytest.mark.parametrize(
    "change, what",
    [
        (lambda arrays: arrays.update(new=arrays["b"]), "new is missing"),
        (lambda arrays: arrays.pop("b"), "b is unexpected"),
        (lambda arrays: arrays["b"].update(dtype="float64"), r"b is float32 \[\], not float64 \[\]"),
        (lambda arrays: arrays["a/w"].update(shape=[32, 64]), r"a/w is bfloat16 \[64, 32\], not bfloat16 \[32, 64\]"),
        (lambda arrays: arrays["a/w"]["shards"].pop(), "a/w has 0 numbers with a checksum, of 2,048"),
    ],
)
def test_index_shapes_dtypes_and_shards_are_compared(tmp_path, change, what):
    save(tmp_path, [1])
    place = tmp_path / "checkpoints" / "1" / "trained"
    readback.compare(place)
    path = place / "digests.0.json"
    values = json.loads(path.read_text())
    change(values["arrays"])
    path.write_text(json.dumps(values))
    with pytest.raises(DamageError, match=what):
        readback.compare(place)


def test_arrays_that_are_split_and_copied_over_devices_are_compared_shard_by_shard(tmp_path):
    mesh = jax.make_mesh((2, 2), ("fsdp", "data"), devices=jax.devices()[:4])

    def place(x):
        return NamedSharding(mesh, PartitionSpec("fsdp") if x.ndim else PartitionSpec())

    assert save(tmp_path, [1, 2], place=place) == [True, True] and restored(tmp_path, place) == 2
    stored = json.loads((tmp_path / "checkpoints" / "2" / "trained" / "digests.0.json").read_text())["arrays"]
    assert sorted(bounds for bounds, _ in stored["a/w"]["shards"]) == [[[0, 32], [0, 32]], [[32, 64], [0, 32]]]
    assert len(stored["b"]["shards"]) == 1


def test_the_position_in_the_data_is_read_back_too(tmp_path, monkeypatch):
    restore = readback.ocp.JsonCheckpointHandler.restore
    monkeypatch.setattr(readback.ocp.JsonCheckpointHandler, "restore", lambda *given: restore(*given) | {"next": 7})
    said = []
    assert save(tmp_path, [1], said.append) == [False] and "differs from what was written" in said[0]


def test_a_digest_is_of_the_numbers_not_of_how_they_lie_in_memory():
    rows = np.arange(12.0).reshape(3, 4)
    assert readback.digest(rows) == readback.digest(np.asfortranarray(rows)) != readback.digest(rows.T)
    assert readback.digest(np.asarray(1, np.float32)) == readback.digest(np.ones(1, np.float32))


def test_the_checksum_is_of_the_arrays_not_of_the_files_that_hold_them(tmp_path):
    found = {}
    for name, step in (("a", 1), ("b", 1), ("c", 2)):
        (tmp_path / name).mkdir()
        save(tmp_path / name, [step])
        found[name] = readback.checksum_of_arrays(tmp_path / name / "checkpoints" / str(step) / "trained")
    assert found["a"] == found["b"] != found["c"] and len(found["a"]) == 32
    assert readback.checksum_of_arrays(tmp_path) == ""
