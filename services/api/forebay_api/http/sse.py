"""Server-sent events over ASGI: writes with a bound, and signs of life while there is nothing to write."""

import asyncio
import contextlib
import math
from collections.abc import Callable
from typing import Any, Final, Self

from starlette.types import Send

from forebay_api.in_flight.answer import SlowReader

MAX_WRITE_STALL_S: Final = 30.0
"""A client whose connection takes nothing for so long is disconnected."""

COMMENT: Final = b": keep-alive\n\n"
"""What parsers of events ignore."""

_STALLED: Final = "the client does not read its stream"

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

    __slots__ = ("_keep_alive", "_keep_alive_s", "_loop", "_send", "_sign", "_since", "_stalled", "_timer", "_writer")

    def __init__(self, send: Send, keep_alive_s: float, keep_alive: Callable[[], bytes] = lambda: COMMENT) -> None:
        self._send = send
        self._keep_alive_s = keep_alive_s or math.inf
        self._keep_alive = keep_alive
        self._loop = asyncio.get_running_loop()
        self._writer: asyncio.Task[Any] | None = None
        """The task that writes."""
        self._since = self._loop.time()
        """When the write under way began, or the last one ended."""
        self._stalled = False
        self._timer: asyncio.TimerHandle | None = None
        self._sign: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        await self._send({"type": "http.response.start", "status": 200, "headers": _HEADERS})
        self._look_in(self._keep_alive_s)
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
        if self._stalled:
            raise SlowReader(_STALLED)
        task = self._writer = asyncio.current_task()
        self._since = self._loop.time()
        try:
            await self._send({"type": "http.response.body", "body": data, "more_body": not last})
        except asyncio.CancelledError:
            if task is None or not self._stalled or task.uncancel():
                raise
            raise SlowReader(_STALLED) from None
        finally:
            if self._writer is task:
                self._writer, self._since = None, self._loop.time()

    def _look_in(self, seconds: float) -> None:
        # One timer for all writes: a timeout for each costs as much as the write of a token.
        self._timer = self._loop.call_later(min(seconds, MAX_WRITE_STALL_S), self._look)

    def _look(self) -> None:
        passed_s, limit_s = self._loop.time() - self._since, self._keep_alive_s
        if (writer := self._writer) is not None:
            limit_s = MAX_WRITE_STALL_S
            if passed_s >= limit_s:
                self._stalled = True
                writer.cancel()
                return
        elif passed_s >= limit_s:
            self._sign, passed_s = asyncio.create_task(self._show_life()), 0.0
        self._look_in(limit_s - passed_s)

    async def _show_life(self) -> None:
        if self._writer is not None:
            return  # since the timer, in the same turn of the event loop
        with contextlib.suppress(SlowReader):  # the next write notices it too
            await self.write(self._keep_alive())
