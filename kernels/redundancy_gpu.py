"""Redundancy on GPU: Pallas with Triton; one program per token tile loops over the column tiles its groups overlap.

Triton, because it compiles for every NVIDIA GPU since Ampere, also ahead of time on a machine without one; Mosaic GPU
needs Hopper and, as of jax 0.10, does not lower ahead of time. Neighbouring programs share column tiles through the L2
cache, so main memory is read about once.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float, Int

from comi_jax.kernels import dispatch

TILE = 64  # tokens of a row tile and of a column tile
DEPTH = 64  # slice of the width multiplied at a time


def max_cosine(
    x: Float[Array, "B S D"], inverse: Float[Array, "B S"], group: Int[Array, "B S"], *, interpret: Any = False
) -> tuple[Float[Array, "B S"], Int[Array, "B S"]]:
    """As ``redundancy.max_cosine``."""
    batch, length, _ = x.shape
    inverse, group = dispatch.pad_tokens(TILE, inverse, group)
    first, end = dispatch.reach(group, TILE)
    value, index = pl.pallas_call(
        functools.partial(_kernel, length=length),
        grid=(group.shape[1] // TILE, batch),
        out_shape=[jax.ShapeDtypeStruct(group.shape, jnp.float32), jax.ShapeDtypeStruct(group.shape, jnp.int32)],
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=3),
        interpret=interpret,
        name="redundancy",
    )(first // TILE, -(-end // TILE), x, inverse, group)
    return dispatch.without_partner(value[:, :length], index[:, :length])


def _kernel(first, end, x, inverse, group, value, index, *, length):
    i, b = pl.program_id(0), pl.program_id(1)
    row = i * TILE + jnp.arange(TILE, dtype=jnp.int32)
    row_group, row_inverse = group[b, pl.ds(i * TILE, TILE)], inverse[b, pl.ds(i * TILE, TILE)]
    width = x.shape[2]
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else jax.lax.Precision.DEFAULT

    def column_tile(j, best):
        start = j * TILE
        column = start + jnp.arange(TILE, dtype=jnp.int32)

        def part(at, first_token, tokens, k):
            """x[b, tokens, k * DEPTH : (k + 1) * DEPTH], 0 out of bounds."""
            depth = k * DEPTH + jnp.arange(DEPTH, dtype=jnp.int32)
            inside = (tokens < length)[:, None] & (depth < width)[None, :]
            return plgpu.load(at.at[b, pl.ds(first_token, TILE), pl.ds(k * DEPTH, DEPTH)], mask=inside, other=0.0)

        def multiply(k, product):
            rows, columns = part(x, i * TILE, row, k), part(x, start, column, k)
            return product + jax.lax.dot_general(
                rows, columns, (((1,), (1,)), ((), ())), precision=precision, preferred_element_type=jnp.float32
            )

        product = jax.lax.fori_loop(0, pl.cdiv(width, DEPTH), multiply, jnp.zeros((TILE, TILE), jnp.float32))
        cosine = product * (row_inverse[:, None] * inverse[b, pl.ds(start, TILE)][None, :])
        column_group = group[b, pl.ds(start, TILE)]
        partner = (row_group[:, None] == column_group[None, :]) & (row_group < dispatch.NO_GROUP)[:, None]
        partner = partner & (row[:, None] != column[None, :])
        cosine = jnp.where(partner, cosine, -jnp.inf)
        top = jnp.max(cosine, axis=1)
        at = jnp.min(jnp.where(partner & (cosine == top[:, None]), column[None, :], dispatch.NO_GROUP), axis=1)
        better = top > best[0]  # strictly: columns are visited in ascending order, and ties go to the lowest index
        return jnp.where(better, top, best[0]), jnp.where(better, at, best[1])

    nothing = (jnp.full((TILE,), -jnp.inf, jnp.float32), jnp.full((TILE,), dispatch.NO_GROUP, jnp.int32))
    best = jax.lax.fori_loop(first[b, i], end[b, i], column_tile, nothing)
    value[b, pl.ds(i * TILE, TILE)], index[b, pl.ds(i * TILE, TILE)] = best
