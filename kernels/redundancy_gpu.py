"""Redundancy on GPU in plain XLA: all pairs of token tiles that are equally far apart are multiplied in one batch.

First each tile with itself, then with the next one, and so on to the furthest tile that a group reaches, which the data
decides (the next one, if no group is longer than a tile). It holds a copy of the states, shifted by the distance, and
the cosines of one distance.

No Pallas: its Triton backend is deprecated since JAX 0.11; its Mosaic GPU backend needs Hopper, has no arg-max, and can
neither be compiled nor interpreted without a GPU. docs/measurements.md has the bytes that this moves.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from comi_jax.kernels import dispatch

TILE = 128  # tokens
PRECISION = jax.lax.Precision.HIGHEST


def max_cosine(
    x: Float[Array, "C S D"], inverse: Float[Array, "C S"], group: Int[Array, "B S"]
) -> tuple[Float[Array, "B S"], Int[Array, "B S"]]:
    """As ``redundancy.max_cosine``."""
    (contexts, _, width), (batch, length) = x.shape, group.shape
    x, inverse, group = dispatch.pad_tokens(TILE, x, inverse, group)
    tiles = x.shape[1] // TILE
    tile = jnp.arange(tiles, dtype=jnp.int32)
    furthest = jnp.max(-(-dispatch.reach(group, TILE)[1] // TILE) - 1 - tile[None, :])
    x = x.reshape(contexts, tiles, TILE, width)
    inverse, group = (a.reshape(a.shape[0], tiles, TILE) for a in (inverse, group))
    token = tile[:, None] * TILE + jnp.arange(TILE, dtype=jnp.int32)[None, :]

    def cosines(here, there):
        """Of the tokens of the tiles ``here`` (rows) with those of the tiles ``there`` (columns); -inf for other groups
        and for tokens that do not come later, of which the pair is visited elsewhere, but within a tile."""
        product = jnp.einsum(
            "btid,btjd->btij", x[:, here], x[:, there], precision=PRECISION, preferred_element_type=inverse.dtype
        )
        cosine = product * (inverse[:, here][:, :, :, None] * inverse[:, there][:, :, None, :])
        partner = group[:, here][:, :, :, None] == group[:, there][:, :, None, :]
        partner = partner & (group[:, here] < dispatch.NO_GROUP)[:, :, :, None]
        row, column = token[here][:, :, None], token[there][:, None, :]
        same = (tile[here] == tile[there])[:, None, None]
        return jnp.where(
            partner & ((row < column) | (same & (row != column)))[None], dispatch.for_rows(cosine, batch), -jnp.inf
        )

    def fold(best, cosine, axis, at, others):
        """``best``, whose tiles ``at`` are updated by the cosines to the tiles ``others``, which lie along ``axis``."""
        value, index = (a[:, at] for a in best)
        most = jnp.max(cosine, axis=axis)
        to = token[others][:, :1][None] + jnp.argmax(cosine, axis=axis).astype(jnp.int32)
        better = (most > value) | ((most == value) & (to < index))
        value, index = jnp.where(better, most, value), jnp.where(better, to, index)
        return best[0].at[:, at].set(value), best[1].at[:, at].set(index)

    def both(here, there, best):
        cosine = cosines(here, there)
        return fold(fold(best, cosine, 3, here, there), cosine, 2, there, here)

    everywhere = slice(None)
    best = (jnp.full(group.shape, -jnp.inf, inverse.dtype), jnp.full(group.shape, dispatch.NO_GROUP, jnp.int32))
    best = fold(best, cosines(everywhere, everywhere), 3, everywhere, everywhere)
    # The last tiles wrap around to the first ones, which do not come later.
    value, index = jax.lax.fori_loop(
        1, furthest + 1, lambda distance, best: both(everywhere, (tile + distance) % tiles, best), best
    )
    value, index = (a.reshape(batch, -1)[:, :length] for a in (value, index))
    return dispatch.without_partner(value, index)
