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
import train_fixtures

from comi_jax.devices import distributed
from comi_jax.runs import description, stored_weights
from comi_jax.training.signals import STOPPED

ROOT = Path(__file__).resolve().parents[1]
SHORT = ["--config=tiny", "train.compare_mean_pooling=false", "data.synthetic_examples=400", "data.eval_examples=8",
         "train.log_every=1", "train.batch_size=32", "train.share_context=4"]  # fmt: skip


def test_one_process_needs_nothing(monkeypatch):
    monkeypatch.setattr(distributed.jax.distributed, "initialize", lambda *_, **__: pytest.fail("nothing to join"))
    distributed.start({"PATH": "/bin", "SLURM_NTASKS": "1", "SLURM_PROCID": "0", "TPU_WORKER_HOSTNAMES": "localhost"})


class Store:
    """The coordinator's store, in which process 1 stops counting after its third beat."""

    def __init__(self):
        self.values = {"comi/beat/1": "0", "comi/name/1": "node7, pid 99"}

    def key_value_set(self, key, value, allow_overwrite=False):
        self.values[key] = value
        self.values["comi/beat/1"] = str(min(int(self.values["comi/beat/1"]) + 1, 3))

    def key_value_dir_get(self, prefix):
        return [(key, value) for key, value in self.values.items() if key.startswith(prefix)]


def watched(index, **said):
    """How the watch of process ``index`` of 2 ends it: the words and the status."""
    store, ended = Store(), []
    store.values |= {f"comi/{key.replace('_', '/')}": value for key, value in said.items()}
    started = time.monotonic()
    distributed.Watch(distributed.Peers(store, index, 2), 0.2, lambda *words: ended.append(words)).run()
    assert 0.2 <= time.monotonic() - started < 5
    return ended[0]


def test_who_is_gone_is_said_by_name():
    words, status = watched(0)
    assert re.match(r"process 1 of 2 \(node7, pid 99\) has sent no heartbeat for 0 s", words)
    assert status == distributed.AGAIN


def test_the_others_end_with_the_status_of_one_that_says_why():
    """So a launcher that sees any of them knows whether it was for the user to mend."""
    assert watched(0, left_1="1 data.train is not set") == ("process 1 of 2 ended: data.train is not set", 1)


def test_one_that_has_said_why_it_ends_is_not_ended_by_what_the_others_say():
    words, status = watched(0, left_0="1 data.train is not set", left_1="1 data.train is not set")
    assert "has sent no heartbeat" in words and status == distributed.AGAIN


class Deaf(Store):
    """A store that answers every third time."""

    def __init__(self, answers):
        super().__init__()
        self.asked, self.answers = 0, answers

    def key_value_dir_get(self, prefix):
        self.asked += 1
        if not self.answers or self.asked % 3:
            raise distributed.jax.errors.JaxRuntimeError("DEADLINE_EXCEEDED")
        return super().key_value_dir_get(prefix)


def test_a_store_that_is_slow_is_asked_again():
    assert distributed.Peers(Deaf(True), 0, 2, 1.0).said("name") == {1: "node7, pid 99"}


def test_the_watch_ends_with_the_program():
    watch = distributed.Watch(distributed.Peers(Store(), 0, 2), 60.0, lambda *words: pytest.fail(words))
    watch.start()
    watch.close()
    assert not watch.is_alive() and watch._peers.said("beat")[0] == distributed.DONE


class Cut(Store):
    """A store whose answers stop coming, and whose callers wait for them."""

    def key_value_dir_get(self, prefix):
        if self.values.get("comi/beat/1") == "3":
            time.sleep(5)
        return super().key_value_dir_get(prefix)


def test_a_call_that_does_not_come_back_is_not_waited_for():
    """The clock ends the process within the time of silence, and says on which host the coordinator was."""
    store, ended = Cut(), []
    store.values |= {"comi/beat/0": "0", "comi/name/0": "node3, pid 7"}
    watch = distributed.Watch(distributed.Peers(store, 1, 2), 0.5, lambda *words: ended.append(words))
    store.values["comi/beat/1"] = "0"
    watch.start()
    end = time.monotonic() + 4
    while not ended and time.monotonic() < end:
        time.sleep(0.01)
    (words, status) = ended[0]
    assert words.startswith("the coordinator, process 0 of 2 (node3, pid 7), does not answer")
    assert status == distributed.AGAIN
    watch._closed.set()
    watch.join(10)


def test_without_the_coordinator_a_process_ends():
    ended = []
    distributed.Watch(distributed.Peers(Deaf(False), 1, 2, 0.1), 0.2, lambda *words: ended.append(words)).run()
    (words, status), *_ = ended
    assert re.match(r"the coordinator, process 0 of 2 \(.*\), does not answer", words) and status == distributed.AGAIN


@pytest.mark.parametrize("reason, status", [("RESOURCE_EXHAUSTED: Out of memory", 1), ("INTERNAL: lost", 75)])
def test_a_step_that_would_fail_again_is_not_tried_again(monkeypatch, reason, status):
    monkeypatch.setattr(distributed.jax, "process_count", lambda: 2)
    monkeypatch.setattr(distributed.time, "sleep", lambda seconds: None)
    words, given = distributed.failed(distributed.jax.errors.JaxRuntimeError(f"{reason}\nmore"))
    assert given == status and words.endswith(reason)


def launch(count, output, *words, heartbeat=60, settings=SHORT, restarts=0):
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    environment |= {"PYTHON": sys.executable, "COMI_HEARTBEAT": str(heartbeat), "PYTHONPATH": str(ROOT)}
    environment["COMI_RESTARTS"] = str(restarts)
    command = [str(ROOT / "launch" / "local.sh"), str(count), "--", *settings, f"train.output={output}", *words]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, env=environment, cwd=ROOT, start_new_session=True, **pipes)


def values(path, name):
    """The field ``name`` of every line of a JSON Lines file."""
    return [json.loads(line)[name] for line in path.read_text().splitlines()]


def losses(folder):
    return values(folder / "metrics.jsonl", "loss")


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
    pids = pids_of(process)
    os.kill(pids[1], by)
    gone = time.monotonic()
    rest = process.communicate(timeout=300)[0]
    assert process.returncode != 0
    assert time.monotonic() - gone < 3 * heartbeat + 20, rest  # the launcher reaps a stopped one last
    assert f"process 1 of 2 ({distributed.socket.gethostname()}, pid {pids[1]}) has sent no heartbeat" in rest, (
        text + rest
    )


def said_until(process, words):
    """What ``process`` prints up to the line with ``words``."""
    text = ""
    for line in process.stdout:
        text += line
        if words in line:
            return text
    pytest.fail(f"it ended without {words!r}:\n{text}")


def pids_of(process):
    """The two processes of a launcher, in their order. Looked for again where the list comes short, as it can."""
    end = time.monotonic() + 10
    while time.monotonic() < end:
        children = subprocess.run(
            ["ps", "-ww", "-o", "pid=,args=", "--ppid", str(process.pid)], capture_output=True, text=True
        )
        pids = [int(line.split()[0]) for line in children.stdout.splitlines() if "comi_jax.train" in line]
        if len(pids) == 2:
            return pids
    pytest.fail(f"the launcher has not two processes: {children}")


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    """A run of a tiny Qwen2, weights and contexts of two micro-batches split over all processes, evaluated on the
    way."""
    folder = tmp_path_factory.mktemp("data")
    model = train_fixtures.language_model(folder / "lm")
    data = train_fixtures.write(folder / "train.jsonl", train_fixtures.records(24))
    dev = train_fixtures.write(folder / "dev.jsonl", train_fixtures.records(5, seed=1))
    return train_fixtures.command(
        model, data, "", f"data.eval={dev}", "train.log_every=1", "train.steps=12", "train.checkpoint_every=2",
        "train.eval_every=4", "train.compare_mean_pooling=false", "optimizer.accumulate=2",
    )  # fmt: skip


def stopped(count, output, settings, words):
    """A launcher whose second process was asked to end after a line with ``words``, and all that was printed."""
    process = launch(count, output, settings=settings)
    text = said_until(process, words)
    os.kill(pids_of(process)[1], signal.SIGTERM)
    text += process.communicate(timeout=300)[0]
    return process, text


@pytest.mark.slow
@pytest.mark.fault
def test_two_processes_are_stopped_damaged_and_go_on_as_one_that_never_was(settings, tmp_path):
    """SIGTERM to the second of two: both save after the same step and end with status 85. A flipped bit in that
    checkpoint: both go on from the one before. Predictions, evaluations and losses are those of one process."""
    # The signal comes long before the second evaluation, in which they would end without another checkpoint.
    settings = [*settings, "train.steps=40", "train.checkpoint_every=5", "train.eval_every=20"]
    alone = launch(1, tmp_path / "alone", settings=settings)
    said = alone.communicate(timeout=300)[0]
    assert alone.returncode == 0, said
    both = tmp_path / "both"
    process, said = stopped(2, both, settings, "step 21/")
    assert process.returncode == STOPPED and said.count("stopped by SIGTERM after step") == 1, said
    newest = max(int(path.name) for path in (both / "checkpoints").iterdir())
    assert 21 <= newest < 40 and f"after step {newest} of 40" in said
    largest = max(
        (both / "checkpoints" / str(newest)).rglob("*"), key=lambda path: path.stat().st_size * path.is_file()
    )
    damaged = bytearray(largest.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    largest.write_bytes(damaged)
    process = launch(2, both, settings=settings)
    said = process.communicate(timeout=300)[0]
    assert process.returncode == 0, said
    assert "reusing the tokenised examples" in said and said.count(f"kept as {newest}.damaged") == 1, said
    assert 2 <= int(re.search(r"resuming from step ([0-9]+) of 40", said)[1]) < newest, said
    assert losses(both) == pytest.approx(losses(tmp_path / "alone"), rel=1e-5)
    for run in (tmp_path / "alone", both):
        assert values(run / "evaluations.jsonl", "step") == [20, 40]
    for name in ("predictions.jsonl", "predictions_closed_book.jsonl"):
        said, expected = (values(run / name, "prediction") for run in (both, tmp_path / "alone"))
        assert said == expected and len(said) == 5


def until_there(path):
    end = time.monotonic() + 300
    while not path.exists():
        assert time.monotonic() < end, f"{path} never came"
        time.sleep(0.01)


@pytest.mark.slow
@pytest.mark.fault
@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_two_processes_end_together_wherever_they_are(settings, tmp_path, name):
    """A signal to either of two, as they compile, step, evaluate and make the closing table: both end with status
    85 within 10 s, and what they leave is, in the end, what a run leaves that was never stopped."""
    run, number = tmp_path / "run", signal.Signals[name]
    places = {
        "compiling": lambda process: said_until(process, "training data: "),
        "stepping": lambda process: said_until(process, "step 2/"),
        "evaluating": lambda process: until_there(run / "evaluations" / "step_8.jsonl.part"),
        "closing": lambda process: until_there(run / "predictions.jsonl.part"),
    }
    for turn, (place, reached) in enumerate(places.items()):
        process = launch(2, run, settings=settings)
        reached(process)
        os.kill(pids_of(process)[turn % 2], number)
        asked = time.monotonic()
        said = process.communicate(timeout=120)[0]
        through = place == "closing" and "compression ratio" in said  # before the signal was heard
        assert process.returncode == (0 if through else STOPPED) and "Traceback" not in said, f"{place}: {said}"
        assert time.monotonic() - asked < 10, f"{place}: {said}"
        heard = f"{name}: all processes save unsaved work" in said
        assert heard or through, f"{place}: {said}"
    process = launch(2, run, settings=settings)
    said = process.communicate(timeout=300)[0]
    assert process.returncode == 0, said
    assert values(run / "metrics.jsonl", "step") == list(range(1, 13))
    assert values(run / "evaluations.jsonl", "step") == [4, 8, 12] and len(values(run / "predictions.jsonl", "em")) == 5


@pytest.mark.slow
@pytest.mark.fault
def test_the_coordinator_is_killed(settings, tmp_path):
    """The other ends by itself, the launcher says which was killed, and the same command goes on."""
    process = launch(2, tmp_path / "run", settings=[*settings, "train.steps=100000"], heartbeat=6)
    said = said_until(process, "step 6/")
    os.kill(pids_of(process)[0], signal.SIGKILL)
    gone = time.monotonic()
    said += process.communicate(timeout=300)[0]
    assert process.returncode != 0 and time.monotonic() - gone < 6 + 5 + 10, said
    assert "process 0 of 2 ended with status 137, killed by signal 9" in said, said
    process, said = stopped(2, tmp_path / "run", [*settings, "train.steps=100000"], "/100000  loss")
    assert process.returncode == STOPPED and "resuming from step" in said, said


@pytest.mark.slow
@pytest.mark.fault
@pytest.mark.parametrize(
    "victim, by, words",
    [
        (0, signal.SIGKILL, "step 7/"),
        (1, signal.SIGKILL, "step 7/"),
        (1, signal.SIGKILL, "step 8/"),  # as both save
        (1, signal.SIGSTOP, "step 7/"),
    ],
)
def test_the_launcher_starts_a_run_again_and_nothing_is_lost(settings, tmp_path, victim, by, words):
    """One of two is killed or stopped: the same launcher goes on by itself, to the bits of a run that never was."""
    whole = launch(2, tmp_path / "whole", settings=settings)
    said = whole.communicate(timeout=300)[0]
    assert whole.returncode == 0, said
    run = tmp_path / "run"
    process = launch(2, run, settings=settings, heartbeat=6, restarts=1)
    said = said_until(process, words)
    first = pids_of(process)
    os.kill(first[victim], by)
    gone = time.monotonic()
    said += said_until(process, "restarting all 2 processes (1 of 1)")
    limit = 2 * (6 + 5) + 10  # the survivor notices, and the launcher kills a stopped one
    assert time.monotonic() - gone < limit, said
    for pid in first:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
    said += process.communicate(timeout=300)[0]
    assert process.returncode == 0 and "resuming from step" in said, said
    assert losses(run) == losses(tmp_path / "whole")
    assert values(run / "evaluations.jsonl", "step") == [4, 8, 12]
    trained = [
        stored_weights.load_flat(folder, description.read_run(folder).architecture)
        for folder in (run, tmp_path / "whole")
    ]
    assert all((trained[0][name] == trained[1][name]).all() for name in trained[1])


@pytest.mark.slow
def test_what_the_user_has_to_mend_is_not_tried_again(settings, tmp_path):
    """Whether one process notices, or all of them."""
    for wrong in ("train.batch_size=7", "data.train=/nowhere.jsonl"):
        process = launch(2, tmp_path / "run", wrong, settings=settings, restarts=1)
        said = process.communicate(timeout=300)[0]
        assert process.returncode == 1 and "again (1 of 1)" not in said, said
        assert said.count("ended with status 1\n") == 2 and "Traceback" not in said, said


@pytest.mark.slow
@pytest.mark.fault
def test_a_locked_folder_is_said_by_all(settings, tmp_path):
    """A second run of two processes on the folder of the first: both end, with who holds it."""
    process = launch(2, tmp_path / "run", settings=[*settings, "train.steps=100000"])
    said_until(process, "step 1/")
    second = launch(2, tmp_path / "run", settings=[*settings, "train.steps=100000"])
    said = second.communicate(timeout=300)[0]
    assert second.returncode != 0 and f"is in use by process {pids_of(process)[0]} on " in said, said
    assert "Traceback" not in said
    process.terminate()
    assert process.communicate(timeout=300) and process.returncode == STOPPED
