"""The routes, and what answers them: from a request to a job of the engine, and from its happenings to a response."""

import asyncio
import contextlib
import functools
import time
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any, TypeVar

from fastapi import FastAPI, Request
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp

from comi_jax.errors import UserError
from comi_jax.serving.contexts import Ask, Prepared
from comi_jax.serving.engine import Engine, Piece
from comi_jax.serving.http import api, errors, file_routes, info_routes, openapi, page_routes
from comi_jax.serving.http.errors import ApiError
from comi_jax.serving.http.gate import LOG, Exchange, Gate, Keys
from comi_jax.serving.http.messages import text_from
from comi_jax.serving.http.responses import DONE, Reply, event
from comi_jax.serving.http.saved_files import SavedFiles
from comi_jax.serving.http.uploads import MemoryFiles, Uploads
from comi_jax.serving.http.work import EventStream, Work
from comi_jax.serving.segments import DocumentError
from comi_jax.version import __version__

T = TypeVar("T")


def build(engine: Engine, keys: Sequence[str], weights: str, hosts: Sequence[str] = ()) -> ASGIApp:
    """The application of a server. ``weights``: their checksum, for /version. ``hosts``: the names by which it is
    asked without a key; empty: by any."""
    app = FastAPI(title="comi_jax", version=__version__, docs_url=None, redoc_url=None)
    app.state.engine, app.state.weights, app.state.started = engine, weights, int(time.time())
    app.state.auth = bool(keys)
    preparer, settings = engine.preparer, engine.settings
    files = MemoryFiles() if preparer.saved is None else SavedFiles(preparer.saved)

    def drop(name: str) -> None:
        with contextlib.suppress(DocumentError):  # it may be saved alone, or have gone meanwhile
            preparer.store.drop(name)

    app.state.drop = drop
    app.state.uploads = Uploads(files, settings.max_files, settings.store_bytes + settings.host_bytes, drop)
    for kind, handler in (
        (ApiError, _refused), (UserError, _refused), (HTTPException, _not_routed), (Exception, _refused)
    ):  # fmt: skip
        app.add_exception_handler(kind, handler)
    app.include_router(info_routes.router)
    app.include_router(file_routes.router)
    app.include_router(page_routes.router)
    endpoints = (("/v1/chat/completions", api.ChatRequest, True), ("/v1/completions", api.CompletionRequest, False))
    for path, kind, chat in endpoints:
        described = {"responses": openapi.ERRORS, "openapi_extra": openapi.body(kind)}
        app.add_api_route(path, _answerer(kind, chat), methods=["POST"], **described)
    gate = Gate(app, engine, Keys(keys, hosts, engine.settings.cors), engine.telemetry)
    if not engine.settings.cors:
        return gate
    return CORSMiddleware(
        gate, allow_origins=[engine.settings.cors], allow_methods=["GET", "POST", "DELETE"], allow_headers=["*"],
        expose_headers=["X-Request-Id", "Retry-After"],
    )  # fmt: skip


def _answerer(kind: type[api.Request], chat: bool) -> Any:
    """The handler of an endpoint."""

    async def answer(request: Request) -> Response:
        engine: Engine = request.app.state.engine
        exchange: Exchange = request.state.exchange
        asked = api.read(kind, await json_body(request))
        ask = api.ask_of(asked, engine.settings, engine.defaults)
        source = _source(ask, request)
        if names := api.unknown_fields(asked):
            exchange.about["ignored"] = ",".join(names)
        work = Work(engine, ask, request)
        try:
            prepared = await work.next(Prepared)
            reply = Reply(chat, engine.settings.name, ask, work.job, prepared, source)
            exchange.about |= {"context": prepared.context_tokens, "vectors": prepared.memory_vectors}
            first = await work.next(Piece)
            if asked.stream:
                usage = asked.stream_options is not None and bool(asked.stream_options.include_usage)
                return EventStream(_events(work, reply, first, usage, exchange, engine), work)
            return JSONResponse(await _whole(work, reply, first, exchange))
        except BaseException:
            work.close()
            raise

    answer.__doc__ = kind.__doc__
    answer.__name__ = "chat_completions" if chat else "completions"
    return answer


def _source(ask: Ask, request: Request) -> str:
    """The text of the context, if the answer is to be explained. Raises ApiError for files that there are not."""
    uploads, texts = request.app.state.uploads, []
    for piece in ask.pieces:
        if isinstance(piece, str):
            texts.append(piece)
        elif uploads.get(request.state.owner, piece.name, "file_id") and ask.explain:
            texts.append(text_from(uploads.content(request.state.owner, piece.name), "file_id"))
    return "".join(texts) if ask.explain else ""


async def _whole(work: Work, reply: Reply, piece: Piece, exchange: Exchange) -> dict[str, Any]:
    """The body of a whole answer."""
    reply.add(piece)
    while piece.finish_reason is None:
        piece = await work.next(Piece)
        reply.add(piece)
    exchange.about["tokens"] = piece.tokens
    work.close()
    return await _off_loop(reply, lambda: reply.whole(str(piece.finish_reason)))


async def _off_loop(reply: Reply, make: Callable[[], T]) -> T:
    """``make()``, in a thread of its own if it is long: an explanation has megabytes."""
    return make() if reply.prepared.explained is None else await asyncio.to_thread(make)


async def _events(
    work: Work, reply: Reply, piece: Piece, usage: bool, exchange: Exchange, engine: Engine
) -> AsyncIterator[bytes]:
    """The events of a stream, from its first token on. What goes wrong is an event too."""
    try:
        yield reply.opening()
        while True:
            reply.add(piece)
            made = functools.partial(reply.piece, piece)
            yield made() if piece.finish_reason is None else await _off_loop(reply, made)
            if piece.finish_reason is not None:
                break
            piece = await work.next(Piece)
        if usage:
            yield reply.usage_event()
    except ClientDisconnect:
        return
    except Exception as error:
        if not isinstance(error, UserError | ApiError):  # the client is told nothing about it
            LOG.exception("request %s failed in its stream", exchange.request_id)
        refused = errors.of(error, engine.retry_after)
        exchange.status = refused.status  # for the log; the client has had 200
        yield event(refused.body(exchange.request_id))
    finally:
        exchange.about["tokens"] = reply.tokens
    yield DONE


async def json_body(request: Request) -> bytes:
    """The body of a request in JSON. Raises ApiError, 415, if its header says that it is something else."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise ApiError(415, "the body must be JSON; send it with Content-Type: application/json", code="content_type")
    return await request.body()


# --- errors -----------------------------------------------------------------------------------------------------------


async def _refused(request: Request, error: Exception) -> Response:
    """The response to any error."""
    if isinstance(error, ClientDisconnect):
        raise error
    refused = errors.of(error, request.app.state.engine.retry_after)
    return JSONResponse(refused.body(request.state.request_id), refused.status, refused.headers)


async def _not_routed(request: Request, error: Exception) -> Response:
    """The response to a path or a method that there is not, or to a form that cannot be read."""
    assert isinstance(error, HTTPException)
    messages = {404: "there is no such route", 405: "this route has no such method"}
    status = error.status_code if error.status_code in messages else 400
    refused = ApiError(status, messages.get(status, str(error.detail)), headers=error.headers)
    return JSONResponse(refused.body(request.state.request_id), refused.status, refused.headers)
