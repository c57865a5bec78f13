"""The responses: whole answers, and the events of a stream, for both endpoints."""

import json
import secrets
import time
from dataclasses import dataclass, field
from typing import Any

from comi_jax.serving.contexts import Ask, Prepared, Reference
from comi_jax.serving.engine import Job, Piece, figures

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
    tokens: int = 0  # of the answer so far
    id: str = field(default_factory=lambda: secrets.token_hex(12))
    created: int = field(default_factory=lambda: int(time.time()))

    def whole(self, text: str, finish_reason: str) -> dict[str, Any]:
        """The body of a response that is no stream."""
        content = {"message": {"role": "assistant", "content": text}} if self.chat else {"text": text}
        body = self._body("chat.completion" if self.chat else "text_completion", content, finish_reason)
        return body | {"usage": self.usage(), "comi": self.account()}

    def opening(self) -> bytes:
        """The first event of a chat's stream; that of a completion has none."""
        return self._chunk({"role": "assistant", "content": ""}, None) if self.chat else b""

    def piece(self, piece: Piece) -> bytes:
        """The events of a token: of its text, if any is certain, and of the end, with the account."""
        self.tokens = piece.tokens
        events = self._chunk({"content": piece.text}, None, piece.text) if piece.text else b""
        if piece.finish_reason:
            events += self._chunk({}, piece.finish_reason, account=True)
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

    def account(self) -> dict[str, Any]:
        """What was asked and what was done, the field ``comi``."""
        made = self.prepared
        return {
            "context_tokens": made.context_tokens,
            "memory_vectors": made.memory_vectors,
            "asked_rate": None if self.work.max_slots or made.rate is None else self.work.rate,
            "asked_slots": self.work.max_slots,
            "rate": round(made.context_tokens / made.memory_vectors, 3) if made.memory_vectors else None,
            "documents": [piece.name for piece in self.work.pieces if isinstance(piece, Reference)],
            "cached_tokens": made.cached_tokens,
            **figures(self.job, made),
        }

    def _chunk(self, delta: dict[str, Any], reason: str | None, text: str = "", account: bool = False) -> bytes:
        content = {"delta": delta} if self.chat else {"text": text}
        body = self._body("chat.completion.chunk" if self.chat else "text_completion", content, reason)
        return event(body | {"comi": self.account()} if account else body)

    def _body(self, kind: str, content: dict[str, Any], finish_reason: str | None) -> dict[str, Any]:
        return {
            "id": f"{'chatcmpl' if self.chat else 'cmpl'}-{self.id}",
            "object": kind,
            "created": self.created,
            "model": self.model,
            "choices": [{"index": 0, **content, "logprobs": None, "finish_reason": finish_reason}],
        }
