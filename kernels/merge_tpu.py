"""Group softmax merge on TPU: Pallas with Mosaic, with group boundaries as scalar-prefetch arguments.

The grid is (row of the batch, slot tile, step). Step k processes the k-th token tile that holds tokens of the slot
tile's groups: an online softmax, and a product of [slots, tokens] weights with the states. Weights are split into three
bfloat16 terms, whose sum is exact, so that bfloat16 states need no conversion.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from comi_jax.kernels import dispatch

TOKENS = 128  # per tile
SLOTS = 128
VMEM = 8 * 2**20  # bytes for double-buffered blocks: half of a kernel's default limit


def merge(
    x: Float[Array, "C S D"],
    gain: Float[Array, "B S"],
    group: Int[Array, "B S"],
    slots: int,
    *,
    interpret: Any = False,
) -> tuple[Float[Array, "B M D"], Float[Array, "B M"]]:
    """As ``merge.merge``."""
    (contexts, _, width), batch = x.shape, gain.shape[0]
    share = batch // contexts
    # x itself is not padded: what a tile reads beyond its end has no group and is set to 0.
    gain, group = dispatch.pad_tokens(TOKENS, gain, group)
    tiles = -(-slots // SLOTS)
    border = jnp.minimum(jnp.arange(tiles + 1, dtype=jnp.int32) * SLOTS, slots)
    border = jax.vmap(lambda row: jnp.searchsorted(row, border, side="left"))(group).astype(jnp.int32)
    first, last = border[:, :-1] // TOKENS, (border[:, 1:] - 1) // TOKENS
    steps = jnp.maximum(jnp.max(last - first) + 1, 1)

    def token_tile(b, i, k, first, last):
        return jnp.minimum(first[b, i] + k, jnp.maximum(last[b, i], 0))

    by_token = pl.BlockSpec((1, 1, TOKENS), lambda b, i, k, *reach: (b, 0, token_tile(b, i, k, *reach)))
    buffers = 2 * width * (TOKENS * x.dtype.itemsize + SLOTS * 4)
    memory, normalizer = pl.pallas_call(
        _kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(batch, tiles, steps),
            in_specs=[
                by_token,
                by_token,
                pl.BlockSpec(
                    (1, TOKENS, width), lambda b, i, k, *reach: (jax.lax.div(b, share), token_tile(b, i, k, *reach), 0)
                ),
            ],
            out_specs=[
                pl.BlockSpec((1, SLOTS, width), lambda b, i, k, first, last: (b, i, 0)),
                pl.BlockSpec((1, 1, SLOTS), lambda b, i, k, first, last: (b, 0, i)),
            ],
            scratch_shapes=[pltpu.VMEM((SLOTS, 1), jnp.float32)] * 2,
        ),
        out_shape=[
            jax.ShapeDtypeStruct((batch, slots, width), jnp.float32),
            jax.ShapeDtypeStruct((batch, 1, tiles * SLOTS), jnp.float32),
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"),
            vmem_limit_bytes=2 * VMEM + max(2 * (buffers - VMEM), 0),
        ),
        interpret=interpret,
        name="merge",
    )(first, last, gain[:, None], group[:, None], x)
    return memory, normalizer[:, 0, :slots]


def _kernel(first, last, gain, group, x, memory, normalizer, top, total):
    """One slot tile with one token tile."""
    b, i, k = (pl.program_id(axis) for axis in range(3))

    @pl.when(k == 0)
    def _():
        memory[...] = jnp.zeros(memory.shape, memory.dtype)
        top[...] = jnp.full(top.shape, -jnp.inf, top.dtype)
        total[...] = jnp.zeros(total.shape, total.dtype)

    tile = first[b, i] + k

    @pl.when(tile <= last[b, i])
    def _():
        shape = (SLOTS, TOKENS)
        member = group[0] == i * SLOTS + jax.lax.broadcasted_iota(jnp.int32, shape, 0)
        highest = jnp.max(jnp.where(member, gain[0], -jnp.inf), axis=1, keepdims=True)
        highest = jnp.maximum(highest, top[...])
        begun = highest > -jnp.inf
        kept = jnp.where(begun, jnp.exp(top[...] - jnp.where(begun, highest, 0.0)), 0.0)
        power = jnp.where(member, jnp.exp(gain[0] - jnp.where(begun, highest, 0.0)), 0.0)
        top[...] = highest
        total[...] = total[...] * kept + jnp.sum(power, axis=1, keepdims=True)
        grouped = dispatch.down(group[0]) < dispatch.NO_GROUP
        states = jnp.where(grouped, x[0], jnp.zeros((), x.dtype))
        memory[0] = memory[0] * kept + _product(power, states)

    @pl.when(k == pl.num_programs(2) - 1)
    def _():
        filled = total[...] > 0
        memory[0] = memory[0] / jnp.where(filled, total[...], 1.0)
        value = jnp.where(filled, top[...] + jnp.log(jnp.where(filled, total[...], 1.0)), -jnp.inf)
        normalizer[0] = jnp.transpose(jnp.broadcast_to(value, (SLOTS, 8)))[:1]


def _product(weight, states):
    """weight @ states, [slots, tokens] float32 times [tokens, width], in float32 precision."""
    if states.dtype == jnp.float32:
        return jax.lax.dot(weight, states, precision=jax.lax.Precision.HIGHEST)
    parts, rest = [], weight
    for _ in range(3):
        parts.append(rest.astype(jnp.bfloat16).astype(states.dtype))
        rest = rest - parts[-1].astype(jnp.float32)
    return sum(jax.lax.dot(part, states, preferred_element_type=jnp.float32) for part in parts)
