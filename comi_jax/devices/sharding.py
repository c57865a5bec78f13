"""The device mesh, the table from logical to mesh axes, and the shardings of parameters and batches."""

import math
from collections.abc import Sequence
from typing import Any

import jax
from jax.experimental import mesh_utils
from jax.sharding import NamedSharding, PartitionSpec

from comi_jax.backbone import Backbone
from comi_jax.config import Config, Mesh
from comi_jax.errors import ConfigError
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
    """The mesh over ``devices`` (default: all). An axis of size 0 takes the remaining devices.

    Raises ConfigError if the sizes do not multiply to the number of devices."""
    devices = jax.devices() if devices is None else devices
    sizes = [getattr(settings, axis) for axis in AXES]
    rest = math.prod(size for size in sizes if size)
    shape = tuple(size or len(devices) // rest for size in sizes)
    if math.prod(shape) != len(devices):
        raise ConfigError(
            f"{' x '.join(f'mesh.{axis}' for axis in AXES)} = {' x '.join(map(str, shape))} is not the number of "
            f"devices, {len(devices)}"
        )
    # jax.make_mesh splits a physical axis of a TPU slice over two mesh axes only on v5e.
    placed = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    return jax.sharding.Mesh(placed, AXES, axis_types=(jax.sharding.AxisType.Auto,) * len(AXES))


def micro_batches(config: Config, mesh: jax.sharding.Mesh) -> int:
    """The number of micro-batches per update: optimizer.accumulate or, if that is 0, as many as give each device
    one context at a time. Raises ConfigError if the contexts of a micro-batch do not divide over the devices."""
    contexts, devices = config.train.batch_size // config.train.share_context, row_shards(mesh)
    parts = config.optimizer.accumulate or max(contexts // devices, 1)
    if contexts % (parts * devices):
        raise ConfigError(
            f"train.batch_size / train.share_context = {contexts} contexts do not divide over {parts} micro-batches "
            f"(optimizer.accumulate) on {devices} devices (mesh.data x mesh.fsdp); change one of them"
        )
    return parts


def check_heads(backbone: Backbone, mesh: jax.sharding.Mesh) -> None:
    """Raises ConfigError if the heads do not divide over the context axis, over which attention splits them."""
    heads, tensor, parts = backbone.num_attention_heads, mesh.shape["tensor"], mesh.shape["context"]
    here = heads // tensor if backbone.num_key_value_heads % tensor == 0 else heads
    if here % parts:
        raise ConfigError(
            f"{here} attention heads per device (of {heads}, mesh.tensor {tensor}) do not divide by mesh.context = "
            f"{parts}"
        )


def partition_spec(spec: ParamSpec, mesh: jax.sharding.Mesh) -> PartitionSpec:
    """The mesh axes of each dimension of a parameter. An axis that does not divide the dimension is left out.

    Raises ValueError if two dimensions use the same mesh axis."""
    dimensions: list[tuple[str, ...]] = []
    for size, logical in zip(spec.shape, spec.axes, strict=True):
        dimensions.append(dividing(size, mesh, RULES[logical]))
    used = [axis for axes in dimensions for axis in axes]
    if len(used) != len(set(used)):
        raise ValueError(f"a mesh axis is used twice by the axes {spec.axes}: {dimensions}")
    return PartitionSpec(*(axes if len(axes) > 1 else axes[0] if axes else None for axes in dimensions))


def dividing(size: int, mesh: jax.sharding.Mesh, among: Sequence[str] = AXES) -> tuple[str, ...]:
    """Those of the mesh axes ``among`` that a dimension of ``size`` is split over: all that divide it, in order."""
    axes: tuple[str, ...] = ()
    for axis in among:
        if mesh.shape[axis] > 1 and size % math.prod(mesh.shape[a] for a in (*axes, axis)) == 0:
            axes = (*axes, axis)
    return axes


def parameters(specs: Tree, mesh: jax.sharding.Mesh) -> dict[str, NamedSharding]:
    """The sharding of every parameter, by its flat path."""
    return {path: NamedSharding(mesh, partition_spec(spec, mesh)) for path, spec in flatten(specs).items()}


def rows(mesh: jax.sharding.Mesh) -> NamedSharding:
    """The sharding of a batch's arrays: the first axis is split over data and fsdp."""
    return NamedSharding(mesh, PartitionSpec(("data", "fsdp")))


def own_contexts(mesh: jax.sharding.Mesh, count: int) -> range:
    """The range of a micro-batch's ``count`` contexts that this process's devices need."""
    indices = rows(mesh).addressable_devices_indices_map((count,)).values()
    needed = [index[0].indices(count) for index in indices if index]
    return range(min(first for first, _, _ in needed), max(end for _, end, _ in needed))


def put_batch(batch: Any, mesh: jax.sharding.Mesh) -> Any:
    """Put ``batch``, one micro-batch or a tree of several, on the devices. The host arrays need to hold valid data only
    for this process's ``own_contexts``."""
    home = rows(mesh)
    return jax.tree.map(lambda x: jax.make_array_from_callback(x.shape, home, lambda index: x[index]), batch)


def row_axes(rows: int, mesh: jax.sharding.Mesh) -> tuple[str, ...] | None:
    """The mesh axes that ``rows`` rows are split over; None if they do not divide, so that every device has all."""
    return None if rows % row_shards(mesh) else ("data", "fsdp")


def row_shards(mesh: jax.sharding.Mesh) -> int:
    """The number of shards that rows are split into."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def platform(mesh: jax.sharding.Mesh | None) -> str:
    """The platform of ``mesh``'s devices, "cpu", "gpu" or "tpu"; it may differ from this process's default."""
    return jax.default_backend() if mesh is None else mesh.devices.flat[0].platform
