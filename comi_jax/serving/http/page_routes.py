"""The page at ``/``: documents, questions and what was kept, for a browser. It asks the routes that everybody asks."""

from importlib import resources

from fastapi import APIRouter
from starlette.responses import Response

from comi_jax.serving.explanation_page import TEMPLATE

router = APIRouter(include_in_schema=False)
# No text of a document or an answer ever becomes markup, and nothing but this server can be asked or loaded.
HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data:; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


@router.get("/")
async def page() -> Response:
    """The page."""
    return _html("comi_jax.serving.http", "page.html")


@router.get("/explanation.html")
async def template() -> Response:
    """The page of an explanation, without one: the page at ``/`` fills it in."""
    return _html("comi_jax.serving", TEMPLATE)


def _html(package: str, name: str) -> Response:
    content = resources.files(package).joinpath(name).read_bytes()
    return Response(content, media_type="text/html; charset=utf-8", headers=HEADERS)
