"""What the OpenAPI description says beyond the routes: the bodies that they read, and the errors they give."""

from typing import Any

from pydantic import BaseModel

_NULLABLE = {"anyOf": [{"type": "string"}, {"type": "null"}]}
_ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code", "request_id"],
            "properties": {
                "message": {"type": "string"}, "type": {"type": "string"}, "param": _NULLABLE, "code": _NULLABLE,
                "request_id": {"type": "string"},
            },
        }
    },
}  # fmt: skip
_ABOUT = {
    400: "The request is malformed, or asks for what this server has not.",
    401: "The key is missing or wrong.",
    403: "The page of another origin asks a server without keys.",
    404: "There is no such model, file or route.",
    405: "The route has no such method.",
    408: "The deadline has passed, or the body came too slowly.",
    413: "The body or the file is too large.",
    415: "The body is of another type.",
    429: "The queue or the store is full; Retry-After says when to ask again.",
    500: "The server has failed.",
    502: "The decoder's endpoint has failed.",
    503: "The server is starting or shutting down.",
}
ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"description": about, "content": {"application/json": {"schema": _ERROR}}}
    for status, about in _ABOUT.items()
}
UPLOAD = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["file"],
                    "properties": {
                        "file": {"type": "string", "format": "binary", "description": "UTF-8 text"},
                        "purpose": {"type": "string", "enum": ["user_data", "assistants"]},
                        "expires_after[anchor]": {"type": "string", "enum": ["created_at"]},
                        "expires_after[seconds]": {"type": "integer", "minimum": 1},
                    },
                }
            }
        },
    }
}


def body(kind: type[BaseModel]) -> dict[str, Any]:
    """The description of a body in JSON."""
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema(kind)}}}}


def schema(kind: type[BaseModel]) -> dict[str, Any]:
    """The JSON schema of ``kind``, whole in itself."""
    found = kind.model_json_schema()
    defined = found.pop("$defs", {})

    def inlined(value: Any) -> Any:
        if isinstance(value, dict):
            if "$ref" in value:
                return inlined(defined[value["$ref"].rpartition("/")[2]])
            return {name: inlined(each) for name, each in value.items()}
        return [inlined(each) for each in value] if isinstance(value, list) else value

    return inlined(found)
