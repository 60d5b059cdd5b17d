"""One attempt at one request, from its delivery to its end: the ack table of ARCHITECTURE.md in code.

The order at the end is: the api has the whole answer, the state is final, the outcome is counted, and only then is
the message acknowledged. Whatever dies in between, the message comes again and finds out what is done already.
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Coroutine
from contextlib import aclosing
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Any

from nats.errors import Error as NatsError
from pydantic import ValidationError

from forebay_contracts.nats.connection import Connection
from forebay_contracts.queueing.queue import Delivery
from forebay_contracts.queueing.states import StateStore, finish
from forebay_contracts.telemetry.logs import fields
from forebay_contracts.wire import names
from forebay_contracts.wire.errors import (
    ApiError,
    InferenceFailed,
    QueueUnavailable,
    RequestError,
    RequestTimeout,
    StateUnreadable,
)
from forebay_contracts.wire.frames import Resume
from forebay_contracts.wire.request import InferenceRequest
from forebay_contracts.wire.state import RequestStatus, Usage
from forebay_inference.attempt.measurements import Measured
from forebay_inference.attempt.ownership import EndedBefore, Record, Superseded, patiently
from forebay_inference.attempt.reply import ReplyStream, failed
from forebay_inference.engine.protocol import (
    Accepted,
    Engine,
    EngineFault,
    Finished,
    ResumeTokens,
    Tokens,
    Vector,
    reason_of,
    require_served,
)
from forebay_inference.worker_metrics import WorkerMetrics

NAK_DELAY_S = 0.5
"""Pause before a request whose attempt failed is tried again."""

API_GONE = "the api that took it is gone"

log = logging.getLogger(__name__)


class Interrupt(Enum):
    """Why an attempt stops before its end."""

    CANCELLED = auto()
    DRAINED = auto()
    BROKEN = auto()
    DISOWNED = auto()


@dataclass
class Attempt:
    """A delivery that is being worked on. `claim` is the write that makes the request its own."""

    request: InferenceRequest
    delivery: Delivery
    record: Record
    reply: ReplyStream
    measured: Measured
    claim: asyncio.Future[None] = field(default_factory=lambda: asyncio.get_running_loop().create_future())
    outcome: RequestStatus | None = None
    interrupt: asyncio.Future[tuple[Interrupt, str]] = field(
        default_factory=lambda: asyncio.get_running_loop().create_future()
    )

    def stop(self, why: Interrupt, reason: str) -> None:
        """Stop generating within one step of the engine."""
        if not self.interrupt.done():
            self.interrupt.set_result((why, reason))


class AttemptRunner:
    """Works off deliveries; `running` holds those it is at, by request id."""

    def __init__(
        self,
        *,
        worker: str,
        connection: Connection,
        states: StateStore,
        engine: Engine,
        api_alive: Callable[[str], bool],
        max_deliveries: int,
        metrics: WorkerMetrics,
    ) -> None:
        self._worker = worker
        self._connection = connection
        self._states = states
        self._engine = engine
        self._api_alive = api_alive
        self._max_deliveries = max_deliveries
        self._metrics = metrics
        self.running: dict[str, Attempt] = {}

    async def run(self, delivery: Delivery) -> None:
        """Bring a delivery to its end; never raises but for cancellation."""
        try:
            request = InferenceRequest.model_validate_json(delivery.data)
        except ValidationError as exc:
            request_id = delivery.headers.get(names.HEADER_MSG_ID, "")
            await self._guarded(request_id, delivery, self._poisoned(request_id, delivery, exc))
            return
        await self._guarded(request.id, delivery, self._attempt(request, delivery))

    async def _guarded(self, request_id: str, delivery: Delivery, work: Coroutine[Any, Any, None]) -> None:
        known = fields(request_id=request_id, attempt=delivery.attempt)
        try:
            await work
        except Superseded as exc:
            log.info("[RequestQueue] %s", exc, extra=known)
        except (QueueUnavailable, NatsError, TimeoutError) as exc:
            log.warning("[RequestQueue] %s attempt %d given up: %s", request_id, delivery.attempt, exc, extra=known)

    async def _attempt(self, request: InferenceRequest, delivery: Delivery) -> None:
        api = names.api_of(request.reply_to)
        attempt = Attempt(
            request,
            delivery,
            Record(self._states, request, delivery, self._worker),
            ReplyStream(self._connection, request, delivery.attempt, lambda: self._api_alive(api)),
            Measured(self._metrics, request, delivery, self._worker),
        )
        attempt.claim = asyncio.create_task(self._claim(attempt))
        try:
            if delivery.attempt > 1:
                await attempt.claim
            # A first attempt has nobody before it: it generates while it claims, and writes no end before it has.
            # Should the request not be its own after all, the api drops what it sent, or has an answer the sooner.
            await self._work(attempt)
        except EndedBefore:
            await self._ended_before(attempt)
        except StateUnreadable as exc:
            # It cannot be written over, so nobody can ever end this request well.
            log.error("[RequestQueue] %s", exc.message, extra=attempt.measured.fields())
            await patiently(lambda: self._states.count(RequestStatus.FAILED, request.id))
            await attempt.reply.fail(exc)
            await delivery.term()
        finally:
            attempt.claim.cancel()
            attempt.reply.close()
            attempt.measured.close()

    async def _claim(self, attempt: Attempt) -> None:
        try:
            await attempt.record.claim()
        except Exception:
            attempt.stop(Interrupt.DISOWNED, "the request is not this attempt's")
            raise
        number = attempt.delivery.attempt
        log.info(
            "[RequestQueue] %s processing, attempt %d", attempt.request.id, number, extra=attempt.measured.fields()
        )

    async def _poisoned(self, request_id: str, delivery: Delivery, error: ValidationError) -> None:
        """A message that this worker cannot read: out with it, counted once, and said to the api that its headers name.

        An honest one is of an api with a newer schema. Another worker might read it, but none may be there.
        """
        known = names.is_request_id(request_id)
        log.error(
            "[RequestQueue] message %d cannot be read and was removed: %d faults, the first in %s: %s%s",
            delivery.sequence,
            error.error_count(),
            ".".join(str(part) for part in error.errors()[0]["loc"]) or "the JSON itself",
            error.errors()[0]["type"],
            f" (request {request_id})" if known else "",
            extra=fields(request_id=request_id, attempt=delivery.attempt),
        )
        reply_to = delivery.headers.get(names.HEADER_REPLY_TO, "")
        reason = InferenceFailed("a worker could not read the request: it may be older than the api")
        if known and await patiently(lambda: self._states.get(request_id)) is not None:
            await patiently(lambda: finish(self._states, request_id, RequestStatus.FAILED, reason.message))
        else:
            await patiently(lambda: self._states.count(RequestStatus.FAILED, f"unreadable-{delivery.sequence}"))
        if names.is_reply_subject(reply_to):
            await self._connection.client.publish(reply_to, failed(delivery.attempt, reason).encode())
        await delivery.term()

    async def _ended_before(self, attempt: Attempt) -> None:
        await attempt.record.count_end()
        if attempt.delivery.attempt > 1:
            # Should the api still wait, it lost the end together with the worker that sent it.
            await attempt.reply.fail(InferenceFailed("the end of the answer was lost"))
        await attempt.delivery.term()
        log.info(
            "[RequestQueue] %s had ended before it was pulled", attempt.request.id, extra=attempt.measured.fields()
        )

    async def _work(self, attempt: Attempt) -> None:
        request = attempt.request
        if self._attempts_are_spent(attempt, before=attempt.delivery.attempt - 1):
            await self._fail(attempt, InferenceFailed(f"generation failed in {self._max_deliveries} attempts"))
        elif time.time() >= request.deadline:
            await self._time_out(attempt)
        elif not self._api_alive(names.api_of(request.reply_to)):
            await self._cancel(attempt, API_GONE)
        else:
            if (older := self.running.get(request.id)) is not None:
                # Delivered here once more while NATS was away: the older attempt has lost its right to write.
                older.stop(Interrupt.CANCELLED, "a newer attempt runs here")
            self.running[request.id] = attempt
            try:
                await self._generate_or_stop(attempt)
            finally:
                if self.running.get(request.id) is attempt:
                    del self.running[request.id]

    def _attempts_are_spent(self, attempt: Attempt, *, before: int) -> bool:
        # A hand-over is no failure of the request's: it does not count against it.
        return before >= self._max_deliveries + attempt.record.handed_over

    async def _generate_or_stop(self, attempt: Attempt) -> None:
        generation = asyncio.create_task(self._generate(attempt))
        ends: set[asyncio.Future[Any]] = {generation, attempt.interrupt}
        try:
            await asyncio.wait(
                ends,
                timeout=max(attempt.request.deadline - time.time(), 0),
                return_when=asyncio.FIRST_COMPLETED,
            )
        finally:
            if not generation.done():
                generation.cancel()
                await asyncio.wait({generation})
            attempt.measured.generated()
        if not generation.cancelled():
            await self._generated(attempt, generation)
        elif not attempt.interrupt.done():
            await self._time_out(attempt)
        else:
            why, reason = attempt.interrupt.result()
            if why is Interrupt.CANCELLED:
                await self._cancel(attempt, reason)
            elif why is Interrupt.DISOWNED:
                await attempt.claim  # raises why
            elif why is Interrupt.BROKEN:
                # It may be this request that the engine got stuck at: unlike a hand-over, this counts.
                await self._engine_failed(attempt, EngineFault(reason))
            else:
                await self._hand_over(attempt)

    async def _generate(self, attempt: Attempt) -> tuple[dict[int, str], Usage] | None:
        """All tokens to the reply; how each choice ended, or None where nobody wants them."""
        request, reply, measured = attempt.request, attempt.reply, attempt.measured
        resume: ResumeTokens = {}
        if attempt.delivery.attempt > 1:
            have: Resume = await reply.started(self._worker)
            if not have.wanted:
                attempt.outcome = have.outcome
                return None
            resume = {choice.index: choice.tokens for choice in have.choices}
        require_served(self._engine, request)
        resumed = any(resume.values())
        measured.generating()
        prompt_tokens = cached_tokens = 0
        reasons: dict[int, str] = {}
        async with aclosing(self._engine.generate(request, resume)) as events:
            async for event in events:
                match event:
                    case Tokens():
                        measured.tokens(event, resumed=resumed)
                        await reply.send(event)
                    case Vector():
                        await reply.send_vector(event)
                    case Finished():
                        reasons[event.index] = event.finish_reason
                        cached_tokens += event.cached_tokens
                    case Accepted():
                        prompt_tokens = event.prompt_tokens
                        measured.accepted(prompt_tokens)
                        if attempt.delivery.attempt == 1:
                            await reply.started(self._worker)
        usage = Usage(prompt_tokens=prompt_tokens, completion_tokens=reply.token_count, cached_tokens=cached_tokens)
        return reasons, usage

    async def _generated(self, attempt: Attempt, generation: asyncio.Task[tuple[dict[int, str], Usage] | None]) -> None:
        error = generation.exception()
        if error is None:
            result = generation.result()
            if result is None and attempt.outcome is RequestStatus.COMPLETED:
                # The attempt before had sent the whole answer, and died before it could say so.
                await self._finish(attempt, RequestStatus.COMPLETED)
                await attempt.delivery.ack()
            elif result is None:
                await self._cancel(attempt, "nobody waits for it")
            else:
                await self._complete(attempt, *result)
        elif isinstance(error, RequestError):
            await self._fail(attempt, error)
        else:
            await self._engine_failed(attempt, error)

    async def _complete(self, attempt: Attempt, reasons: dict[int, str], usage: Usage) -> None:
        # The frame leaves first on the one connection that carries both: a state that is final says that the
        # answer was on its way before.
        finishing = asyncio.create_task(self._finish(attempt, RequestStatus.COMPLETED, usage=usage))
        await attempt.reply.complete(reasons, usage)
        await finishing
        await attempt.delivery.ack()

    async def _fail(self, attempt: Attempt, error: ApiError, *, fault: str | None = None) -> None:
        # What is wrong with a request may quote it: that goes to its client and its state, not into a log.
        code = (error.code or error.type) if error.status < 500 else None
        finishing = asyncio.create_task(
            self._finish(attempt, RequestStatus.FAILED, error=error.message, code=code, fault=fault)
        )
        await attempt.reply.fail(error)
        await finishing
        await attempt.delivery.term()

    async def _engine_failed(self, attempt: Attempt, error: BaseException) -> None:
        await attempt.claim
        number, reason = attempt.delivery.attempt, reason_of(error)
        log.error(
            "[RequestQueue] %s attempt %d failed: %s",
            attempt.request.id,
            number,
            reason,
            extra=attempt.measured.fields(code="engine_fault"),
        )
        attempt.measured.ended("engine_fault", "engine_fault")
        if self._attempts_are_spent(attempt, before=number):
            await self._fail(attempt, InferenceFailed("the generation failed"), fault=reason)
        else:
            await attempt.record.failed(reason)
            await attempt.delivery.nak(NAK_DELAY_S)

    async def _time_out(self, attempt: Attempt) -> None:
        seconds = attempt.request.deadline - attempt.request.created_at
        error = RequestTimeout(f"the request was not finished within {seconds:g} seconds")
        # The api tells its client by itself, by its own clock.
        await self._finish(attempt, RequestStatus.TIMED_OUT, error=error.message)
        await attempt.delivery.term()

    async def _cancel(self, attempt: Attempt, reason: str) -> None:
        await self._finish(attempt, RequestStatus.CANCELLED, error=reason)
        if reason == API_GONE:
            # Should it be there after all, its client gets a definite end instead of a wait for nothing.
            with contextlib.suppress(NatsError):
                await self._connection.client.publish(names.cancel_subject(attempt.request.id), reason.encode())
        await attempt.delivery.term()

    async def _hand_over(self, attempt: Attempt) -> None:
        """Give a request back that this worker cannot finish: another goes on from the tokens that are out."""
        await attempt.claim
        with contextlib.suppress(Superseded):
            await attempt.record.give_back()
        await attempt.delivery.nak()
        attempt.measured.ended("handed_over")
        log.info("[RequestQueue] %s handed over", attempt.request.id, extra=attempt.measured.fields())

    async def _finish(
        self,
        attempt: Attempt,
        status: RequestStatus,
        *,
        error: str | None = None,
        code: str | None = None,
        fault: str | None = None,
        usage: Usage | None = None,
    ) -> None:
        """Record how this attempt's request ended; where there is a `code`, it is logged instead of the `error`."""
        await attempt.claim
        status = await attempt.record.finish(status, error=error, fault=fault, usage=usage)
        attempt.measured.ended(status.value, (code or status.value) if error else None)
        log.info(
            "[RequestQueue] %s %s after %.3f s, attempt %d%s",
            attempt.request.id,
            status.value.replace("_", " "),
            attempt.measured.total_s,
            attempt.delivery.attempt,
            f": {code or error}" if error else "",
            extra=attempt.measured.fields(status.value, code),
        )
