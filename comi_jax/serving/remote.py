"""Answers decoded by another server: vLLM, or what speaks its interface, reads the prompt as vectors.

    POST URL/completions {"prompt_embeds": base64 of torch.save([memory; embed(question)]), "stream": true, ...}

The endpoint serves the decoder of the same checkpoint (``python -m comi_jax.convert export-hf``). It is asked for the
ids of tokens, from which the text is made here; where it gives none, its text is taken.
"""

import contextlib
import http.client
import json
import logging
import queue
import socket
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Float

from comi_jax.config import Generation
from comi_jax.data.encode import LengthError
from comi_jax.serving.detokenizer import Detokenizer
from comi_jax.serving.endpoint import DecoderError, Endpoint, events
from comi_jax.serving.prompts import PromptEmbeddings
from comi_jax.serving.slots import BusyError

PAUSE = 0.01  # seconds that a step waits for tokens, as long as there are none
RETRY = 2.0  # seconds between two attempts to reach an endpoint at the start


@dataclass(eq=False)
class RemoteHandle:
    """A question at the endpoint."""

    options: Generation
    reader: Detokenizer = field(repr=False)
    finish_reason: str | None = None
    tokens: Sequence[int] = ()  # of the answer so far; without ids from the endpoint, as many zeros
    raw: str = ""  # without ids: the text so far, and of it what was told
    told: str = ""
    socket: Any = field(default=None, repr=False)


@dataclass(frozen=True)
class RemoteEvent:
    """What came of an answer: text of some tokens, or the ``error`` that ends it."""

    handle: RemoteHandle
    text: str = ""
    finish_reason: str | None = None
    error: DecoderError | None = None


class RemoteDecoder:
    """In place of ``SlotDecoder``: ``slots`` questions at once are at the endpoint, each in a thread of its own.

    One thread calls ``step``; ``submit`` and ``cancel`` may come from others."""

    def __init__(
        self,
        endpoint: Endpoint,
        stop: tuple[int, ...],
        tokenizer: Any,
        defaults: Generation,
        *,
        slots: int,
        length: int,
    ):
        self._endpoint, self._stop, self._tokenizer, self._slots = endpoint, stop, tokenizer, slots
        self.defaults, self.length = defaults, length
        self._model, self._closed = "", threading.Event()
        self._live: set[RemoteHandle] = set()
        self._events: queue.Queue[RemoteEvent] = queue.Queue()
        self._lock = threading.Lock()  # of the handles

    @property
    def live(self) -> int:
        """The number of answers that are being decoded."""
        with self._lock:
            return len(self._live)

    def compile(self) -> None:
        """Wait until the endpoint lists its model, or ``close``."""
        said = ""
        while not self._model and not self._closed.is_set():
            try:
                about = self._endpoint.model()
                self._model = str(about["id"])
                longest = about.get("max_model_len")
            except DecoderError as error:
                if str(error) != said:
                    logging.getLogger(__name__).warning("%s; waiting for it", error)
                said = str(error)
                self._closed.wait(RETRY)
                continue
            if isinstance(longest, int) and longest < self.length:
                logging.getLogger(__name__).warning(
                    "the decoder's endpoint has %d positions, fewer than --slot-length=%d; longer requests are refused",
                    longest, self.length,
                )  # fmt: skip
                self.length = longest

    def close(self) -> None:
        """Wait for the endpoint no longer."""
        self._closed.set()

    def submit(self, prompt: Float[np.ndarray, "T D"], options: Generation) -> RemoteHandle:
        """Send ``prompt``. Raises LengthError if prompt and answer do not fit, and BusyError if as many questions are
        at the endpoint as may be."""
        if len(prompt) + options.max_new_tokens > self.length:
            raise LengthError(
                f"a prompt of {len(prompt)} vectors and an answer of up to {options.max_new_tokens} tokens do "
                f"not fit into the {self.length} positions of the decoder; use a higher rate or fewer new tokens"
            )
        handle = RemoteHandle(options, Detokenizer(self._tokenizer, options.stop_strings))
        with self._lock:
            if len(self._live) >= self._slots:
                raise BusyError(f"{self._slots} questions are at the endpoint, as many as may; ask again later")
            self._live.add(handle)
        threading.Thread(target=self._decode, args=(handle, prompt), name="decoder", daemon=True).start()
        return handle

    def cancel(self, handle: RemoteHandle) -> None:
        """End ``handle``: its connection is closed, by which the endpoint ends its work, and nothing is told of it."""
        with self._lock:
            self._live.discard(handle)
            handle.finish_reason = handle.finish_reason or "cancelled"
        if handle.socket is not None:
            with contextlib.suppress(OSError):
                handle.socket.shutdown(socket.SHUT_RDWR)

    def step(self) -> list[RemoteEvent]:
        """What has come since the last step; waits a moment if that is nothing."""
        events = []
        with contextlib.suppress(queue.Empty):
            events.append(self._events.get(timeout=PAUSE))
            while True:
                events.append(self._events.get_nowait())
        return events

    # --- the thread of a question -------------------------------------------------------------------------------------

    def _decode(self, handle: RemoteHandle, prompt: Float[np.ndarray, "T D"]) -> None:
        connection = self._endpoint.connect()
        try:
            self._endpoint.reach(connection)
            with self._lock:
                handle.socket = connection.sock
                if handle not in self._live:  # it was cancelled meanwhile
                    return
            body = json.dumps(self._body(handle.options, prompt)).encode()
            with contextlib.closing(self._endpoint.open(connection, "POST", "/completions", body)) as response:
                for event in events(response):
                    self._take(handle, event)
            if handle.finish_reason is None:
                raise DecoderError("the decoder's endpoint has ended an answer without a reason", True)
        except DecoderError as error:
            self._fail(handle, error)
        except (OSError, http.client.HTTPException) as error:
            self._fail(handle, DecoderError(f"the decoder's endpoint has gone silent ({type(error).__name__})", True))
        except Exception:
            logging.getLogger(__name__).exception("a question could not be decoded")
            self._fail(handle, DecoderError("the decoder's endpoint sent what is no stream of an answer", True))
        finally:
            connection.close()

    def _body(self, options: Generation, prompt: Float[np.ndarray, "T D"]) -> dict[str, Any]:
        """The request. ``prompt_embeds`` alone: no token is put before it."""
        body: dict[str, Any] = {
            "model": self._model,
            "prompt_embeds": PromptEmbeddings(prompt, 0, 0, False).base64(),
            "max_tokens": options.max_new_tokens,
            "temperature": options.temperature,
            "stop_token_ids": list(self._stop),
            "return_token_ids": True,
            "stream": True,
            "stream_options": {"include_usage": True, "continuous_usage_stats": True},
        }
        if options.temperature > 0:
            body |= {"top_p": options.top_p, "top_k": options.top_k or -1, "seed": options.seed}
        if options.repetition_penalty != 1:
            body["repetition_penalty"] = options.repetition_penalty
        return body | ({"stop": list(options.stop_strings)} if options.stop_strings else {})

    def _take(self, handle: RemoteHandle, event: dict[str, Any]) -> None:
        """One event of the stream."""
        if "error" in event:
            logging.getLogger(__name__).error("the decoder's endpoint said %.500r", event["error"])
            raise DecoderError("the decoder's endpoint has failed within an answer", True)
        if not event.get("choices"):
            return
        (choice,) = event["choices"]
        with self._lock:
            if handle not in self._live:
                return
            if choice.get("finish_reason") is not None:
                handle.finish_reason = "length" if choice["finish_reason"] == "length" else "stop"
            if choice.get("token_ids") is None:
                text = _from_text(handle, choice.get("text") or "", event.get("usage") or {})
            else:
                text = _from_tokens(handle, choice["token_ids"])
            if handle.finish_reason is not None:
                self._live.discard(handle)
            self._events.put(RemoteEvent(handle, text, handle.finish_reason))

    def _fail(self, handle: RemoteHandle, error: DecoderError) -> None:
        with self._lock:
            if handle in self._live:
                self._live.discard(handle)
                handle.finish_reason = "error"
                self._events.put(RemoteEvent(handle, error=error))


def _from_tokens(handle: RemoteHandle, tokens: Sequence[int]) -> str:
    """The text that becomes certain with further ``tokens``. A stop string ends the answer here too."""
    text = handle.reader.add(tokens)
    if handle.reader.stopped:
        handle.finish_reason = "stop"
    elif handle.finish_reason is not None:
        text += handle.reader.finish()
    handle.tokens = handle.reader.tokens
    return text


def _from_text(handle: RemoteHandle, text: str, usage: dict[str, Any]) -> str:
    """The text to be told behind a further ``text`` of the endpoint, stripped as answers that are decoded here."""
    handle.raw += text
    handle.tokens = (0,) * usage.get("completion_tokens", len(handle.tokens) + 1)
    before, handle.told = len(handle.told), handle.raw.strip()
    return handle.told[before:]
