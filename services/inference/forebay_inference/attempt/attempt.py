"""One attempt that runs here: how it stops, what its client hears of its ending, and what its state records."""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Final

from forebay_contracts.queueing.protocols import Delivery, Superseded
from forebay_contracts.wire.request import InferenceRequest
from forebay_contracts.wire.state import RequestStatus, Usage, used_so_far
from forebay_inference.attempt.endings import End, Ended, Told
from forebay_inference.attempt.measurements import Measured
from forebay_inference.attempt.ownership import Ownership
from forebay_inference.attempt.reply import Reply

NOT_RECEIVED: Final = "the answer was not received: its client or the api is gone"

_NOT_OURS: Final = (End.ENDED_BEFORE, End.MOVED_ON, End.UNREADABLE)
"""No attempt can own the request any more."""

log = logging.getLogger(__name__)


PutBack = Callable[[InferenceRequest, int, Mapping[str, str]], Awaitable[int]]
"""See `Admission.put_back`."""


class NotTheFirst(Exception):
    """An attempt that started as the first one has another number."""


@dataclass(eq=False, slots=True)
class Attempt:
    """An attempt that runs here; `number` is its number, from 1.

    `doubted`: the client may have tokens of an attempt that no state tells of. It died before its claim was stored, or
    NATS was away since the request was made and may have lost the claim. `stopped` is how this one has to end.
    `misjudged`: it started as the first attempt and is not. The request has given way `turn` times, and `put_back` puts
    it into the waiting room once more.
    """

    request: InferenceRequest
    delivery: Delivery
    ownership: Ownership
    reply: Reply
    measured: Measured
    doubted: bool
    turn: int
    put_back: PutBack
    number: int = 1
    claim: asyncio.Task[int] = field(init=False)
    generation: asyncio.Task[Ended] | None = None
    stopped: Ended | None = None
    misjudged: bool = False

    def stop(self, ended: Ended) -> None:
        """Stop generating within one step of the engine, and end as `ended`. The first call decides."""
        if self.stopped is None:
            self.stopped = ended
            self.interrupt()

    def interrupt(self) -> None:
        """Stop generating within one step of the engine."""
        if self.generation is not None:
            self.generation.cancel()

    @property
    def used(self) -> Usage | None:
        """The tokens so far, as far as they are known."""
        return used_so_far(self.reply.prompt_tokens, self.reply.completion_tokens)

    async def own(self, ended: Ended) -> None:
        """Wait for the claim. Raises what it raised, NotTheFirst, or Superseded."""
        if ended.how in _NOT_OURS:
            return
        if await self.claim != self.number:
            raise NotTheFirst
        if ended.how is End.SUPERSEDED:
            raise Superseded(f"{self.request.id}: a newer attempt runs here")

    async def tell(self, told: Told, ended: Ended) -> RequestStatus | None:
        """Give the receiver the answer or the error; returns how the request ended for it, None if nobody says so."""
        match told:
            case Told.SO_FAR:
                await self.reply.flush()
            case Told.ANSWER:
                return await self.reply.complete()
            case Told.ERROR if ended.error is not None:
                return await self.reply.fail(ended.error, final=ended.how in _NOT_OURS)
        return None

    async def record(self, status: RequestStatus, ended: Ended) -> None:
        """Write the state, and count a final one. Raises Superseded."""
        await self.own(ended)
        match status:
            case RequestStatus.PROCESSING:
                await self.ownership.fault(ended.fault or "", self.reply.completion_tokens)
            case RequestStatus.QUEUED if ended.how is End.YIELDED:
                # The state goes first: the message of an earlier turn is void then, and two are never valid.
                await self.ownership.give_way(self.reply.completion_tokens)
                self.measured.ended("yielded")
                sequence = await self.put_back(self.request, self.turn + 1, self.delivery.headers)
                await self.ownership.waits_at(sequence)
            case RequestStatus.QUEUED:
                await self.ownership.hand_over(self.reply.completion_tokens)
                self.measured.ended("handed_over")
            case _ if ended.how is not End.UNREADABLE:
                await self._record_end(status, ended)

    async def _record_end(self, status: RequestStatus, ended: Ended) -> None:
        error = ended.error
        reason = ended.reason or (error.message if error else NOT_RECEIVED)
        told = None if status is RequestStatus.COMPLETED else reason
        status = await self.ownership.end(
            status,
            error=told,
            fault=ended.fault,
            usage=ended.usage or self.used,
            cut=ended.cut,
            spent=ended.how is End.SPENT,
            first_token_at=self.measured.first_token_at,
            resumed=self.reply.resumed,
        )
        # The message of a refusal may quote the request. The client and the state get it, the log gets its code.
        code = (error.code or error.type) if error and error.status < 500 and not ended.reason else None
        self.measured.ended(status.value, (code or status.value) if told else None)
        log.info(
            "[RequestQueue] %s %s after %.3f s, attempt %d%s",
            self.request.id,
            status.value.replace("_", " "),
            self.measured.total_s,
            self.number,
            f": {code or told}" if told else "",
            extra=self.measured.fields(status.value, code),
        )
