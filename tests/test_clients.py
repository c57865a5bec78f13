"""The clients themselves, unmodified, against the server: openai, LangChain, LlamaIndex, LiteLLM and curl.

They are installed by the extra [test-clients], in an environment of its own (CONTRIBUTING.md), and run with
``-m clients``. Each is asked for a chat, a stream, files, and the errors 400, 401, 404 and 429, which reach a user as
the client's own exceptions; after a 429 it asks again as often as it was told to.
"""

import contextlib
import functools
import importlib
import json
import shutil
import subprocess
import threading
import time

import httpx2
import pytest
import server_fixtures
from server_fixtures import CHAT, FILES, KEYS, QUESTION, TEXT, chat, file_part, text_part, user, wait_for

# What other libraries warn of is theirs, and may come where the test of another one runs.
pytestmark = [pytest.mark.clients, pytest.mark.filterwarnings("ignore")]
quick_compilation = server_fixtures.quick_compilation
model = server_fixtures.model
served = server_fixtures.served
SAID = [("system", TEXT), ("user", QUESTION)]
WORDS = [{"role": role, "content": text} for role, text in SAID]
TOKENS, HEAT, SEED = 8, 1.5, 7  # hot, so that no two answers are alike
DRAWN = {"max_tokens": TOKENS, "temperature": HEAT, "seed": SEED}


def library(name):
    """A module of a client, or the test is skipped."""
    return pytest.importorskip(name, reason=f"{name} is not installed; pip install -e '.[test-clients]'")


@pytest.fixture(scope="module")
def want(model):
    """The answer to QUESTION about TEXT at a rate, as the library gives it."""
    options = {"max_new_tokens": TOKENS, "temperature": HEAT, "seed": SEED}
    answers = {rate: model.answer(model.encode(TEXT), QUESTION, rate=rate, **options) for rate in (4, 2)}
    assert all(len(set(each.tokens)) > 3 for each in answers.values())
    return lambda rate=4: answers[rate]


@pytest.fixture(scope="module")
def stored(served):
    """The id of TEXT as a stored file."""
    with served.client() as http:
        return http.post(FILES, files={"file": ("a.txt", TEXT.encode())}).json()["id"]


@contextlib.contextmanager
def full(served):
    """While this holds, the queue is full, so that everybody is told to come back."""
    with served.held(), contextlib.ExitStack() as stack:
        for _ in range(served.engine.settings.most_requests):
            thread = threading.Thread(target=httpx2.post, args=(f"{served.url}{CHAT}",),
                                      kwargs={"json": chat(), "headers": {"Authorization": f"Bearer {KEYS[0]}"},
                                              "timeout": 60})  # fmt: skip
            thread.start()
            stack.callback(thread.join)
        wait_for(lambda: served.engine.open == served.engine.settings.most_requests)
        yield
        served.engine._decoder.free.set()  # or the threads would be waited for in vain
    wait_for(lambda: served.engine.open == 0)


def refused(served):
    """How many requests have had status 429."""
    lines = httpx2.get(f"{served.url}/metrics").text.splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith('comi:refused_total{reason="429"}'))


def asks(served, ask, error):
    """How many requests ``ask`` sends to a server whose queue is full, until it raises ``error``, its status 429."""
    with full(served):
        before, begun = refused(served), time.monotonic()
        with pytest.raises(error):
            ask()
        count, seconds = refused(served) - before, time.monotonic() - begun
    assert seconds >= 0.4 * (count - 1)  # it has waited before it came back
    return count


# --- openai -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def openai_client(served):
    library("openai")
    openai = importlib.import_module("openai")
    return lambda key=KEYS[0], retries=0: openai.OpenAI(base_url=f"{served.url}/v1", api_key=key, max_retries=retries)


def test_openai_chats_streams_and_keeps_files(openai_client, want):
    client = openai_client()
    whole = client.chat.completions.create(model="tiny", messages=WORDS, **DRAWN, extra_body={"rate": 2})
    assert whole.choices[0].message.content == want(2).text and whole.usage.completion_tokens == len(want(2).tokens)
    assert whole.model_extra["comi"]["memory_vectors"] == want(2).memory_vectors != want(4).memory_vectors
    with client.chat.completions.stream(model="tiny", messages=WORDS, **DRAWN) as stream:
        kinds = [event.type for event in stream]
        final = stream.current_completion_snapshot  # get_final_completion raises where max_tokens ended an answer
    assert final.choices[0].message.content == want().text and kinds.count("content.delta") > 2
    made = client.files.create(file=("a.txt", TEXT.encode()), purpose="user_data")
    assert client.files.wait_for_processing(made.id) == made and client.files.content(made.id).text == TEXT
    assert made.id in [each.id for each in client.files.list(limit=1)]
    said = user(file_part(made.id), text_part(QUESTION))
    got = client.chat.completions.create(model="tiny", messages=said, **DRAWN)
    assert got.choices[0].message.content == want().text and got.usage.prompt_tokens_details.cached_tokens == 28
    assert client.files.delete(made.id).deleted


def test_openais_errors_and_retries(served, openai_client):
    openai = library("openai")
    client = openai_client()
    gone = user(file_part("file-0"), text_part("what ?"))
    for more, error in (({"n": 2}, openai.BadRequestError), ({"model": "other"}, openai.NotFoundError),
                        ({"messages": gone}, openai.NotFoundError)):  # fmt: skip
        with pytest.raises(error) as caught:
            client.chat.completions.create(**{"model": "tiny", "messages": WORDS, **more})
        assert caught.value.request_id and caught.value.body["message"]
    with pytest.raises(openai.AuthenticationError):
        openai_client("wrong").models.list()
    with pytest.raises(openai.APIStatusError) as caught:
        client.files.create(file=("a.pdf", b"%PDF\xff"), purpose="user_data")
    assert caught.value.status_code == 415
    for retries in (0, 2):
        again = openai_client(retries=retries).chat.completions
        ask = functools.partial(again.create, model="tiny", messages=WORDS)
        assert asks(served, ask, openai.RateLimitError) == 1 + retries


def test_openai_comes_back_and_is_answered(served, openai_client, want):
    with full(served):
        before = refused(served)
        timer = threading.Timer(0.3, served.engine._decoder.free.set)
        timer.start()
        got = openai_client(retries=2).chat.completions.create(model="tiny", messages=WORDS, **DRAWN)
        assert got.choices[0].message.content == want().text and refused(served) > before


# --- LangChain --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def langchain(served):
    made = library("langchain_openai")

    def client(kind="ChatOpenAI", key=KEYS[0], **more):
        options = {"model": "tiny", **DRAWN, "max_retries": 0, **more}
        return getattr(made, kind)(base_url=f"{served.url}/v1", api_key=key, **options)

    return client


def test_langchain_chats_streams_and_asks_about_files(langchain, want, stored):
    chats = langchain(extra_body={"rate": 2})
    got = chats.invoke(SAID)
    assert got.content == want(2).text and got.response_metadata["finish_reason"] == want(2).finish_reason
    assert got.usage_metadata["input_tokens"] == 28 + 7
    pieces = list(langchain(stream_usage=True).stream(SAID))
    assert "".join(piece.content for piece in pieces) == want().text and len(pieces) > 3
    assert sum(piece.usage_metadata["output_tokens"] for piece in pieces if piece.usage_metadata) == len(want().tokens)
    for part in (file_part(stored), {"type": "file", "source_type": "id", "id": stored},
                 {"type": "file", "file_id": stored}):  # fmt: skip
        got = langchain().invoke([{"role": "user", "content": [part, text_part(QUESTION)]}])
        assert got.content == want().text and got.usage_metadata["input_token_details"]["cache_read"] == 28
    texts = langchain("OpenAI", extra_body={"documents": [{"text": TEXT}]})
    assert texts.invoke(QUESTION) == "".join(texts.stream(QUESTION)) == want().text


def test_langchains_errors_and_retries(served, langchain):
    openai = library("openai")
    for more, error in (({"n": 2}, openai.BadRequestError), ({"model": "other"}, openai.NotFoundError),
                        ({"key": "wrong"}, openai.AuthenticationError)):  # fmt: skip
        with pytest.raises(error):
            langchain(**more).invoke(SAID)
    tools = langchain().bind_tools([{"name": "look", "description": "Look.", "parameters": {"type": "object"}}])
    with pytest.raises(openai.BadRequestError, match="has no tools"):
        tools.invoke(SAID)
    assert asks(served, lambda: langchain(max_retries=2).invoke(SAID), openai.RateLimitError) == 3


# --- LlamaIndex -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def llamaindex(served):
    made = library("llama_index.llms.openai_like")

    def client(key=KEYS[0], **more):
        options = {"model": "tiny", "max_tokens": TOKENS, "temperature": HEAT, "max_retries": 0, **more}
        drawn = {"seed": SEED, **options.pop("additional_kwargs", {})}
        where = {"api_base": f"{served.url}/v1", "api_key": key, "is_chat_model": True}
        return made.OpenAILike(additional_kwargs=drawn, **where, **options)

    return client


def messages_of(*said):
    kinds = library("llama_index.core.llms")
    return [kinds.ChatMessage(role=role, content=text) for role, text in said]


def test_llamaindex_chats_streams_and_sends_documents(llamaindex, want):
    got = llamaindex(additional_kwargs={"extra_body": {"rate": 2}}).chat(messages_of(*SAID))
    assert got.message.content == want(2).text and got.raw.usage.completion_tokens == len(want(2).tokens)
    pieces = [piece.delta for piece in llamaindex().stream_chat(messages_of(*SAID))]
    assert "".join(pieces) == want().text and len(pieces) > 3
    blocks = library("llama_index.core.llms")
    document = blocks.DocumentBlock(data=TEXT.encode(), title="a.txt", document_mimetype="text/plain")
    asked = blocks.ChatMessage(role="user", blocks=[document, blocks.TextBlock(text=QUESTION)])
    assert llamaindex().chat([asked]).message.content == want().text
    plain = llamaindex(additional_kwargs={"extra_body": {"documents": [{"text": TEXT}]}})
    assert plain.complete(QUESTION).text == want().text


def test_llamaindexs_errors_and_retries(served, llamaindex):
    openai = library("openai")
    for more, error in (({"additional_kwargs": {"n": 2}}, openai.BadRequestError),
                        ({"model": "other"}, openai.NotFoundError),
                        ({"key": "wrong"}, openai.AuthenticationError)):  # fmt: skip
        with pytest.raises(error):
            llamaindex(**more).chat(messages_of(*SAID))
    count = asks(served, lambda: llamaindex(max_retries=1).chat(messages_of(*SAID)), openai.RateLimitError)
    assert count == 2


# --- LiteLLM ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def litellm(served):
    made = library("litellm")

    def ask(model="openai/tiny", key=KEYS[0], messages=WORDS, **more):
        options = {**DRAWN, "max_retries": 0, "api_base": f"{served.url}/v1", "api_key": key, **more}
        return made.completion(model=model, messages=messages, **options)

    return ask


def test_litellm_chats_streams_and_asks_about_files(litellm, want, stored):
    assert litellm().choices[0].message.content == want().text
    got = litellm("hosted_vllm/tiny", rate=2)
    assert got.choices[0].message.content == want(2).text and got.comi["memory_vectors"] == want(2).memory_vectors
    pieces = [piece.choices[0].delta.content or "" for piece in litellm(stream=True)]
    assert "".join(pieces) == want().text and len([piece for piece in pieces if piece]) > 2
    got = litellm(messages=user(file_part(stored), text_part(QUESTION)))
    assert got.choices[0].message.content == want().text and got.usage.prompt_tokens_details.cached_tokens == 28


def test_litellm_keeps_files(served, litellm):
    made = library("litellm")
    where = {"custom_llm_provider": "openai", "api_base": f"{served.url}/v1", "api_key": KEYS[0]}
    file = made.create_file(file=("a.txt", TEXT.encode()), purpose="user_data", **where)
    got = litellm(messages=user(file_part(file.id), text_part(QUESTION)))
    assert got.usage.prompt_tokens_details.cached_tokens == 28
    assert made.file_retrieve(file.id, **where).bytes == len(TEXT)
    assert made.file_content(file.id, **where).text == TEXT
    assert made.file_delete(file.id, **where).deleted


def test_litellms_errors_and_retries(served, litellm):
    made = library("litellm")
    for name in ("openai", "hosted_vllm"):
        for more, error in (({"n": 2}, made.BadRequestError), ({"model": f"{name}/other"}, made.NotFoundError),
                            ({"key": "wrong"}, made.AuthenticationError)):  # fmt: skip
            with pytest.raises(error):
                litellm(**{"model": f"{name}/tiny", **more})
    assert asks(served, lambda: litellm(max_retries=2), made.RateLimitError) == 3


# --- curl -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def curl(served):
    if shutil.which("curl") is None:
        pytest.skip("curl is not installed")

    def run(path, *words, key=KEYS[0]):
        """The status and the body."""
        command = ["curl", "-sS", "-w", "\n%{http_code}", "-H", f"Authorization: Bearer {key}", *words]
        done = subprocess.run([*command, f"{served.url}{path}"], capture_output=True, text=True, timeout=60)
        body, _, status = done.stdout.rpartition("\n")
        return int(status), body

    return run


def posted(**more):
    body = {"model": "tiny", "messages": WORDS, **DRAWN, **more}
    return "-H", "Content-Type: application/json", "-d", json.dumps(body)


def test_curl_chats_streams_and_keeps_files(curl, want, tmp_path):
    status, body = curl(CHAT, *posted(rate=2))
    assert status == 200 and json.loads(body)["choices"][0]["message"]["content"] == want(2).text
    status, body = curl(CHAT, "-N", *posted(stream=True))
    lines = [line[6:] for line in body.splitlines() if line]
    assert status == 200 and lines[-1] == "[DONE]"
    assert "".join(json.loads(line)["choices"][0]["delta"].get("content", "") for line in lines[:-1]) == want().text
    (tmp_path / "a.txt").write_text(TEXT)
    status, body = curl(FILES, "-F", "purpose=user_data", "-F", f"file=@{tmp_path / 'a.txt'}")
    name = json.loads(body)["id"]
    assert status == 200 and curl(f"{FILES}/{name}/content") == (200, TEXT)
    status, body = curl(CHAT, *posted(messages=user(file_part(name), text_part(QUESTION))))
    assert status == 200 and json.loads(body)["choices"][0]["message"]["content"] == want().text
    assert curl(f"{FILES}/{name}", "-X", "DELETE")[0] == 200 and curl(f"{FILES}/{name}")[0] == 404


def test_curls_errors_and_retries(served, curl):
    for words, key, status in ((posted(n=2), KEYS[0], 400), (posted(model="other"), KEYS[0], 404),
                               (posted(), "wrong", 401), (("-d", "{}"), KEYS[0], 415)):  # fmt: skip
        got, body = curl(CHAT, *words, key=key)
        assert got == status and json.loads(body)["error"]["message"]
    with full(served):
        before = refused(served)
        status, _ = curl(CHAT, "--retry", "2", *posted())
        assert status == 429 and refused(served) - before == 3
