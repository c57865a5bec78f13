"""The parts of a model, their parameters, and which of them are trained."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from comi_jax.config import Backbone, Compression, Config, Lora
from comi_jax.devices import sharding
from comi_jax.model import backbone as lm
from comi_jax.model import lora as lora_module
from comi_jax.params import ParamSpec, Tree, flatten, initialize

SCALARS = ("alpha_coarse", "beta_coarse", "alpha_fine", "beta_fine")
ATTENTION_WEIGHTS = ("q", "k", "v", "o", "q_bias", "k_bias", "v_bias")


@dataclasses.dataclass(frozen=True)
class Architecture:
    """The static description of a model: shapes, COMI's switches, and how blocks are run."""

    backbone: Backbone
    compression: Compression
    lora: Lora = Lora()
    dtype: str = "float32"  # of activations
    runtime: lm.Runtime = lm.Runtime()

    def __post_init__(self):
        self.compression.check(self.backbone)

    @classmethod
    def of(cls, backbone: Backbone, config: Config) -> "Architecture":
        model = config.model
        runtime = lm.Runtime(attention=model.attention or None, kernels=model.kernels or None, remat=model.remat)
        return cls(backbone, config.compression, config.lora, config.model.dtype, runtime)

    def on(self, mesh: jax.sharding.Mesh) -> "Architecture":
        """The same model on the devices of ``mesh``."""
        return dataclasses.replace(self, runtime=dataclasses.replace(self.runtime, mesh=mesh))


def specs(arch: Architecture) -> dict[str, Any]:
    """The spec tree of the whole model."""
    tree = {
        "encoder": lm.specs(arch.backbone, arch.compression.encoder_layers, embed=True, head=False),
        "lsa": lm.specs(arch.backbone, arch.compression.lsa_layers, embed=False, head=False),
        "decoder": lm.specs(arch.backbone, arch.backbone.num_hidden_layers, embed=True, head=True),
        "mig": {name: ParamSpec((), (), getattr(arch.compression, name)) for name in SCALARS},
    }
    if arch.lora.rank:
        tree["lora"] = lora_module.specs(arch.backbone, arch.lora)
    return tree


def parts_of_backbone(arch: Architecture) -> dict[str, Tree]:
    """The spec trees of the parts that a fresh model copies from one causal LM: encoder and LSA take its first blocks,
    the decoder all of it. ``own_parameters`` makes the rest."""
    return {part: tree for part, tree in specs(arch).items() if part in ("encoder", "lsa", "decoder")}


def own_parameters(arch: Architecture, seed: int, mesh: jax.sharding.Mesh | None = None) -> dict[str, Array]:
    """The parameters of a fresh model that come from no language model, by flat path: the four scalars and randomly
    initialised adapters. With a ``mesh``, every device initialises its own shards."""
    if mesh is not None:
        make = functools.partial(own_parameters, arch, seed)
        shardings = sharding.parameters(specs(arch), mesh)
        return jax.jit(make, out_shardings={path: shardings[path] for path in jax.eval_shape(make)})()
    own: dict[str, Any] = {"mig": {name: jnp.float32(getattr(arch.compression, name)) for name in SCALARS}}
    if arch.lora.rank:
        own["lora"] = initialize(lora_module.specs(arch.backbone, arch.lora), jax.random.key(seed))
    return flatten(own)


def is_trained(path: str, arch: Architecture) -> bool:
    """Whether the parameter at ``path`` ("encoder/layers/q") is trained: all of encoder and LSA; of the decoder W_Q,
    W_K, W_V, W_O with their biases, or the adapters instead; the four scalars if compression.learn_mig is set."""
    part, _, rest = path.partition("/")
    if part == "decoder":
        return not arch.lora.rank and rest.removeprefix("layers/") in ATTENTION_WEIGHTS
    return {"encoder": True, "lsa": arch.compression.lsa, "lora": True, "mig": arch.compression.learn_mig}[part]


def frozen_dtype(path: str, arch: Architecture) -> str:
    """The dtype of the weight at ``path`` if it is frozen: the model's dtype, float32 for COMI's scalars."""
    return "float32" if path.startswith("mig/") else arch.dtype
