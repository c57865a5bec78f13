"""Truncation: the first tokens of the context, the last ones, or half of each."""

from dataclasses import dataclass

import numpy as np

from comi_jax.checks import one_of
from comi_jax.evaluation.systems.protocol import Question
from comi_jax.evaluation.systems.texts import TextSystem, joined
from comi_jax.serving.language_model import LanguageModel


@dataclass(frozen=True)
class Truncation(TextSystem):
    kept: str = "head"  # "head", "tail" or "both"; of an odd budget, "both" gives the head one token more

    def __post_init__(self):
        one_of("the kept part of a truncation", self.kept, ("head", "tail", "both"))

    def select(self, model: LanguageModel, question: Question, budget: int) -> tuple[np.ndarray, float]:
        context, tail = question.context, {"head": 0, "tail": budget, "both": budget // 2}[self.kept]
        return joined([context[: budget - tail], context[len(context) - tail :]]), 0.0
