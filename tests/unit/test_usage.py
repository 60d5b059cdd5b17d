"""What counts as used: by requests that complete, and by those that are cancelled, time out or fail."""

import asyncio
from collections.abc import AsyncIterator

import pytest

from forebay_contracts.nats import clock
from forebay_contracts.queueing.usage import MOST, UsageRow, counter_of, day_of, grouped, total, used_of, value_of
from forebay_contracts.wire import names
from forebay_contracts.wire.errors import ApiError
from forebay_contracts.wire.request import InferenceRequest
from forebay_contracts.wire.state import RequestState, RequestStatus, Usage
from support.twins import MODEL, Twins, request, twins


@pytest.fixture
async def system() -> AsyncIterator[Twins]:
    async with twins(max_deliveries=2) as made:
        yield made


async def used(system: Twins, wanted: InferenceRequest, *statuses: RequestStatus) -> UsageRow:
    """What was counted for the only request, once it has ended so. Its state says the same."""
    state = await system.reaches(wanted.id, *statuses)
    await system.empty()
    await system.dispatcher.close()
    (found,) = await system.states.usage([day_of(clock.now())])
    assert (found.model, found.key, found.requests) == (MODEL, wanted.key, 1)
    usage = state.usage or Usage()
    assert (found.prompt_tokens, found.completion_tokens) == (usage.prompt_tokens, usage.completion_tokens)
    return found


async def prompt_tokens(system: Twins, wanted: InferenceRequest) -> int:
    """How long the prompt is."""
    async with system.dispatcher.submit(wanted) as answer:
        [_ async for _ in answer.deltas()]
        assert answer.completed is not None
        return answer.completed.usage.prompt_tokens


@pytest.mark.parametrize("key", ["alice", None])
async def test_a_completed_request_counts_its_usage(system: Twins, key: str | None) -> None:
    system.worker()
    wanted = request("tokens=7", key=key)
    length = await prompt_tokens(system, wanted)
    found = await used(system, wanted, RequestStatus.COMPLETED)
    assert (found.prompt_tokens, found.completion_tokens) == (length, 7)
    assert 0 <= found.queue_seconds < 5


@pytest.mark.parametrize("stream", [True, False])
async def test_a_client_that_leaves_has_used_what_its_api_has_received(system: Twins, stream: bool) -> None:
    system.worker()
    wanted = request("tokens=1000 delay_ms=2", key="alice", stream=stream)
    async with system.dispatcher.submit(wanted) as answer:
        await anext(answer.deltas())
        received = answer.used
        assert received is not None
    found = await used(system, wanted, RequestStatus.CANCELLED)
    assert found.prompt_tokens == received.prompt_tokens > 0
    assert found.completion_tokens >= received.completion_tokens


async def test_one_that_never_ran_has_used_its_place_alone(system: Twins) -> None:
    wanted = request(key="alice")
    async with system.dispatcher.submit(wanted):
        await asyncio.sleep(0.02)  # its wait is what is counted
    found = await used(system, wanted, RequestStatus.CANCELLED)
    assert (found.prompt_tokens, found.completion_tokens) == (0, 0)
    assert found.queue_seconds >= 0.01


async def test_a_deadline_counts_what_is_made(system: Twins) -> None:
    system.worker()
    wanted = request("tokens=1000 delay_ms=2", key="alice")
    wanted = wanted.model_copy(update={"deadline": wanted.created_at + 0.5})
    with pytest.raises(ApiError):
        await system.text(wanted)
    found = await used(system, wanted, RequestStatus.TIMED_OUT)
    assert found.prompt_tokens > 0
    assert found.completion_tokens > 0


async def test_spent_attempts_count_each_token_once(system: Twins, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("forebay_inference.attempt.endings.NAK_DELAY_S", 0)
    system.worker()
    wanted = request("tokens=4 fail", key="alice")
    with pytest.raises(ApiError):
        await system.text(wanted)
    found = await used(system, wanted, RequestStatus.FAILED)
    assert found.prompt_tokens > 0
    assert found.completion_tokens == 4


async def test_the_log_tells_what_a_cancelled_stored_answer_has_used(system: Twins) -> None:
    system.worker()
    wanted = request("tokens=1000 delay_ms=2", key="alice")
    wanted = wanted.model_copy(update={"reply_to": names.answer_subject(wanted.id)})
    await system.queue.publish(wanted)
    await system.reaches(wanted.id, RequestStatus.PROCESSING)
    async with asyncio.timeout(30):
        async with system.answers.follow(wanted.id) as coming:
            async for records in coming:
                if any(b'"delta"' in frame for record in records for frame in record.frames):
                    break
    assert await system.cancellation.cancel(wanted.id, "by its owner")
    found = await used(system, wanted, RequestStatus.CANCELLED)
    assert found.prompt_tokens > 0
    assert found.completion_tokens > 0


def state(**fields: object) -> RequestState:
    times = {"timestamp": 0, "queued_at": 1e9, "started_at": 1e9 + 1, "finished_at": 1e9 + 2, "deadline": 2e9}
    known = {"id": "a", "status": "completed", "completion_type": "chat", "model": "org/Model-1.5 *>", "key": "k-1"}
    return RequestState.model_validate({**times, **known, **fields})


def test_many_requests_are_one_number() -> None:
    # Of a server that counts wrongly, nothing spills into another field.
    usages = [Usage(prompt_tokens=3, cached_tokens=2, completion_tokens=1), Usage(prompt_tokens=-5), None]
    usages += [Usage(prompt_tokens=10**30, completion_tokens=MOST)] * 1_000
    states = [state(usage=usage) for usage in usages]
    (counter,) = {counter_of(each) for each in states}
    found = used_of(counter, sum(map(value_of, states)))
    assert found == UsageRow(
        day="2001-09-09",
        model="org/Model-1.5 *>",
        key="k-1",
        requests=1_003,
        prompt_tokens=3 + 1_000 * MOST,
        cached_tokens=2,
        completion_tokens=1 + 1_000 * MOST,
        queue_seconds=1_003,
    )


@pytest.mark.parametrize(
    ("model", "key", "subject"),
    [
        ("org/Model-1.5", "alice", "inference.usage.2026-11-30.org/Model-1%2E5.alice"),
        ("with space.and>wild*card%", None, "inference.usage.2026-11-30.with%20space%2Eand%3Ewild%2Acard%25.-"),
        ("模", "-", "inference.usage.2026-11-30.%E6%A8%A1.%2D"),
    ],
)
def test_names_of_counters(model: str, key: str | None, subject: str) -> None:
    assert names.usage_subject("2026-11-30", model, key) == subject
    assert names.usage_of(subject) == ("2026-11-30", model, key)


def test_rows_are_summed_over_what_is_not_named() -> None:
    rows = [
        UsageRow(day=day, model=model, key=key, requests=1, queue_seconds=0.1)
        for day in ("2026-11-29", "2026-11-30")
        for model in "nm"
        for key in ("alice", None)
    ]
    by_key = grouped(rows, ["key"])
    assert [row.model_dump(exclude_unset=True, include={"day", "key", "requests"}) for row in by_key] == [
        {"key": None, "requests": 4},
        {"key": "alice", "requests": 4},
    ]
    assert [(row.model, row.day) for row in grouped(rows, ["model", "day"])][:2] == [
        ("m", "2026-11-29"),
        ("m", "2026-11-30"),
    ]
    assert total(rows).queue_seconds == 0.8
