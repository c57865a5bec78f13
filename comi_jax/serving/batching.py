"""Padded batches of few shapes, and the jitted functions that compress and answer them."""

import dataclasses
import functools
import operator
from collections.abc import Iterator, Sequence
from typing import Any, SupportsIndex

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from comi_jax.config import ConfigError, Generation
from comi_jax.data.batches import Shapes, collate
from comi_jax.data.encode import Example, check_positions
from comi_jax.devices import sharding
from comi_jax.model import comi, generate
from comi_jax.model.architecture import Architecture
from comi_jax.model.batch import Batch
from comi_jax.runs.description import Run


def check(run: Run, examples: Sequence[Example], rate: SupportsIndex | None, new_tokens: int) -> int:
    """The rate (None: the first of compression.rates), validated for ``examples``. Raises ConfigError for a bad rate,
    and LengthError for examples that do not fit the backbone's positions."""
    compression = run.config.compression
    rate = compression.rates[0] if rate is None else rate
    if not hasattr(rate, "__index__") or isinstance(rate, bool) or operator.index(rate) < 1:
        raise ConfigError(f"the rate is {rate}; it is a whole number of at least 1")
    rate = operator.index(rate)
    check_positions(examples, run.backbone, run.config, rate, new_tokens)
    return rate


def batches(
    run: Run, examples: Sequence[Example], rate: int, batch_size: int, mesh: Mesh | None
) -> Iterator[tuple[list[int], Batch]]:
    """Batches on their devices, contexts of similar length together, each with the indices of its ``examples``; filler
    rows follow these. ``batch_size`` must be a multiple of the row shards of ``mesh``."""
    if not examples:
        return
    shapes = Shapes.of(examples, run.config.data, run.config.compression)
    # Rounded up, so that calls of similar length share a compilation.
    shapes = dataclasses.replace(shapes, query=-(-shapes.query // 8) * 8)
    order = sorted(range(len(examples)), key=lambda i: len(examples[i].context))
    shards = sharding.row_shards(mesh) if mesh else 1
    size = min(batch_size, -(-len(order) // shards) * shards)  # one batch shape, one compilation
    for first in range(0, len(order), batch_size):
        rows = order[first : first + batch_size]
        full = rows + rows[:1] * (size - len(rows))
        batch = collate([dataclasses.replace(examples[i], rate=rate) for i in full], shapes)
        yield rows, sharding.put_batch(batch, mesh) if mesh else jax.tree.map(jnp.asarray, batch)


@functools.partial(jax.jit, static_argnames=("arch", "rate"))
def remember(params: Any, batch: Batch, arch: Architecture, rate: int) -> comi.Memory:
    """The memory of each row of ``batch``."""
    return comi.memory_of(params, arch, batch, rate)


@functools.partial(jax.jit, static_argnames=("arch", "options", "stop"))
def reply(
    params: Any,
    memory: comi.Memory,
    batch: Batch,
    arch: Architecture,
    options: Generation,
    stop: tuple[int, ...],
) -> generate.Generated:
    """The greedy answer of each row of ``batch`` from its ``memory``."""
    rows, lengths = comi.prompt(params, arch, memory, batch)
    return generate.greedy(params, arch, rows, lengths, options, stop)


def fetch(x: jax.Array) -> np.ndarray:
    """``x`` as a host array, gathered on every process."""
    return np.asarray(x) if x.is_fully_addressable else multihost_utils.process_allgather(x, tiled=True)
