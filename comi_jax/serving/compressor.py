"""The public API: compress texts and answer questions about them.

memory = align(compress(encode(context, question)));   answer = greedy(decoder, [memory; embed(question)])
"""

import dataclasses
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, SupportsIndex, Unpack, overload

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from comi_jax.config import Generation
from comi_jax.data import encode
from comi_jax.data.encode import Example
from comi_jax.data.records import Record
from comi_jax.devices import sharding
from comi_jax.errors import ConfigError
from comi_jax.model.batch import Batch
from comi_jax.runs.description import Run
from comi_jax.runs.folder import Folder
from comi_jax.runs.selection import existing
from comi_jax.runs.stored_weights import load_params, weights_of
from comi_jax.serving import asking, auto_rate, batching, encoding, generation
from comi_jax.serving.account import of_memory
from comi_jax.serving.answers import Answer, AnswerStream, CompressedContext
from comi_jax.serving.asking import Amount, AskOptions
from comi_jax.serving.auto_rate import Calibration
from comi_jax.serving.documents import Document
from comi_jax.serving.prompts import PromptEmbeddings
from comi_jax.serving.rates import Rate
from comi_jax.serving.segments import Contents, Origin
from comi_jax.serving.slots import SlotDecoder
from comi_jax.weights.tokenizer import load_tokenizer

Contexts = str | Document | Sequence[str] | Sequence[Document]


class Comi:
    """A trained compressor. The result of an example does not depend on padding or on the rest of its batch."""

    def __init__(
        self,
        run: Run,
        params: dict[str, Any],
        tokenizer: Any,
        *,
        batch_size: int = 16,
        mesh: Mesh | None = None,
        name: str = "the model",
        weights: str = "",
        calibration: Path | None = None,
    ):
        """``mesh``: the devices that ``params`` are sharded over, None for one device. Batches, of ``batch_size``
        examples rounded up to a multiple of the row shards, are split over them too. With several processes, all must
        make the same calls. ``name`` and ``weights``, a hash, are what documents are bound to; without a hash, the
        encoder's weights are hashed. ``calibration``: the file of ``comi_jax.calibrate``, for rate="auto"."""
        if batch_size < 1:
            raise ConfigError(f"the batch size is {batch_size}; it must be at least 1")
        self.run, self.params, self.tokenizer, self.mesh = run, params, tokenizer, mesh
        shards = 1 if mesh is None else sharding.row_shards(mesh)
        self.batch_size = -(-batch_size // shards) * shards
        runtime = dataclasses.replace(run.architecture.runtime, remat="off", mesh=mesh)
        self.architecture = dataclasses.replace(run.architecture, runtime=runtime)
        self._bound, self._origin = (name, weights), None
        self._calibration_file, self._calibration = calibration, None

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
        tokenizer, step = load_tokenizer(Folder(folder).tokenizer), existing(folder, step)
        return cls(
            run, params, tokenizer, batch_size=batch_size, mesh=mesh, name=f"{folder} at step {step}",
            weights=weights_of(folder, step), calibration=Folder(folder).calibration(step),
        )  # fmt: skip

    @property
    def origin(self) -> Origin:
        """What the documents of this model are bound to."""
        if self._origin is None:
            self._origin = encoding.origin_of(self.run, self.params, self.tokenizer, *self._bound)
        return self._origin

    def calibration(self) -> Calibration:
        """What chooses the rate where it is "auto". Raises ConfigError if the model is not calibrated."""
        if self._calibration is None:
            self._calibration = auto_rate.read(self._calibration_file, self.run, self.origin.weights, self._bound[0])
        return self._calibration

    @overload
    def encode(  # pyright: ignore[reportOverlappingOverload]
        self, text: str, *, dtype: str | None = None, keep_kv: bool = True, place: str = "device"
    ) -> Document: ...

    @overload
    def encode(
        self, text: Sequence[str], *, dtype: str | None = None, keep_kv: bool = True, place: str = "device"
    ) -> list[Document]: ...

    def encode(
        self, text: str | Sequence[str], *, dtype: str | None = None, keep_kv: bool = True, place: str = "device"
    ) -> Document | list[Document]:
        """Encode ``text``, to ask it many questions; a list gives a list.

        Args:
            dtype: of what is kept: "float32", "bfloat16" or "int8" (with one scale per vector); None: the model's
                dtype, which is exact.
            keep_kv: keep the encoder's keys and values. Without them, in a fraction of the bytes, questions are encoded
                without their context: an approximation that a model must be trained for
                (compression.query_reads_context=false, which never keeps them). Others lose most answers.
            place: "device", or "host": then at most one segment is on the device at a time, here and in answering, so
                that a document may be larger than the device's memory.
        """
        texts = batching.listed("text", text)
        batching.check_texts("text", texts)
        names = [f"text {i}" if len(texts) > 1 else "the text" for i in range(1, len(texts) + 1)]
        pairs = zip(texts, names, strict=True)
        documents = [encoding.document_of(self, *pair, dtype, keep_kv, place) for pair in pairs]
        return documents[0] if isinstance(text, str) else documents

    def adopt(self, contents: Contents) -> Document:
        """The document of ``contents``, to which this model appends texts."""
        return encoding.adopt(self, contents)

    # A text is a sequence of texts to Python, so that the first of two overloads is not apart from the second.
    @overload
    def compress(  # pyright: ignore[reportOverlappingOverload]
        self, context: str | Document, question: str, **amount: Unpack[Amount]
    ) -> CompressedContext: ...

    @overload
    def compress(
        self, context: Document | Sequence[str] | Sequence[Document], question: Sequence[str], **amount: Unpack[Amount]
    ) -> list[CompressedContext]: ...

    def compress(
        self, context: Contexts, question: str | Sequence[str], **amount: Unpack[Amount]
    ) -> CompressedContext | list[CompressedContext]:
        """Compress ``context``, a text or a document, for ``question``. Two lists of equal length give a list, pair by
        pair; so do one document and a list of questions. How much is said by (``Amount``):

            rate: context tokens per vector (None: the first of compression.rates). At 1 nothing is compressed: the
                vectors are the decoder's embeddings of the text. "auto": one of compression.rates, chosen for the
                question by the checkpoint's calibration (``comi_jax.calibrate``).
            max_slots: the most vectors, in place of a rate: the smallest rate that gives no more.
            keep: spans of characters, (first, one past the last), whose tokens become vectors of their own, within the
                same number of vectors; of one context.
        """
        made = self._memories(context, question, amount, 1)
        results: list[Any] = [None] * len(made.asked)
        for rows, memory, _ in made.batches:
            if memory.before is not None:
                raise ConfigError(
                    f"the memory of system={self.architecture.system} is keys and values, not vectors; use answer, "
                    "stream or prompt_embeddings"
                )
            vectors, lengths = (batching.fetch(x) for x in (memory.vectors.astype(jnp.float32), memory.length))
            for i, row in enumerate(rows):
                kept, asked = vectors[i, : lengths[i]], made.asked[row]
                results[row] = CompressedContext(kept, asked.context, asked.truncated, asked.cut, asked.rate)
        return results[0] if isinstance(question, str) else results

    @overload
    def answer(  # pyright: ignore[reportOverlappingOverload]
        self, context: str | Document, question: str, *, logprobs: bool = False, **options: Unpack[AskOptions]
    ) -> Answer: ...

    @overload
    def answer(
        self,
        context: Document | Sequence[str] | Sequence[Document],
        question: Sequence[str],
        *,
        logprobs: bool = False,
        **options: Unpack[AskOptions],
    ) -> list[Answer]: ...

    def answer(
        self,
        context: Contexts,
        question: str | Sequence[str],
        *,
        logprobs: bool = False,
        **options: Unpack[AskOptions],
    ) -> Answer | list[Answer]:
        """The answer to ``question`` from the compressed ``context``; arguments as in ``compress``. Greedy unless a
        ``temperature`` is given; the other ``options`` are those of config.Generation. With ``logprobs``, each answer
        has the log-probabilities of its tokens."""
        amount, decoding = asking.split(options)
        chosen = generation.chosen(self.run.config.generation, decoding)
        results = self._answers(self._memories(context, question, amount, chosen.max_new_tokens), chosen, logprobs)
        return results[0] if isinstance(question, str) else results

    def stream(
        self,
        context: str | Document,
        question: str,
        *,
        logprobs: bool = False,
        **options: Unpack[AskOptions],
    ) -> AnswerStream:
        """``answer`` as an iterator over pieces of its text, each given as soon as no further token can change it."""
        begun, (amount, decoding) = time.perf_counter(), asking.split(options)
        chosen = generation.chosen(self.run.config.generation, decoding)
        made = self._memories(context, question, amount, chosen.max_new_tokens)
        ((_, memory, batch),) = made.batches
        size = batching.sizes(memory)[0]  # filler rows follow
        compressed = time.perf_counter()
        pieces = generation.stream(self.params, self.architecture, memory, batch, chosen, self.run.stop, self.tokenizer)
        return AnswerStream(pieces, lambda reply: self._answer(reply, made.asked[0], size, logprobs), begun, compressed)

    def prompt_embeddings(self, context: str | Document, question: str, **amount: Unpack[Amount]) -> PromptEmbeddings:
        """What the decoder reads for ``question``, [memory; embed(question)], for serving engines and for ``slots``."""
        made = self._memories(context, question, amount, 1)
        ((_, memory, batch),) = made.batches
        prompt, asked = batching.prompt(self.params, memory, batch, self.architecture), made.asked[0]
        vectors = batching.fetch(prompt.rows)[0, : int(batching.fetch(prompt.length)[0])]
        before = None if prompt.before is None else jax.tree.map(batching.fetch, prompt.before)
        entries = sum(batching.sizes(memory)[0])
        return PromptEmbeddings(vectors, asked.context, entries, asked.truncated, asked.cut, before)

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
        return self._answers(self._of_examples(examples, rate, options.max_new_tokens), options, logprobs)

    def _answers(self, made: asking.Memories, options: Generation, logprobs: bool) -> list[Answer]:
        results: list[Any] = [None] * len(made.asked)
        for rows, memory, batch in made.batches:
            replies = generation.replies(
                self.params, self.architecture, memory, batch, options, self.run.stop, self.tokenizer, len(rows),
                shrink=not made.exact,
            )  # fmt: skip
            sizes = batching.sizes(memory)
            for i, row in enumerate(rows):
                results[row] = self._answer(replies[i], made.asked[row], sizes[i], logprobs)
        return results

    def _answer(self, reply: generation.Reply, asked: asking.Asked, size: tuple[int, int], logprobs: bool) -> Answer:
        cost = of_memory(self.architecture, asked.context, asked.query, asked.rate, *size)
        made_of = (asked.context, cost, asked.truncated, asked.cut)
        logs = reply.logprobs if logprobs else None
        rate = None if self.run.config.system == "full_prompt" else asked.rate
        return Answer(reply.text, reply.tokens, *made_of, reply.finish_reason, logs, rate)

    def _memories(
        self, context: Contexts, question: str | Sequence[str], amount: Amount, new_tokens: int
    ) -> asking.Memories:
        """The memories of questions, about texts or documents, as batches with room for ``new_tokens``."""
        if asking.of_documents(context, amount):
            return asking.memories(self, context, question, amount, new_tokens)
        return self._of_examples(self._examples(context, question), amount.get("rate"), new_tokens)

    def _of_examples(self, examples: Sequence[Example], rate: Rate | None, new_tokens: int) -> asking.Memories:
        whole = batching.check(self.run, examples, rate, new_tokens)
        asked = [asking.Asked(len(e.context), len(e.query), whole, e.truncated, e.cut) for e in examples]
        batches = (
            (rows, batching.remember(self.params, batch, self.architecture, whole), batch)
            for rows, batch in self._batches(examples, whole)
        )
        return asking.Memories(asked, batches, exact=False)

    def _examples(self, context: Any, question: str | Sequence[str]) -> list[Example]:
        contexts, questions = batching.listed("context", context), batching.listed("question", question)
        if isinstance(context, str) != isinstance(question, str) or len(contexts) != len(questions):
            given = ("a text" if isinstance(g, str) else f"a list of {len(g)}" for g in (context, question))
            raise ValueError(
                f"context and question must be two texts or two lists of equal length, not {' and '.join(given)}; "
                "repeat a context to ask it several questions"
            )
        batching.check_texts("context", contexts)
        batching.check_texts("question", questions)
        records = [Record((c,), q, ()) for c, q in zip(contexts, questions, strict=True)]
        return encode.encode(records, self.tokenizer, self.run.config.data, targets=False)[0]

    def _batches(self, examples: Sequence[Example], rate: int) -> Iterator[tuple[list[int], Batch]]:
        return batching.batches(self.run, examples, rate, self.batch_size, self.mesh)
