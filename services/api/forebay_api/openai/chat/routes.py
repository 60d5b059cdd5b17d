"""Stored chat completions: read, listed, changed and removed, at any api.

Source: https://platform.openai.com/docs/api-reference/chat (get, list, update, delete, getMessages).
"""

import contextlib
from typing import Any, Final

import orjson
from fastapi import APIRouter
from starlette.requests import Request

from forebay_api.context import Caller, Context, Running
from forebay_api.http.bodies import body_of
from forebay_api.http.documented import TAKES_JSON
from forebay_api.in_flight.records import Kept, key_of
from forebay_api.openai.body import Metadata, StrictModel
from forebay_api.openai.chat.format import ChatFormat
from forebay_api.openai.chat.record import KIND, ChatRecord
from forebay_api.openai.lists import Limit, Order, page
from forebay_contracts.wire import names
from forebay_contracts.wire.errors import InvalidRequest, RequestNotFound

PREFIX: Final = "chatcmpl-"

router = APIRouter(prefix="/v1/chat/completions", tags=["chat"])


class UpdateBody(StrictModel):
    """What of a stored completion can be changed."""

    metadata: Metadata


@router.get("")
async def list_completions(
    context: Running,
    caller: Caller,
    limit: Limit = 20,
    order: Order = "asc",
    after: str = "",
    model: str | None = None,
) -> dict[str, Any]:
    """The stored completions that are whole, oldest first."""
    records = context.records.scan(KIND, caller.name, ChatRecord)
    known = [(one.created_at, PREFIX + one.request_id) async for one in records if model in (None, one.model)]
    known.sort(reverse=order == "desc")
    places = {identifier: place for place, (_, identifier) in enumerate(known)}
    if after and after not in places:
        raise InvalidRequest(f"There is no item '{after}'.", param="after")
    found: list[dict[str, Any]] = []
    for _, identifier in known[places.get(after, -1) + 1 :]:
        with contextlib.suppress(RequestNotFound):
            whole = await _object(context, (await _get(context, caller.name, identifier)).record)
            found += [] if whole is None else [whole]
        if len(found) > limit:
            break
    return page(found, limit, "asc", "")


@router.get("/{completion_id}")
async def retrieve_completion(completion_id: str, context: Running, caller: Caller) -> dict[str, Any]:
    """A stored completion."""
    found = await _object(context, (await _get(context, caller.name, completion_id)).record)
    if found is None:
        raise _unknown(completion_id)
    return found


@router.post("/{completion_id}", **TAKES_JSON)
async def update_completion(completion_id: str, request: Request, context: Running, caller: Caller) -> dict[str, Any]:
    """Replace the metadata of a stored completion."""
    body = await body_of(request, UpdateBody, context.settings.max_request_bytes)
    kept = await _get(context, caller.name, completion_id)
    changed = kept.record.model_copy(update={"metadata": body.metadata})
    await context.records.put(key_of(KIND, caller.name, kept.record.request_id), changed, kept.revision)
    return await retrieve_completion(completion_id, context, caller)


@router.delete("/{completion_id}")
async def delete_completion(completion_id: str, context: Running, caller: Caller) -> dict[str, Any]:
    """Remove a stored completion. One that still runs is cancelled."""
    record = (await _get(context, caller.name, completion_id)).record
    await context.stored.forget(record.origin())
    await context.records.delete(key_of(KIND, caller.name, record.request_id))
    return {"object": "chat.completion.deleted", "id": completion_id, "deleted": True}


@router.get("/{completion_id}/messages")
async def list_messages(
    completion_id: str,
    context: Running,
    caller: Caller,
    limit: Limit = 20,
    order: Order = "asc",
    after: str = "",
) -> dict[str, Any]:
    """The messages that a stored completion answers."""
    record = (await _get(context, caller.name, completion_id)).record
    messages = [{"id": f"{completion_id}-{place}", **message} for place, message in enumerate(record.messages)]
    return page(messages, limit, order, after)


async def _get(context: Context, owner: str | None, completion_id: str) -> Kept[ChatRecord]:
    request_id = completion_id.removeprefix(PREFIX)
    if not completion_id.startswith(PREFIX) or not names.is_request_id(request_id):
        raise _unknown(completion_id)
    kept = await context.records.get(key_of(KIND, owner, request_id), ChatRecord)
    if kept is None:
        raise _unknown(completion_id)
    return kept


def _unknown(completion_id: str) -> RequestNotFound:
    return RequestNotFound(f"Completion with id '{completion_id}' not found.", param="completion_id")


async def _object(context: Context, record: ChatRecord) -> dict[str, Any] | None:
    """The completion's object, or None if it is not whole."""
    request = record.origin()
    answer = await context.stored.so_far(request)
    if answer.completed is None:
        return None
    shown = request.model_copy(update={"id": record.request_id})
    whole = ChatFormat(shown, None).whole(answer.take(), answer.completed)
    found: dict[str, Any] = orjson.loads(whole)
    return found | {"metadata": record.metadata}
