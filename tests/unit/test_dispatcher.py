"""The dispatcher and cancelling: once, whoever asks, and the same for the client, the state, the counter, the queue."""

import asyncio
import time
from collections.abc import AsyncIterator

import pytest

from forebay_api.in_flight import live_answer
from forebay_api.in_flight.answer import Cancelled, ClientLeft, SlowReader
from forebay_contracts.queueing import transitions
from forebay_contracts.queueing.state_store import QUEUED_AFTER_S
from forebay_contracts.wire.errors import QueueFull, RequestCancelled, RequestTimeout
from forebay_contracts.wire.frames import Delta
from forebay_contracts.wire.state import RequestStatus
from support.twins import Twins, request, twins


@pytest.fixture
async def system() -> AsyncIterator[Twins]:
    async with twins() as made:
        yield made


async def ended(system: Twins, request_id: str, status: RequestStatus) -> None:
    """Everybody says that it ended so, and was told once."""
    await system.dispatcher.close()
    await system.empty()
    assert (await system.state(request_id)).status is status
    totals = {outcome: count for outcome, count in (await system.states.totals()).items() if count}
    assert totals == {status: 1}
    assert system.notices.told == [request_id]
    assert [state.status for state in system.states.history if state.status.final] == [status]


async def test_an_answer(system: Twins) -> None:
    system.worker()
    assert await system.text(request("tokens=3")) == "t0 t1 t2"
    assert not system.dispatcher.waiting


async def test_a_full_queue_admits_nothing_and_keeps_nothing() -> None:
    async with twins(max_queue_size=1) as system, system.dispatcher.submit(request()):
        with pytest.raises(QueueFull):
            async with system.dispatcher.submit(request()):
                pass
        assert len(system.dispatcher.waiting) == len(system.queue) == 1


async def test_a_request_that_waits_gets_its_state(system: Twins) -> None:
    wanted = request()
    async with system.dispatcher.submit(wanted):
        assert await system.states.get(wanted.id) is None
        await system.dispatcher.registered(wanted.id)
        assert (await system.state(wanted.id)).status is RequestStatus.QUEUED


async def test_without_being_asked_it_gets_it_soon(system: Twins) -> None:
    wanted = request()
    async with system.dispatcher.submit(wanted):
        began = time.monotonic()
        await system.reaches(wanted.id, RequestStatus.QUEUED)
        assert time.monotonic() - began >= QUEUED_AFTER_S / 2


async def test_a_client_that_leaves_while_it_waits(system: Twins) -> None:
    wanted = request()
    async with system.dispatcher.submit(wanted) as answer:
        pass
    assert isinstance(answer.error, ClientLeft)
    await ended(system, wanted.id, RequestStatus.CANCELLED)
    # `queued` is not written only to be overwritten.
    assert [state.status for state in system.states.history] == [RequestStatus.CANCELLED]


async def test_a_client_that_leaves_while_it_runs(system: Twins) -> None:
    runner, wanted = system.worker(), request("tokens=5 delay_ms=100000")
    async with system.dispatcher.submit(wanted) as answer:
        await answer.started()
    await ended(system, wanted.id, RequestStatus.CANCELLED)
    async with asyncio.timeout(30):
        while runner.running:  # noqa: ASYNC110 - it stops within a step of the engine, and tells nobody
            await asyncio.sleep(0)


async def test_a_deadline_that_passes(system: Twins) -> None:
    wanted = request(deadline=time.time() + 0.05)
    async with system.dispatcher.submit(wanted) as answer:
        with pytest.raises(RequestTimeout):
            await answer.started()
    await ended(system, wanted.id, RequestStatus.TIMED_OUT)


async def test_a_client_that_does_not_read(system: Twins, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live_answer, "MAX_UNREAD_TOKENS", 3)
    wanted = request()
    async with system.dispatcher.submit(wanted) as answer:
        for offset in range(5):
            answer.receive(Delta(attempt=1, offset=offset, tokens=(offset,), text="t"))
        assert isinstance(answer.error, SlowReader)
    await ended(system, wanted.id, RequestStatus.CANCELLED)


async def test_cancelling_here(system: Twins) -> None:
    system.worker()
    wanted = request("tokens=5 delay_ms=10000")
    async with system.dispatcher.submit(wanted) as answer:
        await answer.started()
        assert await system.dispatcher.cancel(wanted.id, "by DELETE")
        assert not await system.dispatcher.cancel(wanted.id, "once more")
        with pytest.raises(Cancelled, match="by DELETE"):
            [delta async for delta in answer.deltas()]
    await ended(system, wanted.id, RequestStatus.CANCELLED)


async def test_cancelling_from_elsewhere_asks_the_api_that_holds_the_client(system: Twins) -> None:
    wanted = request()
    async with system.dispatcher.submit(wanted) as answer:
        await system.dispatcher.registered(wanted.id)
        assert await system.cancellation.cancel(wanted.id, "by the operator")
        with pytest.raises(Cancelled, match="by the operator"):
            await answer.started()
    assert system.notices.asked == [wanted.id]
    await ended(system, wanted.id, RequestStatus.CANCELLED)


async def test_cancelling_what_an_api_held_that_is_gone(system: Twins) -> None:
    wanted = request()
    sequence = await system.queue.publish(wanted)
    await system.states.write(transitions.queued(wanted, sequence), 0)
    assert await system.cancellation.cancel(wanted.id, "by the operator")
    await ended(system, wanted.id, RequestStatus.CANCELLED)


async def test_what_has_ended_is_not_cancelled(system: Twins) -> None:
    system.worker()
    wanted = request("tokens=1")
    await system.text(wanted)
    await system.reaches(wanted.id, RequestStatus.COMPLETED)
    assert not await system.cancellation.cancel(wanted.id, "too late")
    assert not await system.dispatcher.cancel(wanted.id, "too late")
    assert not await system.dispatcher.cancel("nobody", "unknown")
    assert system.notices.told == []


async def test_an_answer_whose_end_is_here_is_not_cancelled(system: Twins) -> None:
    # The state is not final yet, but the client has it all: the api that holds the client decides.
    system.worker()
    wanted = request("tokens=1")
    async with system.dispatcher.submit(wanted) as answer:
        text = "".join([delta.text async for some in answer.deltas() for delta in some])
        assert text == "t0"
        assert not await system.dispatcher.cancel(wanted.id, "too late")
    await system.reaches(wanted.id, RequestStatus.COMPLETED)


async def test_whoever_cancels_it_is_ended_once(system: Twins) -> None:
    system.worker()
    wanted = request("tokens=5 delay_ms=10000")
    async with system.dispatcher.submit(wanted) as answer:
        await answer.started()
        results = await asyncio.gather(
            system.dispatcher.cancel(wanted.id, "one"),
            system.cancellation.cancel(wanted.id, "two"),
            system.cancellation.cancel(wanted.id, "three"),
        )
    assert results[0]
    await ended(system, wanted.id, RequestStatus.CANCELLED)
    assert (await system.state(wanted.id)).error == "one"


async def test_what_ended_while_the_api_was_away_ends_here_too(system: Twins) -> None:
    wanted = request()
    async with system.dispatcher.submit(wanted) as answer:
        queued = transitions.queued(wanted, answer.sequence)
        end = transitions.ended(queued, RequestStatus.CANCELLED, stored=False, error="the api was gone")
        await system.states.write(end, 0)
        system.dispatcher.look_after_an_outage()
        with pytest.raises(RequestCancelled, match="the api was gone"):
            await answer.started()


async def test_another_requests_message_is_left_alone(system: Twins) -> None:
    # A store that lost its last records gave this request's sequence to another one.
    other = request()
    sequence = await system.queue.publish(other)
    lost = request()
    await system.states.write(transitions.queued(lost, sequence), 0)
    assert await system.cancellation.end(lost.id, RequestStatus.CANCELLED, "the client left")
    assert len(system.queue) == 1
