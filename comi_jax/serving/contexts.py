"""From the pieces of a request, stored documents and texts, to the prompt that a slot decodes.

    segments of piece 1, piece 2, ...  ->  memory for the question  ->  [memory; embed(question)]

A piece begins a new segment, as text that is appended to a document does.
"""

import dataclasses
import itertools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from comi_jax.config import Generation, max_groups
from comi_jax.data.encode import LengthError, token_ids
from comi_jax.errors import UserError
from comi_jax.serving import asking, batching, encoding
from comi_jax.serving.compressor import Comi
from comi_jax.serving.documents import Document
from comi_jax.serving.segments import Contents, DocumentError, Segment, read_segment
from comi_jax.serving.settings import Settings
from comi_jax.serving.store import DEVICE, DocumentStore
from comi_jax.serving.telemetry import Telemetry


class MissingError(UserError):
    """A stored document that is gone."""


class SizeError(UserError):
    """A document that is larger than the whole store."""


class FullError(UserError):
    """A store that has no room for a document now."""


@dataclass(frozen=True)
class Reference:
    """A piece of a context: the document of the store called ``name``."""

    name: str


@dataclass(frozen=True)
class Ask:
    """A question about a context; without ``pieces`` the question is answered as it is, nothing is compressed."""

    pieces: tuple[Reference | str, ...]
    question: str
    rate: int  # one of the server's
    max_slots: int | None  # in place of the rate
    keep: tuple[tuple[int, int], ...]
    options: Generation


@dataclass(frozen=True)
class Ingest:
    """A text to be encoded and stored as ``name``."""

    name: str
    text: str


@dataclass(frozen=True)
class Prepared:
    """What a question's slot begins with, or what an ingested text has become, and what it took."""

    prompt: np.ndarray  # [memory vectors + question tokens, hidden size]; of an ingested text: no rows
    context_tokens: int
    cached_tokens: int  # of these, those that were encoded before
    question_tokens: int
    memory_vectors: int
    rate: int | None  # None: nothing was compressed
    nbytes: int  # of the document
    encode_seconds: float
    compress_seconds: float


class Preparer:
    """All computation before the slots. One thread uses it, the engine's; ``store`` may be used from others."""

    def __init__(self, comi: Comi, store: DocumentStore, settings: Settings, telemetry: Telemetry):
        self._comi, self.store, self._settings, self._telemetry = comi, store, settings, telemetry

    def ingest(self, work: Ingest) -> Prepared:
        """Encode a text and store it. Raises LengthError if it is too long, SizeError or FullError if the store cannot
        take it."""
        start = time.perf_counter()
        document = self._encode(work.text)
        if document.nbytes > self.store.budget[DEVICE]:
            raise SizeError(
                f"the encoded file has {document.nbytes:,} bytes, more than the {self.store.budget[DEVICE]:,} of the "
                "server's store"
            )
        try:
            self.store.put(work.name, document)
        except DocumentError:
            raise FullError("the server's store is full; delete files, or ask again when some have expired") from None
        seconds = time.perf_counter() - start
        self._telemetry.encode.observe(seconds)
        none = np.zeros((0, self._comi.run.backbone.hidden_size), np.float32)
        return Prepared(none, document.tokens, 0, 0, 0, None, document.nbytes, seconds, 0.0)

    def ask(self, work: Ask) -> Prepared:
        """The prompt of a question. Raises LengthError for what is too long and MissingError for a document that is
        gone."""
        question = self._question(work)
        if not work.pieces:
            self._telemetry.prompt_tokens.inc(len(question))
            return Prepared(self._embedded(question), 0, 0, len(question), 0, None, 0, 0.0, 0.0)
        start = time.perf_counter()
        document, cached = self._document(work)
        encoded = time.perf_counter()
        rate = self._rate(work, document.contents)
        amount: asking.Amount = {"rate": rate, "keep": work.keep}
        (asked,) = asking.ask(self._comi, [document], [work.question], amount, work.options.max_new_tokens)
        if asked.slots + len(question) + work.options.max_new_tokens > self._settings.slot_length:
            raise LengthError(
                f"{asked.slots} memory vectors, a question of {len(question)} tokens and an answer of up to "
                f"{work.options.max_new_tokens} do not fit into the {self._settings.slot_length} positions of this "
                "server; use a higher rate, a shorter question or a smaller max_tokens"
            )
        memory = asking.memory(self._comi, asked)
        prompt = np.concatenate([memory, self._embedded(question)])
        seconds, compressing = encoded - start, time.perf_counter() - encoded
        self._observe(document.tokens, cached, len(question), len(memory), seconds, compressing)
        return Prepared(
            prompt, document.tokens, cached, len(question), len(memory), rate, document.nbytes, seconds, compressing
        )

    # --- pieces -------------------------------------------------------------------------------------------------------

    def _encode(self, text: str) -> Document:
        """``text`` as a document. Raises LengthError if it has no tokens, or more than the server's contexts."""
        (ids,) = token_ids(self._comi.tokenizer, [text])  # checked here, as a run may be set to cut what is too long
        if not ids:
            raise LengthError("a text of the context has no tokens; leave it out")
        self._check_length(len(ids))
        return self._comi.encode(text)

    def _check_length(self, tokens: int) -> None:
        if tokens > self._settings.max_context:
            raise LengthError(
                f"the context has {tokens} tokens, more than the {self._settings.max_context} of this server"
            )

    def _question(self, work: Ask) -> np.ndarray:
        """The token ids of the question; a lone message may be as long as a slot."""
        (ids,) = token_ids(self._comi.tokenizer, [work.question])
        most = self._settings.max_question if work.pieces else self._settings.slot_length - work.options.max_new_tokens
        if not ids:
            raise LengthError("the question, the last user message, has no tokens; give it some text")
        if len(ids) > most:
            raise LengthError(
                f"the question, the last user message, has {len(ids)} tokens, more than the {most} of this server; "
                "give long text as a file, as documents or in earlier messages"
            )
        return np.asarray(ids, np.int32)

    def _embedded(self, ids: np.ndarray) -> np.ndarray:
        padded = np.zeros((1, self._width(len(ids))), np.int32)
        padded[0, : len(ids)] = ids
        return np.asarray(asking.embeddings(self._comi.params, padded, self._comi.architecture))[: len(ids)]

    def _document(self, work: Ask) -> tuple[Document, int]:
        """The pieces as one document, and how many of its tokens were encoded before."""
        documents, cached = [], 0
        for piece in work.pieces:
            if isinstance(piece, str):
                documents.append(self._encode(piece))
                continue
            if piece.name not in self.store:
                raise MissingError(f"the file {piece.name} is gone")
            documents.append(self.store.get(piece.name))
            cached += documents[-1].tokens
        if len(documents) == 1:
            return documents[0], cached
        document = Document(joined([each.contents for each in documents]))
        self._check_length(document.tokens)
        return document, cached

    def _rate(self, work: Ask, contents: Contents) -> int:
        """The rate; for ``max_slots``, the lowest of the server's at which no more vectors are needed."""
        if work.max_slots is None:
            return work.rate
        exact = asking.rate_for(contents, work.max_slots)
        rates = [rate for rate in self._settings.rates if rate >= exact]
        if not rates:
            raise LengthError(
                f"max_slots is {work.max_slots}, which needs a rate of {exact}, and the highest rate of this server is "
                f"{max(self._settings.rates)}; raise max_slots"
            )
        return min(rates)

    def _observe(self, tokens: int, cached: int, question: int, vectors: int, encode: float, compress: float) -> None:
        self._telemetry.prompt_tokens.inc(tokens + question)
        self._telemetry.cached_tokens.inc(cached)
        self._telemetry.achieved_rate.observe(tokens / vectors)
        self._telemetry.encode.observe(encode)
        self._telemetry.compress.observe(compress)

    # --- programs -----------------------------------------------------------------------------------------------------

    def _width(self, length: int) -> int:
        """The width that a question is padded to before it is embedded."""
        return batching.bucket(length, 16)

    def shapes(self) -> tuple[list[int], list[int]]:
        """The widths of segments and of questions that the limits allow."""
        config = self._comi.run.config
        longest = min(self._settings.max_context, config.compression.segment_size)
        segments = {encoding.bucket(length, config.data, config.compression) for length in range(1, longest + 1)}
        questions = {batching.query_width(length) for length in range(1, self._settings.max_question + 1)}
        return sorted(segments), sorted(questions)

    @property
    def programs(self) -> int:
        """How many programs ``compile`` compiles: for each width of a segment, one that encodes it and, for each width
        of a question and each rate but 1, at most one without and one with ``keep``; and the embeddings."""
        segments, questions = self.shapes()
        rates = sum(rate > 1 for rate in self._settings.rates)
        return len(segments) * (2 + 2 * rates * len(questions)) + len(list(self._embedded_widths()))

    def compile(self, enough: Callable[[], bool] = lambda: False) -> None:
        """Run every program once, so that no request waits for a compilation; ``enough`` ends that early."""
        comi, (segments, questions) = self._comi, self.shapes()
        for width in self._embedded_widths():
            self._embedded(np.zeros(width, np.int32))
        for width in segments:
            ids, arch = np.zeros(width, np.int32), comi.architecture
            kept = read_segment(comi.params, ids[None], np.full(1, width, np.int32), arch, arch.dtype, True)
            segment = Segment(ids, None, kept).to_device()  # as the store does, by a copying program of each shape
            contents = Contents(comi.origin, (segment,), 0, False)
            for rate in self._settings.rates:
                masks = (None, np.arange(width) == 0) if rate > 1 and max_groups(width, rate) > 1 else (None,)
                for question, mask in itertools.product(questions if rate > 1 else questions[:1], masks):
                    if enough():
                        return
                    query = np.zeros(question, np.int32)
                    asking.memory(comi, asking.Question(contents, query, rate, (mask,), ""))

    def _embedded_widths(self) -> Iterator[int]:
        width = self._width(1)
        while width < self._settings.slot_length:
            yield width
            width *= 2
        yield width


def joined(parts: list[Contents]) -> Contents:
    """The contents of several documents as those of one, in order."""
    segments, before = [], 0
    for part in parts:
        for segment in part.segments:
            characters = None if segment.characters is None else segment.characters + np.int32(before)
            segments.append(dataclasses.replace(segment, characters=characters))
        before += part.characters
    return Contents(parts[0].origin, tuple(segments), before, any(part.truncated for part in parts))
