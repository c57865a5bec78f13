"""Hugging Face folders of LLaMA and Qwen: one table between their tensors and our tree.

A projection is stored by Hugging Face as [out, in] and per layer; by us as it is applied, [in, heads, head] or [in,
out], with all layers stacked. ``TABLE`` is the only place that knows the names; reading and writing both follow it.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from comi_jax.config import Backbone
from comi_jax.model.backbone import specs as lm_specs
from comi_jax.params import Placement, Tree, as_stored, flatten, unflatten
from comi_jax.weights import files, loading, writing
from comi_jax.weights.files import Tensors
from comi_jax.weights.layout import Layout, Source
from comi_jax.weights.writing import SHARD_BYTES

_AS_IS, _FLAT, _FROM_1, _FROM_2 = Layout(), Layout(flat=True), Layout(inputs=1), Layout(inputs=2)
_LAYER = "model.layers.{layer}."
TABLE: dict[str, tuple[str, Layout]] = {
    "embed": ("model.embed_tokens.weight", _AS_IS),
    "norm": ("model.norm.weight", _AS_IS),
    "head": ("lm_head.weight", _FROM_1),
    "layers/attention_norm": (_LAYER + "input_layernorm.weight", _AS_IS),
    "layers/mlp_norm": (_LAYER + "post_attention_layernorm.weight", _AS_IS),
    "layers/q": (_LAYER + "self_attn.q_proj.weight", _FROM_1),
    "layers/k": (_LAYER + "self_attn.k_proj.weight", _FROM_1),
    "layers/v": (_LAYER + "self_attn.v_proj.weight", _FROM_1),
    "layers/o": (_LAYER + "self_attn.o_proj.weight", _FROM_2),
    "layers/q_bias": (_LAYER + "self_attn.q_proj.bias", _FLAT),
    "layers/k_bias": (_LAYER + "self_attn.k_proj.bias", _FLAT),
    "layers/v_bias": (_LAYER + "self_attn.v_proj.bias", _FLAT),
    "layers/q_norm": (_LAYER + "self_attn.q_norm.weight", _AS_IS),
    "layers/k_norm": (_LAYER + "self_attn.k_norm.weight", _AS_IS),
    "layers/gate": (_LAYER + "mlp.gate_proj.weight", _FROM_1),
    "layers/up": (_LAYER + "mlp.up_proj.weight", _FROM_1),
    "layers/down": (_LAYER + "mlp.down_proj.weight", _FROM_1),
}


def sources(specs: Tree, rename: Callable[[str], str] = lambda name: name) -> dict[str, Source]:
    """The tensors that make up each parameter of a causal LM's ``specs``, or of a part of one; ``rename`` turns Hugging
    Face's name of a tensor into the file's."""
    found = {}
    for path, spec in flatten(specs).items():
        name, layout = TABLE[path]
        stacked = "{layer}" in name
        names = [name.format(layer=layer) for layer in range(spec.shape[0])] if stacked else [name]
        found[path] = Source(tuple(map(rename, names)), spec.shape, layout, stacked)
    return found


def load_parts(
    folder: str | Path,
    backbone: Backbone,
    parts: Mapping[str, Tree],
    place: Placement = as_stored,
) -> dict[str, Any]:
    """Parameters for the spec trees in ``parts``, each from the causal LM in ``folder``, by flat path ("encoder/norm").

    A part with fewer layers than the LM has gets its first ones. Raises WeightsError listing every tensor of the folder
    that is missing, unexpected, misshapen or not finite. Rotary frequencies that old files store are left out, as is a
    repeated lm_head where embeddings are tied.
    """
    held = Tensors(folder)
    whole = sources(lm_specs(backbone, backbone.num_hidden_layers, embed=True, head=True))
    optional = {
        f"model.layers.{layer}.self_attn.rotary_emb.inv_freq": (backbone.head_dim // 2,)
        for layer in range(backbone.num_hidden_layers)
    }
    if backbone.tie_word_embeddings:
        optional[TABLE["head"][0]] = (backbone.vocab_size, backbone.hidden_size)
    files.check(whole, optional, held)
    wanted = {f"{part}/{path}": s for part, specs in parts.items() for path, s in sources(specs).items()}
    return loading.load(held, wanted, place)


def load_backbone(folder: str | Path, backbone: Backbone) -> Tree:
    """The weights of the causal LM in ``folder``, in the dtypes of its files; raises as ``load_parts`` does."""
    specs = lm_specs(backbone, backbone.num_hidden_layers, embed=True, head=True)
    return unflatten(load_parts(folder, backbone, {"lm": specs}))["lm"]


def save_backbone(
    folder: str | Path,
    specs: Tree,
    arrays: Tree,
    config: Mapping[str, Any],
    dtype: Any = None,
    *,
    base: bool = False,
    shard_bytes: int = SHARD_BYTES,
) -> int:
    """Write ``arrays`` (of ``specs``) as safetensors and ``config`` as config.json into ``folder``, which must exist.

    ``dtype`` None keeps each array's own; ``base`` names tensors as the model without a head does. Returns the bytes of
    the weights.
    """
    named = sources(specs, (lambda name: name.removeprefix("model.")) if base else (lambda name: name))
    (Path(folder) / "config.json").write_text(json.dumps(dict(config), indent=2) + "\n", encoding="utf-8")
    return writing.save(folder, writing.writables(named, flatten(arrays), dtype), shard_bytes)
