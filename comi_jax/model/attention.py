"""Scaled dot-product attention with grouped kv heads: one signature, several implementations.

    out[i] = sum_j softmax_j(q_i . k_j / sqrt(H)) v_j    over the keys j visible to query i

"dense" materialises all scores; "blocked" (any device), "cudnn" (GPU) and "splash" (TPU) hold one block at a time.
"""

import functools
import logging
import math
from functools import cache

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float, Int

from comi_jax.devices.sharding import platform, row_axes
from comi_jax.model.attention_blocked import blocked

MASKED = -1e30
SPLASH_BLOCKS = (512, 384, 256, 128)  # tokens, for queries and keys alike


def attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    *,
    start: Int[Array, " B"] | None = None,
    lengths: Int[Array, " B"] | None = None,
    causal: bool = True,
    implementation: str | None = None,
    mesh: Mesh | None = None,
) -> Float[Array, "B T N H"]:
    """Attention output (B T N H) in q's dtype; query head n reads kv head n // (N // K); softmax in float32 at least.

    Query i of row b is at position start[b] + i (`start` None is 0), key j at position j. Key j is visible iff
    (not causal or j <= start[b] + i) and (lengths is None or j < lengths[b]). A query without visible keys gives 0 with
    zero gradients. `implementation` is a key of IMPLEMENTATIONS, or None for choose(). Raises ValueError for an unknown
    name, for head counts that do not divide, and if a named implementation cannot compute the call.

    With a `mesh` of several devices, each computes its own rows (axes data and fsdp) and heads (axis tensor) inside
    shard_map, as XLA cannot partition the fused kernels; rows or heads that do not divide are replicated. If tokens are
    split too (axis context, without `start`), an all-to-all turns a slice of the tokens in all heads into all tokens in
    a slice of the heads, and back after the kernel: the work is balanced, and kernels see whole rows.
    """
    if q.shape[2] % k.shape[2]:
        raise ValueError(f"attention: {k.shape[2]} kv heads do not divide {q.shape[2]} query heads.")
    if implementation is not None and implementation not in IMPLEMENTATIONS:
        raise ValueError(f"attention: no implementation {implementation!r}; choose from {', '.join(IMPLEMENTATIONS)}.")
    run = functools.partial(_on_one_device, causal=causal, implementation=implementation, backend=platform(mesh))
    if mesh is not None and mesh.size > 1:
        run = _on_each_device(run, q, k, mesh, cached=start is not None)
    with jax.named_scope("attention"):
        return run(q, k, v, start, lengths)


def attention_after(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    context_k: Float[Array, "C S K H"],
    context_v: Float[Array, "C S K H"],
    context_length: Int[Array, " C"],
    *,
    implementation: str | None = None,
    mesh: Mesh | None = None,
) -> Float[Array, "B T N H"]:
    """Causal attention of rows that continue shared contexts, whose keys and values are there once, in q's dtype.

    Rows i·B/C to (i+1)·B/C - 1 continue context i: query t sees the first context_length[i] keys of the context and the
    keys 0 to t of its own row. The rows of a context are queries of one call over its keys; its result and that of the
    rows' own keys are weighted by their softmax normalizers, out = σ(l₁ - l₂) out₁ + σ(l₂ - l₁) out₂ with l the
    log-sum-exp of the scores. `implementation` is one of TAKE_START, or None for choose(); `mesh` as in `attention`.
    """
    run = functools.partial(_after, implementation=implementation, backend=platform(mesh))
    if mesh is not None and mesh.size > 1:
        rows = row_axes(context_k.shape[0], mesh)
        array = PartitionSpec(rows, None, None if k.shape[2] % mesh.shape["tensor"] else "tensor", None)
        specs = (*[array] * 5, PartitionSpec(rows))
        run = jax.shard_map(run, mesh=mesh, in_specs=specs, out_specs=array, check_vma=False)
    with jax.named_scope("attention"):
        return run(q, k, v, context_k, context_v, context_length)


def _after(q, k, v, context_k, context_v, context_length, *, implementation, backend):
    (B, T, N, H), C = q.shape, context_k.shape[0]

    def part(q, k, v, lengths, causal):
        name = implementation or choose(q, k, 0, causal, backend)  # as with a start: only those in PARTS
        return PARTS[name](q, k, v, None, lengths, causal)

    before, before_lse = part(q.reshape(C, -1, N, H), context_k, context_v, context_length, False)
    own, own_lse = part(q, k, v, None, True)
    share = jax.nn.sigmoid(before_lse.reshape(B, T, N) - own_lse)[..., None]
    return (share * before.reshape(q.shape) + (1 - share) * own).astype(q.dtype)


def _on_one_device(q, k, v, start, lengths, *, causal, implementation, backend):
    if implementation is None:
        implementation = choose(q, k, start, causal, backend)
        _log_choice(implementation, backend, str(q.dtype))
    return IMPLEMENTATIONS[implementation](q, k, v, start, lengths, causal)


def _on_each_device(function, q, k, mesh, cached):
    """``function`` under shard_map, over the rows and heads of each device of ``mesh``."""
    rows = row_axes(q.shape[0], mesh)
    heads = None if k.shape[2] % mesh.shape["tensor"] else "tensor"
    local_heads, shards = q.shape[2] // (mesh.shape["tensor"] if heads else 1), mesh.shape["context"]
    tokens = None
    if shards > 1 and not cached and not (local_heads % shards or q.shape[1] % shards or k.shape[1] % shards):
        tokens, function = "context", functools.partial(_exchanged, function, shards)
    array, vector = PartitionSpec(rows, tokens, heads, None), PartitionSpec(rows)
    return jax.shard_map(
        function, mesh=mesh, in_specs=(array, array, array, vector, vector), out_specs=array, check_vma=False
    )


def _exchanged(function, shards, q, k, v, start, lengths):
    """``function`` over whole rows and a slice of the heads, by all-to-all from a slice of the tokens and all heads.
    kv heads that do not divide are repeated."""
    repeat = shards // math.gcd(k.shape[2], shards)
    k, v = (jnp.repeat(x, repeat, axis=2) for x in (k, v))
    q, k, v = (lax.all_to_all(x, "context", split_axis=2, concat_axis=1, tiled=True) for x in (q, k, v))
    return lax.all_to_all(function(q, k, v, start, lengths), "context", split_axis=1, concat_axis=2, tiled=True)


def choose(q, k, start, causal, backend) -> str:
    """The default implementation: the backend's fused kernel if it supports the call, else dense or blocked.

    Dense if its scores are so small that a loop over blocks does not pay: up to 8 queries or 4 MiB of scores on CPU, up
    to 1 GiB of scores on an accelerator. The fused kernels do not support a `start`, nor every dtype and shape.
    """
    (B, T, N, H), S = q.shape, k.shape[1]
    if start is None:
        if backend == "gpu" and q.dtype in (jnp.bfloat16, jnp.float16) and H % 8 == 0 and H <= 128:
            if T == S or not causal:
                return "cudnn"
        if backend == "tpu" and q.dtype == jnp.bfloat16:
            return "splash"
    few = B * N * T * S <= (2**20 if backend == "cpu" else 2**28) or (backend == "cpu" and T <= 8)
    return "dense" if few else "blocked"


@cache
def _log_choice(name, backend, dtype):
    logging.getLogger(__name__).info("attention: %s for %s on %s", name, dtype, backend)


def _dense(q, k, v, start, lengths, causal):
    """The readable reference, with all T x S scores at once."""
    return _dense_parts(q, k, v, start, lengths, causal)[0].astype(q.dtype)


def _dense_parts(q, k, v, start, lengths, causal):
    """The output (B T N H) and the log-sum-exp of the scores (B T N), in float32 at least."""
    B, T, N, H = q.shape
    S, K = k.shape[1:3]
    dtype = jnp.float64 if q.dtype == jnp.float64 else jnp.float32
    precision = lax.Precision.HIGHEST if q.dtype == dtype else lax.Precision.DEFAULT
    scores = jnp.einsum(
        "btkgh,bskh->bkgts", q.reshape(B, T, K, -1, H), k, precision=precision, preferred_element_type=dtype
    )
    seen = _visible(T, S, start, lengths, causal)[:, None, None]
    scores = jnp.where(seen, scores * jnp.asarray(H**-0.5, dtype), MASKED)
    probs = jnp.where(seen, jax.nn.softmax(scores, axis=-1), 0).astype(v.dtype)  # uniform over a fully masked row
    out = jnp.einsum("bkgts,bskh->btkgh", probs, v, precision=precision, preferred_element_type=dtype)
    lse = jnp.einsum("bkgt->btkg", jax.nn.logsumexp(scores, axis=-1))
    return out.reshape(q.shape), lse.reshape(B, T, N)


def _visible(T, S, start, lengths, causal):
    """(B or 1, T, S): whether query i of row b sees key j."""
    query, key = jnp.arange(T, dtype=jnp.int32)[None, :, None], jnp.arange(S, dtype=jnp.int32)[None, None]
    seen = jnp.ones((1, T, S), bool)
    if causal:
        seen &= key <= (query if start is None else start.astype(jnp.int32)[:, None, None] + query)
    if lengths is not None:
        seen &= key < lengths.astype(jnp.int32)[:, None, None]
    return seen


def _blocked(q, k, v, start, lengths, causal):
    """Plain JAX, a block of scores at a time: see attention_blocked."""
    return _blocked_parts(q, k, v, start, lengths, causal)[0].astype(q.dtype)


def _blocked_parts(q, k, v, start, lengths, causal):
    """The output (B T N H) and the log-sum-exp of the scores (B T N), in float32 at least."""
    B, S = k.shape[:2]
    start = jnp.zeros(B, jnp.int32) if start is None else start
    lengths = jnp.full(B, S, jnp.int32) if lengths is None else lengths
    return blocked(q, k, v, start, lengths, causal)


def _cudnn(q, k, v, start, lengths, causal):
    """cuDNN's fused attention, through jax.nn. Odd lengths are padded, as its backward pass does not support them."""
    if start is not None:
        raise ValueError("attention: cudnn takes no start; name dense or blocked for a cached call.")
    if q.dtype not in (jnp.bfloat16, jnp.float16):
        raise ValueError(f"attention: cudnn computes in bfloat16 or float16, not {q.dtype}; name blocked or dense.")
    T, S = q.shape[1], k.shape[1]
    if causal and T != S:
        raise ValueError(f"attention: causal cudnn needs as many keys ({S}) as queries ({T}).")
    q, k, v = (_pad(x, 2) for x in (q, k, v))
    ends = _ends(lengths, k, T, S, causal)
    try:
        out = jax.nn.dot_product_attention(
            q, k, v, is_causal=causal, key_value_seq_lengths=ends, implementation="cudnn"
        )
    except (NotImplementedError, RuntimeError) as refusal:
        raise ValueError(f"attention: cudnn cannot run here: {refusal}") from refusal
    return _drop_empty(out[:, :T], lengths)


def _splash(q, k, v, start, lengths, causal, interpret=False):
    """JAX's splash attention for TPU. It leaves the scaling to its caller and takes lengths in multiples of 128."""
    from jax.experimental.pallas.ops.tpu import splash_attention as splash  # slow to import, and only used on TPU

    if start is not None:
        raise ValueError("attention: splash takes no start; name dense or blocked for a cached call.")
    if q.dtype != jnp.bfloat16:
        raise ValueError(f"attention: splash multiplies in bfloat16, not {q.dtype}; name blocked or dense.")
    T, S = q.shape[1], k.shape[1]
    q = (q.astype(jnp.float32) * q.shape[3] ** -0.5).astype(q.dtype)  # in float32, so that only the product is rounded
    q, k, v = (_pad(x, 128) for x in (q, k, v))
    segments = None
    if (ends := _ends(lengths, k, T, S, causal)) is not None:
        hidden = jnp.arange(k.shape[1], dtype=jnp.int32)[None] >= ends[:, None]
        segments = splash.SegmentIds(q=jnp.zeros(q.shape[:2], jnp.int32), kv=hidden.astype(jnp.int32))
    shape = q.shape[1], k.shape[1]
    block_q, block_kv = (next(size for size in SPLASH_BLOCKS if n % size == 0) for n in shape)
    kernel = splash.make_splash_mha_single_device(
        splash.MultiHeadMask([splash.CausalMask(shape) if causal else splash.FullMask(shape)] * q.shape[2]),
        block_sizes=splash.BlockSizes(
            block_q=block_q, block_kv=block_kv, block_kv_compute=block_kv,
            block_q_dkv=block_q, block_kv_dkv=block_kv, block_kv_dkv_compute=block_kv,
            block_q_dq=block_q, block_kv_dq=block_kv,
        ),
        residual_checkpoint_name="attention",
        interpret=interpret,
    )  # fmt: skip
    out = jax.vmap(kernel)(*(x.swapaxes(1, 2) for x in (q, k, v)), segments)
    out = out.swapaxes(1, 2)  # pyright: ignore[reportAttributeAccessIssue] (an array, with save_residuals off)
    return _drop_empty(out[:, :T], lengths)


def _pad(x, multiple):
    return jnp.pad(x, ((0, 0), (0, -x.shape[1] % multiple), (0, 0), (0, 0)))


def _ends(lengths, padded_k, T, S, causal):
    """How many keys each row has, one at least, for a kernel to obey; None where causality hides the padding."""
    if lengths is not None:
        return jnp.maximum(lengths, 1).astype(jnp.int32)
    return None if padded_k.shape[1] == S or (causal and T <= S) else jnp.full(padded_k.shape[0], S, jnp.int32)


def _drop_empty(out, lengths):
    """0, with zero gradients, for the rows of length 0, to which _ends gave one key."""
    return out if lengths is None else jnp.where((lengths > 0)[:, None, None, None], out, 0)


PARTS = {"dense": _dense_parts, "blocked": _blocked_parts}
TAKE_START = tuple(PARTS)
IMPLEMENTATIONS = {"dense": _dense, "blocked": _blocked, "cudnn": _cudnn, "splash": _splash}
