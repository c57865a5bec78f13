"""The requests of Open WebUI's backend (0.12.4), replayed: each is answered, or refused with a reason that it shows.

Where each comes from is said by file of open_webui. It sends them on as they are, asks once, and shows its user the
``error.message`` of a status of 400 or more. How it is set up is in docs/serving.md.
"""

import pytest
import server_fixtures
from server_fixtures import CHAT, FACTS, KEYS, QUESTION, TEXT, events, serving

quick_compilation = server_fixtures.quick_compilation
model = server_fixtures.model
served = server_fixtures.served
# utils/headers.py, get_headers_and_cookies; the second and third with ENABLE_FORWARD_USER_INFO_HEADERS.
HEADERS = {"Authorization": f"Bearer {KEYS[0]}", "X-OpenWebUI-User-Name": "A%20User", "X-OpenWebUI-Chat-Id": "c"}
SOURCES = f'<context>\n<source id="1" name="a.txt" resource-type="file" resource-id="f">{TEXT}</source>\n</context>\n'


@pytest.fixture(scope="module")
def http(served):
    with served.client() as it:
        it.headers.update(HEADERS)
        yield it


def body(*said, **more):
    """routers/openai.py, generate_chat_completion: model, messages, stream, and the parameters of the model."""
    messages = [{"role": role, "content": content} for role, content in said]
    return {"stream": True, "model": "tiny", "messages": messages, **more}


def test_it_verifies_the_connection_and_lists_the_model(http):
    """routers/openai.py, verify_connection and get_models_request: GET /models below the URL that was given."""
    listed = http.get("/v1/models").json()
    assert listed["object"] == "list" and [each["id"] for each in listed["data"]] == ["tiny"]
    wrong = http.get("/v1/models", headers={"Authorization": "Bearer wrong"})
    assert wrong.status_code == 401 and "key" in wrong.json()["error"]["message"]


def test_a_chat_is_streamed_with_usage_and_goes_on(http, model):
    """main.py, chat_completion: stream_options where the model's capability "usage" is set. utils/payload.py,
    apply_params_to_form_data: advanced parameters, and custom ones, as ``rate``, at the top level."""
    said = [("system", TEXT), ("user", QUESTION)]
    sent = body(
        *said, stream_options={"include_usage": True}, max_tokens=8, temperature=0.0, top_p=0.9, min_p=0.0, seed=3,
        stop=["never"], frequency_penalty=0.0, presence_penalty=0.0, rate=2,
    )  # fmt: skip
    want = model.answer(model.encode(TEXT), QUESTION, max_new_tokens=8, rate=2)
    with http.stream("POST", CHAT, json=sent) as response:
        assert response.status_code == 200 and "text/event-stream" in response.headers["content-type"]
        got = events(response)
    text = "".join(each["choices"][0]["delta"].get("content", "") for each in got[:-2])
    assert text == want.text and got[-3]["choices"][0]["finish_reason"] == want.finish_reason
    assert got[-2]["choices"] == [] and got[-2]["usage"]["prompt_tokens"] == 28 + 7 and got[-1] == "[DONE]"
    more = body(*said, ("assistant", text), ("user", "what holds a key ?"), stream=False, max_tokens=8)
    words = len(f"{TEXT} user: {QUESTION} assistant: {text}".split())
    assert http.post(CHAT, json=more).json()["usage"]["prompt_tokens"] == words + 5


def test_an_attached_file_is_context_if_it_is_in_the_system_message(http):
    """utils/middleware.py, apply_source_context_to_messages: sources are put before the user's last message, which
    makes them the question; with RAG_SYSTEM_CONTEXT=True into the system message, which makes them the context."""
    system = http.post(CHAT, json=body(("system", SOURCES), ("user", QUESTION), stream=False)).json()
    assert system["comi"]["context_tokens"] > 28 and system["usage"]["prompt_tokens"] > 28 + 7
    alone = http.post(CHAT, json=body(("user", f"{SOURCES}\n{QUESTION}")))
    assert alone.status_code == 400 and alone.json()["error"]["code"] == "context_missing"
    behind = http.post(CHAT, json=body(("system", FACTS[0]), ("user", f"{SOURCES}\n{QUESTION}")))
    assert behind.status_code == 400 and behind.json()["error"]["code"] == "context_length_exceeded"
    assert "give long text as a file, as documents or in earlier messages" in behind.json()["error"]["message"]


@pytest.mark.parametrize("task", ["title", "tags", "follow_up", "query", "autocomplete", "emoji", "image_prompt"])
def test_a_task_is_no_question_about_a_context(http, model, task):
    """routers/tasks.py: one user message that holds instructions and the chat, not streamed, ``metadata`` taken out
    before it is sent. After a refusal it goes on without a title, tags, further questions or better search words."""
    said = f"### Task:\nMake a {task} of the chat.\n<chat_history>\nUSER: {QUESTION}\nASSISTANT: a key\n</chat_history>"
    got = http.post(CHAT, json=body(("user", said), stream=False))
    error = got.json()["error"]
    assert (
        got.status_code == 400 and error["code"] == "context_missing" and "--single-message=plain" in error["message"]
    )


def test_a_task_is_answered_where_lone_messages_are(model):
    with serving(model, single_message="plain") as other, other.client() as http:
        got = http.post(CHAT, json=body(("user", f"### Task: {QUESTION}"), stream=False)).json()
    assert got["choices"][0]["message"]["content"] and got["comi"]["memory_vectors"] == 0


@pytest.mark.parametrize(
    ("said", "more", "reason"),
    [
        # utils/middleware.py, process_chat_payload: function calling is native unless it is set to legacy, and then
        # its own tools are offered in every chat.
        ([("system", TEXT), ("user", QUESTION)], {"tools": [{"type": "function", "function": {"name": "query"}}]},
         "this server has no tools"),
        # The answers of tools that an earlier model has called, in the same chat.
        ([("user", QUESTION), ("tool", "a key"), ("user", QUESTION)], {}, "this server has no tools"),
        # The button "continue": the assistant's message is the last one.
        ([("system", TEXT), ("user", QUESTION), ("assistant", "a")], {}, "the last message must be the user's"),
        # A picture that was attached.
        ([("system", TEXT), ("user", [{"type": "text", "text": QUESTION}, {"type": "image_url", "image_url": {}}])], {},
         "this model reads text"),
        # "max_tokens" of the advanced parameters, above this server's.
        ([("system", TEXT), ("user", QUESTION)], {"max_tokens": 8192}, "this server allows 1 to 64"),
        ([("system", TEXT), ("user", QUESTION)], {"logit_bias": {"5": -100}}, "this server has no logit_bias"),
    ],
)  # fmt: skip
def test_what_it_cannot_have_is_refused_with_the_reason(http, said, more, reason):
    got = http.post(CHAT, json=body(*said, **more))
    assert got.status_code == 400 and "application/json" in got.headers["content-type"]
    assert reason in got.json()["error"]["message"]
