"""What one attempt writes about its request: that it is at it, that it gives it back, how it ended."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

from forebay_contracts.queueing.queue import Delivery
from forebay_contracts.queueing.states import QUEUED_AFTER_S, StateStore, Stored, change
from forebay_contracts.wire.errors import QueueConflict, QueueUnavailable
from forebay_contracts.wire.request import InferenceRequest
from forebay_contracts.wire.state import RequestState, RequestStatus, Usage

STORE_RETRY_S = 0.5
"""Pause between tries at a write while NATS is away."""

STORE_PATIENCE_S = 60.0
"""How long such a write is tried; then the attempt is given up, and the message comes again."""

MAX_REASON = 500
"""Characters of what went wrong that are kept."""

LOST = "it ended without a word: the worker was killed, or cut off from NATS for longer than ACK_WAIT"

T = TypeVar("T")


class Superseded(Exception):
    """Another attempt owns the request now: this one must not write or acknowledge anything."""


class EndedBefore(Exception):
    """The request had ended when it was claimed: called off while it waited, or an attempt died before its ack."""


class Record:
    """The state of a request as one attempt at it may write it.

    Each write names the revision of the one before, so that none gets through after a newer attempt has claimed the
    request. All are tried for STORE_PATIENCE_S and then raise QueueUnavailable.
    """

    def __init__(self, states: StateStore, request: InferenceRequest, delivery: Delivery, worker: str) -> None:
        self._states = states
        self._request = request
        self._delivery = delivery
        self._worker = worker
        self._claimed: Stored | None = None

    @property
    def handed_over(self) -> int:
        """How often workers that had to stop have given the request back."""
        return self._claimed.state.handed_over if self._claimed is not None else 0

    async def claim(self) -> None:
        """Make the request this attempt's own.

        Raises:
            Superseded: a newer attempt has claimed it.
            EndedBefore: it has ended.
        """
        request, number = self._request, self._delivery.attempt
        if number == 1 and time.time() - request.created_at < QUEUED_AFTER_S:
            # Most likely nothing is written of it yet, which saves to read it.
            state = self._processing(None)
            try:
                self._claimed = Stored(state, await patiently(lambda: self._states.write(state, 0)))
                return
            except QueueConflict:
                pass
        self._claimed = await patiently(lambda: change(self._states, request.id, self._processing))
        if self._claimed is None:
            raise EndedBefore

    async def give_back(self) -> None:
        """The request waits again, for whom its tokens so far are not lost: a hand-over, and no failure of its own."""
        claimed = self._own
        state = claimed.state.model_copy(
            update={
                "status": RequestStatus.QUEUED,
                "worker": None,
                "handed_over": claimed.state.handed_over + 1,
            }
        )
        try:
            await patiently(lambda: self._write_over(claimed, state))
        except QueueConflict:
            raise Superseded(self._replaced) from None

    async def failed(self, reason: str) -> None:
        """Keep why this attempt failed, for there will be another.

        Raises:
            Superseded: a newer attempt has claimed it.
        """
        claimed = self._own
        state = claimed.state.model_copy(update={"fault": _fault(claimed.state, reason)})
        try:
            await patiently(lambda: self._write_over(claimed, state))
        except QueueConflict:
            raise Superseded(self._replaced) from None

    async def finish(
        self,
        status: RequestStatus,
        *,
        error: str | None = None,
        fault: str | None = None,
        usage: Usage | None = None,
    ) -> RequestStatus:
        """Write how the request ended and count it; how it ended, which somebody else may have written before.

        `fault` is why this attempt failed, `error` what the client is told.

        Raises:
            Superseded: a newer attempt has claimed it.
        """
        claimed = self._own
        change: dict[str, Any] = {"status": status, "error": error, "usage": usage, "finished_at": time.time()}
        if fault is not None:
            change["fault"] = _fault(claimed.state, fault)
        state = claimed.state.model_copy(update=change)
        try:
            await patiently(lambda: self._write_over(claimed, state))
        except QueueConflict:
            stored = await patiently(lambda: self._states.get(self._request.id))
            if stored is None or not stored.state.status.final:
                raise Superseded(self._replaced) from None
            status = stored.state.status
        await patiently(lambda: self._states.count(status, self._request.id))
        return status

    async def count_end(self) -> None:
        """Count a request that had ended before, should whoever ended it have died before that; twice does nothing."""
        stored = await patiently(lambda: self._states.get(self._request.id))
        if stored is not None:
            await patiently(lambda: self._states.count(stored.state.status, self._request.id))

    async def _write_over(self, claimed: Stored, state: RequestState) -> None:
        try:
            await self._states.write(state, claimed.revision)
        except QueueConflict:
            stored = await self._states.get(self._request.id)
            if stored is not None and stored.revision == claimed.revision:
                # Of this attempt still: an earlier try is being agreed on by the cluster, or a replica that lags told.
                raise QueueUnavailable("the request's state is being written") from None
            raise

    def _processing(self, state: RequestState | None) -> RequestState:
        request, number = self._request, self._delivery.attempt
        if state is not None and state.attempt > number:
            raise Superseded(f"{request.id}: attempt {state.attempt} is under way, {number} came late")
        return RequestState(
            id=request.id,
            status=RequestStatus.PROCESSING,
            completion_type=request.completion_type.value,
            timestamp=request.created_at,
            fault=None if state is None else _fault_before(state),
            model=request.model,
            attempt=number,
            queued_at=request.created_at,
            started_at=time.time() if state is None or state.started_at is None else state.started_at,
            deadline=request.deadline,
            worker=self._worker,
            sequence=self._delivery.sequence,
            handed_over=state.handed_over if state is not None else 0,
            key=request.key,
        )

    @property
    def _own(self) -> Stored:
        assert self._claimed is not None, "written before it was claimed"
        return self._claimed

    @property
    def _replaced(self) -> str:
        return f"{self._request.id}: attempt {self._delivery.attempt} was replaced"


def _fault(state: RequestState, reason: str) -> str:
    return f"attempt {state.attempt} on worker {state.worker}: {reason[:MAX_REASON]}"


def _fault_before(state: RequestState) -> str | None:
    """What the latest attempt until now failed of. One that ended without a word has not said so itself."""
    silent = state.status is RequestStatus.PROCESSING and not (state.fault or "").startswith(_fault(state, ""))
    return _fault(state, LOST) if silent else state.fault


async def patiently(write: Callable[[], Awaitable[T]]) -> T:
    """Repeat `write` while NATS is away."""
    give_up_at = time.monotonic() + STORE_PATIENCE_S
    while True:
        try:
            return await write()
        except QueueUnavailable:
            if time.monotonic() >= give_up_at:
                raise
            await asyncio.sleep(STORE_RETRY_S)
