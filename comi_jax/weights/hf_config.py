"""config.json of Hugging Face folders, to a Backbone and back."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from comi_jax.config import Backbone, ConfigError, Llama3Rope, shown
from comi_jax.overrides import from_dict

MAX_CONFIG_BYTES = 2**20
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
    return backbone_of(read_object(path), str(path))


def read_object(path: Path) -> dict[str, Any]:
    try:
        size = path.stat().st_size
        if size > MAX_CONFIG_BYTES:
            raise ConfigError(f"{path} has {size} bytes; a model's config has a few thousand")
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path} holds a JSON {type(values).__name__}; an object is expected")
    return values


def backbone_of(values: Mapping[str, Any], where: str) -> Backbone:
    """``values`` of a config.json as a Backbone; attributes we do not implement are refused by name unless neutral."""
    model_type = values.get("model_type")
    if model_type not in MODEL_TYPES:
        raise ConfigError(f"{where}: model_type is {shown(model_type)}; implemented are {', '.join(MODEL_TYPES)}")
    refused = [f"{k}={shown(values[k])}" for k, allowed in NEUTRAL.items() if k in values and values[k] not in allowed]
    unknown = set(values) - set(NEUTRAL) - HARMLESS - READ
    refused += [f"{_name(k)}={shown(values[k])}" for k in sorted(unknown) if values[k] not in (None, False)]
    kinds = values.get("layer_types") or []
    if not isinstance(kinds, list) or any(kind != "full_attention" for kind in kinds):
        refused.append(f"layer_types={shown(kinds)}")
    if refused:
        raise ConfigError(f"{where} asks for what is not implemented: {', '.join(refused)}")
    required = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    missing = [name for name in required if type(values.get(name)) is not int]
    if missing:
        raise ConfigError(f"{where} lacks whole numbers for {', '.join(missing)}")
    theta, scaling = _rope(values, where)
    heads, width = values["num_attention_heads"], values["hidden_size"]
    if values.get("head_dim") is None and (heads < 1 or width % heads):
        raise ConfigError(f"{where}: hidden_size {width} is not a multiple of num_attention_heads {heads}")

    def given(name: str, default: Any) -> Any:  # null means the same as nothing
        return default if values.get(name) is None else values[name]

    found = {name: values[name] for name in required} | {
        "model_type": model_type,
        "num_key_value_heads": given("num_key_value_heads", heads),
        "head_dim": given("head_dim", 128 if model_type == "qwen3" else width // heads if heads else 0),
        "rms_norm_eps": given("rms_norm_eps", 1e-6),
        "rope_theta": theta,
        "rope_scaling": scaling,
        "max_position_embeddings": given("max_position_embeddings", 2048 if model_type == "llama" else 32768),
        "tie_word_embeddings": given("tie_word_embeddings", False),
        "qkv_bias": model_type == "qwen2",
        "qk_norm": model_type == "qwen3",
    }
    try:
        return from_dict(Backbone, found, where)
    except ConfigError as error:
        raise ConfigError(str(error) if str(error).startswith(where) else f"{where}: {error}") from None


def _name(key: str) -> str:
    """A key as it is, if that is short and can be printed."""
    return key if key.isidentifier() and len(key) <= 80 else shown(key)


def _rope(values: Mapping[str, Any], where: str) -> tuple[Any, dict[str, Any] | None]:
    """Base and scaling of the rotary embeddings, from either dialect, their numbers not yet checked."""
    rope, scaling = values.get("rope_parameters") or {}, values.get("rope_scaling") or {}
    if rope and scaling and rope != scaling:
        raise ConfigError(
            f"{where} has rope_parameters {shown(rope)} and rope_scaling {shown(scaling)}, of which only one can be "
            "meant; remove the other"
        )
    rope = rope or scaling
    if not isinstance(rope, dict):
        raise ConfigError(f"{where}: the rotary embeddings are {shown(rope)}; an object is expected")
    rope = dict(rope)
    theta = rope.pop("rope_theta", None) or values.get("rope_theta") or 10_000.0
    kind = rope.pop("rope_type", None) or rope.pop("type", None) or "default"
    rope.pop("type", None)
    if kind == "default" and not rope:
        return theta, None
    names = set(Llama3Rope.__dataclass_fields__)
    if kind != "llama3" or set(rope) != names:
        raise ConfigError(
            f"{where} asks for rotary embeddings of type {shown(kind)} with {shown(sorted(rope))}; implemented are "
            f"'default' with nothing and 'llama3' with {sorted(names)}"
        )
    return theta, rope


def config_values(backbone: Backbone, *, head: bool = True, **more: Any) -> dict[str, Any]:
    """config.json of ``backbone`` in the dialect that every version of transformers reads, the inverse of
    ``backbone_of``; ``head`` says whether the folder has a language model's output head. ``more`` is added as it is."""
    values = dataclasses.asdict(backbone)
    for name in ("qkv_bias", "qk_norm"):  # said by the model type
        del values[name]
    if values["rope_scaling"] is not None:
        values["rope_scaling"] = {"rope_type": "llama3", **values["rope_scaling"]}
    family = {"llama": "Llama", "qwen2": "Qwen2", "qwen3": "Qwen3"}[backbone.model_type]
    name = f"{family}ForCausalLM" if head else f"{family}Model"
    return {"architectures": [name], **values, "hidden_act": "silu", "use_cache": True, **more}


def is_base(folder: str | Path) -> bool:
    """Whether ``folder``'s config.json names a model without a language model's head."""
    names = read_object(Path(folder) / "config.json").get("architectures")
    names = names if isinstance(names, list) else []
    return bool(names) and not any("ForCausalLM" in str(name) for name in names)


def stop_tokens(folder: str | Path) -> tuple[int, ...]:
    """The end-of-sequence ids that ``folder`` names, in generation_config.json or else in config.json."""
    for name in ("generation_config.json", "config.json"):
        path = Path(folder) / name
        ids = read_object(path).get("eos_token_id") if path.is_file() else None
        if ids is not None:
            ids = ids if isinstance(ids, list) else [ids]
            if not all(type(i) is int and 0 <= i < 2**31 for i in ids):
                raise ConfigError(f"{path}: eos_token_id is {shown(ids)}; token ids are whole numbers")
            return tuple(ids)
    raise ConfigError(f"{folder} names no eos_token_id in generation_config.json or config.json")
