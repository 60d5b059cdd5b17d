"""Stored responses and conversations: read, taken up, cancelled, changed and removed, at any api.

Sources: https://platform.openai.com/docs/api-reference/responses and conversations.
"""

import asyncio
import uuid
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query
from pydantic import Field
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from forebay_api.context import Caller, Context, Running
from forebay_api.create import write_stream
from forebay_api.http import sse
from forebay_api.http.bodies import body_of
from forebay_api.openai.body import Many, StrictModel
from forebay_api.openai.lists import page
from forebay_api.openai.responses.body import Metadata
from forebay_api.openai.responses.conversation import Entry
from forebay_api.openai.responses.format import ResponseFormat
from forebay_api.openai.responses.items import InputItem, Item
from forebay_api.openai.responses.record import ResponseRecord, item_id
from forebay_api.openai.responses.stored import origin
from forebay_contracts.wire.errors import InvalidRequest, RequestNotFound

router = APIRouter(prefix="/v1", tags=["responses"])

Limit = Annotated[int, Query(ge=1, le=100)]
Order = Literal["asc", "desc"]


@router.get("/responses/{response_id}", response_class=Response)
async def retrieve_response(
    response_id: str, context: Running, caller: Caller, stream: bool = False, starting_after: int = -1
) -> Response:
    """A response as it is now. With `stream`, its events after number `starting_after`, until its end."""
    record = await context.responses.get(caller.name, response_id)
    if stream:
        return _Events(context, record, starting_after)
    fold = await context.responses.fold(record)
    return Response(fold.encode(), media_type="application/json")


@router.delete("/responses/{response_id}")
async def delete_response(response_id: str, context: Running, caller: Caller) -> dict[str, Any]:
    """Remove a response and its answer. One that still runs is cancelled."""
    await context.responses.forget(await context.responses.get(caller.name, response_id))
    return {"id": response_id, "object": "response", "deleted": True}


@router.post("/responses/{response_id}/cancel", response_class=Response)
async def cancel_response(response_id: str, context: Running, caller: Caller) -> Response:
    """Cancel a background response; one that has ended stays as it ended."""
    record = await context.responses.get(caller.name, response_id)
    if not record.background:
        raise InvalidRequest("Only a background response can be cancelled.", param="response_id")
    await context.stored.cancel(origin(record), "by POST /v1/responses/{id}/cancel")
    return Response((await context.responses.fold(record)).encode(), media_type="application/json")


@router.get("/responses/{response_id}/input_items")
async def list_input_items(
    response_id: str, context: Running, caller: Caller, limit: Limit = 20, order: Order = "desc", after: str = ""
) -> dict[str, Any]:
    """The items of a response's own input."""
    record = await context.responses.get(caller.name, response_id)
    return page(record.input, limit, order, after)


class _Events(Response):
    """The events of a response, from a number on."""

    def __init__(self, context: Context, record: ResponseRecord, after: int) -> None:
        super().__init__()
        self._context = context
        self._record = record
        self._after = after

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The ASGI call."""
        async with self._context.stored.read(origin(self._record)) as answer:
            leaving = asyncio.create_task(sse.left(receive))
            leaving.add_done_callback(lambda _: answer.leave())
            try:
                writer = ResponseFormat(self._record, self._after)
                keep_alive_s = self._context.settings.stream_keep_alive
                async with sse.EventStream(send, keep_alive_s, writer.keep_alive) as stream:
                    await write_stream(answer, writer, stream, early=True)
            finally:
                leaving.cancel()


class ConversationBody(StrictModel):
    """A new conversation."""

    items: Many[InputItem] | None = None
    metadata: Metadata | None = None


class MetadataBody(StrictModel):
    """The metadata of a conversation."""

    metadata: Metadata


class ItemsBody(StrictModel):
    """More items of a conversation."""

    items: Annotated[Many[InputItem], Field(min_length=1)]


def _entries(items: Sequence[Any] | None) -> list[Entry]:
    found = []
    for place, item in enumerate(items or ()):
        if not isinstance(item, Item):
            raise InvalidRequest("A conversation holds no references.", param=f"items[{place}]")
        known = item.id or item_id(item.prefix, uuid.uuid4().hex, place)
        found.append(Entry(item={"id": known, **item.members()}))
    return found


@router.post("/conversations")
async def create_conversation(request: Request, context: Running, caller: Caller) -> dict[str, Any]:
    """Make a conversation."""
    body = await body_of(request, ConversationBody, context.settings.max_request_bytes)
    made = await context.responses.begin_conversation(caller.name, body.metadata or {}, _entries(body.items))
    return made.object()


@router.get("/conversations/{conversation_id}")
async def retrieve_conversation(conversation_id: str, context: Running, caller: Caller) -> dict[str, Any]:
    """A conversation, without its items."""
    return (await context.responses.conversation(caller.name, conversation_id)).record.object()


@router.post("/conversations/{conversation_id}")
async def update_conversation(
    conversation_id: str, request: Request, context: Running, caller: Caller
) -> dict[str, Any]:
    """Replace the metadata of a conversation."""
    body = await body_of(request, MetadataBody, context.settings.max_request_bytes)
    changed = await context.responses.change(caller.name, conversation_id, metadata=body.metadata)
    return changed.object()


@router.delete("/conversations/{conversation_id}")
async def delete_conversation(conversation_id: str, context: Running, caller: Caller) -> dict[str, Any]:
    """Remove a conversation. Its responses stay."""
    await context.responses.end_conversation(caller.name, conversation_id)
    return {"id": conversation_id, "object": "conversation.deleted", "deleted": True}


@router.post("/conversations/{conversation_id}/items")
async def create_items(conversation_id: str, request: Request, context: Running, caller: Caller) -> dict[str, Any]:
    """Add items to a conversation."""
    body = await body_of(request, ItemsBody, context.settings.max_request_bytes)
    entries = _entries(body.items)
    await context.responses.change(caller.name, conversation_id, *entries)
    return page([entry.item for entry in entries if entry.item is not None], len(entries), "asc", "")


@router.get("/conversations/{conversation_id}/items")
async def list_items(
    conversation_id: str, context: Running, caller: Caller, limit: Limit = 20, order: Order = "desc", after: str = ""
) -> dict[str, Any]:
    """The items of a conversation, those of its responses included."""
    return page(await _items(context, caller.name, conversation_id), limit, order, after)


@router.get("/conversations/{conversation_id}/items/{item_id}")
async def retrieve_item(conversation_id: str, item_id: str, context: Running, caller: Caller) -> dict[str, Any]:
    """One item of a conversation."""
    for item in await _items(context, caller.name, conversation_id):
        if item["id"] == item_id:
            return item
    raise RequestNotFound(f"Item with id '{item_id}' not found in conversation '{conversation_id}'.")


@router.delete("/conversations/{conversation_id}/items/{item_id}")
async def delete_item(conversation_id: str, item_id: str, context: Running, caller: Caller) -> dict[str, Any]:
    """Remove an item from a conversation."""
    await retrieve_item(conversation_id, item_id, context, caller)
    return (await context.responses.change(caller.name, conversation_id, without=item_id)).object()


async def _items(context: Context, owner: str | None, conversation_id: str) -> list[dict[str, Any]]:
    kept = await context.responses.conversation(owner, conversation_id)
    return await context.responses.items_of(owner, kept.record)
