"""Whatever a request holds, it becomes a question or is refused with a status below 500; nothing else happens."""

import dataclasses
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from comi_jax.config import Generation
from comi_jax.serving.contexts import Reference
from comi_jax.serving.http import api, messages
from comi_jax.serving.http.errors import ApiError
from comi_jax.serving.http.uploads import MemoryFiles, Upload, Uploads
from comi_jax.serving.settings import Settings

LIMITS = Settings("tiny", rates=(16, 1))
FIELDS = sorted({*api.ChatRequest.model_fields, *api.CompletionRequest.model_fields, *api.NEUTRAL, *api.IGNORED})
NAMES = [
    *FIELDS,
    "role",
    "content",
    "type",
    "text",
    "file",
    "file_id",
    "file_data",
    "title",
    "user",
    "system",
    "id",
    "x",
]
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.sampled_from(NAMES)
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(NAMES), inner, max_size=4)
)
PARTS = st.fixed_dictionaries({"type": st.sampled_from(["text", "file"])}, optional={"text": VALUES, "file": VALUES})
MESSAGES = st.fixed_dictionaries(
    {
        "role": st.sampled_from(["user", "system", "assistant"]),
        "content": st.text(max_size=5) | st.lists(PARTS) | VALUES,
    }
)
BODIES = st.dictionaries(st.sampled_from(FIELDS), VALUES, max_size=4)


@settings(max_examples=300, deadline=None)
@given(BODIES, st.lists(MESSAGES, max_size=3) | VALUES, st.booleans())
def test_a_request_is_a_question_or_is_refused(body, said, chat):
    kind = api.ChatRequest if chat else api.CompletionRequest
    body = {**body, "messages": said} if chat else {"prompt": "what ?", **body}
    try:
        ask = api.ask_of(api.read(kind, json.dumps(body).encode()), LIMITS, Generation())
    except ApiError as error:
        assert 400 <= error.status < 500
        json.dumps(error.body("id"))
    else:
        assert ask.question and ask.pieces and ask.rate in LIMITS.rates
        assert 1 <= ask.options.max_new_tokens <= LIMITS.max_tokens


@pytest.mark.parametrize("name", sorted(api.NEUTRAL))
def test_a_field_of_others_passes_when_it_asks_for_nothing(name):
    base = {"messages": [{"role": "user", "content": "what ?"}], "documents": [{"text": "the key"}]}
    for value in (None, *api.NEUTRAL[name]):
        api.ask_of(api.read(api.ChatRequest, json.dumps({**base, name: value}).encode()), LIMITS, Generation())
    for value in (7, "other", [1], {"a": 1}, True):
        with pytest.raises(ApiError) as caught:
            api.read(api.ChatRequest, json.dumps({**base, name: value}).encode())
        assert caught.value.status == 400


def test_texts_that_follow_each_other_are_one_piece():
    text, file = messages.Piece("a"), messages.Piece(file="f")
    assert messages.merged([text, text, file, file, text]) == [messages.Piece("a\n\na"), file, file, text]


def test_the_standard_block_of_a_file_is_read_as_openais():
    for part in ({"type": "file", "file": {"file_id": "f"}}, {"type": "file", "source_type": "id", "id": "f"}):
        said = [{"role": "user", "content": [part, {"type": "text", "text": "what ?"}]}]
        ask = api.ask_of(api.read(api.ChatRequest, json.dumps({"messages": said}).encode()), LIMITS, Generation())
        assert ask.pieces == (Reference("f"),) and ask.question == "what ?"


def test_without_a_seed_every_request_draws_its_own():
    body = {"messages": [{"role": "user", "content": "what ?"}], "documents": [{"text": "the key"}]}
    drawn = [
        api.ask_of(api.read(api.ChatRequest, json.dumps(body | seed).encode()), LIMITS, Generation()).options.seed
        for seed in ({}, {}, {"seed": 5}, {"seed": -1})
    ]
    assert drawn[0] != drawn[1] and drawn[2:] == [5, 2**63 - 1]


def test_a_file_expires_and_is_its_owners_alone():
    clock, dropped = [100.0], []
    files = Uploads(MemoryFiles(), 2, 9, dropped.append, lambda: clock[0])
    made = Upload(files.new_id(3), "one", "a.txt", "user_data", 3, 100.0, 160.0, 1, 1)
    files.add(made, b"abc")
    with pytest.raises(ApiError, match="as large as may be") as caught:
        files.new_id(7)
    assert caught.value.status == 429
    files.add(dataclasses.replace(made, id=files.new_id(3), owner="two", expires=None), b"def")
    assert files.get("one", made.id) == made and files.of("one") == [made]
    assert files.content("one", made.id) == b"abc"
    for owner, name in (("two", made.id), ("one", "file-0")):
        with pytest.raises(ApiError) as caught:
            files.delete(owner, name)
        assert caught.value.status == 404
    with pytest.raises(ApiError) as caught:
        files.new_id(1)
    assert caught.value.status == 429 and dropped == ["file-0"]
    clock[0] = 160.0
    assert files.of("one") == [] and dropped == ["file-0", made.id] and files.new_id(1)
