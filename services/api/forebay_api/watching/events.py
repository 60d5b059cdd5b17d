"""`GET /v1/queue/events`: the queue as it moves, as server-sent events."""

import asyncio
import contextlib
from collections.abc import Callable

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from forebay_api.clients.keys import Client
from forebay_api.context import Running
from forebay_api.http import sse
from forebay_api.in_flight.answer import SlowReader
from forebay_api.watching.feed import Feed

router = APIRouter(prefix="/v1/queue", tags=["queue"])


class QueueEvents(Response):
    """The events of one listener, until it leaves or does not read, its key is taken away, or the api stops."""

    def __init__(self, feed: Feed, caller: Callable[[], Client]) -> None:
        super().__init__()
        self._feed = feed
        self._caller = caller

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The ASGI call. An error before the first event is an HTTP status."""
        leaving = asyncio.create_task(_left(receive))
        try:
            async with contextlib.aclosing(self._feed.listen(self._caller)) as events:
                first = await anext(events)
                await sse.begin(send)
                await sse.write(send, first)
                async for event in events:
                    if leaving.done():
                        return
                    await sse.write(send, event)
            await sse.write(send, b"", last=True)
        except SlowReader:
            return
        finally:
            leaving.cancel()


@router.get("/events", response_class=Response, responses={200: {"content": {"text/event-stream": {}}}})
async def get_queue_events(request: Request, context: Running) -> Response:
    """Numbers, workers and the newest requests, then each change of them, at most four messages a second.

    Each is an `event: queue` whose data is a JSON object of `at`, `connected`, `status` (as `/v1/queue/status`; null
    while NATS is away), `workers`, `requests` and `reset`. `requests` are those that have changed since the message
    before. With `reset`, they are the newest ones, and all others are to be forgotten. A key that is no operator's is
    told of its own requests only, without `fault` (what went wrong inside). A key that is taken away ends the stream.
    """
    return QueueEvents(context.feed, lambda: context.keys.check(request))


async def _left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
