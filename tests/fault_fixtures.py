"""A process for children that are to die (fault_driver.py), with a tiny language model and data for them."""

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import fault_driver
import pytest
import train_fixtures

STEPS, SAVE_EVERY = 30, 3


@dataclasses.dataclass
class Child:
    pid: int
    log: Path
    answers: object

    def printed(self):
        return self.log.read_text()

    def wait_for(self, text, seconds=300):
        end = time.monotonic() + seconds
        while text not in self.printed():
            assert time.monotonic() < end and Path(f"/proc/{self.pid}").exists(), self.printed()
            time.sleep(0.01)

    def kill(self, number=signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def status(self):
        return next_answer(self.answers, "ended")


def next_answer(answers, word):
    """The number that the driver says next after ``word``."""
    return next(int(line.split()[1]) for line in answers if line.startswith(word))


@dataclasses.dataclass
class Driver:
    process: subprocess.Popen
    folder: Path
    lm: Path
    data: Path
    dev: Path
    children: int = 0

    def start(self, die=None, devices=1, cache=True, **order):
        self.children += 1
        log = self.folder / f"log_{self.children}"
        log.touch()
        cache = str(self.folder / "compilations") if cache else ""
        order |= {"log": str(log), "die": die, "devices": devices, "cache": cache}
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()
        # Behind a test that failed, the answer to what it had started comes first.
        return Child(next_answer(self.process.stdout, "began"), log, self.process.stdout)

    def train(self, output, *more, **order):
        return self.start(arguments=self.command(output, *more), **order)

    def command(self, output, *more):
        often = (
            f"train.steps={STEPS}", "train.log_every=1", f"train.checkpoint_every={SAVE_EVERY}",
            "optimizer.accumulate=2",
        )  # fmt: skip
        return train_fixtures.command(self.lm, self.data, output, *often, *more)


@pytest.fixture(scope="module")
def driver(tmp_path_factory):
    folder = tmp_path_factory.mktemp("faults")
    lm = train_fixtures.language_model(folder / "lm")
    data = train_fixtures.write(folder / "train.jsonl", train_fixtures.records(16))
    dev = train_fixtures.write(folder / "dev.jsonl", train_fixtures.records(150, seed=1))
    command = [sys.executable, str(Path(fault_driver.__file__))]
    path = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=path) as process:
        yield Driver(process, folder, lm, data, dev)
        process.stdin.close()
