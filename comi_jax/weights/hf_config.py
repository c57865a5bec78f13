"""The config.json of a Hugging Face folder as a Backbone, and back."""

import dataclasses
import json
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from comi_jax.backbone import Backbone, Llama3Rope
from comi_jax.checks import shown
from comi_jax.errors import ConfigError
from comi_jax.overrides import from_dict
from comi_jax.weights.hf_attributes import ATTRIBUTES, MODEL_TYPES, READ

MAX_CONFIG_BYTES = 2**20


def read_config(folder: str | Path, ignore: Collection[str] = ()) -> Backbone:
    """The Backbone in ``folder``/config.json, without the attributes in ``ignore``. Raises ConfigError if the file is
    missing or cannot be used."""
    path = Path(folder) / "config.json"
    if not path.is_file():
        what = adapter(Path(folder)) or f"{folder} is not a Hugging Face model folder: it has no config.json"
        raise ConfigError(what)
    return backbone_of(without(read_object(path), ignore, str(path)), str(path))


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


def without(values: Mapping[str, Any], ignore: Collection[str], where: str) -> dict[str, Any]:
    """``values`` without the attributes in ``ignore``. Raises ConfigError if one is absent or is READ."""
    gone = [name for name in ignore if name not in values]
    if gone:
        raise ConfigError(f"{where} has no attribute {_names(gone)}, which --ignore-config names")
    used = [name for name in ignore if name in ATTRIBUTES and ATTRIBUTES[name].kind == READ]
    if used:
        raise ConfigError(f"{where}: {_names(used)} cannot be ignored: the model's computation depends on it")
    return {name: value for name, value in values.items() if name not in ignore}


def refused(values: Mapping[str, Any]) -> list[str]:
    """The names of the attributes in ``values`` that are unknown or ask for something that is not implemented."""
    kind, known = values.get("model_type"), ATTRIBUTES
    found = [name for name, value in values.items() if name in known and not known[name].allows(value, kind)]
    found += sorted(set(values) - set(known))
    layers = values.get("layer_types") or []
    if not isinstance(layers, list) or any(layer != "full_attention" for layer in layers):
        found.append("layer_types")
    return found


def ignorable(values: Mapping[str, Any]) -> list[str]:
    """The ``refused`` attributes that ``without`` can remove."""
    return [name for name in refused(values) if name not in ATTRIBUTES or ATTRIBUTES[name].kind != READ]


def refusal(values: Mapping[str, Any], where: str) -> str:
    """The error message for the ``refused`` attributes of ``values``; empty if there are none."""
    asked = ", ".join(f"{_name(name)}={shown(values[name])}" for name in refused(values))
    if not asked:
        return ""
    names = ignorable(values)
    way_on = f"; if it does not affect what the model computes, pass --ignore-config={_names(names)}"
    return f"{where} asks for something that is not implemented: {asked}{way_on if names else ''}"


def backbone_of(values: Mapping[str, Any], where: str) -> Backbone:
    """The ``values`` of a config.json as a Backbone. Raises ConfigError for missing or invalid values, and for
    ``refused`` attributes, naming each."""
    model_type = values.get("model_type")
    if model_type not in MODEL_TYPES:
        raise ConfigError(f"{where}: model_type is {shown(model_type)}; implemented are {', '.join(MODEL_TYPES)}")
    if asked := refusal(values, where):
        raise ConfigError(asked)
    required = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    missing = [name for name in required if type(values.get(name)) is not int]
    if missing:
        raise ConfigError(f"{where} has no integer for {', '.join(missing)}")
    theta, scaling = _rope(values, where)
    heads, width = values["num_attention_heads"], values["hidden_size"]
    if values.get("head_dim") is None and (heads < 1 or width % heads):
        raise ConfigError(f"{where}: hidden_size {width} is not a multiple of num_attention_heads {heads}")

    def given(name: str, default: Any) -> Any:  # null counts as absent
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
    """``key`` unchanged if it is a short identifier, else as ``shown``."""
    return key if key.isidentifier() and len(key) <= 80 else shown(key)


def _names(names: Iterable[str]) -> str:
    return ",".join(map(_name, names))


def _rope(values: Mapping[str, Any], where: str) -> tuple[Any, dict[str, Any] | None]:
    """Base and scaling of the rotary embeddings, from rope_parameters or rope_scaling; numbers are not checked yet."""
    rope, scaling = values.get("rope_parameters") or {}, values.get("rope_scaling") or {}
    if rope and scaling and rope != scaling:
        raise ConfigError(
            f"{where} has rope_parameters {shown(rope)} and rope_scaling {shown(scaling)}, which differ; remove "
            "one of them"
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
    """The config.json of ``backbone``, in the form that every version of transformers reads; the inverse of
    ``backbone_of``. ``head``: whether the model has a language-model head. ``more`` is added unchanged."""
    values = dataclasses.asdict(backbone)
    for name in ("qkv_bias", "qk_norm"):  # implied by the model type
        del values[name]
    if values["rope_scaling"] is not None:
        values["rope_scaling"] = {"rope_type": "llama3", **values["rope_scaling"]}
    family = {"llama": "Llama", "qwen2": "Qwen2", "qwen3": "Qwen3"}[backbone.model_type]
    name = f"{family}ForCausalLM" if head else f"{family}Model"
    return {"architectures": [name], **values, "hidden_act": "silu", "use_cache": True, **more}


def adapter(folder: Path) -> str:
    """The error message for a PEFT adapter in ``folder``; empty if there is none."""
    path = folder / "adapter_config.json"
    if not path.is_file():
        return ""
    if not (folder / "config.json").is_file():
        base = read_object(path).get("base_model_name_or_path")
        return (
            f"{folder} is an adapter of peft for {base if isinstance(base, str) else shown(base)}, not a model: merge "
            "it into that model (peft's merge_and_unload, then save_pretrained) and pass the merged folder"
        )
    return (
        f"{path} lies beside a model: with peft installed, transformers loads the adapter on top of it, without peft "
        "the model alone; merge the adapter (peft's merge_and_unload, then save_pretrained), or move "
        "adapter_config.json away to read the model alone"
    )


def is_base(folder: str | Path) -> bool:
    """Whether config.json in ``folder`` names a model without a language-model head."""
    names = read_object(Path(folder) / "config.json").get("architectures")
    names = names if isinstance(names, list) else []
    return bool(names) and not any("ForCausalLM" in str(name) for name in names)


def stop_tokens(folder: str | Path) -> tuple[int, ...]:
    """The end-of-sequence ids in generation_config.json, or else config.json. Raises ConfigError if neither has any."""
    for name in ("generation_config.json", "config.json"):
        path = Path(folder) / name
        ids = read_object(path).get("eos_token_id") if path.is_file() else None
        if ids is not None:
            ids = ids if isinstance(ids, list) else [ids]
            if not all(type(i) is int and 0 <= i < 2**31 for i in ids):
                raise ConfigError(f"{path}: eos_token_id is {shown(ids)}; token ids are whole numbers")
            return tuple(ids)
    raise ConfigError(f"{folder} names no eos_token_id in generation_config.json or config.json")
