"""One process in a run's folder: the second is refused by name, the lock of a dead one taken over."""

import json
import os
import subprocess
import sys

import pytest

from comi_jax import lock
from comi_jax.integrity import CheckpointError

pytestmark = pytest.mark.fault


def write(folder, **changes):
    owner = lock._owner(os.getpid()) | changes
    (folder / lock.NAME).write_text(json.dumps(owner))
    return owner


def test_the_lock_is_there_while_it_is_held_and_then_gone(tmp_path):
    with lock.held(tmp_path / "a" / "run"):
        assert [p.name for p in (tmp_path / "a" / "run").iterdir()] == [lock.NAME]
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
        assert json.loads((tmp_path / lock.NAME).read_text())["pid"] == os.getpid()
    assert not list(tmp_path.iterdir())


def test_a_later_process_of_the_same_number_is_not_taken_for_the_dead_one(tmp_path):
    write(tmp_path, start="an earlier boot/7")
    with lock.held(tmp_path):
        pass


def test_the_lock_of_another_host_stands(tmp_path):
    write(tmp_path, host="elsewhere", pid=1)
    with pytest.raises(CheckpointError, match="in use by process 1 on elsewhere"), lock.held(tmp_path):
        pass
    assert (tmp_path / lock.NAME).exists()


@pytest.mark.parametrize("text", ["", "{", "[]", '{"host": 1}'])
def test_what_is_no_lock_of_ours_stands(tmp_path, text):
    (tmp_path / lock.NAME).write_text(text)
    with pytest.raises(CheckpointError, match="not a lock that this program wrote; remove it"), lock.held(tmp_path):
        pass
    assert (tmp_path / lock.NAME).read_text() == text


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
