"""The weights in a run's folder: the frozen ones, and all weights of a checkpoint."""

import contextlib
import os
import shutil
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import orbax.checkpoint as ocp

from comi_jax.devices import sharding
from comi_jax.model.architecture import Architecture, frozen_dtype, is_trained, specs
from comi_jax.params import Placement, as_stored, flatten, partition, unflatten
from comi_jax.runs import checksums, readback
from comi_jax.runs.arrays import WRITING, Say, frugal, intact, reading, restore_arrays, stored, write_once
from comi_jax.runs.checksums import CheckpointError, DamageError
from comi_jax.runs.description import Run, change, check_new, read_run, write_run
from comi_jax.runs.folder import Folder
from comi_jax.runs.readback import VerifiedSave
from comi_jax.runs.selection import existing

BEFORE = "; remove that folder to use the checkpoint before it"


def save_import(folder: str | os.PathLike, run: Run, arrays: Mapping[str, jax.Array], tokenizer: Any) -> None:
    """Write an imported model into the new or empty ``folder``: ``arrays`` by flat path, dtypes unchanged, as the
    checkpoint of step 0."""
    check_new(folder)
    trained, frozen = partition(arrays, lambda path: is_trained(path, run.architecture))
    write_run(folder, run, tokenizer)
    save_frozen(folder, frozen)
    handler = ocp.CompositeCheckpointHandler(trained=frugal(trained))
    place = Folder(folder).checkpoint(0)
    place.parent.mkdir()
    write_once(place, handler, ocp.args.Composite(trained=VerifiedSave(trained)))


def save_frozen(folder: str | os.PathLike, frozen: dict[str, Any]) -> None:
    """Write the frozen weights, replacing what an interrupted start may have left."""
    place = Folder(folder).frozen
    if jax.process_index() == 0:
        for old in (place, place.with_name(place.name + WRITING)):
            if old.exists():
                shutil.rmtree(old)
    write_once(place, frugal(frozen), VerifiedSave(frozen))


def restore_frozen(folder: str | os.PathLike, like: dict[str, jax.ShapeDtypeStruct], say: Say) -> dict[str, jax.Array]:
    """The frozen weights of the run in ``folder``, verified, with the shardings of ``like``."""
    place = Folder(folder).frozen
    if not place.is_dir():
        raise CheckpointError(f"{place} is missing, and the checkpoints of the run need it; restore it from a copy")
    if not checksums.verify(place):
        say(f"{place} was written before there were checksums: not verified")
        return restore_arrays(place, like)
    with intact(place):
        return restore_arrays(place, like)


def load_params(
    folder: str | os.PathLike,
    overrides: Sequence[str] = (),
    step: int | None = None,
    mesh: jax.sharding.Mesh | None = None,
) -> tuple[Run, dict[str, Any]]:
    """The run in ``folder`` with ``overrides`` applied, and all weights of checkpoint ``step`` (None: the newest) in
    the model's dtype, sharded over ``mesh`` (None: on one device).

    Raises CheckpointError if the folder holds no run or no such checkpoint, or if its files are damaged.
    """
    run = change(read_run(folder), overrides)
    arch = run.architecture
    shardings = {} if mesh is None else sharding.parameters(specs(arch), mesh)
    return run, unflatten(load_flat(folder, arch, lambda path: (frozen_dtype(path, arch), shardings.get(path)), step))


def load_flat(
    folder: str | os.PathLike, arch: Architecture, place: Placement = as_stored, step: int | None = None
) -> dict[str, jax.Array]:
    """All weights of checkpoint ``step`` (None: the newest) by flat path, with the dtype and sharding that ``place``
    gives for a path (None: the stored dtype; the first device). Raises CheckpointError if there is no such checkpoint
    or its files are damaged; damaged files are not renamed."""
    folder = Folder(folder)
    step = existing(folder, step)
    sealed = True
    for part, advice in ((folder.checkpoint(step), BEFORE), (folder.frozen, ""), (folder.tokenizer, "")):
        try:
            sealed &= checksums.verify(part)
        except DamageError as error:
            raise DamageError(f"{error}{advice}") from None
    with intact(folder.path) if sealed else contextlib.nullcontext():
        return _load_flat(folder, step, arch, place)


def _load_flat(folder: Folder, step: int, arch: Architecture, place: Placement) -> dict[str, jax.Array]:
    """``load_flat`` after the checksums are verified."""
    checkpoint = folder.checkpoint(step)
    trained, frozen = stored_arrays(folder, step)
    shapes = {path: spec.shape for path, spec in flatten(specs(arch)).items()}
    first = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])

    def abstract(path: str, stored: Any) -> jax.ShapeDtypeStruct:
        dtype, sharding = place(path)
        return jax.ShapeDtypeStruct(shapes[path], dtype or stored[path].dtype, sharding=sharding or first)

    with reading(folder.path):
        # By what is stored, not by what ``arch`` trains: a run that starts from this one may train other parameters.
        wanted = {path: abstract(path, trained) for path in shapes if path in trained}
        kept = {path: abstract(path, frozen) for path in shapes if path not in trained}
    with reading(checkpoint, BEFORE):
        arrays = restore_arrays(checkpoint / "trained", wanted)
    return arrays | restore_arrays(folder.frozen, kept)


def weights_of(folder: str | os.PathLike, step: int) -> str:
    """A checksum of the weights of checkpoint ``step``; empty if they have no checksums."""
    place, frozen = Folder(folder).checkpoint(step), Folder(folder).frozen
    parts = [readback.checksum_of_arrays(place / "trained"), readback.checksum_of_arrays(frozen)]
    if not all(parts):  # an earlier version: a hash of the files, which differ between runs
        parts = [checksums.identity(part) for part in (place, frozen)]
    return "".join(parts) if all(parts) else ""


def stored_arrays(folder: str | os.PathLike, step: int) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """The stored arrays by flat path, with shape and dtype: of checkpoint ``step``, and the frozen weights."""
    place, frozen = Folder(folder).checkpoint(step), Folder(folder).frozen
    with reading(place, BEFORE):
        return stored(place / "trained"), stored(frozen)
