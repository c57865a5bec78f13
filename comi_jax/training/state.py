"""What a step starts from: the shape, dtype and place of every array, and the arrays themselves, born there."""

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
    """All that a step changes. ``trained`` is flat ("encoder/layers/q") and float32; ``step`` counts batches, those
    whose update was left out included."""

    step: Int[Array, ""]
    trained: dict[str, Array]
    optimizer: Any


def abstract(
    arch: Architecture, update: optax.GradientTransformation, mesh: jax.sharding.Mesh
) -> tuple[TrainState, dict[str, jax.ShapeDtypeStruct]]:
    """State and frozen weights as jax.ShapeDtypeStruct with their places: what is trained in float32 with an optimizer
    state that lies as it does, the rest as ``frozen_dtype`` says."""
    specs = architecture.specs(arch)
    placed = sharding.parameters(specs, mesh)

    def one(path: str, dtype: str) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(flat[path].shape, dtype, sharding=placed[path])

    flat = flatten(specs)
    trained = {path: one(path, "float32") for path in flat if architecture.is_trained(path, arch)}
    frozen = {path: one(path, frozen_dtype(path, arch)) for path in flat if path not in trained}
    whole = NamedSharding(mesh, PartitionSpec())

    def like_its_parameter(keys: tuple[Any, ...], leaf: Any) -> jax.ShapeDtypeStruct:
        """A moment is found by the name of its parameter in its path."""
        names = [key.key for key in keys if isinstance(key, jax.tree_util.DictKey) and key.key in trained]
        home = placed[names[0]] if names and leaf.shape == trained[names[0]].shape else whole
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=home)

    optimizer = jax.tree_util.tree_map_with_path(like_its_parameter, jax.eval_shape(update.init, trained))
    return TrainState(jax.ShapeDtypeStruct((), jnp.int32, sharding=whole), trained, optimizer), frozen


def create(
    params: dict[str, Array], arch: Architecture, update: optax.GradientTransformation, mesh: jax.sharding.Mesh
) -> tuple[TrainState, dict[str, Array]]:
    """The state before the first step, and the frozen weights, from ``params`` by flat path, which it takes over.

    An array that lies where it belongs, in its dtype, is taken as it is; another is moved and cast by the devices. None
    passes through this process whole.
    """
    state, frozen = abstract(arch, update, mesh)
    trained = {path: _at_home(params[path], like) for path, like in state.trained.items()}
    optimizer = jax.jit(update.init, out_shardings=_homes(state.optimizer))(trained)
    step = jax.jit(lambda: jnp.int32(0), out_shardings=state.step.sharding)()
    return TrainState(step, trained, optimizer), {path: _at_home(params[path], like) for path, like in frozen.items()}


def _at_home(array: Any, like: jax.ShapeDtypeStruct) -> Array:
    if array.sharding != like.sharding:
        array = jax.device_put(array, like.sharding)
    if array.dtype != like.dtype:
        array = jax.jit(lambda x: x.astype(like.dtype), out_shardings=like.sharding)(array)
    return array


def _homes(tree: Any) -> Any:
    return jax.tree.map(lambda x: x.sharding, tree)
