"""Blocked attention in plain JAX: softmax(q k^T / sqrt(H)) v block by block, in memory linear in T and S.

    m' = max(m, max_j s_j)    l' = l e^(m-m') + sum_j e^(s_j-m')    o' = o e^(m-m') + sum_j e^(s_j-m') v_j

Online softmax forward (Dao et al., arXiv 2205.14135) and its own backward from `out` and `lse = m + log l` alone,
    p = e^(s-lse)   dv = p^T do   ds = p (do v^T - rowsum(do out))   dq = ds k   dk = ds^T q,
so nothing of size T x S is ever held; a cotangent of lse is subtracted from the row sum. Written for CPU, where 2-D
matmuls are fastest: one batch row and one kv head at a time, with the N / K query heads that share the kv head folded
into the rows of the query block.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

# Measured on CPU, float32, 512 to 8,192 tokens: 256 keys are faster than 512 for short rows, where the causal diagonal
# dominates, and as fast for long ones; 512 to 2,048 rows differ little.
BLOCK_ROWS = 1024  # of the query: tokens times the heads that share a kv head
BLOCK_KEYS = 256
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
    def head(q, k, v, start, length):
        def query_block(i):
            q_i = _block(q, i, plan.rows)

            def key_block(j, state, edge):
                m, l, o = state
                s = plan.dot(q_i, _block(k, j, plan.keys).T)
                seen = _visible(plan, i, j, start, length) if edge else None
                if seen is not None:
                    s = jnp.where(seen, s, MASKED)
                m_new = jnp.maximum(m, s.max(1))
                p = jnp.exp(s - m_new[:, None])
                if seen is not None:
                    p = jnp.where(seen, p, 0)
                decay = jnp.exp(m - m_new)
                return m_new, l * decay + p.sum(1), o * decay[:, None] + plan.dot(p, _block(v, j, plan.keys))

            state = jnp.full_like(q_i[:, 0], MASKED), jnp.zeros_like(q_i[:, 0]), jnp.zeros_like(q_i)
            m, l, o = _over_keys(plan, i, start, length, key_block, state)
            empty = l == 0
            l = jnp.where(empty, 1, l)
            return o / l[:, None], jnp.where(empty, jnp.inf, m + jnp.log(l))

        out, lse = lax.map(query_block, _indices(q, plan.rows))
        return out.reshape(q.shape), lse.reshape(-1)

    return _over_heads(head, q, k, v, start, lengths)


def _backward(plan, q, k, v, start, lengths, out, lse, dout, dlse):
    def head(q, k, v, out, lse, dout, dlse, start, length):
        def query_block(grads, i):
            q_i, do_i, lse_i, out_i, dlse_i = (_block(x, i, plan.rows) for x in (q, dout, lse, out, dlse))
            delta = (do_i * out_i).sum(1) - dlse_i
            # dk and dv are accumulated transposed, as p^T do, which transposes the wide p, is a slow matmul on CPU.
            q_t, do_t = q_i.T, do_i.T

            def key_block(j, state, edge):
                dq, dk, dv = state
                k_j, v_j = _block(k, j, plan.keys), _block(v, j, plan.keys)
                p = jnp.exp(plan.dot(q_i, k_j.T) - lse_i[:, None])
                if edge:
                    p = jnp.where(_visible(plan, i, j, start, length), p, 0)
                ds = p * (plan.dot(do_i, v_j.T) - delta[:, None])
                return dq + plan.dot(ds, k_j), dk.at[j].add(plan.dot(q_t, ds)), dv.at[j].add(plan.dot(do_t, p))

            dq, *grads = _over_keys(plan, i, start, length, key_block, (jnp.zeros_like(q_i), *grads))
            return grads, dq

        zeros = [jnp.zeros_like(x).reshape(-1, x.shape[1], plan.keys) for x in (k, v)]
        grads, dq = lax.scan(query_block, zeros, _indices(q, plan.rows))
        return dq.reshape(q.shape), *(x.swapaxes(1, 2).reshape(k.shape) for x in grads)

    return _over_heads(head, q, k, v, out, lse, dout, dlse, start, lengths)


def _over_heads(head, *args):
    """Runs `head` for each batch row and kv head in turn; the last two arguments, start and lengths, are per row."""
    B, K = args[0].shape[:2]
    merged = [x.reshape(B * K, *x.shape[2:]) for x in args[:-2]] + [jnp.repeat(x, K) for x in args[-2:]]
    return [x.reshape(B, K, *x.shape[1:]) for x in lax.map(lambda each: head(*each), merged)]


def _over_keys(plan, i, start, length, key_block, state):
    """Folds key_block(j, state, edge) over the key blocks visible to query block i; only those at the edge need a
    mask."""
    full = end = length
    if plan.causal:
        full = jnp.minimum(full, start + i * plan.tokens + 1)  # keys visible to the first query of the block
        end = jnp.minimum(end, start + (i + 1) * plan.tokens)  # keys visible to its last query
    full = jnp.maximum(full, 0) // plan.keys
    end = (jnp.maximum(end, 0) + plan.keys - 1) // plan.keys
    state = lax.fori_loop(0, full, partial(key_block, edge=False), state)
    return lax.fori_loop(full, end, partial(key_block, edge=True), state)


def _visible(plan, i, j, start, length):
    """The mask [rows, keys] of the keys of block j visible to the rows of query block i."""
    shape = (plan.rows, plan.keys)
    key = j * plan.keys + lax.broadcasted_iota(jnp.int32, shape, 1)
    seen = key < length
    if plan.causal:
        seen &= key <= start + i * plan.tokens + lax.broadcasted_iota(jnp.int32, shape, 0) // plan.heads
    return seen


def _block(x, i, size):
    return lax.dynamic_slice_in_dim(x, i * size, size)


def _indices(x, size):
    return jnp.arange(x.shape[0] // size, dtype=jnp.int32)
