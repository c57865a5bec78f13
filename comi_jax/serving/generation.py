"""Answers of a batch, or as a stream of text, from the memory of their contexts."""

import dataclasses
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict

import numpy as np

from comi_jax.config import Generation
from comi_jax.errors import ConfigError
from comi_jax.model import sampling
from comi_jax.model.architecture import Architecture
from comi_jax.model.batch import Batch
from comi_jax.model.comi import Memory
from comi_jax.serving import batching
from comi_jax.serving.detokenizer import Detokenizer

CHUNK = 16  # tokens between looks at which rows of a batch are done
ROOM = 8  # the least number of new tokens that a program is compiled for


class Options(TypedDict, total=False):
    """Decoding options of a call; those that are absent or None are the run's (config.Generation)."""

    max_new_tokens: int | None
    repetition_penalty: float | None
    temperature: float | None
    top_k: int | None
    top_p: float | None
    seed: int | None
    stop_strings: str | Sequence[str] | None


def chosen(defaults: Generation, given: Options) -> Generation:
    """``defaults`` with the ``given`` options. Raises ConfigError for an option that does not exist or has another
    type, or a value out of its range."""
    changes: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    for name, value in changes.items():
        if name not in Options.__annotations__:
            known = ", ".join(Options.__annotations__)
            raise ConfigError(f"there is no decoding option {name}; there are: {known}")
        if name == "stop_strings":
            changes[name] = _texts(value)
        else:
            changes[name] = _number(name, value, whole=name in ("max_new_tokens", "top_k", "seed"))
    return dataclasses.replace(defaults, **changes)


def _texts(value: Any) -> tuple[str, ...]:
    texts = (value,) if isinstance(value, str) else value
    if not isinstance(texts, Sequence) or not all(isinstance(text, str) for text in texts):
        raise ConfigError(f"stop_strings is {value!r}; give a text or a list of texts")
    return tuple(texts)


def _number(name: str, value: Any, whole: bool) -> int | float:
    kind = "a whole number" if whole else "a number"
    try:
        if isinstance(value, bool | str):
            raise TypeError
        number = value.__index__() if whole else float(value)
    except (TypeError, ValueError, AttributeError, OverflowError):
        raise ConfigError(f"{name} is {value!r}; give {kind}") from None
    return number


@dataclass(frozen=True)
class Reply:
    """A decoded answer."""

    text: str
    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish_reason: str  # "stop": an end-of-sequence token or a stop string; "length": max_new_tokens


class _Decoder:
    """The decoding of one batch, a few tokens at a time. Its rows may become fewer when most are done."""

    def __init__(
        self, params: Any, arch: Architecture, memory: Memory, batch: Batch, options: Generation, stop: tuple[int, ...]
    ):
        self._params, self._arch, self._stop, self._limit = params, arch, stop, options.max_new_tokens
        self._sampled = options.temperature > 0
        self._rules = sampling.rules(options, batch.query.shape[0])
        self._decoding = batching.begin(
            params, memory, batch, self._rules, arch, stop, batching.bucket(self._limit, ROOM), self._sampled
        )

    def proceed(self, stopped: np.ndarray, until: int) -> None:
        self._decoding = batching.proceed(
            self._params, self._decoding, self._rules, stopped, np.int32(until), self._arch, self._stop, self._sampled
        )

    def take(self, rows: Sequence[int]) -> None:
        self._decoding, self._rules = batching.take_rows(self._decoding, self._rules, np.asarray(rows, np.int32))

    def fetch(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Token ids [B, A], their log-probabilities [B, A], how many are real [B], and which rows are done [B]."""
        now = self._decoding
        ids, logprobs, count, done = (batching.fetch(x) for x in (now.ids, now.logprobs, now.count, now.done))
        return ids, logprobs, count, done | (count >= self._limit)


def replies(
    params: Any,
    arch: Architecture,
    memory: Memory,
    batch: Batch,
    options: Generation,
    stop: tuple[int, ...],
    tokenizer: Any,
    count: int,
    shrink: bool = True,
) -> list[Reply]:
    """The answers of the first ``count`` rows of ``batch``; those behind are filler.

    The batch is decoded CHUNK tokens at a time. A row that meets a stop string is done then; and when half of the rows
    or more are done, the others go on as a smaller batch, unless ``shrink`` is False: then the last bits of a row do
    not depend on when others are done.
    """
    shrink = shrink and arch.runtime.mesh is None
    decoder = _Decoder(params, arch, memory, batch, options, stop)
    texts = [Detokenizer(tokenizer, options.stop_strings) for _ in range(count)]
    logprobs: list[tuple[float, ...]] = [()] * count
    rows, step = list(range(batch.query.shape[0])), 1  # rows[i] is the row of ``batch`` that row i decodes
    while True:
        ids, chances, lengths, done = decoder.fetch()
        for i, row in enumerate(rows):
            if row < count:
                texts[row].add(ids[i, len(texts[row].tokens) : lengths[i]].tolist())
                logprobs[row] = tuple(chances[i, : len(texts[row].tokens)].tolist())
                done[i] |= texts[row].stopped
            else:
                done[i] = True
        if done.all():
            break
        live = np.flatnonzero(~done).tolist()
        size = batching.bucket(len(live), 1)
        if shrink and 2 * size <= len(rows) and step + CHUNK <= options.max_new_tokens:
            kept = live + live[:1] * (size - len(live))
            decoder.take(kept)
            rows, done = [rows[i] for i in live] + [count] * (size - len(live)), np.arange(size) >= len(live)
        step = min(step + CHUNK, options.max_new_tokens)
        decoder.proceed(done, step)
    return [_reply(text, chances, stop) for text, chances in zip(texts, logprobs, strict=True)]


def _reply(text: Detokenizer, logprobs: tuple[float, ...], stop: tuple[int, ...]) -> Reply:
    text.finish()
    ended = text.stopped or text.tokens[-1] in stop
    return Reply(text.text, text.tokens, logprobs, "stop" if ended else "length")


def stream(
    params: Any,
    arch: Architecture,
    memory: Memory,
    batch: Batch,
    options: Generation,
    stop: tuple[int, ...],
    tokenizer: Any,
) -> Generator[str, None, Reply]:
    """The answer of a batch of one row: pieces of its text as they become certain, after every token; then the Reply,
    as the generator's return value."""
    decoder = _Decoder(params, arch, memory, batch, options, stop)
    text, step = Detokenizer(tokenizer, options.stop_strings), 1
    while True:
        ids, logprobs, lengths, done = decoder.fetch()
        yield text.add(ids[0, len(text.tokens) : lengths[0]].tolist())
        if done[0] or text.stopped:
            break
        step += 1
        decoder.proceed(np.zeros(len(done), bool), step)
    yield text.finish()
    return _reply(text, tuple(logprobs[0, : len(text.tokens)].tolist()), stop)
