"""Where arrays live: the device mesh, one table from logical to mesh axes, and the sharding of a batch."""

from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

from comi_jax.config import ConfigError, Mesh
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


def make_mesh(settings: Mesh) -> jax.sharding.Mesh:
    """The mesh over all devices; data = 0 takes those that fsdp and tensor leave."""
    devices = jax.device_count()
    rest = settings.fsdp * settings.tensor
    data = settings.data or devices // rest
    if data * rest != devices:
        raise ConfigError(
            f"mesh.data x mesh.fsdp x mesh.tensor = {data} x {settings.fsdp} x {settings.tensor} does not make the "
            f"{devices} devices there are"
        )
    shape = (data, settings.fsdp, settings.tensor)
    return jax.make_mesh(shape, AXES, axis_types=(jax.sharding.AxisType.Auto,) * len(AXES))


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


def like(array: jax.Array, mesh: jax.sharding.Mesh) -> NamedSharding:
    """The sharding that ``array`` has on ``mesh``; whole on every device if it has none there yet."""
    placed = array.sharding
    return placed if isinstance(placed, NamedSharding) and placed.mesh == mesh else NamedSharding(mesh, PartitionSpec())


def put_batch(batch: Any, mesh: jax.sharding.Mesh) -> Any:
    """``batch`` on the devices, its rows split over data and fsdp."""
    return jax.device_put(batch, NamedSharding(mesh, PartitionSpec(("data", "fsdp"))))
