"""One description of every parameter (shape, logical axes, initialiser), from which everything else derives.

A parameter tree is a nested dict. Its *spec tree* has a ParamSpec where the tree has an array: random initialisation,
shardings, restore targets and import checks are all maps over the spec tree.
"""

import math
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import traverse_util
from jax.sharding import Sharding

Placement = Callable[[str], tuple[Any, Sharding | None]]

Tree = Mapping[str, Any]


@dataclass(frozen=True)
class ParamSpec:
    """A parameter before it is created. ``axes`` names each dimension for the sharding rules.

    ``init`` is a constant, or "normal": a normal distribution of variance 1/fan_in.
    """

    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    init: float | Literal["normal"]
    fan_in: int = 1

    def __post_init__(self):
        if len(self.shape) != len(self.axes):
            raise ValueError(f"shape {self.shape} and axes {self.axes} differ in length")


def flatten(tree: Tree) -> dict[str, Any]:
    """A nested dict as {"a/b/c": leaf}."""
    return traverse_util.flatten_dict(tree, sep="/")


def unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of ``flatten``."""
    return traverse_util.unflatten_dict(dict(flat), sep="/")


def count(tree: Tree) -> int:
    """The number of parameters in the arrays (or specs) of ``tree``."""
    return sum(math.prod(leaf.shape) for leaf in flatten(tree).values())


def initialize(specs: Tree, key: jax.Array, dtype: Any = jnp.float32) -> dict[str, Any]:
    """Random arrays for ``specs``. Each depends only on ``key`` and its path, not on the rest of the tree."""
    return unflatten({path: _draw(spec, path, key, dtype) for path, spec in flatten(specs).items()})


def _draw(spec: ParamSpec, path: str, key: jax.Array, dtype: Any) -> jax.Array:
    if spec.init != "normal":
        return jnp.full(spec.shape, spec.init, dtype)
    std = spec.fan_in**-0.5
    key = jax.random.fold_in(key, zlib.crc32(path.encode()))
    return (std * jax.random.normal(key, spec.shape, jnp.float32)).astype(dtype)


def abstract(specs: Tree, dtype: Any = jnp.float32) -> dict[str, Any]:
    """``specs`` as jax.ShapeDtypeStruct, for restoring and ahead-of-time compilation."""
    return unflatten({path: jax.ShapeDtypeStruct(spec.shape, dtype) for path, spec in flatten(specs).items()})


def partition(tree: Tree, keep: Callable[[str], bool]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The leaves whose path ``keep`` accepts, and the rest, each as a flat dict; ``combine`` is the inverse."""
    flat = flatten(tree)
    return {p: x for p, x in flat.items() if keep(p)}, {p: x for p, x in flat.items() if not keep(p)}


def combine(*parts: Mapping[str, Any]) -> dict[str, Any]:
    """One nested tree from flat dicts with disjoint paths."""
    return unflatten({path: leaf for part in parts for path, leaf in part.items()})


def as_stored(_: str) -> tuple[None, None]:
    """A placement: the dtype of the file, on the first device."""
    return None, None
