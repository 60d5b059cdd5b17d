"""`/v1/queue`: how full the queue is and how it moves, what became of one request, and cancelling it."""

import contextlib
from collections.abc import AsyncGenerator
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from forebay_api.clients.keys import Client
from forebay_api.context import Caller, Context, Running
from forebay_api.http import sse
from forebay_api.http.peer import Peer
from forebay_api.in_flight.answer import SlowReader
from forebay_api.in_flight.records import owner_token
from forebay_api.openai.lists import Limit, page
from forebay_api.watching.requests import shown
from forebay_contracts.nats.consumers import waiting_place
from forebay_contracts.queueing import room
from forebay_contracts.queueing.answer_texts import answer_texts
from forebay_contracts.queueing.status import QueueStatus
from forebay_contracts.wire import names
from forebay_contracts.wire.errors import InvalidRequest, RequestNotFound
from forebay_contracts.wire.state import RequestState, RequestStatus

router = APIRouter(prefix="/v1/queue", tags=["queue"])


@router.get("/status")
async def get_queue_status(context: Running) -> QueueStatus:
    """The queue's numbers, over all api replicas and since the system was first started."""
    return await context.numbers()


@router.get("/events", response_class=Response, responses={200: {"content": {"text/event-stream": {}}}})
async def get_queue_events(request: Request, context: Running) -> Response:
    """Numbers, workers and the newest requests, then each change of them, at most four messages a second.

    Each is an `event: queue` whose data is a JSON object of `at`, `version`, `client` (the name of the key, and whether
    it is an operator's), `connected`, `nats` (for operators: the server that this api reached last), `status` (as
    `/v1/queue/status`; null while NATS is away), `workers`, `requests` and `reset`. `requests` are those that have
    changed since the message before. With `reset`, they are the newest ones, and all others are to be forgotten. A key
    that is no operator's is told of its own requests only, without `fault` (what went wrong inside). A key that is
    taken away ends the stream.
    """
    events = context.feed.listen(lambda: context.keys.check(request))
    return QueueEvents(events, context.settings.stream_keep_alive)


@router.get("/request/{request_id}")
async def get_request(request_id: str, context: Running, caller: Caller) -> dict[str, Any]:
    """The state of one request. The id of its answer (`resp_...`, `chatcmpl-...`) names it too."""
    request_id = names.request_id(request_id)
    await _registered(context, request_id)
    state = await _state(context, caller, request_id)
    position = estimated_wait_s = None
    if state.status is RequestStatus.QUEUED:
        if state.sequence is not None:
            place = await waiting_place(context.connection, state.model, state.sequence)
        else:
            place = await room.place(context.connection, state, context.keys.weight)
        if place is not None:
            line = context.rates.lines[state.model]
            line.sample(place.moved)
            position, wait_s = place.position, line.wait_s(place.position)
            estimated_wait_s = None if wait_s is None else round(wait_s, 1)
    retried_as = None
    if state.retryable and await context.states.get(names.retry_id(request_id)) is not None:
        retried_as = names.retry_id(request_id)
    more = {"position": position, "estimated_wait_s": estimated_wait_s, "retried_as": retried_as}
    return shown(caller, state) | more


@router.get("/request/{request_id}/answer")
async def get_answer(request_id: str, context: Running, caller: Caller) -> dict[str, Any]:
    """The text so far of each choice of a stored answer, for the key whose request it is; `texts` is null if it is not
    stored."""
    request_id = names.request_id(request_id)
    state = await _state(context, caller, request_id)
    if state.key != caller.name:
        raise RequestNotFound(f"No request {request_id!r} of yours is known.", param="request_id")
    texts = await answer_texts(context.answers, request_id) if state.logged else None
    return {"id": request_id, "status": state.status.value, "texts": texts}


@router.delete("/request/{request_id}")
async def cancel_request(request_id: str, context: Running, caller: Caller) -> dict[str, Any]:
    """Cancel a request, waiting or running; one that has ended stays as it ended."""
    request_id = names.request_id(request_id)
    await _registered(context, request_id)
    await _state(context, caller, request_id)
    cancelled = await context.dispatcher.cancel(request_id, "by DELETE /v1/queue/request")
    state = await _state(context, caller, request_id)
    return {"id": request_id, "cancelled": cancelled, "status": state.status.value}


@router.get("/failed")
async def list_failed(context: Running, caller: Caller, limit: Limit = 20, after: str | None = None) -> dict[str, Any]:
    """The stored requests whose attempts are spent, oldest first. They can be run again."""
    after = names.request_id(after) if after is not None else None
    known = after is None or names.is_request_id(after)
    states = await context.failed.page(_owner(caller), after, limit + 1) if known else None
    if states is None:
        raise InvalidRequest(f"There is no failed request {after!r}.", param="after")
    return page([shown(caller, state) for state in states], limit, "asc", "")


@router.post("/request/{request_id}/retry")
async def retry_request(request_id: str, context: Running, caller: Caller) -> dict[str, Any]:
    """Run a failed request again. What it was to answer keeps its id. A repetition changes nothing."""
    request_id = names.request_id(request_id)
    if not names.is_request_id(request_id):
        raise RequestNotFound(f"No failed request {request_id!r} is kept.", param="request_id")
    return {"id": request_id, "retried_as": await context.retries.retry(_owner(caller), request_id)}


def _owner(caller: Client) -> str:
    return "*" if caller.operator else owner_token(caller.name)


async def _registered(context: Context, request_id: str) -> None:
    await context.dispatcher.registered(request_id)
    await context.stored.registered(request_id)


async def _state(context: Context, caller: Client, request_id: str) -> RequestState:
    # An id becomes part of a subject: what cannot be an id must not.
    stored = await context.states.get(request_id) if names.is_request_id(request_id) else None
    # A client is not told that another's request exists.
    if stored is None or not caller.may_see(stored.state.key):
        raise RequestNotFound(f"No request {request_id!r} is known.", param="request_id")
    return stored.state


class QueueEvents(Response):
    """The events of one listener, until it leaves or does not read, its key is taken away, or the api stops."""

    def __init__(self, events: AsyncGenerator[bytes, None], keep_alive_s: float) -> None:
        super().__init__()
        self._events = events
        self._keep_alive_s = keep_alive_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The ASGI call. An error before the first event is an HTTP status."""
        peer = Peer.of(scope)
        try:
            async with contextlib.aclosing(self._events) as events:
                first = await anext(events)
                async with sse.EventStream(send, self._keep_alive_s) as stream:
                    await stream.write(first)
                    async for event in events:
                        if peer.left:
                            return
                        await stream.write(event)
                    await stream.write(b"", last=True)
        except SlowReader:
            return
