"""GMSA (arXiv 2505.12215): group mean-pooling and layer semantic alignment, trained in two stages.

    X -> encoder -> H;  h̃_i = mean of H over tokens ir .. ir + r - 1, ceil(n / r) of them -> LSA -> memory
    1. autoencoding   [memory; task] -> decoder -> X        trains encoder, LSA and the vector ``task``
    2. answering      [memory; embed(Q)] -> decoder -> A    trains the decoder's part; encoder and LSA are frozen

The encoder does not read the question. docs/baselines.md lists what differs from the release.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from comi_jax.config import max_groups
from comi_jax.model import backbone as lm
from comi_jax.model.batch import Batch
from comi_jax.model.comi_memory import SCALARS, remember_segments
from comi_jax.model.costs import NOTHING, Cost, Lengths, blocks, decoder
from comi_jax.model.encoder import EncodedSegments, segments
from comi_jax.model.memory import Memory, join_memories
from comi_jax.model.shape import Architecture, Stage, decoder_specs, is_tuned, task_embedding
from comi_jax.params import Tree


def specs(arch: Architecture) -> dict[str, Any]:
    """The spec tree of encoder, LSA, decoder and the vector that asks for the context."""
    return {
        "encoder": lm.specs(arch.backbone, arch.compression.encoder_layers, embed=True, head=False),
        "lsa": lm.specs(arch.backbone, arch.compression.lsa_layers, embed=False, head=False),
        "decoder": decoder_specs(arch),
        "tasks": {"autoencoding": task_embedding(arch)},
    }


def is_trained(path: str, arch: Architecture, stage: Stage) -> bool:
    """While autoencoding encoder, LSA and the task vector; while answering the decoder's part."""
    if stage == "answering":
        return is_tuned(path, arch)
    return {"encoder": True, "lsa": arch.compression.lsa, "tasks": True}.get(path.partition("/")[0], False)


def memory_of(
    params: Tree, arch: Architecture, batch: Batch, min_rate: int, dropout_key: Array | None = None
) -> Memory:
    """Means of exactly ``batch.rate`` states, aligned; every context is encoded once, without a question."""
    plain = {"coarse": False, "fine": False, "coarse_redundancy": False, "fine_redundancy": False}
    settings = dataclasses.replace(arch.compression, exact_groups=True, **plain)
    arch = dataclasses.replace(arch, compression=settings)
    unused = dict.fromkeys(SCALARS, jnp.float32(0))  # of MIG, which plain means do not depend on
    memories = []
    for ids, length in segments(batch.context, batch.context_length, settings.segment_size):
        with jax.named_scope("encode"):
            rows = lm.embed_tokens(params["encoder"], ids.reshape(-1, ids.shape[2]), arch.dtype, arch.runtime)
            states, _ = lm.forward(params["encoder"], rows, arch.backbone, runtime=arch.runtime)
        examples = batch.rate.shape[0] * ids.shape[1]
        no_query = jnp.zeros((examples, states.shape[2]), states.dtype)  # the means do not depend on it
        part, slots = EncodedSegments(states, length, None), max_groups(ids.shape[2], min_rate)
        memories.append(remember_segments({**params, "mig": unused}, arch, part, no_query, batch.rate, slots))
    return dataclasses.replace(join_memories(memories), aux=())


def costs(arch: Architecture, lengths: Lengths, stage: Stage) -> dict[str, Cost]:
    """FLOP of one training example by part of the model."""
    backbone, settings = arch.backbone, arch.compression
    parts = settings.segments(lengths.context)
    groups = [max_groups(n, lengths.rate) for n in parts]
    encoder = sum((blocks(backbone, settings.encoder_layers, n, (True, True)) for n in parts), NOTHING)
    lsa = sum((blocks(backbone, settings.lsa_layers, m, (True, True)) for m in groups), NOTHING)
    lsa = lsa if settings.lsa else NOTHING
    memory = sum(groups)
    if stage == "autoencoding":
        rows = decoder(arch, memory + 1 + lengths.context + 1, lengths.context + 1, tuned=False)
        return {"encoder": encoder, "compression": NOTHING, "lsa": lsa, "decoder": rows}
    rows = decoder(arch, memory + lengths.query + lengths.answer, lengths.answer)
    return {"encoder": encoder.frozen, "compression": NOTHING, "lsa": lsa.frozen, "decoder": rows}
