"""The ways to answer questions about one text, counted from shapes, of every kind of system.

    re-read         the decoder reads the whole text for every question
    prefix cache    it reads the text once, and its keys and values are kept
    a trained one   the text is encoded and compressed for every question, or what does not depend on it is kept
    fewer tokens    it reads n / r tokens of the text (truncation, BM25; a program that shortens texts is not counted)
    fewer entries   it reads the whole text and keeps n / r entries of it: chosen with the question (SnapKV), so for
                    every question, or without it (StreamingLLM, SnapKV), so once

A pass takes at least max(FLOP / peak, bytes / bandwidth), of its model FLOP and of the weights and caches that it
reads. First tokens are those of one question at a time, further ones those of a batch, each with a text of its own.
"""

import dataclasses
from dataclasses import dataclass

import jax.numpy as jnp

from comi_jax.backbone import Backbone
from comi_jax.config import Config, max_groups
from comi_jax.devices.chips import Chip
from comi_jax.model import architecture, flops
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
    """The ways for a text, a question and an answer as long as ``config`` allows, those with a rate at each of its
    rates; of the trained systems, the one of ``config``."""
    arch, data, new = Architecture.of(backbone, config), config.data, config.generation.max_new_tokens
    context, query = data.max_context, data.max_query
    whole, decoded = _first(arch, context, query), _tokens(arch, context + query, new)
    found = [
        Way("re-read", whole, whole, decoded, 0),
        Way("prefix cache", whole, _after(arch, context, query), decoded, prefix_bytes(arch, context)),
    ]
    for rate in sorted(set(arch.compression.rates)):
        if config.system != "full_prompt":
            found += _trained(arch, Lengths(context, query, 0, rate), config.title, new)
        entries = max_groups(context, rate)
        short, decoded = _first(arch, entries, query), _tokens(arch, entries + query, new)
        again, kept = _after(arch, entries, query), prefix_bytes(arch, entries)
        once = Pass(flops.read(arch, 0, context) + again.flop, _decoder(arch))
        found.append(Way(f"fewer tokens, rate {rate}", short, short, decoded, 0))
        found.append(Way(f"fewer entries, with the question, rate {rate}", whole, whole, decoded, 0))
        found.append(Way(f"fewer entries, without it, rate {rate}", once, again, decoded, kept))
    return found


def _trained(arch: Architecture, lengths: Lengths, title: str, new: int) -> list[Way]:
    """The system of ``arch``, from the text each time, and with something kept: of COMI what the encoder made of the
    text, of the others, whose memory no question changes, the decoder's keys and values of it."""
    entries, before, query = flops.memory_length(arch, lengths), flops.already_read(arch, lengths), lengths.query
    compress, weights = flops.compress(arch, lengths), _compressor(arch)
    read = flops.read(arch, before, entries - before + query) + _head(arch)
    anew = Pass(compress + read, weights + _decoder(arch))
    if arch.system == "comi":
        kept = document_bytes(arch, lengths.context)
        ingest = flops.by_part(arch, dataclasses.replace(lengths, query=0))["encoder"].forward
        again = Pass(anew.flop - ingest, anew.read + kept)
    else:
        kept, again = prefix_bytes(arch, entries), _after(arch, entries, query)
    decoded = _tokens(arch, entries + query, new)
    return [
        Way(f"{title}, encoding each time, rate {lengths.rate}", anew, anew, decoded, 0),
        Way(f"{title}, kept, rate {lengths.rate}", anew, again, decoded, kept),
    ]


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


def _first(arch: Architecture, entries: int, query: int) -> Pass:
    """From ``entries`` of text and a question to the first token."""
    return Pass(flops.read(arch, 0, entries + query) + _head(arch), _decoder(arch))


def _after(arch: Architecture, entries: int, query: int) -> Pass:
    """From a question behind ``entries`` whose keys and values are kept to the first token."""
    return Pass(flops.read(arch, entries, query) + _head(arch), _decoder(arch) + prefix_bytes(arch, entries))


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
    """The bytes of the blocks that make the memory: of encoder and LSA, as far as the system has them, or of the
    decoder a second time. Adapters and learned vectors are left out."""
    settings, parts = arch.compression, architecture.specs(arch)
    if "encoder" not in parts:
        return _blocks(arch, arch.backbone.num_hidden_layers)
    return _blocks(arch, settings.encoder_layers + settings.lsa_layers * ("lsa" in parts and settings.lsa))


def _blocks(arch: Architecture, layers: int) -> int:
    return _bytes(arch, layers * (attention_weights(arch.backbone) + mlp_weights(arch.backbone)))


def _bytes(arch: Architecture, parameters: int) -> int:
    return parameters * jnp.dtype(arch.dtype).itemsize
