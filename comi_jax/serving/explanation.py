"""What compression kept of a document for a question: each token's weight and scores, the groups, and the answer.

The values are those of the memory that the answer was decoded from: the ``Aux`` of ``asking``'s own program. A document
of several segments has the groups of all of them, in order; scores, weights and shares are within a segment.
"""

import datetime
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Unpack

import numpy as np
from jaxtyping import Int

from comi_jax.data.encode import token_spans
from comi_jax.errors import ConfigError
from comi_jax.serving import asking, generation
from comi_jax.serving.answers import Answer
from comi_jax.serving.compressor import Comi
from comi_jax.serving.documents import Document
from comi_jax.serving.encoding import Model
from comi_jax.serving.examined import SCORES, Kept, joined, without_padding
from comi_jax.serving.generation import Options
from comi_jax.version import __version__

FORMAT = 1  # increment when the JSON has other fields


@dataclass(frozen=True)
class Source:
    """A text and the document that it was encoded into."""

    text: str
    document: Document
    characters: Int[np.ndarray, "X 2"]  # of each token, the first character and one past the last
    seconds: float  # that encoding took, compilation included


@dataclass(frozen=True)
class View:
    """One question about a document at one rate."""

    question: str
    rate: int
    answer: Answer
    timings: dict[str, float]  # seconds from the question to its memory, its first token and its end
    kept: Kept
    notes: tuple[tuple[str, str], ...] = ()  # titles and texts to show beside the answer


def check_system(model: Comi) -> None:
    """Raise ConfigError unless ``model`` is COMI, whose encoder reads the question after the context."""
    system = model.run.config.system
    if system != "comi":
        raise ConfigError(f"this checkpoint is of system={system}, which has no MIG; pass one of system=comi")


def encode(model: Comi, text: str) -> Source:
    """``text`` encoded. Raises ConfigError for another system than COMI, LengthError for a text that is too long or has
    no tokens, TextError if the tokenizer does not tell which characters its tokens stand for."""
    check_system(model)
    begun = time.perf_counter()
    document = model.encode(text)
    seconds = time.perf_counter() - begun
    return source_of(model, text, document, seconds)


def source_of(model: Comi, text: str, document: Document, seconds: float) -> Source:
    """``text`` with the ``document`` that it was encoded into in so many seconds. Raises TextError as ``encode``."""
    spans = token_spans(model.tokenizer, text)[: document.tokens]
    return Source(text, document, np.asarray(spans, np.int32).reshape(-1, 2), seconds)


def explain(model: Comi, source: Source, question: str, rate: int | None = None, **options: Unpack[Options]) -> View:
    """Answer ``question`` at ``rate`` (None: the first of the run's) and keep what lies between. The answer is decoded
    twice: the timings are those of the second time, when all programs are compiled. Raises UserErrors for what cannot
    be asked, and ConfigError for rate 1, at which nothing is compressed."""
    chosen = generation.chosen(model.run.config.generation, options)
    (asked,) = asking.ask(model, [source.document], [question], {"rate": rate}, chosen.max_new_tokens)
    found = kept(model, asked)
    "".join(model.stream(source.document, question, rate=asked.rate, **options))
    stream = model.stream(source.document, question, rate=asked.rate, **options)
    "".join(stream)
    if stream.answer is None:
        raise RuntimeError("the stream ended without an answer")
    return View(question, asked.rate, stream.answer, stream.timings, found)


def kept(model: Model, asked: asking.Question) -> Kept:
    """What compression keeps for the question ``asked``. Raises ConfigError for rate 1, at which nothing is compressed,
    and for scores that are not finite."""
    if asked.rate == 1:
        raise ConfigError("at rate 1 nothing is compressed, so there is nothing to explain; give a rate of at least 2")
    parts = [
        without_padding(aux, segment.tokens, asked.rate, number)
        for number, (aux, segment) in enumerate(zip(asking.examine(model, asked), asked.contents.segments, strict=True))
    ]
    if not all(np.isfinite(part["tokens"][name]).all() for part in parts for name in ("weights", *SCORES)):
        raise ConfigError(
            "the scores of this text are not finite, so the model's weights or activations are not; choose another "
            "--step, or set model.dtype=float32"
        )
    return joined(parts)


def account(model: Comi, checkpoint: str, step: int) -> dict[str, Any]:
    """What an explanation was made from and by, for ``as_json``."""
    made = f"{datetime.date.today()}, comi_jax {__version__}"
    return {"config": model.run.config.name, "checkpoint": checkpoint, "step": step, "made": made}


def as_json(source: Source, views: Sequence[View], account: dict[str, Any]) -> dict[str, Any]:
    """All of ``views`` as JSON values. Characters are counted in Unicode code points, tokens and slots through the
    document. Numbers have as many digits as their dtype needs to be read back exactly."""
    return {
        "format": FORMAT,
        **account,
        "text": source.text,
        "tokens": {"start": _values(source.characters[:, 0]), "end": _values(source.characters[:, 1])},
        "segments": [segment.tokens for segment in source.document.segments],
        "encode_seconds": source.seconds,
        "views": [_view(view) for view in views],
    }


def _view(view: View) -> dict[str, Any]:
    answer, found = view.answer, view.kept
    return {
        "question": view.question,
        "rate": view.rate,
        "answer": answer.text,
        "finish_reason": answer.finish_reason,
        "answer_tokens": len(answer.tokens),
        "context_tokens": answer.context_tokens,
        "memory_vectors": answer.memory_vectors,
        "ratio": answer.ratio,
        "cut": answer.cut,
        "timings": view.timings,
        "notes": [list(note) for note in view.notes],
        "tokens": {name: _values(values) for name, values in found.tokens.items()},
        "groups": {name: _values(values) for name, values in found.groups.items()},
        "initial": found.initial and {name: _values(values) for name, values in found.initial.items()},
    }


def _values(array: np.ndarray) -> list[int] | list[float]:
    if np.issubdtype(array.dtype, np.integer):
        return array.tolist()
    return [float(str(value)) for value in array]  # the fewest digits that give the same value of this dtype
