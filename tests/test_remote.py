"""Answers that an endpoint decodes from prompt embeddings: the text of this server's own slots, and its failures."""

import base64
import contextlib
import http.server
import io
import json
import threading
import time

import numpy as np
import openai
import pytest
import server_fixtures
import torch
import train_fixtures
from server_fixtures import FACTS, KEYS, events, serving, wait_for

from comi_jax import serve
from comi_jax.config import Generation
from comi_jax.errors import ConfigError
from comi_jax.serving.endpoint import Endpoint
from comi_jax.serving.remote import RemoteDecoder

quick_compilation = train_fixtures.quick_compilation
CHAT, FILES = "/v1/chat/completions", "/v1/files"
TEXT = " ".join(FACTS[:4])
QUESTION = "what does the red box hold ?"
KEY = "the-key-of-the-endpoint"


class Fake(http.server.ThreadingHTTPServer):
    """What vLLM does with prompt_embeds, by the slots of ``model``. ``fault`` names what it does wrong."""

    daemon_threads = True

    def __init__(self, model):
        super().__init__(("127.0.0.1", 0), Answering)
        self.model, self.fault, self.asked, self.left = model, "", [], 0
        self.lock = threading.Lock()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_address[1]}/v1"


class Answering(http.server.BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def reply(self, status, content, kind="application/json"):
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.end_headers()
        self.wfile.write(content)

    def do_GET(self):
        assert self.path == "/v1/models" and self.headers["Authorization"] == f"Bearer {KEY}"
        self.reply(200, json.dumps({"data": [{"id": "decoder", "max_model_len": 120}]}).encode())

    def do_POST(self):
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        server.asked.append(body)
        if server.fault.isdigit():
            return self.reply(int(server.fault), b'{"error": {"message": "a secret of the inside"}}')
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self.reply(200, b"", "text/event-stream")
            with server.lock:
                for number, part in enumerate(self.events(body)):
                    if server.fault == "cut" and number == 2:
                        return
                    if server.fault == "event" and number == 2:
                        part = {"error": {"message": "a secret of the inside"}}
                    line = b"data: {nonsense" if server.fault == "nonsense" else b"data: " + json.dumps(part).encode()
                    self.wfile.write(line + b"\n\n")
                    self.wfile.flush()
                    if server.fault == "slow":
                        time.sleep(0.1)
            self.wfile.write(b"data: [DONE]\n\n")
            return
        server.left += 1

    def events(self, body):
        model = self.server.model
        assert body["model"] == "decoder" and body["stream"] and "prompt" not in body
        vectors = torch.load(io.BytesIO(base64.b64decode(body["prompt_embeds"])), weights_only=True).numpy()
        assert vectors.dtype == np.float32
        greedy = body["temperature"] == 0
        options = Generation(
            max_new_tokens=body["max_tokens"], temperature=body["temperature"],
            stop_strings=tuple(body.get("stop", ())),
            **({} if greedy else {"top_p": body["top_p"], "seed": body["seed"], "top_k": max(body["top_k"], 0)}),
        )  # fmt: skip
        assert body["stop_token_ids"] == list(model.run.stop)
        slots = model.slots(1, 128)
        handle = slots.submit(vectors, options)
        while handle.finish_reason is None:
            for event in slots.step():
                choice = {"index": 0, "text": event.text, "finish_reason": event.finish_reason}
                if self.server.fault != "no ids":
                    assert body["return_token_ids"]
                    choice |= {"token_ids": [event.token], "text": "not used"}
                yield {"choices": [choice], "usage": {"completion_tokens": len(handle.tokens)}}
        yield {"choices": [], "usage": {"completion_tokens": len(handle.tokens)}}


@pytest.fixture(scope="module")
def model(quick_compilation):
    return server_fixtures.comi()


@pytest.fixture(scope="module")
def fake(model):
    server = Fake(model)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def served(model, fake):
    with serving(model, decoder=fake.url, decoder_key=KEY, rates=(4, 1)) as it:
        yield it


@pytest.fixture(autouse=True)
def sound(fake):
    fake.fault, fake.left = "", 0
    yield
    fake.fault = ""


def chat(**more):
    return {"messages": [{"role": "system", "content": TEXT}, {"role": "user", "content": QUESTION}], **more}


@pytest.mark.parametrize("fault", ["", "no ids"])
def test_the_answer_is_that_of_the_servers_own_slots(served, model, fake, fault):
    fake.fault = fault
    client = openai.OpenAI(base_url=f"{served.url}/v1", api_key=KEYS[0], max_retries=0)
    document = model.encode(TEXT)
    for rate, options in ((4, {}), (1, {}), (4, {"temperature": 1.5, "seed": 3, "top_p": 0.9})):
        want = model.answer(document, QUESTION, rate=rate, max_new_tokens=12, **options)
        asked = chat(model="tiny", max_tokens=12, extra_body={"rate": rate}, **options)
        got = client.chat.completions.create(**asked)
        assert got.choices[0].message.content == want.text and got.choices[0].finish_reason == want.finish_reason
        assert got.usage.completion_tokens == len(want.tokens)
        assert got.model_extra["comi"]["memory_vectors"] == want.memory_vectors
        pieces = [
            chunk.choices[0].delta.content or "" for chunk in client.chat.completions.create(**asked, stream=True)
        ]
        assert "".join(pieces) == want.text and len([piece for piece in pieces if piece]) > 1
    stop = model.answer(document, QUESTION, max_new_tokens=12).text.split()[2]
    got = client.chat.completions.create(**chat(model="tiny", max_tokens=12, stop=stop))
    assert stop not in got.choices[0].message.content and fake.asked[-1]["stop"] == [stop]
    assert "layers" in model.params["decoder"]  # of the model that was given


def test_what_the_endpoint_has_no_room_for_is_refused(served):
    """It has 120 positions, where a slot has 128."""
    with served.client() as http:
        got = http.post(CHAT, json=chat(rate=1, max_tokens=64, documents=[{"text": TEXT}]))
    assert got.status_code == 400 and "120 positions of the decoder" in got.text


@pytest.mark.parametrize(
    ("fault", "status", "code"),
    [("400", 502, "decoder_failed"), ("500", 502, "decoder_failed"), ("503", 503, "decoder_unavailable"),
     ("429", 503, "decoder_unavailable"), ("nonsense", 502, "decoder_failed")],
)  # fmt: skip
def test_a_failure_of_the_endpoint_is_one_clear_error(served, fake, fault, status, code):
    fake.fault = fault
    with served.client() as http:
        for stream in (False, True):
            got = http.post(CHAT, json=chat(stream=stream))
            error = got.json()["error"]
            assert (got.status_code, error["code"]) == (status, code) and "endpoint" in error["message"]
            assert "secret" not in got.text and bool(got.headers.get("retry-after")) == (status == 503)
        fake.fault = ""
        assert http.post(CHAT, json=chat()).status_code == 200 and served.engine.open == 0


@pytest.mark.parametrize("fault", ["cut", "event"])
def test_a_failure_within_a_stream_is_an_event(served, fake, fault):
    fake.fault = fault
    with served.client() as http:
        with http.stream("POST", CHAT, json=chat(stream=True, max_tokens=12)) as response:
            got = events(response)
        assert got[-1] == "[DONE]" and got[-2]["error"]["code"] == "decoder_failed" and len(got) > 3
        assert http.post(CHAT, json=chat(max_tokens=12)).status_code == 502


def test_an_endpoint_that_is_gone_is_503_and_is_waited_for(model):
    server = Fake(model)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    with serving(model, decoder=server.url, decoder_key=KEY, rates=(4,)) as other, other.client() as http:
        server.shutdown()
        server.server_close()
        got = http.post(CHAT, json=chat())
        assert got.status_code == 503 and got.json()["error"]["code"] == "decoder_unavailable"
    waiting = RemoteDecoder(Endpoint(server.url), (2,), model.tokenizer, Generation(), slots=2, length=64)
    thread = threading.Thread(target=waiting.compile)
    thread.start()
    thread.join(0.3)
    assert thread.is_alive()
    waiting.close()
    thread.join(10)
    assert not thread.is_alive()


def test_a_client_that_leaves_ends_the_work_of_the_endpoint(served, fake):
    fake.fault = "slow"
    with served.client() as http:
        with http.stream("POST", CHAT, json=chat(stream=True, max_tokens=64, temperature=2, seed=1)) as response:
            next(line for line in response.iter_lines() if "content" in line)
        wait_for(lambda: served.engine.open == 0 and served.engine._decoder.live == 0)
        wait_for(lambda: fake.left == 1)


def test_what_is_no_endpoint_is_refused(tmp_path):
    for url in ("localhost:8000", "ftp://a/v1", "http://", "http://a:b/v1", ""):
        with pytest.raises(ConfigError, match="is no URL; give one as"):
            Endpoint(url)
    (tmp_path / "key").write_text("two words")

    def key(*words):
        return serve.decoder_key_of(serve.parser().parse_args(["--checkpoint=a", *words]))

    with pytest.raises(ConfigError, match="must hold one key"):
        key("--decoder=http://a", f"--decoder-key-file={tmp_path / 'key'}")
    with pytest.raises(ConfigError, match="give both or none"):
        key(f"--decoder-key-file={tmp_path / 'key'}")
    (tmp_path / "key").write_text(f"{KEY}\n")
    assert key("--decoder=http://a", f"--decoder-key-file={tmp_path / 'key'}") == KEY and key() == ""
