"""What a system is: from a context and a question to what the decoder reads, and what that costs."""

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from typing import ClassVar, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Array

from comi_jax.data.encode import Example
from comi_jax.data.records import Record
from comi_jax.model.cache import KVCache
from comi_jax.serving.language_model import LanguageModel


@dataclass(frozen=True)
class Question(Example):
    """An example, and the record that it is from."""

    _: KW_ONLY
    record: Record


@dataclass(frozen=True)
class Reading:
    """What the decoder answers from, for a batch of questions: the tokens that it reads now, after the first start[b]
    positions of ``cache`` (None: after nothing)."""

    prompts: Sequence[np.ndarray]  # token ids, ending with those of the question
    entries: Sequence[int]  # KV entries per layer and kv head that stand for each context
    ingest_flop: Sequence[float]  # up to these entries
    cache: KVCache | None = None
    start: Array | None = None  # [B]


@runtime_checkable
class System(Protocol):
    """A system under evaluation that needs no training: frozen options, and functions of a language model."""

    needs_budget: ClassVar[bool]  # whether it keeps as many entries as it is told
    splits: ClassVar[bool]  # whether it runs with the tokens of a row split over devices

    @property
    def query_aware(self) -> bool:
        """Whether what is kept depends on the question."""
        ...

    def refusal(self, question: Question, budget: int) -> str:
        """Why the system cannot keep ``budget`` entries for ``question``, and what to do; empty if it can."""
        ...

    def longest(self, model: LanguageModel, question: Question, budget: int) -> int:
        """The positions that the longest row of the decoder needs before the answer."""
        ...

    def read(self, model: LanguageModel, questions: Sequence[Question], budgets: Sequence[int]) -> Reading:
        """What the decoder of ``model`` answers each of ``questions`` from, with ``budgets`` entries for its context.
        A row depends on no other."""
        ...


def bucket(length: int) -> int:
    """The padded length of rows of ``length`` tokens: 32, 48, 64, 96, ..., each compiled once."""
    size = 32
    while size < length:
        size = size * 3 // 2 if size & (size - 1) == 0 else size // 3 * 4
    return size


def padded(rows: Sequence[np.ndarray], width: int) -> np.ndarray:
    """``rows`` of token ids, right-padded to ``width``."""
    out = np.zeros((len(rows), width), np.int32)
    for i, row in enumerate(rows):
        out[i, : len(row)] = row
    return out
