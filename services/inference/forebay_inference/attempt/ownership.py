"""The attempt that wrote a request's state last owns the request. Each of its writes names the revision before it."""

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable
from typing import Final, TypeVar

from forebay_contracts.nats import clock
from forebay_contracts.nats.streams import DUPLICATE_WINDOW_S
from forebay_contracts.queueing import transitions
from forebay_contracts.queueing.failed import FailedRequest
from forebay_contracts.queueing.protocols import StateStore, Stored, Superseded
from forebay_contracts.queueing.state_store import change
from forebay_contracts.wire.errors import QueueConflict, QueueUnavailable, StateUnreadable
from forebay_contracts.wire.request import InferenceRequest
from forebay_contracts.wire.state import RequestState, RequestStatus, Usage

STORE_RETRY_S: Final = 0.5
"""Pause between two tries at a write while NATS is away."""

STORE_PATIENCE_S: Final = 60.0
"""How long such a write is tried. Then the attempt gives up, and NATS redelivers the message."""

T = TypeVar("T")

log = logging.getLogger(__name__)


class EndedBefore(Exception):
    """The request has ended already; `state` says how."""

    def __init__(self, state: RequestState) -> None:
        super().__init__(f"request {state.id} had ended: {state.status.value}")
        self.state = state


class Ownership:
    """One attempt's right to write the state of its request.

    Once a newer attempt has claimed the request, every write of this one is refused. All methods try for
    STORE_PATIENCE_S and then raise QueueUnavailable. `keep` keeps a stored request whose attempts are spent.
    """

    def __init__(
        self,
        states: StateStore,
        request: InferenceRequest,
        worker: str,
        sequence: int,
        turn: int,
        keep: Callable[[FailedRequest], Awaitable[None]],
    ) -> None:
        self._keep = keep
        self._states = states
        self._request = request
        self._worker = worker
        self._sequence = sequence
        self._turn = turn
        self._tried: RequestState | None = None
        self._claimed: Stored | None = None

    @property
    def handed_over(self) -> int:
        """How often a worker that had to stop has handed the request over."""
        return self._claimed.state.handed_over if self._claimed is not None else 0

    async def claim(self, *, fresh: bool) -> int:
        """Make this attempt the owner; returns its number. `fresh`: most likely no state is stored yet.

        Raises:
            EndedBefore: the request has ended.
            MovedOn: its message is of an earlier turn.
            StateUnreadable: another version wrote its state.
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
        """Whether this attempt owns the request, or is still claiming it."""
        if self._claimed is None:
            return True
        try:
            return self._is_newest(await patiently(self._read))
        except Superseded:
            return False

    async def hand_over(self, tokens: int) -> None:
        """Give the request back for another worker. Raises Superseded or EndedBefore."""
        await self._write(transitions.handed_over(self._own.state, tokens))

    async def give_way(self, tokens: int) -> None:
        """Give the request back for a later turn. Raises Superseded or EndedBefore."""
        await self._write(transitions.gave_way(self._own.state, tokens))

    async def waits_at(self, sequence: int) -> None:
        """Note where the request waits that gave way, so that a cancel removes it. Nobody needs this otherwise."""
        waits = self._own.state.model_copy(update={"deferred": sequence})
        with contextlib.suppress(QueueConflict, QueueUnavailable):
            await self._states.write(waits, self._own.revision)

    async def fault(self, reason: str, tokens: int) -> None:
        """Record that this attempt failed and another will follow. Raises Superseded or EndedBefore."""
        await self._write(transitions.faulted(self._own.state, reason, tokens))

    async def end(
        self,
        outcome: RequestStatus,
        *,
        error: str | None = None,
        fault: str | None = None,
        usage: Usage | None = None,
        cut: bool = False,
        spent: bool = False,
        first_token_at: float | None = None,
        resumed: int = 0,
    ) -> RequestStatus:
        """Write how the request ended and count it. `spent`: keep it first, if it is stored.

        Returns how it ended: somebody else may have ended it before.

        Raises:
            Superseded: a newer attempt owns the request.
        """
        state = transitions.ended(
            self._own.state,
            outcome,
            error=error,
            fault=fault,
            usage=usage,
            cut=cut,
            first_token_at=first_token_at,
            resumed=resumed,
        )
        if spent and outcome is RequestStatus.FAILED and self._request.record is not None:
            state = await self._kept(state)
        try:
            await self._write(state)
        except EndedBefore as exc:
            await self.count(exc.state)
            return exc.state.status
        await patiently(lambda: self._states.count(outcome, self._request.id, state))
        return outcome

    async def count(self, state: RequestState) -> None:
        """Count an end that somebody else wrote, since its writer may have died before it counted.

        An older end is left out: NATS would no longer recognise the second count as a repetition.
        """
        if state.finished_at is not None and clock.now() - state.finished_at < DUPLICATE_WINDOW_S / 2:
            await patiently(lambda: self._states.count(state.status, state.id, state))

    async def _kept(self, state: RequestState) -> RequestState:
        """The last state of a request that is kept, or `state` if it cannot be."""
        retryable = state.model_copy(update={"retryable": True})
        try:
            await patiently(lambda: self._keep(FailedRequest(state=retryable, request=self._request)))
        except QueueUnavailable as exc:
            log.warning("[RequestQueue] %s: %s", state.id, exc.message)
            return state
        return retryable

    async def _claim_over(self) -> Stored:
        # An earlier try may be stored although its ack was lost.
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
        self._tried = transitions.claimed(state, self._request, self._worker, self._sequence, self._turn)
        return self._tried

    async def _write(self, state: RequestState) -> None:
        revision = self._own.revision

        async def write() -> None:
            nonlocal revision
            try:
                self._claimed = Stored(state, await self._states.write(state, revision))
            except QueueConflict:
                stored = await self._read()
                if stored is not None and stored.state == state:
                    self._claimed = stored  # by an earlier try, whose ack was lost
                    return
                if stored is not None and stored.state.status.final:
                    raise EndedBefore(stored.state) from None
                if not self._is_newest(stored):
                    raise Superseded(f"{state.id}: attempt {state.attempt} was replaced") from None
                # The cluster is agreeing on an earlier try, a replica lags behind, or the store lost the claim.
                revision = stored.revision if stored is not None else 0
                raise QueueUnavailable("the request's state is being written") from None

        await patiently(write)

    async def _read(self) -> Stored | None:
        """The state. Raises Superseded if this version cannot read it: then another attempt has written it."""
        try:
            return await self._states.get(self._request.id)
        except StateUnreadable as exc:
            raise Superseded(exc.message) from None

    def _is_newest(self, stored: Stored | None) -> bool:
        """Whether no other attempt has claimed the request. A store that lost its last records has an older state."""
        if stored is None or stored.state == self._own.state:
            return True
        return stored.state.attempt < self._own.state.attempt and not stored.state.status.final

    @property
    def _own(self) -> Stored:
        assert self._claimed is not None, "written before it was claimed"
        return self._claimed


async def patiently(work: Callable[[], Awaitable[T]]) -> T:
    """Repeat `work` while NATS is away, for at most STORE_PATIENCE_S."""
    give_up_at = time.monotonic() + STORE_PATIENCE_S
    while True:
        try:
            return await work()
        except QueueUnavailable:
            if time.monotonic() >= give_up_at:
                raise
            await asyncio.sleep(STORE_RETRY_S)
