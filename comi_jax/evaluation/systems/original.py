"""The two ends of the table: the language model with the whole context, and without any of it."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from comi_jax.evaluation.systems.protocol import Question
from comi_jax.evaluation.systems.texts import TextSystem
from comi_jax.serving.language_model import LanguageModel


@dataclass(frozen=True)
class Original(TextSystem):
    """The decoder reads the context as it is."""

    needs_budget: ClassVar[bool] = False

    def select(self, model: LanguageModel, question: Question, budget: int) -> tuple[np.ndarray, float]:
        return question.context, 0.0


@dataclass(frozen=True)
class ClosedBook(TextSystem):
    """The decoder reads the question alone."""

    needs_budget: ClassVar[bool] = False

    def select(self, model: LanguageModel, question: Question, budget: int) -> tuple[np.ndarray, float]:
        return question.context[:0], 0.0

    def longest(self, model: LanguageModel, question: Question, budget: int) -> int:
        return len(question.query)
