"""Which implementation of a kernel runs, and what all of them need to know about contiguous groups.

"xla" runs anywhere and is made for CPU; "tpu" is Pallas with Mosaic, "gpu" Pallas with Triton; "interpret" runs the
TPU kernel step by step on any device, for tests.
"""

import functools
import logging
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

NAMES = ("xla", "tpu", "gpu", "interpret")
NO_GROUP = int(jnp.iinfo(jnp.int32).max)  # sorts behind every group


def choose(kernel: str, implementation: str | None, dtype: Any, platform: str | None = None) -> str:
    """The implementation that ``implementation`` names, or the one for devices of kind ``platform`` (None: of this
    process) if it is None.

    Raises ValueError for an unknown name, and where a named one cannot compute in ``dtype``: none is
    substituted.
    """
    if implementation is None:
        platform = platform or jax.default_backend()
        implementation = platform if platform in ("tpu", "gpu") and dtype != jnp.float64 else "xla"
        _log_choice(kernel, implementation, str(dtype), platform)
    if implementation not in NAMES:
        raise ValueError(f"{kernel}: no implementation {implementation!r}; there are {', '.join(NAMES)}.")
    if implementation != "xla" and dtype == jnp.float64:
        raise ValueError(f"{kernel}: {implementation!r} does not compute in float64; name 'xla'.")
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


def down(lanes: Array) -> Array:
    """In a TPU kernel: [1, n] numbers along the lanes as [n, 1] down the sublanes."""
    return jnp.transpose(jnp.broadcast_to(lanes, (8, lanes.shape[1])))[:, :1]
