"""A job of the engine as the coroutine of a request sees it, and the response that streams it."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import TypeVar

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from comi_jax.serving.contexts import Ask, Ingest, Prepared
from comi_jax.serving.engine import CancelledError, Engine, Happening, Job, Piece

P = TypeVar("P", Prepared, Piece)


class Work:
    """A job of the engine as a coroutine sees it. It is cancelled as soon as the client has left."""

    def __init__(self, engine: Engine, work: Ask | Ingest, request: Request):
        """Raises BusyError if the queue is full."""
        self._engine, loop = engine, asyncio.get_running_loop()
        self._happenings: asyncio.Queue[Happening] = asyncio.Queue()

        def tell(happening: Happening) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: the server has ended without waiting
                loop.call_soon_threadsafe(self._happenings.put_nowait, happening)

        self.job: Job = engine.submit(work, tell)
        self._watcher = loop.create_task(self._watch(request))

    async def _watch(self, request: Request) -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass
        self._engine.cancel(self.job)

    async def next(self, kind: type[P]) -> P:
        """The next happening. Raises what the job ended with, and ClientDisconnect where nobody is left to tell."""
        happening = await self._happenings.get()
        if isinstance(happening, CancelledError):
            raise ClientDisconnect
        if isinstance(happening, BaseException):
            raise happening
        assert isinstance(happening, kind)
        return happening

    def close(self) -> None:
        """Cancel the job, if it is open, and stop watching the client."""
        self._watcher.cancel()
        self._engine.cancel(self.job)


class EventStream(Response):
    """A response of server-sent events, whose client is watched by the ``work``."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncIterator[bytes], work: Work):
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._events, self._work = events, work

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        del scope, receive
        try:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            async for part in self._events:
                await send({"type": "http.response.body", "body": part, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            self._work.close()
