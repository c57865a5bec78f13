"""The KV cache of the transformer blocks."""

from typing import Any, no_type_check

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Int

from comi_jax.backbone import Backbone


@no_type_check
@struct.dataclass
class KVCache:
    """Keys and values of the tokens so far; the token at position p of a row is at index p."""

    k: Float[Array, "L B S K H"]
    v: Float[Array, "L B S K H"]


@no_type_check
@struct.dataclass
class ContextKV:
    """Keys and values of contexts that several rows continue: rows i·B/C to (i+1)·B/C - 1 come after the first
    ``length[i]`` tokens of context i."""

    k: Float[Array, "L C S K H"]
    v: Float[Array, "L C S K H"]
    length: Int[Array, " C"]


def continued(context: ContextKV, rows: int, room: int) -> tuple[KVCache, Int[Array, " B"]]:
    """A cache of ``rows`` that holds what each continues, with ``room`` more positions; and where each row goes on."""
    share = rows // context.length.shape[0]
    cache = jax.tree.map(lambda x: jnp.repeat(x, share, axis=1), KVCache(context.k, context.v))
    return with_room(cache, room), jnp.repeat(context.length, share)


def write(cache: KVCache, layer: Int[Array, ""], start: Int[Array, " B"] | None, k: Array, v: Array) -> KVCache:
    """``cache`` with the new tokens of row b written at positions start[b], start[b] + 1, ... (``start`` None: 0)."""
    batch, length = k.shape[:2]
    if start is None:
        at = (layer, 0, 0, 0, 0)
        return KVCache(
            k=jax.lax.dynamic_update_slice(cache.k, k[None].astype(cache.k.dtype), at),
            v=jax.lax.dynamic_update_slice(cache.v, v[None].astype(cache.v.dtype), at),
        )
    rows = jnp.arange(batch)[:, None]
    positions = start[:, None] + jnp.arange(length, dtype=start.dtype)[None, :]
    put = {"mode": "drop", "unique_indices": True}
    return KVCache(
        k=cache.k.at[layer, rows, positions].set(k.astype(cache.k.dtype), **put),
        v=cache.v.at[layer, rows, positions].set(v.astype(cache.v.dtype), **put),
    )


def empty_cache(backbone: Backbone, layers: int, batch: int, length: int, dtype: Any) -> KVCache:
    """A cache of ``length`` positions for ``layers`` blocks."""
    shape = (layers, batch, length, backbone.num_key_value_heads, backbone.head_dim)
    return KVCache(k=jnp.zeros(shape, dtype), v=jnp.zeros(shape, dtype))


def with_room(cache: KVCache, room: int) -> KVCache:
    """``cache`` with ``room`` more positions at its end."""
    return jax.tree.map(lambda x: jnp.pad(x, ((0, 0), (0, 0), (0, room), (0, 0), (0, 0))), cache)
