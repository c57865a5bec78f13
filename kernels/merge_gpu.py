"""Group softmax merge on GPU in plain XLA, without atomic additions: the same sums in the same order each time.

Groups are cut into pieces of at most PIECE tokens. All pieces are summed at once, in one pass over the states; then the
sums of each group's first pieces are added up, those of its second ones, and so on to the longest group, which the data
decides. (Why not Pallas: see ``redundancy_gpu``.)
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from comi_jax.kernels import dispatch

PIECE = 16  # tokens


def merge(
    x: Float[Array, "C S D"], gain: Float[Array, "B S"], group: Int[Array, "B S"], slots: int
) -> tuple[Float[Array, "B M D"], Float[Array, "B M"]]:
    """As ``merge.merge``."""
    batch, length = gain.shape
    (group,) = dispatch.pad_tokens(1, group)
    slot = jnp.arange(slots + 1, dtype=jnp.int32)
    border = jax.vmap(lambda row: jnp.searchsorted(row, slot, side="left"))(group).astype(jnp.int32)
    first, pieces = border[:, :-1], -(-(border[:, 1:] - border[:, :-1]) // PIECE)
    ends, most = jnp.cumsum(pieces, axis=1), jnp.max(pieces)
    # The most pieces that there can be: a short one for each slot.
    piece = jnp.arange(slots + -(-length // PIECE), dtype=jnp.int32)
    owner = jax.vmap(lambda row: jnp.searchsorted(row, piece, side="right"))(ends).astype(jnp.int32)
    real, owner = owner < slots, jnp.minimum(owner, slots - 1)

    def of_owner(a: Array) -> Array:
        return jnp.take_along_axis(a, owner, axis=1)

    start = of_owner(first) + (piece[None, :] - of_owner(ends - pieces)) * PIECE
    token = start[:, :, None] + jnp.arange(PIECE, dtype=jnp.int32)[None, None, :]
    inside = real[:, :, None] & (token < of_owner(border[:, 1:])[:, :, None])
    rows, token = jnp.arange(batch)[:, None, None], jnp.minimum(token, length - 1)
    context = rows[:, :, 0] // (batch // x.shape[0])
    gains = jnp.where(inside, gain[rows, token], -jnp.inf)

    def each_piece(combine, values, start):
        """``combine`` folded over the values of a slot's pieces, in order."""

        def one(number, running):
            at = jnp.minimum(ends - pieces + number, piece.shape[0] - 1)
            there = number < pieces
            taken = jax.tree.map(lambda a: a[jnp.arange(batch)[:, None], at], values)
            return combine(running, taken, there)

        return jax.lax.fori_loop(0, most, one, start)

    nothing = jnp.full(first.shape, -jnp.inf, gain.dtype)
    top = each_piece(lambda a, b, there: jnp.where(there, jnp.maximum(a, b), a), jnp.max(gains, axis=2), nothing)
    safe = jnp.where(top > -jnp.inf, top, 0.0)
    power = jnp.exp(gains - of_owner(safe)[:, :, None])
    weighted = jnp.zeros((batch, piece.shape[0], x.shape[2]), gain.dtype)
    for i in range(
        PIECE
    ):  # unrolled: one kernel reads the states where they are; a sum over them would copy them first
        states = jnp.where(inside[:, :, i, None], x[context, token[:, :, i]], 0).astype(gain.dtype)
        weighted = weighted + power[:, :, i, None] * states
    sums = (jnp.sum(power, axis=2), weighted)

    def add(running, taken, there):
        return (
            running[0] + jnp.where(there, taken[0], 0.0),
            running[1] + jnp.where(there[:, :, None], taken[1], 0.0),
        )

    zeros = (jnp.zeros_like(top), jnp.zeros((batch, slots, x.shape[2]), gain.dtype))
    total, memory = each_piece(add, sums, zeros)
    full = jnp.where(total > 0, total, 1.0)
    return memory / full[:, :, None], jnp.where(total > 0, top + jnp.log(full), -jnp.inf)
