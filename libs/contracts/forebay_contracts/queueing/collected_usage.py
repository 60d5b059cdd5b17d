"""The usage of requests without a key, which this process adds up and counts once a second.

A count of its own for each request, as those with a key have, costs 4 % of the most requests/s that a machine of two
cores reaches. Nobody is billed for these. So what a process has collected is lost when it is killed.
"""

import asyncio
import contextlib
import time
import uuid
from collections import Counter
from typing import Final

from nats.errors import Error as NatsError

from forebay_contracts.nats.connection import Connection
from forebay_contracts.nats.streams import DUPLICATE_WINDOW_S
from forebay_contracts.queueing.usage import counter_of, value_of
from forebay_contracts.wire import names
from forebay_contracts.wire.state import RequestState

COLLECT_S: Final = 1.0
"""For how long it is collected."""

COUNT_TIMEOUT_S: Final = 5.0
"""How long one count may take."""

RETRY_S: Final = 0.5
"""Pause between two tries at a count while NATS is away."""


class CollectedUsage:
    """Sums by counter that are not counted yet. What is left when the connection closes is counted then."""

    def __init__(self, connection: Connection) -> None:
        self._requests = connection.requests
        self._sums: Counter[str] = Counter()
        self._task: asyncio.Task[None] | None = None
        connection.on_close.append(self._count)

    def add(self, state: RequestState) -> None:
        """Add what a request in this final state used."""
        self._sums[counter_of(state)] += value_of(state)
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._collect())

    async def _collect(self) -> None:
        while self._sums:  # more may come while it is counted
            await asyncio.sleep(COLLECT_S)
            await self._count(time.monotonic() + DUPLICATE_WINDOW_S / 2)

    async def _count(self, give_up_at: float = 0) -> None:
        """Count once: a try whose answer was lost is repeated under the same name, for at most this time."""
        sums, self._sums = self._sums, Counter()
        name = uuid.uuid4().hex
        counters = {
            counter: {names.HEADER_INCREMENT: f"+{value}", names.HEADER_MSG_ID: f"{name}.{number}"}
            for number, (counter, value) in enumerate(sums.items())
        }
        while counters:
            with contextlib.suppress(NatsError, TimeoutError):
                await self._requests.store_all(counters, timeout_s=COUNT_TIMEOUT_S)
                return
            if time.monotonic() >= give_up_at:
                return
            await asyncio.sleep(RETRY_S)
