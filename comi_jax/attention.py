"""Scaled dot-product attention with grouped kv heads, one signature for several implementations.

    out[i] = sum_j softmax_j(q_i . k_j / sqrt(H)) v_j    over the visible keys j
"""

import logging
from functools import cache

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from comi_jax.attention_blocked import blocked

DENSE_LIMIT = 256 * 256  # scores per batch row and head up to which "dense" is chosen: bounded memory, no block loop


def attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    *,
    start: Int[Array, " B"] | None = None,
    lengths: Int[Array, " B"] | None = None,
    causal: bool = True,
    implementation: str | None = None,
) -> Float[Array, "B T N H"]:
    """Attention output (B T N H), in q's dtype, softmax in float32 at least; query head n reads kv head n // (N // K).

    Query i of row b stands at position start[b] + i (`start` None is 0), key j at position j. Key j is visible iff
    (not causal or j <= start[b] + i) and (lengths is None or j < lengths[b]). A query without any visible key gives 0,
    and 0 gradients. `implementation` is a key of IMPLEMENTATIONS, or None to choose by shapes and backend (see
    choose()). Raises ValueError for an unknown name, and where a named implementation cannot do what is asked.
    """
    if q.shape[2] % k.shape[2]:
        raise ValueError(f"attention: {q.shape[2]} query heads cannot share {k.shape[2]} kv heads evenly.")
    if implementation is None:
        implementation = choose(q, k, start)
    elif implementation not in IMPLEMENTATIONS:
        raise ValueError(f"attention: no implementation {implementation!r}; valid: {', '.join(IMPLEMENTATIONS)}.")
    with jax.named_scope("attention"):
        return IMPLEMENTATIONS[implementation](q, k, v, start, lengths, causal)


def choose(q, k, start) -> str:
    """The implementation that None stands for, logged once for every distinct choice."""
    backend = jax.default_backend()
    if q.shape[1] * k.shape[1] <= DENSE_LIMIT:
        name = "dense"
    else:
        name = "blocked"
    _log_choice(name, backend)
    return name


@cache
def _log_choice(name, backend):
    logging.getLogger(__name__).info("attention: %s on %s", name, backend)


def _dense(q, k, v, start, lengths, causal):
    """The readable reference: all T x S scores at once."""
    B, T, N, H = q.shape
    S, K = k.shape[1:3]
    dtype = jnp.promote_types(jnp.float32, q.dtype)
    grouped = q.reshape(B, T, K, N // K, H)
    scores = jnp.einsum("btkrh,bskh->bkrts", grouped, k, preferred_element_type=dtype) * jnp.asarray(H**-0.5, dtype)
    key = jnp.arange(S)[None, None, :]
    seen = jnp.ones((1, T, S), bool)
    if causal:
        first = jnp.zeros(1, int) if start is None else start
        seen = key <= (first[:, None] + jnp.arange(T)[None, :])[:, :, None]
    if lengths is not None:
        seen = seen & (key < lengths[:, None, None])
    seen = seen[:, None, None]
    probs = jax.nn.softmax(scores, axis=-1, where=seen)
    probs = jnp.where(seen.any(-1, keepdims=True), probs, 0)
    out = jnp.einsum("bkrts,bskh->btkrh", probs.astype(v.dtype), v, preferred_element_type=dtype)
    return out.reshape(q.shape).astype(q.dtype)


def _blocked(q, k, v, start, lengths, causal):
    B, S = k.shape[:2]
    start = jnp.zeros(B, jnp.int32) if start is None else start.astype(jnp.int32)
    lengths = jnp.full(B, S, jnp.int32) if lengths is None else lengths.astype(jnp.int32)
    return blocked(q, k, v, start, lengths, causal).astype(q.dtype)


IMPLEMENTATIONS = {"dense": _dense, "blocked": _blocked}
