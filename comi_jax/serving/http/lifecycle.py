"""From a checkpoint to a server that listens, and its end: a first SIGTERM drains, a second one ends it at once."""

import copy
import dataclasses
import logging
import time
from collections.abc import Sequence
from types import FrameType

import uvicorn
from starlette.types import ASGIApp

from comi_jax.serving.compressor import Comi
from comi_jax.serving.contexts import Preparer
from comi_jax.serving.endpoint import Endpoint
from comi_jax.serving.engine import DEAD, Engine
from comi_jax.serving.http.server import build
from comi_jax.serving.remote import RemoteDecoder
from comi_jax.serving.saved_documents import SavedDocuments
from comi_jax.serving.settings import LOOPBACK, Settings
from comi_jax.serving.store import DocumentStore
from comi_jax.serving.telemetry import Telemetry

FIRST_BUCKET = 256  # tokens
CUT = 5.0  # seconds in which connections must end once the drain is over
HEADERS = 32 * 1024  # bytes of a request line and headers, at most
KEEP_ALIVE = 75  # seconds that an idle connection stays open, longer than clients keep theirs


def engine_of(comi: Comi, settings: Settings) -> Engine:
    """The engine of a server for ``comi``."""
    telemetry = Telemetry()
    store = DocumentStore(settings.store_bytes, settings.host_bytes, say=lambda _: telemetry.evictions.inc())
    if settings.decoder:
        endpoint, defaults = Endpoint(settings.decoder, settings.decoder_key), comi.run.config.generation
        slots = RemoteDecoder(
            endpoint, comi.run.stop, comi.tokenizer, defaults, slots=settings.slots, length=settings.slot_length
        )
        comi = copy.copy(comi)
        comi.params = {**comi.params, "decoder": {"embed": comi.params["decoder"]["embed"]}}  # the rest is not used
    else:
        slots = comi.slots(settings.slots, settings.slot_length, waiting=0)
    saved = SavedDocuments(settings.documents, comi.origin) if settings.documents else None
    return Engine(Preparer(comi, store, settings, telemetry, saved), slots, settings, telemetry)


class Server(uvicorn.Server):
    """A uvicorn server that, told to end, goes on listening until accepted requests are finished, so that others are
    told to come back later."""

    def __init__(self, app: ASGIApp, engine: Engine, host: str, port: int):
        super().__init__(
            uvicorn.Config(
                app,
                host=host,
                port=port,
                http="h11",
                ws="none",
                lifespan="off",
                log_config=None,
                access_log=False,
                server_header=False,
                timeout_graceful_shutdown=int(CUT),
                timeout_keep_alive=KEEP_ALIVE,
                h11_max_incomplete_event_size=HEADERS,
            )
        )
        self._engine = engine
        self._drained_by: float | None = None  # of time.monotonic; None: not draining

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Drain on the first signal, end on the second."""
        del sig, frame
        if self._drained_by is None:
            self.drain()
        else:
            self.should_exit = self.force_exit = True

    def drain(self) -> None:
        """Refuse new requests, and end when those that were accepted are answered or the time for it is over."""
        self._drained_by = time.monotonic() + self._engine.settings.drain
        self._engine.drain()

    async def on_tick(self, counter: int) -> bool:
        """Called ten times a second; True ends the server."""
        if self._drained_by is not None and not self.should_exit:
            late = time.monotonic() > self._drained_by
            if late:
                self._engine.abort()
            self.should_exit = late or not self._engine.open
        return await super().on_tick(counter)


def with_buckets(comi: Comi) -> Comi:
    """``comi`` with contexts padded to powers of two, unless its run says what to: half as many programs to compile."""
    config = comi.run.config
    if not config.data.buckets:
        buckets = tuple(FIRST_BUCKET * 2**k for k in range(30) if FIRST_BUCKET * 2**k < config.compression.segment_size)
        data = dataclasses.replace(config.data, buckets=buckets)
        comi.run = dataclasses.replace(comi.run, config=dataclasses.replace(config, data=data))
    return comi


def serve(comi: Comi, settings: Settings, host: str, port: int, keys: Sequence[str]) -> bool:
    """Serve until a signal. Returns whether the engine has ended, and not by a failure."""
    engine = engine_of(with_buckets(comi), settings)
    app = build(engine, keys, comi.origin.weights, LOOPBACK if host in LOOPBACK else ())
    programs = engine.preparer.programs
    logging.getLogger(__name__).info("listening on %s:%d; ready when %d programs are compiled", host, port, programs)
    engine.start()
    Server(app, engine, host, port).run()
    return engine.stop(CUT) and engine.state != DEAD
