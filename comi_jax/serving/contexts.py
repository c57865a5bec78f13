"""From the pieces of a request, stored documents and texts, to the prompt that a slot decodes.

    segments of piece 1, piece 2, ...  ->  memory for the question  ->  [memory; embed(question)]

A piece begins a new segment, as text that is appended to a document does.
"""

import dataclasses
import time
from collections.abc import Callable, Generator
from dataclasses import dataclass

import numpy as np

from comi_jax.config import Generation
from comi_jax.data.encode import LengthError, token_ids
from comi_jax.errors import ConfigError, UserError
from comi_jax.serving import asking, encoding, explanation, rates, warm_up
from comi_jax.serving.account import Account, of_memory
from comi_jax.serving.compressor import Comi
from comi_jax.serving.documents import Document
from comi_jax.serving.examined import Kept
from comi_jax.serving.rates import AUTO
from comi_jax.serving.saved_documents import SavedDocuments, Shelf
from comi_jax.serving.segments import Contents, DocumentError
from comi_jax.serving.settings import Settings
from comi_jax.serving.store import DEVICE, DocumentStore
from comi_jax.serving.telemetry import Telemetry

CHARACTERS = 4  # of a token, about


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
    rate: int | str  # one of the server's, or "auto"
    max_slots: int | None  # in place of the rate
    keep: tuple[tuple[int, int], ...]
    options: Generation
    explain: bool = False  # whether ``Prepared`` tells what was kept


@dataclass(frozen=True)
class Ingest:
    """A text to be encoded and stored as ``name``."""

    name: str
    text: str


@dataclass(frozen=True)
class Explained:
    """What was kept of the context of a question, and what of it is needed to say so."""

    kept: Kept
    document: Document
    account: Account


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
    explained: Explained | None = None
    contents: Contents | None = None  # of an ingested text


Steps = Generator[None, None, Prepared]


class Preparer:
    """All computation before the slots. One thread uses it, the engine's; ``store`` may be used from others, and
    ``saved``, if there is a folder of saved documents.

    ``ingest`` and ``ask`` are generators that return what they have made: they pause behind each segment that is
    encoded or compressed, so that answers go on meanwhile."""

    def __init__(
        self,
        comi: Comi,
        store: DocumentStore,
        settings: Settings,
        telemetry: Telemetry,
        saved: SavedDocuments | None = None,
    ):
        self._comi, self.store, self._settings, self._telemetry = comi, store, settings, telemetry
        self.saved, self._shelf = saved, Shelf(store, saved, comi.adopt)

    @property
    def programs(self) -> int:
        """How many programs ``compile`` compiles."""
        return warm_up.count(self._comi, self._settings)

    def compile(self, enough: Callable[[], bool] = lambda: False) -> None:
        """Run every program once, so that no request waits for a compilation; ``enough`` ends that early."""
        warm_up.run(self._comi, self._settings, enough)

    def is_long(self, work: Ask | Ingest) -> bool:
        """Whether ``work`` has more text to encode than about a segment. What is stored is not encoded."""
        pieces = (work.text,) if isinstance(work, Ingest) else work.pieces
        characters = sum(len(piece) for piece in pieces if isinstance(piece, str))
        return characters > CHARACTERS * self._comi.run.config.compression.segment_size

    def prepare(self, work: Ask | Ingest) -> Steps:
        """The steps of ``work``."""
        return self.ingest(work) if isinstance(work, Ingest) else self.ask(work)

    def ingest(self, work: Ingest) -> Steps:
        """Encode a text and store it. Raises LengthError if it is too long, SizeError or FullError if the store cannot
        take it."""
        start = time.perf_counter()
        document = yield from self._encode(work.text)
        if document.nbytes > self.store.budget[DEVICE]:
            raise SizeError(
                f"the encoded file has {document.nbytes:,} bytes, more than the {self.store.budget[DEVICE]:,} of the "
                "server's store"
            )
        try:
            self._shelf.put(work.name, document)
        except DocumentError:
            raise FullError("the server's store is full; delete files, or ask again when some have expired") from None
        seconds = time.perf_counter() - start
        self._telemetry.encode.observe(seconds)
        none = np.zeros((0, self._comi.run.backbone.hidden_size), np.float32)
        return Prepared(none, document.tokens, 0, 0, 0, None, document.nbytes, seconds, 0.0, contents=document.contents)

    def ask(self, work: Ask) -> Steps:
        """The prompt of a question. Raises LengthError for what is too long and MissingError for a document that is
        gone."""
        question = self._question(work)
        if not work.pieces:
            self._telemetry.prompt_tokens.inc(len(question))
            return Prepared(self._embedded(question), 0, 0, len(question), 0, None, 0, 0.0, 0.0)
        start = time.perf_counter()
        document, cached = yield from self._document(work)
        encoded = time.perf_counter()
        rate = self._rate(work, document.contents)
        if rate == AUTO:
            rate = yield from rates.chosen_in_steps(self._comi, document.contents, question)
        amount: asking.Amount = {"rate": rate, "keep": work.keep}
        (asked,) = asking.ask(self._comi, [document], [work.question], amount, work.options.max_new_tokens)
        if asked.slots + len(question) + work.options.max_new_tokens > self._settings.slot_length:
            raise LengthError(
                f"{asked.slots} memory vectors, a question of {len(question)} tokens and an answer of up to "
                f"{work.options.max_new_tokens} do not fit into the {self._settings.slot_length} positions of this "
                "server; use a higher rate, a shorter question or a smaller max_tokens"
            )
        parts = []
        for vectors, count in asking.memory_parts(self._comi, asked):
            parts.append(np.asarray(vectors)[: int(count)])
            yield
        memory = np.concatenate(parts)
        prompt = np.concatenate([memory, self._embedded(question)])
        seconds, compressing = encoded - start, time.perf_counter() - encoded
        explain = work.explain and not (work.rate == AUTO and asked.rate == 1)  # which "auto" may choose
        self._observe(document.tokens, cached, len(question), len(memory), seconds, compressing)
        return Prepared(
            prompt, document.tokens, cached, len(question), len(memory), asked.rate, document.nbytes, seconds,
            compressing, self._explained(document, asked, len(memory)) if explain else None,
        )  # fmt: skip

    def _explained(self, document: Document, asked: asking.Question, vectors: int) -> Explained:
        """Raises ConfigError if there is nothing to explain."""
        if any(segment.characters is None for segment in document.segments):
            raise ConfigError("the tokenizer does not tell the characters of its tokens; leave explain out")
        cost = of_memory(self._comi.architecture, document.tokens, len(asked.query), asked.rate, 0, vectors)
        return Explained(explanation.kept(self._comi, asked), document, cost)

    # --- pieces -------------------------------------------------------------------------------------------------------

    def _encode(self, text: str) -> Generator[None, None, Document]:
        """``text`` as a document. Raises LengthError if it has no tokens, or more than the server's contexts."""
        (ids,) = token_ids(self._comi.tokenizer, [text])  # checked here, as a run may be set to cut what is too long
        if not ids:
            raise LengthError("a text of the context has no tokens; leave it out")
        self._check_length(len(ids))
        return (yield from encoding.encoded_in_steps(self._comi, text, "a text of the context"))

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
        return warm_up.embedded(self._comi, ids)

    def _document(self, work: Ask) -> Generator[None, None, tuple[Document, int]]:
        """The pieces as one document, and how many of its tokens were encoded before."""
        documents, cached = [], 0
        for piece in work.pieces:
            if isinstance(piece, str):
                documents.append((yield from self._encode(piece)))
                continue
            documents.append((yield from self._shelf.take(piece.name)))
            cached += documents[-1].tokens
        document = documents[0]
        if len(documents) > 1:
            document = Document(joined([each.contents for each in documents]))
        self._check_length(document.tokens)
        return document, cached

    def _rate(self, work: Ask, contents: Contents) -> int | str:
        """The rate, or "auto"; for ``max_slots``, the lowest of the server's at which no more vectors are needed."""
        if work.max_slots is None:
            return work.rate
        exact = rates.rate_for(contents, work.max_slots)
        enough = [rate for rate in self._settings.rates if rate >= exact]
        if not enough:
            raise LengthError(
                f"max_slots is {work.max_slots}, which needs a rate of {exact}, and the highest rate of this server is "
                f"{max(self._settings.rates)}; raise max_slots"
            )
        return min(enough)

    def _observe(self, tokens: int, cached: int, question: int, vectors: int, encode: float, compress: float) -> None:
        self._telemetry.prompt_tokens.inc(tokens + question)
        self._telemetry.cached_tokens.inc(cached)
        self._telemetry.achieved_rate.observe(tokens / vectors)
        self._telemetry.encode.observe(encode)
        self._telemetry.compress.observe(compress)


def joined(parts: list[Contents]) -> Contents:
    """The contents of several documents as those of one, in order."""
    segments, before = [], 0
    for part in parts:
        for segment in part.segments:
            characters = None if segment.characters is None else segment.characters + np.int32(before)
            segments.append(dataclasses.replace(segment, characters=characters))
        before += part.characters
    return Contents(parts[0].origin, tuple(segments), before, any(part.truncated for part in parts))
