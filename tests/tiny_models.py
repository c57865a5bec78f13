"""Tiny models that the tests share: a backbone of each kind, random weights without neutral values, their twins."""

import jax.numpy as jnp
import numpy as np

from comi_jax.backbone import Backbone, Llama3Rope
from comi_jax.config import Compression, Lora
from comi_jax.model.architecture import Architecture
from comi_jax.params import flatten, unflatten

_SHARED = {
    "vocab_size": 61, "hidden_size": 32, "intermediate_size": 56, "num_hidden_layers": 3, "num_attention_heads": 4,
    "rms_norm_eps": 1e-5, "max_position_embeddings": 512,
}  # fmt: skip
_SCALING = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}

BACKBONES = {
    "llama2": Backbone(
        model_type="llama", num_key_value_heads=4, head_dim=8, rope_theta=10_000.0, rope_scaling=None,
        tie_word_embeddings=False, qkv_bias=False, qk_norm=False, **_SHARED,
    ),
    "llama3": Backbone(
        model_type="llama", num_key_value_heads=2, head_dim=8, rope_theta=5e5, rope_scaling=Llama3Rope(**_SCALING),
        tie_word_embeddings=True, qkv_bias=False, qk_norm=False, **_SHARED,
    ),
    "qwen2": Backbone(
        model_type="qwen2", num_key_value_heads=2, head_dim=8, rope_theta=1e6, rope_scaling=None,
        tie_word_embeddings=False, qkv_bias=True, qk_norm=False, **_SHARED,
    ),
    "qwen3": Backbone(
        model_type="qwen3", num_key_value_heads=2, head_dim=12, rope_theta=5e6, rope_scaling=None,
        tie_word_embeddings=True, qkv_bias=False, qk_norm=True, **_SHARED,
    ),
}  # fmt: skip


def shaken(specs, seed=0):
    """Random weights for ``specs`` in which no bias is 0 and no norm 1, so that leaving one out shows."""
    rng = np.random.default_rng(seed)

    def draw(spec):
        noise = rng.standard_normal(spec.shape)
        value = noise * spec.fan_in**-0.5 if spec.init == "normal" else spec.init + 0.2 * noise
        return jnp.asarray(value, jnp.float32)

    return unflatten({path: draw(spec) for path, spec in flatten(specs).items()})


def architecture(kind="qwen2", lora=0, **compression):
    """A COMI architecture on a tiny backbone: 2 encoder layers, 1 LSA layer, rates 2 and 4 unless told otherwise."""
    settings = {"rates": (2, 4), "encoder_layers": 2, "lsa_layers": 1, "segment_size": 64} | compression
    return Architecture(BACKBONES[kind], Compression(**settings), Lora(rank=lora, alpha=4.0, dropout=0.5))


def transformers_config(kind):
    """transformers' configuration of the same model."""
    import transformers

    backbone = BACKBONES[kind]
    rope = {"rope_type": "default", "rope_theta": backbone.rope_theta}
    if backbone.rope_scaling is not None:
        rope |= {"rope_type": "llama3"} | _SCALING
    cls = {"llama": "LlamaConfig", "qwen2": "Qwen2Config", "qwen3": "Qwen3Config"}[backbone.model_type]
    return getattr(transformers, cls)(
        **_SHARED,
        num_key_value_heads=backbone.num_key_value_heads,
        head_dim=backbone.head_dim,
        rope_parameters=rope,
        tie_word_embeddings=backbone.tie_word_embeddings,
        bos_token_id=1,
        eos_token_id=2,
    )


def transformers_model(kind, seed=0):
    """transformers' model, float32, every parameter shaken."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(transformers_config(kind), attn_implementation="eager").float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model
