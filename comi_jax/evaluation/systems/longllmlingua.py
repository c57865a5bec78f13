"""LongLLMLingua (Jiang et al. 2024): a language model ranks the documents, then drops tokens of the best ones.

    rank of d     ascending mean NLL of (question + SENTENCE) given d
    ratio of d    clip(tau + delta_d, 0, 1), delta falling from +``dynamic`` (the best document) to -``dynamic``
    token x_i     kept for a large NLL(x_i | kept before it) - NLL(x_i | question, kept before it)

Documents are reordered by rank and cut to those that ``extra`` tokens above the budget hold. Tokens are dropped segment
by segment, so that a segment is judged after what is left of those before it. tau is such that the kept tokens are the
budget exactly, in this decoder's tokens and without the question; the published code takes the plain fraction for tau
and drifts, and counts in GPT-3.5's tokens. A record of a single text is ranked in ``passages``.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from comi_jax.data.encode import token_ids
from comi_jax.data.records import Record
from comi_jax.evaluation.systems.protocol import Question, bucket, padded
from comi_jax.evaluation.systems.texts import Passage, TextSystem, documents, joined, passages
from comi_jax.model import flops
from comi_jax.serving import batching
from comi_jax.serving.language_model import LanguageModel, token_losses

SENTENCE = " We can get the answer to this question in the given documents."


@dataclass(frozen=True)
class LongLLMLingua(TextSystem):
    token_stage: bool = True  # False: whole documents in the order of their ranks, those that fit into the budget
    passage_tokens: int = 128
    extra: int = 100
    dynamic: float = 0.3
    segment: int = 200
    query_aware = True

    def documents(self, model: LanguageModel, record: Record, budget: int) -> list[Passage]:
        """What is ranked: documents, or passages of a single text. Without the token stage nothing can be shortened, so
        that documents beyond the budget are ranked in passages too."""
        found = documents(record, model.tokenizer)
        if self.token_stage and len(found) > 1:
            return found
        size = max(min(self.passage_tokens, budget // 4), 1)
        return passages(record, model.tokenizer, size, self.passage_tokens if self.token_stage else budget)

    def longest(self, model: LanguageModel, question: Question, budget: int) -> int:
        asked = len(_asked(model, question))
        document = max(len(d.ids) for d in self.documents(model, question.record, budget))
        segments = len(question.query) + budget + self.segment if self.token_stage else 0
        return max(super().longest(model, question, budget), document + asked, segments)

    def select(self, model: LanguageModel, question: Question, budget: int) -> tuple[np.ndarray, float]:
        found = self.documents(model, question.record, budget)
        losses, flop = ranking(model, [d.ids for d in found], _asked(model, question))
        ranked = [found[i].ids for i in np.argsort(losses, kind="stable")]
        if not self.token_stage:
            kept, room = [], budget
            for ids in ranked:
                if len(ids) <= room:
                    kept.append(ids)
                    room -= len(ids)
            return joined(kept), flop
        before = np.cumsum([0, *(len(ids) for ids in ranked)])[:-1]
        ranked = [ids for ids, start in zip(ranked, before, strict=True) if start <= budget + self.extra]
        kept, more = self.tokens(model, ranked, question.query, budget)
        return kept, flop + more

    def ratios(self, lengths: Sequence[int], budget: int) -> np.ndarray:
        """The share of each ranked document that is kept; the kept tokens sum to ``budget``, or to all there are."""
        size, delta = np.array(lengths), np.linspace(self.dynamic, -self.dynamic, len(lengths))
        delta = delta if len(lengths) > 1 else np.zeros(1)
        low, high = -1.0 - self.dynamic, 1.0 + self.dynamic
        for _ in range(60):
            tau = (low + high) / 2
            low, high = (tau, high) if (np.clip(tau + delta, 0, 1) * size).sum() < budget else (low, tau)
        return np.clip(high + delta, 0, 1)

    def tokens(
        self, model: LanguageModel, ranked: Sequence[np.ndarray], query: np.ndarray, budget: int
    ) -> tuple[np.ndarray, float]:
        """``budget`` tokens of the ``ranked`` documents, and the FLOP of choosing them."""
        lengths = [len(ids) for ids in ranked]
        ids, document = joined(ranked), np.repeat(np.arange(len(ranked)), lengths)
        goal = np.cumsum([0.0, *self.ratios(lengths, budget)[document]])
        goal = np.floor(goal + 0.5).astype(int)  # how many of the first i tokens are kept
        kept, flop = joined([]), 0.0
        for start in range(0, len(ids), self.segment):
            end = min(start + self.segment, len(ids))
            rows = [joined([before, kept, ids[start:end]]) for before in (joined([]), query)]
            losses, spent = _losses(model, rows)
            flop += spent
            plain, asked = (loss[len(row) - (end - start) : len(row)] for loss, row in zip(losses, rows, strict=True))
            scores = plain - asked
            if not len(kept):
                scores[0] = 0.0  # nothing is before this token without the question
            pieces = np.split(np.arange(start, end), np.flatnonzero(np.diff(document[start:end])) + 1)
            for piece in pieces:
                best = np.argsort(-scores[piece - start], kind="stable")[: goal[piece[-1] + 1] - goal[piece[0]]]
                kept = joined([kept, ids[piece[np.sort(best)]]])
        return kept, flop


def ranking(model: LanguageModel, found: Sequence[np.ndarray], asked: np.ndarray) -> tuple[np.ndarray, float]:
    """The mean NLL of the tokens ``asked`` after each document, and the FLOP of computing it."""
    losses, flop = _losses(model, [joined([ids, asked]) for ids in found])
    return np.array([x[len(d) : len(d) + len(asked)].mean() for x, d in zip(losses, found, strict=True)]), flop


def _asked(model: LanguageModel, question: Question) -> np.ndarray:
    return np.array(token_ids(model.tokenizer, [question.record.prompt + SENTENCE])[0], np.int32)


def _losses(model: LanguageModel, rows: Sequence[np.ndarray]) -> tuple[np.ndarray, float]:
    """The NLL of each token of ``rows``, padded, and the FLOP of computing it."""
    arch, size = model.architecture, model.batch_size if len(rows) > 2 else -(-2 // model.row_shards) * model.row_shards
    width = bucket(max(len(row) for row in rows))
    parts = []
    for first in range(0, len(rows), size):
        part = padded([*rows[first : first + size], *[rows[0]] * (first + size - len(rows))], width)
        parts.append(batching.fetch(token_losses(model.params, model.put(part), arch)))
    flop = sum(flops.read(arch, 0, len(row)) + flops.head(arch.backbone, len(row)).forward for row in rows)
    return np.concatenate(parts)[: len(rows)], flop
