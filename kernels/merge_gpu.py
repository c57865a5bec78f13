"""Group softmax merge on GPU: Pallas with Triton; one program per slot and part of the width loops over its tokens.

The states of a group are read once, in contiguous rows; its gains, 4 bytes per token, by each program of the slot.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float, Int

from comi_jax.kernels import dispatch

TOKENS = 32  # per step
PART = 256  # of the width


def merge(
    x: Float[Array, "B S D"],
    gain: Float[Array, "B S"],
    group: Int[Array, "B S"],
    slots: int,
    *,
    interpret: Any = False,
) -> tuple[Float[Array, "B M D"], Float[Array, "B M"]]:
    """As ``merge.merge``."""
    batch, _, width = x.shape
    gain, group = dispatch.pad_tokens(TOKENS, gain, group)
    slot = jnp.arange(slots + 1, dtype=jnp.int32)
    border = jax.vmap(lambda row: jnp.searchsorted(row, slot, side="left"))(group).astype(jnp.int32)
    memory, normalizer = pl.pallas_call(
        _kernel,
        grid=(slots, pl.cdiv(width, PART), batch),
        out_shape=[
            jax.ShapeDtypeStruct((batch, slots, width), jnp.float32),
            jax.ShapeDtypeStruct((batch, slots), jnp.float32),
        ],
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=3),
        interpret=interpret,
        name="merge",
    )(border, gain, x)
    return memory, normalizer


def _kernel(border, gain, x, memory, normalizer):
    slot, part, b = (pl.program_id(axis) for axis in range(3))
    start, end = border[b, slot], border[b, slot + 1]
    width = x.shape[2]
    column = part * PART + jnp.arange(PART, dtype=jnp.int32)

    def add(step, running):
        top, total, acc = running
        at = start + step * TOKENS
        token = at + jnp.arange(TOKENS, dtype=jnp.int32)
        inside = token < end
        gains = plgpu.load(gain.at[b, pl.ds(at, TOKENS)], mask=inside, other=-jnp.inf)
        highest = jnp.maximum(top, jnp.max(gains))
        safe = jnp.where(highest > -jnp.inf, highest, 0.0)
        kept, power = jnp.exp(top - safe), jnp.exp(gains - safe)
        states = plgpu.load(
            x.at[b, pl.ds(at, TOKENS), pl.ds(part * PART, PART)],
            mask=inside[:, None] & (column < width)[None, :],
            other=0.0,
        )
        weighted = power[:, None] * states.astype(jnp.float32)
        return highest, total * kept + jnp.sum(power), acc * kept + jnp.sum(weighted, axis=0)

    nothing = (jnp.float32(-jnp.inf), jnp.float32(0.0), jnp.zeros((PART,), jnp.float32))
    top, total, acc = jax.lax.fori_loop(0, pl.cdiv(end - start, TOKENS), add, nothing)
    share = acc / jnp.where(total > 0, total, 1.0)
    plgpu.store(memory.at[b, slot, pl.ds(part * PART, PART)], share, mask=column < width)
    normalizer[b, slot] = jnp.where(total > 0, top + jnp.log(jnp.where(total > 0, total, 1.0)), -jnp.inf)
