"""The responses: whole answers, and the events of a stream, for both endpoints."""

import json
import secrets
import time
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from comi_jax.serving import explanation
from comi_jax.serving.answers import Answer
from comi_jax.serving.contexts import Ask, Prepared, Reference
from comi_jax.serving.engine import Job, Piece

DONE = b"data: [DONE]\n\n"


def event(value: Any) -> bytes:
    """``value`` as an event of a stream."""
    return b"data: " + json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


@dataclass
class Reply:
    """What is said in answer to one request."""

    chat: bool  # else text completion
    model: str
    work: Ask
    job: Job
    prepared: Prepared
    source: str = ""  # the text of the context, where the answer is explained
    text: str = ""  # of the answer so far, and the number of its tokens
    tokens: int = 0
    id: str = field(default_factory=lambda: secrets.token_hex(12))
    created: int = field(default_factory=lambda: int(time.time()))

    def add(self, piece: Piece) -> None:
        """Take a further piece of the answer."""
        self.text += piece.text
        self.tokens = piece.tokens

    def whole(self, finish_reason: str) -> dict[str, Any]:
        """The body of a response that is no stream."""
        content = {"message": {"role": "assistant", "content": self.text}} if self.chat else {"text": self.text}
        body = self._body("chat.completion" if self.chat else "text_completion", content, finish_reason)
        return body | {"usage": self.usage(), "comi": self.account(finish_reason)}

    def opening(self) -> bytes:
        """The first event of a chat's stream; that of a completion has none."""
        return self._chunk({"role": "assistant", "content": ""}, None) if self.chat else b""

    def piece(self, piece: Piece) -> bytes:
        """The events of a piece: of its text, if any is certain, and of the end, with the account."""
        events = self._chunk({"content": piece.text}, None, piece.text) if piece.text else b""
        if piece.finish_reason:
            events += self._chunk({}, piece.finish_reason, comi=self.account(piece.finish_reason))
        return events

    def usage_event(self) -> bytes:
        """The event behind the last token, for stream_options.include_usage."""
        body = self._body("chat.completion.chunk" if self.chat else "text_completion", {}, None)
        return event(body | {"choices": [], "usage": self.usage()})

    def usage(self) -> dict[str, Any]:
        """Tokens as the client thinks of them: of the text, however few vectors stand for it."""
        prompt = self.prepared.context_tokens + self.prepared.question_tokens
        return {
            "prompt_tokens": prompt,
            "completion_tokens": self.tokens,
            "total_tokens": prompt + self.tokens,
            "prompt_tokens_details": {"cached_tokens": self.prepared.cached_tokens},
        }

    def account(self, finish_reason: str) -> dict[str, Any]:
        """What was asked and what was done, the field ``comi``."""
        made = self.prepared
        account = {
            "context_tokens": made.context_tokens,
            "memory_vectors": made.memory_vectors,
            "asked_rate": None if self.work.max_slots or made.rate is None else self.work.rate,
            "asked_slots": self.work.max_slots,
            "chosen_rate": made.rate,
            "rate": round(made.context_tokens / made.memory_vectors, 3) if made.memory_vectors else None,
            "documents": [piece.name for piece in self.work.pieces if isinstance(piece, Reference)],
            "cached_tokens": made.cached_tokens,
            **_figures(self.job, made),
        }
        return account if made.explained is None else account | {"explanation": self._explanation(finish_reason)}

    def _explanation(self, finish_reason: str) -> dict[str, Any]:
        """What was kept of the context, as ``python -m comi_jax.explain --json`` writes it."""
        made, about, asked = self.prepared, self.prepared.explained, self.job.arrived
        assert about is not None and self.job.handle is not None and made.rate is not None
        tokens = tuple(self.job.handle.tokens)
        answer = Answer(self.text, tokens, made.context_tokens, about.account, False, finish_reason=finish_reason)
        first = (self.job.first_token or asked) - asked
        timings = {
            "compressed": made.encode_seconds + made.compress_seconds,
            "first token": first,
            "end": self.job.last_token - asked,
        }
        characters = np.concatenate([np.asarray(segment.characters) for segment in about.document.segments])
        source = explanation.Source(self.source, about.document, characters, made.encode_seconds)
        view = explanation.View(self.work.question, made.rate, answer, timings, about.kept)
        return explanation.as_json(source, [view], {"model": self.model})

    def _chunk(
        self, delta: dict[str, Any], reason: str | None, text: str = "", comi: dict[str, Any] | None = None
    ) -> bytes:
        content = {"delta": delta} if self.chat else {"text": text}
        body = self._body("chat.completion.chunk" if self.chat else "text_completion", content, reason)
        return event(body | {"comi": comi} if comi else body)

    def _body(self, kind: str, content: dict[str, Any], finish_reason: str | None) -> dict[str, Any]:
        return {
            "id": f"{'chatcmpl' if self.chat else 'cmpl'}-{self.id}",
            "object": kind,
            "created": self.created,
            "model": self.model,
            "choices": [{"index": 0, **content, "logprobs": None, "finish_reason": finish_reason}],
        }


def _figures(job: Job, prepared: Prepared) -> dict[str, Any]:
    """The times of a job in milliseconds."""
    first = None if job.first_token is None else round(1000 * (job.first_token - job.arrived), 2)
    return {
        "encode_ms": round(1000 * prepared.encode_seconds, 2),
        "compress_ms": round(1000 * prepared.compress_seconds, 2),
        "first_token_ms": first,
    }
