"""A system that needs no training, under evaluation: with one language model, at one rate, with one way of decoding."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import xxhash

from comi_jax.config import Data, Generation, max_groups
from comi_jax.data import encode
from comi_jax.data.encode import Example, LengthError, LengthReport
from comi_jax.data.records import Record
from comi_jax.errors import ConfigError
from comi_jax.evaluation.systems.protocol import Question, System, bucket, padded
from comi_jax.serving import batching
from comi_jax.serving.account import account
from comi_jax.serving.answers import Answer
from comi_jax.serving.language_model import LanguageModel, reply

BATCHES_AT_ONCE = 8


@dataclass(frozen=True)
class SystemAnswerer:
    """``system``, called ``name`` in messages, with ``model`` as its decoder. ``rate``: context tokens per kept entry;
    None for a system that has none. ``data``: the limits of contexts and questions."""

    name: str
    system: System
    model: LanguageModel
    data: Data
    options: Generation
    rate: int | None = None

    def __post_init__(self):
        if self.system.needs_budget and (self.rate is None or self.rate < 1):
            raise ConfigError(f"the rate of {self.name} is {self.rate}; it is a whole number of at least 1")
        if self.options.temperature or self.options.stop_strings:
            raise ConfigError(
                f"{self.name} decodes greedily and without stop strings; set generation.temperature=0 and leave "
                "generation.stop_strings empty"
            )
        if not self.system.splits and self.model.architecture.runtime.context_shards > 1:
            raise ConfigError(
                f"{self.name} cannot run with the tokens of a row split over devices; set mesh.context to 1"
            )

    @property
    def identity(self) -> str:
        if not self.model.weights:
            return ""
        limits = self.data.max_context, self.data.max_query, self.data.on_long
        model = self.model.weights, self.model.backbone, self.model.architecture.dtype, self.model.stop
        key = (encode.FORMAT, self.system, *model, limits, self.rate, self.options)
        return xxhash.xxh3_128(repr(key).encode()).hexdigest()

    @property
    def at_once(self) -> int:
        return self.model.batch_size * BATCHES_AT_ONCE

    def budget(self, question: Example) -> int:
        """The entries that the system may keep: as many as COMI has memory slots at this rate, n / rate rounded up."""
        tokens = len(question.context)
        return max_groups(tokens, self.rate) if self.system.needs_budget and self.rate else tokens

    def questions(self, records: Sequence[Record]) -> tuple[list[Question], LengthReport]:
        """``records`` tokenised, whether the system can answer them or not."""
        examples, report = encode.encode(records, self.model.tokenizer, self.data, targets=False)
        fields = [field.name for field in dataclasses.fields(Example)]
        pairs = zip(examples, records, strict=True)
        return [Question(**{name: getattr(e, name) for name in fields}, record=record) for e, record in pairs], report

    def encode(self, records: Sequence[Record]) -> tuple[list[Example], LengthReport]:
        questions, report = self.questions(records)
        refused = [(i, why) for i, q in enumerate(questions, start=1) if (why := self._refusal(q))]
        if refused:
            number, why = refused[0]
            rate = f" at rate {self.rate}" if self.rate else ""
            raise LengthError(
                f"{self.name} cannot answer {len(refused)} of {len(questions)} records{rate}, the first is record "
                f"{number}: {why}"
            )
        return list(questions), report

    def _refusal(self, question: Question) -> str:
        tokens, budget = len(question.context), self.budget(question)
        if self.system.needs_budget and self.rate and self.rate > tokens:
            return f"its context has {tokens} tokens, fewer than the rate {self.rate}; lower the rate"
        longest = self.system.longest(self.model, question, budget) + self.options.max_new_tokens
        limit = self.model.backbone.max_position_embeddings
        if longest > limit:
            return f"it needs {longest} positions, but the model has {limit}; lower data.max_context"
        return self.system.refusal(question, budget)

    def answer(self, examples: Sequence[Example]) -> list[Answer]:
        results: list[Any] = [None] * len(examples)
        order = sorted(range(len(examples)), key=lambda i: len(examples[i].context))
        shards = self.model.row_shards
        size = min(self.model.batch_size, -(-len(order) // shards) * shards)
        for first in range(0, len(order), size):
            rows = order[first : first + size]
            full = rows + rows[:1] * (size - len(rows))
            for row, answer in zip(rows, self._batch([examples[i] for i in full]), strict=False):
                results[row] = answer
        return results

    def _batch(self, questions: Sequence[Any]) -> list[Answer]:
        model, arch = self.model, self.model.architecture
        reading = self.system.read(model, questions, [self.budget(q) for q in questions])
        lengths = np.array([len(ids) for ids in reading.prompts], np.int32)
        # The question alone is short and its lengths are few; with the chosen text before it, it is long.
        longest = int(max(lengths))
        width = bucket(longest) if reading.cache is None else -(-longest // 8) * 8 if longest > 1 else 1
        ids, length = (model.put(x) for x in (padded(reading.prompts, width), lengths))
        out = reply(model.params, ids, length, arch, self.options, model.stop, reading.cache, reading.start)
        generated, counts = (batching.fetch(x) for x in (out.ids, out.length))
        answers = []
        for i, question in enumerate(questions):
            tokens = tuple(int(t) for t in generated[i, : counts[i]])
            text = model.tokenizer.decode(tokens, skip_special_tokens=True).strip()
            entries, asked = reading.entries[i], len(question.query)
            cost = account(arch, entries, asked, reading.ingest_flop[i], read=min(asked, int(lengths[i])))
            context = len(question.context) if entries else 0
            answers.append(Answer(text, tokens, context, cost, question.truncated, question.cut))
        return answers

    def account(self) -> dict[str, Any]:
        return {
            "system": self.name,
            "settings": repr(self.system),
            "query_aware": self.system.query_aware,
            "step": None,
            "weights": self.model.weights,
            "rate": self.rate if self.system.needs_budget else None,
            "closed_book": self.name == "closed_book",
            "decoding": {"method": self.options.method, **dataclasses.asdict(self.options)},
        }
