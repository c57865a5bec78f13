"""A run's folder: its config, tokenizer, frozen weights (written once) and checkpoints of what changes (Orbax).

config.json      resolved config, backbone and stop tokens
tokenizer/       as transformers saves it
frozen/          weights that are not trained, by flat path
checkpoints/N/   after update N: trained weights, optimizer state, position in the data
"""

import contextlib
import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from comi_jax.comi import Architecture, is_trained, specs
from comi_jax.config import Backbone, Config, ConfigError, from_dict, override, to_dict
from comi_jax.params import flatten, partition, unflatten
from comi_jax.weights import Placement, as_stored

FORMAT = 1
# Settings that a trained model can be used with in another way than it was trained with.
CHANGEABLE = (
    "data.max_context", "data.max_query", "data.on_long", "data.buckets", "model.attention", "model.dtype",
    "compression.rates", "compression.segment_size", "compression.coarse", "compression.fine",
    "compression.coarse_redundancy", "compression.fine_redundancy", "generation.max_new_tokens",
    "generation.repetition_penalty",
)  # fmt: skip


BEFORE = "; with that folder removed, the checkpoint before it is used"


class CheckpointError(ValueError):
    """A folder that holds no usable run, or another one; the message says which and what to do."""


@dataclass(frozen=True)
class Run:
    """What config.json of a run's folder says."""

    config: Config
    backbone: Backbone
    stop: tuple[int, ...]
    imported: bool = False  # converted, not trained here: weights are stored in the dtypes they came in

    def __post_init__(self):
        self.config.compression.check(self.backbone)

    @property
    def architecture(self) -> Architecture:
        return Architecture.of(self.backbone, self.config)


def is_run(folder: str | Path) -> bool:
    """Whether ``folder`` has the description of a COMI run, as opposed to a language model's config.json."""
    try:
        return "format" in json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError):
        return False


def read_run(folder: str | Path) -> Run:
    """The description of the run in ``folder``. Raises CheckpointError if it holds none."""
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise CheckpointError(f"{folder} is not a COMI checkpoint: it has no config.json")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if values.get("format") != FORMAT:
            raise CheckpointError(
                f"{path} is not a COMI checkpoint of format {FORMAT} (its format is {values.get('format')!r})"
            )
        config, backbone = from_dict(Config, values["config"]), from_dict(Backbone, values["backbone"], "backbone")
        return Run(config, backbone, tuple(values["stop"]), bool(values.get("imported", False)))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{path} does not describe a COMI checkpoint: {error}") from None


def check_folder(folder: str | Path, run: Run) -> bool:
    """Whether ``folder`` holds checkpoints of ``run``. Raises CheckpointError, as ``open_run``, if it holds anything
    else."""
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise CheckpointError(f"{folder} exists and is not a COMI run; choose another train.output")
        return False
    differences = _differences(read_run(folder), run)
    if not any((folder / "checkpoints").glob("[0-9]*")):
        return False
    if differences:
        raise CheckpointError(
            f"{folder} already holds another run, with {'; '.join(differences)}; choose another train.output, or the "
            "same settings to go on with it"
        )
    return True


def open_run(folder: str | Path, run: Run, tokenizer: Any) -> None:
    """Make ``folder`` the folder of ``run``, or check that it already is.

    Raises CheckpointError if it holds checkpoints of a run with other settings, naming the differences, or files that
    belong to no run.
    """
    if check_folder(folder, run):
        return
    write_run(folder, run, tokenizer)


def write_run(folder: str | Path, run: Run, tokenizer: Any) -> None:
    """The description of ``run`` and its tokenizer, as files in ``folder``."""
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        values = {"format": FORMAT, "config": to_dict(run.config), "backbone": to_dict(run.backbone), "stop": run.stop}
        if run.imported:
            values["imported"] = True
        (folder / "config.json").write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
        tokenizer.save_pretrained(folder / "tokenizer")
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be written: {error}") from None


def _differences(old: Run, new: Run) -> list[str]:
    pairs = []
    for name in ("config", "backbone"):
        a, b = (flatten({name: to_dict(getattr(run, name))}) for run in (old, new))
        pairs += [
            f"{path.replace('/', '.').removeprefix('config.')} = {a.get(path)!r} there, {b.get(path)!r} here"
            for path in sorted(set(a) | set(b))
            if a.get(path) != b.get(path) and path != "config/train/output"  # a run may be moved
        ]
    return pairs


@contextlib.contextmanager
def _reading(path: Path, advice: str = "") -> Iterator[None]:
    """Turn what Orbax raises for a damaged folder, which may be a bare Exception, into a CheckpointError."""
    try:
        yield
    except Exception as error:
        reason = str(error).split("\n")[0][:200]
        raise CheckpointError(f"{path} cannot be read, files are damaged or missing ({reason}){advice}") from error


class Checkpoints:
    """The checkpoints of a run, written in the background and kept only when complete."""

    def __init__(self, folder: str | Path, keep: int | None = None, *, create: bool = True):
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=create)
        self._manager = ocp.CheckpointManager((Path(folder) / "checkpoints").absolute(), options=options)

    def latest(self) -> int | None:
        """The number of updates in the newest complete checkpoint."""
        return self._manager.latest_step()

    def save(self, step: int, state: Any, data: dict[str, Any]) -> None:
        """Start writing what ``state`` (step.TrainState) holds; its arrays may be donated once this returns."""
        items = {
            "trained": ocp.args.StandardSave(state.trained),
            "optimizer": ocp.args.StandardSave(state.optimizer),
            "data": ocp.args.JsonSave(data),
        }
        self._manager.save(step, args=ocp.args.Composite(**items))

    def restore(self, step: int, state: Any) -> tuple[Any, dict[str, Any]]:
        """The state after ``step`` updates, placed like the arrays of ``state``, and the position in the data."""
        like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
        items = {
            "trained": ocp.args.StandardRestore(like.trained),
            "optimizer": ocp.args.StandardRestore(like.optimizer),
            "data": ocp.args.JsonRestore(),
        }
        restored = self._restore(step, items)
        changed = {"trained": restored["trained"], "optimizer": restored["optimizer"]}
        count = jax.device_put(jnp.int32(step), state.step.sharding)
        return state.replace(step=count, **changed), restored["data"]

    def restore_trained(self, step: int, trained: Any) -> Any:
        """The trained weights alone."""
        return self._restore(step, {"trained": ocp.args.StandardRestore(trained)})["trained"]

    def _restore(self, step: int, items: dict[str, Any]) -> Any:
        place = Path(self._manager.directory) / str(step)
        with _reading(place, BEFORE):
            return self._manager.restore(step, args=ocp.args.Composite(**items))

    def close(self) -> None:
        """Wait until everything is on disk."""
        self._manager.wait_until_finished()
        self._manager.close()


def save_import(folder: str | Path, run: Run, arrays: Mapping[str, jax.Array], tokenizer: Any) -> None:
    """Make ``folder``, which must be new, the folder of a model that was trained elsewhere or not yet: ``arrays`` by
    flat path, in their own dtypes, as a checkpoint after 0 updates."""
    check_new(folder)
    trained, frozen = partition(arrays, lambda path: is_trained(path, run.architecture))
    write_run(folder, run, tokenizer)
    save_frozen(folder, frozen)
    place, handlers = (Path(folder) / "checkpoints").absolute(), {"trained": _frugal(trained)}
    with ocp.CheckpointManager(place, item_handlers=handlers) as manager:
        manager.save(0, args=ocp.args.Composite(trained=ocp.args.PyTreeSave(trained)))


def check_new(folder: str | Path) -> None:
    """Refuse a folder that holds anything."""
    if Path(folder).exists() and (not Path(folder).is_dir() or any(Path(folder).iterdir())):
        raise CheckpointError(f"{folder} exists and is not empty; choose another --output")


def save_frozen(folder: str | Path, frozen: dict[str, Any]) -> None:
    """Write the weights that are not trained."""
    with ocp.Checkpointer(_frugal(frozen)) as checkpointer:
        checkpointer.save((Path(folder) / "frozen").absolute(), args=ocp.args.PyTreeSave(frozen), force=True)


def _frugal(arrays: Mapping[str, jax.Array]) -> ocp.PyTreeCheckpointHandler:
    """Writes about an array at a time, and as it is: a model that fills the memory has no room for a copy of itself.
    Compression, which gains little on weights, makes one and takes three times as long."""
    largest = max((array.nbytes for array in arrays.values()), default=0)
    return ocp.PyTreeCheckpointHandler(save_concurrent_gb=largest // 10**9 + 1, use_compression=False)


def change(run: Run, overrides: Sequence[str]) -> Run:
    """``run`` with other settings, ``path=value``, than it was trained with. Raises ConfigError for one that is not
    among CHANGEABLE."""
    for word in overrides:
        if word.partition("=")[0] not in CHANGEABLE:
            raise ConfigError(f"{word} cannot be set for a trained model; what can is {', '.join(CHANGEABLE)}")
    return dataclasses.replace(run, config=override(run.config, overrides))


def load_params(folder: str | Path, overrides: Sequence[str] = ()) -> tuple[Run, dict[str, Any]]:
    """The run in ``folder``, its settings changed by ``overrides``, and all its weights after the newest checkpoint, in
    the model's dtype.

    Raises CheckpointError if the folder holds no run or no checkpoint yet.
    """
    run = change(read_run(folder), overrides)
    arch = run.architecture
    return run, unflatten(load_flat(folder, arch, lambda path: (frozen_dtype(path, arch), None)))


def load_flat(folder: str | Path, arch: Architecture, place: Placement = as_stored) -> dict[str, jax.Array]:
    """All weights of the run in ``folder`` after its newest checkpoint, by flat path, in the dtypes and places that
    ``place`` gives (None: as stored, on the first device). Raises CheckpointError if it has no checkpoint yet."""
    folder = Path(folder)
    if not all((folder / name).is_dir() for name in ("checkpoints", "frozen")):
        raise CheckpointError(f"{folder} has no complete checkpoint yet")
    with contextlib.closing(Checkpoints(folder, create=False)) as checkpoints:
        step = checkpoints.latest()
        if step is None:
            raise CheckpointError(f"{folder} has no complete checkpoint yet")
        trained, frozen = stored_arrays(folder, step)
        shapes = {path: spec.shape for path, spec in flatten(specs(arch)).items()}
        first = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])

        def abstract(path: str, stored: Any) -> jax.ShapeDtypeStruct:
            dtype, sharding = place(path)
            return jax.ShapeDtypeStruct(shapes[path], dtype or stored[path].dtype, sharding=sharding or first)

        with _reading(folder):
            # By what is stored, not by what ``arch`` trains: a run may train another part of a model than made it.
            wanted = {path: abstract(path, trained) for path in shapes if path in trained}
            kept = {path: abstract(path, frozen) for path in shapes if path not in trained}
        arrays = checkpoints.restore_trained(step, wanted)
    place_of_frozen = (folder / "frozen").absolute()
    with ocp.StandardCheckpointer() as checkpointer, _reading(place_of_frozen):
        return arrays | checkpointer.restore(place_of_frozen, kept)


def newest(folder: str | Path) -> int | None:
    """The number of updates in the newest complete checkpoint of ``folder``, if it has one."""
    if not all((Path(folder) / name).is_dir() for name in ("checkpoints", "frozen")):
        return None
    with contextlib.closing(Checkpoints(folder, create=False)) as checkpoints:
        return checkpoints.latest()


def stored_arrays(folder: str | Path, step: int) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """What is on disk, by flat path, with shape and dtype: of checkpoint ``step``, and of the frozen weights."""
    newest_one, frozen = Path(folder) / "checkpoints" / str(step), Path(folder) / "frozen"
    found = []
    for place, items in ((newest_one, newest_one / "trained"), (frozen, frozen)):
        with _reading(place, BEFORE if place is newest_one else ""):
            found.append(ocp.StandardCheckpointHandler().metadata(items.absolute()).tree)
    return found[0], found[1]


def frozen_dtype(path: str, arch: Architecture) -> str:
    """Frozen weights are kept in the model's dtype, COMI's scalars in float32."""
    return "float32" if path.startswith("mig/") else arch.dtype
