"""Ending on request: SIGTERM and Ctrl-C finish the step and save; where nothing can be lost, they end the process."""

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator

SIGNALS = (signal.SIGTERM, signal.SIGINT)
SECOND = 130  # exit status after a second request, a shell's for Ctrl-C


class Stop:
    """Whether the run was asked to end.

    The first signal sets ``requested``; while ``saved`` holds, all work so far is on disk, and the process ends at
    once, with status 0, even from within a compilation. A second signal ends it at once in any case.
    """

    def __init__(self, say: Callable[[str], None], leave: Callable[[], None]):
        self.requested = ""
        self.asked = 0  # how often several processes have agreed on whether to end
        self._say, self._leave = say, leave  # ``leave`` tidies up before the process ends
        self._saved, self._guard = False, threading.Lock()

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
        reader = threading.Thread(target=self._read, args=(reads,), daemon=True, name="signals")
        reader.start()
        try:
            yield self
        finally:
            signal.set_wakeup_fd(wakeup)
            for number, handler in before.items():
                signal.signal(number, handler)
            os.close(writes)
            reader.join()
            os.close(reads)

    @contextlib.contextmanager
    def saved(self) -> Iterator[None]:
        """While this holds, nothing is lost if the process ends."""
        with self._guard:
            self._saved = True
            if self.requested:
                self._end(0)
        try:
            yield
        finally:
            with self._guard:
                self._saved = False

    def _read(self, reads: int) -> None:
        while number := os.read(reads, 1):
            if number[0] in SIGNALS:
                self.request(signal.Signals(number[0]).name)

    def request(self, name: str) -> None:
        """Ask the run to end, as the signal ``name`` does."""
        with self._guard:
            if self.requested:
                self._say(f"{name}: ending at once; the newest checkpoint stands")
                self._end(SECOND)
            self.requested = name
            if self._saved:
                self._say(f"{name}: ending; there is nothing to save")
                self._end(0)
            self._say(f"{name}: saving after this step, then ending; once more ends at once")

    def _end(self, status: int) -> None:
        self._leave()
        os._exit(status)
