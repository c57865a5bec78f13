"""The engine of a server: one thread that owns the device, and takes jobs from the threads that serve connections.

    submit -> waiting -> prepared (encoded, compressed), when a slot is free -> one token a step -> closed

Between two steps one segment at most is prepared, so that a long context does not stop the answers beside it, nor, see
``turns``, the questions behind it. A job that is cancelled, late or aborted loses its slot before the next step.
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from comi_jax.errors import UserError
from comi_jax.serving.contexts import Ask, Ingest, Prepared, Preparer, Steps
from comi_jax.serving.remote import RemoteDecoder, RemoteEvent, RemoteHandle
from comi_jax.serving.settings import Settings
from comi_jax.serving.slots import BusyError, Event, Handle, SlotDecoder
from comi_jax.serving.telemetry import Telemetry
from comi_jax.serving.turns import Turns

COMPILING, READY, DRAINING, DEAD = "compiling", "ready", "draining", "dead"
USUAL = 1.0  # seconds of an answer, until one was measured
SHARE = 0.1  # of the newest answer in the average time of one


class EngineError(UserError):
    """A job that was accepted and cannot be finished, through no fault of its own."""


class DeadlineError(EngineError):
    """A job that was not finished in time."""


class ShutdownError(EngineError):
    """A job that the shutdown of the server has cut off."""


class CancelledError(EngineError):
    """A job whose client has left."""


@dataclass(frozen=True)
class Piece:
    """A token of an answer: the text that became certain with it; with the last one, the reason of the end."""

    text: str
    tokens: int  # of the answer so far
    finish_reason: str | None


# What happens to a job: it is prepared; a token comes; a text is stored; or it has failed, which ends it.
Happening = Prepared | Piece | BaseException


@dataclass(eq=False)
class Job:
    """One piece of work. ``tell`` is called in the engine's thread with each happening, and must return at once."""

    work: Ask | Ingest
    tell: Callable[[Happening], None]
    long: bool  # whether it takes many steps to prepare it
    steps: Steps | None = None  # once they have begun
    arrived: float = field(default_factory=time.perf_counter)
    handle: Handle | RemoteHandle | None = None  # while it has a slot or waits for its prefill
    closed: bool = False  # it is finished or has failed; nothing is told of it any more
    first_token: float | None = None
    last_token: float = 0.0


class Engine:
    """The thread, and the queue in front of it. ``submit``, ``cancel``, ``abort`` and the properties may be used from
    any thread."""

    def __init__(
        self, preparer: Preparer, decoder: SlotDecoder | RemoteDecoder, settings: Settings, telemetry: Telemetry
    ):
        self.preparer, self.settings, self.telemetry = preparer, settings, telemetry
        self.defaults = decoder.defaults  # of decoding
        self.state = COMPILING
        self._decoder: Any = decoder
        self._waiting: deque[Job] = deque()
        self._preparing: Turns[Job] = Turns(self._waiting)
        self._decoding: dict[Handle | RemoteHandle, Job] = {}
        self._wake = threading.Condition()  # its lock guards all of the above
        self._stopping = False
        self._seconds = USUAL  # that an answer takes on average
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        """Compile in the thread, then serve; ``state`` says how far it is."""
        self._thread.start()

    def stop(self, seconds: float) -> bool:
        """End the thread after its present step. Returns whether it ended within ``seconds``."""
        with self._wake:
            self._stopping = True
            self._wake.notify()
        if isinstance(self._decoder, RemoteDecoder):
            self._decoder.close()
        self._thread.join(seconds)
        return not self._thread.is_alive()

    @property
    def open(self) -> int:
        """The number of jobs that are not finished."""
        with self._wake:
            return self._count()

    @property
    def retry_after(self) -> int:
        """Seconds, 1 to 60, after which a place in the queue should be free."""
        with self._wake:
            waves = len(self._waiting) / self.settings.slots + 1
        return min(60, max(1, round(waves * self._seconds)))

    def submit(self, work: Ask | Ingest, tell: Callable[[Happening], None]) -> Job:
        """Queue ``work``. Raises BusyError if as many jobs are open as may be, EngineError if the thread is dead."""
        job = Job(work, tell, self.preparer.is_long(work))
        with self._wake:
            if self.state == DEAD:
                raise EngineError("the engine has failed")
            if self._count() >= self.settings.most_requests:
                raise BusyError(f"{self._count()} requests are open, as many as may be; ask again later")
            self._waiting.append(job)
            self._report()
            self._wake.notify()
        return job

    def cancel(self, job: Job) -> None:
        """End ``job``, if it is open: a slot of it is free before the next step."""
        with self._wake:
            self._fail(job, CancelledError("the client has left"))

    def drain(self) -> None:
        """Take no more jobs from now on, and finish those that are open."""
        with self._wake:
            if self.state != DEAD:
                self.state = DRAINING

    def abort(self) -> None:
        """End all jobs with ShutdownError."""
        with self._wake:
            for job in self._all():
                self._fail(job, ShutdownError("the server is shutting down"))

    # --- the thread ---------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            self.preparer.compile(lambda: self._stopping)
            self._decoder.compile()
            with self._wake:
                if self.state == COMPILING:
                    self.state = READY
            while self._wait():
                self._expire()
                self._prepare()
                if self._decoding:
                    for event in self._decoder.step():
                        self._deliver(event)
        except BaseException as error:  # whatever it was, nobody may wait for this thread any more
            logging.getLogger(__name__).exception("the engine has failed")
            with self._wake:
                self.state = DEAD
                for job in self._all():
                    self._fail(job, error)

    def _wait(self) -> bool:
        """Wait for work. Returns False when the thread is to end."""
        with self._wake:
            while not self._stopping and not self._count():
                self._wake.wait()
            return not self._stopping

    def _expire(self) -> None:
        oldest = time.perf_counter() - self.settings.deadline
        with self._wake:
            for job in self._all():
                if job.arrived < oldest:
                    self._fail(job, DeadlineError(f"no answer within {self.settings.deadline:g} seconds"))

    def _prepare(self) -> None:
        """One step of a job that is being prepared, or begins to be."""
        with self._wake:
            job = self._preparing.next(lambda job: not isinstance(job.work, Ask) or not self._full())
            self._report()
        if job is None:
            return
        if job.steps is None:
            self.telemetry.queued.observe(time.perf_counter() - job.arrived)
            job.steps = self.preparer.prepare(job.work)
        if job.closed:
            job.steps.close()
            return self._prepared(job, None)
        try:
            next(job.steps)
        except StopIteration as end:
            self._prepared(job, end.value)
        except Exception as error:  # of this job alone: the slots have no part in it
            if not isinstance(error, UserError):
                logging.getLogger(__name__).exception("a job could not be prepared")
            self._prepared(job, error)

    def _prepared(self, job: Job, made: Prepared | Exception | None) -> None:
        """Go on with what the job has become; None: it was closed meanwhile."""
        with self._wake:
            self._preparing.end(job)
            if isinstance(made, Exception):
                self._fail(job, made)
            elif made is None:
                pass
            elif isinstance(job.work, Ask):
                self._begin(job, job.work, made)
            elif job.closed:  # in its last step
                self.preparer.store.drop(job.work.name)
            else:
                job.closed = True
                job.tell(made)
            self._report()

    def _begin(self, job: Job, work: Ask, made: Prepared) -> None:
        if job.closed:
            return
        try:
            handle = self._decoder.submit(made.prompt, work.options)
        except UserError as error:  # a prompt that is longer than a slot
            return self._fail(job, error)
        job.handle, self._decoding[handle] = handle, job
        job.tell(made)

    def _deliver(self, event: Event | RemoteEvent) -> None:
        now = time.perf_counter()
        with self._wake:
            job = self._decoding.get(event.handle)
            if job is None:  # it was cancelled after the step
                return
            if isinstance(event, RemoteEvent) and event.error is not None:
                return self._fail(job, event.error)
            if job.first_token is None:
                job.first_token = now
                self.telemetry.first_token.observe(now - job.arrived)
            else:
                self.telemetry.between_tokens.observe(now - job.last_token)
            job.last_token = now
            self.telemetry.generation_tokens.inc()
            if event.finish_reason:
                job.closed = True
                del self._decoding[event.handle]
                self._seconds += SHARE * (now - job.first_token - self._seconds)
                self.telemetry.latency.observe(now - job.arrived)
                self.telemetry.succeeded.labels(event.finish_reason).inc()
                self._report()
            job.tell(Piece(event.text, len(event.handle.tokens), event.finish_reason))

    # --- with the lock held -------------------------------------------------------------------------------------------

    def _all(self) -> list[Job]:
        return [*self._waiting, *self._preparing, *self._decoding.values()]

    def _count(self) -> int:
        return len(self._waiting) + len(self._preparing) + len(self._decoding)

    def _full(self) -> bool:
        """Whether all slots are taken, by answers and by questions that are being prepared."""
        return len(self._decoding) + sum(isinstance(job.work, Ask) for job in self._preparing) >= self.settings.slots

    def _fail(self, job: Job, error: BaseException) -> None:
        """End ``job`` with ``error``, if it is open. One that is being prepared is given up behind its present step."""
        if job.closed:
            return
        job.closed = True
        if job.handle is not None:
            del self._decoding[job.handle]
            self._decoder.cancel(job.handle)
        elif job in self._waiting:
            self._waiting.remove(job)
        if isinstance(error, CancelledError):
            self.telemetry.cancelled.inc()
        job.tell(error)
        self._report()

    def _report(self) -> None:
        self.telemetry.waiting.set(len(self._waiting))
        self.telemetry.running.set(self._count() - len(self._waiting))
