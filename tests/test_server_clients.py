"""Requests as clients send them, field by field, replayed: Open WebUI, LangChain's completions, LlamaIndex, LiteLLM."""

import pytest
import server_fixtures
import train_fixtures
from server_fixtures import FACTS, events, serving

quick_compilation = train_fixtures.quick_compilation
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
TEXT, QUESTION = " ".join(FACTS[:4]), "what does the red box hold ?"
TITLE = """### Task:
Generate a concise, 3-5 word title with an emoji summarizing the chat history.
### Output:
JSON format: { "title": "your concise title here" }
### Chat History:
<chat_history>
USER: what does the red box hold ?
ASSISTANT: a key
</chat_history>"""


@pytest.fixture(scope="module")
def model(quick_compilation):
    return server_fixtures.comi()


@pytest.fixture(scope="module")
def served(model):
    with serving(model, rates=(4, 2)) as it:
        yield it


@pytest.fixture(scope="module")
def http(served):
    with served.client() as it:
        yield it


def test_open_webui_lists_models_chats_and_gets_usage(http, model):
    """It lists models first, always asks for usage in the stream, and sends the whole chat each time."""
    (listed,) = http.get("/v1/models").json()["data"]
    body = {
        "stream": True, "model": listed["id"], "stream_options": {"include_usage": True}, "max_tokens": 8,
        "messages": [{"role": "system", "content": TEXT}, {"role": "user", "content": QUESTION}],
    }  # fmt: skip
    with http.stream("POST", CHAT, json=body, headers={"X-OpenWebUI-User-Name": "someone"}) as response:
        assert response.status_code == 200 and response.headers["content-type"].startswith("text/event-stream")
        got = events(response)
    assert got[-1] == "[DONE]" and got[-2]["choices"] == [] and got[-2]["usage"]["prompt_tokens"] == 28 + 7
    text = "".join(each["choices"][0]["delta"].get("content", "") for each in got[:-2])
    want = model.answer(model.encode(TEXT), QUESTION, max_new_tokens=8)
    assert text == want.text and got[-3]["choices"][0]["finish_reason"] == want.finish_reason
    more = [{"role": "assistant", "content": text}, {"role": "user", "content": "what holds a key ?"}]
    with http.stream("POST", CHAT, json=body | {"messages": body["messages"] + more}) as response:
        follows = events(response)
    words = len(f"{TEXT} user: {QUESTION} assistant: {text}".split())
    assert follows[-2]["usage"]["prompt_tokens"] == words + 5


@pytest.mark.parametrize("field", ["max_tokens", "max_completion_tokens"])
def test_open_webuis_request_for_a_title_is_no_question_about_a_context(http, field):
    """An error with a status and a reason in JSON, which it shows; nothing is answered as if it had a context."""
    body = {"model": "tiny", "messages": [{"role": "user", "content": TITLE}], "stream": False, field: 50,
            "metadata": {"task": "title_generation", "chat_id": "a"}}  # fmt: skip
    got = http.post(CHAT, json=body)
    assert got.status_code == 400 and got.headers["content-type"] == "application/json"
    assert got.json()["error"]["code"] == "context_missing" and "--single-message=plain" in got.text


@pytest.mark.parametrize("seed", [None, 0, 1, 2, 3])
def test_langchains_completions_at_its_temperature(http, model, seed):
    """The text is what the model draws at 0.7 from this seed; empty only if that is an end of sequence at once."""
    body = {
        "model": "tiny", "prompt": [QUESTION], "documents": [{"text": TEXT}], "n": 1, "max_tokens": 60,
        "temperature": 0.7, "top_p": 1, "frequency_penalty": 0, "presence_penalty": 0, "logprobs": None, "seed": seed,
        "logit_bias": None, "stop": None, "user": None,
    }  # fmt: skip
    got = http.post(COMPLETIONS, json=body).json()
    (choice,) = got["choices"]
    assert choice["index"] == 0 and choice["logprobs"] is None and got["object"] == "text_completion"
    if seed is not None:
        want = model.answer(model.encode(TEXT), QUESTION, max_new_tokens=60, temperature=0.7, seed=seed)
        assert choice["text"] == want.text and choice["finish_reason"] == want.finish_reason
        assert got["usage"]["completion_tokens"] == len(want.tokens)
    with http.stream("POST", COMPLETIONS, json=body | {"seed": seed or 5, "stream": True}) as response:
        pieces = [each["choices"][0]["text"] for each in events(response)[:-1]]
    again = http.post(COMPLETIONS, json=body | {"seed": seed or 5}).json()["choices"][0]["text"]
    assert "".join(pieces) == again


def test_an_empty_text_says_why(http, served, model):
    """A model that ends at once gives an empty text, one token and "stop"."""
    decoder = served.engine._decoder._decoder
    stop = decoder._stop
    first = model.answer(model.encode(TEXT), QUESTION, max_new_tokens=1).tokens
    decoder._stop = first
    try:
        got = http.post(COMPLETIONS, json={"prompt": QUESTION, "documents": [{"text": TEXT}], "temperature": 0}).json()
    finally:
        decoder._stop = stop
    assert got["choices"][0]["finish_reason"] == "stop" and got["usage"]["completion_tokens"] == 1


def test_llamaindex_and_litellm(http, model):
    messages = [{"role": "system", "content": TEXT}, {"role": "user", "content": QUESTION}]
    llama = {"messages": messages, "model": "tiny", "stream": False, "temperature": 0.1, "max_tokens": 8}
    assert http.post(CHAT, json=llama).json()["choices"][0]["message"]["role"] == "assistant"
    vllm = {"model": "tiny", "messages": messages, "max_tokens": 8, "rate": 2, "extra_body": {}}
    got = http.post(CHAT, json=vllm).json()
    assert (
        got["choices"][0]["message"]["content"]
        == model.answer(model.encode(TEXT), QUESTION, rate=2, max_new_tokens=8).text
    )
    assert got["comi"]["asked_rate"] == 2
