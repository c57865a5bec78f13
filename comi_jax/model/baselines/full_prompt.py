"""The decoder fine-tuned on full prompts: nothing is compressed, [embed(X); embed(Q)] -> decoder -> answer.

It shows what the same training of the same decoder parameters reaches without compression.
"""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array

from comi_jax.model import backbone as lm
from comi_jax.model.batch import Batch
from comi_jax.model.costs import NOTHING, Cost, Lengths, decoder
from comi_jax.model.memory import Memory
from comi_jax.model.shape import Architecture, Stage, decoder_specs, is_tuned
from comi_jax.params import Tree


def specs(arch: Architecture) -> dict[str, Any]:
    """The spec tree of the decoder, the only part."""
    return {"decoder": decoder_specs(arch)}


def is_trained(path: str, arch: Architecture, stage: Stage) -> bool:
    """The decoder's part, as in every system."""
    return is_tuned(path, arch)


def memory_of(
    params: Tree, arch: Architecture, batch: Batch, min_rate: int, dropout_key: Array | None = None
) -> Memory:
    """The decoder's own embeddings of all context tokens. Rates have no effect."""
    vectors = lm.embed_tokens(params["decoder"], batch.context, arch.dtype, arch.runtime)
    return Memory(jnp.repeat(vectors, batch.share, axis=0), jnp.repeat(batch.context_length, batch.share, axis=0), ())


def costs(arch: Architecture, lengths: Lengths, stage: Stage) -> dict[str, Cost]:
    """FLOP of one training example by part of the model."""
    rows = lengths.context + lengths.query + lengths.answer
    return {"encoder": NOTHING, "compression": NOTHING, "lsa": NOTHING, "decoder": decoder(arch, rows, lengths.answer)}
