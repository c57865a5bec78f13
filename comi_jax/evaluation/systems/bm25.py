"""BM25 retrieval: the passages that share rare words with the question, up to the budget, in the context's order.

    score(d) = sum over the question's words w of  idf(w) f / (f + k1 (1 - b + b |d| / mean |d|))
    idf(w)   = ln(1 + (N - n_w + 0.5) / (n_w + 0.5))

with N passages, n_w of which hold w, and f times w in d of |d| words: Lucene's variant, which stays positive where most
passages hold a word (Robertson's is 0 there, and small contexts have few passages). Computed by bm25s.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from comi_jax.errors import ConfigError
from comi_jax.evaluation.systems.protocol import Question
from comi_jax.evaluation.systems.texts import TextSystem, joined, passages
from comi_jax.serving.language_model import LanguageModel

WORDS = r"(?u)\b\w+\b"  # one-letter words too, which bm25s drops by default


@dataclass(frozen=True)
class BM25(TextSystem):
    """Passages are documents, or sentences of longer ones: at most ``passage_tokens`` and, unless a single sentence is
    longer, a quarter of the budget, so that there is something to choose."""

    passage_tokens: int = 128
    k1: float = 1.5
    b: float = 0.75
    query_aware = True

    def select(self, model: LanguageModel, question: Question, budget: int) -> tuple[np.ndarray, float]:
        size = max(min(self.passage_tokens, budget // 4), 1)
        found = passages(question.record, model.tokenizer, size, budget)
        scores = self.scores([p.text for p in found], question.record.prompt)
        kept, room = [], budget
        for i in np.argsort(-scores, kind="stable"):  # equal scores: in the context's order
            if len(found[i].ids) <= room:
                kept.append(int(i))
                room -= len(found[i].ids)
        return joined([found[i].ids for i in sorted(kept)]), 0.0

    def scores(self, texts: Sequence[str], query: str) -> np.ndarray:
        """The score of each of ``texts``; 0 for those without a word of ``query``."""
        try:
            import bm25s  # an extra
        except ImportError:
            raise ConfigError("the system bm25 needs the package bm25s; pip install 'comi-jax[compare]'") from None
        logging.getLogger("bm25s").setLevel(logging.WARNING)  # it prints a line for every index
        words: Any = bm25s.tokenize(
            [*texts, query], token_pattern=WORDS, stopwords=[], return_ids=False, show_progress=False
        )
        *words, asked = words
        known = [word for word in asked if any(word in text for text in words)]
        if not known:
            return np.zeros(len(texts))
        index = bm25s.BM25(method="lucene", k1=self.k1, b=self.b)
        index.index(words, show_progress=False)
        return np.asarray(index.get_scores(known))
