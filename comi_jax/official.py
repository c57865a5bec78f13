"""The official release's flat state dict, read into our tree and named again.

    encoder.model.*                 the encoder            memory_fusion_layer.model.*   the LSA
    decoder.model.*, decoder.lm_head.weight                decoder.base_model.model.*    the decoder under PEFT's LoRA
    alpha_select beta_select alpha_merge beta_merge        the coarse and the fine scalars

The release also stores tensors that nothing computes with: the encoder's and the LSA's vocabulary heads, the LSA's
embedding table and the semantic_alignment_layer (used only between models of different width). They may be there.
"""

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from comi_jax import comi, hf
from comi_jax import lora as lora_module
from comi_jax.config import Backbone, Compression, ConfigError, Lora
from comi_jax.params import Tree, flatten, unflatten

SCALARS = {
    "mig/alpha_coarse": "alpha_select",
    "mig/beta_coarse": "beta_select",
    "mig/alpha_fine": "alpha_merge",
    "mig/beta_fine": "beta_merge",
}
PREFIX = {"encoder": "encoder.", "lsa": "memory_fusion_layer.", "decoder": "decoder."}
PEFT = "decoder.base_model.model."
ADAPTER = PEFT + "model.layers.{layer}.self_attn.{target}_proj.lora_{part}.default.weight"


def tensor_name(part: str, name: str, lora: bool) -> str:
    """The official name of Hugging Face tensor ``name`` of our ``part``."""
    if part != "decoder" or not lora:
        return PREFIX[part] + name
    return PEFT + re.sub(r"(self_attn\.[qkvo]_proj)\.", r"\1.base_layer.", name)


def load(
    path: str | Path, backbone: Backbone, compression: Compression, lora_alpha: float | None = None
) -> tuple[dict[str, Any], comi.Architecture]:
    """An official checkpoint as parameters (numpy, in the file's dtypes) and the architecture they belong to.

    Layer counts and the LoRA rank are read off the tensors; what no tensor holds (``backbone``, the switches, rates and
    segment size in ``compression``, ``lora_alpha``) is given. Raises WeightsError listing every missing, unexpected or
    misshapen tensor.
    """
    tensors = hf.Tensors(path)
    files = {re.sub(r"^icae\.", "encoder.", name): name for name in tensors.shapes}
    if len(files) < len(tensors.shapes):
        twice = sorted(set(tensors.shapes) - set(files.values()))
        raise hf.WeightsError(f"{path} has tensors under their old name, icae., and under encoder. too: {twice}")
    have = {name: tensors.shapes[file] for name, file in files.items()}
    arch = read_architecture(have, backbone, compression, lora_alpha, str(path))
    specs = comi.specs(arch)
    want, optional = expected(arch)
    hf.check_names(want, optional, have, str(path))

    def read(name: str) -> np.ndarray:
        return tensors.read(files[name])

    params: dict[str, Any] = {
        part: hf.assemble(specs[part], lambda name, part=part: read(tensor_name(part, name, bool(arch.lora.rank))))
        for part in PREFIX
    }
    params["mig"] = {path.split("/")[1]: read(name).reshape(()) for path, name in SCALARS.items()}
    if arch.lora.rank:
        layers = range(backbone.num_hidden_layers)
        params["lora"] = {
            target: {
                part.lower(): np.stack([read(ADAPTER.format(layer=i, target=target, part=part)).T for i in layers])
                for part in "AB"
            }
            for target in lora_module.TARGETS
        }
    return params, arch


def read_architecture(
    shapes: Mapping[str, tuple[int, ...]],
    backbone: Backbone,
    compression: Compression,
    lora_alpha: float | None,
    where: str,
) -> comi.Architecture:
    """The layer counts and the LoRA rank that the tensors show, in ``compression`` and a Lora."""

    def layers(prefix: str) -> int:
        found = [re.match(re.escape(prefix) + r"model\.layers\.(\d+)\.", name) for name in shapes]
        return 1 + max((int(match[1]) for match in found if match), default=-1)

    counts = {"encoder_layers": layers(PREFIX["encoder"]), "lsa_layers": layers(PREFIX["lsa"])}
    for field, count in counts.items():
        if not count:
            raise hf.WeightsError(f"{where} is not an official COMI checkpoint: it has no tensors for {field}")
    ranks = sorted({shape[0] for name, shape in shapes.items() if name.endswith(".lora_A.default.weight")})
    if len(ranks) > 1:
        raise hf.WeightsError(f"{where} has adapters of several ranks {ranks}; one rank for all is implemented")
    if ranks and lora_alpha is None:
        raise ConfigError(
            f"{where} has LoRA adapters of rank {ranks[0]}; their alpha is not stored in it and must be given"
        )
    lora = Lora(rank=ranks[0], alpha=float(lora_alpha)) if ranks else Lora()
    return comi.Architecture(backbone, dataclasses.replace(compression, **counts), lora)


def expected(arch: comi.Architecture) -> tuple[dict[str, tuple[int, ...]], dict[str, tuple[int, ...]]]:
    """Names and shapes of the tensors that an official checkpoint of ``arch`` must hold, and of those it may hold."""
    specs, backbone, lora = comi.specs(arch), arch.backbone, bool(arch.lora.rank)
    want = {
        tensor_name(part, name, lora): shape
        for part in PREFIX
        for names in hf.names_of(specs[part]).values()
        for name, shape in names
    }
    want |= dict.fromkeys(SCALARS.values(), ())
    for target, pair in specs.get("lora", {}).items():
        for part in "AB":
            layers, *shape = pair[part.lower()].shape
            names = [ADAPTER.format(layer=layer, target=target, part=part) for layer in range(layers)]
            want |= dict.fromkeys(names, tuple(shape[::-1]))
    table, width = (backbone.vocab_size, backbone.hidden_size), backbone.hidden_size
    optional = {
        "encoder.lm_head.weight": table,
        "memory_fusion_layer.lm_head.weight": table,
        "memory_fusion_layer.model.embed_tokens.weight": table,
        tensor_name("decoder", "lm_head.weight", lora): table,
        "semantic_alignment_layer.weight": (width, width),
        "semantic_alignment_layer.bias": (width,),
    }
    return want, {name: shape for name, shape in optional.items() if name not in want}


def tensors(params: Tree, arch: comi.Architecture) -> dict[str, np.ndarray]:
    """``params``, whole or in part (gradients of what is trained, say), under their official names and layouts."""
    named: dict[str, np.ndarray] = {}
    for path, array in flatten(params).items():
        part, _, rest = path.partition("/")
        if part == "mig":
            named[SCALARS[path]] = np.asarray(array)
        elif part == "lora":
            target, side = rest.split("/")
            for layer, one in enumerate(np.asarray(array)):
                name = ADAPTER.format(layer=layer, target=target, part=side.upper())
                named[name] = np.ascontiguousarray(one.T)
        else:
            for name, tensor in hf.disassemble(unflatten({rest: array})).items():
                named[tensor_name(part, name, bool(arch.lora.rank))] = tensor
    return named
