"""The encoder: contexts encoded once, and the query vector of each question.

X -> encoder -> H            Q after X -> encoder -> q̄ = mean(Hq) (3)
"""

from typing import no_type_check

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Float, Int

from comi_jax.model import backbone as lm
from comi_jax.model import mig
from comi_jax.model.cache import ContextKV, KVCache, empty_cache
from comi_jax.model.shape import Architecture
from comi_jax.params import Tree


@no_type_check
@struct.dataclass
class EncodedSegments:
    """Encoder states of all segments of one width S: one row per segment, those of a context in order."""

    states: Float[Array, "CG S D"]  # undefined beyond a segment's length
    length: Int[Array, "C G"]
    cache: KVCache | None  # for encoding queries later; without it, queries are encoded without their context
    norms: mig.Norms | None = None  # of the states, if computed already


@no_type_check
@struct.dataclass
class Encoded:
    """Encoded contexts: the full segments, then the shorter last segments, if the width leaves any. They do not depend
    on the query, as a causal encoder reads the context first."""

    segments: tuple[EncodedSegments, ...]


def join_rows(
    first: Array, first_length: Int[Array, " B"], second: Array, second_length: Int[Array, " B"]
) -> tuple[Array, Int[Array, " B"]]:
    """Rows [first | second | padding] from two right-padded arrays [B, X, ...] and [B, Y, ...]."""
    x, y = first.shape[1], second.shape[1]
    position = jnp.arange(x + y, dtype=jnp.int32)[None, :]
    behind = position - first_length[:, None]
    source = jnp.where(behind < 0, position, x + jnp.minimum(behind, y - 1))
    source = source.reshape(source.shape + (1,) * (first.ndim - 2))
    return jnp.take_along_axis(jnp.concatenate([first, second], axis=1), source, axis=1), first_length + second_length


def masked_mean(states: Float[Array, "B T D"], first: Int[Array, " B"], count: Int[Array, " B"]) -> Float[Array, "B D"]:
    """(3): the mean of states[first : first + count] of each row, in float32 at least."""
    position = jnp.arange(states.shape[1])[None, :]
    inside = (position >= first[:, None]) & (position < (first + count)[:, None])
    wide = jnp.where(inside[:, :, None], states.astype(np.promote_types(states.dtype, jnp.float32)), 0.0)
    return jnp.sum(wide, axis=1) / jnp.maximum(count, 1).astype(wide.dtype)[:, None]


def encode(params: Tree, arch: Architecture, context: Int[Array, "C X"], context_length: Int[Array, " C"]) -> Encoded:
    """Encode contexts without a query: the states, and the encoder's keys and values, from which queries continue."""
    parts = []
    with jax.named_scope("encode"):
        for ids, length in segments(context, context_length, arch.compression.segment_size):
            width = ids.shape[2]
            rows = ids.reshape(-1, width)
            cache = empty_cache(arch.backbone, arch.compression.encoder_layers, rows.shape[0], width, arch.dtype)
            x = lm.embed_tokens(params["encoder"], rows, arch.dtype, arch.runtime)
            states, cache = lm.forward(params["encoder"], x, arch.backbone, cache=cache, runtime=arch.runtime)
            parts.append(EncodedSegments(states, length, cache if arch.compression.query_reads_context else None))
    return Encoded(tuple(parts))


def query_vectors(
    params: Tree,
    arch: Architecture,
    part: EncodedSegments,
    query: Int[Array, "B Q"],
    query_length: Int[Array, " B"],
) -> Float[Array, "BG D"]:
    """The query vector q̄ (3) of each query, encoded after each segment of its context: all queries about a context
    attend to one copy of its keys and values. Without these, the query is encoded on its own: an approximation, unless
    the model was trained so (compression.query_reads_context=false)."""
    (c, g), (b, width) = part.length.shape, query.shape
    share, context = b // c, None
    if part.cache is not None:
        context = ContextKV(part.cache.k, part.cache.v, part.length.reshape(-1))
        # Rows in the order of context, segment, query, so that those of a segment are neighbours.
        query = jnp.broadcast_to(query.reshape(c, 1, share, width), (c, g, share, width)).reshape(-1, width)
    lengths = query_length if context is None else jnp.repeat(query_length.reshape(c, 1, share), g, axis=1).reshape(-1)
    with jax.named_scope("encode"):
        x = lm.embed_tokens(params["encoder"], query, arch.dtype, arch.runtime)
        states, _ = lm.forward(params["encoder"], x, arch.backbone, context=context, runtime=arch.runtime)
        vectors = masked_mean(states, jnp.zeros_like(lengths), lengths)
    if context is None:
        return jnp.repeat(vectors, g, axis=0)
    return vectors.reshape(c, g, share, -1).swapaxes(1, 2).reshape(b * g, -1)


def encode_pairs(
    params: Tree,
    arch: Architecture,
    context: Int[Array, "C G S"],
    context_length: Int[Array, "C G"],
    query: Int[Array, "C Q"],
    query_length: Int[Array, " C"],
) -> tuple[EncodedSegments, Float[Array, "CG D"]]:
    """``encode`` and ``query_vectors`` for one query per context, in one causal pass over [segment; query] without a
    cache.

    If the tokens of a row are split over devices, the states keep the query's positions, as slicing them off would move
    states between devices.
    """
    encoder, shards, width = params["encoder"], arch.runtime.context_shards, context.shape[2]
    alone = query, query_length
    query, query_length = (jnp.repeat(x, context.shape[1], axis=0) for x in (query, query_length))
    lengths = context_length.reshape(-1)
    with jax.named_scope("encode"):
        rows, _ = join_rows(context.reshape(-1, width), lengths, query, query_length)
        rows = jnp.pad(rows, ((0, 0), (0, -rows.shape[1] % shards)))
        x = lm.embed_tokens(encoder, rows, arch.dtype, arch.runtime)
        states, _ = lm.forward(encoder, x, arch.backbone, runtime=arch.runtime)
        query_vector = masked_mean(states, lengths, query_length)
        part = EncodedSegments(states if shards > 1 else states[:, :width], context_length, None)
    if not arch.compression.query_reads_context:
        query_vector = query_vectors(params, arch, part, *alone)
    return part, query_vector


def segments(
    context: Int[Array, "C X"], context_length: Int[Array, " C"], size: int
) -> list[tuple[Int[Array, "C G S"], Int[Array, "C G"]]]:
    """Contexts cut after every ``size`` tokens, with the lengths of the segments: first all full segments, then, if the
    width is no multiple of ``size``, the shorter last one. A segment beyond the end of a context has length 0."""
    c, width = context.shape
    whole = width - width % size
    parts = []
    for first, end, length in ((0, whole, size), (whole, width, width - whole)):
        if first < end:
            ids = context[:, first:end].reshape(c, -1, length)
            starts = jnp.arange(first, end, length, dtype=jnp.int32)[None, :]
            parts.append((ids, jnp.clip(context_length[:, None] - starts, 0, length)))
    return parts


def segment_of_row(part: EncodedSegments, examples: int) -> Int[Array, " BG"]:
    """The row index into ``part`` for each segment of each example's context."""
    c, g = part.length.shape
    return jnp.repeat(jnp.arange(c * g).reshape(c, g), examples // c, axis=0).reshape(-1)
