"""Several processes as one run: who they are, that they compute what one does, and what they say when one is gone."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from comi_jax import distributed
from comi_jax.config import ConfigError

ROOT = Path(__file__).resolve().parents[1]
SHORT = ["--config=tiny", "train.compare_mean_pooling=false", "data.synthetic_examples=400", "data.eval_examples=8",
         "train.log_every=1", "train.batch_size=32", "train.share_context=4"]  # fmt: skip


def test_one_process_needs_nothing(monkeypatch):
    monkeypatch.setattr(distributed.jax.distributed, "initialize", lambda **_: pytest.fail("nothing to join"))
    distributed.start({"PATH": "/bin", "SLURM_NTASKS": "1", "SLURM_PROCID": "0", "TPU_WORKER_HOSTNAMES": "localhost"})


@pytest.mark.parametrize(
    "environment",
    [{"SLURM_NTASKS": "4", "SLURM_PROCID": "2"}, {"TPU_WORKER_HOSTNAMES": "a,b"}, {"COMI_DISTRIBUTED": "auto"}],
)
def test_places_that_jax_knows(environment):
    assert distributed.found_by_jax(environment) and distributed.described(environment) is None


THREE = {"COMI_COORDINATOR": "host:1", "COMI_PROCESSES": "2", "COMI_PROCESS": "1"}


def test_three_variables_say_who_a_process_is():
    said = {"coordinator_address": "host:1", "num_processes": 2, "process_id": 1}
    assert distributed.described(THREE) == said


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"COMI_PROCESS": ""}, "COMI_COORDINATOR, COMI_PROCESSES is set; .* go together"),
        ({"COMI_PROCESS": "2"}, "COMI_PROCESS is 2 of COMI_PROCESSES 2"),
        ({"COMI_PROCESSES": "two"}, "COMI_PROCESSES=two is not a whole number"),
    ],
)
def test_variables_that_cannot_work_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        distributed.described(THREE | changes)


class Store:
    """The coordinator's store, in which process 1 stops counting after its third beat."""

    def __init__(self):
        self.values = {"comi/beat/1": "0", "comi/name/1": "node7, pid 99"}

    def key_value_set(self, key, value, allow_overwrite=False):
        self.values[key] = value
        self.values["comi/beat/1"] = str(min(int(self.values["comi/beat/1"]) + 1, 3))

    def key_value_dir_get(self, prefix):
        return [(key, value) for key, value in self.values.items() if key.startswith(prefix)]


def test_who_is_gone_is_said_by_name():
    said = []
    watch = distributed.Watch(Store(), 0, 2, 0.2, said.append)
    started = time.monotonic()
    watch.run()
    assert re.match(r"process 1 of 2 \(node7, pid 99\) has not been heard for 0 s", said[0])
    assert 0.2 <= time.monotonic() - started < 5


def launch(count, output, *words, heartbeat=60):
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    environment |= {"PYTHON": sys.executable, "COMI_HEARTBEAT": str(heartbeat), "PYTHONPATH": str(ROOT)}
    command = [str(ROOT / "launch" / "local.sh"), str(count), "--", *SHORT, f"train.output={output}", *words]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, env=environment, cwd=ROOT, start_new_session=True, **pipes)


def losses(folder):
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


@pytest.mark.slow
def test_two_and_four_processes_have_the_losses_of_one(tmp_path):
    """Step by step; and every process ends, with one table, one metrics file and one checkpoint between them."""
    folders = {count: tmp_path / str(count) for count in (1, 2, 4)}
    for count, folder in folders.items():
        process = launch(count, folder, "train.steps=4")
        text = process.communicate(timeout=900)[0]
        assert process.returncode == 0, text
        assert text.count("compression ratio") == 1 and text.count("step 4/4") == 1
        assert [p.name for p in (folder / "checkpoints").iterdir()] == ["4"]
    alone = losses(folders[1])
    for count in (2, 4):
        assert losses(folders[count]) == pytest.approx(alone, rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("by", [signal.SIGKILL, signal.SIGSTOP])
def test_when_one_is_gone_the_others_say_so_and_end(tmp_path, by):
    heartbeat = 6
    process = launch(2, tmp_path / "run", "train.steps=100000", heartbeat=heartbeat)
    text = ""
    for line in process.stdout:
        text += line
        if "step 2/" in line:
            break
    children = subprocess.run(["ps", "-o", "pid=,args=", "--ppid", str(process.pid)], capture_output=True, text=True)
    pids = [int(line.split()[0]) for line in children.stdout.splitlines() if "comi_jax.train" in line]
    os.kill(pids[1], by)
    gone = time.monotonic()
    rest = process.communicate(timeout=300)[0]
    assert process.returncode != 0
    assert time.monotonic() - gone < 3 * heartbeat + 20, rest  # the launcher reaps a stopped one last
    assert f"process 1 of 2 ({distributed.socket.gethostname()}, pid {pids[1]}) has not been heard" in rest, text + rest
