"""The rate of a question: as it was asked for, as few vectors as ``max_slots`` allow, or chosen by a calibration."""

import functools
from collections.abc import Generator
from typing import Any, SupportsIndex

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from comi_jax.config import max_groups
from comi_jax.errors import ConfigError
from comi_jax.model import encoder
from comi_jax.model.architecture import Architecture
from comi_jax.model.comi_memory import compress_segments
from comi_jax.model.compress import Aux
from comi_jax.serving import auto_rate, batching
from comi_jax.serving.encoding import Model, finished
from comi_jax.serving.examined import joined, without_padding
from comi_jax.serving.segments import Contents, Kept, Segment, at_hand, restored

AUTO = "auto"
Rate = SupportsIndex | str  # a whole number or AUTO


def rate_of(
    model: Model, contents: Contents, query: Int[np.ndarray, " Q"], rate: Rate | None, max_slots: SupportsIndex | None
) -> int:
    """The rate at which ``contents`` is compressed for ``query``. At most one of ``rate`` and ``max_slots`` is given;
    with neither it is the run's first. Raises ConfigError for what is no rate, or "auto" without a calibration."""
    if max_slots is not None:
        return rate_for(contents, max_slots)
    if rate == AUTO:
        return finished(chosen_in_steps(model, contents, query))
    return batching.whole_rate(model.run, rate)


def chosen_in_steps(model: Model, contents: Contents, query: Int[np.ndarray, " Q"]) -> Generator[None, None, int]:
    """The rate that the model's calibration chooses, by a generator that pauses behind each segment. Raises ConfigError
    without a calibration."""
    calibration = model.calibration()
    if calibration.price is None:
        return calibration.fixed
    return calibration.choose((yield from statistics_in_steps(model, contents, query, calibration.rates)))


def rate_for(contents: Contents, max_slots: SupportsIndex) -> int:
    """The smallest rate at which the document has at most ``max_slots`` memory vectors."""
    most = batching.whole("max_slots", max_slots)
    lengths = [segment.tokens for segment in contents.segments]
    if most < len(lengths):
        raise ConfigError(
            f"max_slots is {most}, but the document has {len(lengths)} segments, and each needs one; raise max_slots"
        )
    low, high = 1, max(lengths)  # at the rate ``high``, each segment needs one
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if sum(max_groups(n, middle) for n in lengths) <= most else (middle + 1, high)
    return low


def statistics(
    model: Model, contents: Contents, query: Int[np.ndarray, " Q"], rates: tuple[int, ...]
) -> Float[np.ndarray, "R F"]:
    """auto_rate.STATISTICS of compression at each of ``rates``, of a question about a document. Raises ConfigError if
    they are not finite."""
    return finished(statistics_in_steps(model, contents, query, rates))


def statistics_in_steps(
    model: Model, contents: Contents, query: Int[np.ndarray, " Q"], rates: tuple[int, ...]
) -> Generator[None, None, Float[np.ndarray, "R F"]]:
    """``statistics`` as a generator that returns them, and pauses behind each segment."""
    found = []
    for segment in contents.segments:
        found.append(examined(model, segment, query, rates))
        yield
    lengths, rows = [segment.tokens for segment in contents.segments], []
    for number, rate in enumerate(rates):
        parts = [
            without_padding(aux[number], length, rate, at)
            for at, (aux, length) in enumerate(zip(found, lengths, strict=True))
        ]
        kept = joined(parts)
        if kept.initial is None:
            raise ConfigError('rate="auto" needs the groups\' MIG, which compression.coarse=false leaves out')
        rows.append(auto_rate.statistics(kept.tokens, kept.initial, rate, len(query)))
    values = np.stack(rows)
    if not np.isfinite(values).all():
        raise ConfigError(
            "the scores of this text are not finite, so the model's weights or activations are not; choose another "
            "checkpoint, or set model.dtype=float32"
        )
    return values


def examined(model: Model, segment: Segment, query: Int[np.ndarray, " Q"], rates: tuple[int, ...]) -> list[Any]:
    """The ``Aux`` of one segment at each of ``rates``, in host memory, without the batch axis and with padding."""
    padded, length = padded_query(query)
    tokens = np.array([[segment.tokens]], np.int32)
    kept = at_hand(segment.kept, model.architecture.runtime.mesh)
    found = examine_segment(model.params, kept, tokens, padded, length, model.architecture, rates)
    return [jax.tree.map(lambda x: np.asarray(x)[0], aux) for aux in found]


def padded_query(query: Int[np.ndarray, " Q"]) -> tuple[Int[np.ndarray, "1 W"], Int[np.ndarray, " 1"]]:
    """A query as a batch of one, padded to a width that few programs are compiled for, and its length."""
    padded = np.zeros((1, batching.query_width(len(query))), np.int32)
    padded[0, : len(query)] = query
    return padded, np.array([len(query)], np.int32)


@functools.partial(jax.jit, static_argnames=("arch", "rates"))
def examine_segment(
    params: Any,
    kept: Kept,
    length: Int[Array, "1 1"],
    query: Int[Array, "1 Q"],
    query_length: Int[Array, " 1"],
    arch: Architecture,
    rates: tuple[int, ...],
) -> tuple[Aux, ...]:
    """What lies behind the memory of one segment for one question at each of ``rates``: all but the vectors. The query
    is encoded once."""
    part = restored(kept, length, arch)
    vector = encoder.query_vectors(params, arch, part, query, query_length)
    width = part.states.shape[1]
    return tuple(
        compress_segments(params, arch, part, vector, jnp.full((1,), rate, jnp.int32), max_groups(width, rate)).aux
        for rate in rates
    )
