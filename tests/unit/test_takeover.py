"""Taking over: another attempt goes on from what the client has, whatever the broker remembers."""

import asyncio
from collections.abc import AsyncIterator

import pytest

from forebay_contracts.telemetry.metrics import REGISTRY
from forebay_contracts.wire.frames import Delta, Started
from forebay_contracts.wire.state import RequestStatus
from forebay_inference.attempt.endings import End, Ended
from support.twins import MODEL, Twins, request, twins

TEXT = "t0 t1 t2 t3 t4 t5"


@pytest.fixture
async def system() -> AsyncIterator[Twins]:
    async with twins() as made:
        yield made


async def agree(system: Twins, request_id: str) -> None:
    """The state, the counter and the queue say that the client has its answer."""
    await system.empty()
    assert (await system.state(request_id)).status is RequestStatus.COMPLETED
    assert {outcome: count for outcome, count in (await system.states.totals()).items() if count} == {
        RequestStatus.COMPLETED: 1
    }


def counted(sample: str) -> float:
    """The value of a counter of the workers' model."""
    return REGISTRY.get_sample_value(sample, {"model": MODEL}) or 0.0


async def test_the_next_attempt_goes_on_from_the_tokens_that_are_out(system: Twins) -> None:
    wanted = request("tokens=6 delay_ms=2")
    first = system.worker("w1")
    async with system.dispatcher.submit(wanted) as answer:
        await answer.started()
        text = "".join(delta.text for delta in await anext(answer.deltas()))
        first.running[wanted.id].stop(Ended(End.HANDED_OVER))
        text += "".join([delta.text async for some in answer.deltas() for delta in some])
    assert text == TEXT
    await agree(system, wanted.id)
    state = await system.state(wanted.id)
    assert (state.attempt, state.handed_over) == (2, 1)
    resumed = system.channels[1].frames
    assert isinstance(resumed[0], Started)
    assert next(frame.offset for frame in resumed if isinstance(frame, Delta)) > 0


async def test_a_failed_attempt_is_followed_until_they_are_spent(system: Twins) -> None:
    wanted = request("tokens=2 fail")
    system.worker()
    async with system.dispatcher.submit(wanted) as answer:
        with pytest.raises(Exception, match="the generation failed"):
            [delta async for delta in answer.deltas()]
    await system.empty()
    state = await system.state(wanted.id)
    assert (state.status, state.attempt) == (RequestStatus.FAILED, 3)
    assert state.fault is not None
    assert "ordered to fail" in state.fault


async def test_a_broker_that_forgot_its_deliveries_does_not_disturb_the_one_that_runs(system: Twins) -> None:
    wanted = request("tokens=6 delay_ms=5")
    system.worker("w1")
    async with system.dispatcher.submit(wanted) as answer:
        await answer.started()
        system.queue.forget_deliveries()
        text = "".join([delta.text async for some in answer.deltas() for delta in some])
    assert text == TEXT
    await agree(system, wanted.id)
    # The same worker had it again: that is no attempt of its own.
    assert (await system.state(wanted.id)).attempt == 1


async def test_two_workers_never_carry_one_number(system: Twins) -> None:
    wanted = request("tokens=6 delay_ms=5")
    runners = [system.runner("w1"), system.runner("w2")]
    before = counted("forebay_queue_wait_seconds_count"), counted("forebay_request_redeliveries_total")
    async with system.dispatcher.submit(wanted) as answer:
        works = [asyncio.create_task(runners[0].run(await system.queue.pull()))]
        await answer.started()
        system.queue.forget_deliveries()
        again = await system.queue.pull()
        assert again.num_delivered == 1
        works.append(asyncio.create_task(runners[1].run(again)))
        text = "".join([delta.text async for some in answer.deltas() for delta in some])
        await asyncio.gather(*works)
    assert text == TEXT
    await agree(system, wanted.id)
    numbers = [state.attempt for state in system.states.history if state.status is RequestStatus.PROCESSING]
    assert numbers == [1, 2]
    after = counted("forebay_queue_wait_seconds_count"), counted("forebay_request_redeliveries_total")
    assert after == (before[0] + 1, before[1] + 1), "the metrics count by the number, and not by JetStream's count"


async def test_two_that_begin_at_once_get_different_numbers(system: Twins) -> None:
    wanted = request("tokens=6")
    runners = [system.runner("w1"), system.runner("w2")]
    async with system.dispatcher.submit(wanted) as answer:
        first = await system.queue.pull()
        system.queue.forget_deliveries()
        second = await system.queue.pull()
        await asyncio.gather(runners[0].run(first), runners[1].run(second))
        text = "".join([delta.text async for some in answer.deltas() for delta in some])
    assert text == TEXT
    await agree(system, wanted.id)
    numbers = [state.attempt for state in system.states.history if state.status is RequestStatus.PROCESSING]
    assert sorted(set(numbers)) == numbers


async def test_what_was_lost_on_the_way_is_sent_again(system: Twins) -> None:
    wanted = request("tokens=6 delay_ms=2")
    runner = system.runner()
    async with system.dispatcher.submit(wanted) as answer:
        work = asyncio.create_task(runner.run(await system.queue.pull()))
        await answer.started()
        system.channels[0].losing = 2
        await work
        text = "".join([delta.text async for some in answer.deltas() for delta in some])
    assert text == TEXT
    assert not system.channels[0].losing
    await agree(system, wanted.id)


async def test_a_worker_that_died_at_its_ack_leaves_a_request_that_has_ended(system: Twins) -> None:
    wanted = request("tokens=6")
    async with system.dispatcher.submit(wanted) as answer:
        first = await system.queue.pull()
        first.ack = lambda: asyncio.sleep(0)  # type: ignore[method-assign]
        await system.runner("w1").run(first)
        text = "".join([delta.text async for some in answer.deltas() for delta in some])
    system.queue.forget_deliveries()
    await system.runner("w2").run(await system.queue.pull())
    assert text == TEXT
    await agree(system, wanted.id)
