"""`GET /v1/queue/events`: the queue as it moves, as server-sent events."""

import asyncio
import contextlib
from collections.abc import Callable

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from forebay_api.clients.keys import Client
from forebay_api.context import Authorized
from forebay_api.watching.feed import Feed

MAX_WRITE_STALL_S = 30.0
"""A listener whose connection takes nothing for so long is given up."""

router = APIRouter(prefix="/v1/queue", tags=["queue"])


class QueueEvents(Response):
    """A listener of the feed, until it leaves, does not read, its key is taken away, or the api stops."""

    media_type = "text/event-stream"

    def __init__(self, feed: Feed, caller: Callable[[], Client]) -> None:
        self._feed = feed
        self._caller = caller
        self.background = None
        self.status_code = 200
        self.body = b""
        self.raw_headers = [
            (b"content-type", b"text/event-stream; charset=utf-8"),
            (b"cache-control", b"no-cache"),
            (b"x-accel-buffering", b"no"),
        ]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The ASGI call."""
        leaving = asyncio.create_task(_left(receive))
        events = self._feed.listen(self._caller)
        started = False
        try:
            async for event in events:
                if leaving.done():
                    return
                async with asyncio.timeout(MAX_WRITE_STALL_S):
                    if not started:
                        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
                        started = True
                    await send({"type": "http.response.body", "body": event, "more_body": True})
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(MAX_WRITE_STALL_S):
                    await send({"type": "http.response.body", "body": b"", "more_body": False})
        except TimeoutError:
            return
        finally:
            leaving.cancel()
            await events.aclose()


@router.get("/events", response_class=Response, responses={200: {"content": {"text/event-stream": {}}}})
async def get_queue_events(request: Request, context: Authorized) -> Response:
    """Numbers, workers and the newest requests, then each change of them, at most four messages a second.

    `event: queue`, its data a JSON object of `at`, `connected`, `status` (as `/v1/queue/status`; null while NATS is
    away), `workers`, `requests`: those that have changed since the message before, and `reset`: whether they are the
    newest ones instead, and all that is known else is to be forgotten. A key that is no operator's is told of its own
    requests alone, and not of what went wrong inside (`fault`); one that is taken away ends the stream.
    """
    return QueueEvents(context.feed, lambda: context.keys.check(request))


async def _left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
