"""Answering, measured: ``python -m comi_jax.benchmarks.serving [--tokens 8192 --questions 20]``.

Random weights; by default the small Qwen2 of ``benchmarks.speed`` in float32. Two tables, each without compilation:

    one document, many questions    re-read: the decoder reads the whole text for every question
                                    prefix cache: it reads the text once, and its keys and values are kept
                                    COMI, encoding each time, and COMI with what the encoder made of the text kept
    many questions at once          static batches: a batch is answered to its last token before the next one begins
                                    slots: each question takes a slot as soon as one is free
                                    Each of the questions in flight is followed by another as soon as it is answered.
"""

import argparse
import functools
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

from comi_jax import cli
from comi_jax.backbone import Backbone
from comi_jax.benchmarks import speed
from comi_jax.cli import at_least
from comi_jax.config import Compression, Generation
from comi_jax.model import architecture, generate, sampling
from comi_jax.model import backbone as lm
from comi_jax.model.architecture import Architecture
from comi_jax.model.batch import Batch
from comi_jax.model.cache import KVCache, empty_cache
from comi_jax.model.memory import Memory
from comi_jax.params import Tree, initialize
from comi_jax.planning.published_models import BACKBONES
from comi_jax.serving import batching
from comi_jax.serving.asking import remember_segment
from comi_jax.serving.segments import Kept, read_segment
from comi_jax.serving.slots import SlotDecoder

SMALL = "small"
ANSWERS = (4, 64)  # tokens, of the questions in flight


# --- the programs -----------------------------------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnames=("arch", "room"))
def _read(params: Tree, rows: jax.Array, length: jax.Array, rules: sampling.Rules, arch: Architecture, room: int):
    return generate.begin(params, arch, rows, length, rules, (), room, sampled=False)


@functools.partial(jax.jit, static_argnames=("arch", "room"))
def _reread(params: Tree, batch: Batch, rules: sampling.Rules, arch: Architecture, room: int):
    ids = jnp.concatenate([batch.context, batch.query], axis=1)
    rows = lm.embed_tokens(params["decoder"], ids, arch.dtype)
    return generate.begin(params, arch, rows, batch.context_length + batch.query_length, rules, (), room, sampled=False)


@functools.partial(jax.jit, static_argnames=("arch", "room"))
def _prefix(params: Tree, batch: Batch, arch: Architecture, room: int) -> KVCache | None:
    length = batch.context.shape[1] + room
    cache = empty_cache(arch.backbone, arch.backbone.num_hidden_layers, 1, length, arch.dtype)
    rows = lm.embed_tokens(params["decoder"], batch.context, arch.dtype)
    return lm.forward(params["decoder"], rows, arch.backbone, cache=cache)[1]


@functools.partial(jax.jit, static_argnames=("arch", "room"), donate_argnames="cache")
def _after_prefix(params: Tree, cache: KVCache, batch: Batch, rules: sampling.Rules, arch: Architecture, room: int):
    rows = lm.embed_tokens(params["decoder"], batch.query, arch.dtype)
    return generate.begin(
        params, arch, rows, batch.query_length, rules, (), room, sampled=False, cache=cache, start=batch.context_length
    )


def _encode(model: "Model", batch: Batch) -> Kept:
    return read_segment(model.params, batch.context, batch.context_length, model.arch, model.arch.dtype, True)


def _remember(model: "Model", kept: Kept, batch: Batch) -> Memory:
    length, rate = batch.context_length[:, None], model.rate
    numbers = (batch.query, batch.query_length, batch.rate)
    return remember_segment(model.params, kept, length, *numbers, None, model.arch, rate)


# --- one document, many questions -------------------------------------------------------------------------------------


@dataclass
class Model:
    """A model with random weights, and the sizes that are measured."""

    params: Tree
    arch: Architecture
    rate: int
    new: int  # tokens of an answer

    @property
    def rules(self) -> sampling.Rules:
        return sampling.rules(Generation(), 1)

    def first_token(self, decoding: generate.Decoding) -> generate.Decoding:
        """``decoding``, computed: the first token is on the host."""
        np.asarray(decoding.ids)
        return decoding

    def memorised(self, memory: Memory, batch: Batch) -> generate.Decoding:
        return batching.begin(self.params, memory, batch, self.rules, self.arch, (), self.new, False)

    def per_token(self, decoding: generate.Decoding, rows: int) -> float:
        """Seconds for a further token of ``rows`` answers, each with its own cache."""
        seconds = []
        for _ in range(2):  # the first run compiles
            rules = sampling.rules(Generation(), 1)
            many, rules = batching.take_rows(decoding, rules, np.zeros(rows, np.int32))
            jax.block_until_ready(many)
            since = time.perf_counter()
            stopped = np.zeros(rows, bool)
            done = batching.proceed(self.params, many, rules, stopped, np.int32(self.new), self.arch, (), False)
            np.asarray(done.ids)
            seconds.append((time.perf_counter() - since) / (self.new - 1))
        return seconds[-1]


def document(model: Model, tokens: int, questions: int) -> list[tuple[str, ...]]:
    """A row of the first table for each way to answer ``questions`` about one text of ``tokens``."""
    params, arch, rate, new = model.params, model.arch, model.rate, model.new
    first, *others = [_question(arch.backbone, tokens, rate, seed) for seed in range(questions + 1)]
    query = first.query.shape[1]

    def anew(batch: Batch) -> generate.Decoding:
        return model.memorised(batching.remember(params, batch, arch, rate), batch)

    def kept(encoded: Kept, batch: Batch) -> generate.Decoding:
        return model.memorised(_remember(model, encoded, batch), batch)

    def after(held: list[KVCache], batch: Batch) -> generate.Decoding:  # written behind the text, again and again
        decoding = _after_prefix(params, held.pop(), batch, model.rules, arch, new)
        held.append(decoding.cache)
        return decoding

    ways: list[tuple[str, Callable[[], Any], Callable[[Any, Batch], generate.Decoding], Callable[[Any], int]]] = [
        ("re-read", lambda: None, lambda _, batch: _reread(params, batch, model.rules, arch, new), lambda _: 0),
        (
            "prefix cache",
            lambda: [_prefix(params, first, arch, query + new)],
            after,
            lambda held: _bytes(held) * tokens // held[0].k.shape[2],
        ),
        ("COMI, encoding each time", lambda: None, lambda _, batch: anew(batch), lambda _: 0),
        ("COMI, kept", lambda: _encode(model, first), kept, lambda held: _bytes(held)),
    ]
    rows = []
    for name, ingest, ask, size in ways:
        model.first_token(ask(ingest(), first))  # compiles
        since = time.perf_counter()
        held = ingest()
        decoding = model.first_token(ask(held, first))
        at_first, at_next = time.perf_counter() - since, []
        for batch in others:
            since = time.perf_counter()
            decoding = model.first_token(ask(held, batch))
            at_next.append(time.perf_counter() - since)
        kept_bytes = size(held)
        one, many = (model.per_token(decoding, n) * 1000 for n in (1, 16))
        cells = f"{at_first:.3f}", f"{statistics.median(at_next):.3f}", f"{one:.1f}", f"{many:.1f}"
        rows.append((name, *cells, f"{kept_bytes / 1e6:,.1f}"))
    return rows


def _question(backbone: Backbone, tokens: int, rate: int, seed: int) -> Batch:
    """The same text each time, and a question of its own."""
    batch = replace(speed.example(tokens), rate=jnp.full((1,), rate, jnp.int32))
    query = np.random.default_rng(seed).integers(0, backbone.vocab_size, batch.query.shape)
    return replace(batch, context=batch.context % backbone.vocab_size, query=jnp.asarray(query, jnp.int32))


def _bytes(held: Any) -> int:
    return sum(x.nbytes for x in jax.tree.leaves(held))


# --- many questions at once -------------------------------------------------------------------------------------------


@dataclass
class Load:
    """Prompts of one length, and how many tokens each answer has."""

    prompts: list[np.ndarray]
    new: list[int]

    @classmethod
    def draw(cls, arch: Architecture, length: int, questions: int) -> "Load":
        rng, lengths = np.random.default_rng(0), random.Random(0)
        rows = [rng.standard_normal((length, arch.backbone.hidden_size), np.float32) for _ in range(questions)]
        return cls(rows, [lengths.randint(*ANSWERS) for _ in rows])

    def after(self, number: int) -> "Load":
        """The first ``number`` questions alone, to warm up."""
        return Load(self.prompts[:number], self.new[:number])


class _NoText:
    """In place of a tokenizer: text is not measured here."""

    clean_up_tokenization_spaces = False

    def decode(self, tokens: Sequence[int], skip_special_tokens: bool) -> str:
        return ""


def in_slots(model: Model, load: Load, flight: int) -> tuple[list[float], float]:
    """Seconds from asking to the first token of each answer, and from the first question to the last token."""
    length = len(load.prompts[0]) + ANSWERS[1]
    loop = SlotDecoder(
        model.params, model.arch, (), _NoText(), Generation(), slots=flight, length=length, waiting=flight
    )
    loop.compile()
    begun, waits, asked = time.perf_counter(), [], {}
    left = list(zip(load.prompts, load.new, strict=True))[::-1]

    def ask() -> None:
        if left:
            prompt, new = left.pop()
            asked[loop.submit(prompt, Generation(max_new_tokens=new))] = time.perf_counter()

    for _ in range(flight):
        ask()
    while loop.live or loop.waiting:
        for event in loop.step():
            if len(event.handle.tokens) == 1:
                waits.append(time.perf_counter() - asked[event.handle])
            if event.finish_reason:
                ask()
    return waits, time.perf_counter() - begun


def in_batches(model: Model, load: Load, flight: int) -> tuple[list[float], float]:
    """The same as ``in_slots``, where a question waits for the batch before it to end."""
    rules = sampling.rules(Generation(), flight)
    begun, waits = time.perf_counter(), []
    asked = [begun] * flight
    for first in range(0, len(load.prompts), flight):
        wants = load.new[first : first + flight]
        real = len(wants)
        rows = np.stack((load.prompts[first : first + flight] * flight)[:flight])
        lengths = np.full(flight, rows.shape[1], np.int32)
        decoding = _read(model.params, jnp.asarray(rows, model.arch.dtype), lengths, rules, model.arch, ANSWERS[1])
        np.asarray(decoding.ids)
        waits += [time.perf_counter() - at for at in asked[:real]]
        for step in range(2, max(wants) + 1):  # a token at a time, for those who read along
            ended = np.array([step > want for want in wants] + [True] * (flight - real))
            decoding = batching.proceed(model.params, decoding, rules, ended, np.int32(step), model.arch, (), False)
            np.asarray(decoding.ids)
            for i, want in enumerate(wants):
                if step == want:
                    asked[i] = time.perf_counter()
    return waits, time.perf_counter() - begun


def at_once(model: Model, length: int, questions: int, flights: Sequence[int]) -> list[tuple[str, ...]]:
    """Two rows of the second table for each number of questions in flight."""
    load, rows = Load.draw(model.arch, length, questions), []
    for flight in flights:
        for name, serve in (("static batches", in_batches), ("slots", in_slots)):
            serve(model, load.after(flight), flight)  # compiles
            waits, seconds = serve(model, load, flight)
            half, most = (f"{np.percentile(waits, p) * 1000:,.0f}" for p in (50, 95))
            rows.append((f"{flight}", name, half, most, f"{sum(load.new) / seconds:,.1f}"))
    return rows


def main(arguments: list[str] | None = None) -> None:
    """Measure and print the tables."""
    given = _parser().parse_args(arguments)
    backbone = speed.BACKBONE if given.backbone == SMALL else BACKBONES[given.backbone]
    compression = Compression(rates=(given.rate,), encoder_layers=given.encoder_layers, segment_size=given.tokens)
    arch = Architecture(backbone, compression, dtype=given.dtype)
    params = jax.jit(lambda key: initialize(architecture.specs(arch), key, arch.dtype))(jax.random.key(0))
    params["mig"] = jax.tree.map(lambda x: x.astype(jnp.float32), params["mig"])
    model = Model(params, arch, given.rate, given.new_tokens)
    console = Console(width=cli.width())
    title = f"{given.backbone}, {given.dtype}, {given.encoder_layers} encoder layers, rate {given.rate}"
    if "document" in given.only:
        table = Table(
            "", "first question to first token, s", "next question, s", "ms a token, batch 1", "batch 16", "kept, MB",
            title=f"{given.questions} questions about {given.tokens:,} tokens: {title}",
        )  # fmt: skip
        for row in document(model, given.tokens, given.questions):
            table.add_row(*row)
        console.print(table)
    if "slots" in given.only:
        length = -(-given.tokens // given.rate) + speed.QUERY
        table = Table(
            "in flight", "", "first token p50, ms", "p95, ms", "tokens/s",
            title=f"{given.answers} answers of {ANSWERS[0]} to {ANSWERS[1]} tokens, prompts of {length}: {title}",
        )  # fmt: skip
        for row in at_once(model, length, given.answers, given.in_flight):
            table.add_row(*row)
        console.print(table)


def _parser() -> argparse.ArgumentParser:
    text = (__doc__ or "").partition("\n")[0]
    parser = cli.Parser(prog="python -m comi_jax.benchmarks.serving", description=text)
    parser.add_argument("--backbone", choices=[SMALL, *BACKBONES], default=SMALL, help="shapes of the model")
    parser.add_argument("--encoder-layers", type=at_least(1), default=4)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--tokens", type=at_least(32), default=1024, help="of the document")
    parser.add_argument("--rate", type=at_least(1), default=speed.RATE)
    parser.add_argument("--questions", type=at_least(1), default=5, help="about the document, after the first")
    parser.add_argument("--new-tokens", type=at_least(2), default=speed.NEW_TOKENS, help="of an answer about it")
    parser.add_argument("--answers", type=at_least(1), default=32, help="how many, in slots and in batches")
    parser.add_argument("--in-flight", type=at_least(1), nargs="+", default=[1, 4, 16])
    parser.add_argument("--only", choices=("document", "slots"), nargs="+", default=["document", "slots"])
    return parser


if __name__ == "__main__":
    main()
