"""The public API: compress texts and answer questions about them.

memory = align(compress(encode(context, question)));   answer = greedy(decoder, [memory; embed(question)])
"""

import dataclasses
import os
import re
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, SupportsIndex, Unpack, overload

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from comi_jax.config import ConfigError, Generation
from comi_jax.data import encode
from comi_jax.data.encode import Example
from comi_jax.data.records import Record
from comi_jax.devices import sharding
from comi_jax.model.batch import Batch
from comi_jax.runs.description import Run
from comi_jax.runs.folder import Folder
from comi_jax.runs.stored_weights import load_params
from comi_jax.serving import batching, generation
from comi_jax.serving.account import Account, of_memory
from comi_jax.serving.generation import Options
from comi_jax.serving.prompts import PromptEmbeddings
from comi_jax.serving.slots import SlotDecoder
from comi_jax.weights.tokenizer import load_tokenizer


@dataclass(frozen=True)
class CompressedContext:
    """The memory of a context."""

    vectors: np.ndarray  # [memory vectors, hidden size], after the LSA, float32
    context_tokens: int
    truncated: bool  # whether the context or the question was truncated to data.max_*
    cut: str = ""  # which: "context", "question" or "context and question"

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


class Comi:
    """A trained compressor. The result of an example does not depend on padding or on the rest of its batch."""

    def __init__(
        self, run: Run, params: dict[str, Any], tokenizer: Any, *, batch_size: int = 16, mesh: Mesh | None = None
    ):
        """``mesh``: the devices that ``params`` are sharded over, None for one device. Batches, of ``batch_size``
        examples rounded up to a multiple of the row shards, are split over them too. With several processes, all must
        make the same calls."""
        if batch_size < 1:
            raise ConfigError(f"the batch size is {batch_size}; it must be at least 1")
        self.run, self.params, self.tokenizer, self.mesh = run, params, tokenizer, mesh
        shards = 1 if mesh is None else sharding.row_shards(mesh)
        self.batch_size = -(-batch_size // shards) * shards
        runtime = dataclasses.replace(run.architecture.runtime, remat="off", mesh=mesh)
        self.architecture = dataclasses.replace(run.architecture, runtime=runtime)

    @classmethod
    def load(
        cls,
        folder: str | os.PathLike,
        *,
        batch_size: int = 16,
        overrides: Sequence[str] = (),
        step: int | None = None,
        mesh: Mesh | None = None,
    ) -> "Comi":
        """Load the newest checkpoint of a run's folder, or that of ``step``, with ``overrides`` such as
        "data.on_long=truncate", sharded over ``mesh`` (None: on one device). Raises CheckpointError if there is no
        such checkpoint."""
        run, params = load_params(folder, overrides, step, mesh)
        return cls(run, params, load_tokenizer(Folder(folder).tokenizer), batch_size=batch_size, mesh=mesh)

    # A text is a sequence of texts to Python, so that the first of two overloads is not apart from the second.
    @overload
    def compress(  # pyright: ignore[reportOverlappingOverload]
        self, context: str, question: str, *, rate: int | None = None
    ) -> CompressedContext: ...

    @overload
    def compress(
        self, context: Sequence[str], question: Sequence[str], *, rate: int | None = None
    ) -> list[CompressedContext]: ...

    def compress(
        self, context: str | Sequence[str], question: str | Sequence[str], *, rate: SupportsIndex | None = None
    ) -> CompressedContext | list[CompressedContext]:
        """Compress ``context`` for ``question`` at ``rate`` tokens per vector (None: the first of compression.rates).
        Two lists of equal length give a list, pair by pair."""
        examples = self._examples(context, question)
        results: list[Any] = [None] * len(examples)
        rate = batching.check(self.run, examples, rate, 1)
        for rows, batch in self._batches(examples, rate):
            memory = batching.remember(self.params, batch, self.architecture, rate)
            vectors, lengths = (batching.fetch(x) for x in (memory.vectors.astype(jnp.float32), memory.length))
            for i, row in enumerate(rows):
                kept, example = vectors[i, : lengths[i]], examples[row]
                results[row] = CompressedContext(kept, len(example.context), example.truncated, example.cut)
        return results[0] if isinstance(question, str) else results

    @overload
    def answer(  # pyright: ignore[reportOverlappingOverload]
        self,
        context: str,
        question: str,
        *,
        rate: int | None = None,
        logprobs: bool = False,
        **options: Unpack[Options],
    ) -> Answer: ...

    @overload
    def answer(
        self,
        context: Sequence[str],
        question: Sequence[str],
        *,
        rate: int | None = None,
        logprobs: bool = False,
        **options: Unpack[Options],
    ) -> list[Answer]: ...

    def answer(
        self,
        context: str | Sequence[str],
        question: str | Sequence[str],
        *,
        rate: SupportsIndex | None = None,
        logprobs: bool = False,
        **options: Unpack[Options],
    ) -> Answer | list[Answer]:
        """The answer to ``question`` from the compressed ``context``; lists as in ``compress``. Greedy unless a
        ``temperature`` is given; the other ``options`` are those of config.Generation. With ``logprobs``, each answer
        has the log-probabilities of its tokens."""
        chosen = generation.chosen(self.run.config.generation, options)
        results = self.generate(self._examples(context, question), rate, chosen, logprobs=logprobs)
        return results[0] if isinstance(question, str) else results

    def stream(
        self,
        context: str,
        question: str,
        *,
        rate: SupportsIndex | None = None,
        logprobs: bool = False,
        **options: Unpack[Options],
    ) -> AnswerStream:
        """``answer`` as an iterator over pieces of its text, each given as soon as no further token can change it."""
        asked, chosen = time.perf_counter(), generation.chosen(self.run.config.generation, options)
        (example,) = self._examples(context, question)
        rate = batching.check(self.run, [example], rate, chosen.max_new_tokens)
        ((_, batch),) = self._batches([example], rate)
        memory = batching.remember(self.params, batch, self.architecture, rate)
        vectors = int(batching.fetch(memory.length)[0])
        compressed = time.perf_counter()
        pieces = generation.stream(self.params, self.architecture, memory, batch, chosen, self.run.stop, self.tokenizer)
        return AnswerStream(
            pieces, lambda reply: self._answer(reply, example, rate, vectors, logprobs), asked, compressed
        )

    def prompt_embeddings(self, context: str, question: str, *, rate: SupportsIndex | None = None) -> PromptEmbeddings:
        """What the decoder reads for ``question``, [memory; embed(question)], for serving engines and for ``slots``."""
        (example,) = self._examples(context, question)
        rate = batching.check(self.run, [example], rate, 1)
        ((_, batch),) = self._batches([example], rate)
        memory = batching.remember(self.params, batch, self.architecture, rate)
        rows, lengths = batching.prompt(self.params, memory, batch, self.architecture)
        vectors = batching.fetch(rows)[0, : int(batching.fetch(lengths)[0])]
        return PromptEmbeddings(
            vectors, len(example.context), int(batching.fetch(memory.length)[0]), example.truncated, example.cut
        )

    def slots(self, slots: int = 8, length: int = 1024, waiting: int = 64) -> SlotDecoder:
        """A decode loop that answers ``slots`` questions at once, each of ``length`` positions at most for its prompt
        and its answer; ``waiting`` more may wait for a slot."""
        return SlotDecoder(
            self.params, self.architecture, self.run.stop, self.tokenizer, self.run.config.generation,
            slots=slots, length=length, waiting=waiting,
        )  # fmt: skip

    def generate(
        self,
        examples: Sequence[Example],
        rate: SupportsIndex | None,
        options: Generation,
        *,
        logprobs: bool = False,
    ) -> list[Answer]:
        """Answer tokenised examples; those with an empty context are answered closed book."""
        results: list[Any] = [None] * len(examples)
        rate = batching.check(self.run, examples, rate, options.max_new_tokens)
        for rows, batch in self._batches(examples, rate):
            memory = batching.remember(self.params, batch, self.architecture, rate)
            replies = generation.replies(
                self.params, self.architecture, memory, batch, options, self.run.stop, self.tokenizer, len(rows)
            )
            vectors = batching.fetch(memory.length)
            for i, row in enumerate(rows):
                results[row] = self._answer(replies[i], examples[row], rate, int(vectors[i]), logprobs)
        return results

    def _answer(self, reply: generation.Reply, example: Example, rate: int, vectors: int, logprobs: bool) -> Answer:
        context = len(example.context)
        cost = of_memory(self.architecture, context, len(example.query), rate, vectors)
        made_of = (context, cost, example.truncated, example.cut)
        return Answer(reply.text, reply.tokens, *made_of, reply.finish_reason, reply.logprobs if logprobs else None)

    def _examples(self, context: str | Sequence[str], question: str | Sequence[str]) -> list[Example]:
        contexts = [context] if isinstance(context, str) else list(context)
        questions = [question] if isinstance(question, str) else list(question)
        if isinstance(context, str) != isinstance(question, str) or len(contexts) != len(questions):
            given = ("a text" if isinstance(g, str) else f"a list of {len(g)}" for g in (context, question))
            raise ValueError(
                f"context and question must be two texts or two lists of equal length, not {' and '.join(given)}; "
                "repeat a context to ask it several questions"
            )
        for name, texts in (("context", contexts), ("question", questions)):
            for number, text in enumerate(texts):
                _check_text(text, f"{name} {number}" if len(texts) > 1 else f"the {name}")
        records = [Record((c,), q, ()) for c, q in zip(contexts, questions, strict=True)]
        return encode.encode(records, self.tokenizer, self.run.config.data, targets=False)[0]

    def _batches(self, examples: Sequence[Example], rate: int) -> Iterator[tuple[list[int], Batch]]:
        return batching.batches(self.run, examples, rate, self.batch_size, self.mesh)


def _check_text(text: Any, name: str) -> None:
    """Raise ConfigError unless ``text`` is Unicode text, of which a half of a surrogate pair is none."""
    if not isinstance(text, str):
        raise ConfigError(f"{name} is a {type(text).__name__}, not a text")
    half = re.search("[\ud800-\udfff]", text)
    if half:
        raise ConfigError(
            f"{name} has half a surrogate pair at character {half.start() + 1}, which is no Unicode text; decode its "
            'bytes with errors="replace", or leave that character out'
        )
