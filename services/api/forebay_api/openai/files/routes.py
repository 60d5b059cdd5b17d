"""Files: uploaded, listed, read and removed, at any api.

Source: https://platform.openai.com/docs/api-reference/files.
"""

import logging
import re
from collections.abc import AsyncIterator
from typing import Annotated, Any, Final, Literal

from fastapi import APIRouter, Query
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.types import Send

from forebay_api.clients.keys import Client
from forebay_api.context import Caller, Context, Running
from forebay_api.http.documented import ERRORS_OF_UPLOADS
from forebay_api.in_flight.files import File
from forebay_api.openai.files.upload import MAX_KEPT_S, upload
from forebay_api.openai.lists import Order, page
from forebay_contracts.wire.errors import ApiError, RequestNotFound

router = APIRouter(prefix="/v1/files", tags=["files"])

log = logging.getLogger(__name__)

_ID: Final = re.compile(r"file-[0-9a-f]{32}")

_FORM: Final[dict[str, Any]] = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["file", "purpose"],
                    "properties": {
                        "file": {"type": "string", "format": "binary"},
                        "purpose": {"type": "string", "enum": ["batch", "user_data"]},
                        "expires_after[anchor]": {"type": "string", "enum": ["created_at"]},
                        "expires_after[seconds]": {"type": "integer", "minimum": 3600, "maximum": MAX_KEPT_S},
                    },
                }
            }
        },
    }
}


def file_object(file: File) -> dict[str, Any]:
    """OpenAI's file object."""
    known = file.metadata
    return {
        "id": file.name,
        "object": "file",
        "bytes": file.size,
        "created_at": int(known.created_at),
        "expires_at": int(known.expires_at),
        "filename": known.filename,
        "purpose": known.purpose,
        "status": "processed",
    }


async def file_of(context: Context, caller: Client, file_id: str) -> File:
    """A file that the caller may see. Raises RequestNotFound."""
    file = await context.files.get(file_id) if _ID.fullmatch(file_id) else None
    if file is None or not caller.may_see(file.metadata.key):
        raise RequestNotFound(f"No such File object: {file_id}", param="id", code=None)
    return file


@router.post("", openapi_extra=_FORM, responses=ERRORS_OF_UPLOADS)
async def create_file(request: Request, context: Running, caller: Caller) -> dict[str, Any]:
    """Upload a file. It is listed once it is whole."""
    settings = context.settings
    file = await upload(request, context.files, caller.name, settings.max_file_bytes, settings.file_ttl)
    return file_object(file)


@router.get("")
async def list_files(
    context: Running,
    caller: Caller,
    purpose: Literal["batch", "batch_output", "user_data"] | None = None,
    limit: Annotated[int, Query(ge=1, le=10_000)] = 10_000,
    order: Order = "desc",
    after: str = "",
) -> dict[str, Any]:
    """The files of the caller's key; an operator's key sees all."""
    files = [
        file_object(file)
        async for file in context.files.scan()
        if caller.may_see(file.metadata.key) and purpose in (None, file.metadata.purpose)
    ]
    return page(files, limit, order, after)


@router.get("/{file_id}")
async def retrieve_file(file_id: str, context: Running, caller: Caller) -> dict[str, Any]:
    """What is known of a file."""
    return file_object(await file_of(context, caller, file_id))


@router.get("/{file_id}/content", response_class=Response)
async def retrieve_content(file_id: str, context: Running, caller: Caller) -> Response:
    """The bytes of a file. The connection breaks if they are not those that were uploaded."""
    file = await file_of(context, caller, file_id)
    content = context.files.content(file)
    headers = {"content-length": str(file.size), "content-disposition": "attachment"}
    first = await anext(content, b"")  # an error until here is an HTTP status
    return Content(_whole(first, content), media_type="application/octet-stream", headers=headers)


class Content(StreamingResponse):
    """The bytes of a file; it breaks off where they cannot be read."""

    async def stream_response(self, send: Send) -> None:
        """See StreamingResponse."""
        try:
            await super().stream_response(send)
        except ApiError as exc:
            # The answer has begun, so only its missing end can tell: uvicorn closes the connection.
            log.warning("[Files] a download broke off: %s", exc)


async def _whole(first: bytes, rest: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    yield first
    async for chunk in rest:
        yield chunk


@router.delete("/{file_id}")
async def delete_file(file_id: str, context: Running, caller: Caller) -> dict[str, Any]:
    """Remove a file. A batch that still reads it fails."""
    await context.files.delete(await file_of(context, caller, file_id))
    return {"id": file_id, "object": "file", "deleted": True}
