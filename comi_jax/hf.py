"""Hugging Face folders of LLaMA and Qwen: config.json to a Backbone, and one table between their tensors and our tree.

A projection is stored by Hugging Face as [out, in] and per layer; by us as it is applied, [in, heads, head] or [in,
out], with all layers stacked.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from comi_jax.backbone import specs as lm_specs
from comi_jax.config import Backbone, ConfigError, Llama3Rope
from comi_jax.params import Tree, flatten, unflatten


class WeightsError(ValueError):
    """Weights that do not fit the model; the message lists every one of them."""


# --- config.json ------------------------------------------------------------------------------------------------------

MODEL_TYPES = ("llama", "qwen2", "qwen3")

# Attributes that change what is computed and that we implement for these values only. A missing one is at its default.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "attention_dropout": (0, 0.0, None),
    "pretraining_tp": (1, None),
    "use_sliding_window": (False, None),
    "partial_rotary_factor": (1, 1.0, None),
    "quantization_config": (None,),
    "is_decoder": (True, False, None),
    "add_cross_attention": (False, None),
    "attn_logit_softcapping": (None,),
    "final_logit_softcapping": (None,),
}

# Attributes that do not change what the model computes from token ids, or that are read below.
HARMLESS = {
    "architectures", "auto_map", "bos_token_id", "chunk_size_feed_forward", "do_sample", "dtype", "eos_token_id",
    "id2label", "initializer_range", "label2id", "max_length", "max_window_layers", "name_or_path", "_name_or_path",
    "output_attentions", "output_hidden_states", "pad_token_id", "problem_type", "return_dict", "sep_token_id",
    "sliding_window", "temperature", "tokenizer_class", "top_p", "torch_dtype", "transformers_version", "unk_token_id",
    "use_cache", "_attn_implementation", "_attn_implementation_autoset", "transformers_weights",
}  # fmt: skip

READ = {
    "model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "rms_norm_eps", "rope_theta", "rope_scaling", "rope_parameters",
    "max_position_embeddings", "tie_word_embeddings", "layer_types",
}  # fmt: skip


def read_config(folder: str | Path) -> Backbone:
    """The Backbone that ``folder``/config.json describes. Raises ConfigError with one sentence on whatever it cannot
    use."""
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise ConfigError(f"{folder} is not a Hugging Face model folder: it has no config.json")
    return backbone_of(_read_object(path), str(path))


def _read_object(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path} holds a JSON {type(values).__name__}; an object is expected")
    return values


def backbone_of(values: Mapping[str, Any], where: str) -> Backbone:
    """``values`` of a config.json as a Backbone; attributes we do not implement are refused by name unless neutral."""
    model_type = values.get("model_type")
    if model_type not in MODEL_TYPES:
        raise ConfigError(f"{where}: model_type is {model_type!r}; implemented are {', '.join(MODEL_TYPES)}")
    refused = [f"{k}={values[k]!r}" for k, allowed in NEUTRAL.items() if k in values and values[k] not in allowed]
    unknown = set(values) - set(NEUTRAL) - HARMLESS - READ
    refused += [f"{k}={values[k]!r}" for k in sorted(unknown) if values[k] not in (None, False)]
    if any(kind != "full_attention" for kind in values.get("layer_types") or ()):
        refused.append(f"layer_types={values['layer_types']!r}")
    if refused:
        raise ConfigError(f"{where} asks for what is not implemented: {', '.join(refused)}")
    required = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    missing = [name for name in required if not isinstance(values.get(name), int)]
    if missing:
        raise ConfigError(f"{where} lacks whole numbers for {', '.join(missing)}")
    theta, scaling = _rope(values, where)
    heads, width = values["num_attention_heads"], values["hidden_size"]
    if values.get("head_dim") is None and width % heads:
        raise ConfigError(f"{where}: hidden_size {width} is not a multiple of num_attention_heads {heads}")
    default_head = 128 if model_type == "qwen3" else width // heads
    return Backbone(
        model_type=model_type,
        vocab_size=values["vocab_size"],
        hidden_size=width,
        intermediate_size=values["intermediate_size"],
        num_hidden_layers=values["num_hidden_layers"],
        num_attention_heads=heads,
        num_key_value_heads=values.get("num_key_value_heads") or heads,
        head_dim=values.get("head_dim") or default_head,
        rms_norm_eps=float(values.get("rms_norm_eps", 1e-6)),
        rope_theta=theta,
        rope_scaling=scaling,
        max_position_embeddings=values.get("max_position_embeddings", 2048 if model_type == "llama" else 32768),
        tie_word_embeddings=bool(values.get("tie_word_embeddings", False)),
        qkv_bias=model_type == "qwen2",
        qk_norm=model_type == "qwen3",
    )


def _rope(values: Mapping[str, Any], where: str) -> tuple[float, Llama3Rope | None]:
    """Base and scaling of the rotary embeddings, from either dialect."""
    rope = dict(values.get("rope_parameters") or values.get("rope_scaling") or {})
    theta = float(rope.pop("rope_theta", None) or values.get("rope_theta") or 10_000.0)
    kind = rope.pop("rope_type", None) or rope.pop("type", None) or "default"
    rope.pop("type", None)
    if kind == "default" and not rope:
        return theta, None
    names = set(Llama3Rope.__dataclass_fields__)
    if kind != "llama3" or set(rope) != names:
        raise ConfigError(
            f"{where} asks for rotary embeddings of type {kind!r} with {sorted(rope)}; implemented are 'default' with "
            f"nothing and 'llama3' with {sorted(names)}"
        )
    return theta, Llama3Rope(
        factor=float(rope["factor"]),
        low_freq_factor=float(rope["low_freq_factor"]),
        high_freq_factor=float(rope["high_freq_factor"]),
        original_max_position_embeddings=int(rope["original_max_position_embeddings"]),
    )


def stop_tokens(folder: str | Path) -> tuple[int, ...]:
    """The end-of-sequence ids that ``folder`` names, in generation_config.json or else in config.json."""
    for name in ("generation_config.json", "config.json"):
        path = Path(folder) / name
        ids = _read_object(path).get("eos_token_id") if path.is_file() else None
        if ids is not None:
            return tuple(ids) if isinstance(ids, list) else (ids,)
    raise ConfigError(f"{folder} names no eos_token_id in generation_config.json or config.json")


def load_tokenizer(folder: str | Path) -> Any:
    """The tokenizer in ``folder``; never one that brings code of its own, never from the network."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast  # slow to import, of use to those who read text

    # Beside a Qwen2 config, AutoTokenizer puts Qwen2's own splitting of words in the place of tokenizer.json's.
    as_written = (Path(folder) / "tokenizer.json").is_file()
    reader = PreTrainedTokenizerFast if as_written else AutoTokenizer
    try:
        tokenizer = reader.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{folder} holds no tokenizer that transformers can load: {error}") from None
    if tokenizer.eos_token_id is None:
        raise ConfigError(f"the tokenizer in {folder} has no end-of-sequence token, which every answer ends with")
    return tokenizer


# --- the table --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Entry:
    """One of our parameters in Hugging Face's terms: its name, with {layer} if it is stacked, and whether it is a
    projection whose in and out axes are swapped; ``inputs`` says how many of our axes are input axes."""

    name: str
    inputs: int = 0

    def to_ours(self, tensor: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        return tensor.T.reshape(shape) if self.inputs else tensor.reshape(shape)

    def to_theirs(self, array: np.ndarray) -> np.ndarray:
        if self.inputs:
            return array.reshape(int(np.prod(array.shape[: self.inputs])), -1).T
        return array.reshape(-1) if "bias" in self.name else array

    def their_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of the tensor of one layer, for our ``shape`` of one layer."""
        if self.inputs:
            return int(np.prod(shape[self.inputs :])), int(np.prod(shape[: self.inputs]))
        return (int(np.prod(shape)),) if "bias" in self.name else shape


_LAYER = "model.layers.{layer}."
TABLE: dict[str, Entry] = {
    "embed": Entry("model.embed_tokens.weight"),
    "norm": Entry("model.norm.weight"),
    "head": Entry("lm_head.weight", inputs=1),
    "layers/attention_norm": Entry(_LAYER + "input_layernorm.weight"),
    "layers/mlp_norm": Entry(_LAYER + "post_attention_layernorm.weight"),
    "layers/q": Entry(_LAYER + "self_attn.q_proj.weight", inputs=1),
    "layers/k": Entry(_LAYER + "self_attn.k_proj.weight", inputs=1),
    "layers/v": Entry(_LAYER + "self_attn.v_proj.weight", inputs=1),
    "layers/o": Entry(_LAYER + "self_attn.o_proj.weight", inputs=2),
    "layers/q_bias": Entry(_LAYER + "self_attn.q_proj.bias"),
    "layers/k_bias": Entry(_LAYER + "self_attn.k_proj.bias"),
    "layers/v_bias": Entry(_LAYER + "self_attn.v_proj.bias"),
    "layers/q_norm": Entry(_LAYER + "self_attn.q_norm.weight"),
    "layers/k_norm": Entry(_LAYER + "self_attn.k_norm.weight"),
    "layers/gate": Entry(_LAYER + "mlp.gate_proj.weight", inputs=1),
    "layers/up": Entry(_LAYER + "mlp.up_proj.weight", inputs=1),
    "layers/down": Entry(_LAYER + "mlp.down_proj.weight", inputs=1),
}


def names_of(specs: Tree) -> dict[str, list[tuple[str, tuple[int, ...]]]]:
    """For each of our parameters the Hugging Face tensors that make it up, layer by layer, with their shapes."""
    names = {}
    for path, spec in flatten(specs).items():
        entry = TABLE[path]
        if "{layer}" not in entry.name:
            names[path] = [(entry.name, entry.their_shape(spec.shape))]
        else:
            shape = entry.their_shape(spec.shape[1:])
            names[path] = [(entry.name.format(layer=layer), shape) for layer in range(spec.shape[0])]
    return names


def assemble(
    specs: Tree, read: Callable[[str], np.ndarray], rename: Callable[[str, str], str] = lambda p, n: n
) -> Tree:
    """Our tree for ``specs`` from single tensors, in the dtype of the tensors. ``rename(path, name)`` is the name under
    which ``read`` knows a tensor."""
    tree = {}
    names = names_of(specs)
    for path, spec in flatten(specs).items():
        entry = TABLE[path]
        if "{layer}" not in entry.name:
            tree[path] = entry.to_ours(read(rename(path, entry.name)), spec.shape)
        else:
            layers = [entry.to_ours(read(rename(path, name)), spec.shape[1:]) for name, _ in names[path]]
            tree[path] = np.stack(layers)
    return unflatten(tree)


def disassemble(tree: Tree) -> dict[str, np.ndarray]:
    """The inverse of ``assemble``: Hugging Face tensors of our tree."""
    tensors = {}
    for path, array in flatten(tree).items():
        entry = TABLE[path]
        if "{layer}" not in entry.name:
            tensors[entry.name] = np.ascontiguousarray(entry.to_theirs(np.asarray(array)))
        else:
            for layer, one in enumerate(np.asarray(array)):
                tensors[entry.name.format(layer=layer)] = np.ascontiguousarray(entry.to_theirs(one))
    return tensors


# --- safetensors ------------------------------------------------------------------------------------------------------


class Tensors:
    """The tensors of one safetensors file, of an index over several, or of a folder with either; read one at a time."""

    def __init__(self, path: str | Path):
        path = Path(path)
        if path.is_dir():
            index, single = path / "model.safetensors.index.json", path / "model.safetensors"
            if not index.is_file() and not single.is_file():
                raise WeightsError(f"{path} has neither model.safetensors nor model.safetensors.index.json")
            path = index if index.is_file() else single
        self.path = path
        listed = _read_index(path) if path.suffix == ".json" else None
        files = [path.name] if listed is None else sorted(set(listed.values()))
        self._files = {name: _open(path.parent / name) for name in files}
        self._where = {key: name for name, file in self._files.items() for key in file.keys()}
        if listed is not None and self._where != listed:
            wrong = sorted(set(self._where.items()) ^ set(listed.items()))
            raise WeightsError(
                f"{path} does not list what its files hold: {wrong[:10]}{' ...' if len(wrong) > 10 else ''}"
            )
        self.shapes = {key: tuple(self._files[name].get_slice(key).get_shape()) for key, name in self._where.items()}

    def read(self, name: str) -> np.ndarray:
        """A tensor in its own dtype (bfloat16 through ml_dtypes)."""
        return self._files[self._where[name]].get_tensor(name)


def _read_index(path: Path) -> dict[str, str]:
    try:
        listed = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        plain = all(isinstance(name, str) and Path(name).name == name for name in listed.values())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise WeightsError(f"{path} is not an index of safetensors files: {error!r}") from None
    if not plain:
        raise WeightsError(f"{path} names files outside its own folder")
    return listed


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="np")
    except (OSError, SafetensorError) as error:
        raise WeightsError(f"{path} cannot be read as safetensors: {error}") from None


def check_names(
    want: Mapping[str, tuple[int, ...]],
    optional: Mapping[str, tuple[int, ...]],
    have: Mapping[str, tuple[int, ...]],
    where: str,
) -> None:
    """Raise WeightsError listing every tensor of ``have`` that is missing, unexpected or not of the shape expected."""
    known = {**optional, **want}
    problems = [f"missing {name} {shape}" for name, shape in want.items() if name not in have]
    problems += [f"unexpected {name} {shape}" for name, shape in have.items() if name not in known]
    problems += [
        f"{name} has shape {shape}, expected {known[name]}"
        for name, shape in have.items()
        if name in known and shape != known[name]
    ]
    if problems:
        raise WeightsError(f"{where} does not fit the model, {len(problems)} problem(s):\n  " + "\n  ".join(problems))


def load_backbone(folder: str | Path, backbone: Backbone) -> Tree:
    """The weights of the causal LM in ``folder``, in the dtypes of its files.

    Raises WeightsError listing every missing, unexpected or misshapen tensor. Rotary frequencies that old files store
    are left out, as is a repeated lm_head where embeddings are tied.
    """
    specs = lm_specs(backbone, backbone.num_hidden_layers, embed=True, head=True)
    tensors = Tensors(folder)
    want = {name: shape for names in names_of(specs).values() for name, shape in names}
    optional = {
        f"model.layers.{layer}.self_attn.rotary_emb.inv_freq": (backbone.head_dim // 2,)
        for layer in range(backbone.num_hidden_layers)
    }
    if backbone.tie_word_embeddings:
        optional[TABLE["head"].name] = (backbone.vocab_size, backbone.hidden_size)
    check_names(want, optional, tensors.shapes, str(tensors.path))
    return assemble(specs, tensors.read)


def save_backbone(folder: str | Path, tree: Tree, config: Mapping[str, Any]) -> None:
    """Write ``tree`` as model.safetensors and ``config`` as config.json into ``folder``, which must exist."""
    save_file(disassemble(tree), Path(folder) / "model.safetensors", metadata={"format": "pt"})
    (Path(folder) / "config.json").write_text(json.dumps(dict(config), indent=2) + "\n", encoding="utf-8")
