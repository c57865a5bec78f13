"""Segment-wise redundancy: for each token, the largest cosine to another token of its group, and that token's index.

    redundancy_i = max_{j in group(i), j != i}  (x_i . x_j) / (|x_i| |x_j|)

Groups are contiguous, so a token's partners are near it: each tile of tokens is multiplied only with the tiles that its
groups overlap, a data-dependent number. Besides its input it holds one tile of cosines (plain XLA also a padded copy,
unless the tokens are a multiple of the tile; on GPU a copy, and a tile of cosines for each tile of tokens). Gradients
flow to the arg-max alone. ``redundancy_tpu`` is a Pallas kernel, ``redundancy_gpu`` plain XLA for GPUs.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from comi_jax.kernels import dispatch

TILE = 32  # tokens of a tile; fits CPU caches, and groups are not much longer
PRECISION = jax.lax.Precision.HIGHEST  # float32 means float32: the default is TF32 on a GPU, bfloat16 on a TPU


def max_cosine_reference(
    x: Float[Array, "C S D"], inverse: Float[Array, "C S"], group: Int[Array, "B S"]
) -> tuple[Float[Array, "B S"], Int[Array, "B S"]]:
    """The definition, with the whole [S, S] matrix: the reference for every implementation."""
    wide, inverse = (dispatch.for_rows(a, group.shape[0]) for a in (x.astype(dispatch.wide(x)), inverse))
    cosine = jnp.einsum("bid,bjd->bij", wide, wide, precision=PRECISION) * (inverse[:, :, None] * inverse[:, None, :])
    same = (group[:, :, None] == group[:, None, :]) & (group >= 0)[:, :, None] & ~jnp.eye(x.shape[1], dtype=bool)[None]
    cosine = jnp.where(same, cosine, -jnp.inf)
    alone = ~same.any(axis=2)
    index = jnp.where(alone, -1, jnp.argmax(cosine, axis=2).astype(jnp.int32))
    return jnp.where(alone, 0.0, jnp.max(cosine, axis=2)), index


def max_cosine(
    x: Float[Array, "C S D"],
    inverse: Float[Array, "C S"],
    group: Int[Array, "B S"],
    *,
    implementation: str | None = None,
) -> tuple[Float[Array, "B S"], Int[Array, "B S"]]:
    """The largest cosine of each token with another token of its group, and the index of that token.

    ``inverse`` is 1 / ‖x‖ per token, in float32 (float64 for a float64 x). Products are exact and summed in float32,
    for bfloat16 inputs too. ``group`` is non-decreasing along a row, with gaps allowed; -1, at the end of a row only,
    marks tokens of no group, whose values are ignored. A token without a partner gets value 0 and index -1. Ties go to
    the lowest index, and their gradient too. ``implementation`` is one of dispatch.NAMES, or None for the device's
    default.

    The groups of each context of ``x`` are B / C rows of ``group``, in order, and share it without a copy.

    For a sequence that is split over devices, pass each a window of whole groups around its own tokens.

    Raises:
        ValueError: an unknown implementation, or one that does not support the dtype.
    """
    implementation = dispatch.choose("redundancy", implementation, x.dtype)
    with jax.named_scope("redundancy"):
        return _max_cosine(x, inverse.astype(dispatch.wide(x)), group, implementation)


def _chosen(x: Array, inverse: Array, group: Array, implementation: str) -> tuple[Array, Array]:
    if implementation == "xla":
        return _tiled(x, inverse, group)
    if implementation == "gpu":
        from comi_jax.kernels import redundancy_gpu

        return redundancy_gpu.max_cosine(x, inverse, group)
    from comi_jax.kernels import redundancy_tpu

    return redundancy_tpu.max_cosine(x, inverse, group, interpret=implementation == "interpret")


_max_cosine = jax.custom_vjp(_chosen, nondiff_argnums=(3,))


def _forward(x, inverse, group, implementation):
    value, index = _max_cosine(x, inverse, group, implementation)
    return (value, index), (x, inverse, index)


def _backward(implementation, saved, cotangents):
    """d x_i += c_i x_p / (|x_i| |x_p|) and d x_p += c_i x_i / (|x_i| |x_p|) for the partner p of i; similarly for
    ``inverse``."""
    x, inverse, index = saved
    partner, wide = jnp.maximum(index, 0), inverse.dtype
    pull = jnp.where(index >= 0, cotangents[0], 0.0)
    (contexts, length, _), batch = x.shape, index.shape[0]
    rows = (jnp.arange(batch, dtype=jnp.int32) // (batch // contexts))[:, None]

    def add(part, totals):
        to_x, to_inverse = totals
        at, c = part.of(partner), part.fresh(pull)
        mine, own = (dispatch.for_rows(part.of(a), batch) for a in (x, inverse))
        paired = (part.of(index) >= 0)[:, :, None]  # other tokens may hold infinities, and 0 * inf is NaN
        mine, others = (jnp.where(paired, a, 0).astype(wide) for a in (mine, x[rows, at]))
        their = inverse[rows, at]
        scale = (c * own * their)[:, :, None]
        to_x = part.add(to_x.at[rows, at].add(scale * mine), dispatch.summed(scale * others, contexts))
        cosine = c * jnp.sum(mine * others, axis=2)
        to_inverse = to_inverse.at[rows, at].add(cosine * own)
        return to_x, part.add(to_inverse, dispatch.summed(cosine * their, contexts))

    nothing = (jnp.zeros(x.shape, wide), jnp.zeros(inverse.shape, wide))
    to_x, to_inverse = dispatch.by_parts(length, implementation, add, nothing, batch // contexts)
    return to_x.astype(x.dtype), to_inverse, None


_max_cosine.defvjp(_forward, _backward)


def _tiled(x, inverse, group):
    """Plain XLA: each pair of tiles that share a group is multiplied once and folded into the maxima of both.

    Values and indices (exact in float32 up to 16 million) are in one array: with two, XLA would copy both in full in
    each iteration, which is quadratic.
    """
    batch, length = group.shape
    x, inverse, group = dispatch.pad_tokens(TILE, x, inverse, group)
    tiles, wide = x.shape[1] // TILE, inverse.dtype
    end = jnp.max(-(-dispatch.reach(group, TILE)[1] // TILE), axis=0)  # one past the last tile to multiply with
    inside = jnp.arange(TILE, dtype=jnp.int32)

    def at(array, tile):
        return jax.lax.dynamic_slice_in_dim(array, tile * TILE, TILE, axis=1)

    def put(array, tile, values):
        return jax.lax.dynamic_update_slice_in_dim(array, values, tile * TILE, axis=1)

    def fold(best, cosine, axis, tile):
        """``best``, updated by the cosines to the tokens of ``tile``, which lie along ``axis``."""
        value = jnp.max(cosine, axis=axis)
        index = (tile * TILE + jnp.argmax(cosine, axis=axis).astype(jnp.int32)).astype(wide)
        better = (value > best[..., 0]) | ((value == best[..., 0]) & (index < best[..., 1]))
        return jnp.where(better[..., None], jnp.stack([value, index], axis=-1), best)

    def cosines(i, j):
        product = jnp.einsum("bid,bjd->bij", at(x, i), at(x, j), precision=PRECISION, preferred_element_type=wide)
        cosine = product * (at(inverse, i)[:, :, None] * at(inverse, j)[:, None, :])
        same = (at(group, i)[:, :, None] == at(group, j)[:, None, :]) & (at(group, i) < dispatch.NO_GROUP)[:, :, None]
        same = same & ((i != j) | (inside[:, None] != inside[None, :]))[None]
        return jnp.where(same, dispatch.for_rows(cosine, batch), -jnp.inf)

    def row(i, best):
        def pair(j, state):
            best, mine = state
            cosine = cosines(i, j)
            return put(best, j, fold(at(best, j), cosine, 1, i)), fold(mine, cosine, 2, j)

        mine = fold(at(best, i), cosines(i, i), 2, i)
        best, mine = jax.lax.fori_loop(i + 1, end[i], pair, (best, mine))
        return put(best, i, mine)

    nothing = jnp.broadcast_to(jnp.array([-jnp.inf, tiles * TILE], wide), (batch, tiles * TILE, 2))
    best = jax.lax.fori_loop(0, tiles, row, nothing)[:, :length]
    return dispatch.without_partner(best[..., 0], best[..., 1].astype(jnp.int32))
