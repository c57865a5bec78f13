"""The model: encode -> compress -> align -> decode, as separate functions over one parameter tree.

    X -> encoder -> H, Q after X -> encoder -> q̄ (3)         ``encoder``: once for a context; for every question
    H, q̄ -> compress (4)-(8) -> LSA -> memory                ``remember``
    [memory; embed(Q); embed(answer)] -> decoder -> loss on the answer (9)

The tree has the parts "encoder", "lsa", "decoder", "mig" (the four scalars) and, with adapters, "lora".
A context is cut into G segments of at most S tokens; each is encoded, compressed and aligned independently.
"""

import dataclasses
from collections.abc import Sequence
from typing import no_type_check

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from comi_jax.config import max_groups
from comi_jax.devices.sharding import platform
from comi_jax.kernels import dispatch
from comi_jax.model import backbone as lm
from comi_jax.model import lora as lora_module
from comi_jax.model.architecture import Architecture
from comi_jax.model.batch import Batch
from comi_jax.model.compress import Aux, compress
from comi_jax.model.encoder import (
    Encoded,
    EncodedSegments,
    encode,
    encode_pairs,
    join_rows,
    query_vectors,
    segment_of_row,
    segments,
)
from comi_jax.params import Tree


@no_type_check
@struct.dataclass
class Memory:
    """Aligned memory vectors of all segments, in order; the first ``length`` of each row are real.

    ``aux`` has one entry for the full segments, with rows in the order of reshape(B * G), and one for the shorter last
    segments, if the width leaves any. If tokens are split over devices, its token axis is that of the encoder's rows,
    [context; query].
    """

    vectors: Float[Array, "B M D"]
    length: Int[Array, " B"]
    aux: tuple[Aux, ...]


@no_type_check
@struct.dataclass
class LossSums:
    """Sums over answer tokens, to be divided by ``tokens`` after summing over micro-batches and devices."""

    loss: Float[Array, ""]
    correct: Float[Array, ""]
    tokens: Float[Array, ""]
    vectors: Float[Array, ""] | float = 0.0  # memory vectors of the examples that have an answer


def align(params: Tree, arch: Architecture, memory: Float[Array, "B M D"]) -> Float[Array, "B M D"]:
    """The LSA over merged vectors, in the model's dtype; with compression.lsa off, the vectors themselves."""
    memory = memory.astype(arch.dtype)
    if not arch.compression.lsa:
        return memory
    with jax.named_scope("align"):
        states, _ = lm.forward(params["lsa"], memory, arch.backbone, runtime=arch.runtime)
        return lm.split_columns(states, arch.runtime)


def join_segments(
    memory: Float[Array, "B G M D"], count: Int[Array, "B G"]
) -> tuple[Float[Array, "B GM D"], Int[Array, " B"]]:
    """The first count[b, g] vectors of each segment, concatenated without gaps."""
    batch, segments, slots, width = memory.shape
    ends = jnp.cumsum(count, axis=1)
    position = jnp.arange(segments * slots, dtype=jnp.int32)
    segment = jax.vmap(lambda e: jnp.searchsorted(e, position, side="right"))(ends)
    segment = jnp.minimum(segment, segments - 1)
    within = position[None, :] - jnp.take_along_axis(ends - count, segment, axis=1)
    source = segment * slots + jnp.clip(within, 0, slots - 1)
    flat = memory.reshape(batch, segments * slots, width)
    return jnp.take_along_axis(flat, source[:, :, None], axis=1), ends[:, -1]


def memory_of(params: Tree, arch: Architecture, batch: Batch, min_rate: int) -> Memory:
    """The memory of a batch of token ids. A context shared by several examples is encoded once; otherwise context and
    query are encoded in one pass, with the same result.

    ``min_rate`` is the static lower bound of the rates in the batch; it sets the number of slots of a segment.
    """
    if batch.share > 1:
        encoded = encode(params, arch, batch.context, batch.context_length, room=batch.query.shape[1])
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
) -> Memory:
    """The memory of encoded contexts for queries; B is a multiple of the number of contexts C, as in Batch."""
    memories = []
    for part in encoded.segments:
        query_vector = query_vectors(params, arch, part, query, query_length)
        slots = max_groups(part.states.shape[1], min_rate)
        memories.append(remember_segments(params, arch, part, query_vector, rate, slots))
    return join_memories(memories)


def remember_segments(
    params: Tree,
    arch: Architecture,
    part: EncodedSegments,
    query_vector: Float[Array, "BG D"],
    rate: Int[Array, " B"],
    slots: int,
) -> Memory:
    """Compress all segments of one width for each query vector into at most ``slots`` vectors, align and join them."""
    b, g = rate.shape[0], part.length.shape[1]
    states, lengths = part.states, part.length.reshape(-1)
    if states.shape[0] < b * g:
        segment = segment_of_row(part, b)
        states, lengths = states[segment], lengths[segment]
    with jax.named_scope("compress"):
        kernels = dispatch.choose("compression", arch.runtime.kernels, states.dtype, platform(arch.runtime.mesh))
        out = compress(
            states, query_vector, lengths, jnp.repeat(rate, g, axis=0), params["mig"], arch.compression, slots,
            kernels=kernels, mesh=arch.runtime.mesh,
        )  # fmt: skip
    aligned = align(params, arch, out.memory)
    count = jnp.sum(out.mask, axis=1, dtype=jnp.int32)
    vectors, length = join_segments(aligned.reshape(b, g, slots, -1), count.reshape(b, g))
    return Memory(vectors, length, (out.aux,))


def join_memories(memories: Sequence[Memory]) -> Memory:
    """Memories of the same rows, concatenated without gaps."""
    memory, *rest = memories
    for last in rest:
        vectors, length = join_rows(memory.vectors, memory.length, last.vectors, last.length)
        memory = Memory(vectors, length, (*memory.aux, *last.aux))
    return memory


def prompt(
    params: Tree, arch: Architecture, memory: Memory, batch: Batch
) -> tuple[Float[Array, "B T D"], Int[Array, " B"]]:
    """The decoder's prompt, [memory; embed(Q)], and its length."""
    query = lm.embed_tokens(params["decoder"], batch.query, arch.dtype, arch.runtime)
    return join_rows(memory.vectors.astype(arch.dtype), memory.length, query, batch.query_length)


def adapters(params: Tree, arch: Architecture, dropout_key: Array | None = None) -> lora_module.Adapters | None:
    """The decoder's adapters, or None if the model has none."""
    return lora_module.adapters(params["lora"], arch.lora, dropout_key) if arch.lora.rank else None


def answer_logits(
    params: Tree, arch: Architecture, memory: Memory, batch: Batch, dropout_key: Array | None = None
) -> Float[Array, "B A V"]:
    """The logits that predict each answer token from memory, query and the preceding answer tokens."""
    with jax.named_scope("decode"):
        before, length = prompt(params, arch, memory, batch)
        answer = lm.embed_tokens(params["decoder"], batch.answer, arch.dtype, arch.runtime)
        rows, _ = join_rows(before, length, answer, batch.answer_length)
        rows = jnp.pad(rows, ((0, 0), (0, -rows.shape[1] % arch.runtime.context_shards), (0, 0)))
        rows = lm.split_columns(rows, arch.runtime)
        lora = adapters(params, arch, dropout_key)
        states, _ = lm.forward(params["decoder"], rows, arch.backbone, lora=lora, runtime=arch.runtime)
        predicts = length[:, None] - 1 + jnp.arange(batch.answer.shape[1], dtype=jnp.int32)[None, :]
        states = jnp.take_along_axis(states, predicts[:, :, None], axis=1)
        return lm.logits(params["decoder"], states)


def loss(params: Tree, arch: Architecture, batch: Batch, min_rate: int, dropout_key: Array | None = None) -> LossSums:
    """(9): next-token cross-entropy on the answer tokens, summed, and the number of correct predictions."""
    memory = memory_of(params, arch, batch, min_rate)
    scores = answer_logits(params, arch, memory, batch, dropout_key)
    vectors = jnp.sum(jnp.where(batch.answer_length > 0, memory.length, 0).astype(scores.dtype))
    return dataclasses.replace(sum_loss(scores, batch.answer, batch.answer_length), vectors=vectors)


def sum_loss(scores: Float[Array, "B A V"], answer: Int[Array, "B A"], length: Int[Array, " B"]) -> LossSums:
    """Cross-entropy of ``answer`` under ``scores``, over each row's first ``length`` tokens."""
    real: Bool[Array, "B A"] = jnp.arange(answer.shape[1])[None, :] < length[:, None]
    log_probability = jax.nn.log_softmax(scores, axis=-1)
    nll = -jnp.take_along_axis(log_probability, answer[:, :, None], axis=2)[:, :, 0]
    right = jnp.argmax(scores, axis=-1).astype(answer.dtype) == answer
    return LossSums(
        loss=jnp.sum(jnp.where(real, nll, 0.0)),
        correct=jnp.sum((real & right).astype(scores.dtype)),
        tokens=jnp.sum(real.astype(scores.dtype)),
    )
