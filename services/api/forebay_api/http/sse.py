"""Server-sent events over ASGI: writes with a bound, and comments while there is nothing to write."""

import asyncio
import contextlib
from typing import Final, Self

from starlette.types import Receive, Send

from forebay_api.in_flight.answer import SlowReader

MAX_WRITE_STALL_S: Final = 30.0
"""A client whose connection takes nothing for so long is disconnected."""

KEEP_ALIVE: Final = b": keep-alive\n\n"
"""A comment, which parsers of events ignore."""

_HEADERS: Final = (
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
)


class EventStream:
    """The stream of one client. Entering sends its status 200 and headers.

    After `keep_alive_s` without a write (0: never) a comment is sent. Proxies close connections on which nothing comes.
    """

    __slots__ = ("_comment", "_keep_alive_s", "_loop", "_send", "_timer", "_written_at")

    def __init__(self, send: Send, keep_alive_s: float) -> None:
        self._send = send
        self._keep_alive_s = keep_alive_s
        self._loop = asyncio.get_running_loop()
        self._written_at = self._loop.time()
        self._timer: asyncio.TimerHandle | None = None
        self._comment: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        await self._send({"type": "http.response.start", "status": 200, "headers": _HEADERS})
        if self._keep_alive_s:
            self._timer = self._loop.call_later(self._keep_alive_s, self._look)
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._timer is not None:
            self._timer.cancel()
        if self._comment is not None:
            self._comment.cancel()

    async def write(self, data: bytes, *, last: bool = False) -> None:
        """Send `data`; with `last`, the answer ends.

        Raises:
            SlowReader: the connection took nothing for MAX_WRITE_STALL_S.
        """
        try:
            async with asyncio.timeout(MAX_WRITE_STALL_S):
                await self._send({"type": "http.response.body", "body": data, "more_body": not last})
        except TimeoutError:
            raise SlowReader("the client does not read its stream") from None
        self._written_at = self._loop.time()

    def _look(self) -> None:
        """One timer for all writes, since one for each would cost a token more than its write."""
        rest_s = self._written_at + self._keep_alive_s - self._loop.time()
        if rest_s <= 0:
            rest_s = self._keep_alive_s
            if self._comment is None or self._comment.done():
                self._comment = asyncio.create_task(self._keep_alive())
        self._timer = self._loop.call_later(rest_s, self._look)

    async def _keep_alive(self) -> None:
        with contextlib.suppress(SlowReader):  # the next write notices it too
            await self.write(KEEP_ALIVE)


async def left(receive: Receive) -> None:
    """Wait until the client has left."""
    while (await receive())["type"] != "http.disconnect":
        pass
