"""The table of state changes, and what follows from it."""

import itertools

import pytest

from forebay_contracts.queueing import transitions
from forebay_contracts.queueing.transitions import ALLOWED, LOST, TransitionRefused
from forebay_contracts.wire.state import RequestState, RequestStatus, Usage
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
