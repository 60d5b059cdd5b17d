"""Ends what waits beyond its deadline although its api is gone, if its end is an event for webhooks.

The api that admitted a request ends it in time, and so does a worker that takes it. Where there is neither, nobody
would tell of the end until somebody reads the answer.
"""

import asyncio
import contextlib
import math
from collections.abc import AsyncIterator, Callable
from typing import Final

from nats.errors import Error as NatsError
from pydantic import ValidationError

from forebay_api.in_flight.stored import OVERDUE_S, StoredRequests
from forebay_contracts.nats import clock, direct_get
from forebay_contracts.nats.connection import Connection
from forebay_contracts.wire import names
from forebay_contracts.wire.errors import ForebayError, QueueUnavailable
from forebay_contracts.wire.request import InferenceRequest

LOOK_S: Final = 5.0
"""Least time between two looks at what waits, also after one that failed."""

SCAN: Final = 50
"""Most messages that a look holds at once. Each may have the size of a message."""

_NOTIFY: Final = b'"notify":true'
_STREAMS: Final = ((names.STREAM, names.REQUEST_SUBJECTS), (names.DEFERRED, names.ROOM_SUBJECTS))


class Overdue:
    """Looks when it is told that an api is gone, and then at the earliest deadline of what waits."""

    def __init__(self, waiting: Callable[[], AsyncIterator[InferenceRequest]], stored: StoredRequests) -> None:
        self._waiting = waiting
        self._stored = stored
        self._looking: asyncio.Task[None] | None = None
        self._timer: asyncio.TimerHandle | None = None

    def look(self) -> None:
        """End what is overdue. This api has just started, or another one is gone."""
        self.close()
        self._looking = self._stored.background(self._look())

    def close(self) -> None:
        """Look no more."""
        if self._timer is not None:
            self._timer.cancel()
        if self._looking is not None:
            self._looking.cancel()

    async def _look(self) -> None:
        due = math.inf
        try:
            async for request in self._waiting():
                if request.deadline + OVERDUE_S <= clock.now():
                    with contextlib.suppress(ForebayError):
                        await self._stored.end_late(request)
                        continue
                due = min(due, request.deadline + OVERDUE_S)
        except QueueUnavailable:
            due = 0.0
        if due < math.inf:
            self._timer = asyncio.get_running_loop().call_later(max(due - clock.now(), LOOK_S), self.look)


async def waiting(connection: Connection) -> AsyncIterator[InferenceRequest]:
    """The requests in the queue and in the waiting room whose end is an event. Raises QueueUnavailable."""
    for stream, subjects in _STREAMS:
        after = 0
        while True:
            try:
                found = await direct_get.messages(connection, stream, subjects, after + 1, SCAN)
            except (NatsError, TimeoutError) as exc:
                raise QueueUnavailable("what waits cannot be read") from exc
            for msg in found:
                after = int((msg.headers or {})["Nats-Sequence"])
                if _NOTIFY in msg.data and (request := _decoded(msg.data)) is not None:
                    yield request
            if len(found) < SCAN:
                break


def _decoded(data: bytes) -> InferenceRequest | None:
    try:
        return InferenceRequest.model_validate_json(data)
    except ValidationError:
        return None  # a worker ends it
