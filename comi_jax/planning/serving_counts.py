"""The four ways to answer questions about one text, counted from shapes: the rows of ``benchmarks.serving``.

    re-read         the decoder reads the whole text for every question
    prefix cache    it reads the text once, and its keys and values are kept
    COMI            the text is encoded and compressed for every question, or what the encoder made of it is kept

A pass takes at least max(FLOP / peak, bytes / bandwidth), of its model FLOP and of the weights and caches that it
reads. First tokens are those of one question at a time, further ones those of a batch, each with a text of its own.
"""

import dataclasses
from dataclasses import dataclass

import jax.numpy as jnp

from comi_jax.backbone import Backbone
from comi_jax.config import Config
from comi_jax.devices.chips import Chip
from comi_jax.model import flops
from comi_jax.model.architecture import Architecture
from comi_jax.model.costs import Lengths, attention_weights, head, mlp_weights

BATCHES = (1, 16)  # questions that are decoded at once


@dataclass(frozen=True)
class Pass:
    """One pass of a model on one chip."""

    flop: float
    read: int  # bytes: weights and caches

    def seconds(self, chip: Chip) -> float:
        """The time it takes at least."""
        return max(self.flop / chip.flops, self.read / chip.bandwidth)


@dataclass(frozen=True)
class Way:
    """A way to answer questions about one text."""

    name: str
    first: Pass  # from the text and the first question to its first token
    further: Pass  # from a further question to its first token
    token: dict[int, Pass]  # a further token of all questions of a batch, by its size
    kept: int  # bytes, for further questions


def ways(config: Config, backbone: Backbone) -> list[Way]:
    """The ways for a text, a question and an answer as long as ``config`` allows, COMI at each of its rates."""
    arch, data, new = Architecture.of(backbone, config), config.data, config.generation.max_new_tokens
    context, query = data.max_context, data.max_query
    whole = _first(arch, context, query, 0.0, 0)
    after = Pass(flops.read(arch, context, query) + _head(arch), _decoder(arch) + prefix_bytes(arch, context))
    decoded = _tokens(arch, context + query, new)
    found = [
        Way("re-read", whole, whole, decoded, 0),
        Way("prefix cache", whole, after, decoded, prefix_bytes(arch, context)),
    ]
    for rate in sorted(set(arch.compression.rates)):
        lengths = Lengths(context, query, 0, rate)
        vectors, compress = flops.memory_length(arch, lengths), flops.compress(arch, lengths)
        ingest = flops.by_part(arch, dataclasses.replace(lengths, query=0))["encoder"].forward
        weights, kept = _compressor(arch), document_bytes(arch, context)
        anew = _first(arch, vectors, query, compress, weights)
        again = _first(arch, vectors, query, compress - ingest, weights + kept)
        decoded = _tokens(arch, vectors + query, new)
        found.append(Way(f"COMI, encoding each time, rate {rate}", anew, anew, decoded, 0))
        found.append(Way(f"COMI, kept, rate {rate}", anew, again, decoded, kept))
    return found


def prefix_bytes(arch: Architecture, tokens: int) -> int:
    """The bytes of the decoder's keys and values of ``tokens``."""
    backbone = arch.backbone
    return tokens * backbone.num_hidden_layers * _key_value(arch)


def document_bytes(arch: Architecture, tokens: int) -> int:
    """The bytes that a document of ``tokens`` keeps: states, norms and, if questions read them, the encoder's keys and
    values."""
    width, settings = jnp.dtype(arch.dtype).itemsize, arch.compression
    states, norms = arch.backbone.hidden_size * width, width + 4  # 1/norm is float32
    return tokens * (states + norms + settings.query_reads_context * settings.encoder_layers * _key_value(arch))


def _key_value(arch: Architecture) -> int:
    """The bytes of a token's keys and values in one layer."""
    return 2 * arch.backbone.num_key_value_heads * arch.backbone.head_dim * jnp.dtype(arch.dtype).itemsize


def _first(arch: Architecture, entries: int, query: int, before: float, read: int) -> Pass:
    """From ``entries``, text or memory, and a question to the first token; ``before`` are the FLOP from text to memory,
    and ``read`` the bytes that they need."""
    return Pass(before + flops.read(arch, 0, entries + query) + _head(arch), read + _decoder(arch))


def _tokens(arch: Architecture, entries: int, new: int) -> dict[int, Pass]:
    """A further token of a batch, on average over an answer of ``new`` tokens behind ``entries``."""
    before = entries + new // 2
    each, cache = flops.read(arch, before, 1) + _head(arch), prefix_bytes(arch, before)
    return {batch: Pass(batch * each, _decoder(arch) + batch * cache) for batch in BATCHES}


def _head(arch: Architecture) -> float:
    return head(arch.backbone, 1).forward


def _decoder(arch: Architecture) -> int:
    """The bytes of the decoder's blocks and vocabulary projection. Of the embeddings, few rows are read."""
    return _blocks(arch, arch.backbone.num_hidden_layers) + _bytes(
        arch, arch.backbone.hidden_size * arch.backbone.vocab_size
    )


def _compressor(arch: Architecture) -> int:
    """The bytes of the blocks of encoder and LSA."""
    settings = arch.compression
    return _blocks(arch, settings.encoder_layers + settings.lsa_layers * settings.lsa)


def _blocks(arch: Architecture, layers: int) -> int:
    return _bytes(arch, layers * (attention_weights(arch.backbone) + mlp_weights(arch.backbone)))


def _bytes(arch: Architecture, parameters: int) -> int:
    return parameters * jnp.dtype(arch.dtype).itemsize
