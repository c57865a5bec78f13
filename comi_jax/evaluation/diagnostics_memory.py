"""How redundant a memory is: the cosines among the vectors that the decoder reads in place of one context.

It applies to every system whose memory is vectors, so that checkpoints of several can be compared.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from comi_jax.data import encode
from comi_jax.data.records import Record
from comi_jax.errors import ConfigError
from comi_jax.evaluation.diagnostics import RESAMPLES, Table
from comi_jax.evaluation.diagnostics_tables import mean_cosine
from comi_jax.evaluation.metrics import summarize
from comi_jax.serving import batching
from comi_jax.serving.compressor import Comi

ROWS = 1024  # vectors whose cosines with all others are held at a time


def largest_cosine(vectors: Float[np.ndarray, "N D"]) -> float:
    """The mean over ``vectors`` of the largest cosine with another one; 0 if there are fewer than two."""
    count = len(vectors)
    if count < 2:
        return 0.0
    unit = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    total = 0.0
    for first in range(0, count, ROWS):
        cosines = unit[first : first + ROWS] @ unit.T
        cosines[np.arange(len(cosines)), first + np.arange(len(cosines))] = -np.inf
        total += cosines.max(axis=1).sum(dtype=np.float64)
    return float(total / count)


def measure_memory(vectors: Float[np.ndarray, "N D"]) -> dict[str, float]:
    """The mean cosine of two vectors, and the mean of each one's largest."""
    return {"mean cosine": mean_cosine(vectors), "largest cosine with another": largest_cosine(vectors)}


def memories(model: Comi, records: Sequence[Record], rate: int) -> Iterable[tuple[int, int, np.ndarray]]:
    """For each record its number, its context tokens and the vectors that the decoder reads in their place."""
    examples, _ = encode.encode(records, model.tokenizer, model.run.config.data, targets=False)
    batching.check(model.run, examples, rate, 1)
    for rows, batch in batching.batches(model.run, examples, rate, model.batch_size, model.mesh):
        memory = batching.remember(model.params, batch, model.architecture, rate)
        if memory.before is not None:
            raise ConfigError(f"the memory of {title(model)} is keys and values, not vectors; leave it out")
        vectors, lengths = batching.fetch(memory.vectors), batching.fetch(memory.length)
        for row, number in enumerate(rows):
            yield number, len(examples[number].context), vectors[row, : lengths[row]].astype(np.float32)


def title(model: Comi) -> str:
    """The system's title in tables; mean-pooling for COMI without its coarse and its fine stage."""
    settings, system = model.run.config.compression, model.run.config.title
    return system if settings.coarse or settings.fine or model.run.config.system != "comi" else "mean-pooling"


def memory_redundancy(models: Mapping[str, Comi], records: Sequence[Record], rate: int) -> Table:
    """One row for each of ``models``, by title."""
    rows: list[dict[str, Any]] = []
    for name, model in models.items():
        tokens, counts, measures = 0, 0, {}
        for number, context, vectors in memories(model, records, rate):
            tokens, counts = tokens + context, counts + len(vectors)
            measures[number] = measure_memory(vectors)
        mean = summarize([measures[number] for number in sorted(measures)], resamples=RESAMPLES)
        rows.append({"system": name, **mean, "vectors, mean": counts / len(records), "ratio": tokens / counts})
    notes = [
        f"{len(records)} examples at rate {rate}; what the decoder reads in place of the context, after the LSA if any",
        "a memory of fewer than two vectors counts as 0; more vectors are more alike, so compare at equal ratios",
    ]
    return Table("memory", "Redundancy of the memory that the decoder reads", rows, notes)
