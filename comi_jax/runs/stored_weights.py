"""The weights in a run's folder: those that are not trained, and all of them after a checkpoint."""

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
from comi_jax.runs import checksums
from comi_jax.runs.arrays import WRITING, Say, frugal, intact, reading, restore_arrays, stored, write_once
from comi_jax.runs.checksums import CheckpointError, DamageError
from comi_jax.runs.description import Run, change, check_new, read_run, write_run
from comi_jax.runs.folder import Folder
from comi_jax.runs.selection import existing

BEFORE = "; with that folder removed, the checkpoint before it is used"


def save_import(folder: str | os.PathLike, run: Run, arrays: Mapping[str, jax.Array], tokenizer: Any) -> None:
    """Make ``folder``, which must be new, the folder of a model that was trained elsewhere or not yet: ``arrays`` by
    flat path, in their own dtypes, as a checkpoint after 0 updates."""
    check_new(folder)
    trained, frozen = partition(arrays, lambda path: is_trained(path, run.architecture))
    write_run(folder, run, tokenizer)
    save_frozen(folder, frozen)
    handler = ocp.CompositeCheckpointHandler(trained=frugal(trained))
    place = Folder(folder).checkpoint(0)
    place.parent.mkdir()
    write_once(place, handler, ocp.args.Composite(trained=ocp.args.PyTreeSave(trained)))


def save_frozen(folder: str | os.PathLike, frozen: dict[str, Any]) -> None:
    """Write the weights that are not trained; what an earlier start left of them is replaced."""
    place = Folder(folder).frozen
    if jax.process_index() == 0:
        for old in (place, place.with_name(place.name + WRITING)):
            if old.exists():
                shutil.rmtree(old)
    write_once(place, frugal(frozen), ocp.args.PyTreeSave(frozen))


def restore_frozen(folder: str | os.PathLike, like: dict[str, jax.ShapeDtypeStruct], say: Say) -> dict[str, jax.Array]:
    """The weights of the run in ``folder`` that are not trained, verified, placed as ``like``."""
    place = Folder(folder).frozen
    if not place.is_dir():
        raise CheckpointError(f"{place} is missing, and the checkpoints of the run need it; put a copy back")
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
    """The run in ``folder``, its settings changed by ``overrides``, and all its weights after checkpoint ``step``
    (None: the newest), in the model's dtype, split over ``mesh`` (None: on one device).

    Raises CheckpointError if the folder holds no run or no such checkpoint, or if its files are damaged.
    """
    run = change(read_run(folder), overrides)
    arch = run.architecture
    homes = {} if mesh is None else sharding.parameters(specs(arch), mesh)
    return run, unflatten(load_flat(folder, arch, lambda path: (frozen_dtype(path, arch), homes.get(path)), step))


def load_flat(
    folder: str | os.PathLike, arch: Architecture, place: Placement = as_stored, step: int | None = None
) -> dict[str, jax.Array]:
    """All weights of the run in ``folder`` after checkpoint ``step`` (None: the newest), by flat path, in the dtypes
    and places that ``place`` gives (None: as stored, on the first device). Raises CheckpointError if there is no such
    checkpoint, or if its files are damaged: nothing is renamed or replaced here."""
    folder = Folder(folder)
    step = existing(folder, step)
    place_of_trained = folder.checkpoint(step)
    sealed = True
    for part, advice in ((place_of_trained, BEFORE), (folder.frozen, ""), (folder.tokenizer, "")):
        try:
            sealed &= checksums.verify(part)
        except DamageError as error:
            raise DamageError(f"{error}{advice}") from None
    with intact(folder.path) if sealed else contextlib.nullcontext():
        return _load_flat(folder, step, arch, place)


def _load_flat(folder: Folder, step: int, arch: Architecture, place: Placement) -> dict[str, jax.Array]:
    """``load_flat`` of files whose checksums, if there are any, are right."""
    place_of_trained = folder.checkpoint(step)
    trained, frozen = stored_arrays(folder, step)
    shapes = {path: spec.shape for path, spec in flatten(specs(arch)).items()}
    first = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])

    def abstract(path: str, stored: Any) -> jax.ShapeDtypeStruct:
        dtype, sharding = place(path)
        return jax.ShapeDtypeStruct(shapes[path], dtype or stored[path].dtype, sharding=sharding or first)

    with reading(folder.path):
        # By what is stored, not by what ``arch`` trains: a run may train another part of a model than made it.
        wanted = {path: abstract(path, trained) for path in shapes if path in trained}
        kept = {path: abstract(path, frozen) for path in shapes if path not in trained}
    with reading(place_of_trained, BEFORE):
        arrays = restore_arrays(place_of_trained / "trained", wanted)
    return arrays | restore_arrays(folder.frozen, kept)


def weights_of(folder: str | os.PathLike, step: int) -> str:
    """A short name for the weights of checkpoint ``step``; empty if they were written without checksums."""
    parts = [checksums.identity(part) for part in (Folder(folder).checkpoint(step), Folder(folder).frozen)]
    return "".join(parts) if all(parts) else ""


def stored_arrays(folder: str | os.PathLike, step: int) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """What is on disk, by flat path, with shape and dtype: of checkpoint ``step``, and of the frozen weights."""
    place, frozen = Folder(folder).checkpoint(step), Folder(folder).frozen
    with reading(place, BEFORE):
        return stored(place / "trained"), stored(frozen)
