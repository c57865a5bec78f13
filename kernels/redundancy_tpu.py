"""Redundancy on TPU: Pallas with Mosaic, with group boundaries as scalar-prefetch arguments.

The grid is (row of the batch, row tile, step). Step k multiplies a row tile with the k-th column tile that its groups
overlap and folds the cosines into running maxima in VMEM. The number of steps is the largest that any row tile needs;
the others stay at their last column tile, which is then not fetched again.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from comi_jax.kernels import dispatch

COLUMNS = 128  # tokens of a column tile
ROWS = 256  # tokens of a row tile, where VMEM holds them
VMEM = 8 * 2**20  # bytes for double-buffered tiles: half of a kernel's default limit


def max_cosine(
    x: Float[Array, "C S D"], inverse: Float[Array, "C S"], group: Int[Array, "B S"], *, interpret: Any = False
) -> tuple[Float[Array, "B S"], Int[Array, "B S"]]:
    """As ``redundancy.max_cosine``."""
    (contexts, length, width), batch = x.shape, group.shape[0]
    share = batch // contexts
    token_bytes = 2 * width * x.dtype.itemsize
    rows = ROWS if length > COLUMNS and (ROWS + COLUMNS) * token_bytes <= VMEM else COLUMNS
    # x itself is not padded: what a tile reads beyond its end has no group and is masked out.
    inverse, group = dispatch.pad_tokens(rows, inverse, group)
    padded = group.shape[1]
    first, end = dispatch.reach(group, rows)
    first, last = first // COLUMNS, (end - 1) // COLUMNS
    steps = jnp.maximum(jnp.max(last - first) + 1, 1)

    def column_tile(b, i, k, first, last):
        return jnp.minimum(first[b, i] + k, jnp.maximum(last[b, i], 0))

    def context(b):
        return jax.lax.div(b, share)

    def numbers(row):
        """Of arrays [rows, 1, S], whose row for the grid's ``b`` is row(b): the row tile, and the column tile."""
        return (
            pl.BlockSpec((1, 1, rows), lambda b, i, k, first, last: (row(b), 0, i)),
            pl.BlockSpec((1, 1, COLUMNS), lambda b, i, k, *reach: (row(b), 0, column_tile(b, i, k, *reach))),
        )

    own = pl.BlockSpec((1, 1, rows), lambda b, i, k, first, last: (b, 0, i))
    value, index = pl.pallas_call(
        _kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(batch, padded // rows, steps),
            in_specs=[
                pl.BlockSpec((1, rows, width), lambda b, i, k, first, last: (context(b), i, 0)),
                pl.BlockSpec(
                    (1, COLUMNS, width), lambda b, i, k, *reach: (context(b), column_tile(b, i, k, *reach), 0)
                ),
                *numbers(context), *numbers(lambda b: b),
            ],
            out_specs=[own, own],
        ),
        out_shape=[
            jax.ShapeDtypeStruct((batch, 1, padded), jnp.float32),
            jax.ShapeDtypeStruct((batch, 1, padded), jnp.int32),
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"),
            vmem_limit_bytes=2 * VMEM + max((rows + COLUMNS) * token_bytes - VMEM, 0),
        ),
        interpret=interpret,
        name="redundancy",
    )(first, last, x, x, *(a[:, None] for a in (inverse, inverse, group, group)))  # fmt: skip
    return dispatch.without_partner(value[:, 0, :length], index[:, 0, :length])


def _kernel(first, last, x_row, x_column, inverse_row, inverse_column, group_row, group_column, value, index):
    """One row tile with one column tile. Cosines are laid out [column, row], so that the maxima lie along the lanes."""
    b, i, k = (pl.program_id(axis) for axis in range(3))

    @pl.when(k == 0)
    def _():
        value[...] = jnp.full(value.shape, -jnp.inf, value.dtype)
        index[...] = jnp.full(index.shape, dispatch.NO_GROUP, index.dtype)

    column = first[b, i] + k

    @pl.when(column <= last[b, i])
    def _():
        precision = jax.lax.Precision.HIGHEST if x_row.dtype == jnp.float32 else jax.lax.Precision.DEFAULT
        product = jax.lax.dot_general(
            x_column[0], x_row[0], (((1,), (1,)), ((), ())), precision=precision, preferred_element_type=jnp.float32
        )
        cosine = product * (dispatch.down(inverse_column[0]) * inverse_row[0])
        token = column * COLUMNS + jax.lax.broadcasted_iota(jnp.int32, cosine.shape, 0)
        itself = i * x_row.shape[1] + jax.lax.broadcasted_iota(jnp.int32, cosine.shape, 1)
        groups = dispatch.down(group_column[0])
        partner = (groups == group_row[0]) & (groups < dispatch.NO_GROUP) & (token != itself)
        cosine = jnp.where(partner, cosine, -jnp.inf)
        best = jnp.max(cosine, axis=0, keepdims=True)
        at = jnp.min(jnp.where(partner & (cosine == best), token, dispatch.NO_GROUP), axis=0, keepdims=True)
        better = best > value[0]  # strictly: columns are visited in ascending order, and ties go to the lowest index
        value[0] = jnp.where(better, best, value[0])
        index[0] = jnp.where(better, at, index[0])
