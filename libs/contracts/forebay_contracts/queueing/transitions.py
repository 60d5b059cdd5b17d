"""Every change of a request's state, as one pure table. Every writer makes its states here.

    queued → processing → completed | failed, and from either of the first two cancelled | timed_out

The next attempt goes from `processing` to `processing` with a higher number. A worker that has to stop goes from
`processing` back to `queued`. Nothing follows a final state.
"""

from collections.abc import Mapping
from typing import Any, Final

from forebay_contracts.nats import clock
from forebay_contracts.wire import names
from forebay_contracts.wire.errors import QueueConflict
from forebay_contracts.wire.request import InferenceRequest
from forebay_contracts.wire.state import MAX_ATTEMPTS, PastAttempt, RequestState, RequestStatus, Usage

ALLOWED: Final[Mapping[RequestStatus | None, frozenset[RequestStatus]]] = {
    None: frozenset(RequestStatus) - {RequestStatus.COMPLETED},
    RequestStatus.QUEUED: frozenset(RequestStatus) - {RequestStatus.QUEUED, RequestStatus.COMPLETED},
    RequestStatus.PROCESSING: frozenset(RequestStatus),
    RequestStatus.COMPLETED: frozenset(),
    RequestStatus.FAILED: frozenset(),
    RequestStatus.CANCELLED: frozenset(),
    RequestStatus.TIMED_OUT: frozenset(),
}
"""For each status (None: no state is stored), the statuses that may follow it."""

MAX_REASON: Final = 500
"""Characters of a fault that the state keeps."""

LOST: Final = "it ended without a report: the worker was killed, or cut off from NATS for longer than ACK_WAIT"


class MovedOn(Exception):
    """The request has given way since this message was published: a later message has a later turn.

    `waits`: nobody has claimed that one yet.
    """

    def __init__(self, state: RequestState) -> None:
        super().__init__(f"request {state.id} has moved on to turn {state.turn}")
        self.turn = state.turn
        self.waits = state.status is RequestStatus.QUEUED


class TransitionRefused(QueueConflict):
    """The table does not allow this change."""


def queued(request: InferenceRequest, sequence: int | None) -> RequestState:
    """The first state of a request that the queue, or the waiting room, admitted at `sequence`."""
    places = (None, sequence) if request.deferred else (sequence, None)
    return _first(request, places[0], status=RequestStatus.QUEUED, deferred=places[1])


def _first(request: InferenceRequest, sequence: int | None, **rest: Any) -> RequestState:
    return RequestState(
        id=request.id,
        completion_type=request.completion_type.value,
        timestamp=request.created_at,
        model=request.model,
        queued_at=request.created_at,
        deadline=request.deadline,
        sequence=sequence,
        key=request.key,
        logged=names.is_logged(request.reply_to),
        notify=names.object_of(request.record) if request.notify and request.record else None,
        tier=request.tier.value,
        **rest,
    )


def claimed(
    state: RequestState | None, request: InferenceRequest, worker: str, sequence: int, turn: int = 0
) -> RequestState:
    """The next attempt claims the request. Its number is one more than the last, whatever JetStream counts.

    Raises MovedOn if the message of this `turn` is not its last one.
    """
    if state is None:
        begun = {"attempt": 1, "worker": worker, "started_at": max(clock.now(), request.created_at), "turn": turn}
        return _first(request, sequence, status=RequestStatus.PROCESSING, **begun)
    if turn < state.turn:
        raise MovedOn(state)
    return _changed(
        state,
        state,
        RequestStatus.PROCESSING,
        attempt=state.attempt + 1,
        worker=worker,
        sequence=sequence,
        deferred=None,
        turn=turn,
        started_at=state.started_at or max(clock.now(), state.queued_at),
        fault=_fault_before(state),
        attempts=_attempts_before(state),
        attempt_at=max(clock.now(), state.queued_at) if state.attempt else None,
    )


def faulted(state: RequestState, reason: str, tokens: int | None = None) -> RequestState:
    """The attempt failed with so many tokens of the answer, and another one will follow."""
    fault = _fault(state, reason)
    attempts = _past(state, ended_at=clock.now(), fault=fault, tokens=tokens)
    return _changed(state, state, RequestStatus.PROCESSING, fault=fault, attempts=attempts)


def handed_over(state: RequestState, tokens: int | None = None) -> RequestState:
    """The worker has to stop: the request waits for another worker and keeps its tokens. The attempt did not fail."""
    attempts = _past(state, ended_at=clock.now(), tokens=tokens)
    return _changed(
        state, state, RequestStatus.QUEUED, worker=None, handed_over=state.handed_over + 1, attempts=attempts
    )


def gave_way(state: RequestState, tokens: int | None = None) -> RequestState:
    """The request goes back into the waiting room, with its tokens. The attempt did not fail."""
    return handed_over(state, tokens).model_copy(update={"sequence": None, "turn": state.turn + 1})


def ended(
    state: RequestState,
    outcome: RequestStatus,
    *,
    stored: bool = True,
    error: str | None = None,
    fault: str | None = None,
    usage: Usage | None = None,
    cut: bool = False,
    first_token_at: float | None = None,
    resumed: int = 0,
) -> RequestState:
    """The request ended as `outcome`. `error` is what its client got, `fault` why its last attempt failed."""
    finished_at = max(clock.now(), state.started_at or state.queued_at)
    changes: dict[str, Any] = {"error": error, "usage": usage, "finished_at": finished_at, "cut": cut}
    changes |= {"first_token_at": first_token_at, "resumed": resumed}
    if fault is not None:
        changes["fault"] = _fault(state, fault)
    return _changed(state if stored else None, state, outcome, **changes)


def _changed(stored: RequestState | None, base: RequestState, to: RequestStatus, **changes: Any) -> RequestState:
    if to not in ALLOWED[stored.status if stored else None]:
        raise TransitionRefused(
            f"request {base.id}: {to.value} cannot follow {stored.status.value if stored else 'nothing'}"
        )
    return base.model_copy(update={"status": to, **changes})


def _fault(state: RequestState, reason: str) -> str:
    return f"attempt {state.attempt} on worker {state.worker}: {reason[:MAX_REASON]}"


def _fault_before(state: RequestState) -> str | None:
    """Why the last attempt failed. One that ended without a report gets the fault LOST."""
    silent = state.status is RequestStatus.PROCESSING and not (state.fault or "").startswith(_fault(state, ""))
    return _fault(state, LOST) if silent else state.fault


def _attempts_before(state: RequestState) -> tuple[PastAttempt, ...]:
    """All attempts before the one that claims now. One that ended without a report is not yet among them."""
    known = not state.attempt or (bool(state.attempts) and state.attempts[-1].number == state.attempt)
    return state.attempts if known else _past(state, fault=_fault_before(state))


def _past(state: RequestState, **end: Any) -> tuple[PastAttempt, ...]:
    """The attempts, the present one with its end among them."""
    began_at = state.attempt_at or state.started_at
    past = PastAttempt(number=state.attempt, worker=state.worker, began_at=began_at, **end)
    return (*state.attempts, past)[-MAX_ATTEMPTS:]
