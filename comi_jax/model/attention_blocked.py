"""Blocked attention in plain JAX: softmax(q k^T / sqrt(H)) v block by block, in memory linear in T and S.

    m' = max(m, max_j s_j)    l' = l e^(m-m') + sum_j e^(s_j-m')    o' = o e^(m-m') + sum_j e^(s_j-m') v_j

Online softmax forward (Dao et al., arXiv 2205.14135) and its own backward from `out` and `lse = m + log l` alone,
    p = e^(s-lse)   dv = p^T do   ds = p (do v^T - rowsum(do out))   dq = ds k   dk = ds^T q,
so nothing of size T x S is ever held; a cotangent of lse is subtracted from the row sum. Powers are of 2, with log2(e)
in the scores. Written for CPU, where 2-D matmuls are fastest: one batch row and one kv head at a time, with the N / K
query heads that share the kv head folded into the rows of the query block.
"""

import math
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

# Measured on CPU, float32, 2,048 and 8,192 tokens: each of the ten operations on a block of scores costs some 10 us
# beside its work, so blocks that need no mask are wide; at the causal diagonal narrow ones waste less.
BLOCK_ROWS = 1024  # of the query: tokens times the heads that share a kv head
BLOCK_KEYS = 256
WIDE = 4  # blocks of keys at a time, forward, where all are visible
LOG2E = math.log2(math.e)
# 2^x over [-1/2, 1/2], its relative error least (7.5e-8): coefficients of x^5 to x^0
POWER = (0.00132764717, 0.00967554154, 0.0555071328, 0.240221197, 0.693146967, 1.00000007)
ROUND = 1.5 * 2**23  # added to a float32, it leaves the nearest integer in the last bits
MASKED = -1e30  # finite, so that a row without any visible key never computes inf - inf


class Plan(NamedTuple):
    """The static settings of a call: query heads per kv head, tokens and keys per block, causality, precision."""

    heads: int
    tokens: int
    keys: int
    causal: bool
    precision: lax.Precision

    @property
    def rows(self) -> int:
        return self.tokens * self.heads

    def dot(self, a, b):
        return jnp.matmul(a, b, precision=self.precision)


def blocked(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    start: Int[Array, " B"],
    lengths: Int[Array, " B"],
    causal: bool,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B T N"]]:
    """attention() with `start` and `lengths` required, and lse, the log-sum-exp of each query's scores (MASKED without
    visible keys). The results are float32, or float64 for float64 inputs."""
    B, T, N, H = q.shape
    S, K = k.shape[1:3]
    dtype = jnp.float64 if q.dtype == jnp.float64 else jnp.float32
    # Products of bfloat16 values are exact in one pass of the matmul units; full float32 needs several on a TPU or GPU.
    precision = lax.Precision.HIGHEST if q.dtype == dtype else lax.Precision.DEFAULT
    plan = Plan(N // K, _even(T, max(1, BLOCK_ROWS * K // N)), _even(S, BLOCK_KEYS), causal, precision)
    q = q.astype(dtype) * jnp.asarray(H**-0.5, dtype)
    q = _whole_blocks(q.reshape(B, T, K, -1, H), plan.tokens).reshape(B, K, -1, H)
    k, v = (_whole_blocks(x.astype(dtype), plan.keys) for x in (k, v))
    out, lse = _attend(plan, q, k, v, start.astype(jnp.int32), jnp.minimum(lengths, S).astype(jnp.int32))
    lse = jnp.where(lse == jnp.inf, MASKED, lse)
    out, lse = (x.reshape(B, K, -1, plan.heads, *x.shape[3:])[:, :, :T].swapaxes(1, 2) for x in (out, lse))
    return out.reshape(B, T, N, H), lse.reshape(B, T, N)


def _even(size, largest):
    """The block length that cuts `size` into the fewest blocks of at most `largest`, all nearly equal."""
    return -(-size // -(-size // largest))


def _whole_blocks(x, block):
    """(B, T, K, ...) to (B, K, T', ...), T' the next multiple of the block."""
    x = x.swapaxes(1, 2)
    return jnp.pad(x, [(0, -size % block if axis == 2 else 0) for axis, size in enumerate(x.shape)])


def _both(plan: Plan, q: Array, k: Array, v: Array, start: Array, lengths: Array) -> tuple[Array, Array]:
    out, lse = _forward(plan, q, k, v, start, lengths)
    return out, lse


_attend = jax.custom_vjp(_both, nondiff_argnums=(0,))


def _attend_fwd(plan, q, k, v, start, lengths):
    out, lse = (checkpoint_name(x, "attention") for x in _forward(plan, q, k, v, start, lengths))
    return (out, lse), (q, k, v, start, lengths, out, lse)


def _attend_bwd(plan, saved, cotangents):
    q, k, v, start, lengths, out, lse = saved
    return *_backward(plan, q, k, v, start, lengths, out, lse, *cotangents), None, None


_attend.defvjp(_attend_fwd, _attend_bwd)


def _forward(plan, q, k, v, start, lengths):
    wide = min(WIDE, k.shape[2] // plan.keys)

    def head(q, k, v, start, length):
        def query_block(i):
            q_i, last = _block(q, i, plan.rows) * LOG2E, _last(plan, i, start, length)

            def key_block(j, state, edge):
                m, l, o = state
                width = plan.keys if edge else wide * plan.keys
                s = plan.dot(q_i, _block(k, j, width).T)
                if edge:
                    s = _hide(plan, s, j, last)
                m_new = jnp.maximum(m, s.max(1))
                p = power_of_2(s - m_new[:, None])
                decay = power_of_2(m - m_new)
                return m_new, l * decay + p.sum(1), o * decay[:, None] + plan.dot(p, _block(v, j, width))

            state = jnp.full_like(q_i[:, 0], MASKED / 2), jnp.zeros_like(q_i[:, 0]), jnp.zeros_like(q_i)
            m, l, o = _over_keys(plan, i, start, length, wide, key_block, state)
            empty = l == 0
            l = jnp.where(empty, 1, l)
            return o / l[:, None], jnp.where(empty, jnp.inf, m / LOG2E + jnp.log(l))

        out, lse = lax.map(query_block, _indices(q, plan.rows))
        return out.reshape(q.shape), lse.reshape(-1)

    return _over_heads(head, q, k, v, start, lengths)


def _backward(plan, q, k, v, start, lengths, out, lse, dout, dlse):
    def head(q, k, v, out, lse, dout, dlse, start, length):
        def query_block(grads, i):
            q_i, do_i, lse_i, out_i, dlse_i = (_block(x, i, plan.rows) for x in (q, dout, lse, out, dlse))
            delta = (do_i * out_i).sum(1) - dlse_i
            q_2, lse_2, last = q_i * LOG2E, lse_i * LOG2E, _last(plan, i, start, length)
            # dk and dv are accumulated transposed, as p^T do, which transposes the wide p, is a slow matmul on CPU.
            q_t, do_t = q_i.T, do_i.T

            def key_block(j, state, edge):
                dq, dk, dv = state
                k_j, v_j = _block(k, j, plan.keys), _block(v, j, plan.keys)
                s = plan.dot(q_2, k_j.T)
                p = power_of_2((_hide(plan, s, j, last) if edge else s) - lse_2[:, None])
                ds = p * (plan.dot(do_i, v_j.T) - delta[:, None])
                return dq + plan.dot(ds, k_j), dk.at[j].add(plan.dot(q_t, ds)), dv.at[j].add(plan.dot(do_t, p))

            state = jnp.zeros_like(q_i), *grads
            dq, *grads = _over_keys(plan, i, start, length, 1, key_block, state)
            return grads, dq

        zeros = [jnp.zeros_like(x).reshape(-1, x.shape[1], plan.keys) for x in (k, v)]
        grads, dq = lax.scan(query_block, zeros, _indices(q, plan.rows))
        return dq.reshape(q.shape), *(x.swapaxes(1, 2).reshape(k.shape) for x in grads)

    return _over_heads(head, q, k, v, out, lse, dout, dlse, start, lengths)


def power_of_2(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """2^x within 3e-7 of it, 0 below -126; for x up to 127. In float32 it takes a fraction of the time of XLA's
    exponential on CPU: 2^x = 2^n 2^(x-n), n the integer next to x, which is added to the exponent bits."""
    if x.dtype != jnp.float32:
        return jnp.exp2(x)
    n = lax.bitcast_convert_type(x + ROUND, jnp.int32) - lax.bitcast_convert_type(jnp.float32(ROUND), jnp.int32)
    rest = x - n.astype(jnp.float32)
    power = jnp.full_like(x, POWER[0])
    for coefficient in POWER[1:]:
        power = power * rest + coefficient
    power = lax.bitcast_convert_type(lax.bitcast_convert_type(power, jnp.int32) + (n << 23), jnp.float32)
    return jnp.where(x < -126, 0, power)


def _over_heads(head, *args):
    """Runs `head` for each batch row and kv head in turn; the last two arguments, start and lengths, are per row."""
    B, K = args[0].shape[:2]
    merged = [x.reshape(B * K, *x.shape[2:]) for x in args[:-2]] + [jnp.repeat(x, K) for x in args[-2:]]
    return [x.reshape(B, K, *x.shape[1:]) for x in lax.map(lambda each: head(*each), merged)]


def _over_keys(plan, i, start, length, wide, key_block, state):
    """Folds key_block(j, state, edge) over the keys visible to query block i: ``wide`` blocks of keys at a time, and
    one at a time at the edge, where a mask is needed; j counts what is folded at a time."""
    full = end = length
    if plan.causal:
        full = jnp.minimum(full, start + i * plan.tokens + 1)  # keys visible to the first query of the block
        end = jnp.minimum(end, start + (i + 1) * plan.tokens)  # keys visible to its last query
    full = jnp.maximum(full, 0) // (wide * plan.keys)
    end = (jnp.maximum(end, 0) + plan.keys - 1) // plan.keys
    state = lax.fori_loop(0, full, partial(key_block, edge=False), state)
    return lax.fori_loop(full * wide, end, partial(key_block, edge=True), state)


def _last(plan, i, start, length):
    """The last key visible to each row of query block i. Made once for all blocks of keys, as the division is slow."""
    last = jnp.broadcast_to(length - 1, (plan.rows,))
    if not plan.causal:
        return last
    return jnp.minimum(last, start + i * plan.tokens + jnp.arange(plan.rows, dtype=jnp.int32) // plan.heads)


def _hide(plan, s, j, last):
    """The scores with the keys of block j, MASKED beyond the last key visible to each row."""
    key = j * plan.keys + lax.broadcasted_iota(jnp.int32, s.shape, 1)
    return jnp.where(key <= last[:, None], s, MASKED)


def _block(x, i, size):
    return lax.dynamic_slice_in_dim(x, i * size, size)


def _indices(x, size):
    return jnp.arange(x.shape[0] // size, dtype=jnp.int32)
