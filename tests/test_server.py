"""The server over real HTTP: OpenAI's own client, contexts and options."""

import base64
import logging

import jax
import openai
import pytest
import server_fixtures
from server_fixtures import (
    CHAT,
    FILES,
    QUESTION,
    TEXT,
    chat,
    error_of,
    events,
    file_part,
    serving,
    text_part,
    user,
    wait_for,
)

from comi_jax.config import Mesh
from comi_jax.devices import sharding
from comi_jax.model import architecture
from comi_jax.params import unflatten
from comi_jax.serving.compressor import Comi
from comi_jax.serving.contexts import joined
from comi_jax.serving.documents import Document

quick_compilation = server_fixtures.quick_compilation
model = server_fixtures.model
served = server_fixtures.served
client = server_fixtures.client
http = server_fixtures.http
file = server_fixtures.file


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
    assert "needs a calibration" in error_of(http.post(CHAT, json=chat(rate="auto")), 400)["message"]


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


def test_an_answer_that_ends_at_once_says_so(http, served, model):
    """One token, and "stop"."""
    decoder = served.engine._decoder._decoder
    stop = decoder._stop
    decoder._stop = model.answer(model.encode(TEXT), QUESTION, max_new_tokens=1).tokens
    try:
        got = http.post(CHAT, json=chat(temperature=0)).json()
    finally:
        decoder._stop = stop
    assert got["choices"][0]["finish_reason"] == "stop" and got["usage"]["completion_tokens"] == 1


@pytest.mark.slow
@pytest.mark.parametrize("axes", [{"fsdp": 4}, {"fsdp": 2, "tensor": 2}], ids=str)
def test_a_server_on_several_devices_answers_as_on_one(model, axes, caplog):
    """Texts, stored files and both together; after the start, nothing is compiled."""
    mesh = sharding.make_mesh(Mesh(data=1, **axes))
    places = unflatten(sharding.parameters(architecture.specs(model.run.architecture), mesh))
    split = Comi(model.run, jax.device_put(model.params, places), model.tokenizer, batch_size=1, mesh=mesh)
    want = model.answer(model.encode(TEXT), QUESTION, max_new_tokens=9).text
    with serving(split) as it, it.client() as http, jax.log_compiles(), caplog.at_level(logging.WARNING, "jax"):
        file = http.post(FILES, files={"file": ("a.txt", TEXT.encode())}, data={"purpose": "user_data"}).json()["id"]
        for asked in (chat(max_tokens=9), chat(messages=user(file_part(file), text_part(QUESTION)), max_tokens=9)):
            assert http.post(CHAT, json=asked).json()["choices"][0]["message"]["content"] == want
        assert http.post(CHAT, json=chat(keep=[[4, 7]], rate=2)).status_code == 200
    assert not [record for record in caplog.records if "Compiling jit" in record.getMessage()]
