"""Adapters in PEFT's folder format, which transformers and serving engines load on top of the decoder.

y = x Wᵀ + (lora_alpha / r) x Aᵀ Bᵀ      lora_A.weight [r, in], lora_B.weight [out, r]
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from comi_jax.model.architecture import Architecture
from comi_jax.weights import writing
from comi_jax.weights.official import adapter_sources

PREFIX = "base_model.model."  # of every tensor name in an adapter of a causal LM


def save_adapter(folder: Path, arch: Architecture, arrays: Mapping[str, Any], dtype: Any = None) -> int:
    """Write the adapters in ``arrays`` (flat paths, "lora/q/a") to the new ``folder``. If ``dtype`` is None, each array
    keeps its own. Returns the bytes of the tensors."""
    folder.mkdir(parents=True)
    sources = adapter_sources(arch, PREFIX + "model.layers.{layer}.self_attn.{target}_proj.lora_{part}.weight")
    held = {path: array for path, array in arrays.items() if path in sources}
    tensors = list(writing.writables(sources, held, dtype))
    writing.save_file(folder / "adapter_model.safetensors", tensors)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "../decoder",
        "r": arch.lora.rank,
        "lora_alpha": arch.lora.alpha,
        "lora_dropout": arch.lora.dropout,
        "target_modules": [f"{target}_proj" for target in arch.lora.targets],
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return sum(tensor.bytes for tensor in tensors)
