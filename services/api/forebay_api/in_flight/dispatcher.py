"""From HTTP into the queue, and from the reply subject back to the request that waits."""

import asyncio
import contextlib
import logging
import time
import uuid
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any

from nats.aio.msg import Msg
from nats.errors import Error as NatsError
from opentelemetry.trace import SpanKind
from pydantic import ValidationError

from forebay_api import request_metrics
from forebay_api.in_flight.replies import CalledOff, ClientLeft, Reply, SlowReader
from forebay_contracts.nats.connection import Connection
from forebay_contracts.nats.topology import HEARTBEAT_TTL_S
from forebay_contracts.queueing.cancellation import call_off
from forebay_contracts.queueing.queue import RequestQueue
from forebay_contracts.queueing.states import QUEUED_AFTER_S, StateStore
from forebay_contracts.telemetry import tracing
from forebay_contracts.telemetry.logs import fields
from forebay_contracts.telemetry.metrics import bound
from forebay_contracts.wire import names
from forebay_contracts.wire.errors import ForebayError, InferenceFailed, QueueConflict, RequestTimeout
from forebay_contracts.wire.frames import Resume, Started, decode_frame
from forebay_contracts.wire.request import InferenceRequest
from forebay_contracts.wire.state import RequestState, RequestStatus

FRAME_PATIENCE_S = 1.0
"""How long the frame that ends a request may come later than its state says so."""

REMEMBERED_OUTCOMES = 10_000
"""Ended requests of which a late attempt can still be told how they ended."""

REPLY_PENDING_MESSAGES = 1_000_000
REPLY_PENDING_BYTES = 512 * 1024 * 1024
"""How much may wait between the socket and the dispatcher; more is dropped, and fetched again as a gap."""

log = logging.getLogger(__name__)


class Dispatcher:
    """Submits requests and hands each its frames; one subscription serves them all."""

    def __init__(
        self,
        connection: Connection,
        queue: RequestQueue,
        states: StateStore,
        one_more: Callable[[str | None], contextlib.AbstractContextManager[None]],
    ) -> None:
        self.instance = f"api-{uuid.uuid4().hex[:12]}"
        self._connection = connection
        self._queue = queue
        self._states = states
        self._one_more = one_more
        self._waiting: dict[str, Reply] = {}
        self._ended: OrderedDict[str, RequestStatus | None] = OrderedDict()
        self._tasks: set[asyncio.Task[None]] = set()
        self._publish_seconds = bound(request_metrics.PUBLISH)

    @property
    def in_flight(self) -> int:
        """Requests whose clients wait here."""
        return len(self._waiting)

    async def start(self) -> None:
        """Listen for replies and cancellations."""
        client = self._connection.client
        await client.subscribe(
            names.reply_subjects(self.instance),
            cb=self._replied,
            pending_msgs_limit=REPLY_PENDING_MESSAGES,
            pending_bytes_limit=REPLY_PENDING_BYTES,
        )
        await client.subscribe(names.cancel_subject("*"), cb=self._cancelled)
        self._connection.on_reconnect.append(self._reconnected)

    async def close(self) -> None:
        """Finish what goes on in the background."""
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=5)

    @contextlib.asynccontextmanager
    async def submit(self, request: InferenceRequest) -> AsyncIterator[Reply]:
        """Admit `request`; its reply lives as long as the block, and leaving the block early calls it off.

        Raises:
            QueueFull, QueueUnavailable, KeyLimitReached: nothing was admitted.
        """
        with self._one_more(request.key):
            reply = Reply(request)
            self._waiting[request.id] = reply
            try:
                reply.sequence = await self._publish(request)
            except BaseException:
                self._forget(reply, RequestStatus.CANCELLED)
                raise
            measured = request_metrics.of(request.model, request.completion_type.value)
            measured.admitted.inc()
            if request.key is not None:
                request_metrics.key_requests(request.key, "admitted").inc()
            log.info(
                "[RequestQueue] %s queued for %s at %d",
                request.id,
                request.model,
                reply.sequence,
                extra=fields(request_id=request.id, model=request.model, type=request.completion_type.value),
            )
            loop = asyncio.get_running_loop()
            timers = (
                loop.call_later(QUEUED_AFTER_S, self._register_waiting, reply),
                loop.call_later(max(request.deadline - time.time(), 0), self._time_out, reply),
            )
            try:
                yield reply
            finally:
                for timer in timers:
                    timer.cancel()
                if not reply.done:
                    reply.fail(ClientLeft("the client left"))
                self._forget(reply, reply.outcome)
                measured.end(reply.outcome, time.time() - request.created_at)
                if reply.outcome is RequestStatus.CANCELLED:
                    reason = reply.error.reason if isinstance(reply.error, CalledOff) else "the client left"
                    self._call_off(reply, RequestStatus.CANCELLED, reason)

    async def _publish(self, request: InferenceRequest) -> int:
        began = time.perf_counter()
        with tracing.current(
            tracing.start("queue publish", SpanKind.PRODUCER, attributes={"forebay.request_id": request.id})
        ):
            try:
                return await self._queue.publish(request)
            finally:
                self._publish_seconds.observe(time.perf_counter() - began)

    async def registered(self, request_id: str) -> None:
        """Wait until the state of a request that was queued here can be looked up."""
        if (reply := self._waiting.get(request_id)) is not None and reply.sequence is not None:
            await self._registered(reply)

    async def cancel(self, request_id: str, reason: str) -> bool:
        """Call off a request of any api; False if it had ended before, or is unknown."""
        await self.registered(request_id)
        return await call_off(self._connection, self._queue, self._states, request_id, RequestStatus.CANCELLED, reason)

    def _register_waiting(self, reply: Reply) -> None:
        if reply.attempt == 0 and not reply.registered:
            self._register(reply)

    async def _registered(self, reply: Reply) -> None:
        if not reply.registered:
            await asyncio.wait([self._register(reply)])

    def _register(self, reply: Reply) -> asyncio.Task[None]:
        def registered(_: asyncio.Task[None]) -> None:
            reply.registered, reply.registration = True, None

        if reply.registration is None:
            reply.registration = self._background(reply, self._create_state(reply.request, reply.sequence))
            reply.registration.add_done_callback(registered)
        return reply.registration

    async def _create_state(self, request: InferenceRequest, sequence: int | None) -> None:
        """Create the state `queued`, unless a worker was faster."""
        state = RequestState(
            id=request.id,
            status=RequestStatus.QUEUED,
            completion_type=request.completion_type.value,
            timestamp=request.created_at,
            model=request.model,
            queued_at=request.created_at,
            deadline=request.deadline,
            sequence=sequence,
            key=request.key,
        )
        with contextlib.suppress(QueueConflict):
            await self._states.write(state, 0)

    def _time_out(self, reply: Reply) -> None:
        seconds = reply.request.deadline - reply.request.created_at
        reply.fail(RequestTimeout(f"the request was not finished within {seconds:g} seconds"))
        if reply.outcome is RequestStatus.TIMED_OUT:
            self._call_off(reply, RequestStatus.TIMED_OUT, "REQUEST_TIMEOUT passed")

    def _call_off(self, reply: Reply, outcome: RequestStatus, reason: str) -> None:
        async def after_registration() -> None:
            await self._registered(reply)
            await call_off(
                self._connection, self._queue, self._states, reply.request.id, outcome, reason, reply.sequence
            )

        self._background(reply, after_registration())

    async def _reconnected(self) -> None:
        """Find out, once every worker has heard of this api again, what has ended unheard.

        One that was away for longer counts as dead: nobody says anything more to it.
        """
        asyncio.get_running_loop().call_later(HEARTBEAT_TTL_S, self._end_what_has_ended)

    def _end_what_has_ended(self) -> None:
        for reply in self._waiting.values():
            if reply.sequence is not None and not reply.done:
                self._background(reply, self._end_if_it_has_ended(reply))

    async def _end_if_it_has_ended(self, reply: Reply) -> None:
        stored = await self._states.get(reply.request.id)
        if stored is None or not stored.state.status.final:
            return
        await asyncio.sleep(FRAME_PATIENCE_S)
        if stored.state.status is RequestStatus.CANCELLED:
            reply.fail(CalledOff(stored.state.error or "while the api was away"))
        else:
            reply.fail(InferenceFailed("the end of the answer was lost"))

    def _forget(self, reply: Reply, outcome: RequestStatus | None) -> None:
        self._waiting.pop(reply.request.id, None)
        self._ended[reply.request.id] = outcome
        if len(self._ended) > REMEMBERED_OUTCOMES:
            self._ended.popitem(last=False)

    def _background(self, reply: Reply, work: Coroutine[Any, Any, Any]) -> asyncio.Task[None]:
        async def run() -> None:
            try:
                await work
            except ForebayError as exc:
                log.warning("[RequestQueue] %s: %s", reply.request.id, exc, extra=fields(request_id=reply.request.id))

        task = asyncio.create_task(run())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _replied(self, msg: Msg) -> None:
        request_id = msg.subject.rsplit(".", 1)[1]
        try:
            frame = decode_frame(msg.data)
        except ValidationError as exc:
            log.warning(
                "[RequestQueue] %s: a reply that cannot be read was dropped (%d faults)",
                request_id,
                len(exc.errors()),
                extra=fields(request_id=request_id),
            )
            return
        reply = self._waiting.get(request_id)
        with contextlib.suppress(NatsError):
            if reply is None:
                await self._turn_away(request_id, isinstance(frame, Started), msg)
                return
            had_gap, was_done = reply.gap, reply.done
            reply.receive(frame)
            if isinstance(reply.error, SlowReader) and not was_done:
                log.warning(
                    "[RequestQueue] %s called off: the client does not read its stream",
                    request_id,
                    extra=fields(request_id=request_id, attempt=reply.attempt),
                )
                self._call_off(reply, RequestStatus.CANCELLED, "the client did not read its stream")
            if msg.reply:
                await msg.respond(reply.have(frame.attempt).encode())
            elif reply.gap and not had_gap:
                log.warning(
                    "[RequestQueue] %s: frames were lost, asking for them again",
                    request_id,
                    extra=fields(request_id=request_id, attempt=reply.attempt),
                )
                await self._connection.client.publish(
                    names.resend_subject(request_id), reply.have(frame.attempt).encode()
                )

    async def _turn_away(self, request_id: str, started: bool, msg: Msg) -> None:
        """Tell a worker that nobody waits for what it does."""
        if msg.reply:
            await msg.respond(Resume(wanted=False, outcome=self._ended.get(request_id)).encode())
        elif started:
            await self._connection.client.publish(names.cancel_subject(request_id), b"nobody waits")

    async def _cancelled(self, msg: Msg) -> None:
        reply = self._waiting.get(msg.subject.rsplit(".", 1)[1])
        if reply is not None:
            reply.fail(CalledOff(msg.data.decode(errors="replace")[:200]))
