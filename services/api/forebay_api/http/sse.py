"""Server-sent events over ASGI: the start of a stream, and writes with a bound."""

import asyncio
from typing import Final

from starlette.types import Receive, Send

from forebay_api.in_flight.answer import SlowReader

MAX_WRITE_STALL_S: Final = 30.0
"""A client whose connection takes nothing for so long is disconnected."""

_HEADERS: Final = (
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
)


async def begin(send: Send) -> None:
    """Send status 200 and the headers of a stream, whose length is unknown."""
    await send({"type": "http.response.start", "status": 200, "headers": _HEADERS})


async def left(receive: Receive) -> None:
    """Wait until the client has left."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def write(send: Send, data: bytes, *, last: bool = False) -> None:
    """Send `data`; with `last`, the answer ends.

    Raises:
        SlowReader: the connection took nothing for MAX_WRITE_STALL_S.
    """
    try:
        async with asyncio.timeout(MAX_WRITE_STALL_S):
            await send({"type": "http.response.body", "body": data, "more_body": not last})
    except TimeoutError:
        raise SlowReader("the client does not read its stream") from None
