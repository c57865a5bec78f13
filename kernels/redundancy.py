"""Segment-wise redundancy: for every token, the largest cosine to another token of its own group, and which one.

    redundancy_i = max_{j in group(i), j != i}  u_i . u_j            u the unit vectors of the tokens

Groups are contiguous, so all partners of a token lie near it. Tokens are cut into tiles, and for tile distance 0, 1,
... up to the largest span of any group (data, so a traced bound) one batched tile-by-tile product is folded into the
running maxima of both tiles. Memory is linear in the number of tokens; the backward pass follows the arg-max alone.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

TILE = 128
SHORT_TILE = 32  # of short rows, whose groups are far smaller than 128 tokens
NO_GROUP = jnp.iinfo(jnp.int32).max  # sorts behind every group
PRECISION = jax.lax.Precision.HIGHEST  # float32 means float32: the default is TF32 on a GPU, bfloat16 on a TPU


def max_cosine_reference(
    unit: Float[Array, "B S D"], group: Int[Array, "B S"]
) -> tuple[Float[Array, "B S"], Int[Array, "B S"]]:
    """The definition, with the whole [S, S] matrix: what ``max_cosine`` is held against."""
    tokens = jnp.arange(unit.shape[1])
    partner = (group[:, :, None] == group[:, None, :]) & (group >= 0)[:, :, None]
    partner = partner & (tokens[:, None] != tokens[None, :])[None]
    similarity = jnp.where(partner, jnp.einsum("bid,bjd->bij", unit, unit, precision=PRECISION), -jnp.inf)
    index = jnp.where(partner.any(-1), jnp.argmax(similarity, axis=-1), -1)
    value = jnp.where(index >= 0, jnp.max(similarity, axis=-1), 0.0)
    return value, index.astype(jnp.int32)


@jax.custom_vjp
def max_cosine(unit: Float[Array, "B S D"], group: Int[Array, "B S"]) -> tuple[Float[Array, "B S"], Int[Array, "B S"]]:
    """The largest inner product of every unit vector with another one of its group, and the index of that one.

    ``group`` never decreases along a row; -1, at the end of a row only, marks tokens of no group. A token without
    partner gets value 0 and index -1. Ties go to the lowest index, and so does their gradient.
    """
    return _banded(unit, group)


def _forward(unit, group):
    value, index = _banded(unit, group)
    return (value, index), (unit, index)


def _backward(saved, cotangents):
    unit, index = saved
    pull = jnp.where(index >= 0, cotangents[0], 0.0)[:, :, None]
    partner = jnp.maximum(index, 0)
    to_self = pull * jnp.take_along_axis(unit, partner[:, :, None], axis=1)
    to_partner = jax.vmap(lambda at, values: jnp.zeros_like(values).at[at].add(values))(partner, pull * unit)
    return to_self + to_partner, None


max_cosine.defvjp(_forward, _backward)


def _banded(unit, group):
    batch, length, width = unit.shape
    tile = TILE if length > 8 * TILE else SHORT_TILE
    tiles = -(-length // tile)
    padding = tiles * tile - length
    group = jnp.where(group < 0, NO_GROUP, group)
    group = jnp.pad(group, ((0, 0), (0, padding)), constant_values=NO_GROUP)
    unit = jnp.pad(unit, ((0, 0), (0, padding), (0, 0))).reshape(batch, tiles, tile, width)
    span = _largest_span(group, tile)
    group = group.reshape(batch, tiles, tile)
    number = jnp.arange(tiles, dtype=jnp.int32)
    token = jnp.arange(tiles * tile, dtype=jnp.int32).reshape(1, tiles, tile)
    inside = jnp.arange(tile)

    def fold(best, value, index):
        better = (value > best[0]) | ((value == best[0]) & (index < best[1]))
        return jnp.where(better, value, best[0]), jnp.where(better, index, best[1])

    def at_distance(state):
        distance, best = state
        # Column tile c = row tile + distance; what rolls around from the front is masked by its number.
        other, other_group, other_token = (jnp.roll(x, -distance, axis=1) for x in (unit, group, token))
        similarity = jnp.einsum("bnid,bnjd->bnij", unit, other, precision=PRECISION)
        same = (group[:, :, :, None] == other_group[:, :, None, :]) & (group < NO_GROUP)[:, :, :, None]
        same = same & (number + distance < tiles)[None, :, None, None]
        same = same & ((distance > 0) | (inside[:, None] != inside[None, :]))[None, None]
        similarity = jnp.where(same, similarity, -jnp.inf)
        column = jnp.argmax(similarity, axis=3)
        best = fold(best, jnp.max(similarity, axis=3), _pick(other_token, column))
        row = jnp.argmax(similarity, axis=2)
        back = (jnp.max(similarity, axis=2), _pick(token, row))
        best = fold(best, *(jnp.roll(x, distance, axis=1) for x in back))
        return distance + 1, best

    nothing = (jnp.full(group.shape, -jnp.inf, unit.dtype), jnp.full(group.shape, NO_GROUP, jnp.int32))
    _, (value, index) = jax.lax.while_loop(lambda state: state[0] <= span, at_distance, (jnp.int32(0), nothing))
    value, index = (x.reshape(batch, -1)[:, :length] for x in (value, index))
    found = value > -jnp.inf
    return jnp.where(found, value, 0.0), jnp.where(found, index, -1)


def _pick(token, position):
    """token[..., position], broadcast over the batch."""
    return jnp.take_along_axis(jnp.broadcast_to(token, position.shape), position, axis=2)


def _largest_span(group: Int[Array, "B S"], tile: int) -> Int[Array, ""]:
    """The largest number of tile borders that one group crosses."""
    batch, length = group.shape
    tiled = group.reshape(batch, length // tile, tile)
    last_group = jnp.max(jnp.where(tiled < NO_GROUP, tiled, -1), axis=2)
    end = jax.vmap(functools.partial(jnp.searchsorted, side="right"))(group, last_group) - 1
    return jnp.maximum(jnp.max(end // tile - jnp.arange(length // tile, dtype=jnp.int32)[None, :]), 0)
