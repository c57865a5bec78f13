"""Errors in the form that OpenAI's clients read: {"error": {"message", "type", "param", "code"}}."""

from collections.abc import Mapping
from typing import Any

from comi_jax.data.encode import LengthError
from comi_jax.errors import UserError
from comi_jax.serving.contexts import FullError, SizeError
from comi_jax.serving.endpoint import DecoderError
from comi_jax.serving.engine import DeadlineError, EngineError, ShutdownError
from comi_jax.serving.saved_documents import MissingError
from comi_jax.serving.slots import BusyError

TYPES = {
    400: "invalid_request_error", 401: "authentication_error", 403: "permission_error", 404: "not_found_error",
    405: "invalid_request_error", 408: "timeout_error", 413: "invalid_request_error", 415: "invalid_request_error",
    429: "rate_limit_error", 500: "server_error", 502: "server_error", 503: "service_unavailable_error",
}  # fmt: skip
RETRY_FULL = 60  # seconds until files may have been deleted or have expired
RETRY_SHUTDOWN = 5  # seconds until another process may have taken the place of one that shuts down


class ApiError(Exception):
    """A request that is refused or has failed: the status and body of the response."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ):
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers = dict(headers or {})

    def body(self, request_id: str) -> dict[str, Any]:
        """The JSON object of the response, and of an event in a stream."""
        about = {"message": self.message, "type": TYPES[self.status], "param": self.param, "code": self.code}
        return {"error": {**about, "request_id": request_id}}


def of(error: BaseException, retry_after: int) -> ApiError:
    """The response to ``error``. Only errors that a client can correct are quoted; ``retry_after`` in seconds."""
    wait = {"Retry-After": str(retry_after)}
    if isinstance(error, ApiError):
        return error
    if isinstance(error, BusyError):
        return ApiError(429, "the server is busy and its queue is full; ask again later", code="busy", headers=wait)
    if isinstance(error, DeadlineError):
        again = {
            "x-should-retry": "false"
        }  # OpenAI's clients would ask twice more, of a server that is too slow already
        return ApiError(408, str(error), code="deadline_exceeded", headers=again)
    if isinstance(error, ShutdownError):
        return ApiError(503, str(error), code="shutting_down", headers={"Retry-After": str(RETRY_SHUTDOWN)})
    if isinstance(error, DecoderError) and not error.reached:
        return ApiError(503, str(error), code="decoder_unavailable", headers={"Retry-After": str(RETRY_SHUTDOWN)})
    if isinstance(error, DecoderError):
        return ApiError(502, str(error), code="decoder_failed")
    if isinstance(error, MissingError):
        return ApiError(404, str(error), code="file_not_found")
    if isinstance(error, SizeError):
        return ApiError(413, str(error), param="file", code="document_too_large")
    if isinstance(error, FullError):
        return ApiError(429, str(error), code="store_full", headers={"Retry-After": str(RETRY_FULL)})
    if isinstance(error, LengthError):
        return ApiError(400, str(error), param="messages", code="context_length_exceeded")
    if isinstance(error, UserError) and not isinstance(error, EngineError):
        return ApiError(400, str(error), code="invalid_value")
    return ApiError(500, "the server failed to answer; its log has the reason under this request's id", code="internal")
