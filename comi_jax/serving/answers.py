"""What a user gets from ``Comi``: the memory of a context, an answer, an answer piece by piece."""

import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass

import numpy as np

from comi_jax.serving import generation
from comi_jax.serving.account import Account


@dataclass(frozen=True)
class CompressedContext:
    """The memory of a context."""

    vectors: np.ndarray  # [memory vectors, hidden size], after the LSA, float32
    context_tokens: int
    truncated: bool  # whether the context or the question was truncated to data.max_*
    cut: str = ""  # which: "context", "question" or "context and question"
    rate: int | None = None  # at which it was compressed; of rate="auto", the chosen one

    @property
    def ratio(self) -> float:
        """The achieved compression ratio: context tokens per memory vector."""
        return self.context_tokens / max(len(self.vectors), 1)


@dataclass(frozen=True)
class Answer:
    """An answer, and the size of what it was generated from."""

    text: str
    tokens: tuple[int, ...]  # generated ids, including the end-of-sequence token if it was generated
    context_tokens: int
    account: Account  # what it cost
    truncated: bool
    cut: str = ""  # which that was: "context", "question" or "context and question"
    finish_reason: str = "stop"  # an end-of-sequence token or a stop string; "length": max_new_tokens
    logprobs: tuple[float, ...] | None = None  # of each token under the model, if asked for
    rate: int | None = None  # at which the context was compressed; of rate="auto", the chosen one

    @property
    def memory_vectors(self) -> int:
        """The number of vectors, or of KV entries per layer, that the decoder read instead of the context."""
        return self.account.entries

    @property
    def ratio(self) -> float:
        """Context tokens per memory vector; 0 without a context."""
        return self.context_tokens / max(self.memory_vectors, 1)


class AnswerStream(Iterator[str]):
    """The text of an answer, piece by piece as it is decoded. The pieces, joined, are ``answer.text``."""

    def __init__(
        self,
        pieces: Generator[str, None, generation.Reply],
        answer: Callable[[generation.Reply], Answer],
        asked: float,
        compressed: float,
    ):
        self._pieces, self._answer, self._asked = pieces, answer, asked
        self.answer: Answer | None = None  # after the last piece
        # Seconds since the question was asked, until its memory and its first token were there and until the end.
        self.timings = {"compressed": compressed - asked}

    def __next__(self) -> str:
        while True:
            try:
                piece = next(self._pieces)
            except StopIteration as end:
                if end.value is not None:
                    self.answer = self._answer(end.value)
                    self.timings["end"] = time.perf_counter() - self._asked
                raise StopIteration from None
            self.timings.setdefault("first token", time.perf_counter() - self._asked)
            if piece:
                return piece

    def close(self) -> None:
        """Stop decoding; there is no ``answer`` then."""
        self._pieces.close()
