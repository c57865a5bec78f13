"""The choice of a kernel's implementation, and helpers for contiguous groups that all implementations share.

"xla" runs anywhere and is tuned for CPU; "tpu" is Pallas with Mosaic; "gpu" is plain XLA in batches that suit a GPU;
"interpret" runs the TPU kernel in Pallas' interpreter on any device, for tests.
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
PART = 512  # tokens that the plain XLA implementation processes at a time
NO_GROUP = int(jnp.iinfo(jnp.int32).max)  # sorts after every group


def choose(kernel: str, implementation: str | None, dtype: Any, platform: str | None = None) -> str:
    """``implementation`` itself, or for None the default of ``platform`` (None: the backend of this process).

    Raises ValueError for an unknown name, or if the named implementation does not support ``dtype``.
    """
    if implementation is None:
        platform = platform or jax.default_backend()
        implementation = platform if platform in DTYPES and dtype in DTYPES[platform] else "xla"
        _log_choice(kernel, implementation, str(dtype), platform)
    if implementation not in NAMES:
        raise ValueError(f"{kernel}: no implementation {implementation!r}; choose from {', '.join(NAMES)}.")
    if implementation != "xla" and dtype not in DTYPES[implementation]:
        raise ValueError(f"{kernel}: {implementation!r} does not compute in {jnp.dtype(dtype)}; name 'xla'.")
    return implementation


@functools.cache
def _log_choice(kernel: str, implementation: str, dtype: str, platform: str) -> None:
    logging.getLogger(__name__).info("%s: %s for %s on %s", kernel, implementation, dtype, platform)


def of_contexts(x: Array, index: Int[Array, "B K"]) -> Array:
    """The elements ``index`` [B, K] of per-token arrays x [C, S, ...]: B / C rows of ``index`` belong to each row of x,
    in order."""
    flat = index.reshape(x.shape[0], -1)
    found = jnp.take_along_axis(x, flat.reshape(flat.shape + (1,) * (x.ndim - 2)), axis=1)
    return found.reshape(*index.shape, *x.shape[2:])


def for_rows(x: Array, rows: int) -> Array:
    """x [C, ...] written out for ``rows`` rows, a multiple of C, those of a context in order."""
    return x if x.shape[0] == rows else jnp.repeat(x, rows // x.shape[0], axis=0)


def summed(x: Array, contexts: int) -> Array:
    """The transpose of ``for_rows``: x [B, ...] summed over the rows of each context."""
    return x if x.shape[0] == contexts else jnp.sum(x.reshape(contexts, -1, *x.shape[1:]), axis=1)


def wide(x: Float[Array, "..."]) -> Any:
    """The dtype for sums over ``x``: float32 at least."""
    return jnp.float64 if x.dtype == jnp.float64 else jnp.float32


def pad_tokens(multiple: int, *arrays: Array) -> tuple[Array, ...]:
    """Per-token arrays [B, S, ...], the last of them the group ids, padded to a multiple of ``multiple`` tokens.
    Padding and tokens of no group get the id NO_GROUP."""
    *others, group = arrays
    more = (0, -group.shape[1] % multiple)
    padded = (jnp.pad(a, ((0, 0), more) + ((0, 0),) * (a.ndim - 2)) for a in others)
    group = jnp.where(group < 0, NO_GROUP, group).astype(jnp.int32)
    return (*padded, jnp.pad(group, ((0, 0), more), constant_values=NO_GROUP))


def reach(group: Int[Array, "B S"], tile: int) -> tuple[Int[Array, "B tiles"], Int[Array, "B tiles"]]:
    """For each tile of ``tile`` tokens: the first token of the groups that overlap it, and one past the last.

    ``group`` comes from ``pad_tokens``. A tile without any group has the end 0.
    """
    tiled = group.reshape(group.shape[0], -1, tile)
    search = jax.vmap(functools.partial(jnp.searchsorted, side="left"))
    most = jnp.max(jnp.where(tiled < NO_GROUP, tiled, -1), axis=2)
    end = jnp.where(most < 0, 0, search(group, most + 1))
    return search(group, tiled[:, :, 0]).astype(jnp.int32), end.astype(jnp.int32)


def without_partner(value: Float[Array, "B S"], index: Int[Array, "B S"]) -> tuple[Array, Array]:
    """Replace value and index by 0 and -1 for tokens without a partner (value -inf)."""
    found = value > -jnp.inf
    return jnp.where(found, value, 0.0), jnp.where(found, index, -1)


@dataclasses.dataclass(frozen=True)
class Part:
    """A run of consecutive tokens of every row. All parts have one size, so the last may overlap the one before."""

    first: Array
    size: int
    begin: Array  # the first token that was in no earlier part

    def of(self, array: Array) -> Array:
        """This part of a per-token array."""
        return jax.lax.dynamic_slice_in_dim(array, self.first, self.size, axis=1)

    def fresh(self, array: Array) -> Array:
        """This part of a [B, S] array, 0 for tokens that were in an earlier part."""
        token = self.first + jnp.arange(self.size, dtype=jnp.int32)
        return jnp.where((token >= self.begin)[None, :], self.of(array), 0.0)

    def put(self, array: Array, values: Array) -> Array:
        """``array`` with this part replaced by ``values``."""
        return jax.lax.dynamic_update_slice_in_dim(array, values, self.first, axis=1)

    def add(self, array: Array, values: Array) -> Array:
        """``array`` with ``values`` added to this part."""
        return self.put(array, self.of(array) + values)


def by_parts(length: int, implementation: str, step: Callable[[Part, Any], Any], start: Any, share: int = 1) -> Any:
    """Fold ``step`` over all parts of ``length`` tokens: with "xla" parts that fit a CPU's caches, otherwise all tokens
    at once. If ``share`` rows belong to one context, parts are that much shorter, so that ``step`` may write out a
    part of the contexts for all rows."""
    size = -(-(min(PART, length) if implementation == "xla" else length) // share)
    if size == length:
        return step(Part(jnp.int32(0), length, jnp.int32(0)), start)

    def one(number, state):
        return step(Part(jnp.minimum(number * size, length - size), size, number * size), state)

    return jax.lax.fori_loop(0, -(-length // size), one, start)


def down(lanes: Array) -> Array:
    """In a TPU kernel: transpose [1, n] along the lanes to [n, 1] along the sublanes."""
    return jnp.transpose(jnp.broadcast_to(lanes, (8, lanes.shape[1])))[:, :1]
