"""The store of the states loses its last records, as in a power cut: the client decides what has happened."""

import asyncio
from collections.abc import AsyncIterator

import pytest

from forebay_contracts.wire.frames import Started
from forebay_contracts.wire.state import RequestStatus
from forebay_inference.attempt.endings import End, Ended
from support.twins import Twins, request, twins

TEXT = "t0 t1 t2 t3 t4 t5"


@pytest.fixture
async def system() -> AsyncIterator[Twins]:
    async with twins() as made:
        made.connected_for_s = 0  # NATS was away a moment ago
        yield made


async def agree(system: Twins, request_id: str) -> None:
    """The state, the counter and the queue say that the client has its answer."""
    await system.empty()
    state = await system.state(request_id)
    assert state.status is RequestStatus.COMPLETED
    assert state.usage is not None
    assert state.usage.completion_tokens == 6
    assert {outcome: count for outcome, count in (await system.states.totals()).items() if count} == {
        RequestStatus.COMPLETED: 1
    }


async def test_a_running_attempt_ends_although_its_claim_is_lost(system: Twins) -> None:
    wanted = request("tokens=6 delay_ms=2")
    async with system.dispatcher.submit(wanted) as answer:
        work = asyncio.create_task(system.runner().run(await system.queue.pull()))
        await answer.started()
        system.states.lose(wanted.id, None)
        text = "".join([delta.text async for some in answer.deltas() for delta in some])
        await work
    assert text == TEXT
    await agree(system, wanted.id)


async def test_a_running_attempt_goes_on_with_a_new_delivery_although_its_claim_is_lost(system: Twins) -> None:
    wanted = request("tokens=6 delay_ms=5")
    system.worker("w1")
    async with system.dispatcher.submit(wanted) as answer:
        await answer.started()
        system.states.lose(wanted.id, None)
        system.queue.forget_deliveries()
        text = "".join([delta.text async for some in answer.deltas() for delta in some])
    assert text == TEXT
    await agree(system, wanted.id)
    assert (await system.state(wanted.id)).attempt == 1


async def test_two_attempts_of_one_number_do_not_mix(system: Twins) -> None:
    wanted = request("tokens=6 delay_ms=10")
    runners = [system.runner("w1"), system.runner("w2")]
    async with system.dispatcher.submit(wanted) as answer:
        works = [asyncio.create_task(runners[0].run(await system.queue.pull()))]
        await answer.started()
        system.states.lose(wanted.id, None)
        system.queue.forget_deliveries()
        works.append(asyncio.create_task(runners[1].run(await system.queue.pull())))
        text = "".join([delta.text async for some in answer.deltas() for delta in some])
        await asyncio.gather(*works)
    assert text == TEXT
    await agree(system, wanted.id)
    asked = [frame.attempt for frame in system.channels[1].frames if isinstance(frame, Started)]
    assert asked[:2] == [1, 2], "the second attempt takes a number that the api has not seen"


async def test_an_attempt_with_too_low_a_number_takes_a_higher_one(system: Twins) -> None:
    wanted = request("tokens=6 delay_ms=5")
    first = system.worker("w1")
    async with system.dispatcher.submit(wanted) as answer:
        await answer.started()
        before = await system.states.get(wanted.id)
        for number in (2, 3):
            first.running[wanted.id].stop(Ended(End.HANDED_OVER))
            async with asyncio.timeout(30):
                while answer.attempt < number:  # noqa: ASYNC110
                    await asyncio.sleep(0)
        first.running[wanted.id].stop(Ended(End.SUPERSEDED))
        system.states.lose(wanted.id, before)
        system.queue.forget_deliveries()
        text = "".join([delta.text async for some in answer.deltas() for delta in some])
    assert text == TEXT
    assert answer.attempt == 4
    await agree(system, wanted.id)


async def test_a_whole_answer_is_known_to_the_api_and_not_generated_again(system: Twins) -> None:
    wanted = request("tokens=6")
    async with system.dispatcher.submit(wanted) as answer:
        first = await system.queue.pull()
        first.ack = lambda: asyncio.sleep(0)  # type: ignore[method-assign]
        await system.runner("w1").run(first)
        text = "".join([delta.text async for some in answer.deltas() for delta in some])
    system.states.lose(wanted.id, None)
    system.queue.forget_deliveries()
    await system.runner("w2").run(await system.queue.pull())
    assert text == TEXT
    assert [type(frame) for frame in system.channels[1].frames] == [Started]
    await agree(system, wanted.id)


async def test_an_attempt_that_died_before_its_claim_was_stored_is_asked_for(system: Twins) -> None:
    system.connected_for_s = 60
    wanted = request("tokens=6 delay_ms=10")
    async with system.dispatcher.submit(wanted) as answer:
        works = [asyncio.create_task(system.runner("w1").run(await system.queue.pull()))]
        await answer.started()
        system.states.lose(wanted.id, None)
        system.queue.deliver_again(1)
        works.append(asyncio.create_task(system.runner("w2").run(await system.queue.pull())))
        text = "".join([delta.text async for some in answer.deltas() for delta in some])
        await asyncio.gather(*works)
    assert text == TEXT
    assert answer.attempt == 2
    await agree(system, wanted.id)


async def test_a_waiting_request_whose_message_is_lost_is_published_again(system: Twins) -> None:
    wanted = request("tokens=6")
    async with system.dispatcher.submit(wanted) as answer:
        assert answer.sequence == 1
        system.dispatcher.look_after_an_outage()
        await asyncio.sleep(0)
        assert answer.sequence == 1, "it is still there"
        system.queue.lose(1)
        system.dispatcher.look_after_an_outage()
        system.worker()
        text = "".join([delta.text async for some in answer.deltas() for delta in some])
    assert text == TEXT
    assert answer.sequence == 2
    await agree(system, wanted.id)


async def test_an_attempt_without_an_outage_asks_nothing(system: Twins) -> None:
    system.connected_for_s = 60
    wanted = request("tokens=6")
    system.worker()
    assert await system.text(wanted) == TEXT
    assert [frame.type for frame in system.channels[0].frames].count("started") == 1
    await agree(system, wanted.id)


async def test_an_invalid_request_is_refused_before_its_stream_begins(system: Twins) -> None:
    wanted = request("tokens=6", sampling={"max_tokens": 2**30})
    system.worker()
    async with system.dispatcher.submit(wanted) as answer:
        with pytest.raises(Exception, match="context"):
            await answer.started()
