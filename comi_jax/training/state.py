"""The state of training: abstract arrays with shape, dtype and sharding, and the arrays, created sharded."""

from typing import Any, no_type_check

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Int

from comi_jax.devices import sharding
from comi_jax.model import architecture
from comi_jax.model.architecture import Architecture, frozen_dtype
from comi_jax.params import flatten


@no_type_check
@struct.dataclass
class TrainState:
    """Everything that a step changes. ``trained`` is flat ("encoder/layers/q") and float32; ``step`` counts batches,
    including those whose update was skipped."""

    step: Int[Array, ""]
    trained: dict[str, Array]
    optimizer: Any


def abstract(
    arch: Architecture, update: optax.GradientTransformation, mesh: jax.sharding.Mesh
) -> tuple[TrainState, dict[str, jax.ShapeDtypeStruct]]:
    """State and frozen weights as jax.ShapeDtypeStruct with shardings: trained weights in float32, optimizer moments
    sharded like their weights, frozen weights in ``frozen_dtype``."""
    specs = architecture.specs(arch)
    shardings = sharding.parameters(specs, mesh)

    def one(path: str, dtype: str) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(flat[path].shape, dtype, sharding=shardings[path])

    flat = flatten(specs)
    trained = {path: one(path, "float32") for path in flat if architecture.is_trained(path, arch)}
    frozen = {path: one(path, frozen_dtype(path, arch)) for path in flat if path not in trained}
    replicated = NamedSharding(mesh, PartitionSpec())

    def like_its_parameter(keys: tuple[Any, ...], leaf: Any) -> jax.ShapeDtypeStruct:
        """A moment has the name of its parameter in its path."""
        names = [key.key for key in keys if isinstance(key, jax.tree_util.DictKey) and key.key in trained]
        placed = shardings[names[0]] if names and leaf.shape == trained[names[0]].shape else replicated
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=placed)

    optimizer = jax.tree_util.tree_map_with_path(like_its_parameter, jax.eval_shape(update.init, trained))
    step = jax.ShapeDtypeStruct((), jnp.int32, sharding=replicated)
    return TrainState(step, trained, optimizer), frozen  # pyright: ignore[reportArgumentType] (shapes for arrays)


def create(
    params: dict[str, Array], arch: Architecture, update: optax.GradientTransformation, mesh: jax.sharding.Mesh
) -> tuple[TrainState, dict[str, Array]]:
    """The state before the first step, and the frozen weights, from ``params`` by flat path.

    Arrays with the right sharding and dtype are used as they are, not copied; the others are moved and cast on the
    devices, without gathering them on the host.
    """
    state, frozen = abstract(arch, update, mesh)
    trained = {path: _placed(params[path], like) for path, like in state.trained.items()}
    optimizer = jax.jit(update.init, out_shardings=_shardings(state.optimizer))(trained)
    step = jax.jit(lambda: jnp.int32(0), out_shardings=state.step.sharding)()
    return TrainState(step, trained, optimizer), {path: _placed(params[path], like) for path, like in frozen.items()}


def _placed(array: Any, like: Array | jax.ShapeDtypeStruct) -> Array:
    if array.sharding != like.sharding:
        array = jax.device_put(array, like.sharding)
    if array.dtype != like.dtype:
        array = jax.jit(lambda x: x.astype(like.dtype), out_shardings=like.sharding)(array)
    return array


def _shardings(tree: Any) -> Any:
    return jax.tree.map(lambda x: x.sharding, tree)
