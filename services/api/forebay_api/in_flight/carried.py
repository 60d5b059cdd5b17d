"""Requests for which no client waits, such as the lines of a batch: admitted once, and read when they have ended."""

import asyncio
import logging
import time
from collections import deque
from contextlib import AsyncExitStack
from typing import Final

from forebay_api.in_flight.dispatcher import Dispatcher
from forebay_api.in_flight.live_answer import LiveAnswer
from forebay_api.in_flight.reader import Reader
from forebay_api.in_flight.stored import StoredRequests
from forebay_contracts.queueing.protocols import AnswerLog, StateStore
from forebay_contracts.wire.errors import InferenceFailed, QueueUnavailable
from forebay_contracts.wire.request import InferenceRequest

WRITTEN_S: Final = 1.0
"""How long an answer stays whole that is kept elsewhere: a killed NATS may lose what it has taken just before."""

END_KEPT_S: Final = 1_800.0
"""How long the last record of an answer stays that is kept elsewhere, as far as there is room."""

END_KEPT_LEAST_S: Final = 60.0
"""The same without room, or beyond MAX_ENDS."""

MAX_ENDS: Final = 10_000
"""Most last records that stay for longer than that."""

log = logging.getLogger(__name__)


class CarriedRequests:
    """Their answers go into the answer log, and none of it is kept here until they are whole.

    The limit of a key does not count them: whoever makes them bounds them.
    """

    def __init__(self, dispatcher: Dispatcher, stored: StoredRequests, states: StateStore, answers: AnswerLog) -> None:
        self._dispatcher = dispatcher
        self._stored = stored
        self._states = states
        self._answers = answers
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._freed: deque[tuple[float, str]] = deque()
        self._twice: set[str] = set()
        """Requests that may be in the queue twice, since nothing was known of them when they were taken up."""

    async def carry(self, request: InferenceRequest, *, fresh: bool) -> asyncio.Task[None]:
        """Admit a request; the task ends with it. Unless it is `fresh`, it may have been admitted before, at any api.

        Raises:
            QueueFull, QueueUnavailable, RequestTooLarge, AnswerLogFull: nothing was admitted.
        """
        if (running := self._tasks.get(request.id)) is not None:
            return running
        async with AsyncExitStack() as held:
            coming = await held.enter_async_context(self._answers.follow(request.id, fresh=fresh))
            sequence = None if fresh else await self._sequence(request.id)
            if sequence is None:
                await self._free_ends()
                await self._stored.need_room()
                sequence = await self._dispatcher.admit(request)
                if not fresh:
                    self._twice.add(request.id)
            reader = Reader(request, wanted=False)
            task = self._stored.background(self._stored.watch(request, sequence, reader, coming, held.pop_all()))
        self._tasks[request.id] = task
        task.add_done_callback(lambda _: self._tasks.pop(request.id, None))
        return task

    async def _sequence(self, request_id: str) -> int | None:
        """The sequence of a request that was admitted (0: not known), or None if it was not."""
        if (stored := await self._states.get(request_id)) is not None:
            return stored.state.deferred or stored.state.sequence or 0
        return 0 if await self._answers.read(request_id, most=1) else None

    async def known(self, request_id: str) -> bool:
        """Whether a request was admitted, as far as is known."""
        return await self._sequence(request_id) is not None

    async def whole(self, request: InferenceRequest) -> LiveAnswer:
        """The answer to a request that has ended.

        Raises:
            ApiError: the error that it ended with.
            QueueUnavailable: it has not ended, as far as is known.
        """
        answer = await self._stored.so_far(request)
        if answer.completed is not None:
            return answer
        if answer.error is None and await self._stored.ended_as(request) is None:
            raise QueueUnavailable("the request has not ended")
        raise answer.error or InferenceFailed("the answer is not stored any more")

    async def cancel(self, request: InferenceRequest, reason: str) -> None:
        """Cancel a request, unless it has ended."""
        await self._stored.cancel(request, reason)

    def free(self, request_id: str) -> None:
        """Remove an answer that is kept elsewhere after WRITTEN_S, and END_KEPT_S later its last record too.

        No answer is written to its end twice. Nothing follows a last record that is there. Once it is removed, an
        attempt could write into the empty log. But an attempt writes the end only after its claim, and until
        REQUEST_STATE_TTL each claim finds the final state. So the attempt would have to claim before the end, and then
        to stand still for END_KEPT_S. The message of a request that may be in the queue twice can come later than that:
        there the last record stays until RESPONSE_TTL.
        """
        loop = asyncio.get_running_loop()
        loop.call_later(WRITTEN_S, lambda: self._stored.background(self._free(request_id)))

    async def _free(self, request_id: str) -> None:
        # If NATS is away, or this api dies before, RESPONSE_TTL removes it.
        await self._answers.purge(request_id, keep=1)
        if request_id in self._twice:
            self._twice.discard(request_id)
        else:
            self._freed.append((time.monotonic(), request_id))
        await self._free_ends()

    async def _free_ends(self) -> None:
        """Remove the last records that have stayed long enough."""
        has_room = await self._answers.has_room()
        while self._freed:
            kept_s = END_KEPT_S if has_room and len(self._freed) <= MAX_ENDS else END_KEPT_LEAST_S
            if self._freed[0][0] > time.monotonic() - kept_s:
                return
            _, earlier = self._freed.popleft()
            stored = await self._states.get(earlier)
            if stored is None or stored.state.status.final:
                await self._answers.purge(earlier)
