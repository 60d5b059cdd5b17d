"""Puts requests into the queue, and knows the answers that clients wait for here."""

import asyncio
import contextlib
import logging
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from functools import partial
from typing import Any, Final

from opentelemetry.trace import SpanKind

from forebay_api import request_metrics
from forebay_api.in_flight.answer import Cancelled, ClientLeft, SlowReader
from forebay_api.in_flight.live_answer import LiveAnswer
from forebay_api.in_flight.lost import is_lost, publish_again
from forebay_contracts.nats import clock
from forebay_contracts.queueing import transitions
from forebay_contracts.queueing.cancellation import Cancellation
from forebay_contracts.queueing.protocols import Admission, StateStore
from forebay_contracts.queueing.state_store import QUEUED_AFTER_S, end
from forebay_contracts.telemetry import tracing
from forebay_contracts.telemetry.logs import fields
from forebay_contracts.telemetry.metrics import bound
from forebay_contracts.wire.errors import (
    ForebayError,
    InferenceFailed,
    QueueConflict,
    QueueUnavailable,
    RequestTimeout,
    StateUnreadable,
)
from forebay_contracts.wire.frames import Completed, Resume, error_of
from forebay_contracts.wire.request import InferenceRequest
from forebay_contracts.wire.state import RequestStatus, Usage

FRAME_PATIENCE_S: Final = 1.0
"""How much later than the final state the last frame of a request may come."""

STATE_GRACE_S: Final = 10.0
"""How long after the deadline an api that was away still tries to find out how a request ended."""

STATE_RETRY_S: Final = 0.25
"""Pause between such tries."""

REMEMBERED_OUTCOMES: Final = 10_000
"""Number of ended requests whose outcome is remembered for late attempts."""

CLOSE_TIMEOUT_S: Final = 5.0
"""How long `close` waits for background tasks."""

LATE: Final = "REQUEST_TIMEOUT passed"
LOST: Final = "the end of the answer was lost"

log = logging.getLogger(__name__)


class Dispatcher:
    """Submits requests, decides how each ends for its client, and cancels it at most once.

    `instance` is the api's name on NATS. `one_more` counts a request of its key, and raises KeyLimitReached or defers
    it. `away` says whether workers may have taken this api for dead, and ended its requests.
    """

    def __init__(
        self,
        instance: str,
        admission: Admission,
        states: StateStore,
        cancellation: Cancellation,
        one_more: Callable[[InferenceRequest], contextlib.AbstractContextManager[InferenceRequest]],
        away: Callable[[], bool],
    ) -> None:
        self.instance = instance
        self._admission = admission
        self._states = states
        self._cancellation = cancellation
        self._one_more = one_more
        self._away = away
        self.waiting: dict[str, LiveAnswer] = {}
        """The answers that clients wait for here, by request id."""
        self._ended: OrderedDict[str, tuple[RequestStatus | None, Usage | None]] = OrderedDict()
        self._tasks: set[asyncio.Task[None]] = set()
        self._publish_seconds = bound(request_metrics.PUBLISH)

    async def close(self) -> None:
        """Wait for the background tasks."""
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=CLOSE_TIMEOUT_S)

    @contextlib.asynccontextmanager
    async def submit(self, request: InferenceRequest) -> AsyncIterator[LiveAnswer]:
        """Admit `request`; yields its answer. Leaving the block before the answer has ended cancels the request.

        Raises:
            QueueFull, QueueUnavailable, RequestTooLarge, KeyLimitReached: nothing was admitted.
        """
        with self._one_more(request) as request:
            answer = LiveAnswer(request, self._on_end, self._on_whole)
            self.waiting[request.id] = answer
            try:
                answer.sequence = await self.admit(request)
            except BaseException:
                self._forget(answer, RequestStatus.CANCELLED)
                raise
            measured = request_metrics.of(request.model, request.completion_type.value)
            loop = asyncio.get_running_loop()
            timers = (
                loop.call_later(QUEUED_AFTER_S, self._register_waiting, answer),
                loop.call_later(max(request.deadline - clock.now(), 0), self._time_out, answer),
            )
            if answer.done:  # it was cancelled while it was published
                remove = self._admission.remove
                self._background(answer, remove(request.id, answer.sequence, deferred=request.deferred))
            try:
                yield answer
            finally:
                for timer in timers:
                    timer.cancel()
                answer.fail(ClientLeft("the client left"))
                self._forget(answer, answer.outcome)
                measured.end(answer.outcome, max(clock.now() - request.created_at, 0.0))

    async def admit(self, request: InferenceRequest) -> int:
        """Publish `request`; returns its sequence. Raises QueueFull, QueueUnavailable, RequestTooLarge."""
        began = time.perf_counter()
        span = tracing.start("queue publish", SpanKind.PRODUCER, attributes={"forebay.request_id": request.id})
        try:
            with tracing.current(span):
                sequence = await self._admission.publish(request)
        finally:
            self._publish_seconds.observe(time.perf_counter() - began)
        request_metrics.of(request.model, request.completion_type.value).admitted.inc()
        if request.key is not None:
            bound(request_metrics.KEY_REQUESTS, request.key, "admitted").inc()
        log.info(
            "[RequestQueue] %s queued for %s at %d",
            request.id,
            request.model,
            sequence,
            extra=fields(request_id=request.id, model=request.model, type=request.completion_type.value),
        )
        return sequence

    def _on_whole(self, answer: LiveAnswer, last: Completed) -> None:
        """The answer is whole. If this api was away, the state decides first whether it may be."""
        if self._away():
            completed = RequestStatus.COMPLETED
            write = partial(end, self._states, answer.request.id, completed, None, usage=last.usage)
            self._background(answer, self._end_by_state(answer, completed, write, partial(answer.finish, last)))
        else:
            answer.finish(last)

    def _time_out(self, answer: LiveAnswer) -> None:
        """The deadline has passed."""
        if self._away() and not answer.done:
            late = RequestStatus.TIMED_OUT
            unknown = transitions.queued(answer.request, answer.sequence)
            write = partial(self._cancellation.end, answer.request.id, late, LATE, unknown=unknown, usage=answer.used)
            self._background(answer, self._end_by_state(answer, late, write, answer.time_out))
        else:
            answer.time_out()

    async def _end_by_state(
        self,
        answer: LiveAnswer,
        outcome: RequestStatus,
        write: Callable[[], Awaitable[object]],
        finish: Callable[[], None],
    ) -> None:
        """Write `outcome` unless the state is final, then end the request for its client as the state says.

        A worker may have written that nobody received the answer, or may be about to: the first write decides.
        """
        if answer.held:
            return
        request, state = answer.request, None
        answer.held = True
        try:
            while state is None and not answer.done and clock.now() < request.deadline + STATE_GRACE_S:
                try:
                    await write()
                    stored = await self._states.get(request.id)
                    state = stored.state if stored is not None else None
                except QueueUnavailable:
                    await asyncio.sleep(STATE_RETRY_S)
        except (QueueConflict, StateUnreadable) as exc:
            log.debug("%s: its end was not written: %s", request.id, exc)
        finally:
            answer.held = False
        if state is not None and state.status is outcome:
            finish()
        elif state is not None and state.status.final:
            answer.fail(error_of(state) or InferenceFailed(LOST))
        elif clock.now() >= request.deadline:
            answer.time_out()
        # Else no attempt has claimed the request yet: its worker asks again.

    def ended(self, request_id: str) -> Resume:
        """How a request for which nobody waits here ended for its client, as far as it is known."""
        outcome, usage = self._ended.get(request_id, (None, None))
        return Resume(wanted=False, outcome=outcome, usage=usage)

    async def cancel(self, request_id: str, reason: str) -> bool:
        """Cancel a request of any api; False if it had ended before or is unknown."""
        answer = self.waiting.get(request_id)
        if answer is None or answer.held:
            return await self._cancellation.cancel(request_id, reason)
        cancelled_here = not answer.done
        answer.fail(Cancelled(reason))
        if answer.cancelling is not None:
            await asyncio.wait([answer.cancelling])
        return cancelled_here

    def cancelled(self, request_id: str, reason: str) -> None:
        """End the wait of a client here whose request is cancelled, or is to be cancelled, from elsewhere."""
        if (answer := self.waiting.get(request_id)) is not None:
            answer.fail(Cancelled(reason))

    async def registered(self, request_id: str) -> None:
        """Wait until the state of a request that was submitted here is stored."""
        answer = self.waiting.get(request_id)
        if answer is not None and answer.sequence is not None and not answer.registered:
            await asyncio.wait([self._register(answer)])

    def _register_waiting(self, answer: LiveAnswer) -> None:
        if answer.attempt == 0 and not answer.registered:
            self._register(answer)

    def _register(self, answer: LiveAnswer) -> asyncio.Task[None]:
        """Create the state `queued`, unless a worker was faster."""

        async def create() -> None:
            with contextlib.suppress(QueueConflict):
                await self._states.write(transitions.queued(answer.request, answer.sequence), 0)

        def registered(_: asyncio.Task[None]) -> None:
            answer.registered, answer.registration = True, None

        if answer.registration is None:
            answer.registration = self._background(answer, create())
            answer.registration.add_done_callback(registered)
        return answer.registration

    def _on_end(self, answer: LiveAnswer) -> None:
        """The request has ended for its client. If the api ended it, end it in the queue too."""
        match answer.error if answer.completed is None else None:
            case RequestTimeout():
                self._end(answer, RequestStatus.TIMED_OUT, LATE)
            case SlowReader():
                known = fields(request_id=answer.request.id, attempt=answer.attempt)
                log.warning("[RequestQueue] %s: the client does not read its stream", answer.request.id, extra=known)
                self._end(answer, RequestStatus.CANCELLED, "the client did not read its stream")
            case ClientLeft():
                self._end(answer, RequestStatus.CANCELLED, "the client left")
            case Cancelled(reason=reason):
                self._end(answer, RequestStatus.CANCELLED, reason)

    def _end(self, answer: LiveAnswer, outcome: RequestStatus, reason: str) -> None:
        request = answer.request
        unknown = transitions.queued(request, answer.sequence)
        answer.cancelling = self._background(
            answer, self._cancellation.end(request.id, outcome, reason, unknown=unknown, usage=answer.used)
        )

    def look_after_an_outage(self) -> None:
        """Look for every request that a client waits for here: it may have ended, or NATS may have lost it."""
        for answer in self.waiting.values():
            if answer.sequence is not None and not answer.done:
                self._background(answer, self._look_after(answer, answer.sequence))

    async def _look_after(self, answer: LiveAnswer, sequence: int) -> None:
        request = answer.request
        stored = await self._states.get(request.id)
        if stored is None or not stored.state.status.final:
            # A worker removes a message only after the client has its answer.
            state = stored.state if stored is not None else None
            if await is_lost(self._admission, request, sequence, state) and not answer.done:
                answer.sequence = await publish_again(self._admission, request, state)
            return
        await asyncio.sleep(FRAME_PATIENCE_S)
        answer.fail(error_of(stored.state) or InferenceFailed(LOST))

    def _forget(self, answer: LiveAnswer, outcome: RequestStatus | None) -> None:
        self.waiting.pop(answer.request.id, None)
        self._ended[answer.request.id] = outcome, answer.completed.usage if answer.completed is not None else None
        if len(self._ended) > REMEMBERED_OUTCOMES:
            self._ended.popitem(last=False)

    def _background(self, answer: LiveAnswer, work: Coroutine[Any, Any, Any]) -> asyncio.Task[None]:
        async def run() -> None:
            try:
                await work
            except ForebayError as exc:
                request_id = answer.request.id
                log.warning("[RequestQueue] %s: %s", request_id, exc, extra=fields(request_id=request_id))

        task = asyncio.create_task(run())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task
