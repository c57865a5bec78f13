"""The requests: their fields, and the questions that they stand for.

A field that this server has no use for is refused by its value, not by its name: clients send many with the value that
means nothing. In every request the last user message, or the prompt, is the question; all else is its context.
"""

import abc
import re
import secrets
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from comi_jax.config import Generation
from comi_jax.errors import ConfigError
from comi_jax.serving import generation
from comi_jax.serving.contexts import Ask, Reference
from comi_jax.serving.http.errors import ApiError
from comi_jax.serving.http.messages import Piece, document_pieces, merged, pieces_of, question_of
from comi_jax.serving.rates import AUTO
from comi_jax.serving.settings import Settings

MOST_STOPS = 4
HOTTEST = 2.0  # temperature
# Fields that other servers know, with the values that ask for nothing.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (1,), "best_of": (1,), "presence_penalty": (0,), "frequency_penalty": (0,), "logit_bias": ({},),
    "logprobs": (False,), "top_logprobs": (0,), "tools": ([],), "tool_choice": ("none", "auto"), "functions": ([],),
    "function_call": ("none", "auto"), "response_format": ({"type": "text"},), "modalities": (["text"],), "audio": (),
    "prediction": (), "web_search_options": (), "echo": (False,), "suffix": ("",), "prompt_embeds": (), "min_p": (0,),
}  # fmt: skip
# Fields that change nothing about an answer.
IGNORED = {
    "user", "metadata", "store", "service_tier", "parallel_tool_calls", "safety_identifier", "prompt_cache_key",
    "prompt_cache_retention", "verbosity", "reasoning_effort",
}  # fmt: skip


class StreamOptions(BaseModel):
    """What a stream also has."""

    model_config = ConfigDict(strict=True, extra="allow")
    include_usage: bool | None = None


class Request(BaseModel, abc.ABC):
    """What both endpoints share."""

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False, hide_input_in_errors=True)

    model: str | None = Field(None, description="The name of the model; absent: the server's.")
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: int | None = Field(None, description="The most tokens of the answer.")
    temperature: float | None = Field(None, ge=0, le=HOTTEST, description="0 is greedy; absent: the run's.")
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=0)
    repetition_penalty: float | None = Field(None, gt=0)
    seed: int | None = Field(None, description="The same seed and request give the same answer.")
    stop: str | list[str] | None = Field(None, description="At most 4 texts that end the answer.")
    rate: int | str | None = Field(None, description="Context tokens per memory vector, one of the server's, or auto.")
    max_slots: int | None = Field(None, ge=1, description="The most memory vectors, in place of a rate.")
    keep: list[list[int]] | None = Field(None, description="Spans [first, behind] of characters kept uncompressed.")
    explain: bool | None = Field(None, description="Whether the field comi tells what was kept of the context.")
    documents: list[dict[str, Any]] | None = Field(None, description="Objects with text and title, or file_id.")

    @abc.abstractmethod
    def question(self, settings: Settings) -> tuple[list[Piece], str]:
        """The pieces of the context, and the question."""


class ChatRequest(Request):
    """The body of POST /v1/chat/completions."""

    messages: list[dict[str, Any]] = Field(min_length=1, max_length=4096)
    max_completion_tokens: int | None = Field(None, description="As max_tokens, which it replaces.")

    def question(self, settings: Settings) -> tuple[list[Piece], str]:
        """The pieces of the context, and the question. Raises ApiError for a lone message, unless it is answered."""
        question, files = question_of(self.messages)
        pieces = [*files, *document_pieces(self.documents), *pieces_of(self.messages)]
        if not pieces and settings.single_message == "refuse":
            raise ApiError(
                400,
                "there is one message and no context to compress; add a file part, documents or earlier messages, or "
                "start the server with --single-message=plain",
                param="messages",
                code="context_missing",
            )
        return pieces, question


class CompletionRequest(Request):
    """The body of POST /v1/completions."""

    prompt: str | list[str] = Field(description="The question, a text or a list of one.")

    def question(self, settings: Settings) -> tuple[list[Piece], str]:
        """The pieces of the context, and the question."""
        del settings
        prompts = [self.prompt] if isinstance(self.prompt, str) else self.prompt
        if len(prompts) != 1:
            raise ApiError(400, f"prompt holds {len(prompts)} texts; give one", param="prompt")
        pieces = document_pieces(self.documents)
        if not pieces:
            raise ApiError(400, "there is no context to compress; give documents", param="documents")
        return pieces, prompts[0]


R = TypeVar("R", bound=Request)


def read(kind: type[R], body: bytes) -> R:
    """The request in ``body``. Raises ApiError with the first field that is wrong."""
    try:
        request = kind.model_validate_json(body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        field = ".".join(str(each) for each in first["loc"][:3])
        what = f"{field}: {first['msg']}" if field else f"the body is no such request: {first['msg']}"
        raise ApiError(400, what, param=field or None, code="invalid_value") from None
    for name, value in (request.model_extra or {}).items():
        if name in NEUTRAL and value is not None and not any(_same(value, each) for each in NEUTRAL[name]):
            raise ApiError(
                400, f"this server has no {name}; leave it out", param=name, code="unsupported_value"
            )  # without the value, which may be text
    if request.stream_options is not None and not request.stream:
        raise ApiError(400, "stream_options is for streams; set stream to true", param="stream_options")
    return request


def unknown_fields(request: Request) -> list[str]:
    """The names of fields that nothing is known about; odd ones, which may be text, are left out."""
    names = (request.model_extra or {}).keys() - NEUTRAL.keys() - IGNORED
    return sorted(name for name in names if re.fullmatch(r"[a-z_]{1,32}", name))


def ask_of(request: Request, settings: Settings, defaults: Generation) -> Ask:
    """What the engine is asked; whether its stored files exist is still to be seen."""
    if request.model not in (None, settings.name):
        raise ApiError(404, "there is no such model; GET /v1/models lists them", param="model", code="model_not_found")
    pieces, question = request.question(settings)
    whole = tuple(Reference(piece.file) if piece.file else piece.text for piece in merged(pieces))
    options, rate, explain = _options(request, settings, defaults), _rate(request, settings), bool(request.explain)
    if explain and (not whole or rate == 1 and request.max_slots is None):
        raise ApiError(400, "there is nothing to explain where nothing is compressed", param="explain")
    return Ask(whole, question, rate, request.max_slots, _keep(request), options, explain)


def _same(value: Any, neutral: Any) -> bool:
    """Equality that does not take True for 1."""
    return value == neutral and isinstance(value, bool) == isinstance(neutral, bool)


def _rate(request: Request, settings: Settings) -> int | str:
    if request.rate is not None and request.max_slots is not None:
        raise ApiError(400, "both rate and max_slots are given; give one of them", param="rate")
    if request.rate == AUTO:
        if settings.auto:
            return AUTO
        raise ApiError(
            400, 'rate "auto" needs a calibration, which python -m comi_jax.calibrate makes and this server lacks; '
            f"give one of {_listed(settings)}", param="rate", code="invalid_value",
        )  # fmt: skip
    if isinstance(request.rate, str):
        raise ApiError(
            400, f'rate is neither a number nor "auto"; give one of {_listed(settings)}', param="rate",
            code="invalid_value",
        )  # fmt: skip
    if request.rate is not None and request.rate not in settings.rates:
        raise ApiError(
            400, f"the rate {request.rate} is not one of this server's, {_listed(settings)}", param="rate",
            code="invalid_value",
        )  # fmt: skip
    return settings.rates[0] if request.rate is None else request.rate


def _listed(settings: Settings) -> str:
    return ", ".join(map(str, settings.rates))


def _keep(request: Request) -> tuple[tuple[int, int], ...]:
    spans = request.keep or []
    if any(len(span) != 2 for span in spans):
        raise ApiError(400, "keep: give pairs, the first character of a span and the one behind it", param="keep")
    return tuple((first, behind) for first, behind in spans)


def _options(request: Request, settings: Settings, defaults: Generation) -> Generation:
    field = "max_tokens"
    tokens = request.max_tokens
    if isinstance(request, ChatRequest) and request.max_completion_tokens is not None:
        field, tokens = "max_completion_tokens", request.max_completion_tokens
    if tokens is None:
        tokens = min(defaults.max_new_tokens, settings.max_tokens)
    if not 1 <= tokens <= settings.max_tokens:
        raise ApiError(400, f"{field} is {tokens}; this server allows 1 to {settings.max_tokens}", param=field)
    stops = [request.stop] if isinstance(request.stop, str) else request.stop or []
    if len(stops) > MOST_STOPS or not all(stops):
        raise ApiError(400, f"stop: give at most {MOST_STOPS} texts, none of them empty", param="stop")
    given: generation.Options = {
        "max_new_tokens": tokens,
        "temperature": request.temperature,
        "top_p": request.top_p,
        "top_k": request.top_k,
        "repetition_penalty": request.repetition_penalty,
        "seed": secrets.randbits(63) if request.seed is None else request.seed % 2**63,
        "stop_strings": stops or None,
    }
    try:
        return generation.chosen(defaults, given)
    except ConfigError as error:
        raise ApiError(400, str(error), code="invalid_value") from None
