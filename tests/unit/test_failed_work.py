"""Stored requests whose attempts are spent, on the twins: which are kept, and what runs again."""

import asyncio
from collections.abc import AsyncIterator

import pytest

from forebay_api.in_flight.records import key_of
from forebay_contracts.nats import clock
from forebay_contracts.queueing import transitions
from forebay_contracts.queueing.failed import FailedRequest
from forebay_contracts.wire import names
from forebay_contracts.wire.errors import QueueUnavailable
from forebay_contracts.wire.frames import Failed, decode_frame
from forebay_contracts.wire.request import InferenceRequest
from forebay_contracts.wire.state import RequestStatus
from forebay_inference.attempt import ownership
from support.twins import Twins, request, twins


@pytest.fixture
async def system() -> AsyncIterator[Twins]:
    async with twins(max_deliveries=1) as made:
        made.worker()
        yield made


def stored(orders: str) -> InferenceRequest:
    made = request(orders)
    record = key_of("resp", "alice", names.response_id(made.id))
    return made.model_copy(update={"reply_to": names.answer_subject(made.id), "record": record, "key": "alice"})


async def test_a_stored_request_whose_attempts_are_spent_is_kept_with_its_fault(system: Twins) -> None:
    wanted = stored("tokens=2 fail")
    await system.queue.publish(wanted)
    state = await system.reaches(wanted.id, RequestStatus.FAILED)
    assert state.retryable
    (kept,) = system.failed
    assert kept == FailedRequest(state=state, request=wanted)
    assert FailedRequest.model_validate_json(kept.encode()) == kept
    assert "on worker w1" in (kept.state.fault or "")


@pytest.mark.parametrize(
    ("attempts", "late_s", "outcome"), [(1, 0, RequestStatus.FAILED), (3, 60, RequestStatus.TIMED_OUT)]
)
async def test_an_attempt_that_only_ends_an_answer_writes_behind_what_it_has(
    monkeypatch: pytest.MonkeyPatch, attempts: int, late_s: float, outcome: RequestStatus
) -> None:
    """An attempt was killed. The next one ends the request, and generates nothing."""
    async with twins(max_deliveries=attempts) as system:
        wanted = stored("tokens=20 delay_ms=5")
        await system.queue.publish(wanted)
        dying = asyncio.create_task(system.runner("w1").run(await system.queue.pull()))
        async with asyncio.timeout(30):
            while not (await system.answers.read(wanted.id))[1:]:  # noqa: ASYNC110 - the worker tells no test
                await asyncio.sleep(0.001)
        dying.cancel()
        monkeypatch.setattr(clock, "now", lambda now=clock.now: now() + late_s)
        system.queue.forget_deliveries()
        system.worker("w2")
        state = await system.reaches(wanted.id, outcome)
        await system.empty()
        assert state.retryable is (outcome is RequestStatus.FAILED)
        last = decode_frame((await system.answers.read(wanted.id))[-1].frames[-1])
        assert isinstance(last, Failed)


async def test_what_nobody_can_read_again_is_not_kept(system: Twins) -> None:
    unstored = request("tokens=2 fail").model_copy(update={"reply_to": names.answer_subject("none")})
    await system.queue.publish(unstored)
    assert not (await system.reaches(unstored.id, RequestStatus.FAILED)).retryable
    good = stored("tokens=2")
    await system.queue.publish(good)
    assert not (await system.reaches(good.id, RequestStatus.COMPLETED)).retryable
    assert not system.failed


async def test_one_that_cannot_be_kept_ends_all_the_same(system: Twins, monkeypatch: pytest.MonkeyPatch) -> None:
    async def refuse(_: FailedRequest) -> None:
        raise QueueUnavailable("there is no such stream")

    monkeypatch.setattr(ownership, "STORE_PATIENCE_S", 0)
    runner = system.runner("w2")
    monkeypatch.setattr(runner, "_keep", refuse)
    wanted = stored("tokens=2 fail")
    system.queue.put(wanted.encode(), {names.HEADER_MSG_ID: wanted.id})
    await runner.run(await system.queue.pull())
    assert not (await system.reaches(wanted.id, RequestStatus.FAILED)).retryable


def test_it_runs_again_as_another_request_of_the_same_object() -> None:
    old = stored("tokens=2").model_copy(update={"created_at": 1000.0, "deadline": 1060.0})
    failed = FailedRequest(state=transitions.queued(old, 1), request=old)
    again = failed.again()
    assert again.id == names.retry_id(old.id) != old.id
    assert again.id == failed.again().id
    assert again.reply_to == names.answer_subject(again.id)
    assert again.deadline - again.created_at == 60
    assert again.created_at >= clock.now() - 1
    assert (again.record, again.messages, again.key) == (old.record, old.messages, old.key)
