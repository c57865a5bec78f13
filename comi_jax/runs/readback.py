"""Verified saves: every array is read back from disk and compared with what the writer was given.

Each process writes the checksums of its own shards beside the arrays, computed from the host copies that Orbax writes.
When all are on disk, process 0, which also seals and renames the folder, reads back every shard of every process: one
at a time in host memory, none on a device. A folder that differs is never renamed to a checkpoint.
"""

import concurrent.futures
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts
import xxhash

from comi_jax.runs.checksums import DamageError

FORMAT = 1
DIGESTS = "digests"  # digests.N.json: checksums of the shards of process N
SHOWN = 3  # the most differences that a message names


class VerifyingHandler(ocp.PyTreeCheckpointHandler):
    """Orbax's writer of a tree of arrays, which also reads the arrays back before the save is complete. A difference is
    reported through ``say`` at once, and raised as DamageError when the caller waits for the save."""

    def __init__(self, say: Callable[[str], None] | None = None, **options: Any):
        super().__init__(**options)
        self._say = say

    async def async_save(self, directory: Any, item: Any = None, save_args: Any = None, args: Any = None) -> list[Any]:
        written = await super().async_save(directory, item, save_args, args)
        # Orbax has already made the host copies: there is no second transfer from the devices.
        return [*(written or ()), _Digests(Path(getattr(directory, "path", directory)), args.item)]

    def finalize(self, directory: Any) -> None:
        super().finalize(directory)
        try:
            compare(Path(directory))
        except DamageError as error:
            if self._say:
                self._say(f"{error}; the checkpoint before it is kept")
            raise


@ocp.args.register_with_handler(VerifyingHandler, for_save=True)
@dataclasses.dataclass
class VerifiedSave(ocp.args.PyTreeSave):
    """Orbax arguments: a tree of arrays to write and read back."""


@ocp.args.register_with_handler(VerifyingHandler, for_restore=True)
@dataclasses.dataclass
class VerifiedRestore(ocp.args.PyTreeRestore):
    """Unused, but Orbax requires it; ``arrays`` does the reading."""


class VerifyingJson(ocp.JsonCheckpointHandler):
    """Orbax's writer of a JSON value, which also reads it back. Raises DamageError if it differs."""

    async def async_save(self, directory: Any, item: Any = None, args: Any = None) -> list[Any] | None:
        self._given = json.dumps(args.item, sort_keys=True)
        return await super().async_save(directory, args=args)

    def finalize(self, directory: Any) -> None:
        super().finalize(directory)
        try:
            found = json.dumps(ocp.JsonCheckpointHandler().restore(directory), sort_keys=True)
        except (OSError, ValueError) as error:
            raise DamageError(
                f"{_title(Path(directory))}, read back from disk, cannot be opened: {str(error)[:200]}"
            ) from error
        if found != self._given:
            raise DamageError(f"{_title(Path(directory))}, read back from disk, differs from what was written")


@ocp.args.register_with_handler(VerifyingJson, for_save=True)
@dataclasses.dataclass
class VerifiedJson(ocp.args.JsonSave):
    """Orbax arguments: a JSON value to write and read back."""


@ocp.args.register_with_handler(VerifyingJson, for_restore=True)
@dataclasses.dataclass
class VerifiedJsonRestore(ocp.args.JsonRestore):
    """Unused, but Orbax requires it; ``arrays`` does the reading."""


def name_of(path: tuple[Any, ...]) -> str:
    """Orbax's name for the array at ``path`` of a tree."""
    return ".".join(str(next(getattr(key, k) for k in ("key", "idx", "name") if hasattr(key, k))) for key in path)


def _title(directory: Path) -> str:
    """The final name of ``directory``, without the suffix that Orbax adds until it is complete."""
    return directory.name.partition(".")[0]


class _Digests:
    """The checksums of this process's shards of ``tree``, computed in a background thread. Orbax calls ``result`` when
    the arrays are written; it writes the checksums beside them."""

    def __init__(self, directory: Path, tree: Any):
        leaves = jax.tree_util.tree_leaves_with_path(tree)
        self._arrays = {name_of(path): (str(x.dtype), x.shape, _shards(x)) for path, x in leaves}
        self._directory, self._thread = directory, concurrent.futures.ThreadPoolExecutor(1, "digests")
        self._computed = self._thread.submit(self._compute)
        self._thread.shutdown(wait=False)

    def _compute(self) -> dict[str, Any]:
        found = {}
        while self._arrays:  # free each host copy as soon as its checksum is known
            name, (dtype, shape, shards) = self._arrays.popitem()
            found[name] = {"dtype": dtype, "shape": shape, "shards": [[i, digest(x)] for i, x in shards]}
        return found

    def result(self, timeout: float | None = None) -> None:
        values = {"format": FORMAT, "algorithm": "xxh3_128", "arrays": self._computed.result(timeout)}
        path = self._directory / f"{DIGESTS}.{jax.process_index()}.json"
        path.write_text(json.dumps(values), encoding="utf-8")


def _shards(array: Any) -> list[tuple[list[list[int]], np.ndarray]]:
    """The bounds (start, stop per dimension) and the host copy of each shard of ``array`` that this process writes."""
    if not isinstance(array, jax.Array):
        return [(_bounds((slice(None),) * array.ndim, array.shape), array)] if jax.process_index() == 0 else []
    own = [shard for shard in array.addressable_shards if shard.replica_id == 0]
    return [(_bounds(shard.index, array.shape), np.asarray(shard.data)) for shard in own]


def _bounds(index: tuple[slice, ...], shape: tuple[int, ...]) -> list[list[int]]:
    return [list(part.indices(size)[:2]) for part, size in zip(index, shape, strict=True)]


def digest(array: np.ndarray) -> str:
    """The 128-bit xxh3 hash of the elements in row-major order, in hex."""
    return xxhash.xxh3_128(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data).hexdigest()


def checksum_of_arrays(directory: Path) -> str:
    """A checksum of all arrays in ``directory``, from their digests: equal for equal arrays with the same shards. Empty
    if there are no digests, as in folders of an earlier version."""
    arrays = _handed(directory)
    words = json.dumps({name: entry | {"shards": sorted(entry["shards"])} for name, entry in sorted(arrays.items())})
    return xxhash.xxh3_128(words.encode()).hexdigest() if arrays else ""


def _handed(directory: Path) -> dict[str, dict[str, Any]]:
    """The digests of all processes in ``directory``: dtype, shape and shards (bounds, hash) by array name."""
    arrays: dict[str, dict[str, Any]] = {}
    for path in directory.glob(f"{DIGESTS}.*.json"):
        for name, entry in json.loads(path.read_text(encoding="utf-8"))["arrays"].items():
            arrays.setdefault(name, entry | {"shards": []})["shards"].extend(entry["shards"])
    return arrays


def compare(directory: Path) -> None:
    """Raise DamageError unless ``directory`` holds exactly the arrays of its digests, with their shapes, dtypes and
    bytes."""
    expected = _handed(directory)
    base = {"driver": "ocdbt", "base": {"driver": "file", "path": f"{directory}/"}}
    try:
        context = ts.Context()  # a fresh context, so that no cache of the writer is used
        keys = ts.KvStore.open(base, context=context).result().list().result()
        there = {key.decode().removesuffix("/.zarray") for key in keys if key.endswith(b"/.zarray")}
        wrong = [f"{name} is missing" for name in sorted(expected.keys() - there)]
        wrong += [f"{name} is unexpected" for name in sorted(there - expected.keys())]
        for name in sorted(expected.keys() & there):
            array = ts.open({"driver": "zarr", "kvstore": base | {"path": f"{name}/"}}, context=context).result()
            wrong += [f"{name} {what}" for what in _differences(array, expected[name])]
    except (ValueError, OSError, KeyError, TypeError) as error:  # TensorStore's errors for unreadable files
        raise DamageError(f"{_title(directory)}, read back from disk, cannot be opened: {str(error)[:200]}") from error
    if wrong:
        more = f" and {len(wrong) - SHOWN} more" if len(wrong) > SHOWN else ""
        raise DamageError(
            f"{_title(directory)}, read back from disk, differs from what was written: {', '.join(wrong[:SHOWN])}{more}"
        )


def _differences(array: Any, expected: dict[str, Any]) -> list[str]:
    """How the stored ``array`` differs from its digest; empty if it does not."""
    found, wanted = ((str(array.dtype.numpy_dtype), list(array.shape)), (expected["dtype"], list(expected["shape"])))
    if found != wanted:
        return [f"is {found[0]} {found[1]}, not {wanted[0]} {wanted[1]}"]
    covered = sum(int(np.prod([stop - start for start, stop in bounds])) for bounds, _ in expected["shards"])
    if covered != int(np.prod(expected["shape"])):
        return [f"has {covered:,} numbers with a checksum, of {int(np.prod(expected['shape'])):,}"]
    for bounds, value in expected["shards"]:
        part = array[tuple(slice(start, stop) for start, stop in bounds)] if bounds else array
        if digest(part.read().result()) != value:
            return ["has other content"]
    return []
