"""Who owns a request: the attempt that wrote its state last. Its writes name the revision of the one before."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Final, TypeVar

from forebay_contracts.nats.topology import DUPLICATE_WINDOW_S
from forebay_contracts.queueing import transitions
from forebay_contracts.queueing.protocols import StateStore, Stored
from forebay_contracts.queueing.state_store import change
from forebay_contracts.wire.errors import QueueConflict, QueueUnavailable
from forebay_contracts.wire.request import InferenceRequest
from forebay_contracts.wire.state import RequestState, RequestStatus, Usage

STORE_RETRY_S: Final = 0.5
"""Pause between tries at a write while NATS is away."""

STORE_PATIENCE_S: Final = 60.0
"""How long such a write is tried; then the attempt is given up, and the message comes again."""

T = TypeVar("T")


class Superseded(Exception):
    """Another attempt owns the request now: this one must not write or acknowledge anything."""


class EndedBefore(Exception):
    """The request had ended, as `state` says."""

    def __init__(self, state: RequestState) -> None:
        super().__init__(f"request {state.id} had ended: {state.status.value}")
        self.state = state


class Ownership:
    """One attempt's right to write the state of its request.

    After a newer attempt has claimed the request, no write of this one gets through. All methods are tried for
    STORE_PATIENCE_S and then raise QueueUnavailable.
    """

    def __init__(self, states: StateStore, request: InferenceRequest, worker: str, sequence: int) -> None:
        self._states = states
        self._request = request
        self._worker = worker
        self._sequence = sequence
        self._tried: RequestState | None = None
        self._claimed: Stored | None = None

    @property
    def handed_over(self) -> int:
        """How often workers that had to stop have handed the request over."""
        return self._claimed.state.handed_over if self._claimed is not None else 0

    async def claim(self, *, fresh: bool) -> int:
        """Make the request this attempt's own; the attempt's number. `fresh`: most likely nothing is stored of it yet.

        Raises:
            EndedBefore: it has ended.
        """
        if fresh:
            state = self._next(None)
            try:
                self._claimed = Stored(state, await patiently(lambda: self._states.write(state, 0)))
            except QueueConflict:
                fresh = False
        if not fresh:
            self._claimed = await patiently(self._claim_over)
        assert self._claimed is not None
        return self._claimed.state.attempt

    async def holds(self) -> bool:
        """Whether no other attempt has claimed the request since this one did, or it still does."""
        if self._claimed is None:
            return True
        stored = await patiently(lambda: self._states.get(self._request.id))
        return stored is not None and stored.revision == self._claimed.revision

    async def hand_over(self) -> None:
        """The request waits for another worker. Raises Superseded."""
        await self._write(transitions.handed_over(self._own.state))

    async def fault(self, reason: str) -> None:
        """This attempt failed, and another will follow. Raises Superseded."""
        await self._write(transitions.faulted(self._own.state, reason))

    async def end(
        self,
        outcome: RequestStatus,
        *,
        error: str | None = None,
        fault: str | None = None,
        usage: Usage | None = None,
    ) -> RequestStatus:
        """Write how the request ended and count it; how it ended, which somebody else may have written before.

        Raises:
            Superseded: a newer attempt has claimed it.
        """
        try:
            await self._write(transitions.ended(self._own.state, outcome, error=error, fault=fault, usage=usage))
        except EndedBefore as exc:
            await self.count(exc.state)
            return exc.state.status
        await patiently(lambda: self._states.count(outcome, self._request.id))
        return outcome

    async def count(self, state: RequestState) -> None:
        """Count an end that somebody else wrote, who may have died before counting it.

        Not when that is so long ago that a second count of it would not be recognised.
        """
        if state.finished_at is not None and time.time() - state.finished_at < DUPLICATE_WINDOW_S / 2:
            await patiently(lambda: self._states.count(state.status, state.id))

    async def _claim_over(self) -> Stored:
        # An earlier try may have been stored though its ack was lost.
        stored = await self._states.get(self._request.id) if self._tried is not None else None
        if stored is not None and stored.state == self._tried:
            return stored
        claimed = await change(self._states, self._request.id, self._next)
        if claimed is None:
            ended = await self._states.get(self._request.id)
            if ended is None:
                raise QueueUnavailable("the request's state is gone")
            raise EndedBefore(ended.state)
        return claimed

    def _next(self, state: RequestState | None) -> RequestState:
        self._tried = transitions.claimed(state, self._request, self._worker, self._sequence)
        return self._tried

    async def _write(self, state: RequestState) -> None:
        revision = self._own.revision

        async def write() -> None:
            try:
                self._claimed = Stored(state, await self._states.write(state, revision))
            except QueueConflict:
                stored = await self._states.get(self._request.id)
                if stored is not None and stored.revision == revision:
                    # Of this attempt still: an earlier try is being agreed on by the cluster, or a replica lags.
                    raise QueueUnavailable("the request's state is being written") from None
                if stored is not None and stored.state == state:
                    return  # an earlier try, whose ack was lost
                if stored is not None and stored.state.status.final:
                    raise EndedBefore(stored.state) from None
                raise Superseded(f"{state.id}: attempt {state.attempt} was replaced") from None

        await patiently(write)

    @property
    def _own(self) -> Stored:
        assert self._claimed is not None, "written before it was claimed"
        return self._claimed


async def patiently(work: Callable[[], Awaitable[T]]) -> T:
    """Repeat `work` while NATS is away."""
    give_up_at = time.monotonic() + STORE_PATIENCE_S
    while True:
        try:
            return await work()
        except QueueUnavailable:
            if time.monotonic() >= give_up_at:
                raise
            await asyncio.sleep(STORE_RETRY_S)
