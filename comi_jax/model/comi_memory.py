"""COMI's own part: its parameters, and the memory that the paper's section 4 makes of a context and a question."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from comi_jax.config import max_groups
from comi_jax.devices.sharding import platform
from comi_jax.kernels import dispatch
from comi_jax.model import backbone as lm
from comi_jax.model.batch import Batch
from comi_jax.model.compress import Compressed, compress
from comi_jax.model.costs import NOTHING, Cost, Lengths, blocks, decoder
from comi_jax.model.encoder import (
    Encoded,
    EncodedSegments,
    encode,
    encode_pairs,
    query_vectors,
    segments,
)
from comi_jax.model.memory import Memory, align, join_memories, join_segments
from comi_jax.model.shape import Architecture, Stage, decoder_specs, is_tuned
from comi_jax.params import ParamSpec, Tree

SCALARS = ("alpha_coarse", "beta_coarse", "alpha_fine", "beta_fine")


def specs(arch: Architecture) -> dict[str, Any]:
    """The spec tree of encoder, LSA, decoder and COMI's scalars."""
    return {
        "encoder": lm.specs(arch.backbone, arch.compression.encoder_layers, embed=True, head=False),
        "lsa": lm.specs(arch.backbone, arch.compression.lsa_layers, embed=False, head=False),
        "decoder": decoder_specs(arch),
        "mig": {name: ParamSpec((), (), getattr(arch.compression, name)) for name in SCALARS},
    }


def is_trained(path: str, arch: Architecture, stage: Stage) -> bool:
    """All of encoder and LSA, the decoder's part, and the four scalars if compression.learn_mig is set."""
    part = path.partition("/")[0]
    return {"encoder": True, "lsa": arch.compression.lsa, "mig": arch.compression.learn_mig}.get(
        part, is_tuned(path, arch)
    )


def memory_of(
    params: Tree, arch: Architecture, batch: Batch, min_rate: int, dropout_key: Array | None = None
) -> Memory:
    """The memory of a batch of token ids. A context shared by several examples is encoded once; otherwise context and
    query are encoded in one pass, with the same result.

    ``min_rate`` is the static lower bound of the rates in the batch; it sets the number of slots of a segment.
    """
    if batch.share > 1:
        encoded = encode(params, arch, batch.context, batch.context_length)
        return remember(params, arch, encoded, batch.query, batch.query_length, batch.rate, min_rate)
    memories = []
    for part in segments(batch.context, batch.context_length, arch.compression.segment_size):
        encoded, query_vector = encode_pairs(params, arch, *part, batch.query, batch.query_length)
        width = part[0].shape[2]
        memories.append(remember_segments(params, arch, encoded, query_vector, batch.rate, max_groups(width, min_rate)))
    return join_memories(memories)


def remember(
    params: Tree,
    arch: Architecture,
    encoded: Encoded,
    query: Int[Array, "B Q"],
    query_length: Int[Array, " B"],
    rate: Int[Array, " B"],
    min_rate: int,
    kept: Bool[Array, "B S"] | None = None,
) -> Memory:
    """The memory of encoded contexts for queries; B is a multiple of the number of contexts C, as in Batch. ``kept``
    tokens (of contexts that are one segment) become vectors of their own, and ``rate`` is that of the others."""
    memories = []
    for part in encoded.segments:
        query_vector = query_vectors(params, arch, part, query, query_length)
        slots = max_groups(part.states.shape[1], min_rate)
        memories.append(remember_segments(params, arch, part, query_vector, rate, slots, kept))
    return join_memories(memories)


def remember_segments(
    params: Tree,
    arch: Architecture,
    part: EncodedSegments,
    query_vector: Float[Array, "BG D"],
    rate: Int[Array, " B"],
    slots: int,
    kept: Bool[Array, "BG S"] | None = None,
) -> Memory:
    """Compress all segments of one width for each query vector into at most ``slots`` vectors, align and join them."""
    b, g = rate.shape[0], part.length.shape[1]
    out = compress_segments(params, arch, part, query_vector, rate, slots, kept)
    aligned = align(params, arch, out.memory)
    count = jnp.sum(out.mask, axis=1, dtype=jnp.int32)
    vectors, length = join_segments(aligned.reshape(b, g, slots, -1), count.reshape(b, g))
    return Memory(vectors, length, (out.aux,))


def compress_segments(
    params: Tree,
    arch: Architecture,
    part: EncodedSegments,
    query_vector: Float[Array, "BG D"],
    rate: Int[Array, " B"],
    slots: int,
    kept: Bool[Array, "BG S"] | None = None,
) -> Compressed:
    """The merged vectors of all segments of one width, one row for each segment and query vector, before the LSA."""
    (c, g), b = part.length.shape, rate.shape[0]

    def swapped(x: Array, first: int, second: int) -> Array:
        return x.reshape(c, first, second, *x.shape[1:]).swapaxes(1, 2).reshape(x.shape)

    # The questions about a segment are neighbours there, elsewhere the segments of a question.
    asked = jax.tree.map(lambda x: swapped(x, b // c, g), (query_vector, jnp.repeat(rate, g), kept))
    with jax.named_scope("compress"):
        kernels = dispatch.choose("compression", arch.runtime.kernels, part.states.dtype, platform(arch.runtime.mesh))
        out = compress(
            part.states, asked[0], part.length.reshape(-1), asked[1], params["mig"], arch.compression, slots,
            norms=part.norms, kept=asked[2], kernels=kernels, mesh=arch.runtime.mesh,
        )  # fmt: skip
        return jax.tree.map(lambda x: swapped(x, g, b // c), out)


def costs(arch: Architecture, lengths: Lengths, stage: Stage) -> dict[str, Cost]:
    """FLOP of one training example by part of the model."""
    backbone, settings = arch.backbone, arch.compression
    parts = settings.segments(lengths.context)
    groups = [max_groups(n, lengths.rate) for n in parts]
    rows = [n + lengths.query for n in parts] if settings.query_reads_context else [*parts, lengths.query]
    encoder = (blocks(backbone, settings.encoder_layers, n, (True, True)) for n in rows)
    lsa = (blocks(backbone, settings.lsa_layers, m, (True, True)) for m in groups)
    similar = 2.0 * backbone.hidden_size * sum(m**2 for m in groups)
    return {
        "encoder": sum(encoder, NOTHING),
        "compression": Cost(similar * settings.coarse * settings.coarse_redundancy),
        "lsa": sum(lsa, NOTHING) if settings.lsa else NOTHING,
        "decoder": decoder(arch, sum(groups) + lengths.query + lengths.answer, lengths.answer),
    }
