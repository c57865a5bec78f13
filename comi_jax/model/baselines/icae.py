"""ICAE (arXiv 2307.06945): learned memory tokens read a segment, and their states are its memory.

    [embed(X); memory tokens] -> language model with adapters -> states of the memory tokens = memory
    1. autoencoding   [memory; task 1] -> decoder -> X           trains adapters, memory tokens and task vectors
    2. answering      [memory; task 2; embed(Q)] -> decoder -> A      trains these and the decoder's part

A segment of n tokens at rate r has ceil(n / r) memory tokens. docs/baselines.md lists what differs from the release.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from comi_jax.config import max_groups
from comi_jax.model import backbone as lm
from comi_jax.model import costs as count
from comi_jax.model import lora
from comi_jax.model.batch import Batch
from comi_jax.model.costs import NOTHING, Cost, Lengths, blocks
from comi_jax.model.encoder import EncodedSegments, join_rows, segment_of_row, segments
from comi_jax.model.memory import Memory, join_memories, join_segments
from comi_jax.model.shape import Architecture, Stage, decoder_specs, is_tuned, task_embedding
from comi_jax.params import ParamSpec, Tree


def specs(arch: Architecture) -> dict[str, Any]:
    """The spec tree of the encoder, which is a whole language model, its adapters, memory tokens, decoder and tasks."""
    backbone, settings = arch.backbone, arch.icae
    width = backbone.hidden_size
    return {
        "encoder": lm.specs(backbone, backbone.num_hidden_layers, embed=True, head=False),
        "encoder_lora": lora.specs(backbone, settings.lora),
        "memory_tokens": {"embed": ParamSpec((settings.memory_tokens, width), (None, "embed"), "normal", width)},
        "decoder": decoder_specs(arch),
        "tasks": {"autoencoding": task_embedding(arch), "answering": task_embedding(arch)},
    }


def is_trained(path: str, arch: Architecture, stage: Stage) -> bool:
    """The encoder's adapters, the memory tokens and the stage's task vector; while answering the decoder's part too."""
    if path.startswith(("encoder_lora/", "memory_tokens/", f"tasks/{stage}")):
        return True
    return stage == "answering" and is_tuned(path, arch)


def memory_of(
    params: Tree, arch: Architecture, batch: Batch, min_rate: int, dropout_key: Array | None = None
) -> Memory:
    """The states of the memory tokens after each segment; a context is encoded once for all its examples.

    In a causal encoder a memory token does not depend on those after it, so that every example of a context takes the
    first ceil(n / r) of the same states.
    """
    key = None if dropout_key is None else jax.random.fold_in(dropout_key, 1)
    adapters = lora.adapters(params["encoder_lora"], arch.icae.lora, key)
    tokens = params["memory_tokens"]["embed"].astype(arch.dtype)
    share, memories = batch.share, []
    for ids, length in segments(batch.context, batch.context_length, arch.compression.segment_size):
        slots = min(max_groups(ids.shape[2], min_rate), tokens.shape[0])
        with jax.named_scope("encode"):
            x = lm.embed_tokens(params["encoder"], ids.reshape(-1, ids.shape[2]), arch.dtype, arch.runtime)
            lengths, last = length.reshape(-1), jnp.broadcast_to(tokens[None, :slots], (x.shape[0], slots, x.shape[2]))
            rows, _ = join_rows(x, lengths, last, jnp.full_like(lengths, slots))
            states, _ = lm.forward(params["encoder"], rows, arch.backbone, lora=adapters, runtime=arch.runtime)
            at = lengths[:, None] + jnp.arange(slots, dtype=jnp.int32)[None, :]
            read = jnp.take_along_axis(states, at[:, :, None], axis=1)
        part = EncodedSegments(states, length, None)
        read = read[segment_of_row(part, batch.rate.shape[0])].reshape(batch.rate.shape[0], -1, *read.shape[1:])
        vectors, kept = join_segments(read, -(-jnp.repeat(length, share, axis=0) // batch.rate[:, None]))
        memories.append(Memory(vectors, kept, ()))
    return join_memories(memories)


def costs(arch: Architecture, lengths: Lengths, stage: Stage) -> dict[str, Cost]:
    """FLOP of one training example by part of the model."""
    backbone = arch.backbone
    slots = [max_groups(n, lengths.rate) for n in arch.compression.segments(lengths.context)]
    rows = [n + m for n, m in zip(arch.compression.segments(lengths.context), slots, strict=True)]
    encoder = (
        blocks(backbone, backbone.num_hidden_layers, n, (False, False)) + count.adapters(backbone, arch.icae.lora, n)
        for n in rows
    )
    if stage == "autoencoding":
        decoder = count.decoder(arch, sum(slots) + 1 + lengths.context + 1, lengths.context + 1, tuned=False)
    else:
        decoder = count.decoder(arch, sum(slots) + 1 + lengths.query + lengths.answer, lengths.answer)
    return {"encoder": sum(encoder, NOTHING), "compression": NOTHING, "lsa": NOTHING, "decoder": decoder}
