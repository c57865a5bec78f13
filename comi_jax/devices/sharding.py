"""Where arrays live: the device mesh, one table from logical to mesh axes, and the sharding of a batch."""

import math
from collections.abc import Sequence
from typing import Any

import jax
from jax.experimental import mesh_utils
from jax.sharding import NamedSharding, PartitionSpec

from comi_jax.config import Backbone, Config, ConfigError, Mesh
from comi_jax.params import ParamSpec, Tree, flatten

AXES = ("data", "fsdp", "tensor", "context")
RULES: dict[str | None, tuple[str, ...]] = {
    "layers": (),
    "embed": ("context", "fsdp"),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "head": (),
    "mlp": ("tensor",),
    "vocab": ("tensor",),
    "norm": (),
    None: (),
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
    # jax.make_mesh splits an axis of a TPU slice over two of ours on v5e alone.
    placed = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    return jax.sharding.Mesh(placed, AXES, axis_types=(jax.sharding.AxisType.Auto,) * len(AXES))


def micro_batches(config: Config, mesh: jax.sharding.Mesh) -> int:
    """How many micro-batches an update takes: optimizer.accumulate, or so many that each has one context a device.
    Raises ConfigError if their contexts do not divide over the devices."""
    contexts, devices = config.train.batch_size // config.train.share_context, row_shards(mesh)
    parts = config.optimizer.accumulate or max(contexts // devices, 1)
    if contexts % (parts * devices):
        raise ConfigError(
            f"train.batch_size / train.share_context = {contexts} contexts do not divide over {parts} micro-batches "
            f"(optimizer.accumulate) on {devices} devices (mesh.data x mesh.fsdp); change one of them"
        )
    return parts


def check_heads(backbone: Backbone, mesh: jax.sharding.Mesh) -> None:
    """Refuse a mesh whose context axis cannot share out the heads: attention splits them over it while it runs."""
    heads, tensor, parts = backbone.num_attention_heads, mesh.shape["tensor"], mesh.shape["context"]
    here = heads // tensor if backbone.num_key_value_heads % tensor == 0 else heads
    if here % parts:
        raise ConfigError(
            f"mesh.context is {parts}, but {here} attention heads of a device (of {heads}, mesh.tensor {tensor}) do "
            "not divide over it"
        )


def partition_spec(spec: ParamSpec, mesh: jax.sharding.Mesh) -> PartitionSpec:
    """Mesh axes of a parameter's dimensions; a dimension that an axis does not divide is not split over it."""
    dimensions: list[tuple[str, ...]] = []
    for size, logical in zip(spec.shape, spec.axes, strict=True):
        axes: tuple[str, ...] = ()
        for axis in RULES[logical]:
            if mesh.shape[axis] > 1 and size % math.prod(mesh.shape[a] for a in (*axes, axis)) == 0:
                axes = (*axes, axis)
        dimensions.append(axes)
    used = [axis for axes in dimensions for axis in axes]
    if len(used) != len(set(used)):
        raise ValueError(f"a mesh axis is used twice by the axes {spec.axes}: {dimensions}")
    return PartitionSpec(*(axes if len(axes) > 1 else axes[0] if axes else None for axes in dimensions))


def parameters(specs: Tree, mesh: jax.sharding.Mesh) -> dict[str, NamedSharding]:
    """The sharding of every parameter, by its flat path."""
    return {path: NamedSharding(mesh, partition_spec(spec, mesh)) for path, spec in flatten(specs).items()}


def rows(mesh: jax.sharding.Mesh) -> NamedSharding:
    """Where the arrays of a batch lie: split over data and fsdp along their first axis."""
    return NamedSharding(mesh, PartitionSpec(("data", "fsdp")))


def own_contexts(mesh: jax.sharding.Mesh, count: int) -> range:
    """Which of the ``count`` contexts of a micro-batch the devices of this process need."""
    indices = rows(mesh).addressable_devices_indices_map((count,)).values()
    needed = [index[0].indices(count) for index in indices if index]
    return range(min(first for first, _, _ in needed), max(end for _, end, _ in needed))


def put_batch(batch: Any, mesh: jax.sharding.Mesh) -> Any:
    """``batch``, or each of its micro-batches, of which every process has at least its ``own_contexts``, on the
    devices."""
    home = rows(mesh)
    return jax.tree.map(lambda x: jax.make_array_from_callback(x.shape, home, lambda index: x[index]), batch)


def row_axes(rows: int, mesh: jax.sharding.Mesh) -> tuple[str, ...] | None:
    """The mesh axes that so many ``rows`` are split over; None if they do not divide, and every device has all."""
    return None if rows % row_shards(mesh) else ("data", "fsdp")


def row_shards(mesh: jax.sharding.Mesh) -> int:
    """How many parts rows are split into."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def platform(mesh: jax.sharding.Mesh | None) -> str:
    """The kind of ``mesh``'s devices, which need not be those of this process: "cpu", "gpu" or "tpu"."""
    return jax.default_backend() if mesh is None else mesh.devices.flat[0].platform
