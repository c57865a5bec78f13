"""The decoder fine-tuned on full prompts: nothing is compressed, [embed(X); embed(Q)] -> decoder -> answer.

It shows what the same training of the same decoder parameters reaches without compression. A context that several
examples share is read once, and they continue its keys and values.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from comi_jax.model import backbone as lm
from comi_jax.model import lora
from comi_jax.model.batch import Batch
from comi_jax.model.cache import ContextKV, empty_cache
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
    """The decoder's own embeddings of all context tokens, or its keys and values of shared ones. Rates have no
    effect."""
    decoder, (contexts, width) = params["decoder"], batch.context.shape
    vectors = lm.embed_tokens(decoder, batch.context, arch.dtype, arch.runtime)
    if batch.share == 1:
        return Memory(vectors, batch.context_length, ())
    adapters = None
    if arch.lora.rank:
        key = None if dropout_key is None else jax.random.fold_in(dropout_key, 1)
        adapters = lora.adapters(params["lora"], arch.lora, key)
    cache = empty_cache(arch.backbone, arch.backbone.num_hidden_layers, contexts, width, arch.dtype)
    _, cache = lm.forward(decoder, vectors, arch.backbone, cache=cache, lora=adapters, runtime=arch.runtime)
    assert cache is not None  # forward returns what it was given, written
    nothing = jnp.zeros((batch.query.shape[0], 0, vectors.shape[2]), vectors.dtype)
    before = ContextKV(cache.k, cache.v, batch.context_length)
    return Memory(nothing, jnp.zeros_like(batch.query_length), (), before)


def costs(arch: Architecture, lengths: Lengths, stage: Stage) -> dict[str, Cost]:
    """FLOP of one training example by part of the model."""
    rows = lengths.context + lengths.query + lengths.answer
    return {"encoder": NOTHING, "compression": NOTHING, "lsa": NOTHING, "decoder": decoder(arch, rows, lengths.answer)}
