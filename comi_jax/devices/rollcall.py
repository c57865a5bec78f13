"""The rendezvous of all processes at process 0 before JAX starts; JAX's own aborts without naming who is missing.

Process 0 listens on the coordinator's port. Every process connects and sends its identity; process 0 does so too, by
the host name that its peers use. When all have connected, each is told to continue, and JAX takes over the port.
"""

import contextlib
import errno
import os
import socket
import threading
import time

from comi_jax.devices import cluster
from comi_jax.devices.cluster import Member
from comi_jax.errors import ConfigError

HELLO, GO, REFUSED = "comi", "go", "refused "
TRY = 5.0  # seconds to connect, to receive one line, and to outwait process 0's deadline


def meet(member: Member, wait: int) -> None:
    """Return when all processes have connected. Raises ConfigError, in every process that can be reached, if some are
    missing after ``wait`` seconds, if two have the same index, or if they disagree on the number of processes."""
    until = time.monotonic() + wait
    if member.index:
        _call(member, wait, until)
        return
    with _listen(member, min(float(wait), 2 * TRY)) as server:
        thread = threading.Thread(target=_hold, args=(server, member, wait, until), daemon=True, name="roll call")
        thread.start()
        try:
            _call(member, wait, until)
        finally:
            thread.join()


def _call(member: Member, wait: int, until: float) -> None:
    """Send this process's identity to process 0 and wait for its answer; retry until ``until``."""
    host, port = cluster.address(member.coordinator)
    who = f"{HELLO} {member.index} {member.count} {socket.gethostname()}, pid {os.getpid()}\n"
    while True:
        left = max(until - time.monotonic(), 0.1)
        try:
            with socket.create_connection((host, port), timeout=min(left, TRY)) as line:
                line.settimeout(left + TRY)
                line.sendall(who.encode())
                answer = line.makefile(errors="replace").readline().rstrip("\n")
            reason = "another program answers on that port"
        except OSError as error:
            answer, reason = "", error.strerror or str(error)
        if answer == GO:
            return
        if answer.startswith(REFUSED):
            raise ConfigError(answer.removeprefix(REFUSED))
        if time.monotonic() > until:
            raise ConfigError(
                f"process {member.index} of {member.count} ({socket.gethostname()}) could not reach process 0 at "
                f"{host}:{port} within {wait} s: {reason}; check the host name, that process 0 is running "
                "there, and that no firewall blocks the port (COMI_JOIN_TIMEOUT sets the time to wait)"
            )
        time.sleep(min(0.5, left))


def _listen(member: Member, patience: float) -> socket.socket:
    """A socket that listens on the coordinator's port, on all addresses, as JAX's will."""
    _, port = cluster.address(member.coordinator)
    until = time.monotonic() + patience  # an earlier process may be about to free the port
    both = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if both else socket.AF_INET
    while True:
        try:
            return socket.create_server(("", port), family=family, dualstack_ipv6=both, backlog=4096)
        except OSError as error:
            if error.errno != errno.EADDRINUSE or time.monotonic() > until:
                raise ConfigError(
                    f"process 0 of {member.count} cannot listen on port {port} of {socket.gethostname()}: "
                    f"{os.strerror(error.errno or 0)}; use another port in COMI_COORDINATOR, or end the process that "
                    "holds this one"
                ) from None
            time.sleep(0.2)


def _hold(server: socket.socket, member: Member, wait: int, until: float) -> None:
    """Accept connections until every process has connected, one contradicts the others or time is up; answer all."""
    here: dict[int, tuple[socket.socket, str]] = {}
    lines, answer = [], ""
    while not answer:
        server.settimeout(max(until - time.monotonic(), 0.01))
        try:
            lines.append(server.accept()[0])
        except TimeoutError:
            missing = ", ".join(str(index) for index in range(member.count) if index not in here)
            answer = (
                f"{REFUSED}processes {missing} of {member.count} did not connect to {member.coordinator} within "
                f"{wait} s; check their output, and restart all"
            )
            break
        index, count, name = _hear(lines[-1])
        here = {known: entry for known, entry in here.items() if not _hung_up(entry[0])}
        if index < 0:  # an unrelated connection
            lines.pop().close()
        elif count != member.count:
            answer = (
                f"{REFUSED}process {index} ({name}) has COMI_PROCESSES={count}, but process 0 has {member.count}; "
                "give all processes the same number"
            )
        elif index in here:
            answer = f"{REFUSED}two processes have the index {index}: {here[index][1]} and {name}; give each its own"
        else:
            here[index] = (lines[-1], name)
            answer = GO if len(here) == count else ""
    for line in lines:
        _answer(line, answer)
    if answer != GO:  # latecomers get the same answer
        server.settimeout(TRY)
        until = time.monotonic() + TRY
        with contextlib.suppress(TimeoutError):
            while time.monotonic() < until:
                line = server.accept()[0]
                _hear(line)
                _answer(line, answer)


def _answer(line: socket.socket, words: str) -> None:
    """Send ``words`` to a process, which may have disconnected meanwhile."""
    with contextlib.suppress(OSError), line:
        line.settimeout(TRY)
        line.sendall(f"{words}\n".encode())


def _hear(line: socket.socket) -> tuple[int, int, str]:
    """Process index, process count and name that a connection sends; an index below 0 if it sends anything else."""
    line.settimeout(TRY)
    try:
        words = line.makefile(errors="replace").readline(200).split(maxsplit=3)
    except OSError:
        words = []
    if len(words) < 4 or words[0] != HELLO or not (words[1].isdecimal() and words[2].isdecimal()):
        return -1, 0, ""
    return int(words[1]), int(words[2]), words[3].strip()


def _hung_up(line: socket.socket) -> bool:
    """Whether a process that waits for its answer has disconnected."""
    try:
        line.setblocking(False)
        return line.recv(1, socket.MSG_PEEK) == b""
    except BlockingIOError:
        return False
    except OSError:
        return True
