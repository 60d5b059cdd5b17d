"""Stored responses: read, streamed from any event on, cancelled and removed, at any api.

Source: https://platform.openai.com/docs/api-reference/responses.
"""

from typing import Any

from fastapi import APIRouter
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from forebay_api.context import Caller, Context, Running
from forebay_api.http import sse
from forebay_api.http.documented import DECLARED_AS_JSON
from forebay_api.http.peer import Peer
from forebay_api.openai.lists import Limit, Order, page
from forebay_api.openai.responses.format import ResponseFormat
from forebay_api.openai.responses.record import ResponseRecord
from forebay_api.streaming import write_stream
from forebay_contracts.wire.errors import InvalidRequest

router = APIRouter(prefix="/v1/responses", tags=["responses"])


@router.get("/{response_id}", response_class=Response)
async def retrieve_response(
    response_id: str, context: Running, caller: Caller, stream: bool = False, starting_after: int = -1
) -> Response:
    """A response as it is now. With `stream`, its events after number `starting_after`, until its end."""
    record = await context.responses.get(caller.name, response_id)
    if stream:
        return _Events(context, record, starting_after)
    fold = await context.responses.fold(record)
    return Response(fold.encode(), media_type="application/json")


@router.delete("/{response_id}")
async def delete_response(response_id: str, context: Running, caller: Caller) -> dict[str, Any]:
    """Remove a response and its answer. One that still runs is cancelled."""
    await context.responses.forget(await context.responses.get(caller.name, response_id))
    return {"id": response_id, "object": "response", "deleted": True}


@router.post("/{response_id}/cancel", response_class=Response, responses=DECLARED_AS_JSON)
async def cancel_response(response_id: str, context: Running, caller: Caller) -> Response:
    """Cancel a background response; one that has ended stays as it ended."""
    record = await context.responses.get(caller.name, response_id)
    if not record.background:
        raise InvalidRequest("Only a background response can be cancelled.", param="response_id")
    await context.stored.cancel(record.origin(), "by POST /v1/responses/{id}/cancel")
    return Response((await context.responses.fold(record)).encode(), media_type="application/json")


@router.get("/{response_id}/input_items")
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
        async with self._context.stored.read(self._record.origin()) as answer:
            peer = Peer.of(scope)
            peer.watch(answer.leave)
            try:
                writer = ResponseFormat(self._record, self._after)
                keep_alive_s = self._context.settings.stream_keep_alive
                async with sse.EventStream(send, keep_alive_s, writer.keep_alive) as stream:
                    await write_stream(answer, writer, stream, early=True)
            finally:
                peer.forget(answer.leave)
