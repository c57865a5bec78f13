"""A long context is encoded segment by segment, and the answers beside it go on meanwhile."""

import concurrent.futures
import dataclasses
import threading
import time

import httpx2
import jax
import pytest
import server_fixtures
import train_fixtures
from server_fixtures import FACTS, serving, wait_for

from comi_jax.serving import encoding

quick_compilation = train_fixtures.quick_compilation
CHAT, FILES = "/v1/chat/completions", "/v1/files"
LONG, SHORT = " ".join(FACTS * 4), " ".join(FACTS[:4])  # many segments of 32 tokens, and one
SEGMENTS = -(-len(LONG.split()) // 32)
QUESTION = "what does the red box hold ?"


def asked(text):
    messages = [{"role": "system", "content": text}, {"role": "user", "content": QUESTION}]
    return {"messages": messages, "max_tokens": 48, "temperature": 2, "seed": 5}


@pytest.fixture(scope="module")
def served(quick_compilation):
    model = server_fixtures.comi()
    data = dataclasses.replace(model.run.config.data, max_context=256)
    model.run = dataclasses.replace(model.run, config=dataclasses.replace(model.run.config, data=data))
    with serving(model, max_context=256, store_bytes=10**7, rates=(4,)) as it:
        yield it


@pytest.mark.parametrize("upload", [True, False])
def test_an_answer_gets_a_token_between_any_two_segments_of_a_long_context(served, monkeypatch, upload):
    seen, real = [], encoding.read_segment

    def counted(*words):
        seen.append(max((len(handle.tokens) for handle in served.engine._decoding), default=0))
        return real(*words)

    with served.client() as http, concurrent.futures.ThreadPoolExecutor(2) as pool:
        want = [http.post(CHAT, json=asked(text)).json()["choices"] for text in (SHORT, LONG)]
        with served.held():  # the first token of the short one waits until the long one is there
            short = pool.submit(http.post, CHAT, json=asked(SHORT))
            wait_for(lambda: served.engine._decoding)
            monkeypatch.setattr(encoding, "read_segment", counted)
            body = {"files": {"file": ("a", LONG.encode())}} if upload else {"json": asked(LONG)}
            long = pool.submit(http.post, FILES if upload else CHAT, **body)
            wait_for(lambda: served.engine.open == 2)
        assert short.result().json()["choices"] == want[0] and long.result().status_code == 200
        assert upload or long.result().json()["choices"] == want[1]
    assert len(seen) == SEGMENTS > 4 and seen == list(range(seen[0], seen[0] + SEGMENTS))


def test_a_long_document_whose_client_leaves_is_given_up_at_the_next_segment(served, monkeypatch):
    gate, seen, real = threading.Event(), [], encoding.read_segment

    def held(*words):
        seen.append(1)
        gate.wait(20)
        return real(*words)

    monkeypatch.setattr(encoding, "read_segment", held)
    with served.client() as http:
        before, stored = served.metric("cancelled_total"), len(served.engine.preparer.store)
        with pytest.raises(httpx2.ReadTimeout):
            http.post(FILES, files={"file": ("a", LONG.encode())}, timeout=0.3)
        wait_for(lambda: served.metric("cancelled_total") == before + 1)
        gate.set()
        wait_for(lambda: served.engine.open == 0)
        assert len(seen) == 1 and len(served.engine.preparer.store) == stored
        monkeypatch.undo()
        assert http.post(CHAT, json=asked(SHORT)).status_code == 200


@pytest.mark.parametrize("kept", [True, False])
def test_a_short_question_waits_for_one_segment_of_anothers_long_text(served, monkeypatch, kept):
    """Two long uploads and a third user, who asks about a stored document or sends a short one: the question is
    answered after the segment that is being encoded, or one more, and the answer is its own."""
    gate, seen, real = threading.Semaphore(0), [], encoding.read_segment

    def held(params, padded, length, *words):
        seen.append(int(length[0]))
        assert gate.acquire(timeout=20)
        return real(params, padded, length, *words)

    with served.client() as http, concurrent.futures.ThreadPoolExecutor(3) as pool:
        name = http.post(FILES, files={"file": ("a", SHORT.encode())}).json()["id"]
        parts = [{"type": "file", "file": {"file_id": name}}, {"type": "text", "text": QUESTION}]
        body = asked(SHORT) | ({"messages": [{"role": "user", "content": parts}]} if kept else {})
        want = http.post(CHAT, json=body).json()["choices"]
        monkeypatch.setattr(encoding, "read_segment", held)
        long = [pool.submit(http.post, FILES, files={"file": ("a", LONG.encode())}) for _ in range(2)]
        wait_for(lambda: len(seen) == 1 and served.engine.open == 2)
        question = pool.submit(http.post, CHAT, json=body)
        wait_for(lambda: served.engine.open == 3)
        for _ in range(2 if kept else 3):  # a long text's, the short one's own, and one more while it is answered
            gate.release()
        wait_for(lambda: served.engine._decoding or question.done())
        assert len(seen) <= 4 and not any(each.done() for each in long)
        gate.release(100)
        assert question.result().json()["choices"] == want
        assert [each.result().status_code for each in long] == [200, 200]
        assert seen.count(32) == 2 * SEGMENTS and (kept or seen.index(28) == 1)


def test_a_long_text_gets_on_however_many_short_questions_come(served, monkeypatch):
    seen, real = [], encoding.read_segment
    monkeypatch.setattr(encoding, "read_segment", lambda *words: (seen.append(int(words[2][0])), real(*words))[1])
    with served.client() as http, concurrent.futures.ThreadPoolExecutor(4) as pool, served.held():
        long = pool.submit(http.post, FILES, files={"file": ("a", LONG.encode())})
        short = [pool.submit(http.post, CHAT, json=asked(SHORT) | {"max_tokens": 1}) for _ in range(3)]
        served.engine._decoder.free.set()
        assert long.result().status_code == 200 and all(each.result().status_code == 200 for each in short)
    assert seen.count(28) == 3 and len(seen) == 3 + SEGMENTS


def test_a_segment_is_computed_when_its_step_ends(quick_compilation, monkeypatch):
    """And not merely queued at the device, behind which the questions of others would wait for all of them."""
    made, real = [], encoding.read_segment

    @jax.jit
    def late(x):
        return jax.pure_callback(lambda y: (time.sleep(0.01), y)[1], jax.ShapeDtypeStruct(x.shape, x.dtype), x)

    def slow(*words):
        made.append(jax.tree.map(late, real(*words)))
        return made[-1]

    monkeypatch.setattr(encoding, "read_segment", slow)
    for _ in encoding.encoded_in_steps(server_fixtures.comi(), " ".join(FACTS), "a text"):
        assert all(x.is_ready() for x in jax.tree.leaves(made[-1]))
    assert len(made) == 2
