"""Hugging Face folders of LLaMA and Qwen models: one table maps their tensors to our parameters.

Hugging Face stores a projection per layer, as [out, in]. We store it as it is applied, [in, heads, head], [heads, head,
out] or [in, out], with all layers stacked. Only ``TABLE`` has the names; reading and writing both use it.
"""

import json
from collections.abc import Callable, Container, Iterable, Mapping
from pathlib import Path
from typing import Any

from comi_jax.backbone import Backbone
from comi_jax.model.backbone import specs as lm_specs
from comi_jax.params import Placement, Tree, as_stored, flatten, unflatten
from comi_jax.weights import files, hf_config, hf_folder, loading, writing
from comi_jax.weights.files import Tensors
from comi_jax.weights.layout import Layout, Source, Sources, WeightsError, some
from comi_jax.weights.writing import SHARD_BYTES

_AS_IS, _FLAT, _FROM_1, _FROM_2 = Layout(), Layout(flat=True), Layout(inputs=1), Layout(inputs=2)
_LAYER = "model.layers.{layer}."
FREQUENCIES = ".rotary_emb.inv_freq"  # rotary frequencies: old files store them, but they are always computed
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
    """The tensors that make up each parameter in ``specs``, which describe a causal LM or a part of it. ``rename`` maps
    Hugging Face's name of a tensor to the name in the file."""
    found = {}
    for path, spec in flatten(specs).items():
        name, layout = TABLE[path]
        stacked = "{layer}" in name
        names = [name.format(layer=layer) for layer in range(spec.shape[0])] if stacked else [name]
        found[path] = Source(tuple(map(rename, names)), spec.shape, layout, stacked)
    return found


def open_model(folder: str | Path, backbone: Backbone) -> tuple[Tensors, Callable[[str], str]]:
    """The tensors of the causal LM in ``folder``, checked, and a function from Hugging Face's names to the file's.

    They are the tensors that transformers loads. Raises WeightsError listing every tensor that is missing, misshapen or
    of an unsupported dtype; also for an adapter beside the model, and for a head that differs from the embeddings it is
    tied to. Logs the ``notes`` as warnings.
    """
    if adapted := hf_config.adapter(Path(folder)):
        raise WeightsError(adapted)
    held, tied = Tensors(folder), backbone.tie_word_embeddings
    rename = naming(held.shapes, tied)
    whole = sources(lm_specs(backbone, backbone.num_hidden_layers, embed=True, head=True), rename)
    head, embeddings = rename(TABLE["head"][0]), rename(TABLE["embed"][0])
    repeated = {head: (backbone.vocab_size, backbone.hidden_size)} if tied else {}
    unread = files.check(whole, repeated, held, strict=False)
    if tied:
        check_tied(held, head, embeddings)
    for note in notes(held, whole, unread):
        hf_folder.tell(note)
    return held, rename


def naming(shapes: Container[str], tied: bool) -> Callable[[str], str]:
    """A function from Hugging Face's tensor names to those of the file with ``shapes``. The file has no "model." prefix
    if the model was saved without its head, and may have only one of two tied tables, under either name."""
    embeddings, head = TABLE["embed"][0], TABLE["head"][0]
    base = embeddings.removeprefix("model.") in shapes
    alone = tied and not base and embeddings not in shapes and head in shapes
    return lambda name: name.removeprefix("model.") if base else head if alone and name == embeddings else name


def check_tied(held: Tensors, head: str, embeddings: str) -> None:
    """Raise WeightsError if a stored head differs from the embeddings that it is tied to."""
    if head == embeddings or not {head, embeddings} <= set(held.shapes):
        return
    if not files.same(held, head, embeddings):
        raise WeightsError(
            f"{held.path}: {head} differs from {embeddings}, though config.json has tie_word_embeddings=true: "
            "transformers 5 computes with that head, transformers 4 with the embeddings in its place; set "
            "tie_word_embeddings to false to keep the head, or take it out of the file"
        )


def notes(held: Tensors, whole: Sources, unread: Iterable[str]) -> list[str]:
    """What a user should know about the weights: files and tensors that are not read, layers that differ in dtype."""
    said, unread = [], [name for name in unread if not name.endswith(FREQUENCIES)]
    if others := hf_folder.beside(held.path.parent)[0]:
        said.append(f"{held.path} is read, as transformers does; not read: {', '.join(others)} beside it")
    if unread:
        said.append(f"{held.path}: {len(unread)} tensor(s) that this model does not have are not read: {some(unread)}")
    kinds = {source.names[0]: {held.dtypes.get(name) for name in source.names} for source in whole.values()}
    if mixed := [name for name, found in kinds.items() if len(found - {None}) > 1]:
        said.append(f"{held.path}: layers differ in dtype and are read in float32: {some(mixed)}")
    return said


def load_parts(
    folder: str | Path,
    backbone: Backbone,
    parts: Mapping[str, Tree],
    place: Placement = as_stored,
) -> dict[str, Any]:
    """Parameters for the spec trees in ``parts``, by flat path ("encoder/norm"), each from the causal LM in ``folder``.

    A part with fewer layers than the LM gets the LM's first layers. Raises as ``open_model``, and WeightsError listing
    every tensor that is not finite.
    """
    held, rename = open_model(folder, backbone)
    wanted = {f"{part}/{path}": s for part, specs in parts.items() for path, s in sources(specs, rename).items()}
    return loading.load(held, wanted, place)


def load_backbone(folder: str | Path, backbone: Backbone) -> Tree:
    """The weights of the causal LM in ``folder``, in the dtypes of its files; raises as ``load_parts``.

    It stays for the tests, which use it to compare imported backbones with transformers.
    """
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
    """Write ``arrays`` (of ``specs``) as safetensors and ``config`` as config.json to ``folder``, which must exist.

    If ``dtype`` is None, each array keeps its own. ``base``: name the tensors as in a model without a head. Returns the
    bytes of the weights.
    """
    named = sources(specs, (lambda name: name.removeprefix("model.")) if base else (lambda name: name))
    (Path(folder) / "config.json").write_text(json.dumps(dict(config), indent=2) + "\n", encoding="utf-8")
    return writing.save(folder, writing.writables(named, flatten(arrays), dtype), shard_bytes)
