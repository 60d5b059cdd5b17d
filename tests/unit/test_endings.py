"""Every row of the table of endings: what the client gets, the state, the counter and the message."""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass

import pytest

from forebay_contracts.queueing import transitions
from forebay_contracts.queueing.memory import InMemoryDelivery
from forebay_contracts.wire import names
from forebay_contracts.wire.errors import StateUnreadable
from forebay_contracts.wire.frames import Failed
from forebay_contracts.wire.request import InferenceRequest, Tier
from forebay_contracts.wire.state import RequestState, RequestStatus
from forebay_inference.attempt.endings import ENDINGS, Acknowledge, End, Ended
from support.twins import Twins, request, twins


@pytest.fixture
async def system() -> AsyncIterator[Twins]:
    async with twins() as made:
        yield made


@dataclass
class Seen:
    """How one delivery ended."""

    verbs: list[str]
    status: RequestStatus | None
    told: int | None
    total: int


async def delivered(system: Twins, wanted: InferenceRequest) -> InMemoryDelivery:
    await system.queue.publish(wanted)
    delivery = await system.queue.pull()
    assert isinstance(delivery, InMemoryDelivery)
    return delivery


async def seen(system: Twins, wanted: InferenceRequest, delivery: InMemoryDelivery) -> Seen:
    stored = await system.states.get(wanted.id)
    failed = [frame for channel in system.channels for frame in channel.frames if isinstance(frame, Failed)]
    return Seen(
        delivery.verbs,
        stored.state.status if stored else None,
        failed[-1].status if failed else None,
        sum((await system.states.totals()).values()),
    )


async def run(
    system: Twins, wanted: InferenceRequest, meanwhile: Callable[[InMemoryDelivery], Awaitable[None]] | None = None
) -> Seen:
    """Run one delivery to its end while the client waits."""
    async with system.dispatcher.submit(wanted):
        delivery = await system.queue.pull()
        assert isinstance(delivery, InMemoryDelivery)
        work = asyncio.create_task(system.runner().run(delivery))
        if meanwhile is not None:
            await meanwhile(delivery)
        await work
        return await seen(system, wanted, delivery)


async def stopped(system: Twins, wanted: InferenceRequest, ended: Ended) -> Seen:
    """The same for an attempt that is stopped in the middle."""
    async with system.dispatcher.submit(wanted) as answer:
        runner, delivery = system.runner(), await system.queue.pull()
        assert isinstance(delivery, InMemoryDelivery)
        work = asyncio.create_task(runner.run(delivery))
        await answer.started()
        runner.running[wanted.id].stop(ended)
        await work
        return await seen(system, wanted, delivery)


async def completed(system: Twins) -> Seen:
    return await run(system, request("tokens=3"))


async def refused(system: Twins) -> Seen:
    return await run(system, request("no-such-order"))


async def fault(system: Twins) -> Seen:
    return await run(system, request("tokens=2 fail"))


async def spent(system: Twins) -> Seen:
    async with twins(max_deliveries=1) as other:
        return await run(other, request("tokens=2 fail"))


async def timed_out(system: Twins) -> Seen:
    # A worker whose clock is ahead: its client is told, and does not wait for the rest of its time.
    wanted = request()
    async with system.dispatcher.submit(wanted):
        await system.queue.pull()
        late = wanted.model_copy(update={"deadline": time.time() - 1})
        system.queue.put(late.encode(), {names.HEADER_MSG_ID: wanted.id})
        delivery = await system.queue.pull()
        assert isinstance(delivery, InMemoryDelivery)
        await system.runner().run(delivery)
        return await seen(system, wanted, delivery)


async def cancelled(system: Twins) -> Seen:
    return await stopped(system, request("tokens=2 delay_ms=10000"), Ended(End.CANCELLED, reason="why"))


async def abandoned(system: Twins) -> Seen:
    system.alive = False
    return await run(system, request())


async def not_wanted(system: Twins) -> Seen:
    wanted = request()
    assert await system.states.write(transitions.claimed(None, wanted, "w0", 1), 0)
    delivery = await delivered(system, wanted)  # nobody has submitted it: the api knows of no client
    await system.runner().run(delivery)
    return await seen(system, wanted, delivery)


async def handed_over(system: Twins) -> Seen:
    return await stopped(system, request("tokens=2 delay_ms=10000"), Ended(End.HANDED_OVER))


async def yielded(system: Twins) -> Seen:
    system.mover()
    wanted = request("tokens=2 delay_ms=10000", tier=Tier.FLEX)
    async with system.dispatcher.submit(wanted) as answer:
        (waiting,) = system.queue.room.waiting.values()
        await system.queue.room.move(waiting)
        runner, delivery = system.runner(), await system.queue.pull()
        assert isinstance(delivery, InMemoryDelivery)
        work = asyncio.create_task(runner.run(delivery))
        await answer.started()
        runner.running[wanted.id].stop(Ended(End.YIELDED))
        await work
        assert [one.headers[names.HEADER_MSG_ID] for one in system.queue.room.waiting.values()] == [f"{wanted.id}.1"]
        return await seen(system, wanted, delivery)


async def moved_on(system: Twins) -> Seen:
    # The worker died after it had written that the request gives way, and before it put it back.
    wanted = request(tier=Tier.FLEX)
    await system.states.write(transitions.gave_way(transitions.claimed(None, wanted, "w0", 1)), 0)
    system.queue.move(wanted.encode(), {names.HEADER_MSG_ID: wanted.id, names.HEADER_DEFERRED: "chat"})
    delivery = await system.queue.pull()
    assert isinstance(delivery, InMemoryDelivery)
    await system.runner().run(delivery)
    assert [one.headers[names.HEADER_MSG_ID] for one in system.queue.room.waiting.values()] == [f"{wanted.id}.1"]
    return await seen(system, wanted, delivery)


async def ended_before(system: Twins) -> Seen:
    wanted = request()
    state = transitions.ended(
        transitions.queued(wanted, 1), RequestStatus.CANCELLED, stored=False, error="by the operator"
    )
    await system.states.write(state, 0)
    return await run(system, wanted)


async def unreadable(system: Twins) -> Seen:
    wanted = request()
    headers = {names.HEADER_MSG_ID: wanted.id, names.HEADER_REPLY_TO: wanted.reply_to}
    system.queue.put(b"{", headers)
    delivery = await system.queue.pull()
    assert isinstance(delivery, InMemoryDelivery)
    await system.runner().run(delivery)
    return await seen(system, wanted, delivery)


async def superseded(system: Twins) -> Seen:
    wanted = request("tokens=2 delay_ms=50")

    async def claim_by_another(_: InMemoryDelivery) -> None:
        await system.reaches(wanted.id, RequestStatus.PROCESSING)
        stored = await system.states.get(wanted.id)
        assert stored is not None
        await system.states.write(transitions.claimed(stored.state, wanted, "w2", 1), stored.revision)

    return await run(system, wanted, claim_by_another)


ROWS = {
    End.COMPLETED: (completed, Seen(["ack"], RequestStatus.COMPLETED, None, 1)),
    End.REFUSED: (refused, Seen(["term"], RequestStatus.FAILED, 400, 1)),
    End.FAULT: (fault, Seen(["nak"], RequestStatus.PROCESSING, None, 0)),
    End.SPENT: (spent, Seen(["term"], RequestStatus.FAILED, 500, 1)),
    End.TIMED_OUT: (timed_out, Seen(["term"], RequestStatus.TIMED_OUT, 408, 1)),
    End.CANCELLED: (cancelled, Seen(["term"], RequestStatus.CANCELLED, None, 1)),
    End.ABANDONED: (abandoned, Seen(["term"], RequestStatus.CANCELLED, 499, 1)),
    End.NOT_WANTED: (not_wanted, Seen(["term"], RequestStatus.CANCELLED, None, 1)),
    End.HANDED_OVER: (handed_over, Seen(["nak"], RequestStatus.QUEUED, None, 0)),
    End.YIELDED: (yielded, Seen(["term"], RequestStatus.QUEUED, None, 0)),
    End.MOVED_ON: (moved_on, Seen(["term"], RequestStatus.QUEUED, None, 0)),
    End.ENDED_BEFORE: (ended_before, Seen(["term"], RequestStatus.CANCELLED, 499, 1)),
    End.UNREADABLE: (unreadable, Seen(["term"], None, 500, 1)),
    End.SUPERSEDED: (superseded, Seen([], RequestStatus.PROCESSING, None, 0)),
}


def test_every_ending_has_a_row_and_a_test() -> None:
    assert set(ENDINGS) == set(End) == set(ROWS)
    assert {row.acknowledge for row in ENDINGS.values()} == set(Acknowledge)


@pytest.mark.parametrize("how", list(End), ids=lambda how: how.name)
async def test_a_row(how: End, system: Twins) -> None:
    scenario, expected = ROWS[how]
    assert await scenario(system) == expected


async def test_the_client_has_the_answer_before_the_state_is_final_and_the_message_acknowledged_last(
    system: Twins,
) -> None:
    journal: list[str] = []
    wanted = request("tokens=3")
    write, count = system.states.write, system.states.count

    async def noting_write(state: object, revision: int) -> int:
        journal.append(state.status.value)  # type: ignore[attr-defined]
        return await write(state, revision)  # type: ignore[arg-type]

    async def noting_count(outcome: RequestStatus, request_id: str, state: RequestState) -> None:
        journal.append("counted")
        await count(outcome, request_id, state)

    system.states.write, system.states.count = noting_write, noting_count  # type: ignore[method-assign,assignment]
    async with system.dispatcher.submit(wanted) as answer:
        delivery = await system.queue.pull()
        ack = delivery.ack

        async def noting_ack() -> None:
            journal.append("acknowledged")
            await ack()

        delivery.ack = noting_ack  # type: ignore[method-assign]
        on_end = answer.on_end

        def noting_end(ended: object) -> None:
            journal.append("answered")
            on_end(ended)  # type: ignore[arg-type]

        answer.on_end = noting_end
        await system.runner().run(delivery)
    assert journal == ["processing", "answered", "completed", "counted", "acknowledged"]


async def test_what_the_client_got_decides_the_state(system: Twins) -> None:
    # The api told its client that the time is over just before the end of the answer came.
    wanted = request("tokens=1")
    async with system.dispatcher.submit(wanted):
        delivery = await system.queue.pull()
    await system.runner().run(delivery)
    await system.dispatcher.close()
    assert (await system.state(wanted.id)).status is RequestStatus.CANCELLED
    assert (await system.states.totals())[RequestStatus.CANCELLED] == 1


async def test_an_answer_that_nobody_got_is_not_completed(system: Twins) -> None:
    wanted = request("tokens=2 delay_ms=5")
    async with system.dispatcher.submit(wanted) as answer:
        delivery = await system.queue.pull()
        work = asyncio.create_task(system.runner().run(delivery))
        await answer.started()
        del system.dispatcher.waiting[wanted.id]  # as an api that is gone
        await work
    assert (await system.state(wanted.id)).status is RequestStatus.CANCELLED


async def test_a_state_of_another_version_ends_with_an_error(system: Twins) -> None:
    wanted = request()

    async def unreadable_state(request_id: str) -> None:
        raise StateUnreadable(f"the state of request {request_id} cannot be read")

    await system.states.write(transitions.queued(wanted, 1), 0)
    system.states.get = unreadable_state  # type: ignore[method-assign,assignment]
    async with system.dispatcher.submit(wanted):
        delivery = await system.queue.pull()
        assert isinstance(delivery, InMemoryDelivery)
        await system.runner().run(delivery)
    assert delivery.verbs == ["term"]
    assert (await system.states.totals())[RequestStatus.FAILED] == 1
