"""A server under load, beside servers that read the whole text: ``python -m comi_jax.benchmarks.load --checkpoint=DIR
--url=http://127.0.0.1:8000 --beside=vllm=http://127.0.0.1:8001 [--requests 200 --concurrent 200 --tokens 2048]``.

    kept          each document is uploaded once, which the time of the round includes, and asked by its id
    each time     the document is sent with each question, which the server encodes each time
    NAME          the same messages to another server of OpenAI's chats, with ``python -m comi_jax.convert export-hf``'s
                  decoder of the same checkpoint; it reads the whole text

Documents are random tokens of four lengths, new in each round, so that nobody has seen them; each is asked several
times within it. Questions, rates and lengths of answers are mixed, all answers streamed and greedy. Whoever is told to
come back (429, 503) does, and waits on.
"""

import argparse
import concurrent.futures
import contextlib
import http.client
import itertools
import json
import logging
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from comi_jax import cli
from comi_jax.cli import at_least
from comi_jax.data.encode import token_ids
from comi_jax.errors import ConfigError
from comi_jax.serving import endpoint
from comi_jax.serving.compressor import Comi
from comi_jax.serving.endpoint import DecoderError, Endpoint, events

PARTS = (1.0, 0.75, 0.5, 0.25)  # of --tokens: the lengths of the documents
ANSWERS = (4, 8, 16, 32)  # tokens
QUESTION = 8
PAUSE = 0.25  # seconds until a request that was refused for now comes back
SILENCE = 600.0
BOUNDARY = "a-boundary-of-random-words"
COLUMNS = (
    "server", "answers", "requests/s", "tokens/s", "first token, s, p50 / p95 / p99", "whole, s, p50 / p95 / p99",
    "came back",
)  # fmt: skip


@dataclass(frozen=True)
class Request:
    """A question about one of the documents of a round."""

    document: int
    question: str
    rate: int
    tokens: int  # of the answer, at most


@dataclass
class Seen:
    """What happened to the requests of one server. Times in seconds."""

    first: list[float] = field(default_factory=list)  # until the first text of an answer
    whole: list[float] = field(default_factory=list)
    tokens: int = 0
    came_back: int = 0  # times that a request was refused for now
    lost: int = 0  # requests without an answer
    seconds: float = 0.0  # of all rounds
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, first: float | None, whole: float | None, tokens: int, came_back: int) -> None:
        """A request that was answered, or without times one that was not."""
        with self._lock:
            self.came_back += came_back
            self.tokens += tokens
            if first is None or whole is None:
                self.lost += 1
            else:
                self.first.append(first)
                self.whole.append(whole)

    def row(self, name: str) -> tuple[str, ...]:
        """The row of the table."""
        asked = len(self.whole) + self.lost
        rates = (f"{len(self.whole) / self.seconds:,.2f}", f"{self.tokens / self.seconds:,.1f}")
        return (name, f"{len(self.whole)} of {asked}", *rates, _percentiles(self.first), _percentiles(self.whole),
                f"{self.came_back:,}")  # fmt: skip


@dataclass(frozen=True)
class Server:
    """A server, and how it is asked: ``kept`` uploads, ``own`` understands rates."""

    name: str
    endpoint: Endpoint
    model: str
    own: bool = False
    kept: bool = False

    def body(self, request: Request, texts: Sequence[str], ids: Sequence[str]) -> dict[str, Any]:
        """The request as JSON."""
        asked: list[Any] = [{"role": "user", "content": request.question}]
        if self.kept:
            parts = [{"type": "file", "file": {"file_id": ids[request.document]}}]
            asked = [{"role": "user", "content": [*parts, {"type": "text", "text": request.question}]}]
        else:
            asked = [{"role": "system", "content": texts[request.document]}, *asked]
        body = {"model": self.model, "messages": asked, "max_tokens": request.tokens, "temperature": 0, "stream": True}
        return body | {"stream_options": {"include_usage": True}} | ({"rate": request.rate} if self.own else {})

    def upload(self, text: str) -> str:
        """The id of ``text`` as a stored file."""
        head = 'Content-Disposition: form-data; name="file"; filename="a.txt"'
        form = f"--{BOUNDARY}\r\n{head}\r\n\r\n{text}\r\n--{BOUNDARY}--\r\n".encode()
        kind = {"Content-Type": f"multipart/form-data; boundary={BOUNDARY}"}
        with self._connected() as connection:
            return json.loads(self.endpoint.open(connection, "POST", "/files", form, kind).read())["id"]

    def delete(self, name: str) -> None:
        """Remove a stored file."""
        with self._connected() as connection:
            self.endpoint.open(connection, "DELETE", f"/files/{name}").read()

    def ask(self, body: dict[str, Any], seen: Seen) -> None:
        """One request, until it is answered or fails; adds what happened to ``seen``."""
        begun, refused = time.perf_counter(), 0
        while True:
            try:
                first, tokens = self._answer(body)
                break
            except (DecoderError, OSError, http.client.HTTPException, ValueError) as error:
                if not isinstance(error, DecoderError) or error.reached:
                    return seen.add(None, None, 0, refused)
                refused += 1
                time.sleep(PAUSE)
        whole = time.perf_counter() - begun
        seen.add(whole if first is None else first - begun, whole, tokens, refused)  # an answer may be without a text

    def _answer(self, body: dict[str, Any]) -> tuple[float | None, int]:
        """When the first text of a streamed answer came, and its tokens. Raises DecoderError and what connections
        do."""
        first, pieces, usage = None, 0, None
        with self._connected() as connection:
            for event in events(self.endpoint.open(connection, "POST", "/chat/completions", json.dumps(body).encode())):
                if "error" in event:
                    raise DecoderError(str(event["error"]), True)
                usage = event.get("usage") or usage
                if any(choice.get("delta", {}).get("content") for choice in event.get("choices", ())):
                    first, pieces = first or time.perf_counter(), pieces + 1
        return first, usage["completion_tokens"] if usage else pieces

    @contextlib.contextmanager
    def _connected(self):
        connection = self.endpoint.connect()
        try:
            self.endpoint.reach(connection)
            yield connection
        finally:
            connection.close()


def run(server: Server, requests: Sequence[Request], texts: Sequence[str], concurrent_: int, seen: Seen) -> float:
    """Ask all ``requests``, so many at once, after the uploads, if ``server`` keeps documents. Returns the seconds of
    the uploads, which ``seen`` includes."""
    with concurrent.futures.ThreadPoolExecutor(concurrent_) as pool:
        begun = time.perf_counter()
        ids = list(pool.map(server.upload, texts)) if server.kept else []
        uploads = time.perf_counter() - begun if ids else 0.0
        list(pool.map(lambda request: server.ask(server.body(request, texts, ids), seen), requests))
        seen.seconds += time.perf_counter() - begun
        list(pool.map(server.delete, ids))
    return uploads


def documents(tokenizer: Any, lengths: Sequence[int], rng: np.random.Generator) -> list[str]:
    """A text of about so many tokens each: random ones of the vocabulary, without those that are special."""
    special = set(tokenizer.all_special_ids)
    known = np.array([token for token in range(len(tokenizer)) if token not in special])
    texts = []
    for length in lengths:
        text = tokenizer.decode(rng.choice(known, length).tolist())
        while len(token_ids(tokenizer, [text])[0]) > length:  # other tokens, and perhaps more, than were drawn
            text = text[: int(0.97 * len(text))]
        texts.append(text)
    return texts


def requests_of(count: int, texts: Sequence[str], questions: Sequence[str], rates: Sequence[int]) -> list[Request]:
    """Mixed requests: every document, rate and length of an answer comes as often, in an order that mixes them."""
    rates_, answers = itertools.cycle(rates), itertools.cycle(ANSWERS)
    turns = [(number % len(texts), next(rates_), next(answers)) for number in range(count)]
    np.random.default_rng(0).shuffle(turns)
    return [Request(int(t), questions[n % len(questions)], int(r), int(a)) for n, (t, r, a) in enumerate(turns)]


def _percentiles(values: Sequence[float]) -> str:
    return " / ".join(f"{x:,.2f}" for x in np.percentile(values, (50, 95, 99))) if values else "-"


def _served(name: str, url: str, key: str, own: bool = False) -> list[Server]:
    """The server at ``url``; a COMI server is asked in two ways."""
    place = Endpoint(url, key, flag="--url" if own else "--beside", silence=SILENCE)
    try:
        model = str(place.model()["id"])
    except DecoderError:
        raise ConfigError(f"{url} lists no model; start the server, and ask when it is ready") from None
    kinds = (("COMI, kept", True), ("COMI, each time", False)) if own else ((name, False),)
    return [Server(name, place, model, own, kept) for name, kept in kinds]


def parsed(arguments: list[str] | None) -> argparse.Namespace:
    """The arguments of the command."""
    parser = cli.Parser(prog="python -m comi_jax.benchmarks.load", description="A server under load, beside others.")
    parser.add_argument("--checkpoint", type=cli.path, required=True, help="that is served; its tokenizer is used")
    parser.add_argument("--url", required=True, help="of python -m comi_jax.serve")
    parser.add_argument("--key-file", type=cli.path, help="its key, in one line")
    parser.add_argument("--beside", action="append", default=[], metavar="NAME=URL", help="another server; repeatable")
    parser.add_argument("--requests", type=at_least(1), default=200, help="in a round")
    parser.add_argument("--concurrent", type=at_least(1), default=200)
    parser.add_argument("--tokens", type=at_least(16), default=2048, help="of the longest documents")
    parser.add_argument("--documents", type=at_least(1), default=8, help="of a round")
    parser.add_argument(
        "--rates", type=at_least(1), nargs="+", help="default: those that the checkpoint was trained at"
    )
    parser.add_argument("--rounds", type=at_least(1), default=2, help="alternating between the servers")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    """Print the table."""
    options = parsed(arguments)
    logging.getLogger(endpoint.__name__).setLevel(logging.CRITICAL)  # refusals are counted
    with cli.one_way_out():
        key = cli.read_text(options.key_file).strip() if options.key_file else ""
        servers = _served("", options.url, key, own=True)
        for word in options.beside:
            name, equals, url = word.partition("=")
            if not name or not equals:
                raise ConfigError(f"--beside={word} is no NAME=URL; give one as vllm=http://host:8000/v1")
            servers += _served(name, url, "")
        model = Comi.load(options.checkpoint)
        rates, rng = options.rates or model.run.config.compression.rates, np.random.default_rng(0)
        lengths = [int(part * options.tokens) for part, _ in zip(itertools.cycle(PARTS), range(options.documents))]
        questions = documents(model.tokenizer, [QUESTION] * 16, rng)
        seen, uploads = [Seen() for _ in servers], 0.0
        for number in range(options.rounds + 1):  # the first one, a short one, warms everybody
            texts = documents(model.tokenizer, lengths if number else lengths[: len(PARTS)], rng)
            asked = requests_of(options.requests if number else len(PARTS), texts, questions, rates)
            for server, counted in zip(servers, seen, strict=True):
                took = run(server, asked, texts, options.concurrent, counted if number else Seen())
                uploads += took if number else 0.0
    about = f"{options.requests} requests, {options.concurrent} at once, {options.rounds} rounds; documents of"
    title = f"{about} {', '.join(map(str, sorted(set(lengths))))} tokens; rates {', '.join(map(str, rates))}"
    table = Table(title=title, caption=f"the uploads took {uploads / options.rounds:,.2f} s of a round")
    for column in COLUMNS:
        table.add_column(column)
    for server, counted in zip(servers, seen, strict=True):
        table.add_row(*counted.row(server.name))
    Console(width=cli.width(), soft_wrap=True).print(table)


if __name__ == "__main__":
    main()
