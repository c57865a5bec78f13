"""Connections to a server that speaks OpenAI's interface, one per request: what is asked of it, and how it fails."""

import http.client
import json
import logging
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any
from urllib.parse import urlsplit

from comi_jax.errors import ConfigError, UserError

CONNECT = 10.0  # seconds
SILENCE = 60.0  # seconds without a byte after which an endpoint is given up
NONE: Mapping[str, str] = MappingProxyType({})
LARGEST = 1 << 20  # bytes of a line of a stream or of an error


class DecoderError(UserError):
    """An endpoint that cannot be reached (``reached`` False), or that answers something else than an answer."""

    def __init__(self, message: str, reached: bool):
        super().__init__(message)
        self.reached = reached


class Endpoint:
    """The connections to an endpoint, one per request."""

    def __init__(self, url: str, key: str = "", flag: str = "--decoder", silence: float = SILENCE):
        """``url``: up to and with /v1, given as ``flag``. Raises ConfigError for what is no such URL. ``silence``:
        seconds without a byte after which it is given up."""
        parts = urlsplit(url if "://" in url else "")
        try:
            port = parts.port
        except ValueError:
            port = -1
        if parts.scheme not in ("http", "https") or not parts.hostname or port == -1 or parts.query:
            raise ConfigError(f"{flag}={url} is no URL; give one as http://host:8000/v1")
        path = parts.path.rstrip("/")
        self._silence = silence
        self._path = path if path.endswith("/v1") else f"{path}/v1"
        kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        self.connect = lambda: kind(str(parts.hostname), port, timeout=CONNECT)
        self._headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})

    def reach(self, connection: http.client.HTTPConnection) -> None:
        """Connect. Raises DecoderError."""
        try:
            connection.connect()
            connection.sock.settimeout(self._silence)
        except OSError as error:
            raise DecoderError(f"the decoder's endpoint cannot be reached ({type(error).__name__})", False) from None

    def open(
        self,
        connection: http.client.HTTPConnection,
        method: str,
        path: str,
        body: bytes | None = None,
        headers: Mapping[str, str] = NONE,
    ) -> Any:
        """The response on a connection, whose status is 200. The body is JSON, unless ``headers`` say what it is.
        Raises DecoderError."""
        try:
            connection.request(method, f"{self._path}{path}", body, {**self._headers, **headers})
            response = connection.getresponse()
            if response.status == 200:
                return response
            content = response.read(LARGEST)
        except (OSError, http.client.HTTPException) as error:
            raise DecoderError(f"the decoder's endpoint does not answer ({type(error).__name__})", False) from None
        logging.getLogger(__name__).error("the decoder's endpoint said %d: %r", response.status, content[:500])
        busy = response.status in (429, 503)
        what = "is overloaded or starting" if busy else "has refused the request"
        raise DecoderError(f"the decoder's endpoint {what} (status {response.status})", not busy)

    def model(self) -> dict[str, Any]:
        """The first model of the endpoint. Raises DecoderError."""
        connection = self.connect()
        try:
            self.reach(connection)
            return json.loads(self.open(connection, "GET", "/models").read(LARGEST))["data"][0]
        except (OSError, http.client.HTTPException, ValueError, LookupError, TypeError):
            raise DecoderError("the decoder's endpoint lists no model", True) from None
        finally:
            connection.close()


def events(response: Any) -> Iterator[dict[str, Any]]:
    """The events of a stream, as JSON objects."""
    while line := response.readline(LARGEST):
        if line.startswith(b"data:"):
            content = line[5:].strip()
            if content == b"[DONE]":
                return
            event = json.loads(content)
            if isinstance(event, dict):
                yield event
