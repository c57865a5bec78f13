"""The causal transformer of LLaMA-2, LLaMA-3, Qwen2 and Qwen3: one block, scanned over layers, shared by encoder, LSA
and decoder.

    y = x + W_O attention(rope(W_Q n₁(x)), rope(W_K n₁(x)), W_V n₁(x))         n₁, n₂ RMS norms
    block(x) = y + W_down (silu(W_gate n₂(y)) * W_up n₂(y))

Projections are stored with their input axes first; the parameters of all layers are stacked along a leading axis L.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int

from comi_jax.backbone import Backbone
from comi_jax.devices import sharding
from comi_jax.devices.sharding import platform
from comi_jax.model import lora as lora_module
from comi_jax.model.attention import TAKE_START, attention, attention_after
from comi_jax.model.cache import ContextKV, KVCache, write
from comi_jax.model.remat import remat_policy
from comi_jax.model.rope import rotate, rotation
from comi_jax.params import ParamSpec, Tree

CPU_SLICE = 512  # tokens that the feed-forward layer processes at a time on CPU


@struct.dataclass
class Runtime:
    """How a block is run, as opposed to what it computes."""

    attention: str | None = struct.field(pytree_node=False, default=None)  # implementation, for calls without ``start``
    kernels: str | None = struct.field(pytree_node=False, default=None)  # of the compression: see kernels.dispatch
    remat: str = struct.field(pytree_node=False, default="off")  # one of REMAT
    mesh: Mesh | None = struct.field(pytree_node=False, default=None)  # None: one device, or XLA's own partitioning

    @property
    def context_shards(self) -> int:
        """The number of devices that the tokens of a row are split over."""
        return 1 if self.mesh is None else self.mesh.shape["context"]


def specs(backbone: Backbone, layers: int, *, embed: bool, head: bool) -> dict[str, Any]:
    """The spec tree of ``layers`` blocks and the final norm, optionally with embedding table and output head."""
    d, n, k, h = backbone.hidden_size, backbone.num_attention_heads, backbone.num_key_value_heads, backbone.head_dim
    f, v = backbone.intermediate_size, backbone.vocab_size

    def weight(shape: tuple[int, ...], axes: tuple[str, ...], fan_in: int) -> ParamSpec:
        return ParamSpec((layers, *shape), ("layers", *axes), "normal", fan_in)

    def vector(shape: tuple[int, ...], axes: tuple[str, ...], fill: float) -> ParamSpec:
        return ParamSpec((layers, *shape), ("layers", *axes), fill)

    block = {
        "attention_norm": vector((d,), ("norm",), 1.0),
        "q": weight((d, n, h), ("embed", "heads", "head"), d),
        "k": weight((d, k, h), ("embed", "kv_heads", "head"), d),
        "v": weight((d, k, h), ("embed", "kv_heads", "head"), d),
        "o": weight((n, h, d), ("heads", "head", "embed"), n * h),
        "mlp_norm": vector((d,), ("norm",), 1.0),
        "gate": weight((d, f), ("embed", "mlp"), d),
        "up": weight((d, f), ("embed", "mlp"), d),
        "down": weight((f, d), ("mlp", "embed"), f),
    }
    if backbone.qkv_bias:
        block["q_bias"] = vector((n, h), ("heads", "head"), 0.0)
        block["k_bias"] = vector((k, h), ("kv_heads", "head"), 0.0)
        block["v_bias"] = vector((k, h), ("kv_heads", "head"), 0.0)
    if backbone.qk_norm:
        block["q_norm"] = vector((h,), ("head",), 1.0)
        block["k_norm"] = vector((h,), ("head",), 1.0)
    tree: dict[str, Any] = {"layers": block, "norm": ParamSpec((d,), ("norm",), 1.0)}
    if embed:
        tree["embed"] = ParamSpec((v, d), ("vocab", "embed"), "normal", d)
    if head and not backbone.tie_word_embeddings:
        tree["head"] = ParamSpec((d, v), ("embed", "vocab"), "normal", d)
    return tree


def rms_norm(x: Float[Array, "... D"], scale: Float[Array, " D"], eps: float) -> Float[Array, "... D"]:
    """x / sqrt(mean(x²) + eps) * scale, the mean in float32 at least."""
    wide = x.astype(np.promote_types(x.dtype, jnp.float32))
    normed = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + eps)
    return normed.astype(x.dtype) * jnp.expand_dims(scale, range(x.ndim - 1))


def embed_tokens(
    params: Tree, ids: Int[Array, "*shape"], dtype: Any, runtime: Runtime = Runtime()
) -> Float[Array, "*shape D"]:
    """Rows of the embedding table, in ``dtype``."""
    table, mesh = params["embed"], runtime.mesh
    if mesh is None or ids.ndim != 2 or sharding.row_axes(ids.shape[0], mesh) is None:
        return table[ids].astype(dtype)
    width = sharding.partition_spec(ParamSpec(table.shape, ("vocab", "embed"), 0.0), mesh)[1]
    if not width:
        return table[ids].astype(dtype)
    # Looked up on the devices that hold the table's columns, then resharded to whole vectors one axis at a time. In one
    # step, XLA would replicate the whole array on every device, and its gradient too.
    ids = _constrain(ids, NamedSharding(mesh, PartitionSpec("data")))
    x = table[ids].astype(dtype)
    rows = sharding.row_axes(x.shape[0], mesh)
    for stage in (("data", None, width), (rows, None, "context")):
        x = _constrain(x, NamedSharding(mesh, PartitionSpec(*stage)))
    return _constrain(x, token_sharding(x, runtime))


def next_logits(params: Tree, states: Float[Array, "B D"], runtime: Runtime) -> Float[Array, "B V"]:
    """``logits`` while answers are decoded, see ``decoded_rows``."""
    return _constrain(logits(params, states), decoded_rows(runtime, states.shape[0]))


def logits(params: Tree, states: Float[Array, "*shape D"]) -> Float[Array, "*shape V"]:
    """Logits of the next token, in float32 at least. Call it only on the few positions that need them."""
    dtype = np.promote_types(states.dtype, jnp.float32)
    with jax.named_scope("logits"):
        if "head" in params:
            head = params["head"].astype(states.dtype)
            return jnp.einsum("...d,dv->...v", states, head, preferred_element_type=dtype)
        table = params["embed"].astype(states.dtype)
        return jnp.einsum("...d,vd->...v", states, table, preferred_element_type=dtype)


def forward(
    params: Tree,
    x: Float[Array, "B T D"],
    backbone: Backbone,
    *,
    cache: KVCache | None = None,
    start: Int[Array, " B"] | None = None,
    context: ContextKV | None = None,
    lora: lora_module.Adapters | None = None,
    runtime: Runtime = Runtime(),
) -> tuple[Float[Array, "B T D"], KVCache | None]:
    """All blocks of ``params`` and the final norm over the embedded tokens ``x``.

    Rows are right-padded: causality hides padding from real tokens, and results at padded positions are undefined. With
    a ``cache``, keys and values are written into it; with ``start`` too, row b's tokens are at positions start[b],
    start[b] + 1, ... and attend to everything before them in the cache. With a ``context`` instead, rows continue its
    contexts, whose keys and values are shared. Returns the states and the updated cache. If ``lora`` marks tokens, no
    cache is given, and that of these tokens alone is returned, with their keys moved on.
    """
    batch, length, _ = x.shape
    first = jnp.zeros((batch,), jnp.int32) if start is None else start
    if context is not None:
        first = jnp.repeat(context.length, batch // context.length.shape[0])
    rope = rotation(backbone, first[:, None] + jnp.arange(length, dtype=jnp.int32)[None, :])

    weight_shardings = {} if runtime.mesh is None else layer_shardings(backbone, runtime.mesh)
    activations = token_sharding(x, runtime) if cache is None and context is None else None
    if start is not None and length == 1:
        activations = decoded_rows(runtime, batch)

    marks = lora is not None and lora.marked is not None

    def body(carry, layer):
        x, cache = carry
        x = checkpoint_name(_constrain(x, activations), "input")
        index, weights, adapters, shared = layer
        # Cast on their shards, which halves the bytes of the all-gather; gradients are reduce-scattered to the shards.
        weights = {name: w.astype(x.dtype) for name, w in weights.items()}
        weights = {name: _constrain(w, weight_shardings.get(name)) for name, w in weights.items()}
        x, made = block(
            weights, x, rope, backbone, index=index, cache=cache, start=start, context=shared, lora=adapters,
            runtime=runtime,
        )  # fmt: skip
        return (_constrain(x, activations), None if marks else made), made if marks else None

    if runtime.remat != "off":
        body = jax.checkpoint(body, prevent_cse=False, policy=remat_policy(runtime.remat))
    layers = params["layers"]["q"].shape[0]
    shared = None
    if context is not None:
        shared = (context.k, context.v, jnp.broadcast_to(context.length, (layers, *context.length.shape)))
    (x, cache), kept = jax.lax.scan(body, (x, cache), (jnp.arange(layers), params["layers"], lora, shared))
    x = _constrain(x, activations)
    return rms_norm(x, params["norm"].astype(x.dtype), backbone.rms_norm_eps), kept if marks else cache


def layer_shardings(backbone: Backbone, mesh: Mesh) -> dict[str, NamedSharding]:
    """The shardings of one block's weights on ``mesh``."""
    weights = specs(backbone, 1, embed=False, head=False)["layers"]
    axes = {name: sharding.partition_spec(spec, mesh)[1:] for name, spec in weights.items()}
    return {name: NamedSharding(mesh, PartitionSpec(*kept)) for name, kept in axes.items()}


def token_sharding(x: Float[Array, "B T D"], runtime: Runtime) -> NamedSharding | None:
    """The sharding of activations whose tokens are split over devices; None if they are not split or do not divide."""
    if runtime.mesh is None or runtime.context_shards == 1 or x.shape[1] % runtime.context_shards:
        return None
    return NamedSharding(runtime.mesh, PartitionSpec(sharding.row_axes(x.shape[0], runtime.mesh), "context"))


def decoded_rows(runtime: Runtime, rows: int, heads: int = 1) -> NamedSharding | None:
    """The sharding of a token of each of ``rows`` while answers are decoded: as the weights are whole along the axis
    data, rows are split over it if they divide; every device of the other axes has all of these rows and, of arrays
    with so many kv ``heads``, its own ones.

    Each device then multiplies them with its own shard of the weights, and a few vectors are summed. Left to XLA, rows
    would be split over fsdp too, as they are in attention, and each device would gather all weights for every token.
    """
    if runtime.mesh is None:
        return None
    data = "data" if rows % runtime.mesh.shape["data"] == 0 else None
    split = "tensor" if heads > 1 and heads % runtime.mesh.shape["tensor"] == 0 else None
    return NamedSharding(runtime.mesh, PartitionSpec(data, None, split) if split else PartitionSpec(data))


def split_columns(x: Float[Array, "B T D"], runtime: Runtime) -> Float[Array, "B T D"]:
    """``x`` for a gather along its tokens: where rows are split over devices, each has some columns of every token.

    Stated here, the exchange is one all-to-all. Left to XLA, which derives the same sharding from the columns of the
    query's embeddings that the memory is joined with, every device would hold the whole array.
    """
    if runtime.mesh is None or runtime.context_shards == 1 or x.shape[2] % runtime.context_shards:
        return x
    rows = sharding.row_axes(x.shape[0], runtime.mesh)
    return _constrain(x, NamedSharding(runtime.mesh, PartitionSpec(rows, None, "context")))


def _constrain(x: Array, placed: NamedSharding | None) -> Array:
    return x if placed is None else jax.lax.with_sharding_constraint(x, placed)


def block(
    weights: Tree,
    x: Float[Array, "B T D"],
    rope: tuple[Float[Array, "B T 1 half"], ...],
    backbone: Backbone,
    *,
    index: Int[Array, ""],
    cache: KVCache | None,
    start: Int[Array, " B"] | None,
    lora: lora_module.Adapters | None,
    runtime: Runtime,
    context: tuple[Float[Array, "C S K H"], Float[Array, "C S K H"], Int[Array, " C"]] | None = None,
) -> tuple[Float[Array, "B T D"], KVCache | None]:
    """One transformer block; ``index`` is its layer index in the cache; ``context`` has this layer's keys and values of
    the contexts that the rows continue, and their lengths. Returns the states and the updated cache, or this layer's
    keys and values of the tokens that ``lora`` marks."""
    w = {name: value.astype(x.dtype) for name, value in weights.items()}
    with jax.named_scope("attention_block"):
        decoding, heads = start is not None and x.shape[1] == 1, backbone.num_key_value_heads
        by_heads = decoded_rows(runtime, x.shape[0], heads) if decoding else None
        q, k, v = (_constrain(out, by_heads) for out in attention_inputs(w, x, rope, backbone, lora))
        if lora is not None and lora.marked is not None:
            cache = keep(lora.marked, k, v, backbone)
        elif cache is not None:
            cache = write(cache, index, start, k, v)
            if start is not None:  # otherwise the cache holds only these k and v
                k, v = cache.k[index], cache.v[index]
        named = runtime.attention if start is None or runtime.attention in TAKE_START else None
        if context is None:
            out = attention(q, k, v, start=start, implementation=named, mesh=runtime.mesh)
            out = _constrain(out, by_heads)
        else:
            named = runtime.attention if runtime.attention in TAKE_START else None
            out = attention_after(q, k, v, *context, implementation=named, mesh=runtime.mesh)
        x = checkpoint_name(x + _project_out(w, lora, out), "products")
    with jax.named_scope("mlp"):
        slices = platform(runtime.mesh) == "cpu" and runtime.context_shards == 1
        x = x + mlp(w, rms_norm(x, w["mlp_norm"], backbone.rms_norm_eps), slices)
    return x, cache


def keep(
    marked: lora_module.Marked, k: Float[Array, "B T K H"], v: Float[Array, "B T K H"], backbone: Backbone
) -> KVCache:
    """Keys and values [B, M, K, H] of the marked tokens of one layer, the keys moved on to other positions."""
    moved = rotation(backbone, marked.moved)
    return KVCache(rotate(lora_module.take(marked, k), moved), lora_module.take(marked, v))


def attention_inputs(
    w: Tree,
    x: Float[Array, "B T D"],
    rope: tuple[Float[Array, "B T 1 half"], ...],
    backbone: Backbone,
    lora: lora_module.Adapters | None = None,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B T K H"], Float[Array, "B T K H"]]:
    """The rotated queries and keys, and the values, of a block with input ``x``."""
    n = rms_norm(x, w["attention_norm"], backbone.rms_norm_eps)
    q, k, v = (checkpoint_name(_project(w, lora, name, n), "projections") for name in ("q", "k", "v"))
    if backbone.qk_norm:
        q = rms_norm(q, w["q_norm"], backbone.rms_norm_eps)
        k = rms_norm(k, w["k_norm"], backbone.rms_norm_eps)
    return rotate(q, rope), rotate(k, rope), v


def mlp(w: Tree, x: Float[Array, "B T D"], slices: bool) -> Float[Array, "B T D"]:
    """The gated feed-forward layer. With ``slices`` (on CPU) long rows are processed in slices of tokens, whose F-wide
    intermediates fit the processor's caches and are rematerialised for the gradient."""

    def whole(x):
        gate, up = (checkpoint_name(jnp.einsum("btd,df->btf", x, w[name]), "products") for name in ("gate", "up"))
        return jnp.einsum("btf,fd->btd", jax.nn.silu(gate) * up, w["down"])

    batch, length, width = x.shape
    if not slices or length < 2 * CPU_SLICE:
        return whole(x)
    cut = jnp.pad(x, ((0, 0), (0, -length % CPU_SLICE), (0, 0))).reshape(batch, -1, CPU_SLICE, width)
    out = jax.lax.map(jax.checkpoint(whole), cut.swapaxes(0, 1))
    return out.swapaxes(0, 1).reshape(batch, -1, width)[:, :length]


def _project(
    w: Tree, lora: lora_module.Adapters | None, name: str, x: Float[Array, "B T D"]
) -> Float[Array, "B T N H"]:
    out = jnp.einsum("btd,dnh->btnh", x, w[name])
    if f"{name}_bias" in w:
        out = out + w[f"{name}_bias"][None, None]
    return lora_module.add(lora, name, x, out)


def _project_out(w: Tree, lora: lora_module.Adapters | None, x: Float[Array, "B T N H"]) -> Float[Array, "B T D"]:
    out = jnp.einsum("btnh,nhd->btd", x, w["o"])
    return lora_module.add(lora, "o", x.reshape(*x.shape[:2], -1), out)
