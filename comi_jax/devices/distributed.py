"""One run of several processes: how they join, and what happens when a peer process is gone.

A single process needs none of this. A launcher (``launch/``) starts several processes with the same command.
``cluster`` finds the index of this one, ``rollcall`` is the rendezvous at the coordinator (process 0), and
``jax.distributed`` then connects them.

Every process sends heartbeats to the coordinator. A process whose heartbeat is missing for COMI_HEARTBEAT seconds is
dead, stopped or cut off. The others name it and exit, because no step can finish without it.
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

from comi_jax.devices import cluster, rollcall
from comi_jax.errors import ConfigError

HEARTBEAT = 60  # seconds; JAX's own default is 100
AGAIN = 75  # exit status when a peer process is gone: EX_TEMPFAIL of sysexits.h, "try again"
DONE = "done"  # the last heartbeat of a process that ends normally
NEWS = 3.0  # seconds until every process has seen a peer's message


def start(environment: Mapping[str, str] = os.environ) -> None:
    """Join the peer processes of this run, if any, and start the watchdog. Call it before JAX is used.

    Raises ConfigError for variables that are incomplete or contradict each other, and if the peers cannot be reached.
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
    jax.config.update("jax_enable_preemption_service", False)  # handles only SIGTERM, at steps: see signals.py
    os.environ["no_grpc_proxy"] = cluster.address(member.coordinator)[0]  # proxies cannot reach it
    jax.config.update("jax_check_proxy_envs", False)
    try:
        # JAX's own cluster detection would take one GPU per task under Slurm. Its heartbeat timeout is longer than the
        # watchdog's, because it is only the fallback: its error does not tell the user which host is lost.
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
    """Whether this is process 0, which writes the files that exist once per run."""
    return jax.process_index() == 0


def meet(name: str) -> None:
    """A barrier called ``name`` over all processes, at the coordinator. It needs no device, so the wait may be long.
    Does nothing in a run of one process."""
    if jax.process_count() > 1:
        _store().wait_at_barrier(name, 2**31 - 1)


def _store() -> Any:
    """The coordinator's key-value store and barriers; it exists in every run of several processes."""
    return jax_distributed.global_state.client


def agreed(value: Any) -> Any:
    """Process 0's ``value`` in every process: a tree of numeric NumPy arrays, of the same shapes in all processes."""
    return multihost_utils.broadcast_one_to_all(value) if jax.process_count() > 1 else value


class Peers:
    """The processes of a run, and their messages to each other through the coordinator's key-value store.

    A failed request is retried for ``patience`` seconds, as a busy coordinator may be slow to answer. After that its
    JaxRuntimeError is raised, as a coordinator that is gone does not come back.
    """

    def __init__(self, store: Any, index: int, count: int, patience: float = HEARTBEAT):
        self.index, self.count = index, count
        self._store, self._patience = store, patience

    def say(self, what: str, value: str) -> None:
        """Publish ``value`` under the key ``what`` of this process."""
        self._ask(self._store.key_value_set, f"comi/{what}/{self.index}", value, allow_overwrite=True)

    def said(self, what: str) -> dict[int, str]:
        """The values published under ``what`` so far, by process index."""
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
    """The processes of this run; None for a single process or before they have joined. Does not initialise JAX."""
    if jax_distributed.global_state.client is None or jax.process_count() == 1:
        return None
    patience = cluster.number(os.environ, "COMI_HEARTBEAT", HEARTBEAT)
    return Peers(_store(), jax.process_index(), jax.process_count(), patience)


class Watch(threading.Thread):
    """The watchdog: sends this process's heartbeats, and ends this process when a peer process is gone."""

    def __init__(self, peers: Peers, timeout: float, end: Callable[[str, int], None] | None = None):
        super().__init__(name="comi-watch", daemon=True)
        self._peers, self._timeout, self._end = peers, timeout, end or _end
        self._closed = threading.Event()
        self._answered = time.monotonic()  # time of the coordinator's last answer
        self._names: dict[int, str] = {}

    def close(self) -> None:
        """Stop before the interpreter exits: a thread that is killed inside JAX's C++ would abort the process."""
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
        """End this process if the coordinator has not answered within the timeout.

        A call over a cut connection returns after minutes; by then JAX would have ended the process without naming the
        cause.
        """
        while not self._closed.wait(min(1.0, self._timeout / 5)):
            if time.monotonic() - self._answered > self._timeout:
                self._end(self._no_answer(), AGAIN)
                return

    def _listen(self) -> None:
        peers, beat = self._peers, 0
        heard: dict[int, tuple[str, float]] = {}  # by process: its last heartbeat and when it arrived
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
                if left and peers.index not in left:  # a process that published "left" is exiting already
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
        self._closed.set()  # the reason is known: the clock must not give another one meanwhile
        if self._peers.index == 0:  # it hosts the store, which the peers still have to read
            time.sleep(min(NEWS, self._timeout))
        self._end(message, status)

    def _message(self, process: int) -> str:
        return (
            f"{self._who(process)} has sent no heartbeat for {self._timeout:.0f} s: it is dead, stopped or cut off. "
            "This process exits too; restart all processes to resume from the last checkpoint"
        )

    def _no_answer(self) -> str:
        return (
            f"the coordinator, {self._who(0)}, does not answer. This process exits too; restart all processes to "
            "resume from the last checkpoint"
        )

    def _who(self, process: int) -> str:
        return f"process {process} of {self._peers.count} ({self._names.get(process, 'host unknown')})"


@contextlib.contextmanager
def tidying(tidy: Callable[[], None]) -> Iterator[None]:
    """Within this context, ``tidy`` runs before the watchdog, or ``leave`` in a run of several, ends this process."""
    _TIDY.append(tidy)
    try:
        yield
    finally:
        _TIDY.remove(tidy)


def leave(message: str, status: int = 1) -> NoReturn:
    """End this process and its peers with the exit status ``status`` and ``message`` on standard error. All exit with
    the same status, so that a launcher does not restart a run that the user has to fix. A single process exits with
    status 1."""
    everyone = peers()
    if everyone is None:
        sys.exit(f"error: {message}")
    with contextlib.suppress(jax.errors.JaxRuntimeError):  # no peer is left to tell
        everyone.say("left", f"{status} {message}")
        time.sleep(NEWS)
    _end(message, status)


def failed(error: Exception) -> tuple[str, int]:
    """The message and exit status for an ``error`` in a step. First gives the watchdog time to end this process with a
    better message, as a lost peer process may be the cause. Raises ``error`` in a run of one process."""
    if jax.process_count() == 1:
        raise error
    listen()
    reason = str(error).splitlines()[0]
    status = 1 if reason.startswith(("RESOURCE_EXHAUSTED", "INVALID_ARGUMENT")) else AGAIN  # 1: would fail again
    return f"a step failed in process {jax.process_index()} of {jax.process_count()}: {reason}", status


def listen() -> None:
    """Wait long enough for the watchdog to notice that a peer process is gone. If one is, the watchdog ends this
    process. The wait covers its polling interval and the delay of process 0, whose exit takes the store with it."""
    time.sleep(cluster.number(os.environ, "COMI_HEARTBEAT", HEARTBEAT) + 3 * NEWS)


def of_all(error: Exception) -> bool:
    """Whether ``error`` comes from a collective operation, so that the cause may be a lost peer process.

    A JaxRuntimeError does. A ValueError may come from a program that fails at dispatch, or from TensorStore on a full
    disk. So for anything but an OSError, the watchdog first gets time to end this process; if it does not, the error
    is this process's own.
    """
    if jax.process_count() == 1:
        return False
    if isinstance(error, jax.errors.JaxRuntimeError):
        return True
    if not isinstance(error, OSError):
        listen()
    return False


def unexpected(error: Exception) -> str:
    """The message for an unexpected ``error``, after printing its traceback. The caller ends this process with it, as
    the peers would wait for this process forever. A lost peer may be the cause, so the watchdog gets time to act
    first. Raises ``error`` in a run of one process."""
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
    os._exit(status)  # another thread may be blocked in a collective, which cannot be interrupted
