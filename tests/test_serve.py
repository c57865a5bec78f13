"""The command that serves: what it refuses before it loads anything, its limits, a real process until its signals."""

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import threading

import httpx2
import pytest
import server_fixtures
import train_fixtures

from comi_jax import serve
from comi_jax.errors import ConfigError
from comi_jax.serving.settings import Settings

quick_compilation, world = train_fixtures.quick_compilation, train_fixtures.world
KEY = "a-key-of-this-test"


def options(*words):
    return serve.parser().parse_args(["--checkpoint=somewhere/run-1", *words])


@pytest.fixture(scope="module")
def model():
    return server_fixtures.comi()


def test_an_address_that_others_reach_needs_keys_or_a_word(tmp_path):
    assert serve.keys_of(options()) == serve.keys_of(options("--host=0.0.0.0", "--no-auth")) == []
    with pytest.raises(ConfigError, match=r"--host=0\.0\.0\.0 can be reached .* --api-key-file"):
        serve.keys_of(options("--host=0.0.0.0"))
    file = tmp_path / "keys"
    file.write_text(f"# ours\n{KEY}\n\n{KEY}-2 \n")
    assert serve.keys_of(options("--host=0.0.0.0", f"--api-key-file={file}")) == [KEY, f"{KEY}-2"]
    with pytest.raises(ConfigError, match="give one of them"):
        serve.keys_of(options("--no-auth", f"--api-key-file={file}"))
    for content in ("", "short", "with a space in the key", "schlüssel-der-lang-ist"):
        file.write_text(content, encoding="utf-8")
        with pytest.raises(ConfigError, match="must hold keys"):
            serve.keys_of(options(f"--api-key-file={file}"))


def test_limits_are_those_given_and_else_what_the_run_allows(model):
    made = serve.settings_of(options(), model)
    assert (made.name, made.rates, made.max_context, made.max_question) == ("run-1", (4, 2, 1), 64, 8)
    assert (made.slot_length, made.max_tokens, made.slots) == (256, 128, Settings.slots)  # the model has 256 positions
    made = serve.settings_of(options("--rates=8,1", "--queue=0", "--max-tokens=5", "--name=a/b", "--drain=2.5"), model)
    assert (made.name, made.rates, made.queue, made.max_tokens, made.drain) == ("a/b", (8, 1), 0, 5, 2.5)
    for word, message in (
        ("--max-context=65", "--max-context is 65, more than the 64 of the run"),
        ("--rates=4,4", "different"),
        ("--max-tokens=300", "no room for a question"),
    ):
        with pytest.raises(ConfigError, match=message):
            serve.settings_of(options(word), model)


@pytest.mark.parametrize("word", ["--deadline=inf", "--deadline=-1", "--rates=a", "--slots=0", "--single-message=no"])
def test_a_wrong_argument_is_refused(word, capsys):
    with pytest.raises(SystemExit):
        options(word)
    assert word.split("=")[0] in capsys.readouterr().err


def test_a_missing_extra_is_one_sentence(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "fastapi" else find(name))
    with pytest.raises(ConfigError, match=r"fastapi is not installed; run pip install 'comi-jax\[serve\]'"):
        serve.check_extra()


@pytest.fixture
def process(world, tmp_path, free_port):
    """``python -m comi_jax.serve`` with a key, ready; its address and the lines of its log."""
    (tmp_path / "keys").write_text(KEY)
    words = [f"--checkpoint={world.run}", f"--port={free_port}", f"--api-key-file={tmp_path / 'keys'}", "--slots=2",
             "--slot-length=96", "--max-question=16", "--rates=4", "--name=tiny"]  # fmt: skip
    started = subprocess.Popen(
        [sys.executable, "-m", "comi_jax.serve", *words], stderr=subprocess.PIPE, text=True,
        env={**os.environ, "COMI_CACHE": str(tmp_path)},
    )  # fmt: skip
    lines, url = [], f"http://127.0.0.1:{free_port}"
    reader = threading.Thread(target=lambda: lines.extend(started.stderr), daemon=True)
    reader.start()

    def ready():
        assert started.poll() is None, lines
        try:
            return httpx2.get(f"{url}/ready").status_code == 200
        except httpx2.ConnectError:
            return False

    server_fixtures.wait_for(ready, 600)
    yield started, url, lines
    started.kill()
    started.wait()
    reader.join()
    started.stderr.close()


@pytest.mark.slow
def test_a_real_process_answers_curl_and_ends_well_on_sigterm(process):
    started, url, lines = process
    if shutil.which("curl") is None:
        pytest.skip("needs curl")
    body = {"messages": [{"role": "user", "content": "what does the red box hold ?"}],
            "documents": [{"text": "the red box holds a key ."}]}  # fmt: skip
    said = subprocess.run(
        ["curl", "-sS", f"{url}/v1/chat/completions", "-H", "Content-Type: application/json",
         "-H", f"Authorization: Bearer {KEY}", "-d", json.dumps(body)],
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    assert json.loads(said)["choices"][0]["message"]["content"]
    started.send_signal(signal.SIGTERM)
    assert started.wait(30) == 0
    server_fixtures.wait_for(lambda: any("chat/completions 200" in line for line in lines))
    assert any("programs are compiled" in line for line in lines) and "Traceback" not in "".join(lines)


@pytest.mark.slow
def test_other_clients_ask_it_unmodified(process):
    _, url, _ = process
    langchain = pytest.importorskip("langchain_openai")
    whole = [{"role": "system", "content": "the red box holds a key ."},
             {"role": "user", "content": "what does the red box hold ?"}]  # fmt: skip
    model = langchain.ChatOpenAI(base_url=f"{url}/v1", api_key=KEY, model="tiny", max_tokens=4, max_retries=0)
    asked = [(message["role"], message["content"]) for message in whole]
    got = model.invoke(asked)
    assert got.content and got.usage_metadata["output_tokens"] <= 4
    assert "".join(chunk.content for chunk in model.stream(asked)) == got.content
