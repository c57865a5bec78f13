"""All processes meet before JAX starts, or each says in one sentence why not."""

import re
import socket
import threading
import time

import pytest

from comi_jax.devices import rollcall
from comi_jax.devices.cluster import Member
from comi_jax.errors import ConfigError


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(rollcall, "TRY", 0.5)


def outcomes(members, wait=1, late=0.0):
    """What each of ``members`` ends with: "" or the error. The first one comes ``late`` seconds after the others."""
    said = [None] * len(members)

    def one(place):
        time.sleep(late if place == 0 else 0)
        try:
            rollcall.meet(members[place], wait)
            said[place] = ""
        except ConfigError as error:
            said[place] = str(error)

    threads = [threading.Thread(target=one, args=(place,)) for place in range(len(members))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    return said


def members(port, *indices, count=3, host="127.0.0.1"):
    return [Member(f"{host}:{port}", count, index) for index in indices]


def test_all_come_though_the_first_is_late(free_port):
    assert outcomes(members(free_port, 0, 1, 2), wait=10, late=0.7) == ["", "", ""]
    with socket.create_server(("127.0.0.1", free_port)):  # the port is JAX's now
        pass


def test_who_did_not_come_is_said_by_all_that_did(free_port):
    missing = f"processes 1 of 3 did not connect to 127.0.0.1:{free_port} within 1 s; check"
    assert all(said.startswith(missing) for said in outcomes(members(free_port, 0, 2)))


def test_two_of_one_number_are_refused(free_port):
    said = outcomes(members(free_port, 0, 2, 2), wait=5)
    assert all("two processes have the index 2: " in words for words in said)


@pytest.mark.parametrize("place", [0, 1])
def test_different_ideas_of_their_number_are_refused(free_port, place, monkeypatch):
    """Whichever of them calls first."""
    call = rollcall._call

    def late(member, *rest):
        time.sleep(0.2 if member.index == place else 0)
        call(member, *rest)

    monkeypatch.setattr(rollcall, "_call", late)
    said = outcomes([*members(free_port, 0, count=3), *members(free_port, 1, count=2)], wait=5)
    assert all("process 1 (" in words and "has COMI_PROCESSES=2, but process 0 has 3" in words for words in said)


@pytest.mark.parametrize("host, reason", [("127.0.0.1", "refused"), ("nowhere.invalid", "(not known|resolution)")])
def test_a_coordinator_that_cannot_be_reached(free_port, host, reason):
    (said,) = outcomes(members(free_port, 1, host=host))
    assert re.search(f"could not reach process 0 at {host}:{free_port} within 1 s: .*{reason}", said)


def test_a_port_where_something_else_answers(free_port):
    with socket.create_server(("127.0.0.1", free_port)):
        (said,) = outcomes(members(free_port, 1))
        assert "could not reach process 0" in said
        (said,) = outcomes(members(free_port, 0))
        assert f"process 0 of 3 cannot listen on port {free_port}" in said


def test_a_name_of_process_0_that_leads_elsewhere(free_port):
    """It listens, but nobody finds it there."""
    (said,) = outcomes(members(free_port, 0, host="nowhere.invalid"))
    assert "process 0 of 3" in said and f"could not reach process 0 at nowhere.invalid:{free_port}" in said


def test_calls_of_strangers_and_of_those_that_hang_up_do_not_count(free_port):
    calls = []

    def disturb():
        time.sleep(0.3)
        for words in (b"GET / HTTP/1.1\r\n", b"comi 2 4 gone, pid 1\n", b"comi two\n"):
            with socket.create_connection(("127.0.0.1", free_port)) as line:
                line.sendall(words)
                calls.append(words)

    thread = threading.Thread(target=disturb)
    thread.start()
    first = outcomes(members(free_port, 0, 1, count=4), wait=2)
    thread.join()
    assert len(calls) == 3 and all("processes 2, 3 of 4 did not connect" in said for said in first)
