"""The static description of a model: which system it is, its shapes and switches, and how blocks are run."""

import dataclasses
from typing import Any, Literal

import jax

from comi_jax.backbone import Backbone
from comi_jax.config import Beacon, Compression, Config, Icae, Lora
from comi_jax.model import backbone as lm
from comi_jax.params import ParamSpec

ATTENTION_WEIGHTS = ("q", "k", "v", "o", "q_bias", "k_bias", "v_bias")

# What the decoder is trained to write: the context itself from its memory, or the answer to the question.
Stage = Literal["autoencoding", "answering"]


@dataclasses.dataclass(frozen=True)
class Architecture:
    """The static description of a model."""

    backbone: Backbone
    compression: Compression
    lora: Lora = Lora()
    dtype: str = "float32"  # of activations
    runtime: lm.Runtime = lm.Runtime()
    system: str = "comi"  # one of config.SYSTEMS
    icae: Icae = Icae()
    beacon: Beacon = Beacon()

    def __post_init__(self):
        self.compression.check(self.backbone)

    @classmethod
    def of(cls, backbone: Backbone, config: Config) -> "Architecture":
        model = config.model
        runtime = lm.Runtime(attention=model.attention or None, kernels=model.kernels or None, remat=model.remat)
        own = config.system, config.icae, config.beacon
        return cls(backbone, config.compression, config.lora, model.dtype, runtime, *own)

    def on(self, mesh: jax.sharding.Mesh) -> "Architecture":
        """The same model on the devices of ``mesh``."""
        return dataclasses.replace(self, runtime=dataclasses.replace(self.runtime, mesh=mesh))


def decoder_specs(arch: Architecture) -> dict[str, Any]:
    """The spec tree of the decoder, which is the whole language model."""
    return lm.specs(arch.backbone, arch.backbone.num_hidden_layers, embed=True, head=True)


def is_tuned(path: str, arch: Architecture) -> bool:
    """Whether the parameter at ``path`` is one of the decoder's trained ones, the same for every system: W_Q, W_K, W_V,
    W_O with their biases, or the adapters instead."""
    if path.startswith("lora/"):
        return True
    inside = path.removeprefix("decoder/layers/")
    return inside != path and not arch.lora.rank and inside in ATTENTION_WEIGHTS


def task_embedding(arch: Architecture) -> ParamSpec:
    """A learned input vector of the decoder that says which task follows the memory."""
    width = arch.backbone.hidden_size
    return ParamSpec((width,), ("embed",), "normal", width)
