"""The parts of a model, their parameters, and which of them are trained."""

import functools
import zlib
from typing import Any

import jax
from jaxtyping import Array

from comi_jax.devices import sharding
from comi_jax.model import lora as lora_module
from comi_jax.model.comi_memory import SCALARS
from comi_jax.model.shape import ATTENTION_WEIGHTS, Architecture, Stage
from comi_jax.model.systems import system_of
from comi_jax.params import Tree, flatten, initialize

__all__ = [
    "ATTENTION_WEIGHTS",
    "SCALARS",
    "Architecture",
    "Stage",
    "frozen_dtype",
    "is_trained",
    "own_parameters",
    "parts_of_backbone",
    "specs",
]

FROM_BACKBONE = ("encoder", "lsa", "decoder")


def specs(arch: Architecture) -> dict[str, Any]:
    """The spec tree of the whole model."""
    tree = system_of(arch).specs(arch)
    if arch.lora.rank:
        tree["lora"] = lora_module.specs(arch.backbone, arch.lora)
    return tree


def parts_of_backbone(arch: Architecture) -> dict[str, Tree]:
    """The spec trees of the parts that a fresh model copies from one causal LM: encoder and LSA take its first blocks,
    the decoder all of it. ``own_parameters`` makes the rest."""
    return {part: tree for part, tree in specs(arch).items() if part in FROM_BACKBONE}


def own_parameters(arch: Architecture, seed: int, mesh: jax.sharding.Mesh | None = None) -> dict[str, Array]:
    """The parameters of a fresh model that come from no language model, by flat path: COMI's four scalars, randomly
    initialised adapters, learned input vectors. With a ``mesh``, every device initialises its own shards."""
    if mesh is not None:
        make = functools.partial(own_parameters, arch, seed)
        shardings = sharding.parameters(specs(arch), mesh)
        return jax.jit(make, out_shardings={path: shardings[path] for path in jax.eval_shape(make)})()
    own = {}
    for part, tree in specs(arch).items():
        if part not in FROM_BACKBONE:
            key = jax.random.key(seed)
            # The decoder's adapters keep the key that they had before there were other random parts.
            own[part] = initialize(tree, key if part == "lora" else jax.random.fold_in(key, zlib.crc32(part.encode())))
    return flatten(own)


def is_trained(path: str, arch: Architecture, stage: Stage | None = None) -> bool:
    """Whether the parameter at ``path`` ("encoder/layers/q") is trained in ``stage``; None: in any stage.

    COMI trains all of encoder and LSA; of the decoder W_Q, W_K, W_V, W_O with their biases, or the adapters instead;
    the four scalars if compression.learn_mig is set. The other systems: see their modules.
    """
    stages: tuple[Stage, ...] = ("autoencoding", "answering") if stage is None else (stage,)
    return any(system_of(arch).is_trained(path, arch, one) for one in stages)


def frozen_dtype(path: str, arch: Architecture) -> str:
    """The dtype of the weight at ``path`` if it is frozen: the model's dtype, float32 for COMI's scalars."""
    return "float32" if path.startswith("mig/") else arch.dtype
