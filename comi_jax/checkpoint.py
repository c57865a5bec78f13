"""A run's folder: its config, tokenizer, frozen weights (written once) and checkpoints of what changes (Orbax).

config.json      resolved config, backbone and stop tokens
tokenizer/       as transformers saves it
frozen/          weights that are not trained, by flat path
checkpoints/N/   after update N: trained weights, optimizer state, position in the data
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from comi_jax.comi import Architecture, is_trained, specs
from comi_jax.config import Backbone, Config, from_dict, to_dict
from comi_jax.params import combine, flatten

FORMAT = 1


class CheckpointError(ValueError):
    """A folder that holds no usable run, or another one; the message says which and what to do."""


@dataclass(frozen=True)
class Run:
    """What config.json of a run's folder says."""

    config: Config
    backbone: Backbone
    stop: tuple[int, ...]

    def __post_init__(self):
        self.config.compression.check(self.backbone)

    @property
    def architecture(self) -> Architecture:
        return Architecture.of(self.backbone, self.config)


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
        return Run(config, backbone, tuple(values["stop"]))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{path} does not describe a COMI checkpoint: {error}") from None


def open_run(folder: str | Path, run: Run, tokenizer: Any) -> None:
    """Make ``folder`` the folder of ``run``, or check that it already is.

    Raises CheckpointError if it holds checkpoints of a run with other settings, naming the differences, or files that
    belong to no run.
    """
    folder = Path(folder)
    started = (folder / "config.json").is_file()
    if started and any((folder / "checkpoints").glob("[0-9]*")):
        differences = _differences(read_run(folder), run)
        if differences:
            raise CheckpointError(
                f"{folder} already holds another run, with {'; '.join(differences)}; choose another train.output, or "
                "the same settings to go on with it"
            )
        return
    if not started and folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise CheckpointError(f"{folder} exists and is not a COMI run; choose another train.output")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tokenizer.save_pretrained(folder / "tokenizer")
        values = {"format": FORMAT, "config": to_dict(run.config), "backbone": to_dict(run.backbone), "stop": run.stop}
        (folder / "config.json").write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be written: {error}") from None


def _differences(old: Run, new: Run) -> list[str]:
    pairs = []
    for name in ("config", "backbone"):
        a, b = (flatten({name: to_dict(getattr(run, name))}) for run in (old, new))
        pairs += [
            f"{path.replace('/', '.').removeprefix('config.')} = {a.get(path)!r} there, {b.get(path)!r} here"
            for path in sorted(set(a) | set(b))
            if a.get(path) != b.get(path)
        ]
    return pairs


class Checkpoints:
    """The checkpoints of a run, written in the background and kept only when complete."""

    def __init__(self, folder: str | Path, keep: int = 2):
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=True)
        self._manager = ocp.CheckpointManager((Path(folder) / "checkpoints").absolute(), options=options)

    def latest(self) -> int | None:
        """The number of updates in the newest complete checkpoint."""
        return self._manager.latest_step()

    def save(self, step: int, state: Any, data: dict[str, Any]) -> None:
        """Start writing what ``state`` (train.TrainState) holds; its arrays may be donated once this returns."""
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
        restored = self._manager.restore(step, args=ocp.args.Composite(**items))
        changed = {"trained": restored["trained"], "optimizer": restored["optimizer"]}
        return state.replace(step=jnp.int32(step), **changed), restored["data"]

    def restore_trained(self, step: int, trained: Any) -> Any:
        """The trained weights alone."""
        args = ocp.args.Composite(trained=ocp.args.StandardRestore(trained))
        return self._manager.restore(step, args=args)["trained"]

    def close(self) -> None:
        """Wait until everything is on disk."""
        self._manager.wait_until_finished()
        self._manager.close()


def save_frozen(folder: str | Path, frozen: dict[str, Any]) -> None:
    """Write the weights that are not trained."""
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save((Path(folder) / "frozen").absolute(), frozen, force=True)


def load_params(folder: str | Path) -> tuple[Run, dict[str, Any]]:
    """The run in ``folder`` and all its weights after the newest checkpoint, in the model's dtype.

    Raises CheckpointError if the folder holds no run or no checkpoint yet.
    """
    run = read_run(folder)
    arch = run.architecture
    checkpoints = Checkpoints(folder, run.config.train.keep_checkpoints)
    step = checkpoints.latest()
    if step is None or not (Path(folder) / "frozen").is_dir():
        checkpoints.close()
        raise CheckpointError(f"{folder} has no complete checkpoint yet")
    shapes = {path: spec.shape for path, spec in flatten(specs(arch)).items()}
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])

    def abstract(path: str) -> jax.ShapeDtypeStruct:
        dtype = "float32" if path.startswith("mig/") else arch.dtype
        return jax.ShapeDtypeStruct(shapes[path], dtype, sharding=sharding)

    trained = checkpoints.restore_trained(step, {path: abstract(path) for path in shapes if is_trained(path, arch)})
    checkpoints.close()
    with ocp.StandardCheckpointer() as checkpointer:
        wanted = {path: abstract(path) for path in shapes if not is_trained(path, arch)}
        frozen = checkpointer.restore((Path(folder) / "frozen").absolute(), wanted)
    return run, combine(trained, frozen)
