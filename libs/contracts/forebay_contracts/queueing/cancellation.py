"""Cancelling a request: because its client left, by DELETE, at its deadline, or by `forebay cancel`.

The api that holds a request's client decides how the request ends for that client. Another process asks that api first.
It ends the request itself only if no api answers. If the answer is logged, the log decides: the last frame in it.
"""

import asyncio
import logging
from typing import Final

from nats.errors import Error as NatsError

from forebay_contracts.nats import clock
from forebay_contracts.nats.connection import Connection
from forebay_contracts.queueing.logged_reply import end_answer
from forebay_contracts.queueing.protocols import Admission, AnswerLog, CancelNotices, StateStore
from forebay_contracts.queueing.state_store import end
from forebay_contracts.telemetry.logs import fields
from forebay_contracts.wire import names
from forebay_contracts.wire.errors import ApiError, RequestCancelled, RequestTimeout, StateUnreadable
from forebay_contracts.wire.state import RequestState, RequestStatus, Usage

LOOKS_S: Final = (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.3)
"""Pauses between reads of the state while the api that holds the client may act: about one second in all."""

log = logging.getLogger(__name__)


class Cancellation:
    """Ends requests before their time."""

    def __init__(self, states: StateStore, admission: Admission, notices: CancelNotices, answers: AnswerLog) -> None:
        self._states = states
        self._answers = answers
        self._admission = admission
        self._notices = notices

    async def cancel(self, request_id: str, reason: str) -> bool:
        """Cancel a request of any api; False if it had ended before, or is unknown.

        Raises:
            QueueUnavailable: NATS does not answer.
        """
        if (state := await self._state(request_id)) is None or state.status.final:
            return False
        if not state.logged:
            await self._notices.ask(request_id, reason)
            for pause_s in LOOKS_S:
                await asyncio.sleep(pause_s)
                if (state := await self._state(request_id)) is None or state.status.final:
                    return state is not None and state.status is RequestStatus.CANCELLED
        return await self.end(request_id, RequestStatus.CANCELLED, reason, unknown=state) is not None

    async def end(
        self,
        request_id: str,
        outcome: RequestStatus,
        reason: str,
        *,
        unknown: RequestState | None = None,
        usage: Usage | None = None,
    ) -> RequestState | None:
        """End a request as `cancelled` or `timed_out`; returns its last state, or None if it had ended before.

        The order is: end a logged answer, write the final state, count it, remove the message, tell the worker. The
        worker stops within one step of the engine. `unknown` is the state to start from if none is stored yet. `usage`
        is what the request used so far, as far as it is known. The log tells that of a logged answer.

        Raises:
            QueueUnavailable, AnswerLogFull: NATS does not answer, or the answer cannot be ended now.
        """
        if unknown is not None and unknown.logged:
            outcome, usage = await end_answer(self._answers, request_id, _error(outcome, reason))
            if outcome in (RequestStatus.COMPLETED, RequestStatus.FAILED):
                return None  # its worker, or the next one, writes that state
        state = unknown
        try:
            ended = await end(self._states, request_id, outcome, reason, unknown, usage)
        except StateUnreadable as exc:
            log.error("[RequestQueue] %s", exc.message)
            ended = None
        else:
            if ended is None:
                return None
            state = ended
        # The message may wait or be delivered already: remove it, and tell the worker that may run it.
        try:
            if state is not None and state.sequence is not None:
                await self._admission.remove(request_id, state.sequence)
            elif state is not None and state.deferred is not None:
                await self._admission.remove(request_id, state.deferred, deferred=True)
        finally:
            await self._notices.tell(request_id, reason)
        if ended is not None:
            log.info(
                "[RequestQueue] %s %s: %s",
                request_id,
                outcome.value.replace("_", " "),
                reason,
                extra=fields(
                    request_id=request_id,
                    model=ended.model,
                    type=ended.completion_type,
                    attempt=ended.attempt,
                    outcome=outcome.value,
                    total_s=max(clock.now() - ended.queued_at, 0.0),
                ),
            )
        return ended

    async def _state(self, request_id: str) -> RequestState | None:
        stored = await self._states.get(request_id)
        return stored.state if stored is not None else None


def _error(outcome: RequestStatus, reason: str) -> ApiError:
    """What a reader of the answer gets."""
    if outcome is RequestStatus.TIMED_OUT:
        return RequestTimeout(reason)
    return RequestCancelled(f"the request was cancelled: {reason}")


class NatsCancelNotices:
    """On `inference.cancel.<request id>`, a question with the header HEADER_CANCEL. See `CancelNotices`."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    async def ask(self, request_id: str, reason: str) -> None:
        """Ask the api that holds the client. Workers ignore a question."""
        await self._publish(request_id, reason, {names.HEADER_CANCEL: "ask"})

    async def tell(self, request_id: str, reason: str) -> None:
        """Tell all: the state is final already."""
        await self._publish(request_id, reason, None)

    async def _publish(self, request_id: str, reason: str, headers: dict[str, str] | None) -> None:
        try:
            await self._connection.client.publish(names.cancel_subject(request_id), reason.encode(), headers=headers)
        except NatsError as exc:
            # The worker learns it from the state, at the end of its attempt.
            log.debug("%s: the cancel notice was not sent: %r", request_id, exc)
