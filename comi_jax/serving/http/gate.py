"""What every request passes first: an id, the key, limits of size and time, and a line of log that holds no text."""

import asyncio
import hashlib
import hmac
import logging
import re
import time
import uuid
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import urlsplit

from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from comi_jax.serving.engine import DEAD, DRAINING, READY, Engine
from comi_jax.serving.http import errors
from comi_jax.serving.http.errors import RETRY_SHUTDOWN, ApiError
from comi_jax.serving.telemetry import Telemetry

LOG = logging.getLogger(__name__)
GONE = 499  # in the log: the client has left before the response
SPARE = 32  # requests beyond those of the engine that may be open, so that short ones are still answered


class Keys:
    """The keys of a server; without any, everybody is the same owner, but the pages of other origins in a browser of
    this machine are nobody."""

    def __init__(self, keys: Sequence[str], hosts: Sequence[str] = (), cors: str = ""):
        """``hosts``: the names by which a server without keys is asked; empty: by any. ``cors``: an origin whose pages
        may ask."""
        self._digests = [hashlib.sha256(key.encode()).digest() for key in keys]
        self._hosts, self._cors = hosts, cors

    def owner(self, headers: Mapping[str, str]) -> str:
        """Who sent these headers. Raises ApiError, 401, without a right key, and 403 for the page of another origin
        where there are no keys. The time does not tell how much of a key is right: digests are compared, and all of
        them."""
        if not self._digests:
            self._check_origin(headers)
            return ""
        authorization = headers.get("authorization", "")
        scheme, _, key = authorization.partition(" ")
        given = hashlib.sha256(key.strip().encode("utf-8", "replace")).digest()
        same = [hmac.compare_digest(given, digest) for digest in self._digests]
        if scheme.lower() != "bearer" or not any(same):
            raise ApiError(
                401, "the key is missing or wrong; send it as Authorization: Bearer KEY", code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )  # fmt: skip
        return self._digests[same.index(True)].hex()

    def _check_origin(self, headers: Mapping[str, str]) -> None:
        """A browser tells with Origin and Sec-Fetch-Site which page asks, and with Host by which name: a foreign name
        can be made to lead to this machine."""
        origin, host = headers.get("origin", ""), headers.get("host", "")
        if origin and origin == self._cors:
            return
        name = urlsplit(f"//{host}").hostname if host.isascii() else None
        if self._hosts and name not in self._hosts:
            raise ApiError(
                403, f"without keys this server is asked by the names {', '.join(self._hosts)} alone; set the header "
                "Host, or start it with --api-key-file", code="host_not_allowed",
            )  # fmt: skip
        foreign = headers.get("sec-fetch-site", "none") not in ("same-origin", "none")
        if foreign or (origin and origin.partition("://")[2].lower() != host.lower()):
            raise ApiError(
                403, "a page of another origin may not ask; allow its origin with --cors, or start the server with "
                "--api-key-file", code="origin_not_allowed",
            )  # fmt: skip


class Gate:
    """An ASGI application around the one that answers. Only what stands under /v1 is guarded."""

    def __init__(self, app: ASGIApp, engine: Engine, keys: Keys, telemetry: Telemetry):
        self._app, self._engine, self._keys, self._telemetry = app, engine, keys, telemetry
        self._open = 0  # requests under /v1

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        given = headers.get("x-request-id", "")
        request_id = given if re.fullmatch(r"[\w.-]{1,128}", given, re.ASCII) else uuid.uuid4().hex
        exchange = Exchange(scope, receive, send, request_id, self._engine)
        guarded = scope["path"].startswith("/v1/")
        scope.setdefault("state", {}).update(request_id=request_id, owner="", exchange=exchange)
        self._open += guarded
        try:
            if guarded:
                scope["state"]["owner"] = self._admit(headers)
                exchange.check_size(headers.get("content-length", ""))
            await self._app(scope, exchange.receive, exchange.send)
        except ClientDisconnect:
            exchange.status = exchange.status or GONE
        except ApiError as error:
            await exchange.fail(error)
        except Exception:
            LOG.exception("request %s failed", request_id)
            await exchange.fail(errors.of(RuntimeError(), 1))
        finally:
            self._open -= guarded
            if guarded:
                exchange.log()
                if exchange.status >= 400 and exchange.status != GONE:
                    self._telemetry.refused.labels(str(exchange.status)).inc()

    def _admit(self, headers: dict[str, str]) -> str:
        """The owner of the key, if the server takes requests."""
        owner = self._keys.owner(headers)
        if self._engine.state == DRAINING:
            wait = {"Retry-After": str(RETRY_SHUTDOWN)}
            raise ApiError(503, "the server is shutting down", code="shutting_down", headers=wait)
        if self._engine.state == DEAD:
            raise ApiError(503, "the engine has failed; the server must be restarted", code="engine_dead")
        if self._engine.state != READY:
            raise ApiError(503, "the server is starting", code="starting", headers={"Retry-After": "5"})
        if self._open > self._engine.settings.most_requests + SPARE:
            wait = {"Retry-After": str(self._engine.retry_after)}
            raise ApiError(429, "the server has too many open requests; ask again later", code="busy", headers=wait)
        return owner


class Exchange:
    """One request and its response, as they pass through the gate."""

    def __init__(self, scope: Scope, receive: Receive, send: Send, request_id: str, engine: Engine):
        self._scope, self._receive, self._send, self.request_id = scope, receive, send, request_id
        self._settings = engine.settings
        self._start, self._size, self._complete = time.perf_counter(), 0, False
        self.status = 0  # of the response, once it has begun
        self.about: dict[str, Any] = {}  # figures for the log

    def check_size(self, length: str) -> None:
        """Raise ApiError, 413, if the header says that the body is too large."""
        if length.isdecimal() and int(length) > self._settings.max_body:
            raise self._too_large()

    async def receive(self) -> Message:
        """The next part of the body, within the limits of size and time; behind it, whether the client has left."""
        if self._complete:
            return await self._receive()
        left = self._start + self._settings.body_seconds - time.perf_counter()
        try:
            message = await asyncio.wait_for(self._receive(), max(left, 0))
        except TimeoutError:
            raise ApiError(
                408, f"the body did not arrive within {self._settings.body_seconds:g} seconds", code="slow_body",
                headers={"Connection": "close"},
            ) from None  # fmt: skip
        self._size += len(message.get("body", b""))
        self._complete = not message.get("more_body", False)
        if self._size > self._settings.max_body:
            raise self._too_large()
        return message

    async def send(self, message: Message) -> None:
        """Pass on a part of the response, with the id in its header."""
        if message["type"] == "http.response.start":
            self.status = message["status"]
            message["headers"] = [*message.get("headers", ()), (b"x-request-id", self.request_id.encode())]
        await self._send(message)

    async def fail(self, error: ApiError) -> None:
        """Respond with ``error``, unless a response has begun."""
        if not self.status:
            response = JSONResponse(error.body(self.request_id), error.status, error.headers)
            await response(self._scope, self._receive, self.send)

    def log(self) -> None:
        """One line: what was asked by route, not by text; how it ended; and the figures."""
        route = getattr(self._scope.get("route"), "path", "-")  # a path itself may hold anything
        figures = "".join(f" {name}={value}" for name, value in self.about.items())
        seconds = time.perf_counter() - self._start
        method = self._scope["method"] if self._scope["method"].isalpha() else "-"
        LOG.info("%s %s %s %d %.3fs%s", self.request_id, method[:8], route, self.status, seconds, figures)

    def _too_large(self) -> ApiError:
        return ApiError(
            413, f"the body is larger than {self._settings.max_body:,} bytes", code="body_too_large",
            headers={"Connection": "close"},
        )  # fmt: skip
