"""The servers' files in launch/: they say what the server has, and nginx sends a file's questions to one server."""

import configparser
import re
import shlex
import shutil
import socket
import subprocess
from pathlib import Path

import httpx2
import pytest
import server_fixtures
import train_fixtures
import yaml
from server_fixtures import FACTS, KEYS, serving, wait_for

from comi_jax import serve
from comi_jax.serving.http.lifecycle import CUT
from comi_jax.serving.settings import Settings

LAUNCH = Path(__file__).resolve().parents[1] / "launch"
quick_compilation = train_fixtures.quick_compilation


def fits(seconds, options):
    """Whether a server that is told to end has ended within ``seconds``, its drain and its connections' end."""
    drain = Settings.drain if options.drain is None else options.drain
    return seconds > drain + CUT


def test_the_unit_starts_a_server_and_lets_it_drain():
    unit = configparser.ConfigParser(interpolation=None, strict=True)
    unit.optionxform = str
    unit.read(LAUNCH / "comi-serve.service")
    assert set(unit) == {"DEFAULT", "Unit", "Service", "Install"}
    service = unit["Service"]
    program, *words = shlex.split(service["ExecStart"])
    assert Path(program).is_absolute() and words[:2] == ["-m", "comi_jax.serve"]
    options = serve.parser().parse_args(words[2:])
    assert fits(int(service["TimeoutStopSec"]), options) and service["KillSignal"] == "SIGTERM"
    assert options.api_key_file == "%d/keys" and service["LoadCredential"].startswith("keys:")
    assert options.documents.startswith("%S/" + service["StateDirectory"])
    if shutil.which("systemd-analyze"):
        said = subprocess.run(["systemd-analyze", "verify", "--man=no", LAUNCH / "comi-serve.service"],
                              capture_output=True, text=True).stderr  # fmt: skip
        ours = [line for line in said.splitlines() if "comi" in line and "not executable" not in line]
        assert not [line for line in ours if "Unknown" in line or "invalid" in line.lower()], said


def test_the_deployment_probes_what_there_is_and_lets_it_drain():
    deployment, service = yaml.safe_load_all((LAUNCH / "serve.yaml").read_text())
    assert (deployment["kind"], service["kind"]) == ("Deployment", "Service")
    template = deployment["spec"]["template"]
    labels = template["metadata"]["labels"]
    assert deployment["spec"]["selector"]["matchLabels"] == service["spec"]["selector"] == labels
    (container,) = template["spec"]["containers"]
    options = serve.parser().parse_args(container["args"])
    assert fits(template["spec"]["terminationGracePeriodSeconds"], options)
    paths = {name: container[name]["httpGet"]["path"] for name in container if name.endswith("Probe")}
    assert paths == {"readinessProbe": "/ready", "livenessProbe": "/health", "startupProbe": "/health"}
    (port,) = container["ports"]
    assert {container[name]["httpGet"]["port"] for name in paths} == {port["name"]}
    assert service["spec"]["ports"][0]["targetPort"] == port["name"]
    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert set(mounts) == {volume["name"] for volume in template["spec"]["volumes"]}
    assert options.api_key_file.startswith(mounts["keys"]) and options.documents.startswith(mounts["shared"])
    assert {"name": "COMI_CACHE", "value": mounts["cache"]} in container["env"]


def instructions():
    """The instructions of the Dockerfile with their arguments; continued lines joined."""
    text = re.sub(r"\\\n\s*", "", re.sub(r"^#.*\n", "", (LAUNCH / "Dockerfile").read_text(), flags=re.M))
    return [line.split(None, 1) for line in text.splitlines() if line]


def test_the_image_runs_a_server_without_root():
    found = {}
    for name, words in instructions():
        found.setdefault(name, []).append(words)
    assert set(found) <= {"ARG", "FROM", "COPY", "RUN", "USER", "ENV", "VOLUME", "EXPOSE", "STOPSIGNAL", "HEALTHCHECK",
                          "ENTRYPOINT", "CMD"}  # fmt: skip
    start = yaml.safe_load(found["ENTRYPOINT"][0]) + yaml.safe_load(found["CMD"][0])
    assert start[:3] == ["python", "-m", "comi_jax.serve"]
    options = serve.parser().parse_args(start[3:])
    assert found["EXPOSE"] == [str(options.port)] and f":{options.port}/health" in found["HEALTHCHECK"][0]
    assert found["STOPSIGNAL"] == ["SIGTERM"] and found["USER"] == ["comi"]
    assert options.documents in yaml.safe_load(found["VOLUME"][0])
    if shutil.which("hadolint"):
        subprocess.run(["hadolint", LAUNCH / "Dockerfile"], check=True)


# --- nginx ------------------------------------------------------------------------------------------------------------


def test_nginx_waits_longer_than_a_request_may_take_and_takes_what_servers_take():
    text = (LAUNCH / "nginx.conf").read_text()
    assert int(re.search(r"proxy_read_timeout (\d+)s;", text)[1]) > Settings.deadline
    assert int(re.search(r"client_max_body_size (\d+)m;", text)[1]) * 2**20 >= Settings.max_body


@pytest.fixture
def proxied(quick_compilation, tmp_path):
    """Two servers with a folder, and nginx before them as launch/nginx.conf has it, but for the addresses."""
    program = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin")
    if program is None:
        pytest.skip("nginx is not installed")
    model = server_fixtures.comi()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    folder = str(tmp_path / "documents")
    with serving(model, documents=folder) as first, serving(model, documents=folder) as second:
        text = (LAUNCH / "nginx.conf").read_text()
        for old, new in ((8001, first.port), (8002, second.port), (8080, port)):
            assert f"127.0.0.1:{old}" in text
            text = text.replace(f"127.0.0.1:{old}", f"127.0.0.1:{new}")
        (tmp_path / "nginx.conf").write_text(text)
        words = [program, "-p", tmp_path, "-c", tmp_path / "nginx.conf", "-g", "daemon off;"]
        started = subprocess.Popen(words, stderr=subprocess.PIPE, text=True)
        url = f"http://127.0.0.1:{port}"

        def listens():
            assert started.poll() is None, started.stderr.read()
            with socket.socket() as there:
                return there.connect_ex(("127.0.0.1", port)) == 0

        try:
            wait_for(listens)
            headers = {"Authorization": f"Bearer {KEYS[0]}"}
            with httpx2.Client(base_url=url, headers=headers, timeout=60) as http:
                yield http, first, second
        finally:
            started.terminate()
            said = started.communicate(timeout=20)[1]
        assert "[emerg]" not in said and "[crit]" not in said, said


@pytest.mark.slow
def test_nginx_sends_the_questions_about_a_file_to_one_server(proxied):
    http, first, second = proxied
    names = [http.post("/v1/files", files={"file": ("a", " ".join(FACTS[i % 5 : i % 5 + 3]).encode())}).json()["id"]
             for i in range(8)]  # fmt: skip

    def asked(name, **more):
        parts = [{"type": "file", "file": {"file_id": name}}, {"type": "text", "text": "what does the red box hold ?"}]
        return http.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": parts}], **more})

    servers = (first, second)
    for _ in range(2):
        for name in names:
            before = [each.metric("generation_tokens_total") for each in servers]
            got = [asked(name) for _ in range(3)]
            assert {each.status_code for each in got} == {200} and len({each.json()["id"] for each in got}) == 3
            assert len({each.json()["choices"][0]["message"]["content"] for each in got}) == 1
            worked = [each.metric("generation_tokens_total") > old for each, old in zip(servers, before, strict=True)]
            assert sorted(worked) == [False, True], name
    shares = [len([name for name in names if name in each.engine.preparer.store]) for each in servers]
    assert min(shares) > 0
    assert "data: [DONE]" in asked(names[0], stream=True).text
    assert len(http.get("/v1/files").json()["data"]) == 8 and http.get("/metrics").status_code == 404
    first.engine.drain()  # its questions go to the other one
    assert {asked(name).status_code for name in names} == {200}
    assert http.delete(f"/v1/files/{names[0]}").status_code == 200 and asked(names[0]).status_code == 404
