"""Padded batches of few shapes, and the jitted functions that compress and answer them."""

import dataclasses
import functools
import logging
import operator
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, SupportsIndex

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from comi_jax.data.batches import Shapes, collate
from comi_jax.data.encode import Example, check_positions
from comi_jax.devices import sharding
from comi_jax.errors import ConfigError
from comi_jax.model import backbone as lm
from comi_jax.model import comi, comi_memory, generate, sampling
from comi_jax.model.architecture import Architecture
from comi_jax.model.batch import Batch
from comi_jax.model.encoder import encode
from comi_jax.runs.description import Run

MOST = 2**31 - 1  # the largest whole number that a program takes


def check(run: Run, examples: Sequence[Example], rate: SupportsIndex | str | None, new_tokens: int) -> int:
    """The rate (None: the first of compression.rates), validated for ``examples``. Raises ConfigError for a bad rate,
    and LengthError for examples that do not fit the backbone's positions."""
    rate = whole_rate(run, rate)
    check_positions(examples, run.backbone, run.config, rate, new_tokens)
    return rate


def whole_rate(run: Run, rate: SupportsIndex | str | None) -> int:
    """The rate (None: the first of compression.rates). Raises ConfigError for a bad one; logs one that was not
    trained."""
    rates = run.config.compression.rates
    if run.config.system == "full_prompt" and rate is not None:
        raise ConfigError(f"system=full_prompt reads whole contexts and has no rate; leave the rate {rate} out")
    chosen = rates[0] if rate is None else whole("the rate", rate)
    if chosen not in rates:
        _tell_untrained(chosen, rates, run.config.system)
    return chosen


def whole(name: str, value: Any) -> int:
    """``value``, a whole number of at least 1 and at most MOST. Raises ConfigError otherwise."""
    if not hasattr(value, "__index__") or isinstance(value, bool) or operator.index(value) < 1:
        raise ConfigError(f"{name} is {value}; it is a whole number of at least 1")
    if operator.index(value) > MOST:
        raise ConfigError(f"{name} is {value}; it is at most {MOST:,}")
    return operator.index(value)


@functools.cache
def _tell_untrained(rate: int, rates: tuple[int, ...], system: str) -> None:
    """Once for each rate."""
    known = ", ".join(map(str, rates))
    uncompressed = rate == 1 and system == "comi"
    what = "rate 1 gives the decoder the text uncompressed" if uncompressed else f"the rate {rate} is used"
    logging.getLogger(__name__).warning(f"{what}; the model was trained at {known}")


def query_width(length: int) -> int:
    """The width that a query is padded to, so that queries of similar length share a compilation: 8, 16, 32, ..."""
    return bucket(length, 8)


def memory_width(slots: int) -> int:
    """The width that memories of at most ``slots`` vectors are padded to: 8, 12, 16, 24, 32, ..."""
    return next(width for k in range(40) for width in (8 * 2**k, 12 * 2**k) if width >= slots)


def batches(
    run: Run, examples: Sequence[Example], rate: int, batch_size: int, mesh: Mesh | None
) -> Iterator[tuple[list[int], Batch]]:
    """Batches on their devices, contexts of similar length together, each with the indices of its ``examples``; filler
    rows follow these. ``batch_size`` must be a multiple of the row shards of ``mesh``."""
    if not examples:
        return
    shapes = Shapes.of(examples, run.config.data, run.config.compression)
    shapes = dataclasses.replace(shapes, query=query_width(shapes.query))
    order = sorted(range(len(examples)), key=lambda i: len(examples[i].context))
    shards = sharding.row_shards(mesh) if mesh else 1
    size = min(batch_size, -(-len(order) // shards) * shards)  # one batch shape, one compilation
    for first in range(0, len(order), batch_size):
        rows = order[first : first + batch_size]
        full = rows + rows[:1] * (size - len(rows))
        batch = collate([dataclasses.replace(examples[i], rate=rate) for i in full], shapes)
        yield rows, put(batch, mesh)


def put(batch: Any, mesh: Mesh | None) -> Any:
    """``batch`` on its devices: its rows split over ``mesh``, or on the default device."""
    return sharding.put_batch(batch, mesh) if mesh else jax.tree.map(jnp.asarray, batch)


def listed(name: str, given: Any) -> list[Any]:
    """``given``, called ``name`` in messages, as a list: what is in a list, a text alone. Raises ConfigError for what
    is neither."""
    if isinstance(given, bytes | bytearray) or not isinstance(given, str | Iterable):
        raise ConfigError(f"the {name} is of the type {type(given).__name__}; give a text, or a list of texts")
    return [given] if isinstance(given, str) else list(given)


def check_texts(name: str, texts: Sequence[Any]) -> None:
    """``check_text`` of each, called ``name`` and its number in messages, or "the ``name``" if it is the only one."""
    for number, text in enumerate(texts, start=1):
        check_text(text, f"{name} {number}" if len(texts) > 1 else f"the {name}")


def check_text(text: Any, name: str) -> None:
    """Raise ConfigError unless ``text`` is Unicode text, of which a half of a surrogate pair is none."""
    if not isinstance(text, str):
        raise ConfigError(f"{name} is of the type {type(text).__name__}; give a text")
    half = re.search("[\ud800-\udfff]", text)
    if half:
        raise ConfigError(
            f"{name} has half a surrogate pair at character {half.start() + 1}, which is no Unicode text; decode its "
            'bytes with errors="replace", or leave that character out'
        )


@functools.partial(jax.jit, static_argnames=("arch", "rate"))
def remember(params: Any, batch: Batch, arch: Architecture, rate: int) -> comi.Memory:
    """The memory of each row of ``batch`` at ``rate`` and above. COMI's rate 1 is no compression, but the decoder's
    embeddings of the text."""
    if arch.system == "comi" and rate == 1:
        vectors = lm.embed_tokens(params["decoder"], batch.context, arch.dtype, arch.runtime)
        return comi.Memory(vectors, batch.context_length, ())
    if arch.system != "comi" or arch.runtime.context_shards > 1:  # one pass, whose tokens can be split over devices
        return comi.memory_of(params, arch, batch, rate)
    encoded = encode(params, arch, batch.context, batch.context_length)
    return comi_memory.remember(params, arch, encoded, batch.query, batch.query_length, batch.rate, rate)


def sizes(memory: comi.Memory) -> list[tuple[int, int]]:
    """For each row, the entries of the decoder's KV cache that are there already, and the vectors that it reads."""
    entries, vectors = fetch(memory.entries).tolist(), fetch(memory.length).tolist()
    return [(both - read, read) for both, read in zip(entries, vectors, strict=True)]


@functools.partial(jax.jit, static_argnames="arch")
def prompt(params: Any, memory: comi.Memory, batch: Batch, arch: Architecture) -> comi.Prompt:
    """The decoder's prompt of each row of ``batch``, [memory; embed(Q)]."""
    return comi.prompt(params, arch, memory, batch)


@functools.partial(jax.jit, static_argnames=("arch", "stop", "room", "sampled"))
def begin(
    params: Any,
    memory: comi.Memory,
    batch: Batch,
    rules: sampling.Rules,
    arch: Architecture,
    stop: tuple[int, ...],
    room: int,
    sampled: bool,
) -> generate.Decoding:
    """The first token of the answer of each row of ``batch`` from its ``memory``, and room for the others."""
    made = comi.prompt(params, arch, memory, batch)
    cache, start = made.cache(made.rows.shape[1] + room)
    return generate.begin(
        params, arch, made.rows, made.length, rules, stop, room, sampled=sampled, cache=cache, start=start
    )


@functools.partial(jax.jit, static_argnames=("arch", "stop", "sampled"), donate_argnames="decoding")
def proceed(
    params: Any,
    decoding: generate.Decoding,
    rules: sampling.Rules,
    stopped: Any,
    until: Any,
    arch: Architecture,
    stop: tuple[int, ...],
    sampled: bool,
) -> generate.Decoding:
    """``decoding`` until ``until`` tokens are chosen; rows that are ``stopped`` [B] get none. The KV cache is donated,
    so ``decoding`` itself cannot be used any more."""
    decoding = dataclasses.replace(decoding, done=decoding.done | stopped)
    return generate.proceed(params, arch, decoding, rules, stop, jnp.asarray(until, jnp.int32), sampled=sampled)


take_rows = jax.jit(generate.take_rows)


def bucket(length: int, least: int) -> int:
    """The next power of two that is at least ``length`` and ``least``: few shapes, each compiled once."""
    return max(least, 1 << (length - 1).bit_length())


def fetch(x: jax.Array) -> np.ndarray:
    """``x`` as a host array, gathered on every process."""
    return np.asarray(x) if x.is_fully_addressable else multihost_utils.process_allgather(x, tiled=True)
