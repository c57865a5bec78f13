"""Systems that choose which tokens of the context the decoder reads."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from comi_jax.data.encode import token_ids
from comi_jax.data.records import BYTE_ORDER_MARK, Record
from comi_jax.evaluation.systems.protocol import Question, Reading
from comi_jax.model import flops
from comi_jax.serving.language_model import LanguageModel

_SENTENCE_END = re.compile(r"(?<=[.!?。！？])\s+|\n+")


@dataclass(frozen=True)
class TextSystem:
    """Base class: a subclass says which tokens it ``select``s."""

    needs_budget: ClassVar[bool] = True
    splits: ClassVar[bool] = True
    query_aware = False

    def select(self, model: LanguageModel, question: Question, budget: int) -> tuple[np.ndarray, float]:
        """At most ``budget`` token ids that the decoder reads instead of the context, and the FLOP of choosing them."""
        raise NotImplementedError

    def refusal(self, question: Question, budget: int) -> str:
        return ""

    def longest(self, model: LanguageModel, question: Question, budget: int) -> int:
        return budget + len(question.query)

    def read(self, model: LanguageModel, questions: Sequence[Question], budgets: Sequence[int]) -> Reading:
        chosen: dict[int, tuple[np.ndarray, float]] = {}  # filler rows repeat a question
        for question, budget in zip(questions, budgets, strict=True):
            if id(question) not in chosen:
                chosen[id(question)] = self.select(model, question, budget)
        picked = [chosen[id(question)] for question in questions]
        return Reading(
            [np.concatenate([ids, q.query]) for (ids, _), q in zip(picked, questions, strict=True)],
            [len(ids) for ids, _ in picked],
            [flop + flops.read(model.architecture, 0, len(ids)) for ids, flop in picked],
        )


@dataclass(frozen=True)
class Passage:
    """A piece of a context: ``context_text()`` is the concatenation of a record's passages."""

    text: str
    ids: np.ndarray


def documents(record: Record, tokenizer: Any) -> list[Passage]:
    """The documents of ``record``; the newline between two belongs to the second."""
    texts = [document.removeprefix(BYTE_ORDER_MARK) for document in record.context]
    texts = [text if i == 0 else f"\n{text}" for i, text in enumerate(texts)]
    return [Passage(t, np.array(i, np.int32)) for t, i in zip(texts, token_ids(tokenizer, texts), strict=True) if i]


def passages(record: Record, tokenizer: Any, size: int, largest: int) -> list[Passage]:
    """The documents of ``record``, those of more than ``size`` tokens in passages: as many whole sentences as fit into
    ``size`` tokens, or one that does not. A sentence of more than ``largest`` tokens is cut."""
    found: list[Passage] = []
    for document in documents(record, tokenizer):
        if len(document.ids) <= min(size, largest):
            found.append(document)
            continue
        text = document.text
        ends = [m.start() for m in _SENTENCE_END.finditer(text) if 0 < m.start()]
        texts = [text[a:b] for a, b in zip([0, *ends], [*ends, len(text)], strict=True) if a < b]
        sentences = zip(texts, token_ids(tokenizer, texts), strict=True)
        start = len(found)
        for sentence, ids in sentences:
            if not ids:
                continue
            last = found[-1] if len(found) > start else None
            if last is not None and len(last.ids) + len(ids) <= min(size, largest):
                found[-1] = Passage(last.text + sentence, np.array([*last.ids, *ids], np.int32))
            elif len(ids) <= largest:
                found.append(Passage(sentence, np.array(ids, np.int32)))
            else:
                cut = [ids[i : i + largest] for i in range(0, len(ids), largest)]
                found += [Passage(tokenizer.decode(part), np.array(part, np.int32)) for part in cut]
    return found


def joined(parts: Sequence[np.ndarray]) -> np.ndarray:
    """Token ids one after the other."""
    return np.concatenate([np.zeros(0, np.int32), *parts])
