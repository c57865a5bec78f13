"""A server of a tiny random model that listens on this machine, and clients that ask it over real HTTP."""

import concurrent.futures
import contextlib
import dataclasses
import json
import socket
import threading
import time

import httpx2
import jax
import numpy as np
import openai
import pytest
import tiny_models
import train_fixtures

from comi_jax import overrides
from comi_jax.model import architecture
from comi_jax.runs.description import Run
from comi_jax.serving.compressor import Comi
from comi_jax.serving.http import lifecycle
from comi_jax.serving.http.server import build
from comi_jax.serving.settings import Settings

KEYS = ("the-first-key-of-two", "the-second-key-of-two")
SETTINGS = Settings(
    "tiny", rates=(4, 2, 1), slots=4, slot_length=128, queue=4, deadline=60.0, drain=20.0, max_context=64,
    max_question=8, max_tokens=64, max_body=20_000, max_file=4_000, store_bytes=10**6, host_bytes=0, max_files=8,
    body_seconds=2.0,
)  # fmt: skip
FACTS = [f"the {c} box holds a {t} ." for c, t in zip(train_fixtures.COLOURS, train_fixtures.THINGS, strict=False)]
TEXT = " ".join(FACTS[:4])
QUESTION = "what does the red box hold ?"
MESSAGES = [{"role": "system", "content": TEXT}, {"role": "user", "content": QUESTION}]
CHAT, FILES = "/v1/chat/completions", "/v1/files"
quick_compilation = train_fixtures.quick_compilation


def comi():
    """Random weights, one word a token, segments of 32."""
    tokenizer = train_fixtures.tokenizer()
    backbone = train_fixtures.backbone(vocab_size=len(tokenizer), max_position_embeddings=256)
    words = ["model.path=tiny", "model.dtype=float32", "model.attention=dense", "model.remat=off",
             "compression.encoder_layers=1", "compression.rates=4,2", "compression.segment_size=32",
             "data.max_context=64", "data.max_query=8", "data.buckets=32", "generation.max_new_tokens=6"]  # fmt: skip
    run = Run(overrides.load("qwen2", words), backbone, (2,))
    params = tiny_models.shaken(architecture.specs(run.architecture), seed=4)
    # As loaded weights are: bound to their device, which makes them other arguments to JAX.
    return Comi(run, jax.device_put(params, jax.devices()[0]), tokenizer, batch_size=1)


class Held:
    """A decoder that takes no step while it is held."""

    def __init__(self, decoder):
        self._decoder, self.free = decoder, threading.Event()
        self.free.set()

    def __getattr__(self, name):
        return getattr(self._decoder, name)

    def step(self):
        self.free.wait()
        return self._decoder.step()


@dataclasses.dataclass
class Served:
    """A server that listens, and what stands behind it."""

    url: str
    port: int
    engine: lifecycle.Engine
    server: lifecycle.Server
    thread: threading.Thread
    app: object

    def client(self, key=KEYS[0], **more):
        """Plain HTTP with a key."""
        return httpx2.Client(base_url=self.url, headers={"Authorization": f"Bearer {key}"}, timeout=60, **more)

    @contextlib.contextmanager
    def held(self):
        """While this holds, no answer gets a token."""
        self.engine._decoder.free.clear()
        try:
            yield
        finally:
            self.engine._decoder.free.set()

    def metric(self, name):
        """The value of a figure without labels."""
        lines = httpx2.get(f"{self.url}/metrics").text.splitlines()
        (value,) = [line.split()[-1] for line in lines if line.split(" ")[0] == f"comi:{name}"]
        return float(value)


@contextlib.contextmanager
def serving(model, keys=KEYS, compile=True, hosts=(), **changes):
    """A server for ``model`` on a free port, ready unless ``compile`` is off."""
    settings = dataclasses.replace(SETTINGS, **changes)
    engine = lifecycle.engine_of(model, settings)
    engine._decoder = Held(engine._decoder)
    app = build(engine, keys, "checksum", hosts)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = lifecycle.Server(app, engine, "127.0.0.1", port)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    wait_for(lambda: server.started)
    if compile:
        engine.start()
        wait_for(lambda: engine.state != "compiling", 600)
    try:
        yield Served(f"http://127.0.0.1:{port}", port, engine, server, thread, app)
    finally:
        engine._decoder.free.set()
        server.should_exit = True
        thread.join(20)
        if compile:
            assert engine.stop(20.0)


def wait_for(condition, seconds=20.0):
    """Until ``condition()`` is true."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come about"
        time.sleep(0.005)


def events(response):
    """The events of a stream: objects, and "[DONE]"."""
    out = []
    for line in response.iter_lines():
        if line.startswith("data: "):
            out.append(line[6:] if line == "data: [DONE]" else json.loads(line[6:]))
    return out


def words(seed, count):
    """Some words that the tokenizer knows."""
    return " ".join(np.random.default_rng(seed).choice(train_fixtures.WORDS, count))


@pytest.fixture(scope="module")
def model(quick_compilation):
    return comi()


@pytest.fixture(scope="module")
def served(model):
    with serving(model) as it:
        yield it


@pytest.fixture(scope="module")
def client(served):
    return openai.OpenAI(base_url=f"{served.url}/v1", api_key=KEYS[0], max_retries=0)


@pytest.fixture(scope="module")
def http(served):
    with served.client() as it:
        yield it


@pytest.fixture(scope="module")
def file(client):
    return client.files.create(file=("a.txt", TEXT.encode()), purpose="user_data")


def file_part(name):
    return {"type": "file", "file": {"file_id": name}}


def text_part(text):
    return {"type": "text", "text": text}


def user(*parts):
    return [{"role": "user", "content": list(parts)}]


def chat(**more):
    return {"model": "tiny", "messages": MESSAGES, **more}


def error_of(response, status):
    """The error in a response of this status, in OpenAI's form."""
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code", "request_id"}
    assert error["request_id"] == response.headers["x-request-id"]
    return error


@pytest.fixture
def pool():
    with concurrent.futures.ThreadPoolExecutor(16) as it:
        yield it
