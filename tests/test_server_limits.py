"""The server refuses what is malformed, too long or without a key, and logs and counts without texts."""

import logging
import socket

import httpx2
import pytest
import server_fixtures
from server_fixtures import (
    CHAT,
    FACTS,
    FILES,
    KEYS,
    MESSAGES,
    TEXT,
    chat,
    error_of,
    file_part,
    serving,
    text_part,
    user,
    wait_for,
    words,
)

quick_compilation = server_fixtures.quick_compilation
model = server_fixtures.model
served = server_fixtures.served
client = server_fixtures.client
http = server_fixtures.http
file = server_fixtures.file


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[]", b"null", b"\xff\xfe", b'{"messages": "hi"}', b'{"messages": []}', b'{"messages": [1]}',
     b'{"messages": [{"role": "user", "content": "\\ud800"}]}', b"[" * 5_000, b'{"messages": [{"role": "tool"}]}',
     b'{"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}', b'{"temperature": NaN}',
     b'{"messages": [{"role": "user", "content": [{"type": "file", "file": {"file_data": "%%%"}}]}]}',
     b'{"messages": [{"role": "user", "content": ""}]}', b'{"messages": [{"role": "user"}]}'],
)  # fmt: skip
def test_a_malformed_body_is_refused(http, body):
    error = error_of(http.post(CHAT, content=body, headers={"content-type": "application/json"}), 400)
    assert error["message"] and "Traceback" not in error["message"]


def test_statuses_of_what_is_not_there(http):
    assert error_of(http.get("/v1/nothing"), 404)["message"]
    assert http.get(CHAT).headers["allow"] == "POST"
    error_of(http.get(CHAT), 405)
    error_of(http.post(CHAT, content=b"{}", headers={"content-type": "text/plain"}), 415)
    error_of(http.post(FILES, json={}), 415)
    error_of(http.post(FILES, files={"file": ("a.pdf", b"%PDF\xff")}), 415)
    error_of(http.post(FILES, files={"file": ("a.txt", b" \n")}), 400)
    error_of(http.post(FILES, files={"other": ("a.txt", b"key")}), 400)
    error_of(http.post(FILES, files={"file": ("a", b"key")}, data={"purpose": "batch"}), 400)
    error_of(http.post(FILES, content=b"--x", headers={"content-type": "multipart/form-data"}), 400)
    error_of(http.get(f"{FILES}/file-0"), 404)
    error_of(http.get("/v1/models/other"), 404)


def test_sizes_and_lengths(http, served):
    error_of(http.post(CHAT, content=b" " * 20_001, headers={"content-type": "application/json"}), 413)
    chunks = (b" " * 1_000 for _ in range(21))
    error_of(http.post(CHAT, content=chunks, headers={"content-type": "application/json"}), 413)
    error_of(http.post(FILES, files={"file": ("a.txt", b"a " * 2_001)}), 413)
    for messages in (
        [{"role": "system", "content": words(0, 65)}, MESSAGES[1]],
        [MESSAGES[0], {"role": "user", "content": words(0, 9)}],
    ):
        error = error_of(http.post(CHAT, json={"messages": messages}), 400)
        assert error["code"] == "context_length_exceeded" and "Traceback" not in error["message"]
    assert error_of(http.post(FILES, files={"file": ("a.txt", words(0, 65).encode())}), 400)
    assert served.engine.open == 0


def test_a_store_that_is_full_refuses(model):
    one = model.encode(TEXT).nbytes
    with serving(model, store_bytes=int(1.5 * one), max_files=2) as other, other.client() as http:
        first = http.post(FILES, files={"file": ("a.txt", TEXT.encode())}).json()
        full = http.post(FILES, files={"file": ("a.txt", TEXT.encode())})
        assert error_of(full, 429)["code"] == "store_full" and int(full.headers["retry-after"]) > 0
        assert other.metric("document_store_bytes") == one
        http.delete(f"{FILES}/{first['id']}")
        assert http.post(FILES, files={"file": ("a.txt", TEXT.encode())}).status_code == 200
        two = " ".join([*FACTS[:6], *FACTS[:2]])
        assert error_of(http.post(FILES, files={"file": ("a.txt", two.encode())}), 413)["code"] == "document_too_large"


def test_a_slow_body_is_refused_and_takes_no_slot(served):
    with socket.create_connection(("127.0.0.1", served.port)) as slow:
        head = f"POST {CHAT} HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer {KEYS[0]}\r\n"
        slow.sendall(f"{head}Content-Type: application/json\r\nContent-Length: 100\r\n\r\n{{".encode())
        slow.settimeout(20)
        assert served.engine.open == 0
        assert slow.recv(65_536).startswith(b"HTTP/1.1 408")


def test_no_key_no_answer_and_one_key_does_not_see_anothers_files(served, http, file):
    for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": f"Basic {KEYS[0]}"},
                    {"Authorization": f"Bearer {KEYS[0]}x"}):  # fmt: skip
        refused = httpx2.get(f"{served.url}/v1/models", headers=headers)
        assert error_of(refused, 401)["code"] == "invalid_api_key"
    with served.client(KEYS[1]) as other:
        assert other.get("/v1/models").status_code == 200
        assert other.get(FILES).json()["data"] == []
        asked = {"messages": user(file_part(file.id), text_part("what ?"))}
        for response in (other.get(f"{FILES}/{file.id}"), other.delete(f"{FILES}/{file.id}"),
                         other.post(CHAT, json=asked)):  # fmt: skip
            error_of(response, 404)
    assert http.get(f"{FILES}/{file.id}").status_code == 200


def test_request_ids_and_a_log_without_texts(http, file, caplog):
    secret = "brass lamp"
    with caplog.at_level(logging.DEBUG, "comi_jax"):
        got = http.post(CHAT, json=chat(documents=[{"text": secret}], brass=1), headers={"X-Request-Id": "mine-1"})
        odd = http.get(f"/v1/{secret}", headers={"X-Request-Id": secret})
        http.post(CHAT, json=chat(**{secret: 1}, stop=secret, user=secret))
        http.post(CHAT, json={"messages": secret})
        wait_for(lambda: len(caplog.records) >= 4)
    assert got.headers["x-request-id"] == "mine-1" and len(odd.headers["x-request-id"]) == 32
    assert "mine-1 POST /v1/chat/completions 200" in caplog.text and "ignored=brass" in caplog.text
    assert secret not in caplog.text and "lamp" not in caplog.text and TEXT not in caplog.text


def test_health_version_and_metrics(served, http):
    assert httpx2.get(f"{served.url}/health").json() == {"status": "ready"}
    assert httpx2.get(f"{served.url}/healthz").status_code == httpx2.get(f"{served.url}/ready").status_code == 200
    assert httpx2.get(f"{served.url}/version").json()["limits"]["slots"] == 4
    http.post(CHAT, json=chat())
    text = httpx2.get(f"{served.url}/metrics").text
    for name in ("num_requests_running", "num_requests_waiting", "request_success_total", "prompt_tokens_total",
                 "generation_tokens_total", "time_to_first_token_seconds_count", "e2e_request_latency_seconds_count",
                 "request_queue_time_seconds_count", "inter_token_latency_seconds_count", "encode_seconds_count",
                 "compress_seconds_count", "document_store_bytes", "document_store_evictions_total",
                 "achieved_rate_count", "refused_total", "cancelled_total"):  # fmt: skip
        assert f"\ncomi:{name}" in text, name
    assert httpx2.get(f"{served.url}/openapi.json").json()["paths"][CHAT]["post"]["requestBody"]["required"]
