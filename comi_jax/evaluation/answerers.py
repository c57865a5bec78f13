"""A COMI model under evaluation: at one rate, with one set of decoding options, with or without the contexts."""

import dataclasses
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, SupportsIndex

import xxhash

from comi_jax.config import Generation
from comi_jax.data import encode
from comi_jax.data.encode import Example, LengthReport
from comi_jax.data.records import Record
from comi_jax.serving import batching
from comi_jax.serving.answers import Answer
from comi_jax.serving.compressor import Comi

BATCHES_AT_ONCE = 8


@dataclass(frozen=True)
class ComiAnswerer:
    """``model`` at ``rate`` (None: the first of its rates). ``weights`` is a hash of its weights; empty: unknown, so
    that nothing is resumed."""

    model: Comi
    weights: str = ""
    rate: SupportsIndex | None = None
    options: Generation | None = None  # None: those of the model's config
    step: int | None = None  # of the checkpoint that the weights are from
    closed_book: bool = False  # answer from the question alone, without the context

    @property
    def decoding(self) -> Generation:
        return self.options or self.model.run.config.generation

    @property
    def rate_used(self) -> int:
        rates = self.model.run.config.compression.rates
        return rates[0] if self.rate is None else operator.index(self.rate)

    @property
    def identity(self) -> str:
        if not self.weights:
            return ""
        key = (encode.FORMAT, self.model.run, self.weights, self.rate_used, self.decoding, self.closed_book)
        return xxhash.xxh3_128(repr(key).encode()).hexdigest()

    @property
    def at_once(self) -> int:
        return self.model.batch_size * BATCHES_AT_ONCE

    def encode(self, records: Sequence[Record]) -> tuple[list[Example], LengthReport]:
        data = self.model.run.config.data
        examples, report = encode.encode(records, self.model.tokenizer, data, targets=False)
        if self.closed_book:
            examples = [dataclasses.replace(e, context=e.context[:0]) for e in examples]
        batching.check(self.model.run, examples, self.rate, self.decoding.max_new_tokens)
        return examples, report

    def answer(self, examples: Sequence[Example]) -> list[Answer]:
        return self.model.generate(examples, self.rate, self.decoding)

    def account(self) -> dict[str, Any]:
        uncompressed = self.model.run.config.system == "full_prompt"
        return {
            "step": self.step,
            "weights": self.weights,
            "rate": None if self.closed_book or uncompressed else self.rate_used,
            "closed_book": self.closed_book,
            "decoding": {"method": self.decoding.method, **dataclasses.asdict(self.decoding)},
        }
