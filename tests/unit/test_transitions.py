"""The table of state changes, and what follows from it."""

import itertools

import pytest

from forebay_contracts.queueing import transitions
from forebay_contracts.queueing.transitions import ALLOWED, LOST, TransitionRefused
from forebay_contracts.wire.state import MAX_ATTEMPTS, RequestState, RequestStatus, Usage
from support.twins import request


def state(status: RequestStatus, **fields: object) -> RequestState:
    return transitions.queued(request(), 1).model_copy(update={"status": status, **fields})


def test_the_table_is_whole_and_nothing_follows_an_end() -> None:
    assert set(ALLOWED) == {None, *RequestStatus}
    assert all(not ALLOWED[status] for status in RequestStatus if status.final)
    assert all(ALLOWED[status] for status in RequestStatus if not status.final)


@pytest.mark.parametrize(("before", "to"), list(itertools.product(RequestStatus, RequestStatus)))
def test_an_end_is_written_where_the_table_allows_it(before: RequestStatus, to: RequestStatus) -> None:
    if to in ALLOWED[before]:
        assert transitions.ended(state(before), to).status is to
    else:
        with pytest.raises(TransitionRefused, match=before.value):
            transitions.ended(state(before), to)


def test_each_claim_counts_one_attempt_more() -> None:
    wanted = request()
    first = transitions.claimed(None, wanted, "w1", 1)
    second = transitions.claimed(first, wanted, "w2", 1)
    assert [first.attempt, second.attempt] == [1, 2]
    assert second.started_at == first.started_at
    assert second.worker == "w2"
    assert second.fault == f"attempt 1 on worker w1: {LOST}"


def test_a_hand_over_is_no_fault_and_keeps_the_number() -> None:
    wanted = request()
    given = transitions.handed_over(transitions.claimed(None, wanted, "w1", 1))
    assert (given.status, given.worker, given.handed_over, given.attempt) == (RequestStatus.QUEUED, None, 1, 1)
    again = transitions.claimed(given, wanted, "w2", 1)
    assert (again.attempt, again.fault) == (2, None)


def test_a_fault_is_kept_for_who_runs_the_system() -> None:
    wanted = request()
    faulted = transitions.faulted(transitions.claimed(None, wanted, "w1", 1), "x" * 1000)
    assert faulted.fault == f"attempt 1 on worker w1: {'x' * transitions.MAX_REASON}"
    again = transitions.claimed(faulted, wanted, "w2", 1)
    assert again.fault == faulted.fault


def test_no_duration_is_negative_where_clocks_disagree() -> None:
    late = state(RequestStatus.PROCESSING, queued_at=4_000_000_000.0)
    assert transitions.ended(late, RequestStatus.COMPLETED, usage=Usage()).finished_at == late.queued_at


def test_the_past_attempts_are_kept_with_what_became_of_them() -> None:
    wanted = request()
    lost = transitions.claimed(transitions.claimed(None, wanted, "w1", 1), wanted, "w2", 1)
    assert [(one.number, one.worker, one.fault, one.ended_at) for one in lost.attempts] == [
        (1, "w1", f"attempt 1 on worker w1: {LOST}", None)
    ]
    assert lost.attempt_at is not None
    failed = transitions.claimed(transitions.faulted(lost, "no memory", tokens=41), wanted, "w3", 1)
    assert [(one.number, one.worker, one.tokens) for one in failed.attempts] == [(1, "w1", None), (2, "w2", 41)]
    assert failed.attempts[1].fault == "attempt 2 on worker w2: no memory"
    assert failed.attempts[1].began_at == lost.attempt_at
    given = transitions.claimed(transitions.gave_way(failed, tokens=50), wanted, "w4", 2, 1)
    assert [one.fault for one in given.attempts][2:] == [None]
    assert RequestState.model_validate_json(given.encode()) == given


def test_a_state_keeps_a_bounded_number_of_attempts() -> None:
    wanted, last = request(), None
    for turn in range(MAX_ATTEMPTS + 5):
        last = transitions.gave_way(transitions.claimed(last, wanted, "w", 1, turn))
    assert last is not None
    assert [one.number for one in last.attempts] == list(range(6, MAX_ATTEMPTS + 6))
