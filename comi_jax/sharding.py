"""Where arrays live: the device mesh, one table from logical to mesh axes, and the sharding of a batch."""

import math
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

from comi_jax.config import Config, ConfigError, Mesh
from comi_jax.params import ParamSpec, Tree, flatten

AXES = ("data", "fsdp", "tensor")
RULES: dict[str | None, str | None] = {
    "layers": None,
    "embed": "fsdp",
    "heads": "tensor",
    "kv_heads": "tensor",
    "head": None,
    "mlp": "tensor",
    "vocab": "tensor",
    "norm": None,
    None: None,
}


def make_mesh(settings: Mesh, devices: Sequence[Any] | None = None) -> jax.sharding.Mesh:
    """The mesh over ``devices``, or all there are; the size that is 0 takes those that the others leave."""
    devices = jax.devices() if devices is None else devices
    sizes = [getattr(settings, axis) for axis in AXES]
    rest = math.prod(size for size in sizes if size)
    shape = tuple(size or len(devices) // rest for size in sizes)
    if math.prod(shape) != len(devices):
        raise ConfigError(
            f"{' x '.join(f'mesh.{axis}' for axis in AXES)} = {' x '.join(map(str, shape))} does not make the "
            f"{len(devices)} devices there are"
        )
    return jax.make_mesh(shape, AXES, axis_types=(jax.sharding.AxisType.Auto,) * len(AXES), devices=devices)


def micro_batches(config: Config, mesh: jax.sharding.Mesh) -> int:
    """How many micro-batches an update takes: optimizer.accumulate, or so many that each has one context a device.
    Raises ConfigError if their contexts do not divide over the devices."""
    contexts, devices = config.train.batch_size // config.train.share_context, mesh.shape["data"] * mesh.shape["fsdp"]
    parts = config.optimizer.accumulate or max(contexts // devices, 1)
    if contexts // parts % devices:
        raise ConfigError(
            f"train.batch_size / optimizer.accumulate / train.share_context = {contexts // parts} contexts do not "
            f"divide over {devices} devices; change one of them, or the mesh"
        )
    return parts


def partition_spec(spec: ParamSpec, mesh: jax.sharding.Mesh) -> PartitionSpec:
    """Mesh axes of a parameter's dimensions; a dimension that its axis does not divide stays whole."""
    axes: list[str | None] = []
    for size, logical in zip(spec.shape, spec.axes, strict=True):
        axis = RULES[logical]
        axes.append(axis if axis and size % mesh.shape[axis] == 0 else None)
    used = [axis for axis in axes if axis]
    if len(used) != len(set(used)):
        raise ValueError(f"a mesh axis is used twice by the axes {spec.axes}: {axes}")
    return PartitionSpec(*axes)


def parameters(specs: Tree, mesh: jax.sharding.Mesh) -> dict[str, NamedSharding]:
    """The sharding of every parameter, by its flat path."""
    return {path: NamedSharding(mesh, partition_spec(spec, mesh)) for path, spec in flatten(specs).items()}


def rows(mesh: jax.sharding.Mesh) -> NamedSharding:
    """Where the arrays of a batch lie: split over data and fsdp along their first axis."""
    return NamedSharding(mesh, PartitionSpec(("data", "fsdp")))


def put_batch(batch: Any, mesh: jax.sharding.Mesh) -> Any:
    """``batch``, which every process has whole, on the devices: each process hands its own rows to its own devices."""
    home = rows(mesh)
    return jax.tree.map(lambda x: jax.make_array_from_callback(x.shape, home, lambda index: x[index]), batch)
