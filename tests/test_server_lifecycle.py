"""The server's start, queue, clients that leave, failures and shutdown."""

import json
import logging
import signal
import socket
import threading
import time

import jax
import numpy as np
import pytest
import server_fixtures
from server_fixtures import (
    CHAT,
    FACTS,
    FILES,
    KEYS,
    TEXT,
    chat,
    error_of,
    events,
    file_part,
    serving,
    text_part,
    user,
    wait_for,
    words,
)

from comi_jax.benchmarks import load
from comi_jax.serving import encoding
from comi_jax.serving.endpoint import Endpoint

quick_compilation = server_fixtures.quick_compilation
model = server_fixtures.model
served = server_fixtures.served
client = server_fixtures.client
http = server_fixtures.http
file = server_fixtures.file
pool = server_fixtures.pool


def test_a_full_queue_refuses_and_says_when_to_come_back(served, http, pool):
    want = http.post(CHAT, json=chat()).json()["choices"]
    with served.held():
        asked = [pool.submit(http.post, CHAT, json=chat()) for _ in range(8)]
        wait_for(lambda: served.engine.open == 8)
        refused = http.post(CHAT, json=chat())
        assert error_of(refused, 429)["code"] == "busy" and 1 <= int(refused.headers["retry-after"]) <= 60
        assert served.metric("num_requests_running") + served.metric("num_requests_waiting") == 8
    assert [each.result().json()["choices"] for each in asked] == [want] * 8


def test_eight_mixed_requests_at_once_are_answered_as_alone(served, http, pool, file):
    contexts = [" ".join(FACTS[i % 3 : 3 + i % 5]) for i in range(8)]
    bodies = [
        {"messages": [{"role": "system", "content": contexts[i]}, {"role": "user", "content": words(i, 2 + i % 6)}],
         "rate": (4, 2, 1)[i % 3], "max_tokens": 3 + 4 * i, "temperature": (0, 1.2)[i % 2], "seed": i}
        for i in range(6)
    ]  # fmt: skip
    bodies += [{"messages": user(file_part(file.id), text_part(words(i, 5))), "max_tokens": 20} for i in range(2)]
    alone = [http.post(CHAT, json=body).json()["choices"] for body in bodies]
    assert len({choice["message"]["content"] for (choice,) in alone}) > 5
    for _ in range(2):
        asked = [pool.submit(http.post, CHAT, json=body) for body in bodies]
        assert [each.result().json()["choices"] for each in asked] == alone
    assert served.engine.open == 0


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_frees_its_slot_before_the_next_step(served, stream):
    before = served.metric("cancelled_total")
    steps = served.metric("generation_tokens_total")
    with served.held():
        leaving = open_socket(served, chat(max_tokens=64, stream=stream, stop=["never"]))
        wait_for(lambda: len(served.engine._decoding) == 1)
        leaving.close()
        wait_for(lambda: served.engine.open == 0)
        assert served.metric("cancelled_total") == before + 1
    assert served.engine._decoder.live == 0
    assert served.metric("generation_tokens_total") == steps


def open_socket(served, body):
    """A connection that has sent a request and reads nothing."""
    content = json.dumps(body).encode()
    out = socket.create_connection(("127.0.0.1", served.port))
    head = f"POST {CHAT} HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer {KEYS[0]}\r\nContent-Type: application/json\r\n"
    out.sendall(f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content)
    return out


def test_a_client_that_leaves_in_a_stream_frees_its_slot(served, http):
    before = served.metric("cancelled_total")
    with http.stream("POST", CHAT, json=chat(stream=True, max_tokens=64, temperature=2, seed=1)) as response:
        next(line for line in response.iter_lines() if "content" in line and '""' not in line)
        served.engine._decoder.free.clear()
    try:
        wait_for(lambda: served.engine.open == 0 and served.metric("cancelled_total") == before + 1)
    finally:
        served.engine._decoder.free.set()


def test_a_client_that_leaves_while_it_waits_is_forgotten(served, pool, http):
    with served.held():
        asked = [pool.submit(http.post, CHAT, json=chat()) for _ in range(4)]
        wait_for(lambda: served.engine.open == 4)
        leaving = open_socket(served, chat())
        wait_for(lambda: served.engine.open == 5)
        leaving.close()
        wait_for(lambda: served.engine.open == 4)
    assert [each.result().status_code for each in asked] == [200] * 4


def test_a_request_has_a_deadline(model):
    with serving(model, deadline=0.3) as other, other.client() as http:
        with other.held():
            threading.Timer(0.5, other.engine._decoder.free.set).start()
            late = http.post(CHAT, json=chat())
        assert error_of(late, 408)["code"] == "deadline_exceeded"
        step = other.engine._decoder.step
        other.engine._decoder.step = lambda: (time.sleep(0.03), step())[1]
        with http.stream("POST", CHAT, json=chat(stream=True, max_tokens=64, temperature=2, seed=1)) as response:
            assert response.status_code == 200
            got = events(response)
        assert got[-1] == "[DONE]" and got[-2]["error"]["code"] == "deadline_exceeded" and len(got) > 3
        assert other.engine.open == 0 and other.engine._decoder.live == 0


def test_programs_are_compiled_before_it_is_ready(model, caplog):
    """No request compiles anything; while compiling, nothing under /v1 is answered."""
    with serving(model, compile=False) as other, other.client() as http:
        assert http.get("/ready").status_code == 503 and http.get("/health").status_code == 200
        refused = http.get("/v1/models")
        assert error_of(refused, 503)["code"] == "starting" and refused.headers["retry-after"]


def test_no_request_compiles_a_program(model):
    """In slots that no other test has, so that not even the first one does."""
    compiled = []

    class Count(logging.Handler):
        def emit(self, record):
            if "Compiling" in record.getMessage():
                compiled.append(record.getMessage()[:100])

    handler = Count()
    with serving(model, slots=3, slot_length=64, max_tokens=32) as other, other.client() as http:
        logging.getLogger("jax").addHandler(handler)
        try:
            jax.config.update("jax_log_compiles", True)
            for i, rate in enumerate((1, 2, 4) * 3):
                context = {"role": "system", "content": words(i, 1 + 5 * i)}
                body = {"messages": [context, {"role": "user", "content": words(i, 1 + i % 8)}], "rate": rate}
                assert http.post(CHAT, json=body).status_code == 200
            assert http.post(CHAT, json=chat(keep=[[0, 7]], temperature=1, top_k=3)).status_code == 200
            made = http.post(FILES, files={"file": ("a.txt", TEXT.encode())}).json()
            asked = {"messages": user(file_part(made["id"]), text_part("what ?"))}
            assert http.post(CHAT, json=asked).status_code == 200
        finally:
            jax.config.update("jax_log_compiles", False)
            logging.getLogger("jax").removeHandler(handler)
    assert compiled == []


def test_a_failure_of_one_job_is_its_own_and_says_nothing_of_the_inside(served, http, monkeypatch, caplog):
    monkeypatch.setattr(encoding, "read_segment", lambda *_: 1 // 0)
    failed = http.post(CHAT, json=chat())
    error = error_of(failed, 500)
    assert error["type"] == "server_error" and "division" not in failed.text
    assert "ZeroDivisionError" in caplog.text  # the log has the reason
    monkeypatch.undo()
    assert http.post(CHAT, json=chat()).status_code == 200


def test_an_engine_that_dies_fails_all_and_is_unhealthy(model, pool):
    with serving(model) as other, other.client() as http:
        with other.held():
            asked = [pool.submit(http.post, CHAT, json=chat()) for _ in range(5)]
            wait_for(lambda: other.engine.open == 5)
            other.engine._decoder.step = lambda: 1 // 0
            other.engine._decoder._decoder.step = lambda: 1 // 0
        assert [each.result().status_code for each in asked] == [500] * 5
        assert http.get("/health").status_code == http.get("/ready").status_code == 503
        error_of(http.post(CHAT, json=chat()), 503)


def test_sigterm_finishes_what_was_accepted_and_refuses_the_rest(model, pool):
    with serving(model) as other, other.client() as http:
        want = http.post(CHAT, json=chat()).json()["choices"]
        with other.held():
            asked = [pool.submit(http.post, CHAT, json=chat()) for _ in range(6)]
            wait_for(lambda: other.engine.open == 6)
            other.server.handle_exit(signal.SIGTERM, None)
            wait_for(lambda: http.get("/ready").status_code == 503)
            refused = http.post(CHAT, json=chat())
            assert error_of(refused, 503)["code"] == "shutting_down" and refused.headers["retry-after"]
            assert other.thread.is_alive()
        assert [each.result().json()["choices"] for each in asked] == [want] * 6
        other.thread.join(20)
        assert not other.thread.is_alive()


def test_the_drain_has_an_end_and_a_stream_is_told(model):
    with serving(model, drain=0.3) as other, other.client() as http:
        step = other.engine._decoder.step
        other.engine._decoder.step = lambda: (time.sleep(0.05), step())[1]
        with http.stream("POST", CHAT, json=chat(stream=True, max_tokens=64, temperature=2, seed=1)) as response:
            other.server.handle_exit(signal.SIGTERM, None)
            got = events(response)
        assert got[-1] == "[DONE]" and got[-2]["error"]["code"] == "shutting_down"
        other.thread.join(20)
        assert not other.thread.is_alive()


def test_a_second_signal_ends_it_at_once(model, pool):
    with serving(model) as other, other.client() as http:
        with other.held():
            asked = pool.submit(http.post, CHAT, json=chat())
            wait_for(lambda: other.engine.open == 1)
            other.server.handle_exit(signal.SIGTERM, None)
            time.sleep(0.3)
            assert other.thread.is_alive()
            other.server.handle_exit(signal.SIGTERM, None)
            other.thread.join(10)
            assert not other.thread.is_alive()
        assert asked.exception() is not None or asked.result().status_code >= 500


def test_a_load_is_answered_and_counted(served, model, monkeypatch):
    """The benchmark's requests: kept and sent each time give the same tokens, and nothing of them stays stored."""
    stored = len(served.engine.preparer.store)
    monkeypatch.setattr(load, "PAUSE", 0.02)
    texts = load.documents(model.tokenizer, [20, 10], np.random.default_rng(0))
    assert [len(text.split()) for text in texts] == [20, 10]
    requests, seen = load.requests_of(12, texts, ["what ?", "the box"], (4, 2)), []
    assert sorted(request.tokens for request in requests) == sorted([4, 8, 16, 32] * 3)
    for kept in (True, False):
        seen.append(load.Seen())
        server = load.Server("", Endpoint(f"{served.url}/v1", KEYS[0]), "tiny", True, kept)
        assert (load.run(server, requests, texts, 12, seen[-1]) > 0) == kept
    assert [len(each.first) for each in seen] == [12, 12] and seen[0].tokens == seen[1].tokens > 12
    assert seen[0].came_back > 0 and served.engine.open == 0 and len(served.engine.preparer.store) == stored
    server = load.Server("", Endpoint(f"{served.url}/v1", KEYS[0]), "other", True)
    load.run(server, requests[:2], texts, 2, seen[1])
    assert seen[1].row("a")[1] == "12 of 14" and seen[1].lost == 2
