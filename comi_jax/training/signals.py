"""Ending on request: SIGTERM and Ctrl-C finish the step and save; where nothing can be lost, they end the process.

Several processes end together, whichever of them was asked. None can finish a step without the others, so they agree on
where: see ``Stop._agree``.
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
# Exit status of a run that was asked to end before its last step and saved all: not 0, which would start what waits for
# its end, nor 75, after which a launcher starts it again at once. Jobs under HTCondor often say this by 85.
STOPPED = 85
SECOND = 130  # exit status after a second request, a shell's for Ctrl-C
REPEATED = 5.0  # seconds in which another SIGTERM is the same request: Slurm's daemon sends one, and so does srun
POLL = 0.5  # seconds between two looks at what the other processes were asked
ASKED, PLACE, OUT, LEAVING = "stop/asked", "stop/place/{}", "stop/out", "stop/leaving"


class Stop:
    """Whether the run was asked to end.

    The first signal sets ``requested``, here and in all other processes; while ``saved`` holds, in all of them, all
    work so far is on disk, and they end at once, with status STOPPED, even from within a compilation. A second
    signal ends the process that gets it at once in any case, but for a SIGTERM within REPEATED seconds of a SIGTERM.
    """

    def __init__(self, say: Callable[[str], None], leave: Callable[[], None], peers: Peers | None = None):
        self.requested = ""
        self._say, self._leave, self._peers = say, leave, peers  # ``leave`` tidies up before the process ends
        self._asked: tuple[str, float] | None = None  # the first signal that this very process got, and when
        self._saved = False
        self._steps = 0  # how often ``due`` was called, the same in all processes when they are at the same place
        self._until: float = float("inf")  # of several processes: at which of these calls they end
        self._held = False  # they are agreeing: where this process is must not change
        self._guard = threading.Condition()
        self._closed = threading.Event()

    @contextlib.contextmanager
    def listening(self) -> Iterator["Stop"]:
        """Take the signals over; outside a main thread, which gets none, do nothing."""
        if threading.current_thread() is not threading.main_thread():
            yield self
            return
        reads, writes = os.pipe()
        os.set_blocking(writes, False)
        # Python runs its handlers between two steps of the main thread, which may be compiling for minutes. The number
        # of a signal is written to the pipe at once, and read by a thread that is free.
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
        """While this holds, nothing is lost if the process ends."""
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
        """Whether to save and end here, between two steps. Every process calls it before every step."""
        with self._moving():
            self._steps += 1
            return self._steps >= self._until if self._peers else bool(self.requested)

    @contextlib.contextmanager
    def _moving(self) -> Iterator[None]:
        """Going to another place in the program, which waits while the processes agree."""
        with self._guard:
            self._guard.wait_for(lambda: not self._held)
            yield

    def _read(self, reads: int) -> None:
        while number := os.read(reads, 1):
            if number[0] in SIGNALS:
                self.request(signal.Signals(number[0]).name)

    def request(self, name: str) -> None:
        """Ask the run to end, as the signal ``name`` does."""
        with self._guard:
            now = time.monotonic()
            if self._asked and name == self._asked[0] == "SIGTERM" and now - self._asked[1] < REPEATED:
                return
            if self._asked:
                self._tell(f"{name}: ending at once; the newest checkpoint stands")
                if self._peers:  # they end too, and need not wait until nothing is heard from this process
                    news = f"{SECOND} it got {name} twice"
                    thread = threading.Thread(target=self._inform, args=(self._peers, "left", news), daemon=True)
                    thread.start()
                    thread.join(1)
                self._end(SECOND)
            self._asked = (name, now)
            self._hear(name)
            if self._saved and not self._peers:
                self._end(STOPPED)

    def _hear(self, name: str) -> None:
        if self.requested:
            return
        self.requested = name
        if self._peers:
            self._tell(f"{name}: all processes save what is not saved, then end; once more ends at once")
        elif self._saved:
            self._tell(f"{name}: ending; there is nothing to save")
        else:
            self._tell(f"{name}: saving after this step, then ending; once more ends at once")

    def _tell(self, words: str) -> None:
        """Say ``words``. A pipe whose reader is gone does not keep a run from ending."""
        with contextlib.suppress(OSError, SystemExit):  # rich's answer to a broken pipe
            self._say(words)

    def _end(self, status: int) -> None:
        try:
            self._leave()
        finally:
            self._exit(status)

    _exit = staticmethod(os._exit)

    # --- several processes --------------------------------------------------------------------------------------------

    def _inform(self, peers: Peers, what: str, value: str) -> None:
        with contextlib.suppress(jax.errors.JaxRuntimeError):  # without the store, the watch ends this process
            peers.say(what, value)

    def _agree(self, peers: Peers) -> None:
        """Once any process was asked to end: find, in rounds, where all can.

        In each round every process says where it is, "saved" or the number of its step, and stays there until all have
        said so. If nothing is lost in any, they end, the first one last, for it holds the store in which they talk. If
        all are stepping, they will end before the step behind the furthest one's. Else they look again.
        """
        with contextlib.suppress(jax.errors.JaxRuntimeError):  # without the store, the watch ends this process
            while not (asked := peers.said(ASKED)):
                if self._asked:
                    peers.say(ASKED, self.requested)
                elif self._closed.wait(POLL):
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
                if self._closed.wait(POLL):
                    return

    def _places(self, peers: Peers, number: int) -> list[str] | None:
        """Where all are in this round; None if they will not all say, because one is through."""
        while True:
            out = peers.said(OUT)  # first: one that acted upon the round had said where it is
            places = peers.said(PLACE.format(number))
            if len(places) == peers.count:
                return list(places.values())
            if out or self._closed.wait(POLL / 5):
                return None

    def _end_together(self, peers: Peers) -> None:
        """End this process with status STOPPED, the first one after all others."""
        try:
            self._leave()
            if peers.index:
                peers.say(LEAVING, "")
            else:
                while len(peers.said(LEAVING)) < peers.count - 1:  # the watch ends this one should another be dead
                    time.sleep(0.05)
                time.sleep(0.2)
        finally:
            self._exit(STOPPED)
