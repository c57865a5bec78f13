"""The routes of files: upload once, ask many times."""

import asyncio
import time
from typing import Any

from fastapi import APIRouter, Request
from starlette.datastructures import FormData, UploadFile
from starlette.responses import JSONResponse, Response

from comi_jax.serving.contexts import Ingest, Prepared
from comi_jax.serving.http import openapi
from comi_jax.serving.http.errors import ApiError
from comi_jax.serving.http.messages import text_from
from comi_jax.serving.http.saved_files import unwritable
from comi_jax.serving.http.uploads import LONGEST, PURPOSES, Upload
from comi_jax.serving.http.work import Work
from comi_jax.serving.segments import DocumentError

router = APIRouter(prefix="/v1/files", responses=openapi.ERRORS)
PAGE = 10_000  # files of a list, at most
MOST_FIELDS = 16
LONGEST_NAME = 255


@router.post("", openapi_extra=openapi.UPLOAD)
async def create(request: Request) -> JSONResponse:
    """Store a UTF-8 text: it is encoded now, and asked as often as is liked."""
    engine, uploads = request.app.state.engine, request.app.state.uploads
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "multipart/form-data":
        raise ApiError(415, "send the file as multipart/form-data", code="content_type")
    async with request.form(max_files=1, max_fields=MOST_FIELDS) as form:
        content, filename = await _file(form, engine.settings.max_file)
        purpose, seconds = _purpose(form), _seconds(form)
    text, name = text_from(content, "file"), uploads.new_id(len(content))
    work = Work(engine, Ingest(name, text), request)
    try:
        made = await work.next(Prepared)
    finally:
        work.close()
    created = time.time()
    upload = Upload(
        name, request.state.owner, filename, purpose, len(content), created,
        None if seconds is None else created + seconds, made.context_tokens, made.nbytes,
    )  # fmt: skip
    await _keep(request, upload, content, made)
    if seconds is not None:
        asyncio.get_running_loop().call_later(seconds + 1, uploads.purge)
    return JSONResponse(upload.described())


@router.get("")
async def listed(request: Request) -> JSONResponse:
    """The files of the key, the newest first, or with order=asc the oldest; ``after`` and ``limit`` give pages."""
    query = request.query_params
    files = request.app.state.uploads.of(request.state.owner)
    if query.get("order", "desc") not in ("asc", "desc"):
        raise ApiError(400, "order is asc or desc", param="order")
    if query.get("order") == "asc":
        files.reverse()
    if "purpose" in query:
        files = [file for file in files if file.purpose == query["purpose"]]
    limit = query.get("limit", str(PAGE))
    if not (limit.isascii() and limit.isdecimal() and 1 <= int(limit[:9]) <= PAGE):
        raise ApiError(400, f"limit is a whole number from 1 to {PAGE}", param="limit")
    if "after" in query:
        ids = [file.id for file in files]
        if query["after"] not in ids:
            raise ApiError(400, "after is not the id of a file of this list", param="after")
        files = files[ids.index(query["after"]) + 1 :]
    page = [file.described() for file in files[: int(limit)]]
    ends = {"first_id": page[0]["id"], "last_id": page[-1]["id"]} if page else {"first_id": None, "last_id": None}
    return JSONResponse({"object": "list", "data": page, **ends, "has_more": len(files) > len(page)})


@router.get("/{name}")
async def retrieve(request: Request, name: str) -> JSONResponse:
    """What is known of a file."""
    return JSONResponse(request.app.state.uploads.get(request.state.owner, name).described())


@router.get("/{name}/content")
async def content(request: Request, name: str) -> Response:
    """The file as it was uploaded."""
    found = request.app.state.uploads.content(request.state.owner, name)
    # As a download: a browser is not to show the markup of a document as a page of this server.
    headers = {"Content-Disposition": "attachment", "X-Content-Type-Options": "nosniff"}
    return Response(found, media_type="text/plain; charset=utf-8", headers=headers)


@router.delete("/{name}")
async def delete(request: Request, name: str) -> JSONResponse:
    """Remove a file."""
    request.app.state.uploads.delete(request.state.owner, name)
    return JSONResponse({"id": name, "object": "file", "deleted": True})


async def _keep(request: Request, upload: Upload, content: bytes, made: Prepared) -> None:
    """Add the file, and save it if files are saved. Raises ApiError, 503, if it cannot be."""
    uploads, preparer = request.app.state.uploads, request.app.state.engine.preparer

    def save() -> None:
        if preparer.saved is not None:
            preparer.saved.write(upload.id, made.contents)
        uploads.add(upload, content)

    try:
        await asyncio.to_thread(save)
    except (DocumentError, ApiError) as error:
        request.app.state.drop(upload.id)
        raise error if isinstance(error, ApiError) else unwritable(error) from None


async def _file(form: FormData, most: int) -> tuple[bytes, str]:
    """The content and the name of the uploaded file."""
    file: Any = form.get("file")
    if not isinstance(file, UploadFile):
        raise ApiError(400, "there is no file; send it as the field file", param="file")
    if (file.size or 0) > most:
        raise ApiError(413, f"the file is larger than {most:,} bytes", param="file", code="file_too_large")
    return await file.read(), (file.filename or "file")[:LONGEST_NAME]


def _purpose(form: FormData) -> str:
    purpose = form.get("purpose", PURPOSES[0])
    if purpose not in PURPOSES:
        raise ApiError(400, f"purpose is one of {', '.join(PURPOSES)}", param="purpose")
    return str(purpose)


def _seconds(form: FormData) -> int | None:
    """How long the file is to last, from expires_after as OpenAI's clients send it; None: until it is deleted."""
    anchor, seconds = (form.get(f"expires_after[{name}]") for name in ("anchor", "seconds"))
    if anchor is None and seconds is None:
        return None
    if anchor not in (None, "created_at"):
        raise ApiError(400, "the anchor of expires_after is created_at", param="expires_after")
    whole = isinstance(seconds, str) and seconds.isascii() and seconds.isdecimal()
    if not whole or not 1 <= int(str(seconds)[:12]) <= LONGEST:
        raise ApiError(400, f"expires_after lasts from 1 to {LONGEST} seconds", param="expires_after")
    return int(str(seconds))
