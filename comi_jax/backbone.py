"""The shape of a language model, from which encoder, LSA and decoder are made. ``model.backbone`` computes it."""

from dataclasses import dataclass

from comi_jax.checks import require


@dataclass(frozen=True)
class Llama3Rope:
    """LLaMA-3.1's frequency scaling of rotary embeddings (Hugging Face's ``rope_type: llama3``)."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int

    def __post_init__(self):
        require(
            self.factor > 0 and 0 < self.low_freq_factor < self.high_freq_factor,
            f"the backbone's rope_scaling has factor {self.factor} and frequency factors {self.low_freq_factor} and "
            f"{self.high_freq_factor}; they must be positive, and the high one above the low one",
        )


@dataclass(frozen=True)
class Backbone:
    """The shape of a causal language model, in the names of Hugging Face's config.json (see ``weights.hf_config``)."""

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: Llama3Rope | None
    max_position_embeddings: int
    tie_word_embeddings: bool
    qkv_bias: bool
    qk_norm: bool

    def __post_init__(self):
        for name in (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "num_key_value_heads",
            "head_dim",
            "max_position_embeddings",
            "rope_theta",
            "rms_norm_eps",
        ):
            require(getattr(self, name) > 0, f"the backbone's {name} is {getattr(self, name)}; it must be positive")
        require(
            self.num_attention_heads % self.num_key_value_heads == 0,
            f"the backbone has {self.num_attention_heads} attention heads over {self.num_key_value_heads} key/value "
            "heads; the number of attention heads must be a multiple of the number of key/value heads",
        )
        require(
            self.head_dim % 2 == 0, f"the backbone's head_dim is {self.head_dim}; rotary embeddings need an even one"
        )
