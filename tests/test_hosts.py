"""Two processes on two hosts whose network is cut: both end in time, each names the other's host, and both go on."""

import re
import subprocess
import time

import hosts_fixtures
import pytest

from comi_jax.devices.distributed import AGAIN

HEARTBEAT = 8  # seconds
pytestmark = [pytest.mark.hosts, pytest.mark.slow, pytest.mark.fault]


@pytest.fixture(scope="module")
def hosts(tmp_path_factory):
    hosts_fixtures.skip_without(*hosts_fixtures.HOSTS)
    made = hosts_fixtures.Hosts(tmp_path_factory.mktemp("hosts"))
    yield made
    made.close()


class Run:
    """Two processes of a run, one on each host."""

    def __init__(self, hosts, output, port, *more):
        hosts.environment |= {"COMI_COORDINATOR": f"n1:{port}", "COMI_PROCESSES": "2"}
        words = hosts_fixtures.settings(hosts.folder, f"train.output={output}", *more)
        self.logs = [hosts.folder / f"{output.name} {port} {index}.txt" for index in (0, 1)]
        self.hosts, self.processes = hosts, []
        for index, log in enumerate(self.logs):
            noted = ["sh", "-c", 'echo $$ > "$0"; exec "$@"', log.with_suffix(".pid"), hosts.environment["PYTHON"]]
            command = hosts.command(*noted, "-m", "comi_jax.train", *words, host=f"n{index + 1}")
            with log.open("w") as file:
                self.processes.append(
                    subprocess.Popen(
                        command, env=hosts.environment | {"COMI_PROCESS": str(index)}, stdout=file, stderr=file
                    )
                )

    def said(self):
        return [log.read_text() for log in self.logs]

    def until(self, words, seconds=400):
        hosts_fixtures.until(lambda: words in self.said()[0], seconds, lambda: "\n".join(self.said()))

    def stop(self, index):
        """Ask one of the processes to end. What this process has started is nsenter, which signals do not pass."""
        self.hosts.run("kill", "-TERM", self.logs[index].with_suffix(".pid").read_text().strip())

    def ends(self, seconds):
        """The statuses, and after how many seconds each ended."""
        begun, ended = time.monotonic(), {}
        while len(ended) < 2:
            for index, process in enumerate(self.processes):
                if index not in ended and process.poll() is not None:
                    ended[index] = time.monotonic() - begun
            assert time.monotonic() - begun < seconds, "\n".join(self.said())
            time.sleep(0.1)
        return [process.returncode for process in self.processes], ended


@pytest.mark.parametrize("victim", ["n1", "n2"])
@pytest.mark.parametrize("heals", [True, False], ids=["heals", "stays cut"])
def test_a_cut_network(hosts, tmp_path, victim, heals):
    """Mid-step. Whether or not it heals too late, both say whose host was not heard, with status 75, after which a
    launcher starts both again."""
    run = Run(hosts, tmp_path / "run", 5001, "train.steps=100000")
    run.until("step 4/")
    hosts.cable(victim, "down")
    try:
        if heals:
            time.sleep(HEARTBEAT + 2)
            hosts.cable(victim, "up")
        statuses, after = run.ends(4 * HEARTBEAT + 20)
    finally:
        hosts.cable(victim, "up")
    said = run.said()
    assert statuses == [AGAIN, AGAIN], said
    assert re.search(r"process 1 of 2 \(n2, pid [0-9]+\) has sent no heartbeat for 8 s", said[0]), said[0]
    assert re.search(r"process 0 of 2 \(n1, pid [0-9]+\)", said[1]), said[1]
    again = Run(hosts, tmp_path / "run", 5002, "train.steps=100000")
    again.until("resuming from step")
    again.until("/100000  loss")
    again.stop(1)
    assert again.ends(60)[0] == [85, 85], again.said()


def test_a_short_cut_is_survived(hosts, tmp_path):
    run = Run(hosts, tmp_path / "run", 5003, "train.steps=60")
    run.until("step 4/")
    hosts.cable("n2", "down")
    time.sleep(2)
    hosts.cable("n2", "up")
    assert run.ends(200)[0] == [0, 0], run.said()
