"""Server-sent events over ASGI: writes with a bound, and signs of life while there is nothing to write."""

import asyncio
import contextlib
from collections.abc import Callable
from typing import Final, Self

from starlette.types import Receive, Send

from forebay_api.in_flight.answer import SlowReader

MAX_WRITE_STALL_S: Final = 30.0
"""A client whose connection takes nothing for so long is disconnected."""

COMMENT: Final = b": keep-alive\n\n"
"""What parsers of events ignore."""

_HEADERS: Final = (
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
)


class EventStream:
    """The stream of one client. Entering sends its status 200 and headers.

    After `keep_alive_s` without a write (0: never) it sends what `keep_alive` gives: proxies, and some clients, close a
    connection on which nothing comes.
    """

    __slots__ = ("_keep_alive", "_keep_alive_s", "_loop", "_send", "_sign", "_timer", "_writing", "_written_at")

    def __init__(self, send: Send, keep_alive_s: float, keep_alive: Callable[[], bytes] = lambda: COMMENT) -> None:
        self._send = send
        self._keep_alive_s = keep_alive_s
        self._keep_alive = keep_alive
        self._loop = asyncio.get_running_loop()
        self._written_at = self._loop.time()
        self._writing = False
        self._timer: asyncio.TimerHandle | None = None
        self._sign: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        await self._send({"type": "http.response.start", "status": 200, "headers": _HEADERS})
        if self._keep_alive_s:
            self._timer = self._loop.call_later(self._keep_alive_s, self._look)
        return self

    async def __aexit__(self, *_: object) -> None:
        for pending in (self._timer, self._sign):
            if pending is not None:
                pending.cancel()

    async def write(self, data: bytes, *, last: bool = False) -> None:
        """Send `data`; with `last`, the answer ends.

        Raises:
            SlowReader: the connection took nothing for MAX_WRITE_STALL_S.
        """
        self._writing = True
        try:
            async with asyncio.timeout(MAX_WRITE_STALL_S):
                await self._send({"type": "http.response.body", "body": data, "more_body": not last})
        except TimeoutError:
            raise SlowReader("the client does not read its stream") from None
        finally:
            self._writing = False
        self._written_at = self._loop.time()

    def _look(self) -> None:
        # One timer for all writes: one for each would cost more than the write of a token.
        rest_s = self._written_at + self._keep_alive_s - self._loop.time()
        if rest_s <= 0:
            rest_s = self._keep_alive_s
            if not self._writing:
                self._sign = asyncio.create_task(self._show_life())
        self._timer = self._loop.call_later(rest_s, self._look)

    async def _show_life(self) -> None:
        with contextlib.suppress(SlowReader):  # the next write notices it too
            await self.write(self._keep_alive())


async def left(receive: Receive) -> None:
    """Wait until the client has left."""
    while (await receive())["type"] != "http.disconnect":
        pass
