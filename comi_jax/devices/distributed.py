"""Many processes as one run: how they find each other, and what happens when one is gone.

One process alone needs nothing. Several are started by a launcher (``launch/``), each with the same command:
``cluster`` says which of them this one is, all meet at a coordinator, process 0, in ``rollcall``, and then under
``jax.distributed``.

Every process counts aloud at the coordinator. One that has not been heard for COMI_HEARTBEAT seconds is gone, dead or
stopped; the others say which it is and end, since no step can be finished without it.
"""

import atexit
import contextlib
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NoReturn

import jax
from jax._src import distributed as jax_distributed  # the coordinator's key-value store has no public name
from jax.experimental import multihost_utils

from comi_jax.config import ConfigError
from comi_jax.devices import cluster, rollcall

HEARTBEAT = 60  # seconds; JAX's own default is 100
AGAIN = 75  # exit status, sysexits.h's for "try again", of a process that ends because another is gone
DONE = "done"  # the last beat of a process that ends well
NEWS = 3.0  # seconds in which every process has seen what another said


def start(environment: Mapping[str, str] = os.environ) -> None:
    """Join the other processes of this run, if there are any. Call it before JAX is used.

    Raises ConfigError for variables that do not go together, or when the others cannot be reached.
    """
    member = cluster.find(environment)
    if member is None:
        return
    heartbeat = cluster.number(environment, "COMI_HEARTBEAT", HEARTBEAT)
    wait = cluster.number(environment, "COMI_JOIN_TIMEOUT", 300)
    rollcall.meet(member, wait)
    named = jax.config.jax_platforms  # pyright: ignore[reportAttributeAccessIssue] (JAX makes it as it starts)
    if (named or "").split(",")[0] == "cpu":
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.config.update("jax_enable_preemption_service", False)  # it knows SIGTERM alone, and steps alone: see signals.py
    os.environ["no_grpc_proxy"] = cluster.address(member.coordinator)[0]  # no proxy knows the way to it
    jax.config.update("jax_check_proxy_envs", False)
    try:
        # JAX would look for a cluster again, and under Slurm take one GPU for each task. Its own end of a process names
        # nobody that a user knows; it is the second resort.
        jax.distributed.initialize(
            member.coordinator,
            member.count,
            member.index,
            local_device_ids=member.gpus,
            cluster_detection_method="deactivate",
            heartbeat_timeout_seconds=2 * heartbeat + 10,
            initialization_timeout=wait,
        )
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(
            f"this process could not join the others at {member.coordinator} within {wait} s: {reason}"
        ) from None
    if everyone := peers():
        watch = Watch(everyone, heartbeat)
        watch.start()
        atexit.register(watch.close)


def is_first() -> bool:
    """Whether this process writes what is written once."""
    return jax.process_index() == 0


def meet(name: str) -> None:
    """Wait until every process has come to the place in the program called ``name``; nothing with one process. The
    devices stay idle: the wait may be long."""
    if jax.process_count() > 1:
        _store().wait_at_barrier(name, 2**31 - 1)


def _store() -> Any:
    """The coordinator's key-value store, with its barriers. It is there wherever there are several processes."""
    return jax_distributed.global_state.client


def agreed(value: Any) -> Any:
    """The first process's ``value``, numbers in NumPy arrays of the same shapes everywhere, in all processes."""
    return multihost_utils.broadcast_one_to_all(value) if jax.process_count() > 1 else value


class Peers:
    """The processes of a run, and what they tell each other by way of the coordinator's store.

    A store that fails is asked again for ``patience`` seconds, then its JaxRuntimeError is raised: a busy coordinator
    may be slow to answer, and one that is gone does not come back.
    """

    def __init__(self, store: Any, index: int, count: int, patience: float = HEARTBEAT):
        self.index, self.count = index, count
        self._store, self._patience = store, patience

    def say(self, what: str, value: str) -> None:
        """Let all processes know ``value`` as this one's ``what``."""
        self._ask(self._store.key_value_set, f"comi/{what}/{self.index}", value, allow_overwrite=True)

    def said(self, what: str) -> dict[int, str]:
        """``what`` of every process that has said it so far."""
        known = self._ask(self._store.key_value_dir_get, f"comi/{what}/")
        return {int(key.rsplit("/", 1)[1]): value for key, value in known}

    def _ask(self, call: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
        until = time.monotonic() + self._patience
        while True:
            try:
                return call(*arguments, **named)
            except jax.errors.JaxRuntimeError:
                if time.monotonic() > until:
                    raise
                time.sleep(min(0.5, self._patience / 5))


def peers() -> Peers | None:
    """The processes of this run; None if there is one, or they have not met: JAX is not started to look."""
    if jax_distributed.global_state.client is None or jax.process_count() == 1:
        return None
    patience = cluster.number(os.environ, "COMI_HEARTBEAT", HEARTBEAT)
    return Peers(_store(), jax.process_index(), jax.process_count(), patience)


class Watch(threading.Thread):
    """Counts aloud for this process and listens to the others."""

    def __init__(self, peers: Peers, timeout: float, end: Callable[[str, int], None] | None = None):
        super().__init__(name="comi-watch", daemon=True)
        self._peers, self._timeout, self._end = peers, timeout, end or _end
        self._closed = threading.Event()
        self._answered = time.monotonic()  # when the coordinator last did
        self._names: dict[int, str] = {}

    def close(self) -> None:
        """Stop watching, at the end of the program: a thread that Python ends within JAX's C++ aborts the process."""
        self._closed.set()
        self.join(NEWS)
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            self._peers.say("beat", DONE)

    def run(self) -> None:
        threading.Thread(target=self._look_at_the_clock, daemon=True, name="comi-clock").start()
        try:
            self._listen()
        finally:
            self._closed.set()

    def _look_at_the_clock(self) -> None:
        """A call over a cable that is cut comes back after minutes, later than JAX ends the process without a name."""
        while not self._closed.wait(min(1.0, self._timeout / 5)):
            if time.monotonic() - self._answered > self._timeout:
                self._end(self._no_answer(), AGAIN)
                return

    def _listen(self) -> None:
        peers, beat = self._peers, 0
        heard: dict[int, tuple[str, float]] = {}  # by process: what it said last, and when that was new
        try:
            peers.say("name", f"{socket.gethostname()}, pid {os.getpid()}")
            while not self._closed.wait(min(1.0, self._timeout / 5) if beat else 0):
                beat += 1
                peers.say("beat", str(beat))
                now = time.monotonic()
                for process, said in peers.said("beat").items():
                    if heard.get(process, ("", 0.0))[0] != said:
                        heard[process] = (said, now)
                left = peers.said("left")
                if len(self._names) < peers.count:
                    self._names = peers.said("name")
                self._answered = time.monotonic()
                silent = {process for process, (_, since) in heard.items() if now - since > self._timeout}
                gone = [process for process in silent if heard[process][0] != DONE]
                if left and peers.index not in left:  # one that said so itself is on its way out
                    process, said = next(iter(left.items()))
                    status, why = said.split(" ", 1)
                    self._leave(f"process {process} of {peers.count} ended: {why}", int(status))
                    return
                if gone:
                    self._leave(self._message(gone[0]), AGAIN)
                    return
        except jax.errors.JaxRuntimeError:
            if self._closed.is_set():
                return
            self._end(self._no_answer(), AGAIN)

    def _leave(self, message: str, status: int) -> None:
        if self._peers.index == 0:  # which holds the store, where the others have yet to look
            time.sleep(min(NEWS, self._timeout))
        self._end(message, status)

    def _message(self, process: int) -> str:
        return (
            f"{self._who(process)} has not been heard for {self._timeout:.0f} s, it is dead, stopped or cut off; this "
            "process ends too. Start all of them again to go on from the last checkpoint"
        )

    def _no_answer(self) -> str:
        return (
            f"{self._who(0)}, where all meet, does not answer; this process ends too. Start all of them again to go on "
            "from the last checkpoint"
        )

    def _who(self, process: int) -> str:
        return f"process {process} of {self._peers.count} ({self._names.get(process, 'it did not say from where')})"


@contextlib.contextmanager
def tidying(tidy: Callable[[], None]) -> Iterator[None]:
    """While this holds, ``tidy`` is called before this process is ended by the news from another."""
    _TIDY.append(tidy)
    try:
        yield
    finally:
        _TIDY.remove(tidy)


def leave(message: str, status: int = 1) -> NoReturn:
    """End this process with ``message`` on standard error and ``status``; of several, the others are told and end too,
    with the same status: a launcher starts no run again that the user has to mend."""
    everyone = peers()
    if everyone is None:
        sys.exit(f"error: {message}")
    with contextlib.suppress(jax.errors.JaxRuntimeError):  # nobody is there to be told
        everyone.say("left", f"{status} {message}")
        time.sleep(NEWS)
    _end(message, status)


def failed(error: Exception) -> tuple[str, int]:
    """What to say of an ``error`` in a step, and the status to end with: after the watch has had its time to say more,
    that another process may be the cause. Raises ``error`` where there is no other."""
    if jax.process_count() == 1:
        raise error
    listen()
    reason = str(error).splitlines()[0]
    status = 1 if reason.startswith(("RESOURCE_EXHAUSTED", "INVALID_ARGUMENT")) else AGAIN  # the same would come again
    return f"a step failed in process {jax.process_index()} of {jax.process_count()}: {reason}", status


def listen() -> None:
    """Wait as long as the watch needs to hear that another process is gone. If one is, it ends this one: it looks
    every second and lets the others hear of it first."""
    time.sleep(cluster.number(os.environ, "COMI_HEARTBEAT", HEARTBEAT) + 3 * NEWS)


def of_all(error: Exception) -> bool:
    """Whether ``error`` comes from what several processes do together: the cause may be that another is gone.

    A JaxRuntimeError does. A program that fails as it is started raises a ValueError, as TensorStore does for a full
    disk: what is no OSError is this process's own only after the watch has heard of no other that is gone.
    """
    if jax.process_count() == 1:
        return False
    if isinstance(error, jax.errors.JaxRuntimeError):
        return True
    if not isinstance(error, OSError):
        listen()
    return False


def unexpected(error: Exception) -> str:
    """What to say of an ``error`` that nobody foresaw, whose traceback is printed: the others would wait for this
    process. It too may come of another that is gone. Raises ``error`` where there are none."""
    if jax.process_count() == 1:
        raise error
    traceback.print_exception(error)
    listen()
    return f"process {jax.process_index()} of {jax.process_count()} failed: {error!r}"


_TIDY: list[Callable[[], None]] = []


def _end(message: str, status: int) -> NoReturn:
    for tidy in _TIDY:
        with contextlib.suppress(OSError):
            tidy()
    print(f"error: {message}", file=sys.stderr, flush=True)
    os._exit(status)  # another thread waits in a collective, from which nothing calls it back
