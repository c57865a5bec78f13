"""Blocked attention in plain JAX: softmax(q k^T / sqrt(H)) v, block by block, in memory linear in T and S.

    m' = max(m, max_j s_j)    l' = l e^(m-m') + sum_j e^(s_j-m')    o' = o e^(m-m') + sum_j e^(s_j-m') v_j

Online softmax forward (Dao et al., arXiv 2205.14135) and its own backward from `out` and `lse = m + log l` alone,
    p = e^(s-lse)   dv = p^T do   ds = p (do v^T - rowsum(do out))   dq = ds k   dk = ds^T q,
so nothing of size T x S is ever held.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

BLOCK_Q_ROWS = 1024  # query rows in a block: tokens times the N / K query heads that share one kv head
BLOCK_K = 256
MASKED = -1e30  # finite, so that a row without any visible key never meets inf - inf


def blocked(q, k, v, start, lengths, causal):
    """Attention of q (B T N H) over k, v (B S K H); `start`, `lengths` (B) are never None here. See attention()."""
    B, T, N, H = q.shape
    S, K = k.shape[1:3]
    R = N // K
    dtype = jnp.promote_types(jnp.float32, q.dtype)
    block_q = min(max(1, BLOCK_Q_ROWS // R), T)
    block_k = min(BLOCK_K, S)
    q = q.astype(dtype).reshape(B, T, K, R, H).swapaxes(1, 2)
    q = _pad(q, 2, block_q).reshape(B, K, -1, H)
    k = _pad(k.astype(dtype).swapaxes(1, 2), 2, block_k)
    v = _pad(v.astype(dtype).swapaxes(1, 2), 2, block_k)
    plan = (R, block_q, block_k, causal)
    out = _attend(plan, q * jnp.asarray(H**-0.5, dtype), k, v, start, jnp.minimum(lengths, S))
    return out.reshape(B, K, -1, R, H)[:, :, :T].swapaxes(1, 2).reshape(B, T, N, H)


def _pad(x, axis, multiple):
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, -x.shape[axis] % multiple)
    return jnp.pad(x, widths)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(plan, q, k, v, start, lengths):
    return _forward(plan, q, k, v, start, lengths)[0]


def _attend_fwd(plan, q, k, v, start, lengths):
    out, lse = _forward(plan, q, k, v, start, lengths)
    out, lse = checkpoint_name(out, "attention"), checkpoint_name(lse, "attention")
    return out, (q, k, v, start, lengths, out, lse)


def _attend_bwd(plan, saved, dout):
    return *_backward(plan, *saved, dout), None, None


_attend.defvjp(_attend_fwd, _attend_bwd)


def _block(x, i, size):
    return lax.dynamic_slice_in_dim(x, i * size, size)


def _visible(plan, i, j, start, length):
    """Which keys of block j (columns) the rows of query block i may see."""
    R, block_q, block_k, causal = plan
    shape = (block_q * R, block_k)
    key = j * block_k + lax.broadcasted_iota(jnp.int32, shape, 1)
    seen = key < length
    if causal:
        seen &= key <= start + i * block_q + lax.broadcasted_iota(jnp.int32, shape, 0) // R
    return seen


def _key_range(plan, i, start, length):
    """(full, end): query block i sees key blocks below `full` entirely and those from `end` on not at all."""
    _, block_q, block_k, causal = plan
    full, end = length, length
    if causal:
        full = jnp.minimum(full, start + i * block_q + 1)
        end = jnp.minimum(end, start + (i + 1) * block_q)
    full, end = jnp.maximum(full, 0), jnp.maximum(end, 0)
    return full // block_k, (end + block_k - 1) // block_k


def _forward(plan, q, k, v, start, lengths):
    R, block_q, block_k, _ = plan
    rows, H = block_q * R, q.shape[-1]

    def head(args):
        q, k, v, start, length = args

        def query_block(i):
            q_i = _block(q, i, rows)

            def key_block(masked, j, carry):
                m, l, o = carry
                s = q_i @ _block(k, j, block_k).T
                seen = _visible(plan, i, j, start, length) if masked else None
                if masked:
                    s = jnp.where(seen, s, MASKED)
                m_new = jnp.maximum(m, s.max(1))
                p = jnp.exp(s - m_new[:, None])
                if masked:
                    p = jnp.where(seen, p, 0)
                decay = jnp.exp(m - m_new)
                return m_new, l * decay + p.sum(1), o * decay[:, None] + p @ _block(v, j, block_k)

            full, end = _key_range(plan, i, start, length)
            init = jnp.full(rows, MASKED, q.dtype), jnp.zeros(rows, q.dtype), jnp.zeros((rows, H), q.dtype)
            carry = lax.fori_loop(0, full, partial(key_block, False), init)
            m, l, o = lax.fori_loop(full, end, partial(key_block, True), carry)
            empty = l == 0
            l = jnp.where(empty, 1, l)
            return o / l[:, None], jnp.where(empty, jnp.inf, m + jnp.log(l))

        out, lse = lax.map(query_block, jnp.arange(q.shape[0] // rows, dtype=jnp.int32))
        return out.reshape(q.shape), lse.reshape(-1)

    return _over_heads(head, q, k, v, start, lengths)


def _backward(plan, q, k, v, start, lengths, out, lse, dout):
    R, block_q, block_k, _ = plan
    rows = block_q * R
    delta = (dout * out).sum(-1)

    def head(args):
        q, k, v, lse, delta, dout, start, length = args
        blocks = (k.shape[0] // block_k, k.shape[1], block_k)

        def query_block(grads, i):
            q_i, do_i, lse_i, delta_i = (_block(x, i, rows) for x in (q, dout, lse, delta))
            q_t, do_t = q_i.T, do_i.T

            def key_block(masked, j, carry):
                dq, dk, dv = carry
                k_j, v_j = _block(k, j, block_k), _block(v, j, block_k)
                p = jnp.exp(q_i @ k_j.T - lse_i[:, None])
                if masked:
                    p = jnp.where(_visible(plan, i, j, start, length), p, 0)
                ds = p * (do_i @ v_j.T - delta_i[:, None])
                return dq + ds @ k_j, dk.at[j].add(q_t @ ds), dv.at[j].add(do_t @ p)

            full, end = _key_range(plan, i, start, length)
            carry = lax.fori_loop(0, full, partial(key_block, False), (jnp.zeros_like(q_i), *grads))
            dq, *grads = lax.fori_loop(full, end, partial(key_block, True), carry)
            return tuple(grads), dq

        # dk and dv are gathered transposed, (H, block_k) a block: p^T do with p transposed is the slow gemm on CPU.
        zeros = jnp.zeros(blocks, k.dtype)
        (dk, dv), dq = lax.scan(query_block, (zeros, zeros), jnp.arange(q.shape[0] // rows, dtype=jnp.int32))
        return dq.reshape(q.shape), dk.swapaxes(1, 2).reshape(k.shape), dv.swapaxes(1, 2).reshape(v.shape)

    return _over_heads(head, q, k, v, lse, delta, dout, start, lengths)


def _over_heads(head, *args):
    """Runs `head` for every batch row and kv head in turn: 2-D matmuls are the fast ones on CPU."""
    B, K = args[0].shape[:2]
    *arrays, start, lengths = args
    arrays = [x.reshape(B * K, *x.shape[2:]) for x in arrays]
    outs = lax.map(head, (*arrays, jnp.repeat(start, K), jnp.repeat(lengths, K)))
    return [x.reshape(B, K, *x.shape[1:]) for x in outs]
