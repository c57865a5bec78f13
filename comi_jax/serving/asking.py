"""Questions about documents: the memory of each, and the batches in which they are answered.

The programs of a question depend on its own document, query and options alone, never on its companions: a question has
the same bits alone and in a batch.
"""

import functools
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, SupportsIndex, TypedDict

import jax
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from comi_jax.config import max_groups
from comi_jax.data.encode import LengthError, token_ids
from comi_jax.errors import ConfigError
from comi_jax.model import backbone as lm
from comi_jax.model import comi_memory, encoder
from comi_jax.model.architecture import Architecture
from comi_jax.model.batch import Batch
from comi_jax.model.compress import Aux
from comi_jax.model.memory import Memory
from comi_jax.serving import batching, rates
from comi_jax.serving.documents import Document
from comi_jax.serving.encoding import Model, check_origins, document_of
from comi_jax.serving.generation import Options
from comi_jax.serving.rates import AUTO, Rate
from comi_jax.serving.segments import Contents, Kept, Segment, at_hand, restored
from comi_jax.serving.spans import Spans, checked_spans, kept_tokens, listed_spans, rate_of_others


class Amount(TypedDict, total=False):
    """How much of a context is kept, as in ``Comi.compress``; absent or None: the run's first rate, no spans."""

    rate: Rate | None
    max_slots: SupportsIndex | None
    keep: Spans | None


class AskOptions(Amount, Options, total=False):
    """The options of an answer: how much of the context is kept, and how it is decoded."""


@dataclass(frozen=True)
class Asked:
    """The sizes of one question, as its answer tells them."""

    context: int  # tokens
    query: int
    rate: int
    truncated: bool
    cut: str


@dataclass(frozen=True)
class Memories:
    """Questions, and the batches of their memories: (the indices of the questions in its rows, memory, queries)."""

    asked: Sequence[Asked]
    batches: Iterator[tuple[list[int], Memory, Batch]]
    exact: bool  # whether the bits of a row depend on nothing but its question


def split(options: AskOptions) -> tuple[Amount, Options]:
    """The two parts of ``options``."""
    amount: Any = {name: value for name, value in options.items() if name in Amount.__annotations__}
    decoding: Any = {name: value for name, value in options.items() if name not in amount}
    return amount, decoding


def of_documents(context: Any, amount: Amount) -> bool:
    """Whether ``context`` is a document or a list with one, or ``amount`` says what only documents can do. Raises
    ConfigError for an unknown option."""
    unknown = sorted(set(amount) - set(Amount.__annotations__))
    if unknown:
        raise ConfigError(f"there is no option {unknown[0]}; there are: {', '.join(Amount.__annotations__)}")
    contexts = [context] if isinstance(context, str | Document) else batching.listed("context", context)
    special = amount.get("max_slots") is not None or amount.get("keep") is not None or amount.get("rate") == AUTO
    return special or any(isinstance(each, Document) for each in contexts)


def memories(model: Model, context: Any, question: str | Sequence[str], amount: Amount, new_tokens: int) -> Memories:
    """The memories of questions about documents, or about texts as documents. Raises UserErrors for what cannot be
    asked."""
    amount = {**amount, "keep": listed_spans(amount.get("keep"))}
    documents, texts = pairs(model, context, question, amount.get("keep"))
    questions = ask(model, documents, texts, amount, new_tokens)
    asked = [Asked(q.context_tokens, len(q.query), q.rate, bool(q.cut), q.cut) for q in questions]
    return Memories(asked, batches(model, questions), exact=True)


@dataclass(frozen=True)
class Question:
    """One question about a document as it was when the question was asked."""

    contents: Contents
    query: np.ndarray  # token ids
    rate: int
    kept: tuple[np.ndarray | None, ...]  # of each segment, the tokens that become vectors of their own
    cut: str  # what was truncated, as in Answer

    @property
    def context_tokens(self) -> int:
        return sum(segment.tokens for segment in self.contents.segments)

    @property
    def slots(self) -> int:
        """The most memory vectors that it can have."""
        return sum(max_groups(segment.tokens, self.rate) for segment in self.contents.segments)


def ask(
    model: Model, documents: Sequence[Document], texts: Sequence[str], amount: Amount, new_tokens: int
) -> list[Question]:
    """The question ``texts[i]`` about ``documents[i]``, checked."""
    check_origins(model, documents)
    rate, max_slots, keep = (amount.get(name) for name in ("rate", "max_slots", "keep"))
    if rate is not None and max_slots is not None:
        raise ConfigError("both rate and max_slots are given; give one of them")
    data, questions = model.run.config.data, []
    if not texts:
        return questions
    for number, (document, ids) in enumerate(zip(documents, token_ids(model.tokenizer, texts), strict=True), start=1):
        name = f"question {number}" if len(texts) > 1 else "the question"
        if not ids:
            raise LengthError(f"{name} has no tokens; give it some text")
        if len(ids) > data.max_query and data.on_long == "refuse":
            raise LengthError(
                f"{name} has {len(ids)} tokens, more than data.max_query ({data.max_query}); raise it, or set "
                "data.on_long=truncate to cut its beginning"
            )
        contents = document.contents
        query = np.asarray(ids[-data.max_query :], np.int32)
        chosen = rates.rate_of(model, contents, query, rate, max_slots)
        kept = kept_tokens(contents, checked_spans(contents, keep or ()), chosen)
        cut = " and ".join(["context"] * contents.truncated + ["question"] * (len(ids) > data.max_query))
        questions.append(Question(contents, query, chosen, kept, cut))
        _check_positions(model, questions[-1], name, new_tokens)
    return questions


def pairs(
    model: Model, context: Any, question: str | Sequence[str], keep: Spans | None
) -> tuple[list[Document], list[str]]:
    """Documents and questions, pair by pair: one document and one or many questions, or two lists of equal length.
    Texts are encoded. Raises ConfigError for anything else, and for ``keep`` of several documents."""
    questions = batching.listed("question", question)
    single = isinstance(context, str | Document)
    contexts = [context] * len(questions) if single else batching.listed("context", context)
    if len(contexts) != len(questions) or (isinstance(question, str) and not single):
        raise ConfigError(
            f"there are {len(contexts)} documents and {len(questions)} questions; give one document, or as many as "
            "questions"
        )
    if keep and len({id(each) for each in contexts}) > 1:
        raise ConfigError("keep holds spans of one document; ask about one document at a time")
    for name, texts in (("context", [c for c in contexts if isinstance(c, str)]), ("question", questions)):
        batching.check_texts(name, texts)
    encoded: dict[int, Document] = {}  # a text that is asked several questions is encoded once
    for i, each in enumerate(contexts):
        if isinstance(each, str) and id(each) not in encoded:
            name = f"context {i + 1}" if len(contexts) > 1 else "the context"
            encoded[id(each)] = document_of(model, each, name, None, True, "device")
    documents: list[Any] = [encoded.get(id(each), each) for each in contexts]
    return documents, questions


def _check_positions(model: Model, question: Question, name: str, new_tokens: int) -> None:
    limit, query = model.run.backbone.max_position_embeddings, len(question.query)
    longest = max(segment.tokens for segment in question.contents.segments)
    if longest + query > limit:
        raise LengthError(
            f"{name}: a segment of {longest} tokens and a question of {query} are more than the {limit} positions of "
            "the model; encode the text with a smaller compression.segment_size"
        )
    if question.slots + query + new_tokens > limit:
        raise LengthError(
            f"{name}: {question.slots} memory vectors, a question of {query} and an answer of {new_tokens} tokens are "
            f"more than the {limit} positions of the model; raise the rate ({question.rate})"
        )


# --- memory -----------------------------------------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnames=("arch", "min_rate"))
def remember_segment(
    params: Any,
    kept: Kept,
    length: Int[Array, "1 1"],
    query: Int[Array, "1 Q"],
    query_length: Int[Array, " 1"],
    rate: Int[Array, " 1"],
    apart: Bool[Array, "1 S"] | None,
    arch: Architecture,
    min_rate: int,
) -> Memory:
    """The memory of one segment for one question; ``apart`` tokens become vectors of their own."""
    encoded = encoder.Encoded((restored(kept, length, arch),))
    return comi_memory.remember(params, arch, encoded, query, query_length, rate, min_rate, apart)


@functools.partial(jax.jit, static_argnames="arch")
def embeddings(params: Any, ids: Int[Array, "1 S"], arch: Architecture) -> Float[Array, "S D"]:
    """The decoder's embeddings of a text's own tokens: the memory at rate 1."""
    return lm.embed_tokens(params["decoder"], ids, arch.dtype, arch.runtime)[0]


def memory(model: Model, question: Question) -> np.ndarray:
    """The memory [vectors, D] of a question, in the model's dtype."""
    return np.concatenate([np.asarray(vectors)[: int(count)] for vectors, count in memory_parts(model, question)])


def memory_parts(model: Model, question: Question) -> Iterator[tuple[Any, Any]]:
    """The memory of each segment of a question in turn: vectors, padded, and how many are real."""
    for segment, apart in zip(question.contents.segments, question.kept, strict=True):
        if question.rate == 1:
            yield embeddings(model.params, _padded(segment), model.architecture), segment.tokens
        else:
            out = _remember(model, question, segment, apart)
            yield out.vectors[0], out.length[0]


def examine(model: Model, question: Question) -> list[Aux]:
    """What lies behind the memory of a question at a rate above 1: for each segment, its ``Aux``, without the batch
    axis and with padding."""
    pairs = zip(question.contents.segments, question.kept, strict=True)
    found = (_remember(model, question, segment, apart).aux[0] for segment, apart in pairs)
    return [jax.tree.map(lambda x: np.asarray(x)[0], aux) for aux in found]


def _remember(model: Model, question: Question, segment: Segment, apart: np.ndarray | None) -> Memory:
    query, length = rates.padded_query(question.query)
    kept, width, rate = at_hand(segment.kept, model.architecture.runtime.mesh), _width(segment), question.rate
    if apart is not None:
        rate, apart = rate_of_others(apart, rate), np.pad(apart, (0, width - len(apart)))[None]
    tokens, at_rate = np.array([[segment.tokens]], np.int32), np.array([rate], np.int32)
    return remember_segment(
        model.params, kept, tokens, query, length, at_rate, apart, model.architecture, question.rate
    )


def _width(segment: Segment) -> int:
    """The tokens of a segment with its padding."""
    return segment.kept.states.values.shape[0]


def _padded(segment: Segment) -> np.ndarray:
    ids = np.zeros((1, _width(segment)), np.int32)
    ids[0, : segment.tokens] = segment.ids
    return ids


# --- batches ----------------------------------------------------------------------------------------------------------


def batches(model: Model, questions: Sequence[Question]) -> Iterator[tuple[list[int], Memory, Batch]]:
    """Memories and queries to be answered together, with the indices of their questions; filler rows follow these. All
    batches have ``model.batch_size`` rows, and the widths of a question are its own: an answer has one program."""
    groups = defaultdict(list)
    for i, question in enumerate(questions):
        groups[batching.memory_width(question.slots), batching.query_width(len(question.query))].append(i)
    for (slots, width), members in groups.items():
        for first in range(0, len(members), model.batch_size):
            rows = members[first : first + model.batch_size]
            memories = [memory(model, questions[i]) for i in rows]
            made = _collate(model.batch_size, slots, width, memories, [questions[i].query for i in rows])
            yield rows, *batching.put(made, model.architecture.runtime.mesh)


def _collate(
    size: int, slots: int, width: int, memories: list[np.ndarray], queries: list[np.ndarray]
) -> tuple[Memory, Batch]:
    """As NumPy arrays, until they are put on devices."""
    vectors: Any = np.zeros((size, slots, memories[0].shape[1]), memories[0].dtype)
    query: Any = np.zeros((size, width), np.int32)
    lengths: Any = np.zeros((2, size), np.int32)
    for row in range(size):
        source = row if row < len(memories) else 0  # filler rows end when the first one does
        for target, values in ((vectors, memories[source]), (query, queries[source])):
            target[row, : len(values)] = values
        lengths[:, row] = len(memories[source]), len(queries[source])
    nothing: Any = np.zeros(size, np.int32)
    batch = Batch(nothing[:, None], nothing, query, lengths[1], nothing[:, None], nothing, nothing)
    return Memory(vectors, lengths[0], ()), batch
