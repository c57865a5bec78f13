"""What is added to the attention projections, in trees of their own beside the weights: low-rank adapters, for all
tokens, and projections of their own for some tokens.

y = x W + (alpha / R) dropout(x) A B      with A [D_in, R], B [R, D_out], B initialised to zero
y = x W + x W'                            at the marked tokens of each row
"""

from typing import Any, no_type_check

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Int

from comi_jax.backbone import Backbone
from comi_jax.config import Lora
from comi_jax.params import ParamSpec, Tree

TARGETS = ("q", "k", "v", "o")


@no_type_check
@struct.dataclass
class Marked:
    """Tokens of each row that have projections of their own, and whose keys and values are kept, in a stack of layers
    (or in one layer, inside a scan)."""

    weights: dict[str, Any]  # differences W' from the layers' own: {"q": [L, D, N, H], "q_bias": [L, N, H], ...}
    at: Int[Array, "L B M"]  # the tokens, as places in the row; one behind the row marks nothing
    moved: Int[Array, "L B M"]  # by how many positions their kept keys are moved on

    @classmethod
    def in_layers(cls, weights: Tree, at: Int[Array, "B M"], moved: Int[Array, "B M"]) -> "Marked":
        """The same tokens in all layers of ``weights``."""
        layers = next(iter(weights.values())).shape[0]
        return cls(dict(weights), *(jnp.broadcast_to(x, (layers, *x.shape)) for x in (at, moved)))


@no_type_check
@struct.dataclass
class Adapters:
    """The additions to the projections of a stack of layers (or of one layer, inside a scan) and how to apply them."""

    weights: dict[str, Any]  # {"q": {"a": [L, D_in, R], "b": [L, R, D_out]}, ...}
    keys: Array | None  # one dropout key per layer; None: no dropout
    scale: float = struct.field(pytree_node=False)
    dropout: float = struct.field(pytree_node=False, default=0.0)
    marked: Marked | None = None


def specs(backbone: Backbone, lora: Lora) -> dict[str, Any]:
    """The spec tree of the adapters on all layers of ``backbone``."""
    d, h = backbone.hidden_size, backbone.head_dim
    q, kv = backbone.num_attention_heads * h, backbone.num_key_value_heads * h
    sizes = {"q": (d, q), "k": (d, kv), "v": (d, kv), "o": (q, d)}
    axes = {"q": ("embed", "heads"), "k": ("embed", "kv_heads"), "v": ("embed", "kv_heads"), "o": ("heads", "embed")}
    layers, rank = backbone.num_hidden_layers, lora.rank
    return {
        name: {
            "a": ParamSpec((layers, sizes[name][0], rank), ("layers", axes[name][0], None), "normal", sizes[name][0]),
            "b": ParamSpec((layers, rank, sizes[name][1]), ("layers", None, axes[name][1]), 0.0),
        }
        for name in lora.targets
    }


def adapters(weights: Tree, lora: Lora, dropout_key: Array | None = None) -> Adapters:
    """``weights`` in the form that ``backbone.forward`` takes; with a key, dropout acts on their inputs."""
    layers = next(iter(weights.values()))["a"].shape[0]
    keys = None if dropout_key is None or lora.dropout == 0 else jax.random.split(dropout_key, layers)
    return Adapters(dict(weights), keys, lora.scale, lora.dropout)


def add(
    adapters: Adapters | None, name: str, x: Float[Array, "B T D"], out: Float[Array, "B T *out"]
) -> Float[Array, "B T *out"]:
    """``out``, the projection ``name`` of one layer's input ``x``, with what ``adapters`` add to it."""
    if adapters is not None and name in adapters.weights:
        out = out + apply(adapters, name, x).reshape(out.shape)
    if adapters is not None and adapters.marked is not None and name in adapters.marked.weights:
        out = add_marked(adapters.marked, name, x, out)
    return out


def apply(adapters: Adapters, name: str, x: Float[Array, "B T D"]) -> Float[Array, "B T out"]:
    """The low-rank term of the adapted projection ``name`` for one layer's input ``x``."""
    a, b = (adapters.weights[name][part].astype(x.dtype) for part in ("a", "b"))
    if adapters.keys is not None:
        key = jax.random.fold_in(adapters.keys, TARGETS.index(name))
        kept = jax.random.bernoulli(key, 1.0 - adapters.dropout, x.shape)
        x = jnp.where(kept, x / (1.0 - adapters.dropout), 0.0)
    return jnp.einsum("btr,re->bte", jnp.einsum("btd,dr->btr", x, a), b) * adapters.scale


def add_marked(
    marked: Marked, name: str, x: Float[Array, "B T D"], out: Float[Array, "B T N H"]
) -> Float[Array, "B T N H"]:
    """``out``, the projection ``name`` of ``x``, with the marked tokens' own difference."""
    own = jnp.einsum("bmd,dnh->bmnh", take(marked, x), marked.weights[name].astype(x.dtype))
    if f"{name}_bias" in marked.weights:
        own = own + marked.weights[f"{name}_bias"].astype(x.dtype)[None, None]
    return out.at[jnp.arange(x.shape[0])[:, None], marked.at].add(own, mode="drop")


def take(marked: Marked, x: Float[Array, "B T *rest"]) -> Float[Array, "B M *rest"]:
    """``x`` of the marked tokens; where nothing is marked, of the last one of the row."""
    index = jnp.minimum(marked.at, x.shape[1] - 1)
    return jnp.take_along_axis(x, index.reshape(*index.shape, *(1,) * (x.ndim - 2)), axis=1)


def merge(layers: Tree, weights: Tree, lora: Lora) -> dict[str, Any]:
    """The stacked ``layers`` with each adapted projection W replaced by W + scale · A B, computed in float32."""
    merged = dict(layers)
    for name, pair in weights.items():
        a, b = (pair[part].astype(jnp.float32) for part in ("a", "b"))
        delta = lora.scale * jnp.einsum("lir,lro->lio", a, b, precision=jax.lax.Precision.HIGHEST)
        merged[name] = (layers[name].astype(jnp.float32) + delta.reshape(layers[name].shape)).astype(layers[name].dtype)
    return merged
