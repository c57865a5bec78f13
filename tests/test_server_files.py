"""Uploaded files of a server: their content, what an answer kept of them, and a folder that servers share."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import threading

import httpx2
import numpy as np
import pytest
import server_fixtures
import train_fixtures
from server_fixtures import FACTS, KEYS, events, serving, wait_for

from comi_jax.errors import ConfigError
from comi_jax.serving import explanation
from comi_jax.serving.explanation_page import page
from comi_jax.serving.http.saved_files import SavedFiles
from comi_jax.serving.saved_documents import MissingError, SavedDocuments

quick_compilation, world = train_fixtures.quick_compilation, train_fixtures.world
CHAT, FILES = "/v1/chat/completions", "/v1/files"
TEXT, OTHER = " ".join(FACTS[:4]), " ".join(FACTS[4:7])
QUESTION = "what does the red box hold ?"


@pytest.fixture(scope="module")
def model(quick_compilation):
    return server_fixtures.comi()


def upload(http, text=TEXT, **fields):
    response = http.post(FILES, files={"file": ("a.txt", text.encode())}, data=fields)
    assert response.status_code == 200, response.text
    return response.json()["id"]


def about(*names, **more):
    parts = [{"type": "file", "file": {"file_id": name}} for name in names]
    return {"messages": [{"role": "user", "content": [*parts, {"type": "text", "text": QUESTION}]}], **more}


def answer(http, *names, **more):
    response = http.post(CHAT, json=about(*names, **more))
    return response.json()["choices"][0]["message"]["content"] if response.status_code == 200 else response.status_code


# --- what is told of a file -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def served(model):
    with serving(model) as it:
        yield it


def test_the_content_of_a_file_is_what_was_uploaded(served):
    with served.client() as http, served.client(KEYS[1]) as other:
        name = upload(http, "\ufeff<b>the key</b>\r\n")
        got = http.get(f"{FILES}/{name}/content")
        assert got.content == "\ufeff<b>the key</b>\r\n".encode() and got.headers["content-disposition"] == "attachment"
        assert other.get(f"{FILES}/{name}/content").status_code == 404
        http.delete(f"{FILES}/{name}")
        assert http.get(f"{FILES}/{name}/content").status_code == 404


@pytest.mark.parametrize("stream", [False, True])
def test_an_explanation_is_that_of_the_library(served, model, stream):
    """Of a stored file and a text behind it; the page of ``comi_jax.explain`` can be made of it."""
    with served.client() as http:
        body = about(upload(http), explain=True, rate=2, documents=[{"text": OTHER}], stream=stream, max_tokens=5)
        if stream:
            with http.stream("POST", CHAT, json=body) as response:
                got = next(event["comi"] for event in events(response) if "comi" in event)["explanation"]
        else:
            got = http.post(CHAT, json=body).json()["comi"]["explanation"]
    parts = [explanation.explain(model, explanation.encode(model, text), QUESTION, 2) for text in (TEXT, OTHER)]
    (view,) = got["views"]
    assert got["text"] == TEXT + OTHER and got["segments"] == [28, 21] and view["rate"] == 2
    for field in ("weights", "relevance", "mig"):
        want = np.concatenate([part.kept.tokens[field] for part in parts])
        np.testing.assert_array_equal(np.float32(view["tokens"][field]), want)
    words = [got["text"][a:b] for a, b in zip(got["tokens"]["start"], got["tokens"]["end"], strict=True)]
    assert words == [*TEXT.split(), *OTHER.split()]
    assert view["memory_vectors"] == sum(len(part.kept.groups["size"]) for part in parts)
    assert QUESTION in page(got)
    assert 0 < view["timings"]["compressed"] and 0 < view["timings"]["first token"] <= view["timings"]["end"]


def test_what_is_not_compressed_is_not_explained(served):
    with served.client() as http:
        name = upload(http)
        for more in ({"rate": 1}, {"max_slots": 32}, {"explain": "yes"}):
            refused = http.post(CHAT, json=about(name, **{"explain": True, **more}))
            assert refused.status_code == 400, refused.text
        assert "explanation" not in http.post(CHAT, json=about(name)).json()["comi"]


# --- pages of other origins -------------------------------------------------------------------------------------------


def test_pages_of_other_origins_may_not_ask_a_server_without_keys(model):
    with serving(model, keys=(), cors="https://allowed.example") as other, other.client() as http:
        host = f"127.0.0.1:{other.port}"
        for headers, allowed in (
            ({}, True),
            ({"Origin": f"http://{host}", "Sec-Fetch-Site": "same-origin"}, True),
            ({"Origin": "https://allowed.example", "Sec-Fetch-Site": "cross-site"}, True),
            ({"Sec-Fetch-Site": "none"}, True),
            ({"Origin": "https://foreign.example"}, False),
            ({"Origin": "null"}, False),
            ({"Origin": "http://127.0.0.1:1"}, False),
            ({"Sec-Fetch-Site": "cross-site"}, False),
            ({"Sec-Fetch-Site": "same-site"}, False),
        ):
            for got in (http.post(FILES, files={"file": ("a", b"key")}, headers=headers),
                        http.post(CHAT, json=about(documents=[{"text": TEXT}]), headers=headers),
                        http.get(FILES, headers=headers)):  # fmt: skip
                assert got.status_code == (200 if allowed else 403), (headers, got.text)
                assert allowed or got.json()["error"]["code"] == "origin_not_allowed"
        assert http.get("/health", headers={"Origin": "https://foreign.example"}).status_code == 200
    with serving(model, hosts=("127.0.0.1", "::1", "localhost"), keys=()) as other, other.client() as http:
        for name in ("localhost", f"localhost:{other.port}", f"[::1]:{other.port}", "127.0.0.1"):
            assert http.get(FILES, headers={"Host": name}).status_code == 200
        for name in ("rebound.example", "127.0.0.1.example:8000", ""):
            got = http.get(FILES, headers={"Host": name})
            assert got.status_code == 403 and got.json()["error"]["code"] == "host_not_allowed"


def test_a_key_is_enough_from_any_origin(served):
    with served.client() as http:
        assert http.get(FILES, headers={"Origin": "https://foreign.example"}).status_code == 200


# --- a folder that servers share --------------------------------------------------------------------------------------


@pytest.fixture
def pair(model, tmp_path):
    """Two servers with the same folder."""
    with serving(model, documents=str(tmp_path)) as first, serving(model, documents=str(tmp_path)) as second:
        with first.client() as one, second.client() as two:
            yield first, second, one, two


def test_a_file_that_one_server_took_another_answers(pair, model):
    first, second, one, two = pair
    name = upload(one, expires_after="x", **{"expires_after[seconds]": "3600"})
    want = model.answer(model.encode(TEXT), QUESTION).text
    assert answer(two, name) == answer(one, name) == want
    assert two.get(f"{FILES}/{name}").json() == one.get(f"{FILES}/{name}").json()
    assert two.get(f"{FILES}/{name}/content").text == TEXT
    assert [file["id"] for file in two.get(FILES).json()["data"]] == [name]
    got = two.post(CHAT, json=about(name)).json()
    assert got["usage"]["prompt_tokens_details"]["cached_tokens"] == 28
    with second.client(KEYS[1]) as stranger:
        assert answer(stranger, name) == 404 and stranger.get(FILES).json()["data"] == []
    assert two.delete(f"{FILES}/{name}").status_code == 200
    assert answer(one, name) == answer(two, name) == 404 and name not in first.engine.preparer.store


def test_a_saved_file_expires_everywhere(pair, tmp_path):
    _, second, one, two = pair
    name = upload(one, **{"expires_after[anchor]": "created_at", "expires_after[seconds]": "1"})
    assert isinstance(answer(two, name), str)
    wait_for(lambda: answer(two, name) == 404)
    assert one.get(f"{FILES}/{name}").status_code == 404 and not list(tmp_path.rglob(f"{name}*"))
    assert name not in second.engine.preparer.store


def test_memory_holds_few_and_the_folder_all(model, tmp_path):
    """In a store for one, three are asked in turn; what is asked again is read again."""
    size = model.encode(TEXT).nbytes
    with serving(model, documents=str(tmp_path), store_bytes=int(1.5 * size)) as other, other.client() as http:
        names = [upload(http, " ".join(FACTS[i : i + 4])) for i in range(3)]
        for i in (0, 1, 2, 0):
            want = model.answer(model.encode(" ".join(FACTS[i : i + 4])), QUESTION).text
            assert answer(http, names[i]) == want
        assert len(other.engine.preparer.store) == 1
        two = " ".join([*FACTS[:6], *FACTS[:2]])
        assert http.post(FILES, files={"file": ("a.txt", two.encode())}).status_code == 413


def test_what_is_damaged_or_of_another_checkpoint_is_not_there(pair, model, tmp_path):
    _, _, one, two = pair
    name = upload(one)
    (saved,) = tmp_path.rglob("*.comi")
    content = bytearray(saved.read_bytes())
    content[-1] ^= 1
    saved.write_bytes(content)
    refused = two.post(CHAT, json=about(name))
    assert refused.status_code == 404 and "damaged" in refused.text and str(tmp_path) not in refused.text
    assert isinstance(answer(one, name), str)  # who has it in memory
    saved.with_suffix(".txt").write_text("another")
    assert two.get(f"{FILES}/{name}/content").status_code == 404
    saved.with_suffix(".json").write_text("{")
    files = SavedFiles(SavedDocuments(tmp_path, model.origin))
    assert files.get(name) is None and files.all() == []
    origin = dataclasses.replace(model.origin, weights="others")
    assert SavedDocuments(tmp_path, origin).folder != SavedDocuments(tmp_path, model.origin).folder
    for odd in ("../a", "file-0", "file-" + "0" * 32 + "/..", ""):
        with pytest.raises(MissingError):
            SavedDocuments(tmp_path, model.origin).path(odd)


def test_a_folder_that_cannot_be_written_is_refused_or_told(model, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="--documents=.* cannot be written"):
        SavedDocuments(tmp_path / "file", model.origin)
    with serving(model, documents=str(tmp_path / "a")) as other, other.client() as http:

        def full(*_):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(os, "fsync", full)
        refused = http.post(FILES, files={"file": ("a.txt", TEXT.encode())})
        assert refused.status_code == 503 and refused.json()["error"]["code"] == "storage_failed"
        monkeypatch.undo()
        assert len(other.engine.preparer.store) == 0 and http.get(FILES).json()["data"] == []
        assert not [path for path in (tmp_path / "a").rglob("*") if path.is_file()]
        assert isinstance(answer(http, upload(http)), str)


@pytest.mark.slow
def test_a_server_that_was_killed_answers_the_same_when_it_is_back(world, tmp_path, free_port):
    words = [f"--checkpoint={world.run}", f"--port={free_port}", "--slots=2", "--slot-length=96", "--max-question=16",
             "--rates=4", f"--documents={tmp_path / 'documents'}"]  # fmt: skip
    url, lines, seen = f"http://127.0.0.1:{free_port}", [], []

    def start():
        started = subprocess.Popen(
            [sys.executable, "-m", "comi_jax.serve", *words], stderr=subprocess.PIPE, text=True,
            env={**os.environ, "COMI_CACHE": str(tmp_path)},
        )  # fmt: skip
        threading.Thread(target=lambda: lines.extend(started.stderr), daemon=True).start()

        def ready():
            assert started.poll() is None, lines
            try:
                return httpx2.get(f"{url}/ready").status_code == 200
            except httpx2.ConnectError:
                return False

        wait_for(ready, 600)
        return started

    for turn in range(2):
        started = start()
        try:
            with httpx2.Client(base_url=url, timeout=60) as http:
                name = upload(http) if turn == 0 else json.loads((tmp_path / "name").read_text())
                (tmp_path / "name").write_text(json.dumps(name))
                seen.append(answer(http, name, max_tokens=8))
        finally:
            started.send_signal(signal.SIGKILL)
            started.wait()
            started.stderr.close()
    assert seen[0] == seen[1] and isinstance(seen[0], str)
