"""The routes that tell about the server: models, health, readiness, version and figures."""

from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from comi_jax.serving.engine import DEAD, READY, Engine
from comi_jax.serving.http import openapi
from comi_jax.serving.http.errors import ApiError
from comi_jax.version import __version__

router = APIRouter(responses=openapi.ERRORS)


def _model(engine: Engine, created: int) -> dict[str, Any]:
    settings = engine.settings
    return {
        "id": settings.name,
        "object": "model",
        "created": created,
        "owned_by": "comi_jax",
        "max_model_len": settings.max_context + settings.max_question + settings.max_tokens,
    }


@router.get("/v1/models")
async def models(request: Request) -> JSONResponse:
    """The models of the server, of which there is one."""
    only = _model(request.app.state.engine, request.app.state.started)
    return JSONResponse({"object": "list", "data": [only]})


@router.get("/v1/models/{name:path}")
async def model(request: Request, name: str) -> JSONResponse:
    """The model called ``name``."""
    if name != request.app.state.engine.settings.name:
        raise ApiError(404, "there is no such model", param="model", code="model_not_found")
    return JSONResponse(_model(request.app.state.engine, request.app.state.started))


@router.get("/health")
@router.get("/healthz")
async def health(request: Request) -> JSONResponse:
    """200 while the engine lives, 503 when it has failed and the process should be restarted."""
    state = request.app.state.engine.state
    return JSONResponse({"status": state}, 503 if state == DEAD else 200)


@router.get("/ready")
async def ready(request: Request) -> JSONResponse:
    """200 while requests are taken; 503 while programs are compiled, in a shutdown, and after a failure."""
    state = request.app.state.engine.state
    return JSONResponse({"status": state}, 200 if state == READY else 503)


@router.get("/version")
async def version(request: Request) -> JSONResponse:
    """What runs here, and its limits."""
    settings = request.app.state.engine.settings
    names = ("slots", "slot_length", "queue", "deadline", "max_context", "max_question", "max_tokens", "max_body",
             "max_file", "max_files", "store_bytes")  # fmt: skip
    limits = {name: getattr(settings, name) for name in names}
    about: dict[str, Any] = {"version": __version__, "model": settings.name, "weights": request.app.state.weights}
    about |= {"auth": request.app.state.auth, "auto": settings.auto}  # whether /v1 needs a key; the rate "auto"
    return JSONResponse({**about, "rates": settings.rates, "limits": limits})


@router.get("/metrics")
async def metrics(request: Request) -> Response:
    """The figures of the server, for Prometheus."""
    engine: Engine = request.app.state.engine
    telemetry, store = engine.telemetry, engine.preparer.store
    telemetry.store_bytes.set(sum(store.used(place) for place in store.budget))
    telemetry.store_documents.set(len(store))
    return Response(telemetry.text(), media_type="text/plain; version=0.0.4; charset=utf-8")
