"""The decode loop of a server: questions take free slots of one KV cache while others decode.

    submit -> waiting -> (step) prefilled into a free slot -> (step) one token at a time -> the slot is free again

A program is compiled for each power of two that prompts are padded to, and one for a token of all slots; for prompts
that follow keys and values, one for each width of both.
"""

import functools
import threading
from collections import deque
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from comi_jax.config import Generation
from comi_jax.data.encode import LengthError
from comi_jax.errors import ConfigError, UserError
from comi_jax.model import sampling, slots
from comi_jax.model.architecture import Architecture
from comi_jax.model.cache import ContextKV
from comi_jax.serving import batching
from comi_jax.serving.detokenizer import Detokenizer
from comi_jax.serving.prompts import PromptEmbeddings

NARROWEST = 16  # the least width that prompts are padded to


class BusyError(UserError):
    """All slots are taken and as many questions wait as may."""


@dataclass(eq=False)
class Handle:
    """A submitted question: its options, and the answer so far. ``tokens`` and ``text`` go as far as it is decoded;
    ``finish_reason`` is None until it ends with "stop", "length" or "cancelled"."""

    options: Generation
    vectors: np.ndarray = field(repr=False)  # the prompt, [T, D]
    reader: Detokenizer = field(repr=False)
    before: ContextKV | None = field(default=None, repr=False)  # keys and values of one row that the prompt follows
    slot: int | None = None  # while it decodes
    finish_reason: str | None = None
    logprobs: list[float] = field(default_factory=list, repr=False)  # of each token under the model

    @property
    def tokens(self) -> tuple[int, ...]:
        return self.reader.tokens

    @property
    def text(self) -> str:
        return self.reader.text


@dataclass(frozen=True)
class Event:
    """What a step added to one answer."""

    handle: Handle
    slot: int
    token: int
    logprob: float  # of the token under the model
    text: str  # the text that became certain, see Detokenizer
    finish_reason: str | None  # "stop" or "length" with the last token


class SlotDecoder:
    """Decodes up to ``slots`` answers at once, each in ``length`` positions for its prompt and answer together, while
    ``waiting`` more questions may wait. An answer is bit for bit the one that it would be alone.

    One thread calls ``step``; ``submit`` and ``cancel`` may come from others.
    """

    def __init__(
        self,
        params: Any,
        arch: Architecture,
        stop: tuple[int, ...],
        tokenizer: Any,
        defaults: Generation,
        *,
        slots: int = 8,
        length: int = 1024,
        waiting: int = 64,
    ):
        positions = arch.backbone.max_position_embeddings
        for name, value, least in (("slots", slots, 1), ("length", length, 2), ("waiting", waiting, 0)):
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ConfigError(f"{name} is {value!r}; give a whole number of at least {least}")
        if length > positions:
            raise ConfigError(f"length is {length}, but the model has {positions} positions; give at most these")
        self._params, self._arch, self._stop, self._tokenizer = params, arch, stop, tokenizer
        self.defaults, self.length = defaults, length
        self._state = _empty(arch, slots, length)
        self._held: list[Handle | None] = [None] * slots
        self._waiting: deque[Handle] = deque()
        self._most_waiting = waiting
        self._lock = threading.Lock()  # of the two lists above and of the handles

    def submit(self, prompt: PromptEmbeddings | np.ndarray, options: Generation | None = None) -> Handle:
        """Queue ``prompt``, vectors [T, D] or of ``Comi.prompt_embeddings``, for the next free slot. ``options`` None:
        the run's.

        Raises LengthError if prompt and answer do not fit into a slot, ConfigError if the prompt is no such array, and
        BusyError if as many questions wait as may."""
        options = options or self.defaults
        vectors, before = (prompt.vectors, prompt.before) if isinstance(prompt, PromptEmbeddings) else (prompt, None)
        vectors, entries = np.asarray(vectors), 0 if before is None else int(before.length[0])
        width = self._arch.backbone.hidden_size
        if vectors.ndim != 2 or not len(vectors) or vectors.shape[1] != width:
            raise ConfigError(f"the prompt has shape {vectors.shape}; give at least one vector of {width} numbers")
        if entries + len(vectors) + options.max_new_tokens > self.length:
            raise LengthError(
                f"a prompt of {entries + len(vectors)} vectors and an answer of up to {options.max_new_tokens} "
                f"tokens do not fit into a slot of {self.length} positions; use a higher rate, fewer new tokens or "
                "longer slots"
            )
        handle = Handle(options, vectors, Detokenizer(self._tokenizer, options.stop_strings), before)
        with self._lock:
            if len(self._waiting) >= self._most_waiting + self._held.count(None):
                raise BusyError(
                    f"all {len(self._held)} slots are taken and {self._most_waiting} more questions wait, as many as "
                    "may; ask again later"
                )
            self._waiting.append(handle)
        return handle

    def cancel(self, handle: Handle) -> None:
        """End ``handle``: its slot is free at the next step, and no event about it comes any more."""
        with self._lock:
            if handle.finish_reason is None:
                if handle.slot is None:
                    self._waiting.remove(handle)
                self._end(handle, "cancelled")

    @property
    def live(self) -> int:
        """The number of answers that are being decoded."""
        with self._lock:
            return len(self._held) - self._held.count(None)

    @property
    def waiting(self) -> int:
        """The number of questions that wait for a slot."""
        with self._lock:
            return len(self._waiting)

    def step(self) -> list[Event]:
        """The next token of every live slot; then the first waiting question, if a slot is free, is prefilled into it,
        which gives its first token. A burst of questions is thus admitted one a step, while all others go on.

        A step costs the same however many slots are live. So while less than half are and others could be, no token is
        decoded, and slots are filled first."""
        with self._lock:
            free = self._held.count(None)
            filling = bool(self._waiting) and 2 * free > len(self._held)
        return [*([] if filling else self._decode()), *self._admit()]

    def compile(self) -> None:
        """Compile every program, so that no question waits for one. Raises ConfigError while answers are decoded."""
        if self.live:
            raise ConfigError("the programs are compiled while answers are being decoded; compile them before")
        width, hidden = min(NARROWEST, self.length), self._arch.backbone.hidden_size
        # The first program leaves the state bound to the device of the weights, which makes it another argument to JAX.
        self._prefill(0, np.zeros((width, hidden), np.float32), self.defaults)
        while True:
            vectors = np.zeros((width, hidden), np.float32)
            self._prefill(0, vectors, self.defaults)
            if width == self.length:
                break
            width = min(2 * width, self.length)
        self._state, _ = _step(self._params, self._state, np.zeros(len(self._held), bool), self._arch)

    def _decode(self) -> list[Event]:
        with self._lock:
            held = list(self._held)
        live = np.array([handle is not None for handle in held])
        if not live.any():
            return []
        self._state, chosen = _step(self._params, self._state, live, self._arch)
        tokens, logprobs = batching.fetch(chosen.token).tolist(), batching.fetch(chosen.logprob).tolist()
        with self._lock:  # without those that were cancelled meanwhile
            return [
                self._add(handle, tokens[slot], logprobs[slot])
                for slot, handle in enumerate(held)
                if handle is not None and handle.finish_reason is None
            ]

    def _admit(self) -> list[Event]:
        with self._lock:
            if not self._waiting or None not in self._held:
                return []
            handle, slot = self._waiting.popleft(), self._held.index(None)
            self._held[slot], handle.slot = handle, slot
        chosen = self._prefill(slot, handle.vectors, handle.options, handle.before)
        token, logprob = int(batching.fetch(chosen.token)[0]), float(batching.fetch(chosen.logprob)[0])
        with self._lock:
            return [self._add(handle, token, logprob)] if handle.finish_reason is None else []

    def _prefill(
        self, slot: int, vectors: np.ndarray, options: Generation, before: ContextKV | None = None
    ) -> slots.Chosen:
        width = min(batching.bucket(len(vectors), NARROWEST), self.length)
        rows = np.zeros((1, width, vectors.shape[1]), jnp.dtype(self._arch.dtype))
        rows[0, : len(vectors)] = vectors
        self._state, chosen = _prefill(
            self._params, self._state, np.int32(slot), rows, np.full(1, len(vectors), np.int32),
            sampling.rules(options, 1), self._arch, before,
        )  # fmt: skip
        return chosen

    def _add(self, handle: Handle, token: int, logprob: float) -> Event:
        slot, reader = handle.slot, handle.reader
        assert slot is not None  # it has one while it decodes
        text = reader.add([token])
        handle.logprobs.append(logprob)
        if token in self._stop or reader.stopped:
            self._end(handle, "stop")
        elif len(reader.tokens) == handle.options.max_new_tokens:
            self._end(handle, "length")
        if handle.finish_reason:
            text += reader.finish()
        return Event(handle, slot, token, logprob, text, handle.finish_reason)

    def _end(self, handle: Handle, reason: str) -> None:
        handle.finish_reason = reason
        if handle.slot is not None:
            self._held[handle.slot], handle.slot = None, None


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _empty(arch: Architecture, count: int, length: int) -> slots.Slots:
    return slots.in_place(slots.empty_slots(arch, count, length), arch)


@functools.partial(jax.jit, static_argnames="arch", donate_argnames="state")
def _prefill(
    params: Any,
    state: slots.Slots,
    slot: Any,
    prompt: Any,
    length: Any,
    rules: sampling.Rules,
    arch: Architecture,
    before: ContextKV | None,
) -> tuple[slots.Slots, slots.Chosen]:
    state, chosen = slots.prefill_into_slot(params, arch, state, slot, prompt, length, rules, before)
    return slots.in_place(state, arch), chosen


@functools.partial(jax.jit, static_argnames="arch", donate_argnames="state")
def _step(params: Any, state: slots.Slots, live: Any, arch: Architecture) -> tuple[slots.Slots, slots.Chosen]:
    state, chosen = slots.decode_step(params, arch, state, live)
    return slots.in_place(state, arch), chosen
