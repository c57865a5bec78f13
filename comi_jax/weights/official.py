"""The official release's flat state dict: reading into our tree, and writing.

    encoder.model.*                 the encoder            memory_fusion_layer.model.*   the LSA
    decoder.model.*, decoder.lm_head.weight                decoder.base_model.model.*    the decoder under PEFT's LoRA
    alpha_select beta_select alpha_merge beta_merge        the coarse and the fine scalars

The release also stores tensors that no computation uses: the vocabulary heads of encoder and LSA, the LSA's embedding
table and the semantic_alignment_layer (used only between models of different width). When reading, they are optional.
When writing, all are written, as they were read or ``filled``, because the release loads with strict=True.
"""

import dataclasses
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from comi_jax.backbone import Backbone
from comi_jax.config import Compression, Lora
from comi_jax.errors import ConfigError
from comi_jax.model import architecture
from comi_jax.model.architecture import Architecture
from comi_jax.params import Placement, as_stored, flatten, unflatten
from comi_jax.weights import files, hf, loading, writing
from comi_jax.weights.files import Tensors
from comi_jax.weights.layout import Index, Layout, Shape, Source, WeightsError
from comi_jax.weights.writing import Writable

SCALARS = {
    "mig/alpha_coarse": "alpha_select",
    "mig/beta_coarse": "beta_select",
    "mig/alpha_fine": "alpha_merge",
    "mig/beta_fine": "beta_merge",
}
PREFIX = {"encoder": "encoder.", "lsa": "memory_fusion_layer.", "decoder": "decoder."}
PEFT = "decoder.base_model.model."
ADAPTER = PEFT + "model.layers.{layer}.self_attn.{target}_proj.lora_{part}.default.weight"


def sources(arch: Architecture) -> dict[str, Source]:
    """The official tensors that make up each parameter of ``arch``, by flat path."""
    specs, found = architecture.specs(arch), {}
    adapted = rf"(self_attn\.[{''.join(arch.lora.targets)}]_proj)\."

    def named(part: str, name: str) -> str:
        if part != "decoder" or not arch.lora.rank:
            return PREFIX[part] + name
        return PEFT + re.sub(adapted, r"\1.base_layer.", name)

    for part in PREFIX:
        under = hf.sources(specs[part], lambda name, part=part: named(part, name))
        found |= {f"{part}/{path}": source for path, source in under.items()}
    found |= {path: Source((name,), (), Layout(), stacked=False) for path, name in SCALARS.items()}
    return found | adapter_sources(arch, ADAPTER)


def adapter_sources(arch: Architecture, name: str) -> dict[str, Source]:
    """The adapter tensors of ``arch``, by flat path; ``name`` is a template with {layer}, {target} and {part}."""
    found = {}
    for path, spec in flatten({"lora": architecture.specs(arch).get("lora", {})}).items():
        _, target, side = path.split("/")
        names = [name.format(layer=i, target=target, part=side.upper()) for i in range(spec.shape[0])]
        found[path] = Source(tuple(names), spec.shape, Layout(inputs=1), stacked=True)
    return found


def unused(arch: Architecture) -> dict[str, Shape]:
    """The names and shapes of the tensors in an official file that no computation uses."""
    table, width = (arch.backbone.vocab_size, arch.backbone.hidden_size), arch.backbone.hidden_size
    decoder = PEFT if arch.lora.rank else PREFIX["decoder"]
    tied = {decoder + "lm_head.weight": table} if arch.backbone.tie_word_embeddings else {}
    return tied | {
        "encoder.lm_head.weight": table,
        "memory_fusion_layer.lm_head.weight": table,
        "memory_fusion_layer.model.embed_tokens.weight": table,
        "semantic_alignment_layer.weight": (width, width),
        "semantic_alignment_layer.bias": (width,),
    }


def filled(name: str, arch: Architecture, arrays: Mapping[str, Any]) -> np.ndarray:
    """The default for the unused tensor ``name``. A head or embedding table is copied from the decoder, where it is
    frozen and thus still the language model's. If tied, the encoder's head is copied from its embeddings. The alignment
    layer is the identity."""
    dtype = arrays["decoder/embed"].dtype
    if name == "semantic_alignment_layer.weight":
        return np.eye(arch.backbone.hidden_size, dtype=dtype)
    if name == "semantic_alignment_layer.bias":
        return np.zeros(arch.backbone.hidden_size, dtype)
    if name.endswith("lm_head.weight") and not arch.backbone.tie_word_embeddings:
        return np.ascontiguousarray(np.asarray(arrays["decoder/head"]).T)
    return np.asarray(arrays["encoder/embed" if name == "encoder.lm_head.weight" else "decoder/embed"])


# --- reading ----------------------------------------------------------------------------------------------------------


class OfficialTensors(Tensors):
    """An official file with the current tensor names; older files have the prefix icae. instead of encoder."""

    def __init__(self, path: str | Path):
        super().__init__(path)
        self._files_name = {re.sub(r"^icae\.", "encoder.", name): name for name in self.shapes}
        if len(self._files_name) < len(self.shapes):
            twice = sorted(set(self.shapes) - set(self._files_name.values()))
            raise WeightsError(f"{path} has tensors under their old name, icae., and under encoder. too: {twice}")
        self.shapes = {name: self.shapes[file] for name, file in self._files_name.items()}
        self.dtypes = {name: self.dtypes[file] for name, file in self._files_name.items()}

    def read(self, name: str, index: Index = ()) -> np.ndarray:
        return super().read(self._files_name[name], index)


def load(
    path: str | Path,
    backbone: Backbone,
    compression: Compression,
    lora_alpha: float | None = None,
    place: Placement = as_stored,
) -> tuple[dict[str, Any], Architecture]:
    """The parameters and the architecture of an official checkpoint.

    The tensors give the layer counts and the LoRA rank and targets; the caller gives the rest: ``backbone``,
    ``lora_alpha``, and the switches, rates and segment size in ``compression``. Raises WeightsError listing every
    missing, unexpected, misshapen or non-finite tensor, and ConfigError if ``lora_alpha`` is needed and missing.
    """
    tensors = OfficialTensors(path)
    arch = read_architecture(tensors.shapes, backbone, compression, lora_alpha, str(path))
    wanted = sources(arch)
    files.check(wanted, unused(arch), tensors)
    prefix = PEFT if arch.lora.rank else PREFIX["decoder"]
    head, embeddings = (prefix + hf.TABLE[name][0] for name in ("head", "embed"))
    if backbone.tie_word_embeddings:
        hf.check_tied(tensors, head, embeddings)
    return unflatten(loading.load(tensors, wanted, place)), arch


def read_architecture(
    shapes: Mapping[str, Shape],
    backbone: Backbone,
    compression: Compression,
    lora_alpha: float | None,
    where: str,
) -> Architecture:
    """The architecture with the layer counts and adapters found in the tensors, and the rest of ``compression``."""

    def layers(prefix: str) -> int:
        found = [re.match(re.escape(prefix) + r"model\.layers\.(\d+)\.", name) for name in shapes]
        return 1 + max((int(match[1]) for match in found if match), default=-1)

    counts = {"encoder_layers": layers(PREFIX["encoder"]), "lsa_layers": layers(PREFIX["lsa"])}
    for field, count in counts.items():
        if not count:
            raise WeightsError(f"{where} is not an official COMI checkpoint: it has no tensors for {field}")
    adapters = {name: shape for name, shape in shapes.items() if name.endswith(".lora_A.default.weight")}
    if not adapters:
        return Architecture(backbone, dataclasses.replace(compression, **counts))
    ranks = sorted({shape[0] for shape in adapters.values()})
    if len(ranks) > 1:
        raise WeightsError(f"{where} has adapters of several ranks {ranks}; one rank for all is implemented")
    if lora_alpha is None:
        raise ConfigError(
            f"{where} has LoRA adapters of rank {ranks[0]}; their alpha is not stored in it and must be given"
        )
    found = {match[1] for name in adapters if (match := re.search(r"\.self_attn\.([qkvo])_proj\.lora_A", name))}
    targets = tuple(target for target in "qkvo" if target in found)
    if not targets:
        raise WeightsError(f"{where} has adapters, but none on q_proj, k_proj, v_proj or o_proj: {sorted(adapters)[0]}")
    lora = Lora(rank=ranks[0], alpha=float(lora_alpha), targets=targets)
    return Architecture(backbone, dataclasses.replace(compression, **counts), lora)


# --- writing ----------------------------------------------------------------------------------------------------------


def writables(
    params: Mapping[str, Any], arch: Architecture, kept: Tensors | None = None, dtype: Any = None
) -> Iterator[Writable]:
    """All tensors of the official state dict of ``params``, so that the release loads it with strict=True. ``kept`` has
    the unused tensors of the imported file; the other unused tensors are ``filled``."""
    arrays = flatten(params)
    names = sources(arch)
    for path, array in arrays.items():  # COMI's scalars keep their dtype: decoding depends on every digit
        yield from writing.writables(names, {path: array}, None if path.startswith("mig/") else dtype)
    for name, shape in unused(arch).items():
        file = kept if kept is not None and name in kept.shapes else None
        width = jnp.dtype(dtype or (file.dtypes[name] if file else arrays["decoder/embed"].dtype))

        def make(name: str = name, file: Tensors | None = file, width: Any = width) -> np.ndarray:
            return (file.read(name) if file else filled(name, arch, arrays)).astype(width, copy=False)

        yield Writable(name, shape, width, make)


def tensors(params: Mapping[str, Any], arch: Architecture) -> dict[str, np.ndarray]:
    """``params``, all or some of them (or gradients), with their official names and layouts."""
    return {one.name: one.make() for one in writing.writables(sources(arch), flatten(params))}
