"""One process in a run's folder: the second is refused by name, the lock of a dead one taken over."""

import json
import os
import subprocess
import sys
import threading

import pytest

from comi_jax.runs import lock
from comi_jax.runs.checksums import CheckpointError

pytestmark = pytest.mark.fault


def write(folder, **changes):
    owner = lock._owner(os.getpid()) | changes
    (folder / "lock").write_text(json.dumps(owner))
    return owner


def test_the_lock_is_there_while_it_is_held_and_then_gone(tmp_path):
    with lock.held(tmp_path / "a" / "run"):
        assert [p.name for p in (tmp_path / "a" / "run").iterdir()] == ["lock"]
    assert not (tmp_path / "a" / "run").exists()  # it was made for the lock, and nothing came into it
    with lock.held(tmp_path):
        pass
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_a_second_holder_is_refused_with_host_process_and_time(tmp_path):
    with lock.held(tmp_path), pytest.raises(CheckpointError) as refused, lock.held(tmp_path):
        pass
    for part in (str(tmp_path), f"process {os.getpid()} on {os.uname().nodename}, since 20", "remove "):
        assert part in str(refused.value)


def test_the_lock_of_a_process_that_is_gone_is_taken_over(tmp_path):
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    write(tmp_path, pid=gone.pid, start="some boot/7")
    with lock.held(tmp_path):
        assert json.loads((tmp_path / "lock").read_text())["pid"] == os.getpid()
    assert not list(tmp_path.iterdir())


def test_a_later_process_of_the_same_number_is_not_taken_for_the_dead_one(tmp_path):
    write(tmp_path, start="an earlier boot/7")
    with lock.held(tmp_path):
        pass


def elsewhere(folder, **changes):
    owner = write(folder, host="elsewhere", pid=1, **changes)
    return folder / "lock", owner


def test_the_lock_of_another_host_stands_while_it_is_touched(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "PATIENCE", 60.0)
    path, owner = elsewhere(tmp_path)
    said = []

    def say(text):
        said.append(text)
        threading.Timer(0.3, os.utime, (path,)).start()

    with pytest.raises(CheckpointError, match="in use by process 1 on elsewhere"), lock.held(tmp_path, say):
        pass
    assert json.loads(path.read_text()) == owner and "process 1 on elsewhere: waiting 60 s for a heartbeat" in said[0]


def test_the_lock_of_a_silent_process_elsewhere_is_taken_over(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "PATIENCE", 0.3)
    path, _ = elsewhere(tmp_path)
    with lock.held(tmp_path):
        assert json.loads(path.read_text())["pid"] == os.getpid()
    assert not list(tmp_path.iterdir())


def test_a_lock_from_elsewhere_that_never_gave_a_sign_stands(tmp_path):
    path, owner = elsewhere(tmp_path)
    del owner["beats"]
    path.write_text(json.dumps(owner))
    with pytest.raises(CheckpointError, match="in use by process 1 on elsewhere"), lock.held(tmp_path):
        pass
    assert path.exists()


def test_the_lock_is_touched_while_it_is_held(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "BEAT", 0.05)
    path = tmp_path / "lock"
    with lock.held(tmp_path):
        os.utime(path, (1, 1))
        assert lock._beats(path, 30.0) and path.stat().st_mtime > 1


def test_a_process_whose_lock_was_taken_over_ends(tmp_path):
    code = (
        "import json, pathlib, sys, time; from comi_jax.runs import lock\n"
        "lock.BEAT, folder = 0.05, pathlib.Path(sys.argv[1])\n"
        "with lock.held(folder):\n"
        "    path = folder / 'lock'\n"
        "    path.write_text(json.dumps(json.loads(path.read_text()) | {'host': 'elsewhere', 'pid': 7}))\n"
        "    time.sleep(60)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, timeout=50)
    assert done.returncode == 1 and "was taken over by process 7 on elsewhere" in done.stderr
    assert json.loads((tmp_path / "lock").read_text())["host"] == "elsewhere"


@pytest.mark.parametrize("text", ["", "{", "[]", '{"host": 1}'])
def test_what_is_no_lock_of_ours_stands(tmp_path, text):
    (tmp_path / "lock").write_text(text)
    with pytest.raises(CheckpointError, match="was not written by comi_jax; remove it"), lock.held(tmp_path):
        pass
    assert (tmp_path / "lock").read_text() == text


def test_a_file_system_without_links_has_locks_too(tmp_path, monkeypatch):
    def link(*_):
        raise PermissionError(1, "no links here")

    monkeypatch.setattr(os, "link", link)
    with lock.held(tmp_path), pytest.raises(CheckpointError, match="in use by"), lock.held(tmp_path):
        pass
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_written_is_said_in_one_sentence():
    with pytest.raises(CheckpointError, match="^/sys/comi_run cannot be written: [A-Z][a-z ]+$"):
        with lock.held(lock.Path("/sys/comi_run")):  # where not even the superuser may write
            pass
