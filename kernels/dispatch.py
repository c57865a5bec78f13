"""Which implementation of a kernel runs, and what all of them need to know about contiguous groups.

"xla" runs anywhere and is made for CPU; "tpu" is Pallas with Mosaic, "gpu" Pallas with Triton; "interpret" runs the
TPU kernel step by step on any device, for tests.
"""

import dataclasses
import functools
import logging
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

NAMES = ("xla", "tpu", "gpu", "interpret")
DTYPES = {
    "tpu": (jnp.bfloat16, jnp.float32),
    "gpu": (jnp.bfloat16, jnp.float16, jnp.float32),
    "interpret": (jnp.bfloat16, jnp.float32),
}
PART = 512  # tokens that plain XLA takes at a time on CPU
NO_GROUP = int(jnp.iinfo(jnp.int32).max)  # sorts behind every group


def choose(kernel: str, implementation: str | None, dtype: Any, platform: str | None = None) -> str:
    """The implementation that ``implementation`` names, or the one for devices of kind ``platform`` (None: of this
    process) if it is None.

    Raises ValueError for an unknown name, and where a named one cannot compute in ``dtype``: none is
    substituted.
    """
    if implementation is None:
        platform = platform or jax.default_backend()
        implementation = platform if platform in DTYPES and dtype in DTYPES[platform] else "xla"
        _log_choice(kernel, implementation, str(dtype), platform)
    if implementation not in NAMES:
        raise ValueError(f"{kernel}: no implementation {implementation!r}; there are {', '.join(NAMES)}.")
    if implementation != "xla" and dtype not in DTYPES[implementation]:
        raise ValueError(f"{kernel}: {implementation!r} does not compute in {jnp.dtype(dtype)}; name 'xla'.")
    return implementation


@functools.cache
def _log_choice(kernel: str, implementation: str, dtype: str, platform: str) -> None:
    logging.getLogger(__name__).info("%s: %s for %s on %s", kernel, implementation, dtype, platform)


def wide(x: Float[Array, "..."]) -> Any:
    """The dtype that sums over ``x`` are taken in: float32 at least."""
    return jnp.float64 if x.dtype == jnp.float64 else jnp.float32


def pad_tokens(multiple: int, *arrays: Array) -> tuple[Array, ...]:
    """Per-token arrays [B, S, ...], the last of them the group ids, padded to a multiple of ``multiple`` tokens; what
    has no group gets the id NO_GROUP."""
    *others, group = arrays
    more = (0, -group.shape[1] % multiple)
    padded = (jnp.pad(a, ((0, 0), more) + ((0, 0),) * (a.ndim - 2)) for a in others)
    group = jnp.where(group < 0, NO_GROUP, group).astype(jnp.int32)
    return (*padded, jnp.pad(group, ((0, 0), more), constant_values=NO_GROUP))


def reach(group: Int[Array, "B S"], tile: int) -> tuple[Int[Array, "B tiles"], Int[Array, "B tiles"]]:
    """For each tile of ``tile`` tokens: the first token of the groups that it touches, and one past the last.

    For padded ids (``pad_tokens``). A tile without any group has the end 0.
    """
    tiled = group.reshape(group.shape[0], -1, tile)
    search = jax.vmap(functools.partial(jnp.searchsorted, side="left"))
    most = jnp.max(jnp.where(tiled < NO_GROUP, tiled, -1), axis=2)
    end = jnp.where(most < 0, 0, search(group, most + 1))
    return search(group, tiled[:, :, 0]).astype(jnp.int32), end.astype(jnp.int32)


def without_partner(value: Float[Array, "B S"], index: Int[Array, "B S"]) -> tuple[Array, Array]:
    """Value 0 and index -1 where no partner was found (value -inf)."""
    found = value > -jnp.inf
    return jnp.where(found, value, 0.0), jnp.where(found, index, -1)


@dataclasses.dataclass(frozen=True)
class Part:
    """Some neighbouring tokens of every row. The last part reaches back, over tokens that were in the one before."""

    first: Array
    size: int
    begin: Array  # tokens before it were in an earlier part

    def of(self, array: Array) -> Array:
        """These tokens of a per-token array."""
        return jax.lax.dynamic_slice_in_dim(array, self.first, self.size, axis=1)

    def fresh(self, array: Array) -> Array:
        """These tokens of a [B, S] array, 0 for those that were in an earlier part."""
        token = self.first + jnp.arange(self.size, dtype=jnp.int32)
        return jnp.where((token >= self.begin)[None, :], self.of(array), 0.0)

    def put(self, array: Array, values: Array) -> Array:
        """``array`` with ``values`` for these tokens."""
        return jax.lax.dynamic_update_slice_in_dim(array, values, self.first, axis=1)

    def add(self, array: Array, values: Array) -> Array:
        """``array`` with ``values`` added to these tokens."""
        return self.put(array, self.of(array) + values)


def by_parts(length: int, implementation: str, step: Callable[[Part, Any], Any], start: Any) -> Any:
    """``step`` over all parts of ``length`` tokens, one after another: for CPU such as stay in its caches, for other
    devices everything at once."""
    size = min(PART, length) if implementation == "xla" else length
    if size == length:
        return step(Part(jnp.int32(0), length, jnp.int32(0)), start)

    def one(number, state):
        return step(Part(jnp.minimum(number * size, length - size), size, number * size), state)

    return jax.lax.fori_loop(0, -(-length // size), one, start)


def down(lanes: Array) -> Array:
    """In a TPU kernel: [1, n] numbers along the lanes as [n, 1] down the sublanes."""
    return jnp.transpose(jnp.broadcast_to(lanes, (8, lanes.shape[1])))[:, :1]
