"""The server over real HTTP: OpenAI's own client, errors, limits, the queue, clients that leave, keys, shutdown."""

import base64
import concurrent.futures
import json
import logging
import signal
import socket
import threading
import time

import httpx2
import jax
import openai
import pytest
import server_fixtures
import train_fixtures
from server_fixtures import FACTS, KEYS, events, serving, wait_for, words

from comi_jax.serving import encoding
from comi_jax.serving.contexts import joined
from comi_jax.serving.documents import Document

quick_compilation = train_fixtures.quick_compilation

TEXT = " ".join(FACTS[:4])
QUESTION = "what does the red box hold ?"
MESSAGES = [{"role": "system", "content": TEXT}, {"role": "user", "content": QUESTION}]
CHAT, FILES = "/v1/chat/completions", "/v1/files"


@pytest.fixture(scope="module")
def model(quick_compilation):
    return server_fixtures.comi()


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


# --- OpenAI's own client ----------------------------------------------------------------------------------------------


def test_a_chat_is_the_librarys_answer(client, model):
    got = client.chat.completions.create(**chat(), max_completion_tokens=9)
    want = model.answer(model.encode(TEXT), QUESTION, max_new_tokens=9)
    assert got.choices[0].message.content == want.text and got.choices[0].message.role == "assistant"
    assert got.choices[0].finish_reason == want.finish_reason
    assert got.usage.prompt_tokens == 28 + 7 and got.usage.completion_tokens == len(want.tokens)
    assert got.usage.total_tokens == got.usage.prompt_tokens + got.usage.completion_tokens
    assert got.usage.prompt_tokens_details.cached_tokens == 0
    account = got.model_extra["comi"]
    assert (account["context_tokens"], account["memory_vectors"]) == (28, want.memory_vectors)
    assert (account["asked_rate"], account["rate"], account["documents"]) == (4, 28 / want.memory_vectors, [])
    assert min(account["encode_ms"], account["compress_ms"], account["first_token_ms"]) > 0
    assert (got.object, got.model, got.id[:9]) == ("chat.completion", "tiny", "chatcmpl-")


@pytest.mark.parametrize("usage", [False, True])
def test_a_stream_joined_is_the_chat(client, http, usage):
    options = {"temperature": 1.5, "seed": 7, "max_tokens": 24}
    whole = client.chat.completions.create(**chat(), **options)
    more = {"stream_options": {"include_usage": True}} if usage else {}
    chunks = list(client.chat.completions.create(**chat(), **options, **more, stream=True))
    assert chunks[0].choices[0].delta.role == "assistant" and chunks[0].choices[0].delta.content == ""
    choices = [chunk.choices[0] for chunk in chunks if chunk.choices]
    assert "".join(choice.delta.content or "" for choice in choices) == whole.choices[0].message.content
    assert len([choice for choice in choices if choice.delta.content]) > 3
    assert [c.finish_reason for c in choices] == [None] * (len(choices) - 1) + [whole.choices[0].finish_reason]
    assert len({chunk.id for chunk in chunks}) == 1 and {chunk.object for chunk in chunks} == {"chat.completion.chunk"}
    assert [chunk.usage for chunk in chunks if not chunk.choices] == ([whole.usage] if usage else [])
    account = next(chunk.model_extra["comi"] for chunk in chunks if "comi" in chunk.model_extra)
    assert account["memory_vectors"] == whole.model_extra["comi"]["memory_vectors"]
    with http.stream("POST", CHAT, json=chat(stream=True)) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        assert events(response)[-1] == "[DONE]"


def test_a_file_is_uploaded_once_and_asked_many_times(client, model, file):
    document = model.encode(TEXT)
    for question in (QUESTION, "what holds a key ?"):
        got = client.chat.completions.create(model="tiny", messages=user(file_part(file.id), text_part(question)))
        assert got.choices[0].message.content == model.answer(document, question).text
        assert got.usage.prompt_tokens_details.cached_tokens == 28
        assert got.model_extra["comi"]["documents"] == [file.id]


def test_files_are_listed_and_deleted(client):
    made = client.files.create(
        file=("b.txt", "﻿the key".encode()), purpose="user_data",
        expires_after={"anchor": "created_at", "seconds": 3600},
    )  # fmt: skip
    assert (made.object, made.filename, made.bytes, made.status) == ("file", "b.txt", 10, "processed")
    assert made.expires_at - made.created_at == 3600 and made.model_extra["comi"]["tokens"] == 2
    assert client.files.retrieve(made.id) == made
    assert next(iter(client.files.list())).id == made.id
    assert [each.id for each in client.files.list(limit=1)][0] == made.id
    assert client.files.delete(made.id).deleted
    with pytest.raises(openai.NotFoundError):
        client.files.retrieve(made.id)
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="tiny", messages=user(file_part(made.id), text_part("what ?")))


def test_a_file_that_has_expired_is_gone(client, served):
    made = client.files.create(file=("c.txt", b"the key"), purpose="user_data",
                               expires_after={"anchor": "created_at", "seconds": 1})  # fmt: skip
    assert made.id in served.engine.preparer.store
    wait_for(lambda: made.id not in served.engine.preparer.store)
    with pytest.raises(openai.NotFoundError):
        client.files.retrieve(made.id)


def test_errors_reach_the_client_as_its_own(client, served):
    for keys, error in ((chat(n=2), openai.BadRequestError), (chat(model="other"), openai.NotFoundError)):
        with pytest.raises(error) as caught:
            client.chat.completions.create(**keys)
        assert caught.value.request_id and caught.value.param in ("n", "model")
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=f"{served.url}/v1", api_key="wrong", max_retries=0).models.list()


def test_models_and_completions(client, model):
    (only,) = client.models.list()
    assert only.id == "tiny" and client.models.retrieve("tiny") == only and only.model_extra["max_model_len"] == 136
    got = client.completions.create(
        model="tiny", prompt=[QUESTION], max_tokens=5, n=1, logprobs=None, presence_penalty=0, seed=None, temperature=0,
        extra_body={"documents": [{"text": TEXT}]},
    )  # fmt: skip
    assert got.choices[0].text == model.answer(model.encode(TEXT), QUESTION, max_new_tokens=5).text
    stream = client.completions.create(model="tiny", prompt=QUESTION, max_tokens=5, stream=True,
                                       extra_body={"documents": [{"text": TEXT}]})  # fmt: skip
    assert "".join(chunk.choices[0].text for chunk in stream) == got.choices[0].text


# --- contexts and options ---------------------------------------------------------------------------------------------


def test_pieces_come_in_order_and_each_begins_a_segment(client, model, file):
    messages = [
        {"role": "system", "content": "the box"},
        {"role": "user", "content": "what ?"},
        {"role": "assistant", "content": [text_part("a key")]},
        *user(file_part(file.id), {"type": "file", "file": {"file_data": data_url("blue pen"), "filename": "x"}},
              text_part(QUESTION)),
    ]  # fmt: skip
    got = client.chat.completions.create(
        model="tiny", messages=messages, extra_body={"documents": [{"title": "red", "text": "cup"}]}
    )
    rest = "blue pen\n\nred\ncup\n\nthe box\n\nuser: what ?\n\nassistant: a key"
    document = Document(joined([model.encode(TEXT).contents, model.encode(rest).contents]))
    assert got.choices[0].message.content == model.answer(document, QUESTION).text
    assert got.usage.prompt_tokens_details.cached_tokens == 28
    assert got.model_extra["comi"]["context_tokens"] == document.tokens == 28 + 12


def data_url(text):
    return "data:text/plain;base64," + base64.b64encode(text.encode()).decode()


def test_rate_slots_and_kept_spans(client, model, http):
    document, seen = model.encode(TEXT), {}
    for more, options in (
        ({"rate": 2}, {"rate": 2}),
        ({"rate": 1}, {"rate": 1}),
        ({"max_slots": 14}, {"rate": 2}),
        ({"max_slots": 13}, {"rate": 4}),
        ({"keep": [[4, 11]]}, {"keep": [(4, 11)]}),
    ):
        got = client.chat.completions.create(**chat(), max_tokens=8, extra_body=more)
        want = model.answer(document, QUESTION, max_new_tokens=8, **options)
        assert got.choices[0].message.content == want.text
        account = seen[str(more)] = got.model_extra["comi"]
        assert account["memory_vectors"] == want.memory_vectors and account["asked_slots"] == more.get("max_slots")
    assert seen["{'rate': 1}"]["rate"] == 1 and seen["{'max_slots': 13}"]["memory_vectors"] <= 13


def test_neutral_values_pass_and_others_are_refused_by_field(http):
    neutral = {
        "n": 1, "presence_penalty": 0, "frequency_penalty": 0.0, "logit_bias": {}, "logprobs": False, "top_logprobs": 0,
        "tools": [], "tool_choice": "auto", "response_format": {"type": "text"}, "modalities": ["text"], "audio": None,
        "stop": None, "seed": None, "user": "someone", "metadata": {"a": "b"}, "store": True, "service_tier": "auto",
        "parallel_tool_calls": True, "stream": False, "stream_options": None, "something_new": 3, "top_p": 1,
    }  # fmt: skip
    assert http.post(CHAT, json=chat(**neutral)).status_code == 200
    for field, value in {
        "n": 2, "presence_penalty": 0.5, "logprobs": True, "logit_bias": {"5": 1}, "tools": [{"type": "function"}],
        "response_format": {"type": "json_object"}, "audio": {"voice": "a"}, "temperature": -1, "top_p": 0,
        "max_tokens": 65, "max_completion_tokens": 0, "stop": ["a"] * 5, "seed": "one", "rate": 3, "max_slots": 0,
        "keep": [[0, 1, 2]], "documents": [{"title": "only"}], "stream": "yes",
    }.items():  # fmt: skip
        error = error_of(http.post(CHAT, json=chat(**{field: value})), 400)
        assert error["param"].startswith(field) and error["type"] == "invalid_request_error"
    assert "calibrated" in error_of(http.post(CHAT, json=chat(rate="auto")), 400)["message"]


def test_a_stop_string_ends_an_answer(client):
    whole = client.chat.completions.create(**chat(), max_tokens=20).choices[0].message.content
    stop = whole.split()[3]
    got = client.chat.completions.create(**chat(), max_tokens=20, stop=stop).choices[0]
    assert got.message.content == whole[: whole.index(stop)].strip() and got.finish_reason == "stop"


def test_a_lone_message_is_refused_or_answered_as_it_is(http, model, served):
    lone = {"model": "tiny", "messages": [{"role": "user", "content": QUESTION}]}
    assert error_of(http.post(CHAT, json=lone), 400)["code"] == "context_missing"
    with serving(model, single_message="plain") as other, other.client() as plain:
        got = plain.post(CHAT, json=lone).json()
    assert got["comi"]["memory_vectors"] == 0 and got["comi"]["rate"] is None
    assert got["usage"]["prompt_tokens"] == 7 and got["choices"][0]["message"]["content"]


# --- malformed requests and limits ------------------------------------------------------------------------------------


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


# --- the queue, and clients that leave --------------------------------------------------------------------------------


@pytest.fixture
def pool():
    with concurrent.futures.ThreadPoolExecutor(16) as it:
        yield it


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


# --- keys, logs, health -----------------------------------------------------------------------------------------------


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


# --- failures and shutdown --------------------------------------------------------------------------------------------


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
