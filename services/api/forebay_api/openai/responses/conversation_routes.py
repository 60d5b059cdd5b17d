"""Conversations: made, read, changed and removed, at any api.

Source: https://platform.openai.com/docs/api-reference/conversations.
"""

import uuid
from collections.abc import Sequence
from typing import Annotated, Any

from fastapi import APIRouter
from pydantic import Field
from starlette.requests import Request

from forebay_api.context import Caller, Context, Running
from forebay_api.http.bodies import body_of
from forebay_api.http.documented import TAKES_JSON
from forebay_api.openai.body import Many, Metadata, StrictModel
from forebay_api.openai.lists import Limit, Order, page
from forebay_api.openai.responses.conversation import Entry
from forebay_api.openai.responses.items import InputItem, Item
from forebay_api.openai.responses.record import item_id
from forebay_contracts.wire.errors import InvalidRequest, RequestNotFound

router = APIRouter(prefix="/v1/conversations", tags=["responses"])


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


@router.post("", **TAKES_JSON)
async def create_conversation(request: Request, context: Running, caller: Caller) -> dict[str, Any]:
    """Make a conversation."""
    body = await body_of(request, ConversationBody, context.settings.max_request_bytes)
    made = await context.responses.begin_conversation(caller.name, body.metadata or {}, _entries(body.items))
    return made.object()


@router.get("/{conversation_id}")
async def retrieve_conversation(conversation_id: str, context: Running, caller: Caller) -> dict[str, Any]:
    """A conversation, without its items."""
    return (await context.responses.conversation(caller.name, conversation_id)).record.object()


@router.post("/{conversation_id}", **TAKES_JSON)
async def update_conversation(
    conversation_id: str, request: Request, context: Running, caller: Caller
) -> dict[str, Any]:
    """Replace the metadata of a conversation."""
    body = await body_of(request, MetadataBody, context.settings.max_request_bytes)
    changed = await context.responses.change(caller.name, conversation_id, metadata=body.metadata)
    return changed.object()


@router.delete("/{conversation_id}")
async def delete_conversation(conversation_id: str, context: Running, caller: Caller) -> dict[str, Any]:
    """Remove a conversation. Its responses stay."""
    await context.responses.end_conversation(caller.name, conversation_id)
    return {"id": conversation_id, "object": "conversation.deleted", "deleted": True}


@router.post("/{conversation_id}/items", **TAKES_JSON)
async def create_items(conversation_id: str, request: Request, context: Running, caller: Caller) -> dict[str, Any]:
    """Add items to a conversation."""
    body = await body_of(request, ItemsBody, context.settings.max_request_bytes)
    entries = _entries(body.items)
    await context.responses.change(caller.name, conversation_id, *entries)
    return page([entry.item for entry in entries if entry.item is not None], len(entries), "asc", "")


@router.get("/{conversation_id}/items")
async def list_items(
    conversation_id: str, context: Running, caller: Caller, limit: Limit = 20, order: Order = "desc", after: str = ""
) -> dict[str, Any]:
    """The items of a conversation, those of its responses included."""
    return page(await _items(context, caller.name, conversation_id), limit, order, after)


@router.get("/{conversation_id}/items/{item_id}")
async def retrieve_item(conversation_id: str, item_id: str, context: Running, caller: Caller) -> dict[str, Any]:
    """One item of a conversation."""
    for item in await _items(context, caller.name, conversation_id):
        if item["id"] == item_id:
            return item
    raise RequestNotFound(f"Item with id '{item_id}' not found in conversation '{conversation_id}'.")


@router.delete("/{conversation_id}/items/{item_id}")
async def delete_item(conversation_id: str, item_id: str, context: Running, caller: Caller) -> dict[str, Any]:
    """Remove an item from a conversation."""
    await retrieve_item(conversation_id, item_id, context, caller)
    return (await context.responses.change(caller.name, conversation_id, without=item_id)).object()


async def _items(context: Context, owner: str | None, conversation_id: str) -> list[dict[str, Any]]:
    kept = await context.responses.conversation(owner, conversation_id)
    return await context.responses.items_of(owner, kept.record)
