"""Group softmax merge: the tokens of each contiguous group become one vector.

    w_k = softmax_{k in g}(gain_k)        (7)
    h_g = sum_{k in g} w_k x_k            (7), (8)

One pass over the states. ``merge_tpu`` is a Pallas kernel, ``merge_gpu`` plain XLA for GPUs. Relevance is not fused in:
the coarse stage needs it before the groups exist, so an earlier pass computes it with the norms of the states.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from comi_jax.kernels import dispatch

PRECISION = jax.lax.Precision.HIGHEST


def merge_reference(
    x: Float[Array, "C S D"], gain: Float[Array, "B S"], group: Int[Array, "B S"], slots: int
) -> tuple[Float[Array, "B M D"], Float[Array, "B M"]]:
    """The definition, with the whole [M, S] matrix: the reference for every implementation."""
    member = group[:, None, :] == jnp.arange(slots, dtype=group.dtype)[None, :, None]
    gain = jnp.where(member, gain[:, None, :], -jnp.inf)
    weight = jax.nn.softmax(gain, axis=2)
    weight = jnp.where(jnp.isnan(weight), 0.0, weight)  # for slots that are empty, or whose gains are all -inf
    normalizer = jax.nn.logsumexp(gain, axis=2)
    states = dispatch.for_rows(x, gain.shape[0]).astype(dispatch.wide(x))
    return jnp.einsum("bms,bsd->bmd", weight, states, precision=PRECISION), normalizer


def merge(
    x: Float[Array, "C S D"],
    gain: Float[Array, "B S"],
    group: Int[Array, "B S"],
    slots: int,
    *,
    implementation: str | None = None,
) -> tuple[Float[Array, "B M D"], Float[Array, "B M"]]:
    """The merged vector of each of ``slots`` groups, in float32 at least, and the log-sum-exp of the group's gains.

    The groups of each context of ``x`` are B / C rows of ``gain`` and ``group``, in order, and share it without a copy.

    ``group`` is non-decreasing along a row and below ``slots``; -1, at the end of a row only, marks tokens of no group,
    whose values are ignored. A slot that is empty, or whose gains are all -inf, gives the vector 0 and -inf.
    ``implementation`` is one of dispatch.NAMES, or None for the device's default.

    For a group that is split over devices, merge each part, then the parts, with the second result as their gain.

    Raises:
        ValueError: an unknown implementation, or one that does not support the dtype.
    """
    implementation = dispatch.choose("merge", implementation, x.dtype)
    with jax.named_scope("merge"):
        return _merge(x, gain.astype(dispatch.wide(x)), group, slots, implementation)


def weights(
    gain: Float[Array, "B S"], normalizer: Float[Array, "B M"], group: Int[Array, "B S"]
) -> Float[Array, "B S"]:
    """(7): each token's weight in its group, from the second result of ``merge``; 0 for tokens of no group."""
    inside = group >= 0
    own = jnp.take_along_axis(normalizer, jnp.maximum(group, 0), axis=1)
    return jnp.where(inside, jnp.exp(jnp.where(inside, gain.astype(own.dtype) - own, 0.0)), 0.0)


def _chosen(x: Array, gain: Array, group: Array, slots: int, implementation: str) -> tuple[Array, Array]:
    if implementation == "xla":
        return _scattered(x, gain, group, slots)
    if implementation == "gpu":
        from comi_jax.kernels import merge_gpu

        return merge_gpu.merge(x, gain, group, slots)
    from comi_jax.kernels import merge_tpu

    return merge_tpu.merge(x, gain, group, slots, interpret=implementation == "interpret")


_merge = jax.custom_vjp(_chosen, nondiff_argnums=(3, 4))


def _forward(x, gain, group, slots, implementation):
    memory, normalizer = _merge(x, gain, group, slots, implementation)
    return (memory, normalizer), (x, gain, group, memory, normalizer)


def _backward(slots, implementation, saved, cotangents):
    """d gain_k = w_k (x_k · dh_g − h_g · dh_g + d log sum exp_g), d x_k = w_k dh_g."""
    x, gain, group, memory, normalizer = saved
    to_memory, to_normalizer = cotangents
    weight, slot = weights(gain, normalizer, group), jnp.maximum(group, 0)
    shift = to_normalizer - jnp.sum(memory * to_memory, axis=2)
    (contexts, length, _), batch = x.shape, gain.shape[0]
    rows = jnp.arange(batch, dtype=jnp.int32)[:, None]

    def put(part, results):
        to_x, inner = results
        mine, states = to_memory[rows, part.of(slot)], dispatch.for_rows(part.of(x), batch)
        states = jnp.where((part.of(group) >= 0)[:, :, None], states, 0).astype(mine.dtype)
        to_x = part.put(to_x, dispatch.summed(part.of(weight)[:, :, None] * mine, contexts).astype(x.dtype))
        return to_x, part.put(inner, jnp.sum(states * mine, axis=2))

    nothing = (jnp.zeros_like(x), jnp.zeros_like(gain))
    to_x, inner = dispatch.by_parts(length, implementation, put, nothing, batch // contexts)
    return to_x, weight * (inner + jnp.take_along_axis(shift, slot, axis=1)), None


_merge.defvjp(_forward, _backward)


def _scattered(x, gain, group, slots):
    """Plain XLA: softmax weights for the whole row, then weighted states scatter-added into their slots, by parts."""
    group = jnp.where(group < 0, slots, group)  # out-of-range indices are dropped; negative ones would wrap around

    def row(gain, group):
        top = jax.ops.segment_max(gain, group, slots, indices_are_sorted=True)
        top = jnp.where(top > -jnp.inf, top, 0.0)
        power = jnp.exp(gain - top.at[group].get(mode="fill", fill_value=jnp.inf))
        total = jax.ops.segment_sum(power, group, slots, indices_are_sorted=True)
        weight = power / jnp.where(total > 0, total, 1.0).at[group].get(mode="fill", fill_value=1.0)
        return weight, jnp.where(total > 0, top + jnp.log(jnp.where(total > 0, total, 1.0)), -jnp.inf)

    weight, normalizer = jax.vmap(row)(gain, group)
    (contexts, length, width), batch = x.shape, gain.shape[0]
    rows = jnp.arange(batch, dtype=jnp.int32)[:, None]

    def add(part, memory):
        weighted = part.fresh(weight)[:, :, None] * dispatch.for_rows(part.of(x), batch).astype(weight.dtype)
        return memory.at[rows, part.of(group)].add(weighted, mode="drop")

    nothing = jnp.zeros((batch, slots, width), weight.dtype)
    return dispatch.by_parts(length, "xla", add, nothing, batch // contexts), normalizer
