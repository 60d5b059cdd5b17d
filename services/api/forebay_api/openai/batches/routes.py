"""Batches: made, read, listed and cancelled, at any api.

Source: https://platform.openai.com/docs/api-reference/batch.
"""

import re
import uuid
from typing import Any, Final

from fastapi import APIRouter
from starlette.requests import Request

from forebay_api.clients.keys import Client
from forebay_api.context import Caller, Context, Running
from forebay_api.http.bodies import body_of
from forebay_api.http.documented import DECLARED_AS_JSON, TAKES_JSON
from forebay_api.in_flight.records import Kept
from forebay_api.openai.batches.body import BatchBody, window_s
from forebay_api.openai.batches.record import FINAL, PREFIX, BatchRecord
from forebay_api.openai.files.routes import file_of
from forebay_api.openai.lists import Limit, page
from forebay_contracts.nats import clock
from forebay_contracts.wire.errors import InvalidRequest, QueueConflict, RequestNotFound
from forebay_contracts.wire.request import Tier

router = APIRouter(prefix="/v1/batches", tags=["batches"])

_ID: Final = re.compile(r"batch_[0-9a-f]{32}")


@router.post("", **TAKES_JSON)
async def create_batch(request: Request, context: Running, caller: Caller) -> dict[str, Any]:
    """Run the requests of a file within a window of time, when nothing urgent needs the models."""
    caller.tier(Tier.FLEX)
    body = await body_of(request, BatchBody, context.settings.max_request_bytes)
    try:
        file = await file_of(context, caller, body.input_file_id)
    except RequestNotFound as exc:
        raise InvalidRequest(exc.message, param="input_file_id") from None
    if file.metadata.purpose != "batch":
        raise InvalidRequest("The file must be uploaded with the purpose `batch`.", param="input_file_id")
    now = clock.now()
    expires_at = now + window_s(body.completion_window)
    if int(file.metadata.expires_at) < expires_at:
        raise InvalidRequest(
            "The file expires before the completion window ends: upload it to be kept for longer.",
            param="input_file_id",
        )
    kept_s = body.output_expires_after.seconds if body.output_expires_after else context.settings.file_ttl
    record = BatchRecord(
        id=PREFIX + uuid.uuid4().hex,
        key=caller.name,
        endpoint=body.endpoint,
        input_file_id=file.name,
        completion_window=body.completion_window,
        created_at=now,
        expires_at=expires_at,
        kept_s=kept_s,
        window=context.settings.batch_window,
        metadata=body.metadata,
    )
    await context.batches.create(record)
    return record.object()


@router.get("")
async def list_batches(context: Running, caller: Caller, limit: Limit = 20, after: str = "") -> dict[str, Any]:
    """The batches of the caller's key, newest first; an operator's key sees all."""
    records = [record async for record in context.batches.scan() if caller.may_see(record.key)]
    # A record that changes moves to the end of the bucket.
    records.sort(key=lambda record: (record.created_at, record.id))
    return page([record.object() for record in records], limit, "desc", after)


@router.get("/{batch_id}")
async def retrieve_batch(batch_id: str, context: Running, caller: Caller) -> dict[str, Any]:
    """A batch as it is now."""
    return (await _get(context, caller, batch_id)).record.object()


@router.post("/{batch_id}/cancel", responses=DECLARED_AS_JSON)
async def cancel_batch(batch_id: str, context: Running, caller: Caller) -> dict[str, Any]:
    """Cancel a batch. What it has answered until then stays in its files."""
    while True:
        kept = await _get(context, caller, batch_id)
        record = kept.record
        if record.status in (*FINAL, "finalizing"):
            raise InvalidRequest(f"A batch with the status `{record.status}` cannot be cancelled.", param="batch_id")
        if record.status != "cancelling":
            # Before an api runs it, there is nothing to end.
            record = record.to("cancelling" if record.run else "cancelled")
            try:
                await context.batches.put(record, kept.revision)
            except QueueConflict:
                continue
            if record.status == "cancelled" and context.webhooks.wanted(record.key, "batch"):
                await context.batches.announce(record, record.status)
        return record.object()


async def _get(context: Context, caller: Client, batch_id: str) -> Kept[BatchRecord]:
    kept = await context.batches.get(batch_id) if _ID.fullmatch(batch_id) else None
    if kept is None or not caller.may_see(kept.record.key):
        raise RequestNotFound(f"No batch found with id '{batch_id}'.", param="batch_id", code=None)
    return kept
