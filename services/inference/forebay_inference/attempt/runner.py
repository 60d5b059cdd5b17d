"""Runs deliveries as attempts, from the claim to the ending. `endings` says what each ending does."""

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Mapping
from contextlib import aclosing
from typing import Final

from nats.errors import Error as NatsError
from pydantic import ValidationError

from forebay_contracts.nats import clock
from forebay_contracts.queueing.failed import FailedRequest
from forebay_contracts.queueing.protocols import Delivery, ReplyChannel, StateStore, Superseded
from forebay_contracts.queueing.state_store import QUEUED_AFTER_S
from forebay_contracts.queueing.transitions import MovedOn
from forebay_contracts.telemetry.logs import fields
from forebay_contracts.wire import names
from forebay_contracts.wire.errors import (
    InferenceFailed,
    QueueError,
    RequestError,
    RequestTimeout,
    StateUnreadable,
)
from forebay_contracts.wire.frames import Resume, error_of
from forebay_contracts.wire.request import InferenceRequest
from forebay_contracts.wire.state import RequestStatus, Usage
from forebay_inference.attempt.attempt import Attempt, NotTheFirst, PutBack
from forebay_inference.attempt.departures import Departures
from forebay_inference.attempt.endings import End, Ended, abandoned, not_wanted, settle
from forebay_inference.attempt.giving_way import GivingWay
from forebay_inference.attempt.measurements import Measured
from forebay_inference.attempt.ownership import EndedBefore, Ownership, patiently
from forebay_inference.attempt.reply import Reply
from forebay_inference.attempt.unreadable import end_unreadable
from forebay_inference.engine.events import Accepted, Finished, Tokens, Used, Vector
from forebay_inference.engine.model import Model
from forebay_inference.engine.protocol import reason_of
from forebay_inference.worker_metrics import WorkerMetrics

_LOGGED: Final = {
    End.HANDED_OVER: "handed over",
    End.YIELDED: "gave way",
    End.ENDED_BEFORE: "had ended before it was pulled",
}

log = logging.getLogger(__name__)


class AttemptRunner:
    """Runs deliveries to their end. `running` holds the attempts that run now, by request id.

    `channel` makes a reply channel from a subject and a deadline (seconds since the epoch). `connected_for_s` says how
    long NATS has not been away. `put_back` is that of an `Admission`. `keep` keeps a stored request whose attempts are
    spent. `taken` says whether another worker has taken a delivery over.
    """

    def __init__(
        self,
        *,
        worker: str,
        states: StateStore,
        engine: Model,
        channel: Callable[[str, float], ReplyChannel],
        api_alive: Callable[[str], bool],
        connected_for_s: Callable[[], float],
        max_deliveries: int,
        metrics: WorkerMetrics,
        put_back: PutBack,
        giving_way: GivingWay,
        keep: Callable[[FailedRequest], Awaitable[None]],
        taken: Callable[[InferenceRequest, Delivery], Awaitable[bool]],
    ) -> None:
        self._worker = worker
        self._states = states
        self._engine = engine
        self._channel = channel
        self._api_alive = api_alive
        self._connected_for_s = connected_for_s
        self._max_deliveries = max_deliveries
        self._metrics = metrics
        self._put_back_once = put_back
        self._giving_way = giving_way
        self._keep = keep
        self._taken = taken
        self._departures = Departures()
        self.running: dict[str, Attempt] = {}

    async def run(self, delivery: Delivery) -> None:
        """Run a delivery to its end. An end that cannot be written leaves the message for a redelivery."""
        request_id, turn = names.turn_of(delivery.headers.get(names.HEADER_MSG_ID, ""))
        try:
            try:
                request = InferenceRequest.model_validate_json(delivery.data)
            except ValidationError as exc:
                await end_unreadable(self._states, self._channel, request_id, delivery, exc)
            else:
                request_id = request.id
                if request_id in self.running or not await self._taken(request, delivery):
                    await self._attempt(request, delivery, turn)
        except Superseded as exc:
            log.info("[RequestQueue] %s", exc, extra=fields(request_id=request_id))
        except (QueueError, NatsError, TimeoutError) as exc:
            log.warning("[RequestQueue] %s given up: %s", request_id, exc, extra=fields(request_id=request_id))

    async def _attempt(self, request: InferenceRequest, delivery: Delivery, turn: int) -> None:
        """Claim the request, generate, and settle how it ended.

        A fresh message is most likely a first attempt. It generates while it is claimed. If the claim finds an earlier
        attempt, this one starts again with its true number.
        """
        if await self._goes_on(request.id, delivery, turn):
            return
        age_s = clock.now() - request.created_at
        attempt = Attempt(
            request,
            delivery,
            Ownership(self._states, request, self._worker, delivery.sequence, turn, self._keep),
            Reply(self._channel(request.reply_to, request.deadline), request, self._worker, self._departures),
            Measured(self._metrics, request, delivery, self._worker),
            doubted=delivery.num_delivered > 1 or turn > 0 or age_s >= self._connected_for_s(),
            turn=turn,
            put_back=self._put_back,
        )
        self.running[request.id] = attempt
        fresh = age_s < QUEUED_AFTER_S and not attempt.doubted
        attempt.claim = asyncio.create_task(self._claim(attempt, fresh=fresh))
        try:
            if request.deferred and self._engine.can_resume(request):
                await self._giving_way.begin(attempt)
            if fresh:
                with contextlib.suppress(NotTheFirst):
                    await self._settle(attempt, await self._work(attempt))
                    return
                attempt.misjudged = False
            attempt.number = attempt.reply.attempt = await attempt.claim
            await self._settle(attempt, await self._work(attempt))
        except EndedBefore as exc:
            await attempt.ownership.count(exc.state)
            # The api drops frames of an attempt that is older than the last one it has seen.
            attempt.reply.attempt = max(exc.state.attempt, 1)
            await self._settle(attempt, Ended(End.ENDED_BEFORE, error=error_of(exc.state)))
        except MovedOn as exc:
            if exc.waits:  # its worker may have died before it was put back
                await self._put_back(request, exc.turn, delivery.headers)
            await self._settle(attempt, Ended(End.MOVED_ON))
        except StateUnreadable as exc:
            # No write can replace a state that cannot be read: the request can only fail.
            log.error("[RequestQueue] %s", exc.message, extra=attempt.measured.fields())
            await patiently(lambda: self._states.count(RequestStatus.FAILED, request.id))
            attempt.reply.attempt = delivery.num_delivered
            await self._settle(attempt, Ended(End.UNREADABLE, error=exc))
        finally:
            attempt.claim.cancel()
            if self.running.get(request.id) is attempt:
                del self.running[request.id]
            attempt.reply.close()
            attempt.measured.close()
            if request.deferred:
                await self._giving_way.end(attempt)

    async def _put_back(self, request: InferenceRequest, turn: int, trace: Mapping[str, str]) -> int:
        return await patiently(lambda: self._put_back_once(request, turn, trace))

    async def _goes_on(self, request_id: str, delivery: Delivery, turn: int) -> bool:
        """Whether an attempt that runs here goes on with a new delivery of its message.

        NATS redelivers what still runs if the server was killed, or was away for longer than the ack wait.
        """
        if (running := self.running.get(request_id)) is None or turn > running.turn:
            return False  # else the one that runs has given way, and has not quite ended
        if turn < running.turn:
            await delivery.term()
            return True
        if await running.ownership.holds() and self.running.get(request_id) is running:
            running.delivery = delivery
            return True
        running.stop(Ended(End.SUPERSEDED))
        return False

    async def _claim(self, attempt: Attempt, *, fresh: bool) -> int:
        number = 0
        try:
            number = await attempt.ownership.claim(fresh=fresh)
        finally:
            if fresh and number != attempt.number:
                attempt.misjudged = True
                attempt.interrupt()
        attempt.measured.claimed(number)
        log.info(
            "[RequestQueue] %s processing, attempt %d", attempt.request.id, number, extra=attempt.measured.fields()
        )
        return number

    async def _work(self, attempt: Attempt) -> Ended:
        """Generate until the answer is whole, the deadline has passed, or the attempt is stopped."""
        request = attempt.request
        if self._spent(attempt, attempt.number - 1):
            message = f"generation failed in {self._max_deliveries} attempts"
            return Ended(End.SPENT, error=InferenceFailed(message))
        left_s = request.deadline - clock.now()
        seconds = request.deadline - request.created_at
        late = RequestTimeout(f"the request was not finished within {seconds:g} seconds")
        timed_out = Ended(End.TIMED_OUT, error=late)
        if left_s <= 0:
            return timed_out
        if not self._api_alive(names.api_of(request.reply_to)):
            return abandoned()
        attempt.generation = asyncio.create_task(self._generate(attempt))
        if attempt.stopped is not None or attempt.misjudged:
            attempt.interrupt()
        timer = asyncio.get_running_loop().call_later(left_s, attempt.stop, timed_out)
        try:
            return await attempt.generation
        except asyncio.CancelledError:
            if (task := asyncio.current_task()) is not None and task.cancelling():
                raise
            return attempt.stopped or Ended(End.SUPERSEDED)
        finally:
            timer.cancel()
            attempt.generation = None
            attempt.measured.generated()

    def _spent(self, attempt: Attempt, attempts: int) -> bool:
        # A hand-over is not the request's fault, so it does not use up an attempt.
        return attempts >= self._max_deliveries + attempt.ownership.handed_over

    async def _generate(self, attempt: Attempt) -> Ended:
        """Send all tokens; how the generation ended."""
        request, reply, measured = attempt.request, attempt.reply, attempt.measured
        resume = {}
        if attempt.number > 1 or attempt.doubted:
            have = await self._resume(attempt)
            if not have.wanted:
                return not_wanted(have)
            resume = {choice.index: choice.tokens for choice in have.choices}
        resumed = any(resume.values())
        cached_tokens = reasoning_tokens = 0
        finished: dict[int, Finished] = {}
        usage: Usage | None = None
        measured.generating()
        try:
            async with aclosing(self._engine.generate(request, resume)) as events:
                async for event in events:
                    match event:
                        case Tokens():
                            if not event.prompt:
                                measured.tokens(event, resumed=resumed)
                            await reply.send(event)
                        case Vector():
                            await reply.send_vector(event)
                        case Finished():
                            finished[event.index] = event
                            cached_tokens += event.cached_tokens
                            reasoning_tokens += event.reasoning_tokens
                        case Accepted():
                            reply.prompt_tokens, reply.returned = event.prompt_tokens, event.returned
                            measured.accepted(event.prompt_tokens)
                            if attempt.number == 1:
                                await reply.announce()
                        case Used():
                            usage = event.usage
                            measured.accepted(usage.prompt_tokens)
            usage = usage or Usage(
                prompt_tokens=reply.prompt_tokens,
                completion_tokens=reply.completion_tokens,
                cached_tokens=cached_tokens,
                reasoning_tokens=reasoning_tokens,
            )
            reply.finish(finished, usage)
        except RequestError as exc:
            return Ended(End.REFUSED, error=exc)
        except Superseded:
            return Ended(End.SUPERSEDED)
        except Exception as exc:  # whatever an engine raises fails this attempt, and not the worker
            return Ended(End.FAULT, fault=reason_of(exc))
        cut = any(choice.finish_reason == "length" for choice in finished.values())
        return Ended(End.COMPLETED, usage=usage, cut=cut)

    @staticmethod
    async def _resume(attempt: Attempt) -> Resume:
        """What the client has. Raises Superseded."""
        while (have := await attempt.reply.resume()).newest is not None:
            if not await attempt.ownership.holds():
                raise Superseded(f"{attempt.request.id}: attempt {have.newest} has begun")
            # The store lost the claim of that attempt. The frames of this one get a number above it.
            attempt.reply.attempt = have.newest + 1
        return have

    async def _settle(self, attempt: Attempt, ended: Ended) -> None:
        # In the log, an end is final: no attempt writes it that may not be the first, or whose request has ended.
        if ended.how is not End.COMPLETED or names.is_logged(attempt.request.reply_to):
            await attempt.own(ended)
        if ended.how is End.FAULT:
            log.error(
                "[RequestQueue] %s attempt %d failed: %s",
                attempt.request.id,
                attempt.number,
                ended.fault,
                extra=attempt.measured.fields(code="engine_fault"),
            )
            attempt.measured.ended("engine_fault", "engine_fault")
            if self._spent(attempt, attempt.number):
                ended = Ended(End.SPENT, error=InferenceFailed("the generation failed"), fault=ended.fault)
        await settle(ended, lambda: attempt.delivery, attempt.tell, attempt.record)
        if ended.how in _LOGGED:
            log.info("[RequestQueue] %s %s", attempt.request.id, _LOGGED[ended.how], extra=attempt.measured.fields())
