"""How long an answer takes, stage by stage: the paper's table 3.

    encode      what does not depend on the question, and is done once for a document
    compress    what depends on it, up to what the decoder reads
    prefill     the decoder's pass over that and the question, and the first token of the answer
    decode      a fixed number of tokens; end-of-sequence tokens are ignored

Batch 1, on one device. Compiled programs alone are timed, after warm-up; a stage ends when its arrays are there.
"""

import functools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from comi_jax.config import Generation, max_groups
from comi_jax.data.encode import Example
from comi_jax.evaluation.systems.kv_cache import prefill
from comi_jax.evaluation.systems.protocol import Question, System, bucket, padded
from comi_jax.model import backbone as lm
from comi_jax.model import comi_memory, encoder, generate, sampling
from comi_jax.model.cache import with_room
from comi_jax.model.comi import Memory
from comi_jax.serving import batching
from comi_jax.serving.compressor import Comi
from comi_jax.serving.language_model import LanguageModel

STAGES = ("encode", "compress", "prefill", "decode")
SUMS = {"total": STAGES, "first token": STAGES[:-1], "next question": STAGES[1:]}
Stage = Callable[[Any], Any]  # from the result of the stage before to its own


@dataclass(frozen=True)
class Timed:
    """The seconds of each stage and sum of an answer, one for each repetition."""

    entries: int
    seconds: Mapping[str, Sequence[float]] = field(default_factory=dict)

    def median(self, name: str) -> float:
        return float(np.median(self.seconds[name]))

    def spread(self, name: str, unit: float = 1e-3) -> dict[str, float]:
        """Median, least and largest, in ``unit``s of a second, as a mean with its interval is written."""
        values = np.array(self.seconds[name]) / unit
        return {"mean": float(np.median(values)), "low": float(values.min()), "high": float(values.max())}


def measure(stages: Mapping[str, Stage], entries: int, repeat: int, warm: int = 2) -> Timed:
    """Run ``stages`` ``warm`` times without timing them, then ``repeat`` times. A stage that is missing takes 0."""
    found: dict[str, list[float]] = {name: [] for name in STAGES}
    for number in range(warm + repeat):
        state: Any = None
        for name in STAGES:
            begun = time.perf_counter()
            if name in stages:
                state = jax.block_until_ready(stages[name](state))
            if number >= warm:
                found[name].append(time.perf_counter() - begun if name in stages else 0.0)
    runs = range(repeat)
    sums = {name: [sum(found[stage][i] for stage in parts) for i in runs] for name, parts in SUMS.items()}
    return Timed(entries, found | sums)


def of_trained(model: Comi, example: Example, rate: int, tokens: int) -> tuple[dict[str, Stage], int]:
    """The stages of a trained system that answers ``example`` with ``tokens`` tokens, and its entries. Systems whose
    memory does not depend on the question make it while they encode."""
    ((_, batch),) = batching.batches(model.run, [example], rate, 1, None)
    params, arch = model.params, model.architecture
    rules = sampling.rules(Generation(), 1)
    room = batching.bucket(tokens, 8)

    def begin(memory: Memory) -> Any:
        return batching.begin(params, memory, batch, rules, arch, (), room, False)

    def decode(decoding: Any) -> Any:
        return batching.proceed(params, decoding, rules, np.zeros(1, bool), np.int32(tokens), arch, (), False)

    def remember(_: Any) -> Any:
        return batching.remember(params, batch, arch, rate)

    entries = int(np.asarray(remember(None).entries)[0])
    if arch.system == "comi":
        first: dict[str, Stage] = {
            "encode": lambda _: _encode(params, batch, arch),
            "compress": lambda encoded: _compress(params, encoded, batch, arch, rate),
        }
    else:
        first = {"encode": remember}
    return first | {"prefill": begin, "decode": decode}, entries


@functools.partial(jax.jit, static_argnames="arch")
def _encode(params: Any, batch: Any, arch: Any) -> encoder.Encoded:
    return encoder.encode(params, arch, batch.context, batch.context_length)


@functools.partial(jax.jit, static_argnames=("arch", "rate"))
def _compress(params: Any, encoded: encoder.Encoded, batch: Any, arch: Any, rate: int) -> Memory:
    return comi_memory.remember(params, arch, encoded, batch.query, batch.query_length, batch.rate, rate)


def of_untrained(
    system: System, model: LanguageModel, question: Question, rate: int | None, tokens: int
) -> tuple[dict[str, Stage], int]:
    """The stages of a system that needs no training. What it chooses without the question counts as ``encode``."""
    context = len(question.context)
    budget = max_groups(context, rate) if system.needs_budget and rate else context

    def read(_: Any) -> Any:
        reading = system.read(model, [question], [budget])
        return jnp.asarray(reading.prompts[0]), reading.cache, reading.start

    found = system.read(model, [question], [budget])
    width = len(found.prompts[0]) if found.cache is not None else bucket(len(found.prompts[0]))
    stages: dict[str, Stage] = {"compress" if system.query_aware else "encode": read}
    return stages | _decoder(model, width, tokens), found.entries[0]


def of_kept_cache(model: LanguageModel, question: Question, tokens: int) -> tuple[dict[str, Stage], int]:
    """The stages of the original prompt whose context was read before, and whose KV cache is kept."""
    context = len(question.context)

    def read(_: Any) -> Any:
        ids = model.put(padded([question.context], bucket(context)))
        cache = prefill(model.params, ids, model.architecture)
        return jnp.asarray(question.query), cache, jnp.array([context], jnp.int32)

    return {"encode": read} | _decoder(model, len(question.query), tokens), context


def _decoder(model: LanguageModel, width: int, tokens: int) -> dict[str, Stage]:
    """Prefill of rows of ``width`` tokens, and decoding, after a stage that gives (prompt, cache, start)."""
    params, arch, rules = model.params, model.architecture, sampling.rules(Generation(), 1)

    def begin(state: Any) -> Any:
        prompt, cache, start = state
        ids, length = model.put(padded([np.asarray(prompt)], width)), np.array([len(prompt)], np.int32)
        return _begin(params, ids, length, cache, start, rules, arch, tokens)

    def decode(decoding: Any) -> Any:
        return batching.proceed(params, decoding, rules, np.zeros(1, bool), np.int32(tokens), arch, (), False)

    return {"prefill": begin, "decode": decode}


@functools.partial(jax.jit, static_argnames=("arch", "room"))
def _begin(
    params: Any, ids: Any, length: Any, cache: Any, start: Any, rules: Any, arch: Any, room: int
) -> generate.Decoding:
    x = lm.embed_tokens(params["decoder"], ids, arch.dtype, arch.runtime)
    cache = None if cache is None else with_room(cache, ids.shape[1] + room)
    return generate.begin(params, arch, x, length, rules, (), room, sampled=False, cache=cache, start=start)
