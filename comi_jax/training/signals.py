"""Graceful shutdown: SIGTERM and Ctrl-C finish the step and save; if everything is saved, they exit at once.

A signal to any process stops all of them. As a step needs every process, they agree on the last one (``Stop._agree``).
"""

import contextlib
import itertools
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator

import jax

from comi_jax.devices.distributed import Peers

SIGNALS = (signal.SIGTERM, signal.SIGINT)
# Exit status of a run that was stopped before its last step and saved everything: not 0, which would start what waits
# for its end, nor 75, after which a launcher restarts it at once. Jobs under HTCondor often use 85 for this.
STOPPED = 85
SECOND = 130  # exit status after a second signal, as a shell's after Ctrl-C
REPEATED = 5.0  # seconds within which another SIGTERM is the same request: Slurm's daemon sends one, and so does srun
POLL = 0.5  # seconds between polls of the other processes' requests
ASKED, PLACE, OUT, LEAVING = "stop/asked", "stop/place/{}", "stop/out", "stop/leaving"


class Stop:
    """The shutdown request of a run.

    The first signal sets ``requested`` in all processes. While all of them are within ``saved``, all work is on disk,
    and they exit at once with status STOPPED, even during a compilation. A second signal to the same process exits it
    at once in any case, except a SIGTERM within REPEATED seconds of a SIGTERM.
    """

    def __init__(self, say: Callable[[str], None], leave: Callable[[], None], peers: Peers | None = None):
        self.requested = ""
        self._say, self._leave, self._peers = say, leave, peers  # ``leave`` cleans up before the process exits
        self._asked: tuple[str, float] | None = None  # the first signal that this process itself got, and when
        self._saved = False
        self._steps = 0  # calls of ``due``, which are the same in all processes
        self._until: float = float("inf")  # with several processes: the call of ``due`` at which they stop
        self._held = False  # during a round of agreement, in which this process must not advance
        self._guard = threading.Condition()
        self._closed = threading.Event()
        self._woken = threading.Event()  # by a signal to this process, or by the end

    @contextlib.contextmanager
    def listening(self) -> Iterator["Stop"]:
        """Handle the signals. Does nothing outside the main thread, which alone can receive them."""
        if threading.current_thread() is not threading.main_thread():
            yield self
            return
        reads, writes = os.pipe()
        os.set_blocking(writes, False)
        # Python runs signal handlers between bytecodes of the main thread, which may be compiling for minutes. The
        # wakeup pipe gets the signal's number at once, and a thread reads it.
        before = {number: signal.signal(number, lambda *_: None) for number in SIGNALS}
        wakeup = signal.set_wakeup_fd(writes, warn_on_full_buffer=False)
        threads = [threading.Thread(target=self._read, args=(reads,), daemon=True, name="signals")]
        if self._peers:
            threads.append(threading.Thread(target=self._agree, args=(self._peers,), daemon=True, name="agreement"))
        for thread in threads:
            thread.start()
        try:
            yield self
        finally:
            self._closed.set()
            self._woken.set()
            if self._peers:
                self._inform(self._peers, OUT, "")
            signal.set_wakeup_fd(wakeup)
            for number, handler in before.items():
                signal.signal(number, handler)
            os.close(writes)
            for thread in threads:
                thread.join()
            os.close(reads)

    @contextlib.contextmanager
    def saved(self) -> Iterator[None]:
        """Marks a section in which nothing is lost if the process exits."""
        with self._moving():
            self._saved = True
            if self.requested and not self._peers:
                self._end(STOPPED)
        try:
            yield
        finally:
            with self._moving():
                self._saved = False

    def due(self) -> bool:
        """Whether to save and stop here, between two steps. All processes call it before each step."""
        with self._moving():
            self._steps += 1
            return self._steps >= self._until if self._peers else bool(self.requested)

    @contextlib.contextmanager
    def _moving(self) -> Iterator[None]:
        """Guards a change of this process's position, which waits for the end of a round of agreement."""
        with self._guard:
            self._guard.wait_for(lambda: not self._held)
            yield

    def _read(self, reads: int) -> None:
        while number := os.read(reads, 1):
            if number[0] in SIGNALS:
                self.request(signal.Signals(number[0]).name)

    def request(self, name: str) -> None:
        """Request a shutdown, as the signal ``name`` does."""
        with self._guard:
            now = time.monotonic()
            if self._asked and name == self._asked[0] == "SIGTERM" and now - self._asked[1] < REPEATED:
                return
            if self._asked:
                self._tell(f"{name}: exiting at once; the newest checkpoint is kept")
                if self._peers:  # so that they exit without waiting for the heartbeat's timeout
                    news = f"{SECOND} it got {name} twice"
                    thread = threading.Thread(target=self._inform, args=(self._peers, "left", news), daemon=True)
                    thread.start()
                    thread.join(1)
                self._end(SECOND)
            self._asked = (name, now)
            self._woken.set()
            self._hear(name)
            if self._saved and not self._peers:
                self._end(STOPPED)

    def _hear(self, name: str) -> None:
        if self.requested:
            return
        self.requested = name
        if self._peers:
            self._tell(f"{name}: all processes save unsaved work, then exit; signal again to exit at once")
        elif self._saved:
            self._tell(f"{name}: exiting; there is nothing to save")
        else:
            self._tell(f"{name}: saving after this step, then exiting; signal again to exit at once")

    def _tell(self, words: str) -> None:
        """Print ``words``; a broken pipe does not prevent the shutdown."""
        with contextlib.suppress(OSError, SystemExit):  # rich exits on a broken pipe
            self._say(words)

    def _end(self, status: int) -> None:
        try:
            self._leave()
        finally:
            self._exit(status)

    _exit = staticmethod(os._exit)

    # --- several processes --------------------------------------------------------------------------------------------

    def _inform(self, peers: Peers, what: str, value: str) -> None:
        with contextlib.suppress(jax.errors.JaxRuntimeError):  # if the store is gone, the watchdog ends this process
            peers.say(what, value)

    def _agree(self, peers: Peers) -> None:
        """After a signal to any process: agree, in rounds, on where all processes stop.

        In each round every process publishes its position, "saved" or the number of its step, and stays there until all
        have done so. If all are "saved", they exit, the first process last, as it hosts the key-value store. If all are
        in a step, all stop after the highest step reported. Otherwise, another round follows.
        """
        with contextlib.suppress(jax.errors.JaxRuntimeError):  # if the store is gone, the watchdog ends this process
            while not (asked := peers.said(ASKED)):
                if self._asked:
                    peers.say(ASKED, self.requested)
                else:
                    self._woken.wait(POLL)
                    if self._closed.is_set():
                        return
            with self._guard:
                self._hear(next(iter(asked.values())))
            for number in itertools.count():
                with self._guard:
                    self._held = True
                    place = "saved" if self._saved else str(self._steps)
                try:
                    peers.say(PLACE.format(number), place)
                    places = self._places(peers, number)
                    if places is None:
                        return
                    if all(place == "saved" for place in places):
                        self._end_together(peers)
                    if "saved" not in places:
                        self._until = min(self._until, max(map(int, places)) + 1)
                finally:
                    with self._guard:
                        self._held = False
                        self._guard.notify_all()
                # Until they agree, a round follows soon: in the pause the last steps of a run could pass.
                if self._closed.wait(POLL if self._until < float("inf") else POLL / 5):
                    return

    def _places(self, peers: Peers, number: int) -> list[str] | None:
        """The positions of all processes in this round; None if one has finished and will not publish its position."""
        while True:
            # Asked before the positions: a process that finished after this round has published its own.
            out = peers.said(OUT)
            places = peers.said(PLACE.format(number))
            if len(places) == peers.count:
                return list(places.values())
            if out or self._closed.wait(POLL / 5):
                return None

    def _end_together(self, peers: Peers) -> None:
        """Exit with status STOPPED, the first process after all others."""
        try:
            self._leave()
            if peers.index:
                peers.say(LEAVING, "")
            else:
                while len(peers.said(LEAVING)) < peers.count - 1:  # if another dies, the watchdog ends this one
                    time.sleep(0.05)
                time.sleep(0.2)
        finally:
            self._exit(STOPPED)
