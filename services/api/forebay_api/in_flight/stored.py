"""Requests whose answer is stored: it goes into the answer log, and outlives its client and this api.

Whoever wants to read it follows the log, at any api. A client that leaves ends nothing. The api that admitted a request
also ends it at its deadline; if that api is gone, its worker does, or `Overdue`, or the next reader.
"""

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import AbstractContextManager, AsyncExitStack
from typing import Any, Final

from forebay_api import request_metrics
from forebay_api.in_flight.dispatcher import Dispatcher
from forebay_api.in_flight.live_answer import LiveAnswer
from forebay_api.in_flight.lost import is_lost, publish_again
from forebay_api.in_flight.reader import Reader
from forebay_api.in_flight.records import Records
from forebay_contracts.nats import clock
from forebay_contracts.queueing import transitions
from forebay_contracts.queueing.cancellation import Cancellation
from forebay_contracts.queueing.failed import FailedRequests
from forebay_contracts.queueing.logged_reply import have
from forebay_contracts.queueing.protocols import PAGE, Admission, AnswerLog, Record, StateStore
from forebay_contracts.queueing.state_store import QUEUED_AFTER_S
from forebay_contracts.telemetry.logs import fields
from forebay_contracts.wire.errors import (
    AnswerLogFull,
    ApiError,
    ForebayError,
    QueueConflict,
    QueueUnavailable,
    RequestNotFound,
    StateUnreadable,
)
from forebay_contracts.wire.frames import Failed, decode_frame
from forebay_contracts.wire.message import Message
from forebay_contracts.wire.request import InferenceRequest
from forebay_contracts.wire.state import RequestStatus

OVERDUE_S: Final = 2.0
"""How long after its deadline a request may take to end in the log."""

END_RETRY_S: Final = 1.0
"""Pause between two tries to end a request whose deadline has passed."""

log = logging.getLogger(__name__)


class StoredRequests:
    """Admits requests whose answer is stored, and reads stored answers.

    `one_more` counts a request of its key until it has ended, and raises KeyLimitReached or defers it. `state_ttl_s` is
    REQUEST_STATE_TTL.
    """

    def __init__(
        self,
        dispatcher: Dispatcher,
        admission: Admission,
        states: StateStore,
        cancellation: Cancellation,
        answers: AnswerLog,
        records: Records,
        one_more: Callable[[InferenceRequest], AbstractContextManager[InferenceRequest]],
        failed: FailedRequests,
        state_ttl_s: float,
    ) -> None:
        self._failed = failed
        self._state_ttl_s = state_ttl_s
        self._dispatcher = dispatcher
        self._admission = admission
        self._states = states
        self._cancellation = cancellation
        self._answers = answers
        self._records = records
        self._one_more = one_more
        self._tasks: set[asyncio.Task[None]] = set()
        self._watched: dict[str, tuple[InferenceRequest, int]] = {}
        """Requests that were admitted here and have not ended, with their sequences."""
        self._unregistered: set[str] = set()
        """Those of them whose state is not stored yet."""

    async def close(self) -> None:
        """Stop following. The requests go on."""
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)

    @contextlib.asynccontextmanager
    async def submit(
        self, request: InferenceRequest, key: str | None = None, record: Message | None = None
    ) -> AsyncIterator[LiveAnswer]:
        """Admit `request`, and keep `record` of it under `key`; yields its answer. Leaving the block ends nothing.

        Raises:
            QueueFull, QueueUnavailable, RequestTooLarge, KeyLimitReached, AnswerLogFull: nothing of it stays.
        """
        await self.need_room()
        if key is not None:
            request = request.model_copy(update={"record": key})
        async with AsyncExitStack() as held:
            request = held.enter_context(self._one_more(request))
            # Before it is admitted: then nothing of its answer can be missed, and the log need not be read.
            coming = await held.enter_async_context(self._answers.follow(request.id, fresh=True))
            sequence = await self._admit(request, key, record)
            reader = Reader(request)
            self.background(self.watch(request, sequence, reader, coming, held.pop_all()))
        with reader as answer:
            yield answer

    async def need_room(self) -> None:
        """Raises AnswerLogFull if nothing more may be stored."""
        if not await self._answers.has_room():
            raise AnswerLogFull("no room is left for further stored answers, try again later")

    async def _admit(self, request: InferenceRequest, key: str | None, record: Message | None) -> int:
        if key is None or record is None:
            return await self._dispatcher.admit(request)
        # Side by side: one round trip less until the first token. The record is sent first.
        keeping = asyncio.create_task(self._records.put(key, record))
        await asyncio.sleep(0)
        try:
            sequence = await self._dispatcher.admit(request)
        except BaseException:
            with contextlib.suppress(ApiError):
                await keeping
                await self._records.delete(key)
            raise
        try:
            await keeping
        except ApiError:
            await self.cancel(request, "no record of it could be kept")
            raise
        return sequence

    @contextlib.asynccontextmanager
    async def read(self, request: InferenceRequest) -> AsyncIterator[LiveAnswer]:
        """The answer to a request that any api has admitted, from its beginning and until its end."""
        reader = Reader(request)
        task = asyncio.create_task(self._follow(request, reader))
        try:
            with reader as answer:
                yield answer
        finally:
            task.cancel()

    async def so_far(self, request: InferenceRequest) -> LiveAnswer:
        """The answer as it is now. Raises QueueUnavailable."""
        reader = Reader(request)
        await self._catch_up(reader)
        overdue = clock.now() > request.deadline + OVERDUE_S
        if overdue and not reader.answer.done and await self.ended_as(request) is None:
            await self.end_late(request)
            await self._catch_up(reader)
        return reader.answer

    async def _catch_up(self, reader: Reader) -> None:
        while True:
            records = await self._answers.read(reader.answer.request.id, reader.last, PAGE)
            reader.receive(records)
            if len(records) < PAGE:
                return

    async def known(self, request: InferenceRequest) -> bool:
        """Whether the request has a state. Raises QueueUnavailable."""
        return await self._states.get(request.id) is not None

    async def ended_as(self, request: InferenceRequest) -> RequestStatus | None:
        """How a request ended whose answer was removed, or None if it was not. Raises QueueUnavailable."""
        stored = await self._states.get(request.id)
        if stored is None or not stored.state.status.final or await self._answers.read(request.id, most=1):
            return None  # the last frame is in the log before the state is final
        return stored.state.status

    async def cancel(self, request: InferenceRequest, reason: str) -> None:
        """Cancel a request, unless it has ended."""
        if await self.ended_as(request) is not None:
            return  # its answer was deleted, and stays empty
        unknown = transitions.queued(request, None)
        await self._cancellation.end(request.id, RequestStatus.CANCELLED, reason, unknown=unknown)

    async def forget(self, request: InferenceRequest) -> None:
        """Cancel a request, if it still runs, and remove its answer.

        If it failed, it is no longer kept to be run again. If it was cancelled, its last frame stays: an attempt that
        begins late could write into an empty log.
        """
        await self.cancel(request, "its answer was deleted")
        records = await self._answers.read(request.id)
        last = [decode_frame(frame) for frame in records[-1].frames] if records else []
        await self._answers.purge(request.id, keep=int(len(last) == 1 and isinstance(last[0], Failed)))
        if request.record is not None:
            await self._failed.remove(request)

    async def watch(
        self,
        request: InferenceRequest,
        sequence: int,
        reader: Reader,
        coming: AsyncIterator[list[Record]],
        held: AsyncExitStack,
    ) -> None:
        """Follow a request that was admitted here to its end."""
        async with held:
            self._watched[request.id] = request, sequence
            self._unregistered.add(request.id)
            timer = asyncio.get_running_loop().call_later(QUEUED_AFTER_S, self._register, request.id, reader)
            try:
                outcome = await self._feed(request, reader, coming, overdue_s=0)
            finally:
                timer.cancel()
                self._unregistered.discard(request.id)
                del self._watched[request.id]
        measured = request_metrics.of(request.model, request.completion_type.value)
        measured.end_stored(outcome, max(clock.now() - request.created_at, 0.0))

    async def _follow(self, request: InferenceRequest, reader: Reader) -> None:
        """Follow a request of any api to its end."""
        async with self._answers.follow(request.id) as coming:
            await self._feed(request, reader, coming)

    async def _feed(
        self,
        request: InferenceRequest,
        reader: Reader,
        coming: AsyncIterator[list[Record]],
        overdue_s: float = OVERDUE_S,
    ) -> RequestStatus | None:
        """Give `reader` what comes, until the end; returns how it ended.

        Ends the request `overdue_s` after its deadline.
        """
        ending = asyncio.create_task(self._end_at_deadline(request, overdue_s))
        try:
            async for records in coming:
                if (outcome := reader.receive(records)) is not None:
                    return outcome
                if not records and (outcome := await self._removed(request, reader)) is not None:
                    return outcome
                await reader.answer.room()
        except ApiError as exc:
            log.warning("[RequestQueue] %s: %s", request.id, exc, extra=fields(request_id=request.id))
            reader.answer.fail(exc)
        finally:
            ending.cancel()
        return None

    async def _removed(self, request: InferenceRequest, reader: Reader) -> RequestStatus | None:
        """How a request ended, if its answer was removed before all of it was read. Ends the wait of its reader."""
        with contextlib.suppress(QueueUnavailable, StateUnreadable):
            if (outcome := await self.ended_as(request)) is not None:
                reader.answer.fail(RequestNotFound("the answer was deleted", code=None))
                return outcome
        return None

    def look_after_an_outage(self) -> None:
        """Publish again what NATS has lost of the requests that were admitted here."""
        for request, sequence in self._watched.values():
            self.background(self._look_after(request, sequence))

    async def _look_after(self, request: InferenceRequest, sequence: int) -> None:
        stored = await self._states.get(request.id)
        if stored is not None and stored.state.status.final:
            return
        state = stored.state if stored is not None else None
        lost = await is_lost(self._admission, request, sequence, state)
        if not lost or not have(await self._answers.read(request.id)).wanted:
            return
        # An answer that has ended may have been removed since: only after its state was final.
        stored = await self._states.get(request.id)
        if stored is None or not stored.state.status.final:
            sequence = await publish_again(self._admission, request, state)
            if request.id in self._watched:
                self._watched[request.id] = request, sequence

    async def registered(self, request_id: str) -> None:
        """Wait until the state of a request that was admitted here is stored."""
        if request_id in self._unregistered:
            self._unregistered.discard(request_id)
            # Unless a worker was faster.
            with contextlib.suppress(QueueConflict, QueueUnavailable):
                await self._states.write(transitions.queued(*self._watched[request_id]), 0)

    def _register(self, request_id: str, reader: Reader) -> None:
        if reader.last:
            return  # a worker has begun, so it has written the state
        self.background(self.registered(request_id))

    def background(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Do `work` until its end, or until `close`."""

        async def run() -> None:
            with contextlib.suppress(ForebayError):
                await work

        task = asyncio.create_task(run())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _end_at_deadline(self, request: InferenceRequest, overdue_s: float) -> None:
        while (left_s := request.deadline - clock.now() + overdue_s) > (pause_s := self._state_ttl_s / 3):
            await asyncio.sleep(pause_s)
            await self._keep_state(request)
        await asyncio.sleep(left_s)
        while True:
            with contextlib.suppress(ForebayError):
                await self.end_late(request)
                return
            await asyncio.sleep(END_RETRY_S)

    async def _keep_state(self, request: InferenceRequest) -> None:
        """Write the state of a request that waits again, before `state_ttl_s` removes it.

        An unknown request would be admitted again. One that has begun is known by its log.
        """
        with contextlib.suppress(ForebayError):
            stored = await self._states.get(request.id)
            if stored is not None and stored.state.status is RequestStatus.QUEUED:
                await self._states.write(stored.state, stored.revision)

    async def end_late(self, request: InferenceRequest) -> None:
        """End a request whose deadline has passed, unless it has ended. Raises QueueUnavailable, AnswerLogFull."""
        _, sequence = self._watched.get(request.id, (request, None))
        seconds = request.deadline - request.created_at
        await self._cancellation.end(
            request.id,
            RequestStatus.TIMED_OUT,
            f"the request was not finished within {seconds:g} seconds",
            unknown=transitions.queued(request, sequence),
        )
