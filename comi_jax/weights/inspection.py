"""What a folder or file of weights contains: architecture, parameters by part, dtypes, and what is missing."""

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from comi_jax.backbone import Backbone
from comi_jax.errors import UserError
from comi_jax.model import architecture
from comi_jax.params import flatten
from comi_jax.runs.checksums import CheckpointError
from comi_jax.runs.description import is_run, read_run
from comi_jax.runs.folder import Folder
from comi_jax.runs.selection import newest
from comi_jax.runs.stored_weights import stored_arrays
from comi_jax.weights import hf, hf_config, hf_folder, official
from comi_jax.weights.files import Tensors
from comi_jax.weights.hf_attributes import MODEL_TYPES
from comi_jax.weights.layout import Shape, some


@dataclasses.dataclass(frozen=True)
class Part:
    """The arrays of one part of a model."""

    name: str
    arrays: int
    parameters: int
    bytes: int
    dtypes: tuple[str, ...]

    @classmethod
    def all(cls, name: str, parts: "Sequence[Part]") -> "Part":
        """The total of ``parts``."""
        dtypes = tuple(sorted({dtype for part in parts for dtype in part.dtypes}))
        arrays, parameters = sum(part.arrays for part in parts), sum(part.parameters for part in parts)
        return cls(name, arrays, parameters, sum(part.bytes for part in parts), dtypes)


@dataclasses.dataclass(frozen=True)
class Inspection:
    """The result of ``inspect``."""

    kind: str
    architecture: str
    parts: tuple[Part, ...]
    missing: tuple[str, ...]  # what this kind needs but does not have
    notes: tuple[str, ...] = ()
    weights: str = ""  # the file or index that the weights are read from


def inspect(path: str | Path) -> Inspection:
    """Identify and describe ``path``. Raises WeightsError, ConfigError or CheckpointError if it cannot be read."""
    path = Path(path)
    if not path.exists():
        raise CheckpointError(f"{path} does not exist")
    if path.is_dir() and is_run(path):
        return _run(path)
    if (path / "comi.json").is_file():
        return _export(path)
    if (path / "config.json").is_file():
        return _language_model(path)
    tensors = Tensors(path)
    if any(name.startswith(("memory_fusion_layer.", "icae.")) for name in tensors.shapes):
        return _official(path)
    return Inspection(
        f"weights without a config.json ({tensors.path.name})",
        "unknown: put the file beside its config.json",
        (_part("tensors", {name: (tensors.shapes[name], tensors.dtypes[name]) for name in tensors.shapes}),),
        ("config.json",),
    )


def describe(backbone: Backbone) -> str:
    """A one-line description of ``backbone``."""
    queries, keys = backbone.num_attention_heads, backbone.num_key_value_heads
    tied = ", tied embeddings" if backbone.tie_word_embeddings else ""
    return (
        f"{backbone.model_type}: {backbone.num_hidden_layers} layers, width {backbone.hidden_size}, {queries} heads "
        f"over {keys} key/value heads of {backbone.head_dim}, feed-forward {backbone.intermediate_size}, vocabulary "
        f"{backbone.vocab_size:,}{tied}"
    )


def _part(name: str, arrays: Mapping[str, tuple[Shape, str]]) -> Part:
    sizes = {key: math.prod(shape) for key, (shape, _) in arrays.items()}
    held = sum(sizes[key] * jnp.dtype(dtype).itemsize for key, (_, dtype) in arrays.items())
    return Part(name, len(arrays), sum(sizes.values()), held, tuple(sorted({dtype for _, dtype in arrays.values()})))


def _by_part(arrays: Mapping[str, tuple[Shape, str]], part_of: Any) -> tuple[Part, ...]:
    grouped: dict[str, dict[str, tuple[Shape, str]]] = {}
    for name, value in arrays.items():
        grouped.setdefault(part_of(name), {})[name] = value
    return tuple(_part(name, held) for name, held in grouped.items())


def _run(path: Path) -> Inspection:
    run = read_run(path)
    arch, step = run.architecture, newest(path)
    origin = "no checkpoint" if step is None else "imported" if run.imported else f"after {step} updates"
    compression, lora = arch.compression, arch.lora
    words = (
        f"{describe(run.backbone)}; {compression.encoder_layers} encoder and {compression.lsa_layers} LSA layers, "
        f"rates {', '.join(map(str, compression.rates))}, segments of {compression.segment_size:,}"
    )
    if lora.rank:
        words += f", LoRA of rank {lora.rank}, alpha {lora.alpha:g} on {', '.join(lora.targets)}"
    arrays: dict[str, tuple[Shape, str]] = {}
    missing = ["a complete checkpoint"] if step is None else []
    if step is not None:
        for stored in stored_arrays(path, step):
            arrays |= {name: (tuple(leaf.shape), str(leaf.dtype)) for name, leaf in stored.items()}
        wanted = {name: tuple(spec.shape) for name, spec in flatten(architecture.specs(arch)).items()}
        missing += [f"{name} {shape}" for name, shape in wanted.items() if name not in arrays]
        wrong = [name for name, shape in wanted.items() if name in arrays and arrays[name][0] != shape]
        missing += [f"{name} {wanted[name]} (it is {arrays[name][0]})" for name in wrong]
    if not Folder(path).tokenizer.is_dir():
        missing.append("tokenizer/")
    parts = _by_part(arrays, lambda name: name.split("/")[0])
    return Inspection(f"COMI checkpoint of config {run.config.name!r}, {origin}", words, parts, tuple(missing))


def _language_model(path: Path) -> Inspection:
    values = hf_config.read_object(path / "config.json")
    asked = hf_config.refusal(values, "config.json") if values.get("model_type") in MODEL_TYPES else ""
    backbone = hf_config.read_config(path, hf_config.ignorable(values) if asked else ())
    tensors, base = Tensors(path), hf_config.is_base(path)
    rename = hf.naming(tensors.shapes, backbone.tie_word_embeddings)
    specs = hf.lm_specs(backbone, backbone.num_hidden_layers, embed=True, head=not base)
    sources = hf.sources(specs, rename)
    wanted = {name: shape for source in sources.values() for name, shape in source.expected().items()}
    held = {name: (tensors.shapes[name], tensors.dtypes[name]) for name in tensors.shapes}
    kind = "Hugging Face model without a head" if base else "Hugging Face causal language model"
    notes = [note for note in (asked, hf_config.adapter(path)) if note]
    notes += hf.notes(tensors, sources, set(held) - set(wanted) - {rename(hf.TABLE["head"][0])})
    if others := hf_folder.beside(path)[1]:
        notes.append(f"not read: {some(others)}")
    tables = (rename(hf.TABLE[name][0]) for name in ("head", "embed"))
    checks = [lambda: hf_config.stop_tokens(path)]
    checks += [lambda: hf.check_tied(tensors, *tables)] * backbone.tie_word_embeddings
    for check in checks:
        try:
            check()
        except UserError as error:
            notes.append(str(error))

    def part_of(name: str) -> str:
        if re.search(r"(^|\.)layers\.", name):
            return "layers"
        return "embeddings and head" if re.search("embed_tokens|lm_head", name) else "other"

    return Inspection(
        kind, describe(backbone), _by_part(held, part_of), _missing(wanted, tensors), tuple(notes), tensors.path.name
    )


def _official(path: Path) -> Inspection:
    tensors = official.OfficialTensors(path)
    shapes = tensors.shapes
    layers = {prefix: 1 + max((int(m[1]) for n in shapes if (m := _layer(prefix, n))), default=-1) for prefix in
              official.PREFIX.values()}  # fmt: skip
    table = shapes.get("encoder.model.embed_tokens.weight", (0, 0))
    ranks = sorted({shape[0] for name, shape in shapes.items() if name.endswith(".lora_A.default.weight")})
    words = (
        f"width {table[1]}, vocabulary {table[0]:,}; {layers['encoder.']} encoder, "
        f"{layers['memory_fusion_layer.']} LSA and {layers['decoder.']} decoder layers; "
        f"{f'LoRA of rank {ranks[0]}' if ranks else 'no LoRA'}"
    )
    held = {name: (shapes[name], tensors.dtypes[name]) for name in shapes}
    missing = [name for name in official.SCALARS.values() if name not in shapes]
    missing += [f"{prefix}model.layers.*" for prefix, count in layers.items() if not count]
    missing += _incomplete_layers(shapes)
    parts = _by_part(held, lambda name: name.split(".")[0] if "." in name else "scalars")
    note = "such a file does not store backbone, rates, segment size or LoRA's alpha; pass them to import-official"
    return Inspection("official COMI state dict", words, parts, tuple(missing), (note,))


def _incomplete_layers(shapes: Mapping[str, Shape]) -> list[str]:
    """Tensors that a layer lacks but another layer of its part has, and missing tensors outside the layers."""
    found: dict[str, dict[str, set[str]]] = {}
    for name in shapes:
        if match := re.match(r"(.*model\.layers\.)(\d+)\.(.*)", name):
            found.setdefault(match[1], {}).setdefault(match[2], set()).add(match[3])
    missing = []
    for prefix, layers in found.items():
        numbers = map(str, range(1 + max(map(int, layers))))
        wanted = sorted(set().union(*layers.values()))
        missing += [f"{prefix}{n}.{rest}" for n in numbers for rest in wanted if rest not in layers.get(n, ())]
        outside = ["norm"] if prefix.startswith("memory_fusion_layer.") else ["norm", "embed_tokens"]
        names = (f"{prefix.removesuffix('layers.')}{name}.weight" for name in outside)
        missing += [name for name in names if name not in shapes]
    return missing


def _layer(prefix: str, name: str) -> re.Match[str] | None:
    return re.match(re.escape(prefix) + r"(?:base_model\.model\.)?model\.layers\.(\d+)\.", name)


def _missing(wanted: Mapping[str, Shape], tensors: Tensors) -> tuple[str, ...]:
    found = [f"{name} {shape}" for name, shape in wanted.items() if name not in tensors.shapes]
    wrong = [name for name, shape in wanted.items() if tensors.shapes.get(name, shape) != shape]
    return tuple(found + [f"{name} {wanted[name]} (it is {tensors.shapes[name]})" for name in wrong])


def _export(path: Path) -> Inspection:
    parts, missing, words = [], [], ""
    for name in ("decoder", "encoder", "lsa"):
        if not (path / name).is_dir():
            missing.append(f"{name}/")
            continue
        found = _language_model(path / name)
        words = words or found.architecture
        parts.append(Part.all(name, found.parts))
        missing += [f"{name}/{one}" for one in found.missing]
    return Inspection("COMI exported for Hugging Face", words, tuple(parts), tuple(missing))
