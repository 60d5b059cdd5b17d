"""Room and Precedence: the adapter on NATS and the in-memory twin of each pass the same tests."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace
from typing import NamedTuple

import pytest

from forebay_contracts.nats.connection import Connection
from forebay_contracts.queueing.admission import JetStreamAdmission
from forebay_contracts.queueing.deliveries import JetStreamDeliveries
from forebay_contracts.queueing.memory import InMemoryQueue
from forebay_contracts.queueing.memory_room import InMemoryPrecedence
from forebay_contracts.queueing.protocols import Admission, Deliveries, Delivery, Precedence, Room
from forebay_contracts.queueing.room import JetStreamPrecedence, JetStreamRoom
from forebay_contracts.wire import names
from forebay_contracts.wire.errors import QueueFull, WaitingRoomFull
from forebay_contracts.wire.request import CompletionType, InferenceRequest, Tier
from support.nats import NatsServer
from support.seams import MAX_CONCURRENT, MAX_DEFERRED, MAX_QUEUE_SIZE, MODEL, connected
from support.twins import worker_info

TOKEN = names.model_token(MODEL)


def request(request_id: str, key: str | None = None, tier: Tier = Tier.FLEX) -> InferenceRequest:
    now = time.time()
    return InferenceRequest(
        id=request_id,
        completion_type=CompletionType.CHAT,
        model=MODEL,
        created_at=now,
        deadline=now + 60,
        reply_to="inference.replies.a.b",
        key=key,
        tier=tier,
    )


class Seams(NamedTuple):
    """All that meets in the room, and a second worker's notices."""

    room: Room
    admission: Admission
    deliveries: Deliveries
    precedence: Precedence
    other: Precedence


def on_nats(connection: Connection) -> Seams:
    admission = JetStreamAdmission(connection)
    workers = (JetStreamPrecedence(connection, MODEL) for _ in range(2))
    return Seams(JetStreamRoom(connection, admission), admission, JetStreamDeliveries(connection, MODEL), *workers)


@pytest.fixture(params=["memory", pytest.param("jetstream", marks=pytest.mark.nats)])
async def seams(request: pytest.FixtureRequest) -> AsyncIterator[Seams]:
    if request.param == "memory":
        queue = InMemoryQueue(MAX_QUEUE_SIZE, MAX_CONCURRENT, MAX_DEFERRED)
        workers = (InMemoryPrecedence(queue, queue.room, TOKEN) for _ in range(2))
        yield Seams(queue.room, queue, queue, *workers)
        return
    async with connected(request.getfixturevalue("nats_server")) as connection:
        made = on_nats(connection)
        yield made
        await made.deliveries.stop()


async def moved(seams: Seams, key: str | None = None) -> str:
    """Move the first of a key; returns its Nats-Msg-Id."""
    waiting = await seams.room.first(TOKEN, key)
    assert waiting is not None
    await seams.room.move(waiting)
    return waiting.headers[names.HEADER_MSG_ID]


async def pulled(seams: Seams) -> Delivery:
    return await asyncio.wait_for(seams.deliveries.pull(), 30)


async def until(said: Callable[[], bool | Awaitable[bool]]) -> None:
    """Wait until it is so: nothing tells that the server has counted a message."""
    async with asyncio.timeout(30):
        while not (found if isinstance(found := said(), bool) else await found):  # noqa: ASYNC110
            await asyncio.sleep(0.005)


async def test_a_moved_request_is_the_one_that_was_admitted(seams: Seams) -> None:
    wanted = request("a", "alice")
    sequence = await seams.admission.publish(wanted)
    assert await seams.admission.publish(wanted) == sequence
    assert await seams.admission.holds("a", sequence, deferred=True)
    assert dict(await seams.room.backlog(TOKEN)) == {"alice": 1}
    assert await moved(seams, "alice") == "a"
    assert not await seams.admission.holds("a", sequence, deferred=True)
    assert not any((await seams.room.backlog(TOKEN)).values())
    delivery = await pulled(seams)
    assert InferenceRequest.model_validate_json(delivery.data) == wanted
    assert names.turn_of(delivery.headers[names.HEADER_MSG_ID]) == ("a", 0)
    assert delivery.headers[names.HEADER_DEFERRED] == "chat"
    assert delivery.headers[names.HEADER_REPLY_TO] == wanted.reply_to
    assert await seams.admission.holds("a", delivery.sequence)


async def test_each_turn_is_moved_once(seams: Seams) -> None:
    wanted = request("a")
    await seams.admission.publish(wanted)
    first = await seams.room.first(TOKEN, None)
    assert first is not None
    for _ in range(2):  # by two apis
        await seams.room.move(first)
    delivery = await pulled(seams)
    assert [await seams.admission.put_back(wanted, 1, {}) for _ in range(2)] == [2, 2]
    await delivery.term()
    assert await moved(seams) == "a.1"
    again = await pulled(seams)
    assert names.turn_of(again.headers[names.HEADER_MSG_ID]) == ("a", 1)
    assert await seams.admission.holds("a", again.sequence)
    await again.ack()
    assert await seams.room.first(TOKEN, None) is None
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(seams.deliveries.pull(), 0.05)


async def test_each_key_has_a_line_and_a_bound(seams: Seams) -> None:
    for number in range(MAX_DEFERRED):
        await seams.admission.publish(request(f"a{number}", "alice"))
    with pytest.raises(WaitingRoomFull):
        await seams.admission.publish(request("one-too-many", "alice"))
    await seams.admission.publish(request("b", "bob"))
    await seams.admission.publish(request("c"))
    await seams.admission.put_back(request("back", "alice"), 1, {})
    assert dict(await seams.room.backlog(TOKEN)) == {"alice": MAX_DEFERRED + 1, "bob": 1, None: 1}
    assert [await moved(seams, key) for key in ("bob", None, "alice", "alice")] == ["b", "c", "back.1", "a0"]
    waiting = await seams.room.first(TOKEN, "alice")
    assert waiting is not None
    with pytest.raises(QueueFull):
        await seams.room.move(waiting)
    assert (await seams.room.backlog(TOKEN))["alice"] == MAX_DEFERRED - 1


@pytest.mark.nats
async def test_what_is_no_request_holds_up_nothing(nats_server: NatsServer) -> None:
    async with connected(nats_server) as connection:
        made = on_nats(connection)
        names_of = (names.HEADER_MSG_ID, names.HEADER_DEADLINE, names.HEADER_REPLY_TO, names.HEADER_DEFERRED)
        good = dict(zip(names_of, ("x", "1.5", "r", "chat"), strict=True))
        wrong = ({}, {names.HEADER_MSG_ID: "a b.1"}, {names.HEADER_DEADLINE: "soon"}, {names.HEADER_DEFERRED: "*"})
        for headers in wrong:
            subject = names.deferred_subject(MODEL, "a")
            await connection.jetstream.publish(subject, b"x", headers=good | headers if headers else None)
            assert await made.room.first(TOKEN, "a") is None
        await made.admission.publish(request("good", "a"))
        assert await moved(made, "a") == "good"
        assert await made.room.first(TOKEN, "a") is None


@pytest.mark.nats
async def test_what_gives_way_finds_a_place_in_a_full_room(nats_server: NatsServer) -> None:
    async with connected(nats_server) as connection:
        jetstream = connection.jetstream
        config = (await jetstream.stream_info(names.DEFERRED)).config
        await jetstream.update_stream(replace(config, max_bytes=10_000))
        with contextlib.suppress(WaitingRoomFull):
            for number in range(100):
                await JetStreamAdmission(connection).publish(request(f"r{number}", f"key{number}"))
        assert number < 99
        assert await JetStreamAdmission(connection).put_back(request("back", "key0"), 1, {})


async def test_a_request_is_removed_from_the_room(seams: Seams) -> None:
    first, second = [await seams.admission.publish(request(name)) for name in "ab"]
    assert not await seams.admission.remove("b", first, deferred=True)
    assert await seams.admission.remove("a", first, deferred=True)
    waiting = await seams.room.first(TOKEN, None)
    assert waiting is not None
    assert waiting.sequence == second
    await seams.room.drop(waiting)
    assert await seams.room.first(TOKEN, None) is None


async def test_what_is_idle(seams: Seams) -> None:
    assert await seams.room.idle(TOKEN, 1) == 1
    assert await seams.room.idle(TOKEN, 100) == MAX_CONCURRENT
    await seams.admission.publish(request("a"))
    await moved(seams)
    assert await seams.room.idle(TOKEN, 100) < MAX_CONCURRENT, "also before the consumer has counted it"
    delivery = await pulled(seams)
    assert await seams.room.idle(TOKEN, 100) == MAX_CONCURRENT - 1
    await delivery.ack()
    for taken, name in enumerate("bc", 1):
        await seams.admission.publish(request(name, tier=Tier.DEFAULT))

        async def as_many_wait(left: int = MAX_CONCURRENT - taken) -> bool:
            return await seams.room.idle(TOKEN, 100) == left

        await until(as_many_wait)
    assert await seams.room.idle(TOKEN, 1) == 0


async def test_one_worker_hears_of_what_may_not_wait(seams: Seams) -> None:
    heard: dict[str, list[int]] = {"first": [], "second": []}
    await seams.precedence.hear(heard["first"].append)
    await seams.admission.publish(request("deferred"))
    await moved(seams)
    sequence = await seams.admission.publish(request("a", tier=Tier.DEFAULT))
    await until(lambda: bool(heard["first"]))
    assert heard["first"] == [sequence]
    await seams.other.hear(heard["second"].append)
    await seams.precedence.pass_on([sequence])
    await until(lambda: bool(heard["second"]))
    assert heard == {"first": [sequence], "second": [sequence]}
    await seams.other.pass_on([])


@pytest.mark.nats
async def test_what_waits_for_its_redelivery(nats_server: NatsServer) -> None:
    async with connected(nats_server) as connection:
        made = on_nats(connection)
        for number in range(MAX_CONCURRENT):
            await made.admission.publish(request(f"r{number}", tier=Tier.DEFAULT))
        out = [await pulled(made) for _ in range(MAX_CONCURRENT)]
        await out[0].nak()
        for slots, waiting in ((MAX_CONCURRENT, 0), (MAX_CONCURRENT - 1, 1)):
            info = worker_info("w", slots, MODEL).encode()
            await connection.jetstream.publish(names.bucket_subject(names.WORKERS_BUCKET, "w"), info)
            assert await made.precedence.awaiting_redelivery() == waiting
        assert (await pulled(made)).sequence == out[0].sequence
        await made.deliveries.stop()


async def test_where_the_deliveries_are(seams: Seams) -> None:
    for number in range(MAX_CONCURRENT + 1):
        await seams.admission.publish(request(f"r{number}", tier=Tier.DEFAULT))
    out = [await pulled(seams) for _ in range(MAX_CONCURRENT)]

    async def one_waits() -> bool:
        return (await seams.precedence.line()).waiting == 1

    await until(one_waits)
    line = await seams.precedence.line()
    assert (line.delivered, line.full) == (out[-1].sequence, True)
    next_one = asyncio.create_task(pulled(seams))
    await out[0].term()
    await (await next_one).ack()
    waits = asyncio.create_task(seams.deliveries.pull())

    async def a_slot_waits() -> bool:
        return not (await seams.precedence.line()).full

    await until(a_slot_waits)
    waits.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await waits
