"""Ending on request: one process, and several that agree on where to end."""

import contextlib
import threading
import time

import pytest

from comi_jax.devices.distributed import Peers
from comi_jax.training import signals as stop_module
from comi_jax.training.signals import SECOND, STOPPED, Stop


class Ended(Exception):
    """In place of the end of the process."""


class Store:
    """The coordinator's store."""

    def __init__(self):
        self.values, self.guard = {}, threading.Lock()

    def key_value_set(self, key, value, allow_overwrite=False):
        with self.guard:
            assert allow_overwrite or key not in self.values
            self.values[key] = value

    def key_value_dir_get(self, prefix):
        with self.guard:
            return [(key, value) for key, value in self.values.items() if key.startswith(prefix)]


class Process:
    """One of several processes: its Stop, its agreement in a thread, and how it ended."""

    def __init__(self, store, index, count):
        self.said, self.ended = [], None
        self.stop = Stop(self.said.append, lambda: None, Peers(store, index, count))
        self.stop._exit = self.end
        self.thread = threading.Thread(target=self.agree, daemon=True)
        self.thread.start()

    def agree(self):
        with contextlib.suppress(Ended):
            self.stop._agree(self.stop._peers)

    def end(self, status):
        self.ended = (status, time.monotonic())
        raise Ended

    def close(self):
        self.stop._closed.set()
        self.thread.join(10)
        assert not self.thread.is_alive()


@pytest.fixture
def processes(monkeypatch):
    monkeypatch.setattr(stop_module, "POLL", 0.02)
    store = Store()
    made = [Process(store, index, 3) for index in range(3)]
    yield made
    for process in made:
        process.close()


def until(condition):
    end = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


def test_one_process_ends_between_steps_or_where_all_is_saved():
    said, left, ends = [], [], []
    stop = Stop(said.append, lambda: left.append(True))
    stop._exit = ends.append
    assert not stop.due()
    stop.request("SIGTERM")
    assert stop.due() and not ends and "saving after this step" in said[0]
    with stop.saved():
        assert ends == [STOPPED]
    stop.request("SIGINT")
    assert ends == [STOPPED, SECOND] and "exiting at once" in said[1]
    assert left == [True, True]


def test_a_sigterm_that_comes_twice_at_once_is_one_request(monkeypatch):
    """Slurm's daemon gives it to a task, and srun passes on its own. Later it is a second request."""
    ends, now = [], [0.0]
    monkeypatch.setattr(stop_module.time, "monotonic", lambda: now[0])
    stop = Stop(lambda words: None, lambda: None)
    stop._exit = ends.append
    for now[0] in (0.0, 0.1, 4.9):
        stop.request("SIGTERM")
    assert stop.due() and not ends
    now[0] = 5.1
    stop.request("SIGTERM")
    assert ends == [SECOND]


@pytest.mark.parametrize("asked", [0, 2])
def test_processes_that_step_end_behind_the_same_step(processes, asked):
    """Some are a step ahead of others, as devices that run behind their host let them be."""
    steps = [0, 0, 0]

    def run(index):
        while not processes[index].stop.due():
            steps[index] += 1
            time.sleep(0.003 * (1 + index))
            until(lambda: min(steps) >= steps[index] - 1)

    threads = [threading.Thread(target=run, args=(index,)) for index in range(3)]
    for thread in threads:
        thread.start()
    until(lambda: steps[0] > 5)
    processes[asked].stop.request("SIGTERM")
    for thread in threads:
        thread.join(10)
        assert not thread.is_alive()
    assert len(set(steps)) == 1 and {process.stop.requested for process in processes} == {"SIGTERM"}
    assert all("SIGTERM: all processes save" in process.said[0] for process in processes)
    assert not any(process.ended for process in processes)


def test_processes_without_anything_to_lose_end_at_once_the_first_one_last(processes):
    with contextlib.ExitStack() as stack:
        for process in processes:
            stack.enter_context(process.stop.saved())
        processes[1].stop.request("SIGINT")
        until(lambda: all(process.ended for process in processes))
        assert {process.ended[0] for process in processes} == {STOPPED}
        assert processes[0].ended[1] > max(processes[1].ended[1], processes[2].ended[1])


def test_while_one_has_something_to_lose_none_ends(processes):
    """Two wait in a place where all is saved for the third, which comes from a step; then all end there."""
    with contextlib.ExitStack() as stack:
        for process in processes[:2]:
            stack.enter_context(process.stop.saved())
        processes[0].stop.request("SIGTERM")
        until(lambda: len(processes[2].stop._peers.said(stop_module.PLACE.format(3))) == 3)
        assert not any(process.ended for process in processes)
        stack.enter_context(processes[2].stop.saved())
        until(lambda: all(process.ended for process in processes))


def test_one_that_is_done_keeps_nobody(processes):
    """A request that comes as another process leaves: nobody waits for its answer."""
    processes[0].close()
    processes[0].stop._peers.say(stop_module.OUT, "")
    processes[1].stop.request("SIGTERM")
    until(lambda: not processes[2].thread.is_alive())
    assert not processes[2].stop.due()


def test_a_round_that_another_acted_upon_counts_though_that_one_is_through(processes):
    """It found the round full, ended its run and said so before this one looked again."""
    mine = processes[1]
    for process in processes[::2]:
        process.close()
        process.stop._peers.say(stop_module.PLACE.format(0), "3")
    mine.stop._peers.say(stop_module.OUT, "")
    mine.stop.request("SIGTERM")
    until(lambda: mine.stop._until == 4)


def test_words_that_nobody_can_hear_do_not_keep_a_run_from_ending(processes):
    def broken(words):
        raise SystemExit(1)  # as rich does when the reader of a pipe is gone

    for process in processes:
        process.stop._say = broken
    processes[0].stop.request("SIGTERM")
    until(lambda: all(process.stop._until < 3 for process in processes))
    with pytest.raises(Ended):
        processes[0].stop.request("SIGINT")


def test_a_second_request_ends_one_process_at_once_and_the_others_are_told(processes):
    processes[1].stop.request("SIGINT")
    with pytest.raises(Ended):
        processes[1].stop.request("SIGINT")
    assert processes[1].ended[0] == SECOND
    assert processes[0].stop._peers.said("left") == {1: f"{SECOND} it got SIGINT twice"}
    until(lambda: processes[2].stop.requested)  # what another was asked is not a request of its own
    processes[2].stop.request("SIGINT")
    assert processes[2].ended is None
